//! The buckets' way through loads, exchanges and workers.

use std::collections::BTreeMap;

use super::{
    Bound, Prediction, Scenario, Span, Step, WorkerCosts,
    links::Network,
    pulls::{Pulled, Pulls},
};
use crate::{error::Result, plan::Bucket, types::Rank};

/// One-way messages of an update that nothing else hides: Join, Begin, Ready, Go; and Loaded, Committed, Finished, Closed.
const MESSAGES_EACH: f64 = 4.0;

/// Predicts how long the plan takes.
///
/// Errors: the plan and the placement name ranks that the cluster does not have.
pub fn predict(scenario: Scenario<'_>) -> Result<Prediction> {
    let network = Network::new(scenario)?;
    let mut sim = Sim::new(&network);
    let simulated_s = sim.run();
    let links = network.loads(&sim.pulls.carried());
    // Pulls and exchanges that share a NIC are simulated beside each other; together they cannot beat it.
    let transfer_s = links.iter().map(|link| link.busy_s).fold(simulated_s, f64::max);
    let latency = scenario.cluster.latency;
    let messages = MESSAGES_EACH * latency.message_us / 1e6;
    let start_s = messages + latency.prepare_ms / 1e3;
    let end_s = messages + scenario.worker.map_or(0.0, |worker| worker.end_ms / 1e3);
    let total_s = start_s + transfer_s + end_s;
    let forming = if network.member_count() > 1 { latency.communicator_ms / 1e3 } else { 0.0 };
    Ok(Prediction {
        start_s,
        transfer_s,
        end_s,
        total_s,
        first_total_s: total_s + forming,
        bound: Bound::new(&network),
        links,
        spans: sim.spans,
    })
}

/// Ranks of one group of nodes are equal: their workers are one.
struct Class {
    slot: u32,
    copy: f64,
    acked: f64,
    /// By bucket.
    ack_at: Vec<f64>,
}

struct Sim<'a> {
    network: &'a Network<'a>,
    classes: Vec<Class>,
    class_of_group: BTreeMap<usize, usize>,
    /// When the link from host to device is free, by rank.
    h2d_free: BTreeMap<Rank, f64>,
    /// Devices of each node that load.
    busy: BTreeMap<u32, u32>,
    /// When a bucket's loads that are known are done.
    loaded: Vec<f64>,
    /// Pulls of each bucket that are not done.
    missing: Vec<u32>,
    pulls: Pulls,
    /// Buckets by the bucket that they wait for.
    waiting: BTreeMap<u32, Vec<u32>>,
    spans: Vec<Span>,
}

impl<'a> Sim<'a> {
    fn new(network: &'a Network<'a>) -> Self {
        let plan = network.scenario.plan;
        let count = plan.buckets.len();
        let (mut classes, mut class_of_group): (Vec<Class>, _) = (Vec::new(), BTreeMap::new());
        for rank in &plan.members {
            let slot = network.members[*rank as usize];
            class_of_group.entry(slot.group).or_insert_with(|| {
                classes.push(Class {
                    slot: network.scenario.placement.members[*rank as usize],
                    copy: network.group(slot).copy(),
                    acked: 0.0,
                    ack_at: Vec::with_capacity(count),
                });
                classes.len() - 1
            });
        }
        let mut waiting: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (bucket, of) in (0..).zip(&plan.buckets) {
            if let Some(before) = of.waits_for {
                waiting.entry(before).or_default().push(bucket);
            }
        }
        let mut busy: BTreeMap<u32, std::collections::BTreeSet<u32>> = BTreeMap::new();
        for segment in plan.buckets.iter().flat_map(|b| &b.segments) {
            let slot = network.members[segment.root as usize];
            busy.entry(slot.node).or_default().insert(slot.local);
        }
        Self {
            network,
            classes,
            class_of_group,
            h2d_free: BTreeMap::new(),
            busy: busy.into_iter().map(|(node, devices)| (node, devices.len() as u32)).collect(),
            loaded: vec![0.0; count],
            missing: vec![0; count],
            pulls: Pulls::new(network.scenario.cluster.latency.read_us / 1e6),
            waiting,
            spans: Vec::new(),
        }
    }

    /// Seconds from the first byte to the last ack.
    fn run(&mut self) -> f64 {
        let plan = self.network.scenario.plan;
        for (bucket, of) in (0..).zip(&plan.buckets) {
            if of.waits_for.is_none() {
                self.release(bucket, None);
            }
        }
        let (mut enqueued, mut exchanged) = (0.0_f64, 0.0_f64);
        for (bucket, of) in (0_u32..).zip(&plan.buckets) {
            while self.missing[bucket as usize] > 0 {
                let Some(pulled) = self.pulls.next(self.network) else { break };
                self.pulled(pulled);
            }
            // Exchanges are enqueued in order, each when all members have room for it.
            let room = |class: &Class| of.waits_for.map_or(0.0, |before| class.ack_at[before as usize]);
            enqueued = self.classes.iter().map(room).fold(enqueued, f64::max);
            let start = exchanged.max(enqueued).max(self.loaded[bucket as usize]);
            exchanged = start;
            if self.network.member_count() > 1 && of.len_bytes > 0 {
                let latency = self.network.scenario.cluster.latency.exchange_us / 1e6;
                exchanged += self.network.exchange_seconds(of) + latency;
                let slot = self.classes.first().map_or(0, |class| class.slot);
                self.span(Step::Exchange, slot, bucket, of.len_bytes, start, exchanged);
            }
            self.reload(bucket, of, exchanged);
            for next in self.waiting.remove(&bucket).unwrap_or_default() {
                self.release(next, Some(bucket));
            }
        }
        self.classes.iter().map(|class| class.acked).fold(exchanged, f64::max)
    }

