//! The ring: how large it is, how large buckets are, and where each bucket lies.

use std::ops::Range;

use super::{
    PlanError, PlanLimits,
    bucket::{Draft, Packing},
    inventory::Inventory,
};
use crate::{
    manifest::Manifest,
    types::{TENSOR_ALIGNMENT, align_up},
};

/// Buckets that should fit into the ring at once: one being copied to the device, one on the network, one being read
/// by the worker, one to even out.
const BUCKETS_IN_FLIGHT: u64 = 4;
/// The same where bytes are pulled: the smaller a bucket is, the sooner an owner that is ahead gets ring bytes again.
const PULLED_BUCKETS_IN_FLIGHT: u64 = 8;
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
    pulled: bool,
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
    let in_flight = if pulled { PULLED_BUCKETS_IN_FLIGHT } else { BUCKETS_IN_FLIGHT };
    let share_of_ring = (ring_bytes / in_flight).max(MIN_BUCKET_BYTES.min(ring_bytes));
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
    /// Which bucket wrote each range last, ascending and disjoint. A ring holds few buckets: this is searched and
    /// changed faster than a tree.
    written: Vec<Written>,
}

/// A range of the ring and the bucket that wrote it last.
#[derive(Clone, Copy, Debug)]
struct Written {
    start: u64,
    end: u64,
    bucket: u32,
}

impl Allocator {
    pub fn new(ring_bytes: u64) -> Self {
        Self { ring_bytes, cursor: 0, written: Vec::new() }
    }

    /// A place for `len_bytes` below `limit`, both no more than the ring, and the last bucket that must have been acked
    /// before.
    ///
    /// Three places are looked at: after the last bucket, the ring's start and the limit. The one that waits for the
    /// oldest bucket is taken: a large tensor then does not wait for the buckets just before it.
    pub fn place(&mut self, bucket: u32, len_bytes: u64, limit: u64) -> (u64, Option<u32>) {
        if len_bytes == 0 {
            return (self.cursor.min(self.ring_bytes), None);
        }
        let highest = limit.saturating_sub(len_bytes);
        let (waits_for, offset) = [self.cursor, 0, highest]
            .into_iter()
            .filter(|offset| *offset <= highest)
            .map(|offset| (self.last_in(offset, offset + len_bytes), offset))
            .min_by_key(|(waits_for, _)| *waits_for)
            .unwrap_or((None, 0));
        self.write(offset, offset + len_bytes, bucket);
        // What was put at the limit lies aside: the others go on where they were.
        if offset == self.cursor || offset == 0 {
            self.cursor = offset + len_bytes;
        }
        (offset, waits_for)
    }

    /// Which of the written ranges overlap `start..end`.
    fn overlapping(&self, start: u64, end: u64) -> Range<usize> {
        let first = self.written.partition_point(|w| w.end <= start);
        let count = self.written[first..].iter().take_while(|w| w.start < end).count();
        first..first + count
    }

    fn last_in(&self, start: u64, end: u64) -> Option<u32> {
        self.written[self.overlapping(start, end)].iter().map(|w| w.bucket).max()
    }

    fn write(&mut self, start: u64, end: u64, bucket: u32) {
        let replaced = self.overlapping(start, end);
        let old = &self.written[replaced.clone()];
        let before = old.first().filter(|w| w.start < start).map(|w| Written { end: start, ..*w });
        let after = old.last().filter(|w| w.end > end).map(|w| Written { start: end, ..*w });
        let new = before.into_iter().chain([Written { start, end, bucket }]).chain(after);
        self.written.splice(replaced, new);
    }
}

/// How much of the ring each bucket may use.
///
/// A tensor larger than a bucket takes long to load, and only its owner's link loads it. So its place at the ring's end
/// is kept free for a while before its turn: from the owner's last bucket on, but no longer than the load takes. The
/// owner loads it while the others' buckets go round in the rest. That is done for one large tensor at a time, and only
/// where the rest holds a few buckets. Where bytes are pulled, all receivers' links load it.
pub(super) fn limits(drafts: &[Draft], packing: Packing) -> Vec<u64> {
    let mut limits = vec![packing.ring_bytes; drafts.len()];
    if packing.pulled {
        return limits;
    }
    for (number, draft) in drafts.iter().enumerate().filter(|(_, d)| d.len_bytes > packing.bucket_bytes) {
        let rest = packing.ring_bytes.saturating_sub(draft.len_bytes);
        if rest / packing.bucket_bytes < BUCKETS_IN_FLIGHT - 1 {
            continue;
        }
        let owner = draft.segments.first().map(|s| s.owner);
        let mut beside = draft.len_bytes.saturating_mul(packing.links_beside(draft.len_bytes));
        for earlier in (0..number).rev() {
            let is_large = drafts[earlier].len_bytes > packing.bucket_bytes;
            if beside == 0 || is_large || drafts[earlier].segments.iter().any(|s| Some(s.owner) == owner) {
                break;
            }
            limits[earlier] = rest;
            beside = beside.saturating_sub(drafts[earlier].len_bytes.max(1));
        }
    }
    limits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_buckets_go_round() {
        const RING: u64 = 1024;
        let mut ring = Allocator::new(RING);
        let places: Vec<_> = (0..6).map(|b| ring.place(b, 256, RING)).collect();
        let expected = [(0, None), (256, None), (512, None), (768, None), (0, Some(0)), (256, Some(1))];
        assert_eq!(places, expected);
    }

    #[test]
    fn a_large_bucket_spares_the_newest() {
        const RING: u64 = 1536;
        let mut ring = Allocator::new(RING);
        for bucket in 0..6 {
            ring.place(bucket, 256, RING);
        }
        assert_eq!(ring.place(6, 256, RING), (0, Some(0)));
        assert_eq!(ring.place(7, 256, RING), (256, Some(1)));
        assert_eq!(ring.place(8, 1024, RING), (512, Some(5)), "not over buckets 6 and 7");
        assert_eq!(ring.place(9, 512, RING), (0, Some(7)));
    }

    #[test]
    fn what_lies_at_the_limit_does_not_move_the_others() {
        let mut ring = Allocator::new(1536);
        let places: Vec<_> = (0..4).map(|b| ring.place(b, 256, 768).0).collect();
        assert_eq!(places, [0, 256, 512, 0]);
        assert_eq!(ring.place(4, 768, 1536), (768, None), "was kept free");
        assert_eq!(ring.place(5, 256, 1536), (256, Some(1)));
    }

    #[test]
    fn a_bucket_without_bytes_waits_for_nothing() {
        const RING: u64 = 256;
        let mut ring = Allocator::new(RING);
        ring.place(0, 256, RING);
        assert_eq!(ring.place(1, 0, RING), (256, None));
        assert_eq!(ring.place(2, 256, RING), (0, Some(0)));
    }
}
