//! Device memory, pinned host memory and mappings of another process's device memory.

use std::{
    fmt,
    os::fd::{FromRawFd, OwnedFd},
    sync::Arc,
};

use ckpt_core::{
    Error, ErrorKind, Result,
    device::{Buffer, MemoryKind},
};

use super::{
    driver::{Context, Functions, IpcHandle},
    loans,
};
use crate::error::{CUDA_INVALID_VALUE, CUDA_NOT_SUPPORTED};

/// Allocations are rounded up to this: smaller ones share a block, and a block is what is exported.
pub(crate) const GRANULE: u64 = 2 << 20;

/// The right to free a `cuMemAlloc` block.
pub(crate) struct Block {
    context: Arc<Context>,
    pub(crate) address: u64,
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Block({:#x})", self.address)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated by `DeviceMemory::allocate`, freed once. Work that used it is over: it held a slice until
        // then; and whoever had it on loan has given it back.
        let freed = self.context.run("free device memory", |f| unsafe { (f.memory_free)(self.address) });
        if let Err(error) = freed {
            tracing::debug!(%error, "device memory was not freed");
        }
    }
}

/// Device memory of its own block.
pub(crate) struct DeviceMemory {
    block: Arc<Block>,
    len_bytes: u64,
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceMemory({:#x}, {} bytes)", self.block.address, self.len_bytes)
    }
}

impl DeviceMemory {
    /// At least `len_bytes`, as a block of its own.
    pub(crate) fn allocate(context: &Arc<Context>, len_bytes: u64) -> Result<Self> {
        let rounded = len_bytes.max(1).checked_next_multiple_of(GRANULE).ok_or_else(|| {
            Error::new(
                ErrorKind::ConfigInvalid,
                "allocate device memory",
                format!("{len_bytes} bytes are too many"),
            )
        })?;
        let mut address = 0;
        // SAFETY: writes one device pointer.
        let allocate = |f: &Functions| unsafe { (f.memory_alloc)(&mut address, rounded as usize) };
        context.run("allocate device memory", allocate).map_err(|error| match error.kind() {
            ErrorKind::ResourceExhausted => explain_exhaustion(context, rounded, error),
            _ => error,
        })?;
        Ok(Self { block: Arc::new(Block { context: context.clone(), address }), len_bytes: rounded })
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.block.context
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // Other processes may have it mapped: then it is freed once they have let go.
        loans::give_back(&self.block);
    }
}

fn explain_exhaustion(context: &Context, wanted: u64, error: Error) -> Error {
    let free = free_memory(context).map_or("an unknown number of".to_owned(), |free| free.to_string());
    Error::new(
        ErrorKind::ResourceExhausted,
        "allocate device memory",
        format!(
            "{wanted} bytes were asked for and {free} are free; lower --mem-fraction or the engine's share"
        ),
    )
    .caused_by(error)
}

/// Free bytes of the context's device.
pub(crate) fn free_memory(context: &Context) -> Result<u64> {
    let (mut free, mut total) = (0usize, 0usize);
    // SAFETY: writes two integers.
    context.run("read free device memory", |f| unsafe { (f.memory_info)(&mut free, &mut total) })?;
    Ok(free as u64)
}

// SAFETY: the block is allocated until drop, and drop runs when nobody holds the buffer.
unsafe impl Buffer for DeviceMemory {
    fn address(&self) -> u64 {
        self.block.address
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn memory(&self) -> MemoryKind {
        MemoryKind::Device
    }

    fn dma_buf(&self) -> Option<Result<OwnedFd>> {
        const DMA_BUF_FD: i32 = 1;
        let context = self.context();
        // A driver before 11.7 has no such export.
        let export = context.driver.functions.dma_buf?;
        let (address, len) = (self.address(), self.len_bytes as usize);
        let mut fd = -1;
        // SAFETY: writes one descriptor; the range is a live block whose ends are multiples of 2 MiB.
        let exported =
            context.run("export a dma-buf", |_| unsafe { export(&mut fd, address, len, DMA_BUF_FD, 0) });
        // SAFETY: the driver has just opened it for us.
        Some(exported.map(|()| unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}

/// Host memory that is registered with the driver.
pub(crate) struct PinnedMemory {
    context: Arc<Context>,
    memory: Arc<dyn Buffer>,
    /// First page; none for an empty buffer.
    registered: Option<usize>,
}

impl fmt::Debug for PinnedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedMemory({:#x}, {} bytes)", self.memory.address(), self.memory.len_bytes())
    }
}

impl PinnedMemory {
    /// For memory that is mapped without the right to write.
    const READ_ONLY: u32 = 8;

    /// Registers the pages of `memory`.
    pub(crate) fn register(context: &Arc<Context>, memory: Arc<dyn Buffer>) -> Result<Self> {
        if memory.memory() != MemoryKind::Host {
            return Err(Error::new(ErrorKind::Internal, "pin host memory", "the memory is on a device"));
        }
        if memory.len_bytes() == 0 {
            return Ok(Self { context: context.clone(), memory, registered: None });
        }
        let page = rustix::param::page_size() as u64;
        let first = memory.address() / page * page;
        let len = (memory.address() + memory.len_bytes()).next_multiple_of(page) - first;
        let register = |flags: u32| -> Result<i32> {
            let _bound = context.bind()?;
            // SAFETY: `Buffer` promises that the range is mapped while `memory` lives, whole pages always are, and
            // drop unregisters before `memory` goes.
            Ok(unsafe { (context.driver.functions.host_register)(first as usize, len as usize, flags) })
        };
        let mut code = register(0)?;
        if [CUDA_INVALID_VALUE, CUDA_NOT_SUPPORTED].contains(&code) && register(Self::READ_ONLY)? == 0 {
            // The mapping has no write permission: now it is registered as such.
            code = 0;
        }
        context.driver.check("pin host memory", code).map_err(|error| {
            let message = format!(
                "the driver refused {len} bytes; check `ulimit -l` and that nobody pinned them before"
            );
            Error::new(error.kind(), "pin host memory", message).caused_by(error)
        })?;
        Ok(Self { context: context.clone(), memory, registered: Some(first as usize) })
    }
}

// SAFETY: the range is that of `memory`, which this value holds.
unsafe impl Buffer for PinnedMemory {
    fn address(&self) -> u64 {
        self.memory.address()
    }

    fn len_bytes(&self) -> u64 {
        self.memory.len_bytes()
    }

    fn memory(&self) -> MemoryKind {
        MemoryKind::HostPinned
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        if let Some(first) = self.registered {
            // SAFETY: registered once with this address; copies that used it held a slice until they were done.
            let done = self.context.run("unpin host memory", |f| unsafe { (f.host_unregister)(first) });
            if let Err(error) = done {
                tracing::debug!(%error, "host memory was not unpinned");
            }
        }
    }
}

/// The block around `address`: where it starts and how long it is.
pub(crate) fn block_around(context: &Context, address: u64) -> Result<(u64, u64)> {
    let (mut base, mut len) = (0, 0usize);
    // SAFETY: writes one address and one length.
    context.run("find a block of device memory", |f| unsafe {
        (f.memory_block)(&mut base, &mut len, address)
    })?;
    Ok((base, len as u64))
}

/// The IPC handle of the block that starts at `base`.
pub(crate) fn export(context: &Context, base: u64) -> Result<[u8; 64]> {
    let mut handle = IpcHandle([0; 64]);
    // SAFETY: writes 64 bytes; the driver refuses what is not the base of a `cuMemAlloc` block.
    context.run("export device memory", |f| unsafe { (f.ipc_export)(&mut handle, base) })?;
    Ok(handle.0)
}

/// Another process's exported block, mapped here.
pub(crate) struct IpcMapping {
    context: Arc<Context>,
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
    const LAZY_PEER_ACCESS: u32 = 1;

    /// Maps `len_bytes` from `offset` of the block behind `handle`. The exporting process must be another one.
    pub(crate) fn open(context: &Arc<Context>, handle: &[u8], offset: u64, len_bytes: u64) -> Result<Self> {
        let bytes: [u8; 64] = handle.try_into().map_err(|_| {
            Error::new(
                ErrorKind::Corrupt,
                "map device memory",
                format!("a CUDA IPC handle has 64 bytes, this one {}", handle.len()),
            )
        })?;
        let mut base = 0;
        // SAFETY: writes one device pointer; the driver checks the handle.
        context.run("map device memory", |f| unsafe {
            (f.ipc_open)(&mut base, IpcHandle(bytes), Self::LAZY_PEER_ACCESS)
        })?;
        Ok(Self { context: context.clone(), base, offset, len_bytes })
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
        // SAFETY: opened once with this address; copies that used it held a slice until they were done.
        let closed = self.context.run("unmap device memory", |f| unsafe { (f.ipc_close)(self.base) });
        if let Err(error) = closed {
            tracing::debug!(%error, "device memory was not unmapped");
        }
    }
}
