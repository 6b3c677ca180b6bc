//! A model of how long the pulls of a P2P update take.
//!
//! It does what the update driver does: buckets are begun in plan order, each as soon as the ring bytes under it are free;
//! a receiver works on two buckets at once, with one batch of reads for each owner; a bucket's ring bytes are free once
//! all its receivers have it and all buckets before it are through. Batches share links fairly (max-min), as connections
//! and queue pairs do. The exchange and the workers take no time, so that only the balance of the pulls shows.
#![allow(dead_code, reason = "each user uses some of it")]

use std::collections::{BTreeMap, VecDeque};

use ckpt_core::{Rank, plan::UpdatePlan};

/// Buckets that a receiver pulls at once; the update driver's number.
const BUCKETS_AT_ONCE: usize = 2;

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
}

/// Bytes that each owner sends.
pub fn sent_bytes(plan: &UpdatePlan) -> BTreeMap<Rank, u64> {
    let mut sent = BTreeMap::new();
    for segment in plan.buckets.iter().flat_map(|b| &b.segments) {
        *sent.entry(segment.owner).or_default() += segment.len_bytes;
    }
    sent
}

/// A batch of reads from one owner to one receiver.
#[derive(Clone, Debug)]
pub struct Batch {
    pub owner: Rank,
    pub receiver: Rank,
    pub left: f64,
    /// What the user wants to find it by.
    pub tag: usize,
}

/// Batches under way over links that they share.
pub struct Network {
    /// Owners' links, then receivers'.
    rates: Vec<f64>,
    owners: BTreeMap<Rank, usize>,
    receivers: BTreeMap<Rank, usize>,
    batches: Vec<(Batch, [usize; 2])>,
    pub now: f64,
}

impl Network {
    pub fn new(links: &Links) -> Self {
        let count = links.owners.len();
        Self {
            rates: links.owners.values().chain(links.receivers.values()).copied().collect(),
            owners: links.owners.keys().copied().zip(0..).collect(),
            receivers: links.receivers.keys().copied().zip(count..).collect(),
            batches: Vec::new(),
            now: 0.0,
        }
    }

    pub fn start(&mut self, batch: Batch) {
        let over = [self.owners[&batch.owner], self.receivers[&batch.receiver]];
        self.batches.push((batch, over));
    }

    /// Goes on until the next batch is through. Returns what is through; nothing if nothing was under way.
    pub fn advance(&mut self) -> Vec<Batch> {
        let rates = self.fair_rates();
        let times = self.batches.iter().zip(&rates).map(|((batch, _), rate)| batch.left / rate);
        let step = times.fold(f64::INFINITY, f64::min);
        if step.is_finite() {
            self.now += step;
        }
        let mut through = Vec::new();
        let mut rate = rates.iter();
        self.batches.retain_mut(|(batch, _)| {
            batch.left -= step * rate.next().copied().unwrap_or_default();
            // Less than a byte is an error of rounding.
            let done = batch.left < 1.0;
            if done {
                through.push(batch.clone());
            }
            !done
        });
        through
    }

    /// Max-min fair: all batches get faster together, until a link is full; its batches stay as they are.
    fn fair_rates(&self) -> Vec<f64> {
        let mut rates = vec![0.0; self.batches.len()];
        let mut open: Vec<usize> = (0..self.batches.len()).collect();
        let mut left = self.rates.clone();
        while !open.is_empty() {
            let mut users = vec![0.0_f64; left.len()];
            open.iter().flat_map(|b| self.batches[*b].1).for_each(|link| users[link] += 1.0);
            let used = || users.iter().enumerate().filter(|(_, n)| **n > 0.0);
            let share = used().map(|(link, n)| left[link] / n).fold(f64::INFINITY, f64::min);
            open.iter().for_each(|batch| rates[*batch] += share);
            used().for_each(|(link, n)| left[link] -= share * n);
            open.retain(|b| self.batches[*b].1.iter().all(|link| left[*link] > self.rates[*link] * 1e-9));
        }
        rates
    }
}

/// Bytes by owner.
type Bytes = BTreeMap<Rank, u64>;

/// Seconds from the first pull to the last.
pub fn pull_seconds(plan: &UpdatePlan, links: &Links) -> f64 {
    let mut network = Network::new(links);
    let (mut issued, mut acked) = (0, 0);
    let mut missing = vec![0_usize; plan.buckets.len()];
    // Buckets that each receiver has to pull, with its batches; and how many of those under way are left of each bucket.
    let mut waiting: BTreeMap<Rank, VecDeque<(usize, Bytes)>> = BTreeMap::new();
    let mut under_way: BTreeMap<Rank, BTreeMap<usize, usize>> = BTreeMap::new();
    loop {
        while acked < issued && missing[acked] == 0 {
            acked += 1;
        }
        while let Some(bucket) = plan.buckets.get(issued) {
            if bucket.waits_for.is_some_and(|w| w as usize >= acked) {
                break;
            }
            let mut batches: BTreeMap<Rank, Bytes> = BTreeMap::new();
            for s in bucket.segments.iter().filter(|s| s.len_bytes > 0) {
                *batches.entry(s.root).or_default().entry(s.owner).or_default() += s.len_bytes;
            }
            for (receiver, batches) in batches {
                missing[issued] += batches.len();
                waiting.entry(receiver).or_default().push_back((issued, batches));
            }
            issued += 1;
            if missing[issued - 1] == 0 && acked + 1 == issued {
                acked += 1;
            }
        }
        for (receiver, waiting) in &mut waiting {
            let under_way = under_way.entry(*receiver).or_default();
            while under_way.len() < BUCKETS_AT_ONCE {
                let Some((bucket, batches)) = waiting.pop_front() else { break };
                under_way.insert(bucket, batches.len());
                for (owner, bytes) in batches {
                    network.start(Batch { owner, receiver: *receiver, left: bytes as f64, tag: bucket });
                }
            }
        }
        let through = network.advance();
        if through.is_empty() {
            assert_eq!(acked, plan.buckets.len(), "the plan waits for what never comes");
            return network.now;
        }
        for batch in through {
            missing[batch.tag] -= 1;
            let mine = under_way.entry(batch.receiver).or_default();
            if let Some(left) = mine.get_mut(&batch.tag) {
                *left -= 1;
                if *left == 0 {
                    mine.remove(&batch.tag);
                }
            }
        }
    }
}
