//! One plan with its prediction.

use std::{collections::BTreeMap, sync::Arc};

use ckpt_core::{
    Error, Rank,
    manifest::Manifest,
    plan::{Method, PlanInput, PlanLimits, UpdatePlan, choose_receivers, plan},
    predict::{Cluster, LinkKind, Placement, Prediction, Scenario, predict},
};
use serde::Serialize;

use super::{Way, Worker, source::Source, wrong};
use crate::{output::format_bytes, picture::seconds};

/// What is asked.
#[derive(Clone, Debug)]
pub(super) struct Task {
    pub(super) cluster: Cluster,
    pub(super) world_size: Option<u32>,
    pub(super) way: Way,
    /// As the user numbers them; empty: all.
    pub(super) ranks: Vec<Rank>,
    pub(super) worker: Worker,
    pub(super) limits: PlanLimits,
}

/// The answer, with all that drawings need.
pub(super) struct Made {
    pub(super) task: Task,
    pub(super) plan: UpdatePlan,
    pub(super) placement: Placement,
    pub(super) prediction: Prediction,
    pub(super) summary: Summary,
}

/// The answer for programs.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Summary {
    pub(super) cluster: String,
    pub(super) nodes: u32,
    pub(super) devices: u32,
    pub(super) checkpoint: String,
    pub(super) method: Way,
    pub(super) worker: Worker,
    /// Ranks that hold the checkpoint, and ranks that are updated.
    pub(super) owners: usize,
    pub(super) members: usize,
    /// In a P2P update.
    pub(super) receivers: Vec<Rank>,
    pub(super) tensors: u64,
    pub(super) tensor_bytes: u64,
    pub(super) buckets: usize,
    pub(super) bucket_bytes: u64,
    pub(super) largest_bucket_bytes: u64,
    pub(super) window: u32,
    pub(super) ring_bytes: u64,
    /// Of the fullest device, before the ring.
    pub(super) free_bytes: u64,
    /// Pinned host memory of the fullest rank.
    pub(super) host_bytes: u64,
    /// Sixteen hexadecimal digits; equal on all ranks.
    pub(super) plan_digest: String,
    pub(super) predicted: Prediction,
    /// Tensor bytes by the whole predicted time.
    pub(super) gb_per_s: f64,
    pub(super) links: Vec<Links>,
}

/// All links of one kind.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Links {
    pub(super) kind: LinkKind,
    pub(super) count: usize,
    pub(super) most_bytes: u64,
    pub(super) least_bytes: u64,
    pub(super) gb_per_s: f64,
    /// Of the busiest, in the predicted transfer.
    pub(super) busy_share: f64,
}

/// In JSON, links are listed one by one up to this many.
const LISTED_LINKS: usize = 4096;

impl Made {
    pub(super) fn new(source: &Source, task: &Task) -> anyhow::Result<Self> {
        let cluster = &task.cluster;
        let devices = task.world_size.unwrap_or_else(|| cluster.devices());
        if devices > cluster.devices() {
            let message = format!("--world-size {devices}: the cluster has {} devices", cluster.devices());
            return Err(wrong(message).into());
        }
        if let Some(rank) = task.ranks.iter().find(|rank| **rank >= devices) {
            return Err(wrong(format!("--ranks names rank {rank} of {devices}")).into());
        }
        let placement = match task.way {
            Way::Join => Placement::of_join(devices, &task.ranks),
            Way::Broadcast | Way::P2p => Placement::of_one_job(devices),
        };
        if placement.owners.is_empty() || placement.members.is_empty() {
            return Err(wrong("a join needs devices on both sides: name some, not all, with --ranks").into());
        }
        let manifest = source.manifest(placement.owners.len() as u32)?;
        let members: Vec<Rank> = match task.way {
            Way::P2p if !task.ranks.is_empty() => task.ranks.clone(),
            _ => (0..placement.members.len() as u32).collect(),
        };
        let receivers = match task.way {
            Way::Broadcast => Vec::new(),
            Way::P2p | Way::Join => {
                let (all, owners) = placement.locations(cluster);
                let here: Vec<_> = all.into_iter().filter(|at| members.contains(&at.rank)).collect();
                choose_receivers(&here, &owners)
            }
        };
        let method = match task.way {
            Way::Broadcast => Method::Broadcast,
            Way::P2p | Way::Join => Method::P2p { receivers: receivers.clone() },
        };
        let free_bytes = cluster.free_bytes();
        let input = PlanInput {
            manifest: &manifest,
            members: &members,
            free_bytes,
            limits: task.limits.clone(),
            method,
        };
        let plan = plan(&input).map_err(Error::from)?;
        let worker = task.worker.costs().map(|costs| cluster.worker.unwrap_or(costs));
        let mut prediction = predict(Scenario { cluster, plan: &plan, placement: &placement, worker })?;
        let links = by_kind(&prediction);
        prediction.links.truncate(LISTED_LINKS);
        let summary =
            summary(source, task, &manifest, &plan, &placement, receivers, prediction.clone(), links);
        Ok(Self { task: task.clone(), plan, placement, prediction, summary })
    }

