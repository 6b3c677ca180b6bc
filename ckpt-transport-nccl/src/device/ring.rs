//! The ring: one exported block of device memory.

use std::{
    ops::Range,
    os::fd::{FromRawFd, OwnedFd},
    sync::Arc,
};

use ckpt_core::{
    Error, ErrorKind, Result,
    device::{Buffer, Ring, RingExport},
};

use super::{
    driver::Context,
    memory::{self, DeviceMemory},
};

/// A `cuMemAlloc` block with its IPC handle. Freed when the last slice of it is gone; the driver of an update keeps it
/// until the worker has let go.
#[derive(Debug)]
pub struct CudaRing {
    memory: Arc<DeviceMemory>,
    handle: [u8; 64],
}

impl CudaRing {
    pub(crate) fn allocate(context: &Arc<Context>, len_bytes: u64) -> Result<Self> {
        let memory = Arc::new(DeviceMemory::allocate(context, len_bytes)?);
        let handle = memory::export(context, memory.address())?;
        Ok(Self { memory, handle })
    }

    /// The whole ring as a dma-buf, for an RDMA device to register. The descriptor keeps the memory alive by itself.
    pub fn dma_buf(&self) -> Result<OwnedFd> {
        const DMA_BUF_FD: i32 = 1;
        let context = self.memory.context();
        let Some(export) = context.driver.functions.dma_buf else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "export a dma-buf",
                "this CUDA driver has no dma-buf export; 11.7 or newer is needed",
            ));
        };
        let (address, len) = (self.memory.address(), self.memory.len_bytes() as usize);
        let mut fd = -1;
        // SAFETY: writes one descriptor; the range is a live block whose ends are multiples of 2 MiB.
        context.run("export a dma-buf", |_| unsafe { export(&mut fd, address, len, DMA_BUF_FD, 0) })?;
        // SAFETY: the driver has just opened it for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

impl Ring for CudaRing {
    fn buffer(&self) -> Arc<dyn Buffer> {
        self.memory.clone()
    }

    fn export(&self) -> RingExport {
        RingExport::Cuda { handle: self.handle.to_vec(), offset_bytes: 0 }
    }

    fn freed(&self, _range: Range<u64>) {}
}
