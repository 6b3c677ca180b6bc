//! The laws of a plan, tested on any plan, whoever made it.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use twox_hash::XxHash3_64;

use super::{
    Bucket, Segment, UpdatePlan,
    inventory::{element_bytes, sort_hashes},
};
use crate::{
    manifest::{Manifest, Share, Tensor},
    types::{Rank, TENSOR_ALIGNMENT},
};

/// The first law that a plan breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Violation(String);

/// Returns a [`Violation`] with this message unless the condition holds.
macro_rules! law {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(Violation(format!($($message)+)));
        }
    };
}

/// Checks the laws that every plan must keep:
///
/// - every name of the manifest is delivered exactly once, whole, from one of its holders, in one bucket, at a multiple of
///   its element size;
/// - each owner's memory is sent in ascending order and no byte twice;
/// - a bucket is larger than the limit only if it is one tensor, and has at most `window` owners;
/// - segments of a bucket do not overlap in the ring, start at multiples of 256 and lie in the bucket, the bucket lies
///   in the ring;
/// - a bucket waits for a bucket before it that is not older than any whose ring bytes it overlaps;
/// - roots are members; if any root is not the owner (P2P), [`check_interleaving`] holds, too;
/// - the digest is that of the plan.
pub fn check(plan: &UpdatePlan, manifest: &Manifest) -> Result<(), Violation> {
    law!(plan.members.windows(2).all(|pair| pair[0] < pair[1]), "the members are not ascending");
    let mut delivered: HashSet<&str> = HashSet::new();
    let mut sent_up_to: HashMap<(Rank, u32), (u64, u32)> = HashMap::new();
    for (number, bucket) in plan.buckets.iter().enumerate() {
        check_shape(plan, number, bucket)?;
        check_contents(number, bucket, manifest, &mut delivered, &mut sent_up_to)?;
    }
    for (rank, tensor) in manifest.tensors() {
        let name = &tensor.meta.name;
        law!(delivered.contains(&**name), "tensor {name:?} of rank {rank} is never delivered");
    }
    check_waits(plan)?;
    if plan.buckets.iter().flat_map(|b| &b.segments).any(|s| s.owner != s.root) {
        check_interleaving(plan)?;
    }
    law!(plan.digest == plan.compute_digest(), "the digest is not that of the plan");
    Ok(())
}

/// The law that is checked in every update before the first byte moves: every tensor of the manifest is delivered
/// exactly once.
pub fn check_coverage(plan: &UpdatePlan, manifest: &Manifest) -> Result<(), Violation> {
    let marks = |share: &Share| share.arenas.iter().map(|arena| vec![false; arena.tensors.len()]).collect();
    let mut marked: BTreeMap<Rank, Vec<Vec<bool>>> =
        manifest.shares.iter().map(|(rank, share)| (*rank, marks(share))).collect();
    let mut hashes = Vec::with_capacity(marked.values().flatten().map(Vec::len).sum());
    let all = hashes.capacity();
    for segment in plan.buckets.iter().flat_map(|b| &b.segments) {
        let listed = listed(segment, manifest)?;
        let arena = marked.get_mut(&segment.owner).and_then(|s| s.get_mut(segment.arena as usize));
        let marks = arena.into_iter().flatten().skip(segment.tensors.start as usize);
        for (tensor, mark) in listed.iter().zip(marks) {
            let name = &tensor.meta.name;
            law!(!std::mem::replace(mark, true), "tensor {name:?} is delivered twice");
            hashes.push(XxHash3_64::oneshot(name.as_bytes()));
        }
    }
    let delivered = hashes.len();
    sort_hashes(&mut hashes);
    if delivered == all && hashes.windows(2).all(|pair| pair[0] != pair[1]) {
        return Ok(());
    }
    // Several ranks hold the same names: looked up one by one, which costs more than the plan.
    check_names(plan, manifest)
}

fn check_names(plan: &UpdatePlan, manifest: &Manifest) -> Result<(), Violation> {
    let mut delivered: HashSet<&str> = HashSet::new();
    for segment in plan.buckets.iter().flat_map(|b| &b.segments) {
        for tensor in listed(segment, manifest)? {
            let name = &tensor.meta.name;
            law!(delivered.insert(&**name), "tensor {name:?} is delivered twice");
        }
    }
    for (rank, tensor) in manifest.tensors() {
        let name = &tensor.meta.name;
        law!(delivered.contains(&**name), "tensor {name:?} of rank {rank} is never delivered");
    }
    Ok(())
}

