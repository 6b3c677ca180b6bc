//! Operations, as their streams perform them.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::{
    Answer, INTERNAL, PARA, RUNTIME,
    acl::{self, Range},
    communicator::{Communicator, pause},
    refuse,
    segment::CHUNK,
};

/// One enqueued operation.
pub(crate) enum Work {
    Broadcast { memory: u64, bytes: u64, root: u32 },
    Gather { own: u64, all: u64, bytes: u64 },
    Sum { from: u64, to: u64, bytes: u64 },
    Barrier,
}

/// The range as the host sees it.
pub(crate) fn range(device: i32, address: u64, bytes: u64) -> Answer<Range> {
    let Some(acl) = acl::acl() else { return refuse(RUNTIME, "no ACL runtime") };
    match acl.resolve(device, address, bytes) {
        Some(range) => Ok(range),
        None => refuse(PARA, format!("{bytes} bytes at {address:#x} are not device {device}'s memory")),
    }
}

/// An operation of a communicator that was destroyed under it.
struct Ended;

/// What one member passes on or takes, in host memory.
struct Transfer {
    root: u32,
    at: usize,
    bytes: u64,
}

impl Work {
    /// Device memory that it uses, but for the gathered result.
    pub(crate) fn ranges(&self) -> Vec<(u64, u64)> {
        match *self {
            Work::Broadcast { memory, bytes, .. } => vec![(memory, bytes)],
            Work::Gather { own, all, bytes } => vec![(own, bytes), (all, bytes)],
            Work::Sum { from, to, bytes } => vec![(from, bytes), (to, bytes)],
            Work::Barrier => Vec::new(),
        }
    }

    /// Chunks that it takes, the same on all members.
    pub(crate) fn chunks(&self, members: u32) -> u64 {
        match self {
            Work::Broadcast { bytes, .. } => chunks_of(*bytes),
            Work::Gather { bytes, .. } | Work::Sum { bytes, .. } => chunks_of(*bytes) * u64::from(members),
            Work::Barrier => u64::from(members),
        }
    }

    /// Goes through the chunks from `first` on. Memory is looked up only now: what was freed is found out.
    pub(crate) fn perform(&self, group: &Arc<Communicator>, first: u64) -> Answer {
        if group.ended.load(Ordering::Acquire) {
            return Ok(());
        }
        if group.passed.load(Ordering::Acquire) != first {
            return refuse(INTERNAL, "two operations of one communicator overlap");
        }
        match self.transfers(group, first) {
            Ok(Ok(())) => group.passed.store(first + self.chunks(group.members), Ordering::Release),
            Ok(Err(Ended)) => {}
            Err(refusal) => return Err(refusal),
        }
        Ok(())
    }

    fn transfers(&self, group: &Communicator, first: u64) -> Answer<Result<(), Ended>> {
        let mut chunk = first;
        let mut pass = |root, at, bytes| transfer(group, &mut chunk, &Transfer { root, at, bytes });
        let all_roots = 0..group.members;
        match *self {
            Work::Broadcast { memory, bytes, root } => {
                let held = range(group.device, memory, bytes)?;
                pass(root, held.at, bytes)
            }
            Work::Gather { own, all, bytes } => {
                let own = range(group.device, own, bytes)?;
                let all = range(group.device, all, bytes * u64::from(group.members))?;
                for root in all_roots {
                    let place = all.at + (bytes * u64::from(root)) as usize;
                    if root == group.rank {
                        // SAFETY: both ranges were just looked up, hold `bytes`, and do not overlap (checked when enqueued).
                        unsafe {
                            std::ptr::copy_nonoverlapping(
                                own.at as *const u8,
                                place as *mut u8,
                                bytes as usize,
                            )
                        };
                    }
                    if pass(root, place, bytes)?.is_err() {
                        return Ok(Err(Ended));
                    }
                }
                Ok(Ok(()))
            }
            Work::Sum { from, to, bytes } => {
                let (from, to) = (range(group.device, from, bytes)?, range(group.device, to, bytes)?);
                let mut sums = vec![0.0_f32; bytes as usize / 4];
                for root in all_roots {
                    let mut part = vec![0.0_f32; sums.len()];
                    if root == group.rank {
                        // SAFETY: `from` holds `bytes`, as does `part`.
                        unsafe {
                            let (from, to) = (from.at as *const u8, part.as_mut_ptr().cast::<u8>());
                            std::ptr::copy_nonoverlapping(from, to, bytes as usize);
                        }
                    }
                    if pass(root, part.as_mut_ptr() as usize, bytes)?.is_err() {
                        return Ok(Err(Ended));
                    }
                    sums.iter_mut().zip(&part).for_each(|(sum, part)| *sum += part);
                }
                // SAFETY: `to` holds `bytes`, as does `sums`.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        sums.as_ptr().cast::<u8>(),
                        to.at as *mut u8,
                        bytes as usize,
                    )
                };
                Ok(Ok(()))
            }
            Work::Barrier => {
                for root in all_roots {
                    if pass(root, 0, 0)?.is_err() {
                        return Ok(Err(Ended));
                    }
                }
                Ok(Ok(()))
            }
        }
    }
}

