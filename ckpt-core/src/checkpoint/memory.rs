//! Host memory that holds weights: anonymous memory, files mapped in place, and bytes lent by the caller.

use std::{fs::File, os::fd::AsFd, ptr};

use bytes::Bytes;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::{
    device::{Buffer, BufferSlice, MemoryKind},
    error::{Error, ErrorKind, Key, Result},
};

/// Size of a transparent huge page.
const HUGE_PAGE: usize = 2 << 20;
/// Smaller than every page size in use: what an empty block still maps, so that it has an address.
const SMALLEST: usize = 4096;
/// A multiple of every page size of Linux: where mappings of files start.
const MAP_ALIGNMENT: u64 = 64 << 10;

/// Anonymous, zeroed host memory, in huge pages where the system gives them. Pages are touched by who writes first.
#[derive(Debug)]
pub struct HostMemory {
    mapping: Mapping,
    address: u64,
    len_bytes: u64,
}

impl HostMemory {
    /// Reserves `len_bytes`; the system commits pages when they are first written.
    pub fn allocate(len_bytes: u64) -> Result<Self> {
        let fail =
            |message: String| Err(Error::new(ErrorKind::ResourceExhausted, "allocate host memory", message));
        let Ok(len) = usize::try_from(len_bytes) else {
            return fail(format!("{len_bytes} bytes do not fit into the address space"));
        };
        // Room to start at a huge page's boundary; what is not touched costs nothing.
        let align = if len >= HUGE_PAGE { HUGE_PAGE } else { SMALLEST };
        let Some(mapped) =
            len.max(SMALLEST).checked_next_multiple_of(align).and_then(|n| n.checked_add(align))
        else {
            return fail(format!("{len_bytes} bytes do not fit into the address space"));
        };
        // SAFETY: a new anonymous mapping at a place of the kernel's choice touches no existing memory.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                mapped,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        };
        let base = match base {
            Ok(base) => base,
            Err(e) => {
                return fail(format!(
                    "{len_bytes} bytes were refused; free memory, or give this rank a smaller share (more ranks)"
                ))
                .map_err(|error: Error| error.caused_by(e));
            }
        };
        let mapping = Mapping { base: base as usize, len: mapped };
        let address = mapping.base.next_multiple_of(align);
        // SAFETY: the range lies in the mapping just made; the advice changes no contents. A kernel without
        // transparent huge pages refuses it, which is no error.
        let _ = unsafe { rustix::mm::madvise(base, mapped, Advice::LinuxHugepage) };
        Ok(Self { mapping, address: address as u64, len_bytes })
    }
}

// SAFETY: `mapping` keeps the range mapped, readable and writable at one place until this value is dropped.
unsafe impl Buffer for HostMemory {
    fn address(&self) -> u64 {
        debug_assert!(self.address as usize >= self.mapping.base);
        self.address
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn memory(&self) -> MemoryKind {
        MemoryKind::Host
    }
}

/// Part of a file, mapped shared and writable: no copy is made, and pinning it pins the file's own pages.
#[derive(Debug)]
pub(crate) struct FileMemory {
    mapping: Mapping,
}

impl FileMemory {
    /// Where in the file a mapping starts that shall show `offset`.
    pub fn start_of(offset: u64) -> u64 {
        offset / MAP_ALIGNMENT * MAP_ALIGNMENT
    }

    /// Maps `offset..offset + len_bytes` of `file`, from [`Self::start_of`] on. `file` must be open for reading and writing.
    pub fn map(file: &File, offset: u64, len_bytes: u64) -> Result<Self> {
        let file_offset = Self::start_of(offset);
        let len = usize::try_from(len_bytes + (offset - file_offset)).map_err(|e| {
            Error::new(ErrorKind::ResourceExhausted, "map a file", "it does not fit into the address space")
                .caused_by(e)
        })?;
        // SAFETY: a new mapping at a place of the kernel's choice touches no existing memory.
        let base = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                len.max(1),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file.as_fd(),
                file_offset,
            )
        };
        let base = base.map_err(|e| {
            Error::new(ErrorKind::Backend, "map a file", "the system refused the mapping").caused_by(e)
        })?;
        Ok(Self { mapping: Mapping { base: base as usize, len: len.max(1) } })
    }
}

