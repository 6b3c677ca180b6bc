//! The ring: one exported block of device memory.

use std::{ops::Range, sync::Arc};

use ckpt_core::{
    Result,
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
