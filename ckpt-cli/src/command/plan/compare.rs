//! The same update with other settings.

use std::str::FromStr;

use serde::Serialize;

use super::{
    Way,
    made::{Made, Task},
    source::Source,
    wrong,
};
use crate::{
    output::{Table, format_bytes},
    picture::seconds,
};

/// Values of one setting: `bucket-mib=64,128`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Axis(Vec<Setting>);

/// One setting.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Setting {
    BucketMib(u64),
    SlackMib(u64),
    Window(u32),
    Method(Way),
}

impl FromStr for Axis {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let help =
            || format!("`{text}`: write bucket-mib=64,128 or slack-mib=, window=, method=broadcast,p2p");
        let (name, values) = text.split_once('=').ok_or_else(help)?;
        let number = |value: &str| value.parse::<u64>().ok().filter(|n| (1..=1 << 20).contains(n));
        let setting = |value: &str| match name {
            "bucket-mib" => number(value).map(Setting::BucketMib),
            "slack-mib" => number(value).map(Setting::SlackMib),
            "window" => number(value).map(|n| Setting::Window(n as u32)),
            "method" => <Way as clap::ValueEnum>::from_str(value, true).ok().map(Setting::Method),
            _ => None,
        };
        let settings = values.split(',').map(|value| setting(value.trim()).ok_or_else(help));
        settings.collect::<Result<_, _>>().map(Self)
    }
}

/// One row of the comparison.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Variant {
    method: Way,
    bucket_bytes: u64,
    slack_bytes: u64,
    window: u32,
    buckets: usize,
    ring_bytes: u64,
    transfer_s: f64,
    total_s: f64,
    /// Of the bound of this method.
    of_bound: f64,
}

/// More would be a slip of the finger.
const MAX_VARIANTS: usize = 256;

/// Every combination of the axes' values.
pub(super) fn grid(source: &Source, task: &Task, axes: &[Axis]) -> anyhow::Result<Vec<Variant>> {
    if axes.is_empty() {
        return Ok(Vec::new());
    }
    let mut tasks = vec![task.clone()];
    for Axis(settings) in axes {
        if tasks.len() * settings.len() > MAX_VARIANTS {
            return Err(wrong(format!(
                "--compare asks for more than {MAX_VARIANTS} plans; name fewer values"
            ))
            .into());
        }
        let with =
            |task: &Task| -> Vec<Task> { settings.iter().map(|setting| setting.apply(task)).collect() };
        tasks = tasks.iter().flat_map(with).collect();
    }
    let variant = |task: &Task| {
        let made = Made::new(source, task)?;
        let p = &made.prediction;
        Ok(Variant {
            method: task.way,
            bucket_bytes: task.limits.target_bucket_bytes,
            slack_bytes: task.limits.ring_slack_bytes,
            window: made.plan.window,
            buckets: made.plan.buckets.len(),
            ring_bytes: made.plan.ring_bytes,
            transfer_s: p.transfer_s,
            total_s: p.total_s,
            of_bound: p.transfer_s / p.bound.seconds.max(1e-12),
        })
    };
    tasks.iter().map(variant).collect()
}

impl Setting {
    fn apply(self, task: &Task) -> Task {
        let mut task = task.clone();
        match self {
            Self::BucketMib(mib) => task.limits.target_bucket_bytes = mib << 20,
            Self::SlackMib(mib) => task.limits.ring_slack_bytes = mib << 20,
            Self::Window(window) => task.limits.window = Some(window),
            Self::Method(way) => task.way = way,
        }
        task
    }
}

pub(super) fn table(variants: &[Variant]) -> Table {
    let mut table = Table::new(&[
        "method",
        "bucket",
        "slack",
        "window",
        "buckets",
        "ring",
        "transfer",
        "x bound",
        "predicted",
        "",
    ]);
    let best = variants.iter().map(|v| v.total_s).fold(f64::INFINITY, f64::min);
    for v in variants {
        table.row([
            format!("{:?}", v.method).to_lowercase(),
            format_bytes(v.bucket_bytes),
            format_bytes(v.slack_bytes),
            v.window.to_string(),
            v.buckets.to_string(),
            format_bytes(v.ring_bytes),
            seconds(v.transfer_s),
            format!("{:.3}", v.of_bound),
            seconds(v.total_s),
            if v.total_s <= best { "best".to_owned() } else { String::new() },
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_are_read_and_mistakes_are_told() {
        let axis: Axis = "bucket-mib=64, 128".parse().unwrap();
        assert_eq!(axis, Axis(vec![Setting::BucketMib(64), Setting::BucketMib(128)]));
        assert_eq!("method=p2p".parse::<Axis>().unwrap(), Axis(vec![Setting::Method(Way::P2p)]));
        for bad in ["", "bucket-mib", "bucket-mib=", "bucket-mib=0", "slots=3", "method=carrier-pigeon"] {
            assert!(bad.parse::<Axis>().unwrap_err().contains("bucket-mib=64"), "{bad}");
        }
    }
}
