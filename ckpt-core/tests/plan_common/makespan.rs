//! A model of how long a plan takes, good enough to compare plans.

use std::collections::HashMap;

use ckpt_core::{Rank, plan::UpdatePlan};

/// Rates in bytes per second, times in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Host to device, each rank.
    pub h2d: f64,
    /// The exchange, into each rank.
    pub network: f64,
    /// The worker's copy.
    pub copy: f64,
    /// What the worker spends on a bucket besides.
    pub per_bucket: f64,
    /// Whether a rank starts the copies of a bucket as soon as its ring bytes are free, although the writes of an
    /// earlier bucket still wait for theirs.
    pub eager_loads: bool,
}

/// Seconds of a broadcast update from the first copy to the last ack.
pub fn broadcast_seconds(plan: &UpdatePlan, rates: Rates) -> f64 {
    let mut link_free: HashMap<Rank, f64> = HashMap::new();
    let mut acks: Vec<f64> = Vec::new();
    let (mut issued, mut exchanged, mut acked) = (0.0_f64, 0.0_f64, 0.0_f64);
    for bucket in &plan.buckets {
        let free = bucket.waits_for.map_or(0.0, |w| acks[w as usize]);
        issued = issued.max(free);
        let start = if rates.eager_loads { free } else { issued };
        let mut loaded = issued;
        for segment in &bucket.segments {
            let link = link_free.entry(segment.root).or_default();
            *link = link.max(start) + segment.len_bytes as f64 / rates.h2d;
            loaded = loaded.max(*link);
        }
        exchanged = exchanged.max(loaded) + bucket.len_bytes as f64 / rates.network;
        acked = acked.max(exchanged) + bucket.len_bytes as f64 / rates.copy + rates.per_bucket;
        acks.push(acked);
    }
    acked
}

/// Seconds of a P2P update until all bytes are pulled, where every link carries `rate` bytes per second and pulls share
/// links fairly. The exchange and the workers take no time.
pub fn pull_seconds(plan: &UpdatePlan, rate: f64) -> f64 {
    struct Pull {
        bucket: usize,
        owner: Rank,
        root: Rank,
        left: f64,
    }
    let mut now = 0.0;
    let mut pulls: Vec<Pull> = Vec::new();
    let (mut issued, mut acked) = (0, 0);
    let mut missing: Vec<usize> = plan.buckets.iter().map(|b| b.segments.len()).collect();
    while acked < plan.buckets.len() {
        while issued < plan.buckets.len()
            && plan.buckets[issued].waits_for.is_none_or(|w| (w as usize) < acked)
        {
            pulls.extend(plan.buckets[issued].segments.iter().map(|s| Pull {
                bucket: issued,
                owner: s.owner,
                root: s.root,
                left: s.len_bytes as f64,
            }));
            issued += 1;
        }
        let links: Vec<[(bool, Rank); 2]> =
            pulls.iter().map(|p| [(true, p.owner), (false, p.root)]).collect();
        let rates = fair_rates(&links, rate);
        let step = pulls.iter().zip(&rates).map(|(p, r)| p.left / r).fold(f64::INFINITY, f64::min);
        now += step;
        pulls.iter_mut().zip(&rates).for_each(|(p, r)| p.left -= r * step);
        pulls.retain(|p| {
            let done = p.left < 1.0;
            missing[p.bucket] -= usize::from(done);
            !done
        });
        while acked < issued && missing[acked] == 0 {
            acked += 1;
        }
    }
    now
}

/// Max-min fair rates of flows that each use two links of the same rate.
fn fair_rates(flows: &[[(bool, Rank); 2]], rate: f64) -> Vec<f64> {
    let mut rates = vec![0.0; flows.len()];
    let mut open: Vec<usize> = (0..flows.len()).collect();
    let mut left: HashMap<(bool, Rank), f64> = flows.iter().flatten().map(|link| (*link, rate)).collect();
    while !open.is_empty() {
        let mut users: HashMap<(bool, Rank), f64> = HashMap::new();
        open.iter().flat_map(|f| flows[*f]).for_each(|link| *users.entry(link).or_default() += 1.0);
        let share = users.iter().map(|(link, n)| left[link] / n).fold(f64::INFINITY, f64::min);
        for flow in &open {
            rates[*flow] += share;
        }
        for (link, n) in &users {
            *left.get_mut(link).expect("every link of a flow is listed") -= share * n;
        }
        open.retain(|f| flows[*f].iter().all(|link| left[link] > rate * 1e-9));
    }
    rates
}
