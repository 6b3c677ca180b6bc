//! Plans are fast in a model of links, rings and workers.

#[path = "plan_common/makespan.rs"]
mod makespan;
#[path = "plan_common/models.rs"]
mod models;
mod plan_common;

use ckpt_core::{Rank, plan::check};
use makespan::{Rates, broadcast_seconds, pull_seconds};
use plan_common::{GIB, MIB};
use proptest::prelude::*;

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

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pulls_keep_the_links_busy(
        sizes in prop::collection::vec((100_u64..600, 1_u64..64), 1..9),
        count in 1_u32..7,
    ) {
        let manifest = plan_common::manifest((0_u32..).zip(&sizes).map(|(rank, (total, tensor))| {
            let count = (total * 40).div_ceil(*tensor);
            let metas = (0..count).map(|i| plan_common::bytes_meta(format!("{rank}.{i}"), (tensor / 2 + i % tensor + 1) * MIB));
            (rank, vec![plan_common::arena(metas)])
        }));
        let receivers: Vec<Rank> = (100..100 + count).collect();
        let made = plan_common::plan_p2p(&manifest, &receivers, &receivers).unwrap();
        let rate = 46e9;
        let largest = manifest.shares.values().map(|s| s.tensor_bytes()).max().unwrap() as f64;
        let total = manifest.tensor_bytes() as f64;
        let bound = largest.max(total / f64::from(count)) / rate;
        let seconds = pull_seconds(&made, rate);
        println!("{} senders, {count} receivers: {:.3} of the bound {bound:.3} s", sizes.len(), seconds / bound);
        // Mostly 1.00 to 1.05; worst, with fill and drain of the ring, where senders and receivers are equally short.
        prop_assert!(seconds <= bound * 1.25, "{:.3} of the bound", seconds / bound);
    }
}
