//! The manifest, checked and flattened: every tensor that will be sent, by owner, in memory order.

use std::ops::Range;

use twox_hash::XxHash3_64;

use super::{PlanError, error::describe};
use crate::{
    manifest::{Manifest, Share},
    types::{Rank, TensorMeta, format_shape},
};

/// Replicas of neighbouring tensors stay with one holder up to this many bytes, so that segments stay long.
const REPLICA_RUN_BYTES: u64 = 16 << 20;

/// All tensors together. With at most 2^32 of them, no sum of sizes and padding can overflow.
const MAX_TOTAL_BYTES: u64 = u64::MAX / 4;

fn too_many_bytes() -> PlanError {
    PlanError::TooLarge { what: "more bytes" }
}

/// One tensor that will be sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    /// Bytes from the arena's start.
    pub offset: u64,
    /// Bytes.
    pub len_bytes: u64,
    /// Index of the arena in the owner's share.
    pub arena: u32,
    /// Index of the tensor in the arena.
    pub index: u32,
    /// Bytes of which its place in the ring must be a multiple.
    pub element_bytes: u8,
}

/// One rank's items.
#[derive(Clone, Debug)]
pub(super) struct Owner {
    pub rank: Rank,
    /// Where its items are in [`Inventory::items`].
    pub items: Range<usize>,
    /// Bytes of its items.
    pub len_bytes: u64,
}

/// What will be sent, from whom.
#[derive(Debug)]
pub(super) struct Inventory {
    /// Ascending by rank; every one has items.
    pub owners: Vec<Owner>,
    pub items: Vec<Item>,
}

impl Inventory {
    /// Checks `manifest` and keeps one holder of every tensor. `sends` says who may send.
    pub fn new(manifest: &Manifest, sends: impl Fn(Rank) -> bool) -> Result<Self, PlanError> {
        let count = manifest.shares.values().flat_map(|s| &s.arenas).map(|a| a.tensors.len()).sum();
        let mut hashes = Vec::with_capacity(count);
        let mut items = Vec::with_capacity(count);
        let mut owners = Vec::with_capacity(manifest.shares.len());
        let mut total = 0_u64;
        for (rank, share) in &manifest.shares {
            let first = items.len();
            let len_bytes = flatten(*rank, share, &mut items, &mut hashes)?;
            if items.len() > first {
                owners.push(Owner { rank: *rank, items: first..items.len(), len_bytes });
                total = total
                    .checked_add(len_bytes)
                    .filter(|t| *t <= MAX_TOTAL_BYTES)
                    .ok_or_else(too_many_bytes)?;
            }
        }
        let mut inventory = Self { owners, items };
        let replicas = inventory.replicas(manifest, hashes)?;
        if !replicas.is_empty() {
            inventory.keep_one_holder(replicas, &sends);
        }
        for owner in &inventory.owners {
            if !sends(owner.rank) {
                let tensor = inventory.meta(manifest, owner.items.start).name.to_string();
                return Err(PlanError::OwnerNotMember { rank: owner.rank, tensor });
            }
        }
        Ok(inventory)
    }

