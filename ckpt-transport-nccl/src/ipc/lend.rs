//! The two sides of lending device memory: own blocks that others have mapped, and mappings of others' blocks.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use ckpt_core::{
    Error, ErrorKind, Result,
    device::{Buffer, BufferSlice, MemoryKind},
};
use tokio::sync::mpsc;

use super::message::{Lent, Place, ProcessId};
use crate::device::{
    Context, loans,
    memory::{self, Block, IpcMapping},
};

/// Own blocks that were offered to others.
#[derive(Debug)]
pub(super) struct Lender {
    context: Arc<Context>,
    process: ProcessId,
    host: u64,
    next: u64,
    /// By address.
    blocks: HashMap<u64, LentBlock>,
    /// Blocks that nobody uses here any more, by number, and the members that have them mapped.
    returned: BTreeMap<u64, (Arc<Block>, BTreeSet<u32>)>,
    to_us: mpsc::UnboundedSender<Arc<Block>>,
}

#[derive(Debug)]
struct LentBlock {
    lent: Lent,
    told: BTreeSet<u32>,
}

impl Lender {
    /// A lender, and where it gets the blocks that are to be freed.
    pub(super) fn new(
        context: Arc<Context>,
        process: ProcessId,
        host: u64,
    ) -> (Self, mpsc::UnboundedReceiver<Arc<Block>>) {
        let (to_us, returns) = mpsc::unbounded_channel();
        let (blocks, returned) = (HashMap::new(), BTreeMap::new());
        (Self { context, process, host, next: 0, blocks, returned, to_us }, returns)
    }

    /// The place of `slice` for member `peer`, and what to tell it first if it does not know the block.
    pub(super) fn place(&mut self, peer: u32, op: u32, slice: &BufferSlice) -> Result<(Option<Lent>, Place)> {
        if slice.len_bytes() == 0 {
            return Ok((None, Place { op, block: 0, offset: 0, len_bytes: 0 }));
        }
        let (base, len_bytes) = memory::block_around(&self.context, slice.address())?;
        let block = match self.blocks.entry(base) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                self.next += 1;
                let handle = memory::export(&self.context, base)?.to_vec();
                loans::lend(base, self.to_us.clone());
                let (host, process) = (self.host, self.process);
                let lent = Lent { block: self.next, host, process, address: base, len_bytes, handle };
                entry.insert(LentBlock { lent, told: BTreeSet::new() })
            }
        };
        let news = block.told.insert(peer).then(|| block.lent.clone());
        let offset = slice.address() - base;
        Ok((news, Place { op, block: block.lent.block, offset, len_bytes: slice.len_bytes() }))
    }

    /// The last user of `block` is gone: the members that must forget it before it is freed.
    pub(super) fn take_back(&mut self, block: Arc<Block>) -> Option<(u64, BTreeSet<u32>)> {
        let LentBlock { lent, told } = self.blocks.remove(&block.address)?;
        if told.is_empty() {
            return None;
        }
        self.returned.insert(lent.block, (block, told.clone()));
        Some((lent.block, told))
    }

    /// Member `peer` has unmapped block `number`, or all blocks: those that can be freed now.
    pub(super) fn forgotten(&mut self, peer: u32, number: Option<u64>) -> Vec<Arc<Block>> {
        if number.is_none() {
            self.blocks.values_mut().for_each(|block| {
                block.told.remove(&peer);
            });
        }
        let mut free = Vec::new();
        self.returned.retain(|id, (block, told)| {
            if number.is_none_or(|number| number == *id) {
                told.remove(&peer);
            }
            if told.is_empty() {
                free.push(block.clone());
            }
            !told.is_empty()
        });
        free
    }
}

/// Memory of this very process, which needs no mapping. Its owner keeps it until it was told that it is forgotten.
#[derive(Debug)]
struct Neighbour {
    address: u64,
    len_bytes: u64,
}

// SAFETY: the lender frees the block only after this side has said that it forgot it, or has hung up; both come after
// the last copy into it.
unsafe impl Buffer for Neighbour {
    fn address(&self) -> u64 {
        self.address
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn memory(&self) -> MemoryKind {
        MemoryKind::Device
    }
}

/// Maps a block of another member for this `process` on this `host`. May take milliseconds.
pub(super) fn map(
    context: &Arc<Context>,
    (process, host): (&ProcessId, u64),
    lent: &Lent,
) -> Result<Arc<dyn Buffer>> {
    if lent.process == *process {
        return Ok(Arc::new(Neighbour { address: lent.address, len_bytes: lent.len_bytes }));
    }
    if lent.host != host {
        let message = "CUDA IPC reaches GPUs of one host only; use --transport nccl";
        return Err(Error::new(ErrorKind::Unsupported, "map another rank's device memory", message));
    }
    let mapping = IpcMapping::open(context, &lent.handle, 0, lent.len_bytes).map_err(|cause| {
        Error::new(
            ErrorKind::Unavailable,
            "map another rank's device memory",
            "CUDA IPC does not work between these processes: it needs GPUs of one host that can reach each other, and \
             containers that share their IPC and PID namespaces; use --transport nccl",
        )
        .caused_by(cause)
    })?;
    Ok(Arc::new(mapping))
}

/// A place inside a mapping.
pub(super) fn inside(mapping: &Arc<dyn Buffer>, place: &Place) -> Result<BufferSlice> {
    let range = place.offset.checked_add(place.len_bytes).map(|end| place.offset..end);
    range.and_then(|range| BufferSlice::new(mapping.clone(), range).ok()).ok_or_else(|| {
        let (start, len, block) = (place.offset, place.len_bytes, mapping.len_bytes());
        let message = format!("a member offered {len} bytes from {start} in a block of {block}");
        Error::new(ErrorKind::Corrupt, "broadcast", message)
    })
}
