//! What happens when something goes wrong: the real update machines and hub, in virtual time.

use std::{str::FromStr, time::Duration};

use ckpt_core::{
    Error,
    plan::{Method, PlanInput, plan},
    testkit::{Costs, Fault, SimCluster, SimConfig, SimReport, TimedFault, WorkerStep},
    update::Outcome as End,
};
use serde::Serialize;

use super::{made::Made, source::Source, wrong};
use crate::{output::Table, picture::seconds};

/// What goes wrong, and after how much of the update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Failure {
    what: What,
    percent: u32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    Hub,
    Rank(Kind, u32),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Kill,
    Silent,
    Freeze,
    Partition,
    Link,
    WorkerFails,
    WorkerHangs,
    EngineFails,
}

const KINDS: [(&str, Kind); 8] = [
    ("kill", Kind::Kill),
    ("silent", Kind::Silent),
    ("freeze", Kind::Freeze),
    ("partition", Kind::Partition),
    ("link", Kind::Link),
    ("worker-fails", Kind::WorkerFails),
    ("worker-hangs", Kind::WorkerHangs),
    ("engine-fails", Kind::EngineFails),
];

impl FromStr for Failure {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let help = || {
            let kinds: Vec<&str> = KINDS.iter().map(|(name, _)| *name).collect();
            format!("`{text}`: write hub or {} with :RANK, and @PERCENT if you like", kinds.join(", "))
        };
        let (what, percent) = match text.split_once('@') {
            Some((what, percent)) => (what, percent.trim_end_matches('%').parse().map_err(|_| help())?),
            None => (text, 50),
        };
        if percent > 99 {
            return Err(help());
        }
        if what == "hub" {
            return Ok(Self { what: What::Hub, percent });
        }
        let (name, rank) = what.split_once(':').ok_or_else(help)?;
        let kind = KINDS.iter().find(|(known, _)| *known == name).ok_or_else(help)?.1;
        Ok(Self { what: What::Rank(kind, rank.parse().map_err(|_| help())?), percent })
    }
}

/// How it ended.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Outcome {
    /// Ranks of the simulation: of a large cluster, its first ones.
    ranks: u32,
    buckets: usize,
    healthy_s: f64,
    /// From the update's start.
    struck_s: f64,
    /// From the failure until the last living rank knew how its update ended.
    ended_after_s: f64,
    committed: usize,
    failed: usize,
    in_doubt: usize,
    dead: usize,
    /// As the ranks report it.
    cause: String,
    /// A second update succeeded afterwards.
    next_update_succeeded: bool,
}

/// Whole machines are simulated, message by message; what they decide does not depend on their number.
const MAX_RANKS: u32 = 32;
const MAX_BUCKETS: u64 = 200;
/// How long a frozen process stays so: longer than its lease.
const FROZEN: Duration = Duration::from_secs(20);

