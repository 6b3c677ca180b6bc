//! Random clusters with one random fault, each made from a seed.

use std::{sync::Arc, time::Duration};

use super::{
    Costs, Fault, Random, SimCluster, SimConfig, SimRank, Skip, TimedFault, TransportModel, WorkerStep,
    planned, random_plan, ring_plan,
};
use crate::{deadlines::Deadlines, types::Rank};

/// Deadlines that keep simulated runs short and still differ from each other.
pub fn tight_deadlines() -> Deadlines {
    Deadlines {
        join: Duration::from_secs(4),
        ready: Duration::from_secs(6),
        bucket: Duration::from_secs(2),
        release: Duration::from_secs(2),
        abort: Duration::from_secs(1),
        total: Duration::from_secs(40),
        heartbeat: Duration::from_millis(250),
        dead_after: Duration::from_secs(1),
    }
}

/// How long after the fault every rank must have ended, beyond a healthy run's time.
fn allowance(fault: Fault, d: &Deadlines) -> Duration {
    let base = d.dead_after * 4 / 5;
    let silence = d.dead_after + d.heartbeat * 2;
    base + match fault {
        // After the commit an engine waits for the worker that nobody tells to finish.
        Fault::RankDies { fin, .. } => d.release * 2 + if fin { d.heartbeat } else { silence },
        Fault::LinkBreaks { .. } | Fault::OtherVersion { .. } => d.heartbeat,
        // Before Begin a rank waits a little longer, lest a late word hits its next call.
        Fault::HubDies { .. } | Fault::Partition { .. } => silence + d.abort + d.dead_after,
        Fault::Freeze { duration, .. } => duration + silence,
        Fault::WorkerHangs { step, .. } => match step {
            WorkerStep::Open => d.ready + d.dead_after,
            WorkerStep::Bucket(_) => d.bucket,
            WorkerStep::Release | WorkerStep::Hook => d.release,
        },
        Fault::EngineHangs { .. } => d.release * 2,
        Fault::ExchangeHangs { .. } => d.bucket * 2,
        Fault::PrepareHangs { .. } => d.ready,
        Fault::NeverCalls { .. } => d.join,
        // Each stage's own limit is the only thing that helps.
        Fault::MessageLost { .. } => d.join + d.ready + d.total + d.release * 6 + d.dead_after * 5,
        _ => Duration::ZERO,
    }
}

fn worker_step(random: &mut Random, buckets: u32) -> WorkerStep {
    match random.below(6) {
        0 => WorkerStep::Open,
        1 => WorkerStep::Release,
        2 => WorkerStep::Hook,
        _ => WorkerStep::Bucket(random.below(u64::from(buckets)) as u32),
    }
}

fn random_fault(random: &mut Random, config: &SimConfig) -> Fault {
    let ranks = config.ranks.len() as u64;
    let buckets = config.plan.buckets.len() as u32;
    let rank = random.below(ranks) as Rank;
    let fin = random.one_in(2);
    match random.below(20) {
        0 | 1 => Fault::RankDies { rank, fin },
        2 => Fault::HubDies { fin },
        3 | 4 => Fault::WorkerFails { rank, step: worker_step(random, buckets) },
        5 => Fault::WorkerHangs { rank, step: worker_step(random, buckets) },
        6 => Fault::EngineFails { rank: 0 },
        7 => Fault::EngineEarly { rank: 0 },
        8 => Fault::EngineHangs { rank: 0 },
        9 | 10 => Fault::Freeze { rank, duration: Duration::from_millis(200 + random.below(4000)) },
        11 => Fault::Partition { rank },
        12 => Fault::LinkBreaks { rank },
        13 => Fault::ExchangeHangs { rank, bucket: random.below(u64::from(buckets)) as u32 },
        14 => Fault::PrepareHangs { rank },
        15 => Fault::PlanDiffers { rank },
        16 => [Fault::NeverCalls { rank }, Fault::OtherVersion { rank }][random.below(2) as usize],
        17 => Fault::Stale { rank },
        18 => Fault::MessageLost { rank, nth: 1 + random.below(5) as u32 },
        _ => Fault::SecondCall { rank },
    }
}

/// The cluster of this seed: 2 to 5 ranks, 1 to 12 buckets, any transport, and four times in five one fault.
pub fn scenario(seed: u64, skip: Option<Skip>) -> SimConfig {
    let mut random = Random::new(seed ^ 0xc0ff_ee00);
    let ranks = 2 + random.below(4) as u32;
    let buckets = 1 + random.below(12) as u32;
    let plan = match random.below(3) {
        0 => ring_plan(ranks, buckets, 2 + random.below(3) as u32, 1 + random.below(2) as u32, 1 << 20),
        1 => random_plan(ranks, buckets, 4 << 20, &mut random),
        _ => planned(ranks, buckets, 1 + random.below(4) as u32, 1 << 20, &mut random),
    };
    let engines = !random.one_in(4);
    let mut config = SimConfig::new(ranks, plan);
    config.ranks = (0..ranks)
        .map(|r| SimRank {
            has_worker: r == 0 || !random.one_in(5),
            engine: engines.then_some(u32::from(ranks > 3 && r >= ranks / 2)),
        })
        .collect();
    // Every engine has a worker; the rank that sends its request need not be that worker's.
    if let Some(last) = config.ranks.last_mut() {
        last.has_worker = true;
    }
    config.deadlines = tight_deadlines();
    config.seed = seed;
    // Slow enough that a fault often strikes while bytes move.
    let rate = |random: &mut Random| 5_000_000 << random.below(4);
    config.costs = Costs {
        h2d_bytes_per_sec: rate(&mut random),
        net_bytes_per_sec: rate(&mut random),
        worker_bytes_per_sec: rate(&mut random),
        message: Duration::from_micros(50 << random.below(5)),
        ..Costs::default()
    };
    config.transport =
        [TransportModel::Eager, TransportModel::Rendezvous, TransportModel::Pull][random.below(3) as usize];
    if random.one_in(5) {
        config.skip = skip;
        return config;
    }
    let healthy = SimCluster::new(config.clone()).run().makespan;
    let fault = random_fault(&mut random, &config);
    let at = Duration::from_nanos(random.below(healthy.as_nanos() as u64 * 21 / 20 + 1));
    config.ends_within = Some(healthy + allowance(fault, &config.deadlines));
    config.fault = Some(TimedFault { at, fault });
    config.retry = true;
    config.plan = Arc::new(config.plan.as_ref().clone());
    config.skip = skip;
    config
}
