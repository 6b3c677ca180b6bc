//! Host memory: anonymous mappings and what the machine has left.

use std::{fmt, path::Path, sync::Arc};

use memmap2::{Advice, MmapMut, MmapRaw};

use crate::{
    device::{Buffer, BufferSlice, MemoryKind},
    error::{Error, ErrorKind, Result},
};

/// Mappings of this size or more ask for huge pages.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Zeroed host memory of its own mapping: page aligned, given back to the system when dropped.
pub struct HostBuffer {
    map: MmapRaw,
    len_bytes: u64,
}

impl HostBuffer {
    /// `len_bytes` of zeroed memory; 0 is fine. Pages are taken from the system when first touched.
    pub fn allocate(len_bytes: u64) -> Result<Arc<Self>> {
        let error =
            |message: String| Error::new(ErrorKind::ResourceExhausted, "allocate host memory", message);
        let len = usize::try_from(len_bytes.max(1))
            .map_err(|_| error(format!("{len_bytes} bytes are too many")))?;
        let map = MmapMut::map_anon(len).map_err(|e| {
            error(format!("the system has no {len_bytes} bytes; use less memory")).caused_by(e)
        })?;
        let map = MmapRaw::from(map);
        if len_bytes >= HUGE_PAGE_BYTES {
            // Only faster, never needed: kernels without huge pages refuse.
            let _ = map.advise(Advice::HugePage);
        }
        Ok(Arc::new(Self { map, len_bytes }))
    }

    /// A copy of `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Arc<Self>> {
        let buffer = Self::allocate(bytes.len() as u64)?;
        // SAFETY: the mapping is at least `bytes.len()` long, and nobody else has it yet.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer.map.as_mut_ptr(), bytes.len()) };
        Ok(buffer)
    }

    /// All of it as a slice.
    pub fn slice(self: &Arc<Self>) -> BufferSlice {
        BufferSlice::whole(self.clone())
    }
}

impl fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostBuffer").field("len_bytes", &self.len_bytes).finish_non_exhaustive()
    }
}

// SAFETY: the mapping is readable and writable, is not moved or unmapped before the value is dropped, and is at least
// `len_bytes` long.
unsafe impl Buffer for HostBuffer {
    fn address(&self) -> u64 {
        self.map.as_mut_ptr() as u64
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn memory(&self) -> MemoryKind {
        MemoryKind::Host
    }
}

/// Bytes that new allocations may take without swapping: the machine's, or the container's if that is less.
pub(super) fn available_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(|e| {
        Error::new(ErrorKind::Unavailable, "ask for free memory", "/proc/meminfo cannot be read").caused_by(e)
    })?;
    let machine = parse_mem_available(&text).ok_or_else(|| {
        Error::new(ErrorKind::Unavailable, "ask for free memory", "/proc/meminfo has no line `MemAvailable`")
    })?;
    Ok(container_left(Path::new("/sys/fs/cgroup")).map_or(machine, |left| left.min(machine)))
}

fn parse_mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What a cgroup's limit leaves; `None` without a limit.
fn container_left(folder: &Path) -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    let (limit, used) = (read("memory.max")?, read("memory.current")?);
    // The page cache counts as used and is given back under pressure.
    let stat = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let cache = stat
        .lines()
        .find_map(|line| line.strip_prefix("inactive_file "))
        .and_then(|n| n.trim().parse::<u64>().ok());
    Some(limit.saturating_sub(used.saturating_sub(cache.unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_and_cgroup_limits_are_read() {
        let text = "MemTotal:       24682560 kB\nMemAvailable:   24000000 kB\n";
        assert_eq!(parse_mem_available(text), Some(24_000_000 * 1024));
        assert_eq!(parse_mem_available("MemTotal: 1 kB\n"), None);
        assert!(available_bytes().unwrap() > 0);

        let folder = tempfile::tempdir().unwrap();
        assert_eq!(container_left(folder.path()), None);
        std::fs::write(folder.path().join("memory.max"), "max\n").unwrap();
        std::fs::write(folder.path().join("memory.current"), "700\n").unwrap();
        assert_eq!(container_left(folder.path()), None);
        std::fs::write(folder.path().join("memory.max"), "1000\n").unwrap();
        assert_eq!(container_left(folder.path()), Some(300));
        std::fs::write(folder.path().join("memory.stat"), "anon 5\ninactive_file 200\n").unwrap();
        assert_eq!(container_left(folder.path()), Some(500));
    }

    #[test]
    fn empty_memory_is_fine_and_too_much_is_an_error() {
        let empty = HostBuffer::allocate(0).unwrap();
        assert_eq!(empty.slice().len_bytes(), 0);
        let error = HostBuffer::allocate(1 << 60).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
    }
}
