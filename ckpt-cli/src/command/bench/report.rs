//! The results, in the columns of nccl-tests and perftest.

use serde::Serialize;

use super::{Measured, Op, TransportArgs, measure::Sample};
use crate::{machine::Machine, output::Table};

/// What `--json` prints. Rates are in GB/s, 10^9 bytes per second.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    op: Op,
    transport: &'static str,
    device: &'static str,
    ranks: u32,
    warmup: u32,
    iters: u32,
    results: Vec<Line>,
    pub(super) machine: Machine,
}

#[derive(Debug, Serialize)]
struct Line {
    size_bytes: u64,
    /// Elements of one byte.
    count: u64,
    time_us: f64,
    #[serde(flatten)]
    rates: Rates,
    /// `null` without `--check`.
    wrong_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Rates {
    Collective {
        algbw_gb_per_s: f64,
        busbw_gb_per_s: f64,
    },
    OneSided {
        /// Of the fastest stretch.
        peak_gb_per_s: f64,
        /// Of one rank.
        avg_gb_per_s: f64,
        /// Messages, in millions a second.
        msg_rate_mpps: f64,
        p50_us: f64,
        p99_us: f64,
    },
}

impl Report {
    pub(super) fn new(args: &TransportArgs, measured: &Measured, machine: Machine) -> Self {
        let ranks = measured.ranks;
        Self {
            op: args.op,
            transport: measured.transport,
            device: measured.device,
            ranks,
            warmup: args.warmup,
            iters: args.iters,
            results: measured.samples.iter().map(|sample| Line::new(args.op, ranks, sample)).collect(),
            machine,
        }
    }

    /// What was measured, in a few words.
    pub(super) fn title(&self) -> String {
        format!(
            "ckpt bench transport: {:?} over {}, {} ranks on {}",
            self.op, self.transport, self.ranks, self.device
        )
    }

    /// No compared byte was wrong.
    pub(super) fn is_correct(&self) -> bool {
        self.results.iter().all(|line| line.wrong_bytes.is_none_or(|wrong| wrong == 0))
    }

    pub(super) fn table(&self) -> Table {
        // perftest's MB/sec are MiB.
        let mib = |gb_per_s: f64| format!("{:.2}", gb_per_s * 1e9 / f64::from(1 << 20));
        let header: &[&str] = match self.op.way() {
            Some(_) => &[
                "#bytes",
                "#iterations",
                "BW peak MiB/s",
                "BW average MiB/s",
                "MsgRate Mpps",
                "p50 us",
                "p99 us",
                "wrong",
            ],
            None => &["size", "count", "time us", "algbw GB/s", "busbw GB/s", "wrong"],
        };
        let mut table = Table::new(header);
        for line in &self.results {
            let mut cells = vec![line.size_bytes.to_string()];
            match line.rates {
                Rates::Collective { algbw_gb_per_s, busbw_gb_per_s } => {
                    cells.extend([line.count.to_string(), format!("{:.1}", line.time_us)]);
                    cells.extend([algbw_gb_per_s, busbw_gb_per_s].map(|rate| format!("{rate:.3}")));
                }
                Rates::OneSided { peak_gb_per_s, avg_gb_per_s, msg_rate_mpps, p50_us, p99_us } => {
                    cells.extend([self.iters.to_string(), mib(peak_gb_per_s), mib(avg_gb_per_s)]);
                    cells.push(format!("{msg_rate_mpps:.6}"));
                    cells.extend([p50_us, p99_us].map(|time| format!("{time:.2}")));
                }
            }
            cells.push(line.wrong_bytes.map_or("-".to_owned(), |wrong| wrong.to_string()));
            table.row(cells);
        }
        table
    }
}

impl Line {
    fn new(op: Op, ranks: u32, sample: &Sample) -> Self {
        let gb_per_s = |seconds: f64| sample.size_bytes as f64 / seconds.max(1e-9) / 1e9;
        let algbw_gb_per_s = gb_per_s(sample.seconds);
        let rates = match op {
            Op::Broadcast => Rates::Collective { algbw_gb_per_s, busbw_gb_per_s: algbw_gb_per_s },
            Op::Allgather => {
                // Each rank has its own part already.
                let carried = f64::from(ranks - 1) / f64::from(ranks);
                Rates::Collective { algbw_gb_per_s, busbw_gb_per_s: algbw_gb_per_s * carried }
            }
            Op::Read | Op::Write => Rates::OneSided {
                peak_gb_per_s: sample.fastest.map_or(0.0, gb_per_s),
                avg_gb_per_s: algbw_gb_per_s,
                msg_rate_mpps: 1e-6 / sample.seconds.max(1e-9),
                p50_us: percentile(&sample.latencies, 50) * 1e6,
                p99_us: percentile(&sample.latencies, 99) * 1e6,
            },
        };
        Self {
            size_bytes: sample.size_bytes,
            count: sample.size_bytes,
            time_us: sample.seconds * 1e6,
            rates,
            wrong_bytes: sample.wrong_bytes,
        }
    }
}

/// The smallest value that so many percent of all are not above (nearest rank).
fn percentile(ascending: &[f64], percent: usize) -> f64 {
    let place = (ascending.len() * percent).div_ceil(100).max(1) - 1;
    ascending.get(place).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bus_rates_are_those_of_nccl_tests() {
        let sample = Sample { size_bytes: 1_000_000_000, seconds: 0.5, ..Sample::default() };
        for (op, expected) in [(Op::Broadcast, 2.0), (Op::Allgather, 1.5)] {
            let Rates::Collective { algbw_gb_per_s, busbw_gb_per_s } = Line::new(op, 4, &sample).rates else {
                panic!("{op:?} is a collective");
            };
            assert!((algbw_gb_per_s - 2.0).abs() < 1e-9 && (busbw_gb_per_s - expected).abs() < 1e-9);
        }
    }

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let all: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!([1, 50, 99, 100].map(|p| percentile(&all, p)), [1.0, 50.0, 99.0, 100.0]);
        assert_eq!([50, 99].map(|p| percentile(&[7.0], p)), [7.0, 7.0]);
        assert_eq!(percentile(&[], 50), 0.0);
    }
}
