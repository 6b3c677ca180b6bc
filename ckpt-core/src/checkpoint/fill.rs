//! Filling arenas: reading, copying, digesting and pinning in one pass, over all cores.

use std::{
    fs::File,
    io::IoSliceMut,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use super::{
    digest::DigestAlgorithm,
    load::{LoadOptions, Progress},
    memory::{file_error, touch},
    place::Placement,
    pool::Lease,
    source::{CheckpointSource, Origin, SourceTensor, shrank},
};
use crate::{
    device::{Buffer, BufferSlice},
    error::{Error, ErrorKind, Key, Result},
    types::align_up,
};

/// What one thread works on at a time, at most.
const MAX_UNIT_BYTES: u64 = 256 << 20;
const MIN_UNIT_BYTES: u64 = 4 << 20;
/// Read, then digested while it is still in the core's cache.
const BATCH_BYTES: u64 = 4 << 20;
/// Below the system's limit of 1,024 ranges in one read.
const BATCH_RANGES: usize = 512;
const UNIT_PIECES: usize = 16 * 1024;

/// A range of one tensor.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// Number in the share's order.
    slot: usize,
    /// Bytes from the tensor's start.
    at: u64,
    len: u64,
}

/// One tensor's place, and what is left to do of it.
struct Slot<'a> {
    tensor: &'a SourceTensor,
    arena: usize,
    offset: u64,
    digest: AtomicU64,
    /// Pieces that are not filled; the one who fills the last digests a tensor that was cut.
    left: AtomicUsize,
}

struct ArenaState {
    pinned: Mutex<Option<Arc<dyn Buffer>>>,
    /// Pieces that are not filled; the one who fills the last pins the arena.
    left: AtomicUsize,
}

struct Filler<'a> {
    source: &'a CheckpointSource,
    placement: &'a Placement,
    lease: &'a Lease,
    digests: Option<DigestAlgorithm>,
    progress: Option<&'a dyn Progress>,
    deadline: Option<Instant>,
    slots: Vec<Slot<'a>>,
    arenas: Vec<ArenaState>,
    failed: AtomicBool,
    first_error: Mutex<Option<Error>>,
}

/// Arenas that hold their bytes.
pub(super) struct Filled {
    /// The arenas' memory.
    pub pinned: Vec<Arc<dyn Buffer>>,
    /// One per tensor, in the share's order; zeros where none were asked for.
    pub digests: Vec<u64>,
}