fn listed<'m>(segment: &Segment, manifest: &'m Manifest) -> Result<&'m [Tensor], Violation> {
    let arena = manifest.shares.get(&segment.owner).and_then(|s| s.arenas.get(segment.arena as usize));
    let range = segment.tensors.start as usize..segment.tensors.end as usize;
    arena
        .and_then(|arena| arena.tensors.get(range))
        .ok_or_else(|| Violation(format!("a segment lists tensors that rank {} has not", segment.owner)))
}

/// Sizes, places and roots of one bucket.
fn check_shape(plan: &UpdatePlan, number: usize, bucket: &Bucket) -> Result<(), Violation> {
    let end = bucket.ring_offset.checked_add(bucket.len_bytes);
    law!(end.is_some_and(|e| e <= plan.ring_bytes), "bucket {number} ends outside the ring");
    law!(!bucket.segments.is_empty(), "bucket {number} has no segments");
    let mut free_from = bucket.ring_offset;
    for (index, segment) in bucket.segments.iter().enumerate() {
        let place = format!("segment {index} of bucket {number}");
        law!(
            plan.members.binary_search(&segment.root).is_ok(),
            "root {} of {place} is no member",
            segment.root
        );
        law!(
            segment.ring_offset.is_multiple_of(TENSOR_ALIGNMENT),
            "{place} starts at {}",
            segment.ring_offset
        );
        law!(segment.ring_offset >= free_from, "{place} overlaps what is before it in the ring");
        let segment_end = segment.ring_offset.checked_add(segment.len_bytes);
        law!(segment_end.is_some_and(|e| Some(e) <= end), "{place} ends outside its bucket");
        free_from = segment_end.unwrap_or(u64::MAX);
    }
    let mut owners: Vec<Rank> = bucket.segments.iter().map(|s| s.owner).collect();
    owners.sort_unstable();
    owners.dedup();
    law!(owners.len() <= plan.window as usize, "bucket {number} has {} owners", owners.len());
    let tensors: usize = bucket.segments.iter().map(|s| s.tensors.len()).sum();
    law!(
        bucket.len_bytes <= plan.bucket_bytes || tensors == 1,
        "bucket {number} with {tensors} tensors has {} bytes, more than {}",
        bucket.len_bytes,
        plan.bucket_bytes
    );
    Ok(())
}

/// Whole tensors, once each, in the owner's order.
fn check_contents<'m>(
    number: usize,
    bucket: &Bucket,
    manifest: &'m Manifest,
    delivered: &mut HashSet<&'m str>,
    sent_up_to: &mut HashMap<(Rank, u32), (u64, u32)>,
) -> Result<(), Violation> {
    for (index, segment) in bucket.segments.iter().enumerate() {
        let place = format!("segment {index} of bucket {number}");
        let arena = manifest.shares.get(&segment.owner).and_then(|s| s.arenas.get(segment.arena as usize));
        let Some(arena) = arena else {
            return Err(Violation(format!("{place}: rank {} has no arena {}", segment.owner, segment.arena)));
        };
        let end = segment.arena_offset.checked_add(segment.len_bytes).filter(|e| *e <= arena.len_bytes);
        let Some(end) = end else {
            return Err(Violation(format!("{place} ends outside its arena")));
        };
        let (sent, next_tensor) = sent_up_to.entry((segment.owner, segment.arena)).or_default();
        law!(segment.arena_offset >= *sent, "{place} sends bytes that were sent before");
        law!(segment.tensors.start >= *next_tensor, "{place} delivers tensors that were delivered before");
        law!(segment.tensors.start <= segment.tensors.end, "{place} has a reversed range of tensors");
        *sent = end;
        *next_tensor = segment.tensors.end;
        let listed = arena.tensors.get(segment.tensors.start as usize..segment.tensors.end as usize);
        let Some(listed) = listed else {
            return Err(Violation(format!("{place} lists tensors that its arena has not")));
        };
        let next = arena.tensors.get(segment.tensors.end as usize);
        law!(
            next.is_none_or(|t| t.offset >= end || t.meta.len_bytes() == 0),
            "{place} covers a tensor that it does not list"
        );
        law!(
            !listed.is_empty() || index > 0 && follows(&bucket.segments[index - 1], segment),
            "{place} has no tensors"
        );
        for tensor in listed {
            let name = &tensor.meta.name;
            law!(delivered.insert(&**name), "tensor {name:?} is delivered twice");
            let len_bytes = tensor.meta.len_bytes();
            let starts = tensor.offset >= segment.arena_offset
                && (tensor.offset < end || (tensor.offset == end && len_bytes == 0));
            law!(starts, "tensor {name:?} does not start in {place}");
            let ring_offset = tensor.offset - segment.arena_offset + segment.ring_offset;
            law!(
                ring_offset.is_multiple_of(u64::from(element_bytes(&tensor.meta))),
                "tensor {name:?} lies at {ring_offset} of the ring, which is not a multiple of its element size"
            );
            let whole_up_to = contiguous_end(&bucket.segments[index..]);
            law!(tensor.offset + len_bytes <= whole_up_to, "tensor {name:?} is not whole in bucket {number}");
        }
    }
    Ok(())
}