    /// Name, dtype and shape of an item.
    pub fn meta<'a>(&self, manifest: &'a Manifest, item: usize) -> &'a TensorMeta {
        let share = &manifest.shares[&self.owners[self.owner_of(item)].rank];
        let Item { arena, index, .. } = self.items[item];
        &share.arenas[arena as usize].tensors[index as usize].meta
    }

    /// The owner of an item, as an index into [`Self::owners`].
    pub fn owner_of(&self, item: usize) -> usize {
        self.owners.partition_point(|o| o.items.end <= item)
    }

    /// The item with the most bytes; the first of equals.
    pub fn largest(&self) -> Option<usize> {
        (0..self.items.len()).rev().max_by_key(|i| self.items[*i].len_bytes)
    }

    /// The holders of every name that more than one rank holds, each list ascending, in memory order of the first.
    fn replicas(&self, manifest: &Manifest, mut hashes: Vec<u64>) -> Result<Vec<Vec<u32>>, PlanError> {
        // The item's number takes the place of the lowest bits, so that one word is sorted. Sorting finds equal names in
        // bounded time, whatever the hashes are.
        let number_bits = usize::BITS - hashes.len().leading_zeros();
        let hash = |word: &u64| word >> number_bits;
        hashes.iter_mut().zip(0..).for_each(|(word, item)| *word = hash(word) << number_bits | item);
        sort_hashes(&mut hashes);
        let mut groups = Vec::new();
        for equal_hash in hashes.chunk_by(|a, b| hash(a) == hash(b)).filter(|g| g.len() > 1) {
            let mut holders: Vec<u32> =
                equal_hash.iter().map(|word| (word & ((1 << number_bits) - 1)) as u32).collect();
            let name = |item: u32| &self.meta(manifest, item as usize).name;
            holders.sort_by(|a, b| name(*a).cmp(name(*b)).then(a.cmp(b)));
            let equal_names = holders.chunk_by(|a, b| name(*a) == name(*b));
            groups.extend(equal_names.filter(|g| g.len() > 1).map(<[u32]>::to_vec));
        }
        groups.sort_unstable();
        for holders in &groups {
            let (first, owner) =
                (self.meta(manifest, holders[0] as usize), self.owner_of(holders[0] as usize));
            let mut previous = owner;
            for item in &holders[1..] {
                let (meta, holder) = (self.meta(manifest, *item as usize), self.owner_of(*item as usize));
                let rank = self.owners[holder].rank;
                if holder == previous {
                    return Err(PlanError::DuplicateTensor { rank, tensor: meta.name.to_string() });
                }
                if meta != first {
                    return Err(PlanError::ReplicaMismatch {
                        tensor: meta.name.to_string(),
                        rank: self.owners[owner].rank,
                        description: describe(first),
                        other: rank,
                        other_description: describe(meta),
                    });
                }
                previous = holder;
            }
        }
        Ok(groups)
    }

    /// Leaves each replicated tensor with its least loaded holder among those that may send.
    fn keep_one_holder(&mut self, groups: Vec<Vec<u32>>, sends: &impl Fn(Rank) -> bool) {
        let mut loads: Vec<u64> = self.owners.iter().map(|o| o.len_bytes).collect();
        let mut replicated = 0_u64;
        for holders in &groups {
            let len_bytes = self.items[holders[0] as usize].len_bytes;
            // All copies together are no more than all items, whose sum is known to fit.
            replicated += len_bytes;
            for item in holders {
                loads[self.owner_of(*item as usize)] -= len_bytes;
            }
        }
        let run_limit = REPLICA_RUN_BYTES.min(replicated / (8 * self.owners.len() as u64));
        let mut dropped = vec![false; self.items.len()];
        let mut run: Option<(u32, u64)> = None;
        for holders in groups {
            let len_bytes = self.items[holders[0] as usize].len_bytes;
            let follows = run.and_then(|(last, taken)| {
                let (next, owner) = (last.checked_add(1)?, self.owner_of(last as usize));
                let same_owner = self.owners[owner].items.contains(&(next as usize));
                let goes_on =
                    same_owner && holders.binary_search(&next).is_ok() && sends(self.owners[owner].rank);
                (goes_on && taken + len_bytes <= run_limit).then_some((next, taken + len_bytes))
            });
            let (kept, taken) = match follows {
                Some(run) => run,
                None => {
                    let burden = |item: &&u32| {
                        let owner = self.owner_of(**item as usize);
                        (!sends(self.owners[owner].rank), loads[owner], owner)
                    };
                    let least = holders.iter().min_by_key(burden).copied();
                    (least.unwrap_or(holders[0]), len_bytes)
                }
            };
            run = Some((kept, taken));
            loads[self.owner_of(kept as usize)] += len_bytes;
            holders.iter().filter(|item| **item != kept).for_each(|item| dropped[*item as usize] = true);
        }
        let mut items = Vec::with_capacity(self.items.len());
        for (owner, load) in self.owners.iter_mut().zip(loads) {
            let first = items.len();
            items.extend(owner.items.clone().filter(|i| !dropped[*i]).map(|i| self.items[i]));
            owner.items = first..items.len();
            owner.len_bytes = load;
        }
        self.items = items;
        self.owners.retain(|o| !o.items.is_empty());
    }
}

