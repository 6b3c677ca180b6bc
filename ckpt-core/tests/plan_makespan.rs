//! Plans are fast in a model of links, rings and workers.

#[path = "plan_common/makespan.rs"]
mod makespan;
#[path = "plan_common/models.rs"]
mod models;
mod plan_common;

use ckpt_core::{Rank, plan::check};
use makespan::{Rates, broadcast_seconds};
use plan_common::GIB;

/// Two H200 on one host: 51.6 GiB/s from the host to each, 369 GiB/s between them.
fn rates(eager_loads: bool) -> Rates {
    let gib = GIB as f64;
    Rates { h2d: 51.6 * gib, network: 369.0 * gib, copy: 980.0 * gib, per_bucket: 50e-6, eager_loads }
}

#[test]
fn a_broadcast_comes_near_the_host_links_rate() {
    for (world_size, at_most) in [(1, 1.04), (2, 1.06), (4, 1.15), (8, 1.9)] {
        let manifest = models::split(models::qwen3_8b(), world_size);
        let members: Vec<Rank> = (0..world_size).collect();
        let made = plan_common::plan_broadcast(&manifest, &members).unwrap();
        check(&made, &manifest).unwrap();
        let largest_share = manifest.shares.values().map(|s| s.tensor_bytes()).max().unwrap() as f64;
        let bound =
            (largest_share / rates(true).h2d).max(manifest.tensor_bytes() as f64 / rates(true).network);
        let seconds = broadcast_seconds(&made, rates(true));
        println!(
            "{world_size} ranks: {seconds:.3} s, in order {:.3} s",
            broadcast_seconds(&made, rates(false))
        );
        assert!(seconds <= bound * at_most, "{world_size} ranks: {seconds:.3} s, at best {bound:.3} s");
        assert!(seconds <= broadcast_seconds(&made, rates(false)));
    }
}
