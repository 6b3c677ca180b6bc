//! Each rule is left out in turn; a law must break. `docs/mutation.md` holds the table that the ignored test prints.

use std::{collections::BTreeMap, sync::Arc};

use ckpt_core::{
    testkit::{
        ExploreConfig, ExploreFault, SimCluster, SimConfig, Skip, TransportModel, Violation, explore,
        ring_plan, scenario,
    },
    update::Rule,
};

const SEEDS: u64 = 1000;

fn skips() -> impl Iterator<Item = Skip> {
    Rule::ALL.iter().map(|r| Skip::Rule(*r)).chain([Skip::PoisonCheck, Skip::PullersDone])
}

fn scenarios() -> Vec<SimConfig> {
    (0..SEEDS).map(|seed| scenario(seed, None)).collect()
}

fn run_without(skip: Skip, config: &SimConfig) -> Option<Violation> {
    let mut config = config.clone();
    config.skip = Some(skip);
    SimCluster::new(config).run().violation
}

/// For rules whose moment is hard to hit with a seed: the fault with which every order is searched.
fn search_without(skip: Skip) -> Option<(ExploreFault, Violation, usize)> {
    let fault = match skip {
        Skip::Rule(Rule::HubSuspectBlocksCommit) => ExploreFault::LateSymptom(1),
        Skip::Rule(Rule::HoldAfterLoaded | Rule::EngineEarly) => ExploreFault::EngineFails(0),
        Skip::Rule(Rule::DoubtWithoutHub) => ExploreFault::HubDies,
        Skip::Rule(Rule::FirstCause) => ExploreFault::WorkerFails(1),
        Skip::Rule(Rule::ForeignEpoch) => ExploreFault::StaleCommit(1),
        Skip::PoisonCheck => ExploreFault::LinkBreaks(1),
        _ => return None,
    };
    let fault = if skip == Skip::Rule(Rule::EngineEarly) { ExploreFault::EngineEarly(0) } else { fault };
    let found = explore(&ExploreConfig {
        plan: Arc::new(ring_plan(2, 4, 2, 1, 64)),
        workers: vec![true; 2],
        engine: matches!(fault, ExploreFault::EngineFails(_) | ExploreFault::EngineEarly(_)),
        transport: TransportModel::Eager,
        fault: Some(fault),
        skip: Some(skip),
        max_states: 400_000,
    });
    found.violation.map(|(violation, _)| (fault, violation, found.states))
}

#[test]
fn something_breaks_without_each_rule() {
    let scenarios = scenarios();
    let unnoticed: Vec<Skip> = skips()
        .filter(|skip| search_without(*skip).is_none())
        .filter(|skip| !scenarios.iter().any(|config| run_without(*skip, config).is_some()))
        .collect();
    assert!(unnoticed.is_empty(), "nothing broke without {unnoticed:?}");
}

#[test]
fn an_exhaustive_search_misses_each_rule_that_it_can_reach() {
    for skip in skips() {
        let reachable = matches!(
            skip,
            Skip::Rule(
                Rule::HubSuspectBlocksCommit
                    | Rule::HoldAfterLoaded
                    | Rule::EngineEarly
                    | Rule::DoubtWithoutHub
                    | Rule::FirstCause
                    | Rule::ForeignEpoch
            ) | Skip::PoisonCheck
        );
        assert_eq!(search_without(skip).is_some(), reachable, "{skip:?}");
    }
}

#[test]
#[ignore = "a minute; prints docs/mutation.md's table: cargo test -p ckpt-core --test sim_mutation -- --ignored --nocapture"]
fn print_the_table() {
    let scenarios = scenarios();
    println!("| left out | breaks (runs of {SEEDS}; first seed) | exhaustive search |\n|---|---|---|");
    for skip in skips() {
        let mut laws: BTreeMap<String, (u32, u64)> = BTreeMap::new();
        for (seed, config) in (0..).zip(&scenarios) {
            if let Some(violation) = run_without(skip, config) {
                laws.entry(format!("{:?}", violation.law)).or_insert((0, seed)).0 += 1;
            }
        }
        let mut laws: Vec<_> = laws.into_iter().collect();
        laws.sort_by_key(|(_, (count, _))| std::cmp::Reverse(*count));
        let laws: Vec<String> =
            laws.iter().map(|(law, (count, seed))| format!("{law} ({count}; {seed})")).collect();
        let searched = search_without(skip).map_or_else(
            || "-".to_owned(),
            |(fault, violation, states)| format!("{:?} with {fault:?}, {states} states", violation.law),
        );
        let name = format!("{skip:?}");
        let name = name.trim_start_matches("Rule(").trim_end_matches(')');
        println!("| {name} | {} | {searched} |", if laws.is_empty() { "-".into() } else { laws.join(", ") });
    }
}
