//! Rings of the host device: shared-memory files that a worker maps, the stand-in for CUDA IPC.

use std::{
    fmt,
    fs::{File, OpenOptions},
    ops::Range,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use memmap2::{MmapOptions, MmapRaw};
use rustix::{
    fs::{FallocateFlags, FlockOperation, fallocate, flock, fstat, statfs, statvfs},
    io::Errno,
};

use super::{adversary::POISON, runtime_dir::private_dir};
use crate::{
    device::{Buffer, BufferSlice, MemoryKind, Ring, RingExport},
    error::{Error, ErrorKind, Key, Result},
};

const PREFIX: &str = "ckpt-ring-";
const PAGE_BYTES: u64 = 4096;
/// `f_type` of tmpfs.
const TMPFS_MAGIC: u64 = 0x0102_1994;

static COUNTER: AtomicU64 = AtomicU64::new(0);

/// The mapped file. It is locked while it lives, so that nobody takes it for a dead process's.
struct RingMemory {
    map: MmapRaw,
    path: PathBuf,
    len_bytes: u64,
    _lock: File,
}

impl Drop for RingMemory {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "a ring's file was gone already");
        }
    }
}

impl fmt::Debug for RingMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RingMemory")
            .field("path", &self.path)
            .field("len_bytes", &self.len_bytes)
            .finish_non_exhaustive()
    }
}

// SAFETY: the mapping is shared, readable and writable, has all its pages reserved where the file system can do that,
// and stays until the value is dropped; it is at least `len_bytes` long.
unsafe impl Buffer for RingMemory {
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

/// A ring in a shared-memory file.
#[derive(Debug)]
pub(super) struct HostRing {
    memory: Arc<RingMemory>,
    poison: bool,
}

impl HostRing {
    /// Makes the ring in the first of `folders` that has room.
    pub(super) fn create(folders: &[PathBuf], rank: u32, len_bytes: u64, poison: bool) -> Result<Self> {
        let mut refusals = Vec::new();
        for folder in folders {
            match create_in(folder, rank, len_bytes) {
                Ok(memory) => {
                    let ring = Self { memory: Arc::new(memory), poison };
                    ring.freed(0..len_bytes);
                    return Ok(ring);
                }
                Err(error) => {
                    tracing::warn!(folder = %folder.display(), %error, "a folder has no room for a ring");
                    refusals.push(format!("{}: {error}", folder.display()));
                }
            }
        }
        Err(Error::new(
            ErrorKind::ResourceExhausted,
            "allocate a ring",
            format!(
                "no folder has room for {len_bytes} bytes of shared memory ({}); use a smaller bucket size, enlarge \
                 /dev/shm or set CKPT_RUNTIME_DIR",
                refusals.join("; ")
            ),
        ))
    }
}

fn create_in(folder: &Path, rank: u32, len_bytes: u64) -> std::io::Result<RingMemory> {
    let file_bytes = len_bytes.max(1).next_multiple_of(PAGE_BYTES);
    let len = usize::try_from(file_bytes).map_err(std::io::Error::other)?;
    let (file, path) = loop {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("{PREFIX}{}-{rank}-{number}", std::process::id()));
        let file = match OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path) {
            Ok(file) => file,
            // Left by a dead process with our id; the next number is as good.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => continue,
            Err(error) => return Err(error),
        };
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        // A sweep of another container may have removed it before it was locked.
        if fstat(&file)?.st_nlink > 0 {
            break (file, path);
        }
    };
    let map = reserve(&file, file_bytes).and_then(|()| MmapOptions::new().len(len).map_raw(&file));
    match map {
        Ok(map) => Ok(RingMemory { map, path, len_bytes, _lock: file }),
        Err(error) => {
            let _ = std::fs::remove_file(&path);
            Err(error)
        }
    }
}

/// Takes all pages now: a full file system is an error here, not a SIGBUS in the middle of an update.
fn reserve(file: &File, bytes: u64) -> std::io::Result<()> {
    loop {
        match fallocate(file, FallocateFlags::empty(), 0, bytes) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => continue,
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => return file.set_len(bytes),
            Err(error) => return Err(error.into()),
        }
    }
}

impl Ring for HostRing {
    fn buffer(&self) -> Arc<dyn Buffer> {
        self.memory.clone()
    }

    fn export(&self) -> RingExport {
        RingExport::Host { path: self.memory.path.clone(), offset_bytes: 0 }
    }

