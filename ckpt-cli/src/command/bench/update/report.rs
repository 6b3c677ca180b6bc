//! What an update took, and how it is shown.

use std::{path::Path, time::Duration};

use ckpt_core::{
    device::usage::{DeviceUsage, FreeMemory},
    server::UpdateReport,
    update::trace::{Span, Stage, extent},
};
use serde::{Deserialize, Serialize};

use crate::{
    Output,
    machine::Machine,
    output::{Table, format_bytes},
    timeline::{Piece, Timelines},
};

/// Seconds of one update.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Times {
    /// The whole call.
    pub(super) total_s: f64,
    /// First byte enqueued until the last bucket was acked (or was in place, without a worker).
    pub(super) transfer_s: f64,
    /// Join, plan and ring, until all had said so.
    pub(super) join_s: f64,
    pub(super) prepare_s: f64,
    pub(super) go_s: f64,
    /// The worker maps the ring.
    pub(super) open_s: f64,
    /// The sum of the worker's time with buckets.
    pub(super) reload_s: f64,
    pub(super) commit_s: f64,
    pub(super) release_s: f64,
    pub(super) post_hook_s: f64,
    /// Update called until the last ack.
    pub(super) last_ack_s: f64,
    /// The machine's measured limit by the transfer: 100 is as fast as a plain copy of the shares.
    #[serde(default)]
    pub(super) of_limit_percent: Option<f64>,
}

impl Times {
    /// The same beside the machine's limit.
    pub(super) fn beside(self, limit_s: f64) -> Self {
        let percent = (limit_s > 0.0 && self.transfer_s > 0.0).then(|| limit_s / self.transfer_s * 100.0);
        Self { of_limit_percent: percent, ..self }
    }
}

impl Times {
    pub(super) fn of(report: &UpdateReport) -> Self {
        let spans = &report.spans;
        let seconds = |stage| extent(spans, stage).map_or(0.0, |(start, end)| (end - start).as_secs_f64());
        let moving = |span: &&Span| matches!(span.stage, Stage::Load | Stage::Exchange | Stage::Reload);
        let first = spans.iter().filter(moving).map(|span| span.start).min().unwrap_or_default();
        let last = spans.iter().filter(moving).map(|span| span.end).max().unwrap_or_default();
        let reload = spans.iter().filter(|span| span.stage == Stage::Reload);
        Self {
            total_s: report.stages.total_s,
            transfer_s: (last - first).as_secs_f64(),
            join_s: seconds(Stage::Join),
            prepare_s: seconds(Stage::Prepare),
            go_s: seconds(Stage::Go),
            open_s: seconds(Stage::Open),
            reload_s: reload.map(|span| (span.end - span.start).as_secs_f64()).sum(),
            commit_s: seconds(Stage::Commit),
            release_s: seconds(Stage::Release),
            post_hook_s: seconds(Stage::PostHook),
            last_ack_s: last.as_secs_f64(),
            of_limit_percent: None,
        }
    }

    fn each(&self) -> [(&'static str, f64); 11] {
        [
            ("total", self.total_s),
            ("transfer", self.transfer_s),
            ("last ack", self.last_ack_s),
            ("join", self.join_s),
            ("prepare", self.prepare_s),
            ("go", self.go_s),
            ("open", self.open_s),
            ("reload", self.reload_s),
            ("commit", self.commit_s),
            ("release", self.release_s),
            ("hook", self.post_hook_s),
        ]
    }

    /// The slowest of each part.
    fn max(self, other: Self) -> Self {
        Self {
            total_s: self.total_s.max(other.total_s),
            transfer_s: self.transfer_s.max(other.transfer_s),
            join_s: self.join_s.max(other.join_s),
            prepare_s: self.prepare_s.max(other.prepare_s),
            go_s: self.go_s.max(other.go_s),
            open_s: self.open_s.max(other.open_s),
            reload_s: self.reload_s.max(other.reload_s),
            commit_s: self.commit_s.max(other.commit_s),
            release_s: self.release_s.max(other.release_s),
            post_hook_s: self.post_hook_s.max(other.post_hook_s),
            last_ack_s: self.last_ack_s.max(other.last_ack_s),
            of_limit_percent: None,
        }
    }
}

/// One update on one rank.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Measured {
    pub(super) times: Times,
    /// When `update` was called, microseconds since 1970.
    pub(super) began_us: u64,
    /// Stage, bucket, start and end in microseconds since `began_us`.
    pub(super) spans: Vec<(Stage, Option<u32>, u64, u64)>,
    /// Of each bucket: its bytes, and those of them that this rank brings to the group.
    pub(super) bucket_bytes: Vec<(u64, u64)>,
}

