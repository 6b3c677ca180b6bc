//! What the server knows of who holds what: gathered from its own job, or loaded from another's.

use std::{collections::HashMap, sync::Arc, time::Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::ParameterServer;
use crate::{
    error::{Error, ErrorKind, Key, Result},
    manifest::{Manifest, Share},
    metas::{EncodedLayout, Extension, Metas, Part, Placement},
    plan::Location,
    types::{Rank, Version},
    update::pull::{Pull, encode_regions},
};

/// The transport whose address checkpoint-engine's own instances publish.
const MOONCAKE: &str = "mooncake";

/// Metas in force.
#[derive(Clone)]
pub(super) struct Known {
    pub(super) metas: Arc<Metas>,
    pub(super) manifest: Arc<Manifest>,
    /// Its ranks are another job's.
    pub(super) foreign: bool,
}

impl Known {
    fn new(metas: Metas, foreign: bool) -> Result<Self> {
        check_replicas(&metas)?;
        Ok(Self { manifest: Arc::new(metas.manifest()), metas: Arc::new(metas), foreign })
    }
}

/// A rank's part when metas are shared.
#[derive(Serialize, Deserialize)]
struct SharedPart {
    host: String,
    hca: String,
    /// From the ranks that have them.
    metas: Option<Bytes>,
}

impl ParameterServer {
    /// Collective: every rank learns what every rank holds of `name`, and where. A rank without it takes part, too.
    pub async fn gather_metas(&mut self, name: &str) -> Result<Arc<Manifest>> {
        let part = self.own_part(name).await?.encode()?;
        let parts = self.gather(&format!("metas of {name}"), part).await?;
        let mut metas = Metas::default();
        let mut present = Vec::with_capacity(parts.len());
        let mut version = Version::default();
        for (rank, part) in (0..).zip(parts).filter(|(_, part)| !part.is_empty()) {
            present.push(rank);
            let here = |e: Error| e.with(Key::Rank, rank);
            let part = Part::decode(&part).map_err(here)?;
            let extension = part.placement.extension.as_ref();
            version = version.max(extension.map(|e| e.version).unwrap_or_default());
            let host = extension.map(|e| e.host.clone()).unwrap_or_default();
            let hca = part.placement.rdma_device.clone();
            self.locations.insert(rank, Location { rank, hca, host });
            let of_rank = self.layouts.resolve(part).map_err(here)?;
            if of_rank.share.tensors().next().is_some() {
                metas.ranks.insert(rank, of_rank);
            }
        }
        // All ranks proposed one; a restarted process does not know how far the others are.
        for extension in metas.ranks.values_mut().filter_map(|m| m.placement.extension.as_mut()) {
            extension.version = version;
        }
        self.last_version = version;
        self.present = present;
        self.layouts.retain(&metas);
        let known = Known::new(metas, false)?;
        let manifest = known.manifest.clone();
        self.latest = Some(known.clone());
        self.gathered.insert(name.to_owned(), known);
        Ok(manifest)
    }

    /// The metas that were gathered or loaded last, of whichever checkpoint.
    pub fn metas(&self) -> Option<&Arc<Metas>> {
        self.latest.as_ref().map(|known| &known.metas)
    }

    /// The metas that an update of `name` would use.
    pub fn metas_of(&self, name: &str) -> Option<&Arc<Metas>> {
        self.gathered.get(name).or(self.loaded.as_ref()).map(|known| &known.metas)
    }

    /// The version that an update of `name` installs unless the caller has another: agreed when metas were gathered, one
    /// more than any rank had seen; of loaded metas the sender's. `None` if they say nothing.
    pub fn version_of(&self, name: &str) -> Option<Version> {
        let metas = self.metas_of(name)?;
        let versions = metas.ranks.values().filter_map(|m| m.placement.extension.as_ref()).map(|e| e.version);
        versions.max().filter(|version| version.0 > 0)
    }

    /// Takes another job's metas, for every checkpoint that is not gathered again: updates pull from that job's ranks.
    /// Each member of such an update must load the same.
    pub fn load_metas(&mut self, metas: Metas) -> Result<()> {
        if metas.ranks.is_empty() {
            return Err(Error::new(
                ErrorKind::ConfigInvalid,
                "load metas",
                "they name no rank that holds anything; save them after a checkpoint was registered and gathered",
            ));
        }
        let known = Known::new(metas, true)?;
        self.gathered.clear();
        self.latest = Some(known.clone());
        self.loaded = Some(known);
        Ok(())
    }

    /// Collective: as [`Self::load_metas`] on every rank, with the metas that one rank brings (the lowest, if several do).
    pub async fn share_metas(&mut self, metas: Option<&Metas>) -> Result<Arc<Metas>> {
        let Location { host, hca, .. } = self.location.clone();
        let part = SharedPart { host, hca, metas: metas.map(Metas::encode).transpose()? };
        let part = postcard::to_allocvec(&part).map_err(|e| {
            Error::new(ErrorKind::Internal, "share metas", "they cannot be encoded").caused_by(e)
        })?;
        let mut brought = None;
        let parts = self.gather("shared metas", part.into()).await?;
        self.present = (0..).zip(&parts).filter(|(_, part)| !part.is_empty()).map(|(rank, _)| rank).collect();
        for (rank, part) in (0..).zip(parts).filter(|(_, part)| !part.is_empty()) {
            let part: SharedPart = postcard::from_bytes(&part).map_err(|e| {
                Error::new(ErrorKind::Corrupt, "share metas", "they cannot be read")
                    .with(Key::Rank, rank)
                    .caused_by(e)
            })?;
            self.locations.insert(rank, Location { rank, hca: part.hca, host: part.host });
            brought = brought.or(part.metas);
        }
        let brought = brought.ok_or_else(|| {
            Error::new(ErrorKind::ConfigInvalid, "share metas", "no rank of the job brought any")
        })?;
        self.load_metas(Metas::decode(&brought)?)?;
        self.metas()
            .cloned()
            .ok_or_else(|| Error::new(ErrorKind::Internal, "share metas", "they were not kept"))
    }

    /// The hub ends it first, since it knows who is missing.
    pub(super) async fn gather(&mut self, name: &str, part: Bytes) -> Result<Vec<Bytes>> {
        let deadline = Instant::now() + self.deadlines.join + self.deadlines.dead_after;
        self.session.gather(name, part, deadline).await
    }

    pub(super) fn known(&self, name: &str) -> Result<Known> {
        self.gathered.get(name).or(self.loaded.as_ref()).cloned().ok_or_else(|| {
            Error::new(
                ErrorKind::ConfigInvalid,
                "update weights",
                format!("no metas of `{name}`: gather or load them first"),
            )
            .with(Key::Rank, self.rank)
        })
    }

    /// What a P2P update needs; `None` for a broadcast.
    pub(super) fn pull(&self, known: &Known, ranks_given: bool) -> Result<Option<Pull>> {
        if !ranks_given && !known.foreign {
            return Ok(None);
        }
        if self.reader.one_sided().is_none() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "update weights",
                format!(
                    "transport `{}` cannot read other ranks' memory, so it can only broadcast to all ranks; choose one that \
                     can (`ckpt doctor` lists them)",
                    self.reader.name()
                ),
            )
            .with(Key::Rank, self.rank));
        }
        Ok(Some(Pull {
            metas: known.metas.clone(),
            foreign: known.foreign,
            reader: self.reader.clone(),
            device: self.device.clone(),
            check: self.policy.check_pulls,
            locations: self.locations.clone(),
        }))
    }

    pub(super) fn forget_metas(&mut self, name: &str) {
        if let Some(known) = self.gathered.remove(name) {
            self.latest.take_if(|latest| Arc::ptr_eq(&latest.metas, &known.metas));
        }
    }

    async fn own_part(&mut self, name: &str) -> Result<Part> {
        let Location { host, hca, .. } = self.location.clone();
        let mut placement = Placement { rdma_device: hca, ..Placement::default() };
        let version = Version(self.last_version.0.saturating_add(1));
        let mut extension = Extension { host, version, ..Extension::default() };
        let Some(held) = self.checkpoints.get_mut(name) else {
            placement.extension = Some(extension);
            return Ok(Part::with_layout(placement, &EncodedLayout::new(&Share::default())?));
        };
        let checkpoint = &held.checkpoint;
        if let (Some(one_sided), true) = (self.reader.one_sided(), held.registrations.is_empty()) {
            let mut registrations = Vec::with_capacity(checkpoint.arenas.len());
            for arena in &checkpoint.arenas {
                match one_sided.register(arena.clone()).await {
                    Ok(registration) => registrations.push(registration),
                    Err(error) => {
                        // A broadcast does without; a reader is told what is missing.
                        tracing::warn!(checkpoint = name, %error, "others cannot read this rank's memory");
                        registrations.clear();
                        break;
                    }
                }
            }
            held.registrations = registrations;
        }
        placement.arena_addresses = checkpoint.arenas.iter().map(|a| a.address()).collect();
        if let Some(first) = held.registrations.first() {
            let reader = self.reader.name();
            if reader == MOONCAKE {
                placement.p2p_store_addr = Some(first.region().peer.clone());
            }
            let regions = encode_regions(held.registrations.iter().map(|r| r.region()))?;
            extension.descriptors.insert(reader.to_owned(), regions);
        }
        extension.generation = checkpoint.generation;
        extension.digests = checkpoint.digests.clone();
        placement.extension = Some(extension);
        let layout = match &held.layout {
            Some(layout) => layout.clone(),
            None => held.layout.insert(EncodedLayout::new(&checkpoint.share)?).clone(),
        };
        Ok(Part::with_layout(placement, &layout))
    }
}

/// Ranks that hold a tensor of the same name hold the same bytes, as far as digests say. The planner compares dtypes and
/// shapes.
fn check_replicas(metas: &Metas) -> Result<()> {
    if metas.ranks.len() < 2 {
        return Ok(());
    }
    let mut seen: HashMap<&str, (Rank, u64)> = HashMap::new();
    let mut algorithm = None;
    for (rank, of_rank) in &metas.ranks {
        let Some(digests) = of_rank.placement.extension.as_ref().and_then(|e| e.digests.as_ref()) else {
            continue;
        };
        if *algorithm.get_or_insert(digests.algorithm) != digests.algorithm {
            continue;
        }
        for (tensor, digest) in of_rank.share.tensors().zip(&digests.values) {
            let (first, expected) = *seen.entry(&tensor.meta.name).or_insert((*rank, *digest));
            if expected != *digest {
                return Err(Error::new(
                    ErrorKind::ConfigInvalid,
                    "compare replicas",
                    format!(
                        "ranks {first} and {rank} hold different bytes under one name; give all ranks the same checkpoint"
                    ),
                )
                .with(Key::Tensor, &tensor.meta.name)
                .with(Key::Rank, first)
                .with(Key::Peer, rank));
            }
        }
    }
    Ok(())
}
