//! What the members tell each other.

use serde::{Deserialize, Serialize};

/// Random: names a process among those of one job.
pub(super) type ProcessId = [u8; 16];

/// A block of device memory that others may map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lent {
    /// The lender's number for it.
    pub(super) block: u64,
    /// The kernel's boot id, hashed: handles mean nothing on other hosts.
    pub(super) host: u64,
    /// Whose memory: a process cannot map its own.
    pub(super) process: ProcessId,
    /// Where it starts in that process.
    pub(super) address: u64,
    pub(super) len_bytes: u64,
    /// `cudaIpcMemHandle_t`.
    pub(super) handle: Vec<u8>,
}

/// Where the bytes of one operation go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    /// Index in the group.
    pub(super) op: u32,
    /// One that was lent before.
    pub(super) block: u64,
    pub(super) offset: u64,
    pub(super) len_bytes: u64,
}

/// From one member to another, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Message {
    /// The block is the target of later offers.
    Lend(Lent),
    /// The places for all operations of a group whose root is the one who is told. They may be written from now on.
    Offer { group: u64, places: Vec<Place> },
    /// All bytes that were offered places in this group are there.
    Written { group: u64 },
    /// The sender wants to free this block.
    Forget { block: u64 },
    /// It is not mapped any more.
    Forgotten { block: u64 },
}
