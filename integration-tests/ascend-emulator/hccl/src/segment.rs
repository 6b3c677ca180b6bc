//! The memory that the members of a group share: who has come, and chunks on their way.
//!
//! Every operation is cut into chunks, in the same way on all members. Chunk `g` goes through slot `g % 2`: its root writes
//! when everybody has taken chunk `g - 2`, and publishes it; everybody takes it. So all operations are in one order.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use rustix::{
    fs::{Mode, OFlags},
    mm::{MapFlags, ProtFlags},
};

use crate::{Answer, SYSCALL, TIMEOUT, refuse};

pub(crate) const MEMBERS: usize = 64;
pub(crate) const CHUNK: u64 = 1 << 20;

/// The beginning of the file; all zero when new.
#[repr(C)]
pub(crate) struct Header {
    pub(crate) joined: [AtomicU32; MEMBERS],
    pub(crate) taken: [AtomicU64; MEMBERS],
    pub(crate) published: AtomicU64,
    /// What the root says that each slot's chunk is: root, and bytes.
    pub(crate) root: [AtomicU64; 2],
    pub(crate) bytes: [AtomicU64; 2],
}

const DATA: usize = 4096;
const LEN: usize = DATA + 2 * CHUNK as usize;
const _: () = assert!(size_of::<Header>() <= DATA);

pub(crate) struct Segment {
    base: usize,
    path: PathBuf,
}

/// A name that no other group has.
pub(crate) fn new_name() -> Answer<String> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let time = std::time::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_nanos());
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    Ok(format!("ckpt-ascend-emulator-{}-{count}-{time:x}", std::process::id()))
}

impl Segment {
    /// Maps the file of this name; `create` makes it if it is not there.
    pub(crate) fn open(name: &str, create: bool) -> Answer<Self> {
        let path = PathBuf::from("/dev/shm").join(name);
        let flags = OFlags::RDWR | OFlags::CLOEXEC | if create { OFlags::CREATE } else { OFlags::empty() };
        let Ok(file) = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR) else {
            // Who comes after the others gave up finds nothing.
            return refuse(TIMEOUT, "the group was given up");
        };
        // SAFETY: a new mapping at a place of the kernel's choice; the file is as long after the call before it.
        let base = rustix::fs::ftruncate(&file, LEN as u64).and_then(|()| unsafe {
            let rights = ProtFlags::READ | ProtFlags::WRITE;
            rustix::mm::mmap(std::ptr::null_mut(), LEN, rights, MapFlags::SHARED, &file, 0)
        });
        match base {
            Ok(base) => Ok(Self { base: base as usize, path }),
            Err(error) => refuse(SYSCALL, error.to_string()),
        }
    }

    pub(crate) fn header(&self) -> &Header {
        // SAFETY: the mapping is page aligned and longer than the header, whose fields are all atomic; it stays while
        // `self` lives.
        unsafe { &*(self.base as *const Header) }
    }

    /// The first byte of the slot of chunk `chunk`.
    pub(crate) fn slot(&self, chunk: u64) -> *mut u8 {
        (self.base + DATA + (chunk % 2 * CHUNK) as usize) as *mut u8
    }

    /// Takes the name away; who has it mapped keeps it.
    pub(crate) fn forget(&self) {
        // The others may have done it.
        let _ = rustix::fs::unlink(&self.path);
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: mapped once, and nobody has it any more.
        let _ = unsafe { rustix::mm::munmap(self.base as *mut _, LEN) };
    }
}