fn chunks_of(bytes: u64) -> u64 {
    bytes.div_ceil(CHUNK).max(1)
}

/// Brings bytes from the root to everybody.
fn transfer(group: &Communicator, chunk: &mut u64, what: &Transfer) -> Answer<Result<(), Ended>> {
    for number in 0..chunks_of(what.bytes) {
        let begin = number * CHUNK;
        let bytes = (what.bytes - begin).min(CHUNK);
        let at = what.at + begin as usize;
        match pass_chunk(group, *chunk, what.root, at, bytes)? {
            Ok(()) => *chunk += 1,
            Err(ended) => return Ok(Err(ended)),
        }
    }
    Ok(Ok(()))
}

fn pass_chunk(
    group: &Communicator,
    chunk: u64,
    root: u32,
    at: usize,
    bytes: u64,
) -> Answer<Result<(), Ended>> {
    let (header, slot) = (group.segment.header(), (chunk % 2) as usize);
    let own = &header.taken[group.rank as usize];
    let taken_by_all = |chunks: u64| {
        let reached = |taken: &AtomicU64| taken.load(Ordering::Acquire) >= chunks;
        header.taken[..group.members as usize].iter().all(reached)
    };
    let place = group.segment.slot(chunk);
    if root == group.rank {
        // The slot's last chunk was number `chunk - 2`.
        if !until(group, || {
            taken_by_all(chunk.saturating_sub(1)) && header.published.load(Ordering::Acquire) == chunk
        }) {
            return Ok(Err(Ended));
        }
        if bytes > 0 {
            // SAFETY: the caller's range holds `bytes`, which are no more than a slot's; nobody reads or writes the slot
            // between the chunk before it and this one's publication.
            unsafe { std::ptr::copy_nonoverlapping(at as *const u8, place, bytes as usize) };
        }
        header.root[slot].store(root.into(), Ordering::Relaxed);
        header.bytes[slot].store(bytes, Ordering::Relaxed);
        header.published.store(chunk + 1, Ordering::Release);
    } else {
        if !until(group, || header.published.load(Ordering::Acquire) > chunk) {
            return Ok(Err(Ended));
        }
        let sent = (header.root[slot].load(Ordering::Relaxed), header.bytes[slot].load(Ordering::Relaxed));
        if sent != (root.into(), bytes) {
            return refuse(
                INTERNAL,
                format!("member {} sent {} bytes; {bytes} of {root} were due", sent.0, sent.1),
            );
        }
        if bytes > 0 {
            // SAFETY: as above; the slot stays until this member says that it has taken it.
            unsafe { std::ptr::copy_nonoverlapping(place, at as *mut u8, bytes as usize) };
        }
    }
    own.store(chunk + 1, Ordering::Release);
    Ok(Ok(()))
}

/// Waits; false if the communicator was destroyed meanwhile.
fn until(group: &Communicator, holds: impl Fn() -> bool) -> bool {
    let mut looks = 0;
    while !holds() {
        if group.ended.load(Ordering::Acquire) {
            return false;
        }
        pause(&mut looks);
    }
    true
}