impl Measured {
    pub(super) fn of(report: &UpdateReport, began_us: u64) -> Self {
        let microseconds = |time: Duration| time.as_micros() as u64;
        let spans = report
            .spans
            .iter()
            .map(|span| (span.stage, span.bucket, microseconds(span.start), microseconds(span.end)));
        Self {
            times: Times::of(report),
            began_us,
            spans: spans.collect(),
            bucket_bytes: report.bucket_bytes_each.clone(),
        }
    }
}

/// All that one rank measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct RankReport {
    pub(super) load_s: f64,
    pub(super) gather_metas_s: f64,
    /// This rank's share, copied to its device and nothing else, with all ranks at once.
    pub(super) h2d_s: f64,
    pub(super) h2d_bytes: u64,
    pub(super) updates: Vec<Measured>,
    /// Updates with an empty checkpoint.
    pub(super) floor: Vec<Measured>,
    /// Of the device, around the updates.
    #[serde(default)]
    pub(super) free: FreeMemory,
}

/// Device memory of one parameter server, bytes; each part that of the rank that takes most. The worker's is not in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Memory {
    #[serde(flatten)]
    usage: DeviceUsage,
}

impl Memory {
    pub(super) fn of(ranks: &[RankReport], planned_ring_bytes: u64, kept: bool) -> Self {
        let each = ranks.iter().map(|rank| rank.free.usage(planned_ring_bytes, kept));
        let most = |a: DeviceUsage, b: DeviceUsage| DeviceUsage {
            ring_bytes: a.ring_bytes.max(b.ring_bytes),
            ring_measured: a.ring_measured && b.ring_measured,
            group_bytes: a.group_bytes.max(b.group_bytes),
            context_bytes: a.context_bytes.max(b.context_bytes),
        };
        Self { usage: each.reduce(most).unwrap_or_default() }
    }

    fn line(&self, transport: &str) -> String {
        let DeviceUsage { ring_bytes, ring_measured, group_bytes, context_bytes } = self.usage;
        let text = |bytes: Option<u64>| bytes.map_or_else(|| "unknown".to_owned(), format_bytes);
        let how = if ring_measured { "measured" } else { "planned" };
        format!(
            "device memory of a rank: ring {} ({how}), group over {transport} {}, context {}",
            format_bytes(ring_bytes),
            text(group_bytes),
            text(context_bytes)
        )
    }
}

/// The benchmark's result.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) shape: String,
    pub(super) device: String,
    pub(super) transport: String,
    pub(super) worker: String,
    pub(super) ranks: u32,
    pub(super) tensors: u64,
    pub(super) tensor_bytes: u64,
    pub(super) buckets: u64,
    pub(super) bucket_bytes: u64,
    pub(super) ring_bytes: u64,
    /// `None` on the host, where free memory is everybody's.
    pub(super) memory: Option<Memory>,
    pub(super) load_s: f64,
    pub(super) gather_metas_s: f64,
    /// Of the slowest rank.
    pub(super) h2d_limit_s: f64,
    /// Of each rank, all at once.
    pub(super) h2d_gib_per_s: Vec<f64>,
    /// The slowest rank of each part, for each update.
    pub(super) updates: Vec<Times>,
    pub(super) floor: Vec<Times>,
    pub(super) machine: Machine,
}

/// The slowest rank of each part, for each update.
pub(super) fn slowest(ranks: &[RankReport], of: impl Fn(&RankReport) -> &[Measured]) -> Vec<Times> {
    let count = ranks.iter().map(|rank| of(rank).len()).min().unwrap_or(0);
    let all = |i: usize| ranks.iter().map(move |rank| (rank, i));
    (0..count).map(|i| all(i).fold(Times::default(), |t, (rank, i)| t.max(of(rank)[i].times))).collect()
}

impl Report {
    pub(super) fn print(&self, output: &Output) {
        let rates: Vec<String> = self.h2d_gib_per_s.iter().map(|rate| format!("{rate:.1}")).collect();
        output.line(format!(
            "{}: {} tensors, {}; {} ranks on {} over {}; worker {}; {} buckets of up to {}, ring {}",
            self.shape,
            self.tensors,
            format_bytes(self.tensor_bytes),
            self.ranks,
            self.device,
            self.transport,
            self.worker,
            self.buckets,
            format_bytes(self.bucket_bytes),
            format_bytes(self.ring_bytes)
        ));
        output.line(format!(
            "load {:.3} s, gather metas {:.3} s, plain copy of the shares to the devices {:.3} s ({} GiB/s)",
            self.load_s,
            self.gather_metas_s,
            self.h2d_limit_s,
            rates.join(", ")
        ));
        if let Some(memory) = &self.memory {
            output.line(memory.line(&self.transport));
        }
        output.table(&self.table());
    }

