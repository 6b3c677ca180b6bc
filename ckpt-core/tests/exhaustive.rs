//! Every interleaving of small clusters, healthy and with one failure at any point.

use std::sync::Arc;

use ckpt_core::testkit::{ExploreConfig, ExploreFault, TransportModel, explore, ring_plan};

fn config(ranks: u32, buckets: u32, slots: u32, window: u32) -> ExploreConfig {
    ExploreConfig {
        plan: Arc::new(ring_plan(ranks, buckets, slots, window, 64)),
        workers: vec![true; ranks as usize],
        engine: false,
        transport: TransportModel::Eager,
        fault: None,
        skip: None,
        max_states: 400_000,
    }
}

#[track_caller]
fn holds(config: &ExploreConfig) -> usize {
    let started = std::time::Instant::now();
    let found = explore(config);
    if let Some((violation, path)) = &found.violation {
        panic!("{violation}\n{}", path.join("\n"));
    }
    assert!(found.complete, "more than {} states", config.max_states);
    assert!(found.ends > 0);
    println!(
        "{:?} {:?}: {} states, {} ends, {:?}",
        config.transport,
        config.fault,
        found.states,
        found.ends,
        started.elapsed()
    );
    found.states
}

#[test]
fn two_ranks_six_buckets() {
    for transport in [TransportModel::Eager, TransportModel::Rendezvous, TransportModel::Pull] {
        let mut config = config(2, 6, 2, 1);
        config.transport = transport;
        config.engine = true;
        holds(&config);
    }
}

#[test]
fn three_ranks_four_buckets_from_two_owners_at_once() {
    holds(&config(3, 4, 2, 2));
}

#[test]
fn a_rank_without_a_worker_and_an_empty_plan() {
    let mut one_without = config(2, 5, 2, 1);
    one_without.workers = vec![true, false];
    holds(&one_without);
    holds(&config(3, 0, 1, 1));
}

#[test]
fn one_failure_at_any_point_of_two_ranks() {
    for fault in [
        ExploreFault::WorkerFails(1),
        ExploreFault::RankDies(1),
        ExploreFault::HubDies,
        ExploreFault::SessionBreaks(1),
        ExploreFault::LinkBreaks(1),
        ExploreFault::EngineFails(0),
        ExploreFault::EngineEarly(0),
        ExploreFault::StaleCommit(1),
        ExploreFault::StaleAbort(1),
    ] {
        let mut config = config(2, 4, 2, 1);
        config.engine = matches!(fault, ExploreFault::EngineFails(_) | ExploreFault::EngineEarly(_));
        config.fault = Some(fault);
        holds(&config);
    }
}

#[test]
fn one_failure_at_any_point_of_three_ranks() {
    for fault in [ExploreFault::WorkerFails(2), ExploreFault::LateSymptom(1)] {
        let mut config = config(3, 2, 1, 1);
        config.fault = Some(fault);
        holds(&config);
    }
}

#[test]
#[ignore = "minutes; run after a change to a machine: cargo test --release -p ckpt-core --test exhaustive -- --ignored"]
fn one_failure_at_any_point_of_three_ranks_and_five_buckets() {
    for fault in [
        ExploreFault::WorkerFails(2),
        ExploreFault::RankDies(2),
        ExploreFault::HubDies,
        ExploreFault::SessionBreaks(2),
        ExploreFault::LinkBreaks(2),
        ExploreFault::LateSymptom(2),
    ] {
        let mut config = config(3, 5, 2, 2);
        config.fault = Some(fault);
        config.max_states = 20_000_000;
        holds(&config);
    }
}
