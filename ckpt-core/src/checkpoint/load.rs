//! Registering: a range of a source's tensors, in pinned host memory.

use std::{
    fmt, fs,
    num::NonZeroU64,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::fs::Advice;

use super::{
    digest::{DigestAlgorithm, Digests},
    fill::{Filled, fill},
    memory::file_error,
    place::{Placement, place},
    pool::{Lease, Pool, PoolMemory},
    source::{CheckpointSource, Origin},
};
use crate::{
    device::{Buffer, BufferSlice},
    error::{Error, ErrorKind, Result},
    manifest::Share,
};

/// Told how far a load is; called from many threads, some thousand times at most per GiB.
pub trait Progress: Send + Sync {
    /// So many more bytes are in place.
    fn advance(&self, bytes: u64);
}

/// Whether files may become the memory that is sent from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InPlace {
    /// Every tensor is copied.
    Never,
    /// Files under /dev/shm that this process may write are mapped and pinned where they are. Until the checkpoint is
    /// unregistered nobody may truncate or rewrite them: a truncated file ends the process with SIGBUS.
    #[default]
    SharedMemoryFiles,
}

/// How to load.
#[derive(Clone)]
pub struct LoadOptions {
    /// The checkpoint's name, for messages.
    pub name: String,
    /// Threads that read; 0 = one per core.
    pub threads: usize,
    /// Digest of each tensor, made on the way; `None` makes none.
    pub digests: Option<DigestAlgorithm>,
    /// Files in shared memory.
    pub in_place: InPlace,
    /// Removes the names of files used in place, after a success: their memory then goes with the registration. Only for
    /// files that no other rank reads.
    pub delete_in_place_files: bool,
    /// When to give up.
    pub deadline: Option<Instant>,
    /// Who is told how far it is.
    pub progress: Option<Arc<dyn Progress>>,
}

impl LoadOptions {
    /// The defaults: all cores, digests, shared-memory files in place and never deleted.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            threads: 0,
            digests: Some(DigestAlgorithm::default()),
            in_place: InPlace::default(),
            delete_in_place_files: false,
            deadline: None,
            progress: None,
        }
    }
}

impl fmt::Debug for LoadOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadOptions")
            .field("name", &self.name)
            .field("threads", &self.threads)
            .field("digests", &self.digests)
            .field("in_place", &self.in_place)
            .field("delete_in_place_files", &self.delete_in_place_files)
            .finish_non_exhaustive()
    }
}

/// What one rank holds of a checkpoint. Dropping it unregisters the checkpoint and gives the pool free.
#[derive(Debug)]
pub struct RegisteredCheckpoint {
    /// The name it was given.
    pub name: String,
    /// Which tensors lie where.
    pub share: Arc<Share>,
    /// The memory of each arena of `share`; a buffer may be longer than its arena.
    pub arenas: Vec<Arc<dyn Buffer>>,
    /// In the share's memory order, if they were asked for.
    pub digests: Option<Digests>,
    /// Number of the registration in its pool: a reader compares it before and after, since memory is reused.
    pub generation: u64,
    /// Bytes that were read or copied.
    pub copied_bytes: u64,
    /// Bytes that are used where they were.
    pub in_place_bytes: u64,
    /// How long it took.
    pub elapsed: Duration,
    _lease: Lease,
}

impl RegisteredCheckpoint {
    /// A range of one arena; it keeps the memory alive and keeps the pool from reusing it.
    pub fn slice(&self, arena: u32, range: Range<u64>) -> Result<BufferSlice> {
        match self.arenas.get(arena as usize) {
            Some(buffer) => BufferSlice::new(buffer.clone(), range),
            None => {
                Err(Error::new(ErrorKind::Internal, "slice an arena", format!("there is no arena {arena}")))
            }
        }
    }
}

