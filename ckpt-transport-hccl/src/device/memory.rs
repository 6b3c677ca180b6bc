//! Device memory, the library's own host memory, and mappings of another process's device memory.

use std::{fmt, sync::Arc};

use ckpt_core::{
    Error, ErrorKind, Result,
    device::{Buffer, BufferSlice, MemoryKind},
};

use super::acl::{IpcKey, Npu};

/// Allocations are rounded up to this, the size of a huge page: a block is what is exported.
const GRANULE: u64 = 2 << 20;

/// An `aclrtMalloc` block.
pub(crate) struct DeviceMemory {
    pub(crate) npu: Arc<Npu>,
    address: u64,
    len_bytes: u64,
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceMemory({:#x}, {} bytes)", self.address, self.len_bytes)
    }
}

impl DeviceMemory {
    /// `ACL_MEM_MALLOC_HUGE_FIRST`.
    const HUGE_FIRST: i32 = 0;

    /// At least `len_bytes`, as a block of its own, in huge pages where there are some.
    pub(crate) fn allocate(npu: &Arc<Npu>, len_bytes: u64) -> Result<Self> {
        const OPERATION: &str = "allocate device memory";
        let rounded = len_bytes.max(1).checked_next_multiple_of(GRANULE).ok_or_else(|| {
            Error::new(ErrorKind::ConfigInvalid, OPERATION, format!("{len_bytes} bytes are too many"))
        })?;
        let mut address = 0;
        npu.run(OPERATION, "aclrtMalloc", |f| {
            // SAFETY: writes one device pointer.
            unsafe { (f.memory_alloc)(&mut address, rounded as usize, Self::HUGE_FIRST) }
        })
        .map_err(|error| match error.kind() {
            ErrorKind::ResourceExhausted => explain_exhaustion(npu, rounded, error),
            _ => error,
        })?;
        Ok(Self { npu: npu.clone(), address, len_bytes: rounded })
    }
}

fn explain_exhaustion(npu: &Npu, wanted: u64, error: Error) -> Error {
    let free = free_memory(npu).map_or("an unknown number of".to_owned(), |free| free.to_string());
    let message = format!(
        "{wanted} bytes were asked for and {free} are free; lower --mem-fraction or the engine's share"
    );
    Error::new(ErrorKind::ResourceExhausted, "allocate device memory", message).caused_by(error)
}

/// Free bytes of the device: of its HBM, or of its DDR where it has no HBM.
pub(crate) fn free_memory(npu: &Npu) -> Result<u64> {
    const DDR: i32 = 0;
    const HBM: i32 = 1;
    let (mut free, mut total) = (0usize, 0usize);
    let mut ask = |attribute| {
        npu.run("read free device memory", "aclrtGetMemInfo", |f| {
            // SAFETY: writes two integers.
            unsafe { (f.memory_info)(attribute, &mut free, &mut total) }
        })
        .map(|()| (free, total))
    };
    match ask(HBM) {
        Ok((free, total)) if total > 0 => Ok(free as u64),
        _ => ask(DDR).map(|(free, _)| free as u64),
    }
}

// SAFETY: the block is allocated until drop, and drop runs when nobody holds the buffer.
unsafe impl Buffer for DeviceMemory {
    fn address(&self) -> u64 {
        self.address
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn memory(&self) -> MemoryKind {
        MemoryKind::Device
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let freed = self.npu.run("free device memory", "aclrtFree", |f| {
            // SAFETY: allocated by `allocate`, freed once. Work that used it is over: it held a slice until then.
            unsafe { (f.memory_free)(self.address) }
        });
        if let Err(error) = freed {
            tracing::debug!(%error, "device memory was not freed");
        }
    }
}

/// An `aclrtMallocHost` block: the only host memory that the device copies from and to without a detour.
pub(crate) struct HostMemory {
    npu: Arc<Npu>,
    /// What the library gave.
    base: u64,
    address: u64,
    len_bytes: u64,
}

impl fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostMemory({:#x}, {} bytes)", self.address, self.len_bytes)
    }
}

impl HostMemory {
    /// `len_bytes` that hold nothing in particular; 0 is fine. Large blocks begin at a huge page, as peers that read them
    /// over HCCS need it.
    pub(crate) fn allocate(npu: &Arc<Npu>, len_bytes: u64) -> Result<Self> {
        let align = if len_bytes >= GRANULE { GRANULE } else { 1 };
        let room = len_bytes.saturating_add(align).min(isize::MAX as u64);
        let mut base = 0;
        npu.run("allocate pinned host memory", "aclrtMallocHost", |f| {
            // SAFETY: writes one host pointer.
            unsafe { (f.host_alloc)(&mut base, room as usize) }
        })
        .map_err(|error| {
            let message = format!("the driver refused {len_bytes} bytes; is so much host memory free?");
            Error::new(error.kind(), "allocate pinned host memory", message).caused_by(error)
        })?;
        Ok(Self { npu: npu.clone(), base, address: base.next_multiple_of(align), len_bytes })
    }
}

// SAFETY: the block is allocated, readable and writable until drop, and drop runs when nobody holds the buffer.
unsafe impl Buffer for HostMemory {
    fn address(&self) -> u64 {
        self.address
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn memory(&self) -> MemoryKind {
        MemoryKind::HostPinned
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        let freed = self.npu.run("free pinned host memory", "aclrtFreeHost", |f| {
            // SAFETY: allocated by `allocate`, freed once. Copies that used it are over: they held a slice until then.
            unsafe { (f.host_free)(self.base) }
        });
        if let Err(error) = freed {
            tracing::debug!(%error, "pinned host memory was not freed");
        }
    }
}

/// A copy in [`HostMemory`] of memory that others allocated: what pinning comes to on this device.
#[derive(Debug)]
pub(crate) struct PinnedCopy {
    copy: HostMemory,
    #[expect(dead_code, reason = "pinned memory keeps its original alive")]
    original: Arc<dyn Buffer>,
}

impl PinnedCopy {
    /// Copies `memory` as it is now.
    pub(crate) fn of(npu: &Arc<Npu>, memory: Arc<dyn Buffer>) -> Result<Self> {
        let original = BufferSlice::whole(memory.clone());
        let copy = HostMemory::allocate(npu, original.len_bytes())?;
        let from = original.host_ptr()?;
        // SAFETY: both ranges have this length and are mapped while their buffers live; the new one overlaps nothing and
        // nobody else has it. Who pins memory writes it at another time.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), copy.address as *mut u8, copy.len_bytes as usize)
        };
        Ok(Self { copy, original: memory })
    }
}

// SAFETY: the range is that of `copy`, which this value holds.
unsafe impl Buffer for PinnedCopy {
    fn address(&self) -> u64 {
        self.copy.address
    }

