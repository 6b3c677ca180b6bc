//! What a checkpoint consists of and which rank holds which bytes: the planner's only input besides sizes.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::types::{Rank, TensorMeta};

/// One tensor in an arena.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tensor {
    /// Name, dtype and shape.
    pub meta: TensorMeta,
    /// Bytes from the arena's start.
    pub offset: u64,
}

/// One contiguous piece of a rank's host memory; tensors lie in it in this order and do not overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arena {
    /// Bytes of the arena.
    pub len_bytes: u64,
    /// Its tensors by ascending offset.
    pub tensors: Vec<Tensor>,
}

/// What one rank holds of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Its arenas; a segment names one by its index here.
    pub arenas: Vec<Arena>,
}

impl Share {
    /// Every tensor, in memory order.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.arenas.iter().flat_map(|a| &a.tensors)
    }

    /// Bytes of all tensors, without padding.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors().map(|t| t.meta.len_bytes()).sum()
    }
}

/// A whole checkpoint: every rank's share. Ranks that hold nothing are absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Shares by rank.
    pub shares: BTreeMap<Rank, Arc<Share>>,
}

impl Manifest {
    /// Every tensor with the rank that holds it.
    pub fn tensors(&self) -> impl Iterator<Item = (Rank, &Tensor)> {
        self.shares.iter().flat_map(|(rank, share)| share.tensors().map(move |t| (*rank, t)))
    }

    /// Bytes of all tensors, without padding.
    pub fn tensor_bytes(&self) -> u64 {
        self.shares.values().map(|s| s.tensor_bytes()).sum()
    }
}