    fn freed(&self, range: Range<u64>) {
        if !self.poison {
            return;
        }
        let range = range.start.min(self.memory.len_bytes)..range.end.min(self.memory.len_bytes);
        if let Ok(slice) = BufferSlice::new(self.memory.clone(), range) {
            // SAFETY: the caller says that these bytes are free; poisoning them is how a caller who is wrong is found.
            if let Ok(bytes) = unsafe { slice.as_mut_slice() } {
                bytes.fill(POISON);
            }
        }
    }
}

/// Where rings go, best first: memory-backed folders before disks.
pub(super) fn ring_folders(runtime_dir: &Path) -> Vec<PathBuf> {
    let mut folders = vec![runtime_dir.to_owned()];
    if !is_tmpfs(runtime_dir) && is_tmpfs(Path::new("/dev/shm")) {
        let shm = PathBuf::from(format!("/dev/shm/ckpt-{}", rustix::process::geteuid().as_raw()));
        match private_dir(&shm) {
            Ok(()) => folders.insert(0, shm),
            Err(error) => tracing::warn!(%error, "rings go to a disk-backed folder"),
        }
    }
    folders
}

fn is_tmpfs(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.f_type as u64 == TMPFS_MAGIC)
}

/// Free bytes of the best folder; `None` if it cannot be asked.
pub(super) fn folder_free_bytes(folders: &[PathBuf]) -> Option<u64> {
    folders
        .iter()
        .filter_map(|folder| statvfs(folder).ok())
        .map(|s| s.f_bavail.saturating_mul(s.f_frsize))
        .max()
}

/// Removes rings that dead processes left in `folder`.
pub(super) fn sweep(folder: &Path) -> Result<()> {
    let entries = std::fs::read_dir(folder).map_err(|e| {
        Error::new(ErrorKind::ConfigInvalid, "sweep the runtime folder", "cannot list the folder")
            .with(Key::Path, folder.display())
            .caused_by(e)
    })?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(pid_of) else { continue };
        if Path::new("/proc").join(pid.to_string()).exists() {
            continue;
        }
        // The process may live in another pid namespace: only the lock says that nobody has the ring.
        let path = entry.path();
        let unlocked = OpenOptions::new()
            .read(true)
            .open(&path)
            .is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok());
        if unlocked && std::fs::remove_file(&path).is_ok() {
            tracing::info!(path = %path.display(), "removed a ring that a dead process left");
        }
    }
    Ok(())
}

fn pid_of(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_ring_is_a_private_file_until_it_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let ring = HostRing::create(&[folder.path().to_owned()], 3, 5000, false).unwrap();
        let RingExport::Host { path, offset_bytes } = ring.export() else { panic!("not a host ring") };
        assert_eq!(offset_bytes, 0);
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        // SAFETY: this test is the only user of the ring.
        unsafe { BufferSlice::whole(ring.buffer()).as_mut_slice().unwrap()[4999] = 7 };
        let seen = std::fs::read(&path).unwrap();
        assert_eq!((seen.len(), seen[4999]), (8192, 7));
        drop(ring);
        assert!(!path.exists());
    }

    #[test]
    fn the_adversarys_ring_is_poisoned_where_it_is_free() {
        let folder = tempfile::tempdir().unwrap();
        let ring = HostRing::create(&[folder.path().to_owned()], 0, 100, true).unwrap();
        let slice = BufferSlice::whole(ring.buffer());
        // SAFETY: this test is the only user of the ring.
        let bytes = unsafe { slice.as_mut_slice().unwrap() };
        assert!(bytes.iter().all(|b| *b == POISON));
        bytes.fill(1);
        ring.freed(10..20);
        ring.freed(99..2000);
        // SAFETY: as above.
        let bytes = unsafe { slice.as_slice().unwrap() };
        assert_eq!(bytes.iter().filter(|b| **b == POISON).count(), 11);
    }

    #[test]
    fn only_the_rings_of_the_dead_are_swept() {
        let folder = tempfile::tempdir().unwrap();
        // Larger than any pid that Linux gives out.
        let dead = folder.path().join(format!("{PREFIX}4294967295-0-0"));
        std::fs::write(&dead, "x").unwrap();
        let elsewhere = folder.path().join(format!("{PREFIX}4294967294-0-0"));
        let held = File::create(&elsewhere).unwrap();
        flock(&held, FlockOperation::NonBlockingLockExclusive).unwrap();
        let other = folder.path().join("worker.sock");
        std::fs::write(&other, "x").unwrap();
        let ring = HostRing::create(&[folder.path().to_owned()], 0, 10, false).unwrap();
        sweep(folder.path()).unwrap();
        assert!(!dead.exists() && elsewhere.exists() && other.exists() && ring.memory.path.exists());
    }

    #[test]
    fn a_full_folder_is_an_error_that_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let error = HostRing::create(&[folder.path().to_owned()], 0, 1 << 50, false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
