//! Metas: what every rank holds and where, as it travels between ranks and to joining instances.
//!
//! They have two halves. The *layout* (names, dtypes, shapes, offsets: a [`Share`]) is large, the same for every version of
//! a model, and known by its digest. The *placement* (addresses, transports' descriptors, digests of the bytes) is small
//! and new each time. [`Part`] carries both between ranks, the layout only where it is needed; [`Metas::to_json`] is the
//! format of the HTTP API and of metas files, shared with checkpoint-engine.

mod json;
mod layout;
mod part;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use layout::{EncodedLayout, LayoutDigest, decode_layout};
pub use part::{LayoutCache, Part};

use crate::{
    checkpoint::{DigestAlgorithm, Digests},
    error::{Error, ErrorKind, Key, Result},
    manifest::{Manifest, Share},
    types::{Rank, Version},
};

/// Where a rank's share is and how to reach it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// The address of Mooncake's transfer engine, `10.0.0.1:15428`, where there is one.
    pub p2p_store_addr: Option<String>,
    /// RDMA devices, `mlx5_0` or `mlx5_0,mlx5_1`; empty for none.
    pub rdma_device: String,
    /// Address of each arena of the share in its owner's memory.
    pub arena_addresses: Vec<u64>,
    /// What only this program writes; absent in metas of checkpoint-engine's own instances.
    pub extension: Option<Extension>,
}

/// What this program adds to a rank's placement.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extension {
    /// The owner's host.
    pub host: String,
    /// Version of the weights.
    pub version: Version,
    /// [`crate::checkpoint::RegisteredCheckpoint::generation`]: a reader checks that it stays the same.
    pub generation: u64,
    /// Digest of each tensor, in the share's memory order.
    pub digests: Option<Digests>,
    /// What each transport needs to reach the memory, by the transport's name; opaque to everyone else.
    pub descriptors: BTreeMap<String, Bytes>,
}

/// One rank's metas.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RankMetas {
    /// What it holds.
    pub share: Arc<Share>,
    /// Where.
    pub placement: Placement,
}

impl RankMetas {
    /// Puts the halves together; an error if they do not fit each other.
    pub fn new(share: Arc<Share>, placement: Placement) -> Result<Self> {
        let corrupt = |message: String| Error::new(ErrorKind::Corrupt, "read metas", message);
        let (arenas, addresses) = (share.arenas.len(), placement.arena_addresses.len());
        if arenas != addresses {
            return Err(corrupt(format!("{arenas} arenas have {addresses} addresses")));
        }
        for (arena, address) in share.arenas.iter().zip(&placement.arena_addresses) {
            if address.checked_add(arena.len_bytes).is_none() {
                return Err(corrupt(format!("{} bytes at address {address} do not exist", arena.len_bytes)));
            }
        }
        let digests = placement.extension.as_ref().and_then(|e| e.digests.as_ref());
        if let Some(digests) = digests {
            let tensors = share.tensors().count();
            if digests.values.len() != tensors {
                return Err(corrupt(format!("{tensors} tensors have {} digests", digests.values.len())));
            }
        }
        let mut names = HashSet::with_capacity(share.arenas.iter().map(|a| a.tensors.len()).sum());
        if let Some(twice) = share.tensors().find(|t| !names.insert(&*t.meta.name)) {
            return Err(corrupt("the rank names a tensor twice".into()).with(Key::Tensor, &twice.meta.name));
        }
        Ok(Self { share, placement })
    }

    /// Address of a byte of an arena in its owner's memory.
    pub fn address(&self, arena: u32, offset: u64) -> Option<u64> {
        self.placement.arena_addresses.get(arena as usize)?.checked_add(offset)
    }
}

/// Every rank's metas. Ranks that hold nothing are absent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metas {
    /// By rank.
    pub ranks: BTreeMap<Rank, RankMetas>,
}

impl Metas {
    /// Puts a manifest and its placements together.
    pub fn new(manifest: &Manifest, mut placements: BTreeMap<Rank, Placement>) -> Result<Self> {
        let mut ranks = BTreeMap::new();
        for (rank, share) in &manifest.shares {
            let Some(placement) = placements.remove(rank) else {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    "read metas",
                    "the rank has tensors but no placement",
                )
                .with(Key::Rank, rank));
            };
            let metas = RankMetas::new(share.clone(), placement).map_err(|e| e.with(Key::Rank, rank))?;
            ranks.insert(*rank, metas);
        }
        Ok(Self { ranks })
    }

    /// The digest of every tensor whose owners made one with `algorithm`, by name.
    pub fn digests(&self, algorithm: DigestAlgorithm) -> HashMap<Arc<str>, u64> {
        let mut by_name = HashMap::new();
        for metas in self.ranks.values() {
            let digests = metas.placement.extension.as_ref().and_then(|e| e.digests.as_ref());
            if let Some(digests) = digests.filter(|d| d.algorithm == algorithm) {
                let named = metas.share.tensors().zip(&digests.values);
                by_name.extend(named.map(|(tensor, digest)| (tensor.meta.name.clone(), *digest)));
            }
        }
        by_name
    }

    /// The first rank of these metas whose memory `later` ones describe differently, of those whose reads are not checked
    /// by themselves: checkpoint-engine's own instances do not tell readers that they registered other weights.
    pub fn moved_since(&self, later: &Self) -> Option<Rank> {
        let unchecked = self.ranks.iter().filter(|(_, metas)| metas.placement.extension.is_none());
        let mut moved = unchecked.filter(|(rank, metas)| later.ranks.get(*rank) != Some(*metas));
        moved.next().map(|(rank, _)| *rank)
    }

    /// Whether there are such ranks at all.
    pub fn are_unchecked(&self) -> bool {
        self.ranks.values().any(|metas| metas.placement.extension.is_none())
    }

    /// What the planner needs. Shares are not copied.
    pub fn manifest(&self) -> Manifest {
        Manifest { shares: self.ranks.iter().map(|(rank, metas)| (*rank, metas.share.clone())).collect() }
    }
}
