//! The ring: how large it is, how large buckets are, and where each bucket lies.

use std::collections::BTreeMap;

use super::{PlanError, PlanLimits, inventory::Inventory};
use crate::{
    manifest::Manifest,
    types::{TENSOR_ALIGNMENT, align_up},
};

/// Buckets that should fit into the ring at once: one being copied to the device, one on the network, one being read
/// by the worker, one to even out.
const BUCKETS_IN_FLIGHT: u64 = 4;
/// Buckets are made smaller than this only when memory is shorter than this.
const MIN_BUCKET_BYTES: u64 = 1 << 20;
/// Fewer owners send at once rather than this little each.
const MIN_SHARE_BYTES: u64 = 1 << 20;

/// The sizes of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sizes {
    /// What the ring may take.
    pub ring_bytes: u64,
    /// What a bucket of more than one tensor may take.
    pub bucket_bytes: u64,
    /// Owners in a bucket.
    pub window: u32,
}

/// Chooses the sizes: a ring of the largest tensor and some slack, less when memory is short, the largest tensor at
/// least.
pub(super) fn sizes(
    inventory: &Inventory,
    manifest: &Manifest,
    limits: &PlanLimits,
    free_bytes: u64,
    window: u32,
) -> Result<Sizes, PlanError> {
    let usable = (u128::from(free_bytes) * u128::from(limits.mem_permille) / 1000) as u64;
    let usable = usable / TENSOR_ALIGNMENT * TENSOR_ALIGNMENT;
    let largest_item = inventory.largest();
    let largest = largest_item.map_or(0, |i| align_up(inventory.items[i].len_bytes)).max(TENSOR_ALIGNMENT);
    if let Some(item) = largest_item.filter(|_| largest > usable) {
        return Err(PlanError::NoMemory {
            rank: inventory.owners[inventory.owner_of(item)].rank,
            tensor: inventory.meta(manifest, item).name.to_string(),
            needed: largest,
            usable,
            free: free_bytes,
            permille: limits.mem_permille,
        });
    }
    let all: u64 = inventory.items.iter().map(|i| align_up(i.len_bytes)).sum();
    let wanted = largest.saturating_add(limits.ring_slack_bytes / TENSOR_ALIGNMENT * TENSOR_ALIGNMENT);
    let ring_bytes = wanted.min(usable).min(all.max(largest));
    let share_of_ring = (ring_bytes / BUCKETS_IN_FLIGHT).max(MIN_BUCKET_BYTES.min(ring_bytes));
    let bucket_bytes = limits.target_bucket_bytes.min(limits.max_bucket_bytes).min(share_of_ring);
    let bucket_bytes = (bucket_bytes / TENSOR_ALIGNMENT * TENSOR_ALIGNMENT).max(TENSOR_ALIGNMENT);
    let owners = u32::try_from(inventory.owners.len()).unwrap_or(u32::MAX);
    let affordable = u32::try_from(bucket_bytes / MIN_SHARE_BYTES).unwrap_or(u32::MAX);
    Ok(Sizes { ring_bytes, bucket_bytes, window: window.min(owners).min(affordable).max(1) })
}

/// Gives buckets their places, in plan order.
#[derive(Debug)]
pub(super) struct Allocator {
    ring_bytes: u64,
    /// Where the last bucket ended.
    cursor: u64,
    /// Which bucket wrote each range last: start to end and bucket. Ranges are disjoint.
    last_writer: BTreeMap<u64, (u64, u32)>,
}

impl Allocator {
    pub fn new(ring_bytes: u64) -> Self {
        Self { ring_bytes, cursor: 0, last_writer: BTreeMap::new() }
    }

    /// A place for `len_bytes`, which is no more than the ring, and the last bucket that must have been acked before.
    ///
    /// Three places are looked at: after the last bucket, the ring's start and the ring's end. The one that waits for
    /// the oldest bucket is taken: a large tensor then does not wait for the buckets just before it.
    pub fn place(&mut self, bucket: u32, len_bytes: u64) -> (u64, Option<u32>) {
        if len_bytes == 0 {
            return (self.cursor.min(self.ring_bytes), None);
        }
        let at_end = self.ring_bytes.saturating_sub(len_bytes);
        let (waits_for, offset) = [self.cursor, 0, at_end]
            .into_iter()
            .filter(|offset| *offset <= at_end)
            .map(|offset| (self.last_in(offset, offset + len_bytes), offset))
            .min_by_key(|(waits_for, _)| *waits_for)
            .unwrap_or((None, 0));
        self.write(offset, offset + len_bytes, bucket);
        self.cursor = offset + len_bytes;
        (offset, waits_for)
    }

    fn overlapping(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64, u32)> {
        let before = self.last_writer.range(..start).next_back();
        before
            .into_iter()
            .chain(self.last_writer.range(start..end))
            .map(|(s, (e, bucket))| (*s, *e, *bucket))
            .filter(move |(s, e, _)| *s < end && *e > start)
    }

    fn last_in(&self, start: u64, end: u64) -> Option<u32> {
        self.overlapping(start, end).map(|(_, _, bucket)| bucket).max()
    }

    fn write(&mut self, start: u64, end: u64, bucket: u32) {
        let old: Vec<(u64, u64, u32)> = self.overlapping(start, end).collect();
        for (s, e, writer) in old {
            self.last_writer.remove(&s);
            if s < start {
                self.last_writer.insert(s, (start, writer));
            }
            if e > end {
                self.last_writer.insert(end, (e, writer));
            }
        }
        self.last_writer.insert(start, (end, bucket));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_buckets_go_round() {
        let mut ring = Allocator::new(1024);
        let places: Vec<_> = (0..6).map(|b| ring.place(b, 256)).collect();
        let expected = [(0, None), (256, None), (512, None), (768, None), (0, Some(0)), (256, Some(1))];
        assert_eq!(places, expected);
    }

    #[test]
    fn a_large_bucket_spares_the_newest() {
        let mut ring = Allocator::new(1536);
        for bucket in 0..6 {
            ring.place(bucket, 256);
        }
        assert_eq!(ring.place(6, 256), (0, Some(0)));
        assert_eq!(ring.place(7, 256), (256, Some(1)));
        assert_eq!(ring.place(8, 1024), (512, Some(5)), "not over buckets 6 and 7");
        assert_eq!(ring.place(9, 512), (0, Some(7)));
    }

    #[test]
    fn a_bucket_without_bytes_waits_for_nothing() {
        let mut ring = Allocator::new(256);
        ring.place(0, 256);
        assert_eq!(ring.place(1, 0), (256, None));
        assert_eq!(ring.place(2, 256), (0, Some(0)));
    }
}