    fn span(&mut self, step: Step, slot: u32, bucket: u32, bytes: u64, start_s: f64, end_s: f64) {
        self.spans.push(Span { step, slot, bucket, bytes, start_s, end_s });
    }

    /// The workers take the bucket.
    fn reload(&mut self, bucket: u32, of: &Bucket, exchanged: f64) {
        let Some(worker) = self.network.scenario.worker else {
            for class in &mut self.classes {
                class.acked = exchanged;
                class.ack_at.push(exchanged);
            }
            return;
        };
        let tensors: u64 = of.segments.iter().map(|s| u64::from(s.tensors.end - s.tensors.start)).sum();
        let fixed = fixed_seconds(&worker, tensors, self.network.has_kernels());
        for number in 0..self.classes.len() {
            let class = &mut self.classes[number];
            let start = class.acked.max(exchanged).max(worker.open_ms / 1e3);
            class.acked = start + of.len_bytes as f64 / class.copy + fixed;
            class.ack_at.push(class.acked);
            let (slot, end) = (class.slot, class.acked);
            self.span(Step::Reload, slot, bucket, of.len_bytes, start, end);
        }
    }

    /// Each root starts its part as soon as its own worker has released the ring bytes.
    fn release(&mut self, bucket: u32, after: Option<u32>) {
        let network = self.network;
        let plan = network.scenario.plan;
        let mut own: BTreeMap<Rank, u64> = BTreeMap::new();
        let mut pulls: BTreeMap<Rank, BTreeMap<usize, u64>> = BTreeMap::new();
        for segment in plan.buckets[bucket as usize].segments.iter().filter(|s| s.len_bytes > 0) {
            let placement = network.scenario.placement;
            let here = placement.members[segment.root as usize] == placement.owners[segment.owner as usize];
            if here {
                *own.entry(segment.root).or_default() += segment.len_bytes;
            } else {
                let of_root = pulls.entry(segment.root).or_default();
                *of_root.entry(segment.owner as usize).or_default() += segment.len_bytes;
            }
        }
        for (rank, bytes) in own {
            let at = self.released(rank, after);
            self.load(rank, bucket, bytes, at);
        }
        for (rank, owners) in pulls {
            let at = self.released(rank, after);
            self.missing[bucket as usize] += 1;
            self.pulls.offer(rank, bucket, at, owners.into_iter().collect());
        }
    }

    fn released(&self, rank: Rank, after: Option<u32>) -> f64 {
        let Some(after) = after else { return 0.0 };
        let class = self.class_of_group[&self.network.members[rank as usize].group];
        self.classes[class].ack_at[after as usize]
    }

    fn load(&mut self, rank: Rank, bucket: u32, bytes: u64, at: f64) {
        let slot = self.network.members[rank as usize];
        let rate = self.network.group(slot).h2d(self.busy.get(&slot.node).copied().unwrap_or(1));
        let free = self.h2d_free.entry(rank).or_default();
        let start = free.max(at);
        let end = start + bytes as f64 / rate;
        *free = end;
        let loaded = &mut self.loaded[bucket as usize];
        *loaded = loaded.max(end);
        self.span(
            Step::Load,
            self.network.scenario.placement.members[rank as usize],
            bucket,
            bytes,
            start,
            end,
        );
    }

    /// Pulled bytes are in the receiver's host memory and go on to its device.
    fn pulled(&mut self, pulled: Pulled) {
        let Pulled { receiver, bucket, start, end } = pulled;
        self.missing[bucket as usize] -= 1;
        let segments = &self.network.scenario.plan.buckets[bucket as usize].segments;
        let bytes = segments.iter().filter(|s| s.root == receiver).map(|s| s.len_bytes).sum();
        let slot = self.network.scenario.placement.members[receiver as usize];
        self.span(Step::Pull, slot, bucket, bytes, start, end);
        self.load(receiver, bucket, bytes, end);
    }
}

fn fixed_seconds(worker: &WorkerCosts, tensors: u64, kernels: bool) -> f64 {
    let kernels = if kernels { worker.beside_collective_us } else { 0.0 };
    (worker.per_bucket_us + worker.per_tensor_us * tensors as f64 + kernels) / 1e6
}
