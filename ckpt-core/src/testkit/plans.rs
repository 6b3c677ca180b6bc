//! Small plans: made by hand, for machines that must not depend on the planner, and by the planner.

use std::sync::Arc;

use super::Random;
use crate::{
    manifest::{Arena, Manifest, Share, Tensor},
    plan::{Bucket, Method, PlanInput, PlanLimits, Segment, UpdatePlan, plan},
    types::{DType, Rank, TensorMeta, align_up},
};

/// `waits_for` of a bucket at `offset..offset + len` behind `earlier`: the last of them with overlapping bytes.
pub fn waits_for(earlier: &[Bucket], offset: u64, len: u64) -> Option<u32> {
    let overlaps = |b: &Bucket| b.ring_offset < offset + len && offset < b.ring_offset + b.len_bytes;
    earlier.iter().rposition(overlaps).and_then(|b| u32::try_from(b).ok())
}

fn push_bucket(plan: &mut UpdatePlan, ring_offset: u64, parts: &[(Rank, u64)]) {
    let len_bytes = parts.iter().map(|(_, len)| len).sum();
    let waits_for = waits_for(&plan.buckets, ring_offset, len_bytes);
    let mut at = ring_offset;
    let segments = parts
        .iter()
        .map(|(owner, len)| {
            let segment = Segment {
                owner: *owner,
                root: *owner,
                arena: 0,
                arena_offset: 0,
                len_bytes: *len,
                ring_offset: at,
                tensors: 0..0,
            };
            at += len;
            segment
        })
        .collect();
    plan.buckets.push(Bucket { ring_offset, len_bytes, waits_for, segments });
}

fn empty_plan(ranks: u32, ring_bytes: u64, bucket_bytes: u64, window: u32, digest: u64) -> UpdatePlan {
    UpdatePlan {
        members: (0..ranks).collect(),
        ring_bytes,
        bucket_bytes,
        window,
        buckets: Vec::new(),
        digest,
    }
}

/// `buckets` equal buckets in a ring of `slots`, each made of one segment from each of `window` owners in turn.
pub fn ring_plan(ranks: u32, buckets: u32, slots: u32, window: u32, bucket_bytes: u64) -> UpdatePlan {
    let window = window.clamp(1, ranks);
    let part = bucket_bytes / u64::from(window);
    let len = part * u64::from(window);
    let mut plan = empty_plan(ranks, len * u64::from(slots), bucket_bytes, window, 0x5eed);
    for b in 0..buckets {
        let parts: Vec<(Rank, u64)> = (0..window).map(|w| ((b * window + w) % ranks, part)).collect();
        push_bucket(&mut plan, u64::from(b % slots) * len, &parts);
    }
    plan
}

/// Buckets of different sizes that wrap around the ring wherever they fit, from owners in any order.
pub fn random_plan(ranks: u32, buckets: u32, ring_bytes: u64, random: &mut Random) -> UpdatePlan {
    let mut plan = empty_plan(ranks, ring_bytes, ring_bytes / 2, ranks, random.draw());
    let mut at = 0;
    for _ in 0..buckets {
        let window = 1 + random.below(u64::from(ranks.min(3)));
        let first = random.below(u64::from(ranks));
        let parts: Vec<(Rank, u64)> = (0..window)
            .map(|w| {
                let owner = ((first + w) % u64::from(ranks)) as Rank;
                (owner, 1 + random.below((ring_bytes / (2 * window)).max(1)))
            })
            .collect();
        let len: u64 = parts.iter().map(|(_, len)| len).sum();
        if at + len > ring_bytes {
            at = 0;
        }
        if len <= ring_bytes {
            push_bucket(&mut plan, at, &parts);
            at += len;
        }
    }
    plan
}

/// What the planner makes of tensors of up to 512 KiB on all ranks, buckets of 1 MiB and a ring of some more.
pub fn planned(
    ranks: u32,
    tensors_per_rank: u32,
    window: u32,
    ring_slack_bytes: u64,
    random: &mut Random,
) -> UpdatePlan {
    let mut manifest = Manifest::default();
    for rank in 0..ranks {
        let mut arena = Arena::default();
        for i in 0..tensors_per_rank {
            let len_bytes = 1 + random.below(512 << 10);
            // One dimension of bytes cannot overflow.
            if let Ok(meta) = TensorMeta::new(format!("{rank}.{i}"), DType::U8, [len_bytes]) {
                arena.tensors.push(Tensor { meta, offset: arena.len_bytes });
                arena.len_bytes += align_up(len_bytes);
            }
        }
        manifest.shares.insert(rank, Arc::new(Share { arenas: vec![arena] }));
    }
    let members: Vec<Rank> = (0..ranks).collect();
    let limits = PlanLimits {
        target_bucket_bytes: 1 << 20,
        max_bucket_bytes: 1 << 20,
        ring_slack_bytes,
        window: Some(window),
        ..PlanLimits::default()
    };
    let input = PlanInput {
        manifest: &manifest,
        members: &members,
        free_bytes: 1 << 30,
        limits,
        method: Method::Broadcast,
    };
    // Nothing about this input can be refused; an empty plan would be seen by the tests.
    plan(&input).unwrap_or_else(|_| empty_plan(ranks, 0, 0, 1, 0))
}
