//! Memory that outlives a registration, so that the next one neither allocates nor pins.

use std::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};

use super::memory::FileMemory;
use crate::{
    device::{Buffer, DeviceBackend},
    error::{Error, ErrorKind, Key, Recovery, Result},
    types::align_up,
};

/// Blocks are about this large: small enough to pin one while the next is being read, large enough to be few.
const DEFAULT_BLOCK_BYTES: u64 = 1 << 30;

/// Pinned host memory for checkpoints, of one device.
///
/// One checkpoint at a time uses it; dropping its [`super::RegisteredCheckpoint`] gives the memory back to the pool, not
/// to the system. The next registration uses what is there, whatever its shapes, and allocates only what is missing.
/// A checkpoint that shall not share memory with others gets a pool of its own.
#[derive(Debug)]
pub struct Pool {
    device: Arc<dyn DeviceBackend>,
    block_bytes: u64,
    inner: Mutex<Inner>,
    generation: AtomicU64,
    allocations: AtomicU64,
    maps: AtomicU64,
    pins: AtomicU64,
}

#[derive(Debug, Default)]
struct Inner {
    user: Option<String>,
    memory: PoolMemory,
}

/// What a pool owns: pinned anonymous blocks, and pinned mappings of files.
#[derive(Debug, Default)]
pub(super) struct PoolMemory {
    pub blocks: Vec<Arc<dyn Buffer>>,
    pub mapped: Vec<(MapKey, Arc<dyn Buffer>)>,
}

/// Which bytes of which file a mapping shows. While the mapping exists its inode cannot be given to another file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MapKey {
    pub device: u64,
    pub inode: u64,
    pub offset: u64,
    pub len_bytes: u64,
}

/// What a pool has done so far, and what it holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolCounters {
    /// Blocks of memory ever allocated.
    pub allocations: u64,
    /// Files ever mapped in place.
    pub maps: u64,
    /// Calls of [`DeviceBackend::pin`].
    pub pins: u64,
    /// Bytes held now, mapped files included.
    pub held_bytes: u64,
}

impl Pool {
    /// An empty pool; memory is pinned through `device`.
    pub fn new(device: Arc<dyn DeviceBackend>) -> Arc<Self> {
        Self::with_block_bytes(device, DEFAULT_BLOCK_BYTES)
    }

    /// A pool whose blocks are about `block_bytes`; a larger tensor gets a larger block.
    pub fn with_block_bytes(device: Arc<dyn DeviceBackend>, block_bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            device,
            block_bytes: block_bytes.max(1),
            inner: Mutex::default(),
            generation: AtomicU64::new(0),
            allocations: AtomicU64::new(0),
            maps: AtomicU64::new(0),
            pins: AtomicU64::new(0),
        })
    }

    /// What was done so far.
    pub fn counters(&self) -> PoolCounters {
        let inner = self.lock();
        let blocks = inner.memory.blocks.iter().chain(inner.memory.mapped.iter().map(|(_, b)| b));
        PoolCounters {
            allocations: self.allocations.load(Ordering::Relaxed),
            maps: self.maps.load(Ordering::Relaxed),
            pins: self.pins.load(Ordering::Relaxed),
            held_bytes: blocks.map(|b| b.len_bytes()).sum(),
        }
    }

    /// The checkpoint that uses the pool now.
    pub fn user(&self) -> Option<String> {
        self.lock().user.clone()
    }

    /// Unpins and frees all memory; an error while a checkpoint uses it. What is still being read is freed when the
    /// last reader lets go. Returns the bytes given up.
    pub fn free(&self) -> Result<u64> {
        let memory = {
            let mut inner = self.lock();
            if let Some(user) = &inner.user {
                return Err(Error::new(
                    ErrorKind::ConfigInvalid,
                    "free the memory pool",
                    format!("checkpoint {user:?} uses it; unregister that first"),
                ));
            }
            std::mem::take(&mut inner.memory)
        };
        // Unpinning takes time: outside the lock.
        let freed =
            memory.blocks.iter().chain(memory.mapped.iter().map(|(_, b)| b)).map(|b| b.len_bytes()).sum();
        drop(memory);
        Ok(freed)
    }

    /// Takes the pool and its memory for one checkpoint. Fails if it has a user, or if a reader of the last one is left.
    pub(super) fn lease(self: &Arc<Self>, user: &str) -> Result<(Lease, PoolMemory)> {
        let operation = "use the memory pool";
        let mut inner = self.lock();
        if let Some(other) = &inner.user {
            return Err(Error::new(
                ErrorKind::ConfigInvalid,
                operation,
                format!(
                    "checkpoint {other:?} uses it; unregister that first, or register {user:?} in a pool of its own"
                ),
            ));
        }
        // The pool is the only way to a new reference, and its lock is held: a count of 1 cannot grow.
        if let Some(block) = inner.memory.blocks.iter().find(|b| Arc::strong_count(b) > 1) {
            return Err(Error::new(
                ErrorKind::ResourceExhausted,
                operation,
                format!(
                    "a block of {} bytes of the last checkpoint is still being read; try again when its readers ended",
                    block.len_bytes()
                ),
            )
            .recovery_is(Recovery::Retry));
        }
        inner.user = Some(user.to_owned());
        let generation = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
        Ok((Lease { pool: self.clone(), generation }, std::mem::take(&mut inner.memory)))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it holds the lock, and every state of `Inner` is valid by itself.
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The right to use a pool; dropping it makes the pool free for the next checkpoint.
#[derive(Debug)]
pub(super) struct Lease {
    pool: Arc<Pool>,
    pub generation: u64,
}

impl Lease {
    pub fn block_bytes(&self) -> u64 {
        self.pool.block_bytes
    }

    pub fn allocate(&self, len_bytes: u64) -> Result<Arc<dyn Buffer>> {
        self.pool.allocations.fetch_add(1, Ordering::Relaxed);
        // A block always has at least a page: an empty one could not be pinned or registered.
        let len_bytes = len_bytes.max(4096);
        match self.pool.device.own_host_memory(len_bytes)? {
            Some(memory) => Ok(memory),
            None => Ok(Arc::new(super::HostMemory::allocate(len_bytes)?)),
        }
    }

    /// Whether the device can pin files' own pages, so that they need no copy.
    pub fn pins_files(&self) -> Result<bool> {
        Ok(self.pool.device.own_host_memory(0)?.is_none())
    }

    pub fn map(&self, file: &std::fs::File, offset: u64, len_bytes: u64) -> Result<FileMemory> {
        self.pool.maps.fetch_add(1, Ordering::Relaxed);
        FileMemory::map(file, offset, len_bytes)
    }

    pub fn pin(&self, memory: Arc<dyn Buffer>) -> Result<Arc<dyn Buffer>> {
        self.pool.pins.fetch_add(1, Ordering::Relaxed);
        let device = &self.pool.device.info().uuid;
        let (address, len_bytes) = (memory.address(), memory.len_bytes());
        let pinned = self.pool.device.pin(memory).map_err(|e| e.with(Key::Device, device))?;
        if (pinned.address(), pinned.len_bytes()) != (address, len_bytes) {
            return Err(Error::new(ErrorKind::Internal, "pin host memory", "the device moved it")
                .with(Key::Device, device));
        }
        Ok(pinned)
    }

    /// Gives memory back, to be kept for this and later checkpoints.
    pub fn keep(&self, memory: PoolMemory) {
        self.pool.lock().memory = memory;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.pool.lock().user = None;
    }
}

/// Where tensors go in blocks.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Packing {
    /// Block and offset of each tensor. Blocks after the existing ones are new.
    pub places: Vec<(usize, u64)>,
    /// Bytes used of each block, existing ones first.
    pub used: Vec<u64>,
}