/// Sorts words that are spread evenly over all values: dealt by their highest bits, then each small pile by itself.
/// However unevenly they are spread, it takes no longer than one sort of them all.
pub(super) fn sort_hashes(words: &mut Vec<u64>) {
    // One or two words a pile; not less than one bit, since a shift by all 64 overflows.
    let bits = words.len().max(2).ilog2();
    let pile = |word: &u64| (word >> (u64::BITS - bits)) as usize;
    // There are fewer than 2^32 items.
    let mut ends = vec![0_u32; 1 << bits];
    words.iter().for_each(|word| ends[pile(word)] += 1);
    let mut start = 0;
    for end in &mut ends {
        start += std::mem::replace(end, start);
    }
    let mut dealt = vec![0; words.len()];
    for word in words.iter() {
        let place = &mut ends[pile(word)];
        dealt[*place as usize] = *word;
        *place += 1;
    }
    let mut start = 0;
    for end in ends {
        if end - start > 1 {
            dealt[start as usize..end as usize].sort_unstable();
        }
        start = end;
    }
    *words = dealt;
}

/// Appends a share's tensors; returns their bytes.
fn flatten(
    rank: Rank,
    share: &Share,
    items: &mut Vec<Item>,
    hashes: &mut Vec<u64>,
) -> Result<u64, PlanError> {
    let mut len_of_share = 0_u64;
    for (arena_index, arena) in share.arenas.iter().enumerate() {
        let arena_index =
            u32::try_from(arena_index).map_err(|_| PlanError::TooLarge { what: "more arenas" })?;
        let mut end_of_last = 0;
        for (index, tensor) in arena.tensors.iter().enumerate() {
            let meta = &tensor.meta;
            let name = || meta.name.to_string();
            let len_bytes = meta.checked_len_bytes().ok_or_else(|| PlanError::TensorSize {
                rank,
                tensor: name(),
                shape: format_shape(&meta.shape),
            })?;
            let end = tensor.offset.checked_add(len_bytes).filter(|end| *end <= arena.len_bytes).ok_or_else(
                || PlanError::TensorOutsideArena {
                    rank,
                    tensor: name(),
                    offset: tensor.offset,
                    len_bytes,
                    arena_bytes: arena.len_bytes,
                },
            )?;
            if tensor.offset < end_of_last {
                let previous = arena.tensors[index - 1].meta.name.to_string();
                let offset = tensor.offset;
                return Err(PlanError::TensorsOverlap { rank, previous, tensor: name(), offset });
            }
            end_of_last = end;
            len_of_share = len_of_share.checked_add(len_bytes).ok_or_else(too_many_bytes)?;
            if items.len() >= u32::MAX as usize {
                return Err(PlanError::TooLarge { what: "more tensors" });
            }
            hashes.push(XxHash3_64::oneshot(meta.name.as_bytes()));
            let element_bytes = element_bytes(meta);
            items.push(Item {
                offset: tensor.offset,
                len_bytes,
                arena: arena_index,
                index: index as u32,
                element_bytes,
            });
        }
    }
    Ok(len_of_share)
}

/// Bytes of which a tensor's place must be a multiple so that the worker can view it; packed types need no more than 1.
pub(super) fn element_bytes(meta: &TensorMeta) -> u8 {
    match meta.dtype.bits() / 8 {
        bytes @ (1 | 2 | 4 | 8 | 16) => bytes as u8,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn piles_sort_like_one_sort(words in prop::collection::vec(any::<u64>(), 0..300), shift in 0_u32..64) {
            let mut words: Vec<u64> = words.iter().map(|word| word >> shift).collect();
            let mut expected = words.clone();
            expected.sort_unstable();
            sort_hashes(&mut words);
            prop_assert_eq!(words, expected);
        }
    }
}