/// Whether `next` goes on where `segment` ends, in the arena and in the ring.
fn follows(segment: &Segment, next: &Segment) -> bool {
    next.owner == segment.owner
        && next.arena == segment.arena
        && next.tensors.start == segment.tensors.end
        && next.arena_offset == segment.arena_offset + segment.len_bytes
        && next.ring_offset == segment.ring_offset + segment.len_bytes
}

/// Where the run of pieces that begins with the first segment ends in the arena.
fn contiguous_end(segments: &[Segment]) -> u64 {
    let pieces = 1 + segments.windows(2).take_while(|pair| follows(&pair[0], &pair[1])).count();
    segments[..pieces].last().map_or(0, |s| s.arena_offset + s.len_bytes)
}

/// No ring byte is written before the readers of its last content are through. Acks come in plan order.
fn check_waits(plan: &UpdatePlan) -> Result<(), Violation> {
    // Start of a range to its end and the bucket that wrote it last; disjoint.
    let mut writers: BTreeMap<u64, (u64, usize)> = BTreeMap::new();
    for (number, bucket) in plan.buckets.iter().enumerate() {
        let waits_for = bucket.waits_for.map(|b| b as usize);
        law!(waits_for.is_none_or(|b| b < number), "bucket {number} waits for itself or a later one");
        let (start, end) = (bucket.ring_offset, bucket.ring_offset + bucket.len_bytes);
        if start == end {
            continue;
        }
        let first = writers.range(..=start).next_back().map_or(start, |(s, _)| *s);
        let hit: Vec<(u64, (u64, usize))> =
            writers.range(first..end).map(|(s, w)| (*s, *w)).filter(|(_, (e, _))| *e > start).collect();
        for (old_start, (old_end, writer)) in hit {
            law!(waits_for >= Some(writer), "bucket {number} does not wait for bucket {writer} under it");
            writers.remove(&old_start);
            if old_start < start {
                writers.insert(old_start, (start, writer));
            }
            if old_end > end {
                writers.insert(end, (old_end, writer));
            }
        }
        writers.insert(start, (end, number));
    }
    Ok(())
}

/// Checks that no owner has more than `ceil(window / owners) + 1` of any `window` consecutive turns, where `owners`
/// counts those who still have bytes at the window's end. A turn is a run of segments of one owner in one bucket.
///
/// Loads that are perfectly balanced in sum but sent owner by owner would leave most links idle most of the time.
pub fn check_interleaving(plan: &UpdatePlan) -> Result<(), Violation> {
    let turns: Vec<Rank> = plan
        .buckets
        .iter()
        .flat_map(|b| b.segments.chunk_by(|a, b| a.owner == b.owner))
        .filter_map(|turn| turn.first().map(|s| s.owner))
        .collect();
    let last_turn: HashMap<Rank, usize> = turns.iter().enumerate().map(|(i, owner)| (*owner, i)).collect();
    let mut active = last_turn.len();
    let mut recent = VecDeque::new();
    let mut counts: HashMap<Rank, usize> = HashMap::new();
    for (index, owner) in turns.iter().enumerate() {
        recent.push_back(*owner);
        *counts.entry(*owner).or_default() += 1;
        if recent.len() > plan.window as usize
            && let Some(oldest) = recent.pop_front()
        {
            *counts.entry(oldest).or_default() -= 1;
        }
        let limit = (plan.window as usize).div_ceil(active.max(1)) + 1;
        law!(
            active < 2 || counts[owner] <= limit,
            "owner {owner} has {} of {} turns up to turn {index}, while {active} owners have bytes",
            counts[owner],
            recent.len()
        );
        if last_turn[owner] == index {
            active -= 1;
        }
    }
    Ok(())
}
