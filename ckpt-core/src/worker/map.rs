//! How a worker maps the parameter server's ring.

use std::{
    fs::OpenOptions,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
    sync::Arc,
};

use memmap2::{Mmap, MmapOptions};

use crate::{
    device::{Buffer, MemoryKind, RingExport, host::check_private_dir},
    error::{Error, ErrorKind, Key, Result},
};

/// Maps rings of one kind of memory. A device's crate brings its own.
pub trait RingMapper: Send {
    /// Bit set of the kinds that [`Self::map`] takes, as in a hello: 1 host, 2 CUDA, 4 Ascend.
    fn capabilities(&self) -> u64;
    /// Maps the ring; dropping the result unmaps it.
    fn map(&mut self, export: &RingExport, len_bytes: u64) -> Result<Arc<dyn Buffer>>;
}

/// Maps shared-memory files.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostMapper;

impl RingMapper for HostMapper {
    fn capabilities(&self) -> u64 {
        super::wire::CAN_HOST
    }

    fn map(&mut self, export: &RingExport, len_bytes: u64) -> Result<Arc<dyn Buffer>> {
        match export {
            RingExport::Host { path, offset_bytes } => {
                Ok(Arc::new(HostRing::map(path, *offset_bytes, len_bytes)?))
            }
            RingExport::Cuda { .. } | RingExport::Ascend { .. } => Err(Error::new(
                ErrorKind::Unsupported,
                "map the ring",
                "the ring is in device memory and this worker maps host memory only",
            )),
        }
    }
}

/// A read-only mapping of a part of a shared-memory file.
#[derive(Debug)]
pub struct HostRing {
    map: Mmap,
}

impl HostRing {
    /// Maps `len_bytes` at `offset_bytes` of the file at `path`: a file of this user that nobody else can open, in a
    /// folder that nobody else can enter.
    pub fn map(path: &Path, offset_bytes: u64, len_bytes: u64) -> Result<Self> {
        let fail =
            |kind, message: String| Error::new(kind, "map the ring", message).with(Key::Path, path.display());
        if !path.is_absolute() {
            return Err(fail(ErrorKind::Corrupt, "the ring's path is not absolute".to_owned()));
        }
        check_private_dir(path.parent().unwrap_or(Path::new("/")))?;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
            .open(path)
            .map_err(|e| {
                let hint = "cannot open the ring; do parameter server and worker see the same file system?";
                fail(ErrorKind::Unavailable, hint.to_owned()).caused_by(e)
            })?;
        let meta = file
            .metadata()
            .map_err(|e| fail(ErrorKind::Backend, "cannot look at the ring".to_owned()).caused_by(e))?;
        let uid = rustix::process::geteuid().as_raw();
        if !meta.is_file() || meta.uid() != uid || meta.mode() & 0o077 != 0 {
            let what = format!(
                "the ring must be a file of user {uid} with mode 0600; it belongs to {} with mode {:o}",
                meta.uid(),
                meta.mode() & 0o7777
            );
            return Err(fail(ErrorKind::ConfigInvalid, what));
        }
        let end = offset_bytes.checked_add(len_bytes);
        if end.is_none_or(|end| end > meta.len()) {
            let what =
                format!("{len_bytes} bytes at {offset_bytes} are outside the file of {} bytes", meta.len());
            return Err(fail(ErrorKind::Corrupt, what));
        }
        let len = usize::try_from(len_bytes)
            .map_err(|_| fail(ErrorKind::Unsupported, "the ring is larger than memory".to_owned()))?;
        // SAFETY: the file is the user's own in a folder closed to others; its owner, the parameter server, never
        // shortens it, and writes a range only while no view of that range is handed out (see `TensorView::bytes`).
        let map = unsafe { MmapOptions::new().offset(offset_bytes).len(len).map(&file) };
        let map = map.map_err(|e| fail(ErrorKind::Backend, "cannot map the ring".to_owned()).caused_by(e))?;
        Ok(Self { map })
    }
}

// SAFETY: the mapping is fixed and lives as long as the value. It is read-only: nobody is given it as writable.
unsafe impl Buffer for HostRing {
    fn address(&self) -> u64 {
        self.map.as_ptr() as u64
    }
    fn len_bytes(&self) -> u64 {
        self.map.len() as u64
    }
    fn memory(&self) -> MemoryKind {
        MemoryKind::Host
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn only_private_files_are_mapped_and_only_inside() {
        let private = std::fs::Permissions::from_mode(0o700);
        let dir = tempfile::Builder::new().permissions(private).tempdir().unwrap();
        let path = dir.path().join("ring");
        std::fs::write(&path, (0..100).collect::<Vec<u8>>()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();

        let ring = HostRing::map(&path, 10, 90).unwrap();
        assert_eq!((ring.len_bytes(), ring.map[0], ring.map[89]), (90, 10, 99));
        assert_eq!(HostRing::map(&path, 100, 0).unwrap().len_bytes(), 0);

        for (offset, len) in [(0, 101), (101, 0), (u64::MAX, 2)] {
            let error = HostRing::map(&path, offset, len).unwrap_err();
            assert!(error.message().contains("outside the file of 100 bytes"), "{error}");
        }
        let link = dir.path().join("link");
        symlink(&path, &link).unwrap();
        assert_eq!(HostRing::map(&link, 0, 1).unwrap_err().kind(), ErrorKind::Unavailable);
        assert_eq!(HostRing::map(Path::new("ring"), 0, 1).unwrap_err().kind(), ErrorKind::Corrupt);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(HostRing::map(&path, 0, 1).unwrap_err().message().contains("mode 0600"));
        let open = std::fs::Permissions::from_mode(0o711);
        std::fs::set_permissions(dir.path(), open).unwrap();
        assert!(HostRing::map(&path, 0, 1).unwrap_err().message().contains("chmod 0700"));
    }
}