/// Reads the tensors `range` of `source` into `pool`. Blocks; `options.deadline` ends it.
///
/// Tensors start at multiples of 256 bytes in memory, with zeroed padding between them; in files used in place they
/// keep the file's own layout. On an error the pool keeps what it had pinned before.
pub fn load(
    source: &CheckpointSource,
    range: Range<usize>,
    pool: &Arc<Pool>,
    options: &LoadOptions,
) -> Result<RegisteredCheckpoint> {
    let started = Instant::now();
    let count = source.tensors().len();
    if range.start > range.end || range.end > count {
        return Err(Error::new(
            ErrorKind::ConfigInvalid,
            "load checkpoint",
            format!("tensors {}..{} were asked for, there are {count}", range.start, range.end),
        ));
    }
    let (lease, mut memory) = pool.lease(&options.name)?;
    let placement = match place(source, range.clone(), options.in_place, &lease, &mut memory) {
        Ok(placement) => placement,
        Err(e) => {
            lease.keep(memory);
            return Err(e);
        }
    };
    // Mappings of files that are not part of this checkpoint are of no use any more.
    drop(memory);
    advise(source, range, &placement);
    let filled = fill(source, &placement, &lease, options);
    let Placement { share, arenas, order: _, spare, in_place, files: _ } = placement;
    let Filled { pinned, digests } = match filled {
        Ok(filled) => filled,
        Err(e) => {
            let old = arenas.into_iter().filter(|a| a.pinned && a.mapped.is_none()).map(|a| a.buffer);
            lease.keep(PoolMemory { blocks: old.chain(spare).collect(), mapped: Vec::new() });
            return Err(e);
        }
    };
    let mut kept = PoolMemory::default();
    let (mut copied_bytes, mut in_place_bytes) = (0, 0);
    for ((arena, layout), buffer) in arenas.iter().zip(&share.arenas).zip(&pinned) {
        let bytes: u64 = layout.tensors.iter().map(|t| t.meta.len_bytes()).sum();
        match arena.mapped {
            Some(key) => {
                in_place_bytes += bytes;
                kept.mapped.push((key, buffer.clone()));
            }
            None => {
                copied_bytes += bytes;
                kept.blocks.push(buffer.clone());
            }
        }
    }
    // The unpinned handles go first: the pool counts references to the pinned ones.
    drop(arenas);
    kept.blocks.extend(spare);
    lease.keep(kept);
    if options.delete_in_place_files {
        for file in in_place {
            let path = &source.files[file].path;
            fs::remove_file(path).map_err(|e| file_error("delete a loaded file", path, e))?;
        }
    }
    tracing::debug!(
        checkpoint = options.name, copied_bytes, in_place_bytes, arenas = pinned.len(), elapsed = ?started.elapsed(),
        "checkpoint registered"
    );
    Ok(RegisteredCheckpoint {
        name: options.name.clone(),
        generation: lease.generation,
        share: Arc::new(share),
        arenas: pinned,
        digests: options.digests.map(|algorithm| Digests { algorithm, values: digests }),
        copied_bytes,
        in_place_bytes,
        elapsed: started.elapsed(),
        _lease: lease,
    })
}

/// Tells the system which parts of which files come next. Only advice: errors do not matter.
fn advise(source: &CheckpointSource, range: Range<usize>, placement: &Placement) {
    let mut wanted: Vec<Option<Range<u64>>> = vec![None; source.files.len()];
    for tensor in &source.tensors()[range] {
        if let Origin::File { file, offset } = tensor.origin {
            let end = offset + tensor.meta.len_bytes();
            let range = wanted[file].get_or_insert(offset..end);
            range.end = range.end.max(end);
        }
    }
    for (file, wanted) in placement.files.iter().zip(wanted) {
        if let (Some(file), Some(wanted)) = (file, wanted) {
            let len = NonZeroU64::new(wanted.end - wanted.start);
            let _ = rustix::fs::fadvise(file, wanted.start, len, Advice::Sequential);
            let _ = rustix::fs::fadvise(file, wanted.start, len, Advice::WillNeed);
        }
    }
}