pub(super) fn simulate(failure: Failure, source: &Source, made: &Made) -> anyhow::Result<Outcome> {
    let cluster = &made.task.cluster;
    let ranks = (made.placement.members.len() as u32).min(MAX_RANKS);
    if let What::Rank(_, rank) = failure.what
        && rank >= ranks
    {
        return Err(wrong(format!("--simulate-failure names rank {rank}, {ranks} are simulated")).into());
    }
    let manifest = source.manifest(made.placement.owners.len() as u32)?;
    let manifest = match manifest.shares.keys().next_back() {
        Some(last) if *last >= ranks => {
            let tensors = manifest.tensors().map(|(_, tensor)| tensor.meta.clone());
            std::sync::Arc::new(ckpt_core::predict::spread(tensors, ranks)?)
        }
        _ => manifest,
    };
    let members: Vec<u32> = (0..ranks).collect();
    let mut limits = made.task.limits.clone();
    limits.target_bucket_bytes =
        limits.target_bucket_bytes.max(manifest.tensor_bytes() / MAX_BUCKETS).min(limits.max_bucket_bytes);
    let free_bytes = cluster.free_bytes();
    let input =
        PlanInput { manifest: &manifest, members: &members, free_bytes, limits, method: Method::Broadcast };
    let plan = plan(&input).map_err(Error::from)?;
    let group = &cluster.nodes[0];
    let rate = |gb_per_s: f64| (gb_per_s * 1e9) as u64;
    let network = if cluster.node_count() > 1 {
        group.link_gb_per_s.min(group.nic_gb_per_s * f64::from(group.nics))
    } else {
        group.link_gb_per_s
    };
    let buckets = plan.buckets.len();
    let mut config = SimConfig::new(ranks, plan);
    config.costs = Costs {
        h2d_bytes_per_sec: rate(group.h2d_gb_per_s),
        net_bytes_per_sec: rate(network),
        worker_bytes_per_sec: rate(group.copy_gb_per_s),
        message: Duration::from_secs_f64(cluster.latency.message_us / 1e6),
        ..Costs::default()
    };
    let undisturbed = run(config.clone())?;
    let healthy = undisturbed.makespan;
    // Of the time in which bytes move.
    let first = undisturbed.spans.iter().map(|span| span.start).min().unwrap_or_default();
    let last = undisturbed.spans.iter().map(|span| span.end).max().unwrap_or_default();
    let at = first + last.saturating_sub(first) * failure.percent / 100;
    let bucket = WorkerStep::Bucket((buckets as u64 * u64::from(failure.percent) / 100) as u32);
    let fault = match failure.what {
        What::Hub => Fault::HubDies { fin: true },
        What::Rank(Kind::Kill, rank) => Fault::RankDies { rank, fin: true },
        What::Rank(Kind::Silent, rank) => Fault::RankDies { rank, fin: false },
        What::Rank(Kind::Freeze, rank) => Fault::Freeze { rank, duration: FROZEN },
        What::Rank(Kind::Partition, rank) => Fault::Partition { rank },
        What::Rank(Kind::Link, rank) => Fault::LinkBreaks { rank },
        What::Rank(Kind::WorkerFails, rank) => Fault::WorkerFails { rank, step: bucket },
        What::Rank(Kind::WorkerHangs, rank) => Fault::WorkerHangs { rank, step: bucket },
        // The ranks of the simulation are one engine, whose request rank 0 sends.
        What::Rank(Kind::EngineFails, _) => Fault::EngineFails { rank: 0 },
    };
    config.fault = Some(TimedFault { at, fault });
    config.retry = true;
    let report = run(config)?;
    let struck = report.struck_at.unwrap_or(at);
    let ended = report.ended_at.iter().flatten().max().copied().unwrap_or(struck);
    let count = |of: fn(&End) -> bool| report.outcomes.iter().flatten().filter(|end| of(end)).count();
    let cause = report.outcomes.iter().flatten().find_map(|end| match end {
        End::Failed { cause } | End::InDoubt { cause } | End::Committed { failure: Some(cause) } => {
            Some(cause.to_string())
        }
        End::Committed { failure: None } => None,
    });
    Ok(Outcome {
        ranks,
        buckets,
        healthy_s: healthy.as_secs_f64(),
        struck_s: struck.as_secs_f64(),
        ended_after_s: ended.saturating_sub(struck).as_secs_f64(),
        committed: count(|end| matches!(end, End::Committed { .. })),
        failed: count(|end| matches!(end, End::Failed { .. })),
        in_doubt: count(|end| matches!(end, End::InDoubt { .. })),
        dead: report.outcomes.iter().filter(|end| end.is_none()).count(),
        cause: cause.unwrap_or_default(),
        next_update_succeeded: report.retried,
    })
}

fn run(config: SimConfig) -> anyhow::Result<SimReport> {
    let report = SimCluster::new(config).run();
    match &report.violation {
        None => Ok(report),
        Some(violation) => anyhow::bail!(
            "the simulated cluster broke a law ({:?}: {}); please report this as a bug",
            violation.law,
            violation.what
        ),
    }
}

impl Outcome {
    pub(super) fn table(&self) -> Table {
        let mut table = Table::new(&["failure", "what happens"]);
        let ends = [
            (self.committed, "committed"),
            (self.failed, "failed"),
            (self.in_doubt, "in doubt"),
            (self.dead, "dead"),
        ];
        let ends: Vec<String> =
            ends.iter().filter(|(n, _)| *n > 0).map(|(n, how)| format!("{n} {how}")).collect();
        let rows = [
            (
                "simulated",
                format!(
                    "{} ranks, {} buckets, {} when healthy; default deadlines",
                    self.ranks,
                    self.buckets,
                    seconds(self.healthy_s)
                ),
            ),
            ("strikes after", seconds(self.struck_s)),
            ("all know after", format!("{} more", seconds(self.ended_after_s))),
            ("ranks", ends.join(", ")),
            ("they report", self.cause.clone()),
            (
                "next update",
                if self.next_update_succeeded {
                    "succeeds"
                } else {
                    "was not tried: the job has to be started again, or the failure was none"
                }
                .to_owned(),
            ),
        ];
        table.pairs(rows);
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_read() {
        let parse = |text: &str| text.parse::<Failure>();
        assert_eq!(parse("kill:3@70").unwrap(), Failure { what: What::Rank(Kind::Kill, 3), percent: 70 });
        assert_eq!(parse("hub").unwrap(), Failure { what: What::Hub, percent: 50 });
        assert_eq!(parse("worker-hangs:0@5%").unwrap().percent, 5);
        for bad in ["", "kill", "kill:", "kill:x", "explode:1", "hub@100", "kill:1@half"] {
            assert!(parse(bad).unwrap_err().contains("worker-hangs"), "{bad}");
        }
    }
}
