//! A thousand random clusters with one random fault each keep every law.

use std::collections::BTreeMap;

use ckpt_core::testkit::{SimCluster, scenario};

#[test]
#[ignore = "two minutes; run after a change to a machine: cargo test -p ckpt-core --test sim_laws -- --ignored"]
fn twenty_thousand_more_seeds_keep_every_law() {
    let broken: Vec<String> = (1000..21_000)
        .filter_map(|seed| {
            let config = scenario(seed, None);
            let fault = config.fault;
            let violation = SimCluster::new(config).run().violation?;
            Some(format!("seed {seed} {fault:?}: {violation}"))
        })
        .collect();
    assert!(broken.is_empty(), "{} seeds broke a law:\n{}", broken.len(), broken.join("\n"));
}

#[test]
fn a_thousand_seeds_keep_every_law() {
    let mut broken = Vec::new();
    let mut struck: BTreeMap<String, (u32, u32)> = BTreeMap::new();
    for seed in 0..1000 {
        let config = scenario(seed, None);
        let fault = config.fault;
        let report = SimCluster::new(config).run();
        let name = fault.map_or("none".into(), |f| format!("{:?}", f.fault));
        let name = name.split([' ', '{']).next().unwrap_or_default().to_owned();
        let count = struck.entry(name).or_default();
        count.0 += u32::from(report.struck_at.is_some());
        count.1 += u32::from(report.retried);
        if let Some(violation) = report.violation {
            broken.push(format!("seed {seed} {fault:?}: {violation}"));
        }
    }
    println!("fault: struck, updated again after it\n{struck:#?}");
    assert!(broken.is_empty(), "{} of 1000 seeds broke a law:\n{}", broken.len(), broken.join("\n"));
    // The seeds must reach what they claim to test.
    for fault in
        ["RankDies", "HubDies", "WorkerFails", "Freeze", "LinkBreaks", "ExchangeHangs", "MessageLost"]
    {
        assert!(struck.get(fault).is_some_and(|(n, _)| *n >= 5), "{fault} hardly ever struck");
    }
    for fault in ["RankDies", "WorkerFails", "Freeze", "LinkBreaks"] {
        assert!(struck.get(fault).is_some_and(|(_, n)| *n >= 3), "hardly any update after {fault}");
    }
}