/// Fills and pins the arenas of `placement`.
pub(super) fn fill(
    source: &CheckpointSource,
    placement: &Placement,
    lease: &Lease,
    options: &LoadOptions,
) -> Result<Filled> {
    let threads = match options.threads {
        0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
        n => n,
    };
    let slots: Vec<Slot> = (placement.share.arenas.iter().enumerate())
        .flat_map(|(arena, a)| a.tensors.iter().map(move |t| (arena, t.offset)))
        .zip(&placement.order)
        .map(|((arena, offset), i)| Slot {
            tensor: &source.tensors()[*i],
            arena,
            offset,
            digest: AtomicU64::new(0),
            left: AtomicUsize::new(0),
        })
        .collect();
    let total: u64 = slots.iter().map(|s| s.tensor.meta.len_bytes()).sum();
    let unit_bytes = (total / (threads as u64 * 4)).clamp(MIN_UNIT_BYTES, MAX_UNIT_BYTES);
    let arenas = placement.arenas.iter();
    let filler = Filler {
        source,
        placement,
        lease,
        digests: options.digests,
        progress: options.progress.as_deref(),
        deadline: options.deadline,
        arenas: arenas.map(|_| ArenaState { pinned: Mutex::new(None), left: AtomicUsize::new(0) }).collect(),
        slots,
        failed: AtomicBool::new(false),
        first_error: Mutex::new(None),
    };
    let units = filler.units(unit_bytes);
    let next = AtomicUsize::new(0);
    let work = || {
        while !filler.failed.load(Ordering::Relaxed) {
            let Some(unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            if let Err(e) = filler.run(unit) {
                filler.fail(e);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(units.len()) {
            scope.spawn(work);
        }
        work();
    });
    let first_error = filler.first_error.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(error) = first_error {
        return Err(error);
    }
    let mut pinned = Vec::with_capacity(filler.arenas.len());
    for arena in 0..filler.arenas.len() {
        filler.pin(arena)?; // those without any byte to fill
        let state = filler.arenas[arena].pinned.lock().unwrap_or_else(PoisonError::into_inner);
        pinned.extend(state.clone());
    }
    Ok(Filled { pinned, digests: filler.slots.into_iter().map(|s| s.digest.into_inner()).collect() })
}

impl Filler<'_> {
    /// Cuts the work into units of consecutive pieces, and counts the pieces of each tensor and arena.
    fn units(&self, unit_bytes: u64) -> Vec<Vec<Piece>> {
        let mut units = Vec::new();
        let mut unit: Vec<Piece> = Vec::new();
        let mut bytes = 0;
        for (number, slot) in self.slots.iter().enumerate() {
            let len = slot.tensor.meta.len_bytes();
            if len == 0 {
                let digest = self.digests.map_or(0, |d| d.digest(&[]));
                slot.digest.store(digest, Ordering::Relaxed);
            }
            // A file in place that is new here is still touched, so that pinning finds its pages.
            if self.is_mapped(slot) && self.digests.is_none() && self.placement.arenas[slot.arena].pinned {
                if let Some(progress) = self.progress {
                    progress.advance(len);
                }
                continue;
            }
            let mut at = 0;
            while at < len {
                // A tensor that fits a unit stays whole, so that its digest is made on the way.
                if !unit.is_empty()
                    && (bytes + (len - at).min(unit_bytes) > unit_bytes || unit.len() == UNIT_PIECES)
                {
                    units.push(std::mem::take(&mut unit));
                    bytes = 0;
                }
                let piece = Piece { slot: number, at, len: (len - at).min(unit_bytes) };
                slot.left.fetch_add(1, Ordering::Relaxed);
                self.arenas[slot.arena].left.fetch_add(1, Ordering::Relaxed);
                unit.push(piece);
                bytes += piece.len;
                at += piece.len;
            }
        }
        if !unit.is_empty() {
            units.push(unit);
        }
        units
    }

    fn run(&self, unit: &[Piece]) -> Result<()> {
        let mut running = self.digests.map(DigestAlgorithm::start);
        let (mut piece, mut done) = (0, 0);
        while piece < unit.len() {
            if self.failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            if self.deadline.is_some_and(|d| Instant::now() >= d) {
                return Err(Error::new(
                    ErrorKind::Timeout,
                    "load checkpoint",
                    "the deadline passed while reading",
                ));
            }
            let batch = self.batch(&unit[piece..], done);
            self.read(&batch)?;
            for part in &batch {
                let whole = unit[piece];
                let slot = &self.slots[whole.slot];
                if let (Some(algorithm), true) = (self.digests, whole.len == slot.tensor.meta.len_bytes()) {
                    let slice = self.memory(part)?;
                    // SAFETY: these bytes were filled above by this thread, and no other piece covers them.
                    let bytes = unsafe { slice.as_slice() }?;
                    if part.len == whole.len {
                        slot.digest.store(algorithm.digest(bytes), Ordering::Relaxed);
                    } else if let Some(running) = &mut running {
                        running.update(bytes);
                    }
                }
                done += part.len;
                if let Some(progress) = self.progress {
                    progress.advance(part.len);
                }
                if done == whole.len {
                    let in_parts = part.len < whole.len && whole.len == slot.tensor.meta.len_bytes();
                    if let (Some(algorithm), true) = (self.digests, in_parts) {
                        let finished = running.replace(algorithm.start());
                        slot.digest.store(finished.map_or(0, |r| r.finish()), Ordering::Relaxed);
                    }
                    self.finish(whole)?;
                    piece += 1;
                    done = 0;
                }
            }
        }
        Ok(())
    }

    /// The next parts to read at once: neighbours in one file, up to a batch. `done` bytes of the first piece are read.
    fn batch(&self, pieces: &[Piece], done: u64) -> Vec<Piece> {
        let mut batch: Vec<Piece> = Vec::new();
        let mut bytes = 0;
        let mut skip = done;
        let mut expected = None;
        for piece in pieces {
            let place = match self.slots[piece.slot].tensor.origin {
                Origin::File { file, offset } => Some((file, offset + piece.at)),
                _ => None,
            };
            if !batch.is_empty() && (expected.is_none() || place != expected || batch.len() == BATCH_RANGES) {
                break;
            }
            let len = (piece.len - skip).min(BATCH_BYTES - bytes);
            batch.push(Piece { slot: piece.slot, at: piece.at + skip, len });
            bytes += len;
            if skip + len < piece.len || bytes == BATCH_BYTES {
                break;
            }
            expected = place.map(|(file, offset)| (file, offset + piece.len));
            skip = 0;
        }
        batch
    }

    fn read(&self, batch: &[Piece]) -> Result<()> {
        let mut slices = Vec::with_capacity(batch.len());
        for part in batch {
            let slot = &self.slots[part.slot];
            if !self.is_mapped(slot) {
                slices.push((part, self.memory(part)?));
            } else if !self.placement.arenas[slot.arena].pinned {
                touch(&self.memory(part)?);
            }
        }
        let Some((first, slice)) = slices.first() else { return Ok(()) };
        let tensor = self.slots[first.slot].tensor;
        let file = match tensor.origin {
            Origin::File { file, .. } => self.placement.files[file].as_ref(),
            _ => None,
        };
        match (&tensor.origin, file) {
            (Origin::File { file: number, offset }, Some(file)) if slices.len() > 1 => {
                let mut ranges = Vec::with_capacity(slices.len());
                for (_, slice) in &slices {
                    // SAFETY: pieces are disjoint and each is filled by one thread; `Pool::lease` made sure that nobody
                    // else holds the memory.
                    ranges.push(IoSliceMut::new(unsafe { slice.as_mut_slice() }?));
                }
                read_ranges(file, &mut ranges, offset + first.at).map_err(|failure| {
                    let path = &self.source.files[*number].path;
                    let error = match failure {
                        ReadFailure::Ended(at) => shrank(path, at),
                        ReadFailure::System(e) => file_error("read checkpoint", path, e.into()),
                    };
                    error.with(Key::Tensor, &tensor.meta.name)
                })
            }
            _ => {
                // SAFETY: as above.
                let out = unsafe { slice.as_mut_slice() }?;
                self.source.read_at(tensor, file, first.at, out)
            }
        }
    }

    /// After the last byte of a piece: padding, the digest of a tensor that was cut, the arena's pin.
    fn finish(&self, piece: Piece) -> Result<()> {
        let slot = &self.slots[piece.slot];
        let len = slot.tensor.meta.len_bytes();
        let arena = &self.placement.share.arenas[slot.arena];
        if piece.at + piece.len == len && !self.is_mapped(slot) {
            // The share's arenas end on an aligned offset, so the padding lies inside.
            let padding = (slot.offset + len)..(slot.offset + align_up(len)).min(arena.len_bytes);
            let slice = self.arena(slot.arena)?.slice(padding)?;
            // SAFETY: padding belongs to the tensor before it, and this thread finishes that tensor's last piece.
            unsafe { slice.as_mut_slice() }?.fill(0);
        }
        // Release what this thread wrote, acquire what the others did.
        let last = slot.left.fetch_sub(1, Ordering::AcqRel) == 1;
        if let (Some(algorithm), true) = (self.digests, last && piece.len < len) {
            let slice = self.arena(slot.arena)?.slice(slot.offset..slot.offset + len)?;
            // SAFETY: all pieces of the tensor are filled, and nobody writes them again.
            slot.digest.store(algorithm.digest(unsafe { slice.as_slice() }?), Ordering::Relaxed);
        }
        if self.arenas[slot.arena].left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.pin(slot.arena)?;
        }
        Ok(())
    }

    fn pin(&self, arena: usize) -> Result<()> {
        let mut pinned = self.arenas[arena].pinned.lock().unwrap_or_else(PoisonError::into_inner);
        if pinned.is_none() {
            let memory = &self.placement.arenas[arena];
            let buffer = memory.buffer.clone();
            *pinned = Some(if memory.pinned { buffer } else { self.lease.pin(buffer)? });
        }
        Ok(())
    }

    fn arena(&self, arena: usize) -> Result<BufferSlice> {
        let len_bytes = self.placement.share.arenas[arena].len_bytes;
        BufferSlice::new(self.placement.arenas[arena].buffer.clone(), 0..len_bytes)
    }

    fn memory(&self, part: &Piece) -> Result<BufferSlice> {
        let slot = &self.slots[part.slot];
        let start = slot.offset + part.at;
        self.arena(slot.arena)?.slice(start..start + part.len)
    }

    fn is_mapped(&self, slot: &Slot) -> bool {
        self.placement.arenas[slot.arena].mapped.is_some()
    }

    fn fail(&self, error: Error) {
        self.first_error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.failed.store(true, Ordering::Relaxed);
    }
}

enum ReadFailure {
    /// The file has no byte at this offset.
    Ended(u64),
    System(rustix::io::Errno),
}

fn read_ranges(file: &File, mut ranges: &mut [IoSliceMut<'_>], mut offset: u64) -> Result<(), ReadFailure> {
    while !ranges.is_empty() {
        match rustix::io::preadv(file, ranges, offset) {
            Ok(0) => return Err(ReadFailure::Ended(offset)),
            Ok(n) => {
                offset += n as u64;
                IoSliceMut::advance_slices(&mut ranges, n);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(ReadFailure::System(e)),
        }
    }
    Ok(())
}
