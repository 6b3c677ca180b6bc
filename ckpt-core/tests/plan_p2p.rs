//! Pulls are balanced, in a model of links, ring and driver.

mod plan_common;
#[path = "plan_common/pulls.rs"]
mod pulls;

use ckpt_core::{Rank, manifest::Manifest, plan::check, testkit::Random};
use plan_common::{GIB, MIB};
use proptest::prelude::*;
use pulls::{Links, pull_seconds, sent_bytes};

/// Owners with random tensors of up to `largest_mib`, `total_gib` together, split by `weights`.
fn owners(weights: &[u64], largest_mib: u64, total_gib: u64, seed: u64) -> Manifest {
    let mut random = Random::new(seed);
    let all: u64 = weights.iter().sum();
    plan_common::manifest((0..).zip(weights).map(|(rank, weight): (Rank, &u64)| {
        let mut left = total_gib * GIB * weight / all;
        let mut metas = Vec::new();
        while left > 0 {
            let len_bytes = (1 + random.below(largest_mib * MIB)).min(left);
            left -= len_bytes;
            metas.push(plan_common::bytes_meta(format!("{rank}.{}", metas.len()), len_bytes));
        }
        (rank, vec![plan_common::arena(metas)])
    }))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// At most 1.05 of the bound where the receivers' links are the bound and the owners' have twice the rate that this
    /// takes. The totals are more than 100 rings, so fill and drain of the ring are less than 1%.
    ///
    /// Without that reserve every link must be busy at every moment, which whole tensors in plan order do not give: see
    /// `owners_without_reserve`.
    #[test]
    fn pulls_end_near_the_bound_while_owners_have_reserve(
        weights in prop::collection::vec(50_u64..150, 1..17),
        receivers in 1_u32..17,
        largest_mib in 4_u64..32,
        reserve in 2.0_f64..6.0,
        seed in any::<u64>(),
    ) {
        let manifest = owners(&weights, largest_mib, 60, seed);
        let receivers: Vec<Rank> = (100..100 + receivers).collect();
        let made = plan_common::plan_p2p(&manifest, &receivers, &receivers).unwrap();
        check(&made, &manifest).unwrap();
        let sent = sent_bytes(&made);
        let (total, largest) = (sent.values().sum::<u64>() as f64, *sent.values().max().unwrap() as f64);
        prop_assert!(total >= 100.0 * made.ring_bytes as f64);
        // The receivers' rate at which all owners together could send `reserve` times as much.
        let rate = 46e9;
        let inwards = rate * total / largest / reserve / receivers.len() as f64;
        let links = Links::equal(manifest.shares.keys().copied(), rate, receivers, inwards);
        let ratio = pull_seconds(&made, &links) / links.bound_seconds(&sent);
        prop_assert!((0.999..=1.05).contains(&ratio), "{ratio:.3} of the bound");
    }

    /// Every owner's link at its own rate, with or without reserve: a guard against plans that get worse. Most cases are
    /// below 1.05; the worst are those where all owners' and all receivers' links are equally short, as with equal rates
    /// and as many owners as receivers (1.16 to 1.19 for Kimi-K2, see `docs/benchmarks.md`).
    ///
    /// Two things keep plans from the bound there. A receiver pulls two buckets at once, so owners that are in neither
    /// wait; and a tensor arrives whole in one bucket, so the ring must hold a few tensors of every owner before all
    /// owners can send all the time. Receivers' rates are equal within a case: a plan does not know rates, so equal
    /// loads are the best that it can give to receivers.
    #[test]
    fn owners_without_reserve(
        weights in prop::collection::vec((50_u64..150, 0.5_f64..2.0), 2..13),
        receivers in 2_u32..13,
        largest_mib in 4_u64..24,
        ratio in 0.5_f64..2.0,
        seed in any::<u64>(),
    ) {
        let (weights, rates): (Vec<u64>, Vec<f64>) = weights.into_iter().unzip();
        let manifest = owners(&weights, largest_mib, 60, seed);
        let receivers: Vec<Rank> = (100..100 + receivers).collect();
        let made = plan_common::plan_p2p(&manifest, &receivers, &receivers).unwrap();
        let links = Links {
            owners: (0..).zip(rates).map(|(rank, rate): (Rank, f64)| (rank, rate * 46e9)).collect(),
            receivers: receivers.iter().map(|rank| (*rank, ratio * 46e9)).collect(),
        };
        let ratio = pull_seconds(&made, &links) / links.bound_seconds(&sent_bytes(&made));
        prop_assert!((0.999..=1.5).contains(&ratio), "{ratio:.3} of the bound");
    }
}
