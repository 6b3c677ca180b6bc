//! How long an update takes on a cluster that is only described: the real plan, driven over a model of its links.
//!
//! A [`Cluster`] says which nodes, devices, links and NICs there are. [`predict`] moves the buckets of an
//! [`UpdatePlan`] over them as the update driver does: loads go out of order where the ring has room, exchanges keep the
//! plan's order and wait for their slowest member, a worker takes one bucket after the other, pulls share links fairly.
//! Ranks of equal nodes are counted, not simulated one by one, so that thousands of ranks take no longer than a few.
//!
//! What it leaves out: other traffic, congestion inside the network, slow starts. So it is what a healthy, idle cluster
//! can do with these rates. [`Bound`] is less than that: no order of the same bytes over the same links is faster.

mod bound;
mod cluster;
mod links;
mod pulls;
mod sim;

use std::{collections::BTreeMap, ops::Range, sync::Arc};

pub use bound::Bound;
pub use cluster::{Cluster, Exchange, Latency, NodeGroup, Slot, WorkerCosts};
pub use links::{LinkKind, LinkLoad};
use serde::Serialize;
pub use sim::predict;

use crate::{
    checkpoint::split,
    error::Result,
    manifest::{Arena, Manifest, Share, Tensor},
    plan::{Location, UpdatePlan},
    types::{Rank, TensorMeta, align_up},
};

/// Which device of the cluster each rank has: `[rank]` is the number of a [`Slot`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Of the ranks that hold the checkpoint.
    pub owners: Vec<u32>,
    /// Of the ranks that are updated. The same as the owners, except in a join.
    pub members: Vec<u32>,
}

impl Placement {
    /// One job on the first `ranks` devices.
    pub fn of_one_job(ranks: u32) -> Self {
        Self { owners: (0..ranks).collect(), members: (0..ranks).collect() }
    }

    /// A new job on the devices `joining`, which takes its weights from a job on all others.
    pub fn of_join(devices: u32, joining: &[u32]) -> Self {
        let owners = (0..devices).filter(|slot| !joining.contains(slot)).collect();
        Self { owners, members: joining.to_vec() }
    }

    /// Where members and owners are, for [`crate::plan::choose_receivers`]. A NIC is a rank's HCA.
    pub fn locations(&self, cluster: &Cluster) -> (Vec<Location>, Vec<Location>) {
        let of = |slots: &[u32]| {
            (0..)
                .zip(slots)
                .filter_map(|(rank, slot): (Rank, _)| {
                    let slot = cluster.slot(*slot)?;
                    let hca = slot.nic.map_or_else(String::new, |nic| format!("nic{nic}"));
                    Some(Location { rank, hca, host: format!("node{}", slot.node) })
                })
                .collect()
        };
        (of(&self.members), of(&self.owners))
    }
}

/// What is to be predicted.
#[derive(Clone, Copy, Debug)]
pub struct Scenario<'a> {
    /// Where.
    pub cluster: &'a Cluster,
    /// What moves when.
    pub plan: &'a UpdatePlan,
    /// Which rank is where.
    pub placement: &'a Placement,
    /// Tensors that start in each segment cost the worker time; `None`: no workers.
    pub worker: Option<WorkerCosts>,
}

/// What takes time in a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Bytes of one owner into its device.
    Load,
    /// Bytes of owners into a receiver's host memory.
    Pull,
    /// The bucket to all members.
    Exchange,
    /// The bucket is with the worker.
    Reload,
}

/// Something that took time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Span {
    /// What.
    pub step: Step,
    /// On which device; an exchange and a reload stand for all devices of their kind and name the first.
    pub slot: u32,
    /// Of which bucket.
    pub bucket: u32,
    /// Bytes.
    pub bytes: u64,
    /// Seconds from the first byte.
    pub start_s: f64,
    /// Seconds from the first byte.
    pub end_s: f64,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// From the call until bytes may move.
    pub start_s: f64,
    /// First byte until the last bucket is acked (or in place, without workers).
    pub transfer_s: f64,
    /// From there until the call returns: the decision, the workers' release and hook.
    pub end_s: f64,
    /// All of it.
    pub total_s: f64,
    /// All of it where the communicator has to be formed first.
    pub first_total_s: f64,
    /// What no plan can be faster than.
    pub bound: Bound,
    /// What each link carries.
    pub links: Vec<LinkLoad>,
    /// What happened when.
    #[serde(skip)]
    pub spans: Vec<Span>,
}

/// The manifest of a checkpoint that `ranks` ranks hold in equal parts, each in one piece of memory.
pub fn spread(tensors: impl IntoIterator<Item = TensorMeta>, ranks: u32) -> Result<Manifest> {
    let tensors: Vec<TensorMeta> = tensors.into_iter().collect();
    let ranges = split(tensors.iter().map(TensorMeta::len_bytes), ranks)?;
    let share = |range: Range<usize>| {
        let mut arena = Arena::default();
        for meta in &tensors[range] {
            arena.tensors.push(Tensor { meta: meta.clone(), offset: arena.len_bytes });
            arena.len_bytes = arena.len_bytes.saturating_add(align_up(meta.len_bytes()));
        }
        Arc::new(Share { arenas: vec![arena] })
    };
    let held = (0..).zip(ranges).filter(|(_, range)| !range.is_empty());
    Ok(Manifest { shares: held.map(|(rank, range)| (rank, share(range))).collect() })
}

/// Bytes by the device that brings them into the group.
pub(crate) fn rooted_bytes(plan: &UpdatePlan) -> BTreeMap<Rank, u64> {
    let mut bytes = BTreeMap::new();
    for segment in plan.buckets.iter().flat_map(|b| &b.segments) {
        *bytes.entry(segment.root).or_default() += segment.len_bytes;
    }
    bytes
}
