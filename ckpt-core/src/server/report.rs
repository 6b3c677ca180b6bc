//! What an update did and how long each part took.

use serde::Serialize;

use crate::{
    manifest::Manifest,
    plan::{Bucket, UpdatePlan},
    types::{Epoch, Rank, Version},
    update::trace::{Span, Stage, Trace, extent},
};

/// Seconds of each part of an update on one rank.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Stages {
    /// Until all members had called `update`.
    pub join_s: f64,
    /// Plan, ring, communicator.
    pub prepare_s: f64,
    /// First byte into the ring until the last bucket was acked.
    pub transfer_s: f64,
    /// All buckets acked here until all members had said the same.
    pub commit_s: f64,
    /// The worker dropped the ring.
    pub release_s: f64,
    /// The worker's post hook.
    pub post_hook_s: f64,
    /// The whole call.
    pub total_s: f64,
}

/// A finished update, seen by one rank.
#[derive(Clone, Debug, Serialize)]
pub struct UpdateReport {
    /// The version that is now in use.
    pub version: Version,
    /// The attempt that installed it.
    pub epoch: Epoch,
    /// Some ranks pulled the bytes from their owners (P2P); else the owners broadcast them.
    pub p2p: bool,
    /// Bytes that this rank pulled or, in a broadcast, loaded from its own memory.
    pub rooted_bytes: u64,
    /// Bytes of all tensors, each counted once.
    pub tensor_bytes: u64,
    /// Tensors.
    pub tensors: u64,
    /// Buckets.
    pub buckets: u64,
    /// The plan's bucket size.
    pub bucket_bytes: u64,
    /// Device memory of the ring.
    pub ring_bytes: u64,
    /// Seconds.
    pub stages: Stages,
    /// Of each bucket: its bytes, and those of them that this rank brings to the group.
    #[serde(skip)]
    pub bucket_bytes_each: Vec<(u64, u64)>,
    /// Every span, for timelines.
    #[serde(skip)]
    pub spans: Vec<Span>,
}

impl UpdateReport {
    pub(super) fn new(
        version: Version,
        epoch: Option<Epoch>,
        rank: Rank,
        p2p: bool,
        plan: Option<&UpdatePlan>,
        manifest: &Manifest,
        trace: &Trace,
    ) -> Self {
        let total_s = trace.now().as_secs_f64();
        let spans = trace.spans();
        let seconds = |stage| extent(&spans, stage).map_or(0.0, |(start, end)| (end - start).as_secs_f64());
        let first_byte = [Stage::Load, Stage::Pull, Stage::Exchange]
            .into_iter()
            .filter_map(|s| extent(&spans, s))
            .map(|e| e.0);
        let last_ack =
            [Stage::Reload, Stage::Exchange].into_iter().filter_map(|s| extent(&spans, s)).map(|e| e.1);
        let transfer_s = match (first_byte.min(), last_ack.max()) {
            (Some(start), Some(end)) => end.saturating_sub(start).as_secs_f64(),
            _ => 0.0,
        };
        let stages = Stages {
            join_s: seconds(Stage::Join),
            prepare_s: seconds(Stage::Prepare),
            transfer_s,
            commit_s: seconds(Stage::Commit),
            release_s: seconds(Stage::Release),
            post_hook_s: seconds(Stage::PostHook),
            total_s,
        };
        let rooted =
            |bucket: &Bucket| bucket.segments.iter().filter(|s| s.root == rank).map(|s| s.len_bytes).sum();
        let buckets = plan.into_iter().flat_map(|plan| &plan.buckets);
        let bucket_bytes_each: Vec<(u64, u64)> = buckets.map(|b| (b.len_bytes, rooted(b))).collect();
        let rooted_bytes = bucket_bytes_each.iter().map(|(_, rooted)| rooted).sum();
        Self {
            version,
            epoch: epoch.unwrap_or_default(),
            p2p,
            rooted_bytes,
            tensor_bytes: manifest.tensor_bytes(),
            tensors: manifest.tensors().count() as u64,
            buckets: plan.map_or(0, |p| p.buckets.len() as u64),
            bucket_bytes: plan.map_or(0, |p| p.bucket_bytes),
            ring_bytes: plan.map_or(0, |p| p.ring_bytes),
            stages,
            bucket_bytes_each,
            spans,
        }
    }
}
