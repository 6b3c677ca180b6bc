//! A model of how long the pulls of a P2P update take.
//!
//! It does what the update driver does: buckets are begun in plan order, each as soon as the ring bytes under it are free;
//! a receiver has a number of reads under way, its owners taking turns in each bucket; a bucket's ring bytes are free once
//! all its receivers have it and all buckets before it are through. Reads share links fairly (max-min), as connections
//! do. The exchange and the workers take no time, so that only the balance of the pulls shows.
#![allow(dead_code, reason = "each user uses some of it")]

use std::collections::{BTreeMap, VecDeque};

use ckpt_core::{
    Rank,
    manifest::Manifest,
    plan::{Bucket, UpdatePlan},
};

/// The update driver's numbers: reads that a receiver with its fair part has under way, the part of the ring that all of
/// them fill, and what one has at least.
const READS_AT_ONCE: u64 = 32;
const PART_UNDER_WAY: u64 = 2;
const MIN_READ_BYTES: u64 = 256 << 10;

/// Rates in bytes per second.
pub struct Links {
    /// Of every owner's link, outwards.
    pub owners: BTreeMap<Rank, f64>,
    /// Of every receiver's link, inwards.
    pub receivers: BTreeMap<Rank, f64>,
}

impl Links {
    /// Owners that all send at one rate, and receivers that all receive at one rate.
    pub fn equal(
        owners: impl IntoIterator<Item = Rank>,
        owner_rate: f64,
        receivers: impl IntoIterator<Item = Rank>,
        receiver_rate: f64,
    ) -> Self {
        Self {
            owners: owners.into_iter().map(|rank| (rank, owner_rate)).collect(),
            receivers: receivers.into_iter().map(|rank| (rank, receiver_rate)).collect(),
        }
    }

    /// No assignment of the bytes can be faster: an owner's bytes leave over its link, and all bytes arrive over the
    /// receivers' links.
    pub fn bound_seconds(&self, bytes: &BTreeMap<Rank, u64>) -> f64 {
        let total: u64 = bytes.values().sum();
        let inwards = total as f64 / self.receivers.values().sum::<f64>();
        bytes.iter().map(|(owner, bytes)| *bytes as f64 / self.owners[owner]).fold(inwards, f64::max)
    }

    /// Bytes of a ring with which an update of `manifest` could take `seconds`, if it were full at every moment.
    ///
    /// A tensor lies whole in the ring from its first byte on, and it takes at least its bytes over its owner's rate. So
    /// it takes up that many bytes times seconds of the ring, and all tensors together cannot take more than the ring has
    /// in the whole time.
    pub fn ring_bytes(&self, manifest: &Manifest, seconds: f64) -> f64 {
        let taken = |(owner, bytes): (Rank, u64)| bytes as f64 * (bytes as f64 / self.owners[&owner]);
        manifest.tensors().map(|(owner, t)| taken((owner, t.meta.len_bytes()))).sum::<f64>() / seconds
    }
}

/// Bytes that each owner sends.
pub fn sent_bytes(plan: &UpdatePlan) -> BTreeMap<Rank, u64> {
    let mut sent = BTreeMap::new();
    for segment in plan.buckets.iter().flat_map(|b| &b.segments) {
        *sent.entry(segment.owner).or_default() += segment.len_bytes;
    }
    sent
}

/// Bytes on their way from one owner to one receiver.
#[derive(Clone, Debug)]
pub struct Read {
    pub owner: Rank,
    pub receiver: Rank,
    pub left: f64,
    /// What the user wants to find it by.
    pub tag: usize,
}

/// Reads under way over links that they share.
pub struct Network {
    /// Owners' links, then receivers'.
    rates: Vec<f64>,
    owners: BTreeMap<Rank, usize>,
    receivers: BTreeMap<Rank, usize>,
    /// By the two links that they use: these go equally fast.
    reads: BTreeMap<[usize; 2], Vec<Read>>,
    pub now: f64,
}

impl Network {
    pub fn new(links: &Links) -> Self {
        let count = links.owners.len();
        Self {
            rates: links.owners.values().chain(links.receivers.values()).copied().collect(),
            owners: links.owners.keys().copied().zip(0..).collect(),
            receivers: links.receivers.keys().copied().zip(count..).collect(),
            reads: BTreeMap::new(),
            now: 0.0,
        }
    }

    pub fn start(&mut self, read: Read) {
        let over = [self.owners[&read.owner], self.receivers[&read.receiver]];
        self.reads.entry(over).or_default().push(read);
    }