    /// The answer for people.
    pub(super) fn rows(&self) -> Vec<(&'static str, String)> {
        let (s, p) = (&self.summary, &self.prediction);
        let bound = p.bound;
        let by = [
            (bound.h2d_s, "the links from host to device"),
            (bound.link_s, "the links between devices"),
            (bound.nic_s, "the NICs"),
            (bound.copy_s, "the workers' copies"),
        ];
        let by = by.into_iter().max_by(|a, b| a.0.total_cmp(&b.0)).map_or("", |(_, name)| name);
        let mut rows = vec![
            ("cluster", format!("{}: {} nodes, {} devices", s.cluster, s.nodes, s.devices)),
            (
                "checkpoint",
                format!("{}: {} tensors, {}", s.checkpoint, s.tensors, format_bytes(s.tensor_bytes)),
            ),
            ("ranks", self.ranks_text()),
            (
                "buckets",
                format!(
                    "{} of up to {}, the largest {}, from {} owners at once",
                    s.buckets,
                    format_bytes(s.bucket_bytes),
                    format_bytes(s.largest_bucket_bytes),
                    s.window
                ),
            ),
            (
                "memory",
                format!(
                    "ring {} of {} free on each device; at most {} pinned host memory a rank",
                    format_bytes(s.ring_bytes),
                    format_bytes(s.free_bytes),
                    format_bytes(s.host_bytes)
                ),
            ),
            ("digest", s.plan_digest.clone()),
            (
                "predicted",
                format!(
                    "{} ({:.1} GB/s): start {}, transfer {}, end {}; the first update {}",
                    seconds(p.total_s),
                    s.gb_per_s,
                    seconds(p.start_s),
                    seconds(p.transfer_s),
                    seconds(p.end_s),
                    seconds(p.first_total_s)
                ),
            ),
        ];
        let ratio = p.transfer_s / bound.seconds.max(1e-12);
        rows.push(("bound", format!("{} by {by}; the transfer is {ratio:.2} of it", seconds(bound.seconds))));
        rows
    }

    fn ranks_text(&self) -> String {
        let s = &self.summary;
        match s.method {
            Way::Broadcast => format!("{} ranks broadcast to each other", s.members),
            Way::P2p | Way::Join => {
                let name = if s.method == Way::Join { "join and take" } else { "take" };
                format!("{} ranks {name} from {}; {} of them pull", s.members, s.owners, s.receivers.len())
            }
        }
    }
}

#[allow(clippy::too_many_arguments, reason = "all parts of one answer, put together in one place")]
fn summary(
    source: &Source,
    task: &Task,
    manifest: &Arc<Manifest>,
    plan: &UpdatePlan,
    placement: &Placement,
    receivers: Vec<Rank>,
    predicted: Prediction,
    links: Vec<Links>,
) -> Summary {
    let tensor_bytes = manifest.tensor_bytes();
    let arenas =
        |share: &Arc<ckpt_core::manifest::Share>| share.arenas.iter().map(|arena| arena.len_bytes).sum();
    Summary {
        cluster: task.cluster.name.clone(),
        nodes: task.cluster.node_count(),
        devices: task.cluster.devices(),
        checkpoint: source.name().to_owned(),
        method: task.way,
        worker: task.worker,
        owners: placement.owners.len(),
        members: plan.members.len(),
        receivers,
        tensors: manifest.tensors().count() as u64,
        tensor_bytes,
        buckets: plan.buckets.len(),
        bucket_bytes: plan.bucket_bytes,
        largest_bucket_bytes: plan.buckets.iter().map(|b| b.len_bytes).max().unwrap_or(0),
        window: plan.window,
        ring_bytes: plan.ring_bytes,
        free_bytes: task.cluster.free_bytes(),
        host_bytes: manifest.shares.values().map(arenas).max().unwrap_or(0),
        plan_digest: format!("{:016x}", plan.digest),
        gb_per_s: tensor_bytes as f64 / predicted.total_s.max(1e-12) / 1e9,
        predicted,
        links,
    }
}

fn by_kind(prediction: &Prediction) -> Vec<Links> {
    let mut kinds: BTreeMap<LinkKind, Links> = BTreeMap::new();
    for link in &prediction.links {
        let start = || Links {
            kind: link.kind,
            count: 0,
            most_bytes: 0,
            least_bytes: u64::MAX,
            gb_per_s: link.gb_per_s,
            busy_share: 0.0,
        };
        let links = kinds.entry(link.kind).or_insert_with(start);
        links.count += 1;
        links.most_bytes = links.most_bytes.max(link.bytes);
        links.least_bytes = links.least_bytes.min(link.bytes);
        links.gb_per_s = links.gb_per_s.min(link.gb_per_s);
        links.busy_share = links.busy_share.max(link.busy_s / prediction.transfer_s.max(1e-12));
    }
    kinds.into_values().collect()
}
