//! The plan: which bytes move when, and what each step waits for. Pure, total and deterministic.
//!
//! [`plan`] works in five steps: check the manifest and keep one holder of every tensor (`inventory`), choose the sizes
//! (`ring`), pack tensors into buckets (`bucket`), give buckets their places in the ring (`ring`), and in a P2P update
//! give segments their receivers (`route`). [`check`] tests the laws on any plan.

mod bucket;
mod check;
mod digest;
mod error;
mod input;
mod inventory;
mod message;
mod ring;
mod route;

use std::ops::Range;

use serde::{Deserialize, Serialize};

pub use check::{Violation, check, check_coverage, check_interleaving};
pub use error::PlanError;
pub use input::{Method, PlanInput, PlanLimits};
pub use message::bucket_message;
pub use route::{Location, choose_receivers};

use crate::types::{Rank, TENSOR_ALIGNMENT};

/// A part of a bucket: a contiguous range of one arena, with the whole tensors that lie in it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Segment {
    /// The rank whose host memory holds the bytes (in a join: in the sender's world).
    pub owner: Rank,
    /// The member that brings the bytes to the group: the owner in a broadcast update, the receiver in a P2P update.
    pub root: Rank,
    /// Index of the arena in the owner's share.
    pub arena: u32,
    /// Bytes from the arena's start.
    pub arena_offset: u64,
    /// Bytes.
    pub len_bytes: u64,
    /// Bytes from the ring's start.
    pub ring_offset: u64,
    /// Indices of the tensors in the arena that start in this segment. A tensor that is cut between receivers starts in
    /// its first piece; the others follow it in the same bucket and in the ring.
    pub tensors: Range<u32>,
}

/// What an engine acks at once.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Bucket {
    /// Bytes from the ring's start.
    pub ring_offset: u64,
    /// Bytes of the ring that this bucket occupies; 0 if all its tensors are empty.
    pub len_bytes: u64,
    /// The last earlier bucket with overlapping ring bytes: its ack must be in before these bytes are written.
    pub waits_for: Option<u32>,
    /// Its parts, in ring order, from up to [`UpdatePlan::window`] owners.
    pub segments: Vec<Segment>,
}

/// The whole update, the same on every rank.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct UpdatePlan {
    /// The ranks that receive, ascending. A root's number in the communicator is its index here.
    pub members: Vec<Rank>,
    /// Device memory of the ring; 0 only if there are no buckets.
    pub ring_bytes: u64,
    /// The size limit that buckets were made with.
    pub bucket_bytes: u64,
    /// Owners that send at once.
    pub window: u32,
    /// In the order in which they are enqueued, published and acked.
    pub buckets: Vec<Bucket>,
    /// A digest of all the above; compared between ranks before the first byte moves.
    pub digest: u64,
}

impl UpdatePlan {
    /// Tensors that a worker is handed in the whole update.
    pub fn tensor_count(&self) -> u64 {
        self.buckets.iter().flat_map(|b| &b.segments).map(|s| s.tensors.len() as u64).sum()
    }

    /// The buckets that `rank` brings bytes to, ascending: it is the root of one of their segments.
    pub fn loads(&self, rank: Rank) -> Vec<u32> {
        let brings = |bucket: &Bucket| bucket.segments.iter().any(|s| s.root == rank);
        (0..).zip(&self.buckets).filter(|(_, bucket)| brings(bucket)).map(|(number, _)| number).collect()
    }
}

/// Owners that send at once, unless the user sets it: the network takes in about as much as 8 devices' host links bring.
const DEFAULT_WINDOW: u32 = 8;

/// Makes the plan of an update.
///
/// Equal inputs give equal plans. No input makes it panic; what cannot be planned is an error that says what to change.
pub fn plan(input: &PlanInput<'_>) -> Result<UpdatePlan, PlanError> {
    validate(input)?;
    let is_member = |rank: Rank| input.members.binary_search(&rank).is_ok();
    let (receivers, default_window): (&[Rank], u32) = match &input.method {
        Method::Broadcast => (&[], DEFAULT_WINDOW),
        Method::P2p { receivers } => {
            (receivers, DEFAULT_WINDOW.max(u32::try_from(receivers.len()).unwrap_or(u32::MAX)))
        }
    };
    let pulled = !receivers.is_empty();
    let inventory = inventory::Inventory::new(input.manifest, |rank| pulled || is_member(rank))?;
    let window = input.limits.window.unwrap_or(default_window);
    let sizes = ring::sizes(&inventory, input.manifest, &input.limits, input.free_bytes, window, pulled)?;
    let mut packing = bucket::Packing {
        bucket_bytes: sizes.bucket_bytes,
        ring_bytes: sizes.ring_bytes,
        window: sizes.window,
        pulled,
    };
    let drafts = bucket::pack(&inventory, packing);

    let all: u64 = drafts.iter().map(|d| d.len_bytes).sum();
    let ring_bytes = if drafts.is_empty() { 0 } else { sizes.ring_bytes.min(all.max(TENSOR_ALIGNMENT)) };
    packing.ring_bytes = ring_bytes;
    let mut ring = ring::Allocator::new(ring_bytes);
    let limits = ring::limits(&drafts, packing);
    let mut buckets: Vec<Bucket> = (0..)
        .zip(drafts.into_iter().zip(limits))
        .map(|(number, (draft, limit))| {
            let (ring_offset, waits_for) = ring.place(number, draft.len_bytes, limit);
            let mut segments = draft.segments;
            segments.iter_mut().for_each(|s| s.ring_offset += ring_offset);
            Bucket { ring_offset, len_bytes: draft.len_bytes, waits_for, segments }
        })
        .collect();
    if pulled {
        route::route(&mut buckets, receivers, input.manifest);
    }
    let mut plan = UpdatePlan {
        members: input.members.to_vec(),
        ring_bytes,
        bucket_bytes: sizes.bucket_bytes,
        window: sizes.window,
        buckets,
        digest: 0,
    };
    plan.digest = plan.compute_digest();
    Ok(plan)
}

fn validate(input: &PlanInput<'_>) -> Result<(), PlanError> {
    input.limits.validate()?;
    if input.members.is_empty() {
        return Err(PlanError::NoMembers);
    }
    if let Some(pair) = input.members.windows(2).find(|pair| pair[0] >= pair[1]) {
        return Err(PlanError::MembersNotAscending { rank: pair[1] });
    }
    if let Method::P2p { receivers } = &input.method {
        if receivers.is_empty() {
            return Err(PlanError::NoReceivers);
        }
        if let Some(rank) = receivers.iter().find(|rank| input.members.binary_search(rank).is_err()) {
            return Err(PlanError::ReceiverNotMember { rank: *rank });
        }
    }
    Ok(())
}