    /// Goes on until the next read is through. Returns what is through; nothing if nothing was under way.
    pub fn advance(&mut self) -> Vec<Read> {
        let rates = self.fair_rates();
        let next = |reads: &[Read]| reads.iter().map(|read| read.left).fold(f64::INFINITY, f64::min);
        let times = self.reads.values().zip(&rates).map(|(reads, rate)| next(reads) / rate);
        let step = times.fold(f64::INFINITY, f64::min);
        if step.is_finite() {
            self.now += step;
        }
        let mut through = Vec::new();
        for (reads, rate) in self.reads.values_mut().zip(rates) {
            reads.iter_mut().for_each(|read| read.left -= step * rate);
            // Less than a byte is an error of rounding.
            through.extend(reads.extract_if(.., |read| read.left < 1.0));
        }
        self.reads.retain(|_, reads| !reads.is_empty());
        through
    }

    /// Max-min fair: all reads get faster together, until a link is full; its reads stay as they are.
    fn fair_rates(&self) -> Vec<f64> {
        let flows: Vec<([usize; 2], f64)> =
            self.reads.iter().map(|(o, reads)| (*o, reads.len() as f64)).collect();
        let mut rates = vec![0.0; flows.len()];
        let mut open: Vec<usize> = (0..flows.len()).collect();
        let mut left = self.rates.clone();
        while !open.is_empty() {
            let mut users = vec![0.0_f64; left.len()];
            for (over, count) in open.iter().map(|flow| flows[*flow]) {
                over.into_iter().for_each(|link| users[link] += count);
            }
            let used = || users.iter().enumerate().filter(|(_, n)| **n > 0.0);
            let share = used().map(|(link, n)| left[link] / n).fold(f64::INFINITY, f64::min);
            open.iter().for_each(|flow| rates[*flow] += share);
            used().for_each(|(link, n)| left[link] -= share * n);
            open.retain(|flow| flows[*flow].0.iter().all(|link| left[*link] > self.rates[*link] * 1e-9));
        }
        rates
    }
}

/// Bytes by rank.
type Bytes = BTreeMap<Rank, u64>;

/// What `receiver` reads in one bucket: owners and bytes, in the order in which the driver posts them.
fn reads(bucket: &Bucket, receiver: Rank, largest: u64) -> Vec<(Rank, f64)> {
    let mut owners: Bytes = BTreeMap::new();
    for s in bucket.segments.iter().filter(|s| s.root == receiver && s.len_bytes > 0) {
        *owners.entry(s.owner).or_default() += s.len_bytes;
    }
    let mut reads = Vec::new();
    for (owner, bytes) in owners {
        let count = bytes.div_ceil(largest);
        reads.extend(
            (0..count).map(|n| (((2 * n + 1) << 32) / (2 * count), owner, bytes as f64 / count as f64)),
        );
    }
    reads.sort_by_key(|(middle, owner, _)| (*middle, *owner));
    reads.into_iter().map(|(_, owner, bytes)| (owner, bytes)).collect()
}

/// Seconds from the first pull to the last.
pub fn pull_seconds(plan: &UpdatePlan, links: &Links) -> f64 {
    let mut network = Network::new(links);
    let mut loads: Bytes = BTreeMap::new();
    for s in plan.buckets.iter().flat_map(|b| &b.segments) {
        *loads.entry(s.root).or_default() += s.len_bytes;
    }
    let reads_at_once = READS_AT_ONCE * loads.len() as u64;
    let largest = (plan.ring_bytes / PART_UNDER_WAY / reads_at_once).max(MIN_READ_BYTES);
    let all = loads.values().sum::<u64>() as f64;
    let (mut issued, mut acked) = (0, 0);
    let mut missing = vec![0_usize; plan.buckets.len()];
    // Of each receiver: how many reads may begin now, and those that wait for that.
    let mut receivers: BTreeMap<Rank, (usize, VecDeque<Read>)> = (loads.into_iter())
        .map(|(rank, load)| {
            let places = (load as f64 / all * reads_at_once as f64).round().max(1.0);
            (rank, (places as usize, VecDeque::new()))
        })
        .collect();
    loop {
        loop {
            while acked < issued && missing[acked] == 0 {
                acked += 1;
            }
            let free = |bucket: &&Bucket| bucket.waits_for.is_none_or(|w| (w as usize) < acked);
            let Some(bucket) = plan.buckets.get(issued).filter(free) else { break };
            for (receiver, (_, waiting)) in &mut receivers {
                let reads = reads(bucket, *receiver, largest);
                missing[issued] += reads.len();
                let read = |(owner, left)| Read { owner, receiver: *receiver, left, tag: issued };
                waiting.extend(reads.into_iter().map(read));
            }
            issued += 1;
        }
        for (places, waiting) in receivers.values_mut() {
            let begun = waiting.drain(..waiting.len().min(*places));
            *places -= begun.len();
            begun.for_each(|read| network.start(read));
        }
        let through = network.advance();
        if through.is_empty() {
            assert_eq!(acked, plan.buckets.len(), "the plan waits for what never comes");
            return network.now;
        }
        for read in through {
            missing[read.tag] -= 1;
            if let Some((places, _)) = receivers.get_mut(&read.receiver) {
                *places += 1;
            }
        }
    }
}
