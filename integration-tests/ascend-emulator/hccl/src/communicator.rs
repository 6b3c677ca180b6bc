//! The communicators of this process.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    Answer, PARA, RUNTIME, TIMEOUT, UNAVAIL, acl,
    collective::Work,
    refuse,
    segment::{MEMBERS, Segment},
};

pub(crate) struct Communicator {
    pub(crate) name: String,
    pub(crate) rank: u32,
    pub(crate) members: u32,
    pub(crate) device: i32,
    pub(crate) segment: Segment,
    /// Chunks that enqueued operations have taken so far.
    pub(crate) enqueued: Mutex<u64>,
    /// Chunks that operations have gone through.
    pub(crate) passed: AtomicU64,
    pub(crate) ended: AtomicBool,
    inside: AtomicU32,
    failed: AtomicI32,
}

type Map = HashMap<usize, Arc<Communicator>>;

pub(crate) fn communicators() -> MutexGuard<'static, Map> {
    static MAP: OnceLock<Mutex<Map>> = OnceLock::new();
    MAP.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

/// A pause between two looks at what another member does.
pub(crate) fn pause(looks: &mut u32) {
    *looks = looks.saturating_add(1);
    match *looks {
        ..50 => std::thread::yield_now(),
        _ => std::thread::sleep(Duration::from_micros(50)),
    }
}

/// Joins the group whose shared memory has this name, and waits for all.
pub(crate) fn join(
    name: &str,
    create: bool,
    members: u32,
    rank: u32,
    device: i32,
    patience: Duration,
) -> Answer<usize> {
    if members as usize > MEMBERS || rank >= members {
        return refuse(PARA, format!("rank {rank} of {members}"));
    }
    let segment = Segment::open(name, create)?;
    let joined = &segment.header().joined;
    if joined[rank as usize].swap(1, Ordering::AcqRel) != 0 {
        return refuse(PARA, format!("rank {rank} has joined already"));
    }
    let (deadline, mut looks) = (Instant::now() + patience, 0);
    while joined[..members as usize].iter().any(|joined| joined.load(Ordering::Acquire) == 0) {
        if Instant::now() >= deadline {
            segment.forget();
            return refuse(TIMEOUT, format!("not all of {members} members came within {patience:?}"));
        }
        pause(&mut looks);
    }
    segment.forget();
    static NEXT: AtomicUsize = AtomicUsize::new(0xC0_0000);
    let handle = NEXT.fetch_add(16, Ordering::Relaxed);
    let communicator = Communicator {
        name: name.to_owned(),
        rank,
        members,
        device,
        segment,
        enqueued: Mutex::new(0),
        passed: AtomicU64::new(0),
        ended: AtomicBool::new(false),
        inside: AtomicU32::new(0),
        failed: AtomicI32::new(0),
    };
    communicators().insert(handle, Arc::new(communicator));
    Ok(handle)
}

impl Communicator {
    /// The live communicator behind `handle`, on the thread's own device.
    pub(crate) fn find(handle: usize, device: i32) -> Answer<Arc<Self>> {
        let found = communicators().get(&handle).cloned();
        match found {
            None => refuse(PARA, format!("{handle:#x} is no communicator, or was destroyed")),
            Some(found) if found.device != device => refuse(
                PARA,
                format!("the communicator is on device {}, this thread on {device}", found.device),
            ),
            Some(found) => Ok(found),
        }
    }

    pub(crate) fn inside(&self) -> bool {
        self.inside.load(Ordering::Acquire) > 0
    }

    /// Marks a call as being inside until the result is dropped.
    pub(crate) fn enter(&self) -> Inside<'_> {
        self.inside.fetch_add(1, Ordering::AcqRel);
        Inside(&self.inside)
    }

    pub(crate) fn failed(&self) -> i32 {
        self.failed.load(Ordering::Acquire)
    }

    pub(crate) fn submit(self: &Arc<Self>, stream: usize, work: Work) -> Answer {
        let Some(acl) = acl::acl() else { return refuse(RUNTIME, "no ACL runtime") };
        let mut enqueued = self.enqueued.lock().unwrap_or_else(PoisonError::into_inner);
        if self.ended.load(Ordering::Acquire) {
            return refuse(UNAVAIL, "the communicator was destroyed");
        }
        let first = *enqueued;
        let chunks = work.chunks(self.members);
        let own = self.clone();
        let task = Box::new(move || match work.perform(&own, first) {
            Ok(()) => 0,
            Err(refusal) => {
                eprintln!("ascend emulator: an HCCL operation failed: {}", refusal.why);
                own.failed.store(refusal.code, Ordering::Release);
                507_000
            }
        });
        match acl.submit(stream, task) {
            0 => {
                *enqueued += chunks;
                Ok(())
            }
            code => refuse(RUNTIME, format!("the runtime refused the operation with {code}")),
        }
    }

    /// Frees operations that wait for others. As on accelerators their streams go on as if all were well.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }
}

pub(crate) struct Inside<'a>(&'a AtomicU32);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
