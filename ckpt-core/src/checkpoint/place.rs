//! Deciding, before any byte is read, where each tensor of a share will lie.

use std::{fs::File, ops::Range, path::Path, sync::Arc};

use super::{
    load::InPlace,
    memory::FileMemory,
    pool::{Lease, MapKey, PoolMemory, pack},
    source::{CheckpointSource, Origin, element_bytes},
};
use crate::{
    device::Buffer,
    error::{ErrorKind, Result},
    manifest::{Arena, Share, Tensor},
};

/// One arena, before and while it is filled.
pub(super) struct ArenaMemory {
    pub buffer: Arc<dyn Buffer>,
    /// Came pinned from the pool.
    pub pinned: bool,
    /// A file's own pages: the bytes are there already.
    pub mapped: Option<MapKey>,
}

/// A share with memory for it.
pub(super) struct Placement {
    pub share: Share,
    pub arenas: Vec<ArenaMemory>,
    /// The source's tensors in the order of the share.
    pub order: Vec<usize>,
    /// Blocks of the pool that this share does not need.
    pub spare: Vec<Arc<dyn Buffer>>,
    /// Numbers of the source's files that are used in place.
    pub in_place: Vec<usize>,
    /// The opened files, by number; only those of this share.
    pub files: Vec<Option<File>>,
}

/// Places the tensors `range` of `source`, in their order: first what goes into blocks, then files in place.
pub(super) fn place(
    source: &CheckpointSource,
    range: Range<usize>,
    in_place: InPlace,
    lease: &Lease,
    memory: &mut PoolMemory,
) -> Result<Placement> {
    let tensors = source.tensors();
    let mut files: Vec<Option<File>> = source.files.iter().map(|_| None).collect();
    let mut packed: Vec<usize> = Vec::new();
    let mut runs: Vec<(usize, Range<usize>)> = Vec::new();
    let mut next = range.start;
    let in_place = in_place == InPlace::SharedMemoryFiles && lease.pins_files()?;
    while next < range.end {
        let run = run_of(source, next..range.end);
        next = run.end;
        let Origin::File { file, .. } = tensors[run.start].origin else {
            packed.extend(run);
            continue;
        };
        let wanted = in_place && in_shared_memory(&source.files[file].path);
        let writable = if wanted && naturally_aligned(source, run.clone()) {
            match source.files[file].reopen(true) {
                Ok(opened) => Some(opened),
                // Pinning needs a writable mapping; without the permission the bytes are copied.
                Err(e) if e.kind() == ErrorKind::ConfigInvalid => {
                    tracing::info!(error = %e, "copying a shared-memory file, because it cannot be opened for writing");
                    None
                }
                Err(e) => return Err(e),
            }
        } else {
            None
        };
        match writable {
            Some(opened) => {
                files[file] = Some(opened);
                runs.push((file, run));
            }
            None => {
                if files[file].is_none() {
                    files[file] = Some(source.files[file].reopen(false)?);
                }
                packed.extend(run);
            }
        }
    }

    let mut placement = Placement {
        share: Share::default(),
        arenas: vec![],
        order: vec![],
        spare: vec![],
        in_place: vec![],
        files,
    };
    let mut placed = place_packed(source, &packed, lease, memory, &mut placement);
    for (file, run) in runs {
        placed = placed.and_then(|()| place_file(source, file, run, lease, memory, &mut placement));
    }
    match placed {
        Ok(()) => Ok(placement),
        Err(e) => {
            let pinned =
                placement.arenas.into_iter().filter(|a| a.pinned && a.mapped.is_none()).map(|a| a.buffer);
            memory.blocks = pinned.chain(placement.spare).collect();
            Err(e)
        }
    }
}

/// The tensors from the start of `range` on that are in the same file (or all in none).
fn run_of(source: &CheckpointSource, range: Range<usize>) -> Range<usize> {
    let file = |i: usize| match &source.tensors()[i].origin {
        Origin::File { file, .. } => Some(*file),
        _ => None,
    };
    let end = range.clone().find(|i| file(*i) != file(range.start)).unwrap_or(range.end);
    range.start..end
}

fn in_shared_memory(path: &Path) -> bool {
    path.canonicalize().is_ok_and(|p| p.starts_with("/dev/shm"))
}

