//! Stages of different buckets overlap: the time is that of the slowest stage, not of their sum.

use std::time::Duration;

use ckpt_core::testkit::{Costs, Random, SimCluster, SimConfig, SimReport, SpanKind, planned, ring_plan};

const RANKS: u32 = 4;
const BUCKET: u64 = 64 << 20;
/// Each stage alone takes this long for all buckets of `buckets`.
fn stage(buckets: u32) -> Duration {
    Duration::from_secs_f64(f64::from(buckets) * BUCKET as f64 / 1e9)
}

fn run(buckets: u32, slots: u32) -> SimReport {
    let mut config = SimConfig::new(RANKS, ring_plan(RANKS, buckets, slots, RANKS, BUCKET));
    config.costs = Costs {
        // A rank loads a quarter of each bucket, receives three, and its worker copies all.
        h2d_bytes_per_sec: 250_000_000,
        net_bytes_per_sec: 750_000_000,
        worker_bytes_per_sec: 1_000_000_000,
        ..Costs::default()
    };
    let report = SimCluster::new(config).run();
    assert_eq!(report.violation, None);
    report
}

fn total(report: &SimReport, kind: SpanKind) -> Duration {
    report.spans.iter().filter(|s| s.rank == 0 && s.kind == kind).map(|s| s.end - s.start).sum()
}

#[test]
fn three_stages_take_as_long_as_one() {
    let buckets = 40;
    let report = run(buckets, 4);
    let one = stage(buckets);
    for kind in [SpanKind::Load, SpanKind::Exchange, SpanKind::Worker] {
        let busy = total(&report, kind);
        assert!(busy >= one && busy < one * 11 / 10, "{kind:?} was busy for {busy:?}, not about {one:?}");
    }
    assert!(report.makespan >= one);
    assert!(report.makespan < one * 5 / 4, "{:?} for three stages of {one:?} each", report.makespan);
    // The same on the trace: while the worker copies a bucket, a later one is exchanged and a still later one loaded.
    let overlapped = report.spans.iter().filter(|s| s.kind == SpanKind::Worker).filter(|w| {
        let during = |kind: SpanKind| {
            report.spans.iter().any(|s| {
                s.kind == kind
                    && s.rank == w.rank
                    && s.bucket > w.bucket
                    && s.start < w.end
                    && w.start < s.end
            })
        };
        during(SpanKind::Exchange) && during(SpanKind::Load)
    });
    let overlapped = overlapped.count();
    assert!(overlapped >= (RANKS * (buckets - 6)) as usize, "only {overlapped} buckets overlap");
}

#[test]
fn a_ring_of_one_bucket_cannot_overlap() {
    // The counter-check: without room in the ring the same figures add up.
    let buckets = 40;
    let report = run(buckets, 1);
    assert!(report.makespan > stage(buckets) * 29 / 10, "{:?}", report.makespan);
}

#[test]
fn moving_starts_before_workers_have_opened() {
    let mut config = SimConfig::new(2, ring_plan(2, 4, 4, 2, BUCKET));
    config.costs.open = Duration::from_secs(2);
    let report = SimCluster::new(config).run();
    assert_eq!(report.violation, None);
    let first =
        |kind: SpanKind| report.spans.iter().filter(|s| s.kind == kind).map(|s| s.start).min().unwrap();
    assert!(first(SpanKind::Exchange) < Duration::from_secs(1));
    assert!(first(SpanKind::Worker) > Duration::from_secs(2));
    let exchanged =
        report.spans.iter().filter(|s| s.kind == SpanKind::Exchange).map(|s| s.end).max().unwrap();
    assert!(exchanged < Duration::from_secs(2), "the whole ring is filled while workers open");
}

#[test]
fn real_plans_are_as_fast_as_their_slowest_stage() {
    let plan = planned(RANKS, 200, RANKS, 6 << 20, &mut Random::new(7));
    let bytes: u64 = plan.buckets.iter().map(|b| b.len_bytes).sum();
    assert!(plan.buckets.len() > 30, "{} buckets", plan.buckets.len());
    let mut config = SimConfig::new(RANKS, plan);
    config.costs = Costs {
        h2d_bytes_per_sec: 25_000_000,
        net_bytes_per_sec: 75_000_000,
        worker_bytes_per_sec: 100_000_000,
        ..Costs::default()
    };
    let report = SimCluster::new(config).run();
    assert_eq!(report.violation, None);
    let one = Duration::from_secs_f64(bytes as f64 / 1e8);
    assert!(report.makespan < one * 7 / 5, "{:?} for stages of {one:?}", report.makespan);
}
