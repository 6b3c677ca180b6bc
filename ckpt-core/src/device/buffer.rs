//! Memory that is owned while anything may still read or write it.

use std::{fmt, ops::Range, os::fd::OwnedFd, ptr::NonNull, sync::Arc};

use crate::error::{Error, ErrorKind, Result};

/// Where bytes live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemoryKind {
    /// Ordinary host memory.
    Host,
    /// Host memory that a device can copy from at full rate.
    HostPinned,
    /// Device memory: the address means nothing to the CPU.
    Device,
}

/// A fixed block of memory.
///
/// # Safety
/// `address()..address() + len_bytes()` must stay valid and mapped, at the same place, until the value is dropped;
/// for host kinds it must be readable and, where a caller was given a writable buffer, writable by this process.
pub unsafe trait Buffer: Send + Sync + fmt::Debug {
    /// First byte: a host pointer, or a device pointer for [`MemoryKind::Device`].
    fn address(&self) -> u64;
    /// Bytes.
    fn len_bytes(&self) -> u64;
    /// Where it lives.
    fn memory(&self) -> MemoryKind;
    /// The whole of it as a dma-buf, for an RDMA device to register: device memory whose driver can export it. The
    /// descriptor keeps the memory alive by itself.
    fn dma_buf(&self) -> Option<Result<OwnedFd>> {
        None
    }
}

/// A range of a [`Buffer`] that keeps the buffer alive. Cloning it copies no bytes.
#[derive(Clone, Debug)]
pub struct BufferSlice {
    buffer: Arc<dyn Buffer>,
    offset: u64,
    len_bytes: u64,
}

impl BufferSlice {
    /// `range` of `buffer`; an error if it does not lie inside.
    pub fn new(buffer: Arc<dyn Buffer>, range: Range<u64>) -> Result<Self> {
        if range.start > range.end || range.end > buffer.len_bytes() {
            return Err(Error::new(
                ErrorKind::Internal,
                "slice a buffer",
                format!("{}..{} is outside {} bytes", range.start, range.end, buffer.len_bytes()),
            ));
        }
        Ok(Self { buffer, offset: range.start, len_bytes: range.end - range.start })
    }

    /// All of `buffer`.
    pub fn whole(buffer: Arc<dyn Buffer>) -> Self {
        let len_bytes = buffer.len_bytes();
        Self { buffer, offset: 0, len_bytes }
    }

    /// A part of this slice.
    pub fn slice(&self, range: Range<u64>) -> Result<Self> {
        if range.start > range.end || range.end > self.len_bytes {
            return Err(Error::new(
                ErrorKind::Internal,
                "slice a buffer",
                format!("{}..{} is outside {} bytes", range.start, range.end, self.len_bytes),
            ));
        }
        Ok(Self {
            buffer: self.buffer.clone(),
            offset: self.offset + range.start,
            len_bytes: range.end - range.start,
        })
    }

    /// Address of the first byte, in the address space of [`Self::memory`].
    pub fn address(&self) -> u64 {
        self.buffer.address() + self.offset
    }

    /// Bytes.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Where it lives.
    pub fn memory(&self) -> MemoryKind {
        self.buffer.memory()
    }

    /// The buffer that this is a part of.
    pub fn buffer(&self) -> &Arc<dyn Buffer> {
        &self.buffer
    }

    /// Bytes from the buffer's start.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// A host pointer to the first byte; an error for device memory.
    pub fn host_ptr(&self) -> Result<NonNull<u8>> {
        let pointer = NonNull::new(self.address() as *mut u8);
        match (self.memory(), pointer) {
            (MemoryKind::Host | MemoryKind::HostPinned, Some(pointer)) => Ok(pointer),
            _ => Err(Error::new(
                ErrorKind::Unsupported,
                "touch a buffer from the host",
                "the bytes are in device memory",
            )),
        }
    }

    /// The bytes.
    ///
    /// # Safety
    /// Nothing may write this range while the reference lives. In an update the plan's `waits_for` gives that.
    pub unsafe fn as_slice(&self) -> Result<&[u8]> {
        let pointer = self.host_ptr()?;
        // SAFETY: `Buffer` promises that the range is mapped while `self.buffer` lives; the caller excludes writers.
        Ok(unsafe { std::slice::from_raw_parts(pointer.as_ptr(), self.len_bytes as usize) })
    }

    /// The bytes, to be written.
    ///
    /// # Safety
    /// Nothing else may read or write this range while the reference lives, and the buffer must be writable.
    #[allow(clippy::mut_from_ref, reason = "shared memory; exclusion is the caller's promise")]
    pub unsafe fn as_mut_slice(&self) -> Result<&mut [u8]> {
        let pointer = self.host_ptr()?;
        // SAFETY: `Buffer` promises that the range is mapped while `self.buffer` lives; the caller excludes others.
        Ok(unsafe { std::slice::from_raw_parts_mut(pointer.as_ptr(), self.len_bytes as usize) })
    }
}