    fn len_bytes(&self) -> u64 {
        self.copy.len_bytes
    }

    fn memory(&self) -> MemoryKind {
        MemoryKind::HostPinned
    }
}

/// Another process's exported block, mapped here.
pub(crate) struct IpcMapping {
    npu: Arc<Npu>,
    key: IpcKey,
    base: u64,
    offset: u64,
    len_bytes: u64,
}

impl fmt::Debug for IpcMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IpcMapping({:#x}, {} bytes)", self.base + self.offset, self.len_bytes)
    }
}

impl IpcMapping {
    /// `ACL_RT_IPC_MEM_IMPORT_FLAG_ENABLE_PEER_ACCESS`, as torch_npu sets it.
    const PEER_ACCESS: u64 = 1;

    /// Maps `len_bytes` from `offset` of the block behind `key`. The exporting process must be another one.
    pub(crate) fn open(npu: &Arc<Npu>, key: &[u8], offset: u64, len_bytes: u64) -> Result<Self> {
        const OPERATION: &str = "open a ring of device memory";
        let bytes: IpcKey = key.try_into().map_err(|_| {
            let message = format!("an ACL IPC key has 65 bytes, this one {}", key.len());
            Error::new(ErrorKind::Corrupt, OPERATION, message)
        })?;
        let mut base = 0;
        npu.run(OPERATION, "aclrtIpcMemImportByKey", |f| {
            // SAFETY: writes one device pointer; reads 65 bytes, which the library checks.
            unsafe { (f.ipc_import)(&mut base, &bytes, Self::PEER_ACCESS) }
        })?;
        Ok(Self { npu: npu.clone(), key: bytes, base, offset, len_bytes })
    }
}

// SAFETY: mapped until drop. The exporter keeps the block until this process has said that it let go (quarantine).
unsafe impl Buffer for IpcMapping {
    fn address(&self) -> u64 {
        self.base + self.offset
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn memory(&self) -> MemoryKind {
        MemoryKind::Device
    }
}

impl Drop for IpcMapping {
    fn drop(&mut self) {
        let closed = self.npu.run("close a ring of device memory", "aclrtIpcMemClose", |f| {
            // SAFETY: imported once with this key; copies that used it held a slice until they were done.
            unsafe { (f.ipc_close)(&self.key) }
        });
        if let Err(error) = closed {
            tracing::debug!(%error, "a ring's mapping was not closed");
        }
    }
}