/// Whether every tensor of the run is aligned for its type relative to every earlier one, so that a transfer that starts
/// at an aligned place leaves all of them aligned. Files of the reference writer are.
fn naturally_aligned(source: &CheckpointSource, run: Range<usize>) -> bool {
    let offset = |i: usize| match source.tensors()[i].origin {
        Origin::File { offset, .. } => offset,
        _ => 0,
    };
    let base = offset(run.start);
    let mut needed = 1; // the element sizes are powers of two, so the largest of the later ones covers all
    let mut bytes = 0;
    for i in run.rev() {
        let meta = &source.tensors()[i].meta;
        bytes += meta.len_bytes();
        needed = needed.max(element_bytes(meta.dtype));
        if !(offset(i) - base).is_multiple_of(needed) {
            return false;
        }
    }
    bytes > 0
}

fn place_packed(
    source: &CheckpointSource,
    packed: &[usize],
    lease: &Lease,
    memory: &mut PoolMemory,
    placement: &mut Placement,
) -> Result<()> {
    let lens: Vec<u64> = packed.iter().map(|i| source.tensors()[*i].meta.len_bytes()).collect();
    let capacities: Vec<u64> = memory.blocks.iter().map(|b| b.len_bytes()).collect();
    let packing = pack(&lens, &capacities, lease.block_bytes());
    let grown = packing.used.len() > capacities.len();
    let mut is_used = vec![false; packing.used.len()];
    packing.places.iter().for_each(|(block, _)| is_used[*block] = true);

    // What stays unused is kept, unless more is needed: then it is freed first, so that memory does not pile up.
    let mut arena_of = vec![usize::MAX; is_used.len()];
    let blocks = std::mem::take(&mut memory.blocks);
    let mut kept = Vec::new();
    for (block, buffer) in blocks.into_iter().enumerate() {
        if is_used[block] {
            kept.push((block, buffer));
        } else if !grown {
            placement.spare.push(buffer);
        }
    }
    for (block, buffer) in kept {
        arena_of[block] = placement.arenas.len();
        placement.arenas.push(ArenaMemory { buffer, pinned: true, mapped: None });
    }
    for (arena, used) in arena_of.iter_mut().zip(&packing.used).skip(capacities.len()) {
        *arena = placement.arenas.len();
        let buffer = lease.allocate(*used)?;
        placement.arenas.push(ArenaMemory { buffer, pinned: false, mapped: None });
    }
    let mut arenas = vec![Arena::default(); placement.arenas.len()];
    for (block, arena) in arena_of.iter().enumerate().filter(|(_, a)| **a != usize::MAX) {
        arenas[*arena].len_bytes = packing.used[block];
    }
    // Blocks only go up, so the order by arena is the order of the source.
    for (i, (block, offset)) in packed.iter().zip(&packing.places) {
        arenas[arena_of[*block]]
            .tensors
            .push(Tensor { meta: source.tensors()[*i].meta.clone(), offset: *offset });
        placement.order.push(*i);
    }
    placement.share.arenas = arenas;
    Ok(())
}

fn place_file(
    source: &CheckpointSource,
    file: usize,
    run: Range<usize>,
    lease: &Lease,
    memory: &mut PoolMemory,
    placement: &mut Placement,
) -> Result<()> {
    let offset = |i: usize| match source.tensors()[i].origin {
        Origin::File { offset, .. } => offset,
        _ => 0,
    };
    let (first, last) = (run.start, run.end - 1);
    let end = offset(last) + source.tensors()[last].meta.len_bytes();
    let identity = source.files[file].identity;
    let key = MapKey {
        device: identity.device,
        inode: identity.inode,
        offset: offset(first),
        len_bytes: end - offset(first),
    };
    let Some(opened) = &placement.files[file] else { return Ok(()) };
    let known = memory.mapped.iter().position(|(k, _)| *k == key);
    let start = FileMemory::start_of(key.offset);
    let (buffer, pinned): (Arc<dyn Buffer>, bool) = match known {
        Some(at) => (memory.mapped.swap_remove(at).1, true),
        None => (Arc::new(lease.map(opened, key.offset, key.len_bytes)?), false),
    };
    let mut arena = Arena { len_bytes: end - start, tensors: Vec::with_capacity(run.len()) };
    for i in run {
        arena.tensors.push(Tensor { meta: source.tensors()[i].meta.clone(), offset: offset(i) - start });
        placement.order.push(i);
    }
    placement.share.arenas.push(arena);
    placement.arenas.push(ArenaMemory { buffer, pinned, mapped: Some(key) });
    placement.in_place.push(file);
    Ok(())
}