/// Fills blocks in order, each tensor in the first block from the current one on that has room; then new blocks of about
/// `block_bytes`. The same sizes and blocks always give the same places.
pub(super) fn pack(len_bytes: &[u64], existing: &[u64], block_bytes: u64) -> Packing {
    let mut used: Vec<u64> = vec![0; existing.len()];
    let mut block = 0;
    let mut places = Vec::with_capacity(len_bytes.len());
    for len in len_bytes {
        let padded = align_up(*len);
        while block < existing.len() && existing[block] - used[block] < padded {
            block += 1;
        }
        if block >= existing.len() {
            // A tensor without bytes fits everywhere, also behind one that is larger than a block.
            let full = block < used.len()
                && used[block] > 0
                && padded > 0
                && used[block].saturating_add(padded) > block_bytes;
            if full {
                block += 1;
            }
            if block >= used.len() {
                used.push(0);
            }
        }
        places.push((block, used[block]));
        used[block] = used[block].saturating_add(padded);
    }
    Packing { places, used }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_same_sizes_fit_again() {
        let sizes = [1000, 0, 300, 256, 5000, 1];
        let first = pack(&sizes, &[], 2048);
        assert_eq!(first.used, [1792, 5120, 256]);
        let again = pack(&sizes, &first.used, 2048);
        assert_eq!(again, first);
        let smaller = pack(&sizes[..3], &first.used, 2048);
        assert_eq!(smaller.used, [1536, 0, 0]);
        let oversized = pack(&[2305, 0], &[], 1);
        assert_eq!(pack(&[2305, 0], &oversized.used, 1), oversized);
        let larger = pack(&[1000, 6000], &first.used, 2048);
        assert_eq!(larger.used, [1024, 0, 0, 6144]);
    }

    proptest! {
        #[test]
        fn places_are_inside_and_disjoint(
            sizes in proptest::collection::vec(0_u64..5000, 0..50),
            existing in proptest::collection::vec(0_u64..8000, 0..6),
            block_bytes in 1_u64..10_000,
        ) {
            let packing = pack(&sizes, &existing, block_bytes);
            let mut ends = vec![0; packing.used.len()];
            for (len, (block, offset)) in sizes.iter().zip(&packing.places) {
                prop_assert!(offset.is_multiple_of(256));
                prop_assert_eq!(*offset, ends[*block]);
                ends[*block] += align_up(*len);
            }
            prop_assert_eq!(&ends, &packing.used);
            for (used, capacity) in packing.used.iter().zip(&existing) {
                prop_assert!(used <= capacity);
            }
            let again = pack(&sizes, &packing.used[existing.len().min(packing.used.len())..], block_bytes);
            if existing.is_empty() {
                prop_assert_eq!(again.places, packing.places);
            }
        }
    }
}
