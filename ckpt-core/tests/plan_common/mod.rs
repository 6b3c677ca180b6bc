//! Manifests for the planner's tests.
#![allow(dead_code, reason = "each test file uses some of it")]

use std::sync::Arc;

use ckpt_core::{
    DType, Rank,
    manifest::{Arena, Manifest, Share, Tensor},
    plan::{Method, PlanError, PlanInput, PlanLimits, UpdatePlan, plan},
    types::{TensorMeta, align_up},
};

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// A meta of `len_bytes` bytes.
pub fn bytes_meta(name: impl Into<Arc<str>>, len_bytes: u64) -> TensorMeta {
    TensorMeta::new(name, DType::U8, [len_bytes]).expect("tests keep sizes below 2^61 bytes")
}

/// Lays tensors out one after the other at aligned offsets.
pub fn arena(metas: impl IntoIterator<Item = TensorMeta>) -> Arena {
    let mut arena = Arena::default();
    for meta in metas {
        let offset = arena.len_bytes;
        arena.len_bytes += align_up(meta.len_bytes());
        arena.tensors.push(Tensor { meta, offset });
    }
    arena
}

/// A manifest with one share for each list of arenas; empty lists are left out.
pub fn manifest(shares: impl IntoIterator<Item = (Rank, Vec<Arena>)>) -> Manifest {
    let shares = shares.into_iter().map(|(rank, arenas)| (rank, Arc::new(Share { arenas })));
    Manifest { shares: shares.collect() }
}

/// `ranks` owners with `count` tensors of `len_bytes` each.
pub fn uniform(ranks: u32, count: u32, len_bytes: u64) -> Manifest {
    manifest((0..ranks).map(|rank| {
        let metas = (0..count).map(|i| bytes_meta(format!("layers.{i}.of.{rank}"), len_bytes));
        (rank, vec![arena(metas)])
    }))
}

/// Plans with default limits and plenty of memory.
pub fn plan_broadcast(manifest: &Manifest, members: &[Rank]) -> Result<UpdatePlan, PlanError> {
    plan(&PlanInput {
        manifest,
        members,
        free_bytes: 64 * GIB,
        limits: PlanLimits::default(),
        method: Method::Broadcast,
    })
}

/// Plans with default limits and plenty of memory.
pub fn plan_p2p(manifest: &Manifest, members: &[Rank], receivers: &[Rank]) -> Result<UpdatePlan, PlanError> {
    plan(&PlanInput {
        manifest,
        members,
        free_bytes: 64 * GIB,
        limits: PlanLimits::default(),
        method: Method::P2p { receivers: receivers.to_vec() },
    })
}