    /// A row for each update.
    pub(super) fn table(&self) -> Table {
        let columns = Times::default().each().map(|(name, _)| name);
        let header: Vec<&str> = ["update"].into_iter().chain(columns).chain(["of limit"]).collect();
        let mut table = Table::new(&header);
        let rows = self.updates.iter().enumerate().map(|(i, t)| (format!("{}", i + 1), t, true));
        let floor = self.floor.iter().map(|t| ("empty".to_owned(), t, false));
        for (name, times, ratio) in rows.chain(floor) {
            let cells = times.each().map(|(_, seconds)| format!("{seconds:.4}"));
            let ratio = match (ratio, times.of_limit_percent) {
                (true, Some(percent)) => format!("{percent:.1}%"),
                _ => String::new(),
            };
            table.row([name].into_iter().chain(cells).chain([ratio]));
        }
        table
    }
}

/// Writes all spans as a Chrome trace: a process per rank, a thread per stage.
pub(super) fn write_trace(file: &Path, ranks: &[RankReport]) -> anyhow::Result<()> {
    let updates = || ranks.iter().flat_map(|rank| rank.updates.iter().chain(&rank.floor));
    let zero = updates().map(|update| update.began_us).min().unwrap_or(0);
    let mut timelines = Timelines::default();
    for (number, rank) in (0..).zip(ranks) {
        timelines.rank(number, &format!("rank {number}"));
        for update in rank.updates.iter().chain(&rank.floor) {
            let at = update.began_us - zero;
            for (stage, bucket, start, end) in &update.spans {
                let (start_us, end_us) = (at + start, at + end);
                let piece = Piece { stage: *stage, bucket: *bucket, start_us, end_us, complete: true };
                timelines.piece(number, piece);
            }
        }
    }
    timelines.into_chrome().write(file)
}

#[cfg(test)]
mod tests {
    use ckpt_core::device::usage::AroundUpdate;
    use serde_json::{Value, json};

    use super::*;

    fn measured(total_s: f64, release_s: f64) -> Measured {
        let times = Times { total_s, release_s, ..Times::default() };
        Measured {
            times,
            began_us: 1_000,
            spans: vec![(Stage::Load, Some(3), 5, 9)],
            bucket_bytes: vec![(7, 7); 4],
        }
    }

    #[test]
    fn each_part_is_that_of_the_slowest_rank() {
        let rank =
            |a, b| RankReport { updates: vec![measured(a, b), measured(b, a)], ..RankReport::default() };
        let all = slowest(&[rank(1.0, 5.0), rank(2.0, 4.0)], |rank| &rank.updates);
        assert_eq!(
            all.iter().map(|t| (t.total_s, t.release_s)).collect::<Vec<_>>(),
            [(2.0, 5.0), (5.0, 2.0)]
        );
    }

    #[test]
    fn memory_is_that_of_the_rank_that_takes_most() {
        let rank = |context: u64, group: u64| {
            let free = FreeMemory {
                opened: Some((1 << 30, (1 << 30) - context)),
                updates: vec![AroundUpdate { before: 900 << 20, prepared: None, after: (900 << 20) - group }],
            };
            RankReport { free, ..RankReport::default() }
        };
        let memory = Memory::of(&[rank(5 << 20, 3 << 20), rank(4 << 20, 9 << 20)], 7 << 20, false);
        let line =
            "device memory of a rank: ring 7.0 MiB (planned), group over nccl 9.0 MiB, context 5.0 MiB";
        assert_eq!(memory.line("nccl"), line);
        let unknown = Memory::of(&[RankReport::default()], 0, false).line("cuda");
        assert!(unknown.contains("group over cuda unknown, context unknown"), "{unknown}");
        let json = serde_json::to_value(memory).unwrap();
        assert_eq!((&json["ring_bytes"], &json["context_bytes"]), (&json!(7 << 20), &json!(5 << 20)));
    }

    #[test]
    fn a_trace_is_json_that_names_ranks_stages_and_buckets() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("t.json");
        let rank = RankReport { updates: vec![measured(1.0, 1.0)], ..RankReport::default() };
        write_trace(&file, &[rank.clone(), rank]).unwrap();
        let trace: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        let loads: Vec<_> = events.iter().filter(|e| e["name"] == "load 3").collect();
        assert_eq!(loads.len(), 2);
        assert_eq!((&loads[1]["pid"], &loads[1]["ts"], &loads[1]["dur"]), (&json!(1), &json!(5), &json!(4)));
    }
}
