//! Everything that can stop a plan from being made.

use crate::{
    error::{Error, ErrorKind, Key},
    types::{Rank, TensorMeta, format_shape},
};

/// Why there is no plan. Every message says what to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// Nobody would receive.
    #[error("the update has no members; name at least one rank that receives")]
    NoMembers,
    /// Members must be sorted, so that a root's number in the communicator is the same everywhere.
    #[error("the members must be ascending and different, and rank {rank} is not after the one before it")]
    MembersNotAscending {
        /// The first rank out of order.
        rank: Rank,
    },
    /// A P2P update needs somebody who pulls.
    #[error("a P2P update has no receivers; name at least one of its members")]
    NoReceivers,
    /// A receiver brings bytes to the members' communicator, so it must be in it.
    #[error("receiver {rank} is not a member of the update; choose receivers among the members")]
    ReceiverNotMember {
        /// The receiver.
        rank: Rank,
    },
    /// A broadcast's source must be in the members' communicator.
    #[error(
        "rank {rank} holds this tensor and is no member of the broadcast; add the rank or use a P2P update"
    )]
    OwnerNotMember {
        /// The holder.
        rank: Rank,
        /// One of its tensors.
        tensor: String,
    },
    /// A shape whose size is not representable.
    #[error(
        "shape {shape} has more bytes than can be addressed or does not end on a byte; the checkpoint is damaged"
    )]
    TensorSize {
        /// The holder.
        rank: Rank,
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: String,
    },
    /// A tensor that does not lie in its arena.
    #[error(
        "{len_bytes} bytes at offset {offset} do not lie in an arena of {arena_bytes}; register the checkpoint again"
    )]
    TensorOutsideArena {
        /// The holder.
        rank: Rank,
        /// The tensor.
        tensor: String,
        /// Where it claims to start.
        offset: u64,
        /// Its size.
        len_bytes: u64,
        /// The arena's size.
        arena_bytes: u64,
    },
    /// Tensors of an arena must be listed by ascending offset without overlap.
    #[error(
        "it starts at offset {offset}, before the end of tensor {previous:?}; register the checkpoint again"
    )]
    TensorsOverlap {
        /// The holder.
        rank: Rank,
        /// The tensor before it in the list.
        previous: String,
        /// The tensor.
        tensor: String,
        /// Where it starts.
        offset: u64,
    },
    /// One rank holds two tensors of one name.
    #[error("the rank holds two tensors of this name; remove one of them from its files")]
    DuplicateTensor {
        /// The holder.
        rank: Rank,
        /// The name.
        tensor: String,
    },
    /// Two ranks hold different tensors under one name.
    #[error(
        "rank {rank} holds it as {description} and rank {other} as {other_description}; give all ranks the same checkpoint"
    )]
    ReplicaMismatch {
        /// The name.
        tensor: String,
        /// A holder.
        rank: Rank,
        /// What it holds.
        description: String,
        /// Another holder.
        other: Rank,
        /// What that one holds.
        other_description: String,
    },
    /// Not even one tensor fits into the device memory that may be used.
    #[error(
        "the tensor needs {needed} bytes of device memory and {usable} may be used ({free} free on the fullest device, \
         {permille}/1000 of it allowed); free device memory or raise PS_MEM_FRACTION"
    )]
    NoMemory {
        /// The holder.
        rank: Rank,
        /// The largest tensor.
        tensor: String,
        /// Its size, rounded up.
        needed: u64,
        /// What may be used.
        usable: u64,
        /// What is free.
        free: u64,
        /// The allowed part.
        permille: u32,
    },
    /// A number does not fit its type.
    #[error("the checkpoint has {what} than a plan can number; split it into smaller checkpoints")]
    TooLarge {
        /// What there is too much of, "more bytes".
        what: &'static str,
    },
    /// A limit that cannot be right.
    #[error("{name} is {value}; it must be {expected}")]
    InvalidLimit {
        /// The setting.
        name: &'static str,
        /// What it was set to.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
}

impl PlanError {
    /// The kind that the seam's error gets.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoMemory { .. } => ErrorKind::ResourceExhausted,
            Self::TensorSize { .. } | Self::TensorOutsideArena { .. } | Self::TensorsOverlap { .. } => {
                ErrorKind::Corrupt
            }
            _ => ErrorKind::ConfigInvalid,
        }
    }
}

impl From<PlanError> for Error {
    fn from(error: PlanError) -> Self {
        let seam = Error::new(error.kind(), "plan the update", error.to_string());
        match &error {
            PlanError::MembersNotAscending { rank } | PlanError::ReceiverNotMember { rank } => {
                seam.with(Key::Rank, rank)
            }
            PlanError::OwnerNotMember { rank, tensor }
            | PlanError::TensorSize { rank, tensor, .. }
            | PlanError::TensorOutsideArena { rank, tensor, .. }
            | PlanError::TensorsOverlap { rank, tensor, .. }
            | PlanError::DuplicateTensor { rank, tensor }
            | PlanError::NoMemory { rank, tensor, .. } => {
                seam.with(Key::Tensor, tensor).with(Key::Rank, rank)
            }
            PlanError::ReplicaMismatch { tensor, rank, other, .. } => {
                seam.with(Key::Tensor, tensor).with(Key::Rank, rank).with(Key::Peer, other)
            }
            PlanError::NoMembers
            | PlanError::NoReceivers
            | PlanError::TooLarge { .. }
            | PlanError::InvalidLimit { .. } => seam,
        }
    }
}

/// `torch.bfloat16 [4096, 4096]`.
pub(super) fn describe(meta: &TensorMeta) -> String {
    format!("{} {}", meta.dtype, format_shape(&meta.shape))
}