// SAFETY: `mapping` keeps the range mapped at one place until this value is dropped. The pages behind it exist as long
// as nobody truncates the file, which `InPlace` documents as the user's part.
unsafe impl Buffer for FileMemory {
    fn address(&self) -> u64 {
        self.mapping.base as u64
    }

    fn len_bytes(&self) -> u64 {
        self.mapping.len as u64
    }

    fn memory(&self) -> MemoryKind {
        MemoryKind::Host
    }
}

/// Has the system map the pages of `memory` now: in one call instead of one fault a page. Only a hint: a kernel before
/// 5.14 refuses it, and then the pages are mapped when they are first used. For reading: in a shared mapping of tmpfs
/// that is enough for pinning too, and unlike a write it leaves the file's time of modification alone.
pub(crate) fn touch(memory: &BufferSlice) {
    let page = SMALLEST as u64;
    let start = memory.address() / page * page;
    let len = (memory.address() + memory.len_bytes()) - start;
    // SAFETY: the buffer keeps the range mapped, and mapping pages changes no contents.
    let _ = unsafe { rustix::mm::madvise(start as *mut _, len as usize, Advice::LinuxPopulateRead) };
}

/// Bytes that the caller gave; read only.
#[derive(Debug)]
pub(crate) struct LentBytes(pub Bytes);

// SAFETY: `Bytes` never moves or frees its storage while it lives, and nothing hands this buffer out as writable.
unsafe impl Buffer for LentBytes {
    fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    fn len_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn memory(&self) -> MemoryKind {
        MemoryKind::Host
    }
}

/// A mapping that is undone when dropped.
#[derive(Debug)]
struct Mapping {
    base: usize,
    len: usize,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value is the mapping's only owner, and whoever reads it holds the buffer around it.
        if let Err(e) = unsafe { rustix::mm::munmap(self.base as *mut _, self.len) } {
            tracing::warn!(error = %e, "could not unmap {} bytes", self.len);
        }
    }
}

/// An error of a file operation, with its path.
pub(crate) fn file_error(operation: &'static str, path: &std::path::Path, error: std::io::Error) -> Error {
    use std::io::ErrorKind as Io;
    let (kind, message) = match error.kind() {
        Io::NotFound => (ErrorKind::ConfigInvalid, "no such file or directory; check the path"),
        Io::PermissionDenied => (ErrorKind::ConfigInvalid, "permission denied; check owner and mode"),
        Io::StorageFull => {
            (ErrorKind::ResourceExhausted, "no space left on the device; free some or choose another")
        }
        _ => (ErrorKind::Backend, "the system reported an error"),
    };
    Error::new(kind, operation, message).with(Key::Path, path.display()).caused_by(error)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn memory_is_zeroed_aligned_and_writable() {
        for len in [0, 1, 4096, HUGE_PAGE as u64, 5 << 20] {
            let memory = HostMemory::allocate(len).unwrap();
            assert_eq!(memory.len_bytes(), len);
            assert!(memory.address().is_multiple_of(4096));
            if len >= HUGE_PAGE as u64 {
                assert!(memory.address().is_multiple_of(HUGE_PAGE as u64));
            }
            let slice = BufferSlice::whole(Arc::new(memory));
            // SAFETY: nothing else has the slice.
            let bytes = unsafe { slice.as_mut_slice() }.unwrap();
            assert!(bytes.iter().all(|b| *b == 0));
            bytes.fill(7);
        }
    }

    #[test]
    fn too_much_is_an_error() {
        for len in [u64::MAX, u64::MAX / 2] {
            assert_eq!(HostMemory::allocate(len).unwrap_err().kind(), ErrorKind::ResourceExhausted);
        }
    }
}
