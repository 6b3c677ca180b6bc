//! The ring: one exported block of device memory.

use std::{ops::Range, sync::Arc};

use ckpt_core::{
    Result,
    device::{Buffer, Ring, RingExport},
};

use super::{
    acl::{IpcKey, Npu},
    memory::DeviceMemory,
};

/// An `aclrtMalloc` block with its IPC key. The block is freed when the last slice of it is gone; the driver of an update
/// keeps the ring until the worker has let go.
#[derive(Debug)]
pub struct AscendRing {
    memory: Arc<DeviceMemory>,
    key: IpcKey,
}

impl AscendRing {
    /// `ACL_RT_IPC_MEM_EXPORT_FLAG_DISABLE_PID_VALIDATION`: whoever has the key may open it. Lists of process ids do not
    /// work across containers.
    const ANY_PROCESS: u64 = 1;

    pub(crate) fn allocate(npu: &Arc<Npu>, len_bytes: u64) -> Result<Self> {
        let memory = Arc::new(DeviceMemory::allocate(npu, len_bytes)?);
        let mut key: IpcKey = [0; 65];
        let (address, len) = (memory.address(), memory.len_bytes() as usize);
        npu.run("export a ring of device memory", "aclrtIpcMemGetExportKey", |f| {
            // SAFETY: writes 65 bytes; the range is a whole `aclrtMalloc` block.
            unsafe { (f.ipc_export)(address, len, &mut key, size_of::<IpcKey>(), Self::ANY_PROCESS) }
        })?;
        Ok(Self { memory, key })
    }
}

impl Ring for AscendRing {
    fn buffer(&self) -> Arc<dyn Buffer> {
        self.memory.clone()
    }

    fn export(&self) -> RingExport {
        RingExport::Ascend { key: self.key.to_vec(), offset_bytes: 0 }
    }

    fn freed(&self, _range: Range<u64>) {}
}

impl Drop for AscendRing {
    fn drop(&mut self) {
        // Keys are few and outlive a crashed process: each is given back, before its memory goes.
        let closed = self.memory.npu.run("release a ring's key", "aclrtIpcMemClose", |f| {
            // SAFETY: exported once with this key, closed once.
            unsafe { (f.ipc_close)(&self.key) }
        });
        if let Err(error) = closed {
            tracing::warn!(%error, "a ring's IPC key was not given back");
        }
    }
}
