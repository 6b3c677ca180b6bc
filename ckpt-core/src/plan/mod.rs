//! The plan: which bytes move when, and what each step waits for. Pure, total and deterministic.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::types::Rank;

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
    /// Indices of the tensors in the arena that start in this segment.
    pub tensors: Range<u32>,
}

/// What an engine acks at once.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Bucket {
    /// Bytes from the ring's start.
    pub ring_offset: u64,
    /// Bytes of the ring that this bucket occupies.
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
    /// Device memory of the ring.
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
