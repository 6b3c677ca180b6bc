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
