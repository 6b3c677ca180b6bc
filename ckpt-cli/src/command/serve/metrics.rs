//! `GET /metrics`: the text format that Prometheus reads.

use std::fmt::{Display, Write};

use ckpt_core::checkpoint::PoolCounters;

use super::view::{Doing, State};

pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What is looked at now, beside what the view has counted.
pub(super) struct Gauges {
    pub(super) rank: u32,
    pub(super) pool: PoolCounters,
    pub(super) device_free_bytes: Option<u64>,
    pub(super) lease_is_valid: bool,
    /// On rank 0.
    pub(super) ranks_connected: Option<usize>,
}

pub(super) fn text(state: &State, gauges: &Gauges) -> String {
    let totals = &state.totals;
    let mut page = Page { text: String::new(), rank: gauges.rank };
    page.family("ckpt_updates_total", "counter", "Updates that ended on this rank, by result.");
    page.sample("ckpt_updates_total", &[("result", "committed")], totals.committed);
    page.sample("ckpt_updates_total", &[("result", "failed")], totals.failed.values().sum::<u64>());
    page.family("ckpt_update_failures_total", "counter", "Failed updates by the kind of the first cause.");
    for (kind, count) in &totals.failed {
        page.sample("ckpt_update_failures_total", &[("kind", kind)], count);
    }
    page.family("ckpt_update_stage_seconds_total", "counter", "Time of committed updates by stage.");
    let stages = &totals.stages;
    for (stage, seconds) in [
        ("join", stages.join_s),
        ("prepare", stages.prepare_s),
        ("transfer", stages.transfer_s),
        ("commit", stages.commit_s),
        ("release", stages.release_s),
        ("post_hook", stages.post_hook_s),
        ("total", stages.total_s),
    ] {
        page.sample("ckpt_update_stage_seconds_total", &[("stage", stage)], seconds);
    }
    let one = |page: &mut Page, name: &str, kind: &str, help: &str, value: &dyn Display| {
        page.family(name, kind, help);
        page.sample(name, &[], value);
    };
    let bytes = "Bytes of the tensors of committed updates.";
    one(&mut page, "ckpt_update_tensor_bytes_total", "counter", bytes, &totals.tensor_bytes);
    let rooted = "Bytes that this rank brought into committed updates, from its memory or by P2P.";
    one(&mut page, "ckpt_update_rooted_bytes_total", "counter", rooted, &totals.rooted_bytes);
    let buckets = "Buckets of committed updates.";
    one(&mut page, "ckpt_update_buckets_total", "counter", buckets, &totals.buckets);
    let updating = u8::from(matches!(state.doing, Doing::Updating { .. }));
    one(&mut page, "ckpt_updating", "gauge", "1 while an update runs.", &updating);

    page.family("ckpt_version_installed", "gauge", "The version that the workers have.");
    if let Some(installed) = &state.installed {
        let labels = [("checkpoint", installed.checkpoint.as_str())];
        page.sample("ckpt_version_installed", &labels, installed.version.0);
    }
    page.family("ckpt_version_metas", "gauge", "The version that the next update installs.");
    if let Some(metas) = &state.metas {
        page.sample("ckpt_version_metas", &[], metas.version.0);
    }
    page.family("ckpt_checkpoint_bytes", "gauge", "Tensor bytes that this rank holds, by checkpoint.");
    for (name, held) in &state.checkpoints {
        if let Some(held) = held {
            page.sample("ckpt_checkpoint_bytes", &[("checkpoint", name)], held.tensor_bytes);
        }
    }

    let pool = &gauges.pool;
    one(&mut page, "ckpt_pool_held_bytes", "gauge", "Pinned host memory of the pool.", &pool.held_bytes);
    let allocations = "Blocks that the pool took from the system.";
    one(&mut page, "ckpt_pool_allocations_total", "counter", allocations, &pool.allocations);
    one(&mut page, "ckpt_pool_pins_total", "counter", "Times that the pool pinned memory.", &pool.pins);
    let ring = "Device memory of the last update's ring.";
    one(&mut page, "ckpt_device_ring_bytes", "gauge", ring, &totals.ring_bytes);
    if let Some(free) = &gauges.device_free_bytes {
        one(&mut page, "ckpt_device_free_bytes", "gauge", "Free memory of the device.", free);
    }
    let lease = "1 while the hub answers this rank's heartbeats.";
    one(&mut page, "ckpt_session_lease_valid", "gauge", lease, &u8::from(gauges.lease_is_valid));
    if let Some(connected) = &gauges.ranks_connected {
        one(&mut page, "ckpt_hub_ranks_connected", "gauge", "Ranks that have a session.", connected);
    }
    page.text
}

struct Page {
    text: String,
    rank: u32,
}

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let mut all = format!("rank=\"{}\"", self.rank);
        for (label, value) in labels {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            all += &format!(",{label}=\"{value}\"");
        }
        self.line(format_args!("{name}{{{all}}} {value}"));
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_belongs_to_the_family_before_it_and_labels_are_escaped() {
        let mut state = State::default();
        state.totals.committed = 2;
        state.totals.failed.insert("timeout".into(), 3);
        state.totals.stages.transfer_s = 1.5;
        state.installed = Some(super::super::view::Installed {
            checkpoint: "a \"b\" \\ c".into(),
            version: ckpt_core::Version(7),
        });
        let gauges = Gauges {
            rank: 3,
            pool: PoolCounters::default(),
            device_free_bytes: Some(1 << 30),
            lease_is_valid: true,
            ranks_connected: None,
        };
        let text = text(&state, &gauges);
        let mut family = "";
        for line in text.lines() {
            match line.strip_prefix("# ") {
                Some(about) => family = about.split(' ').nth(1).unwrap(),
                None => {
                    let (name, rest) = line.split_once('{').unwrap();
                    assert_eq!(name, family, "{line}");
                    let value = rest.rsplit_once("} ").unwrap().1;
                    value.parse::<f64>().unwrap_or_else(|_| panic!("{line}"));
                }
            }
        }
        for line in [
            r#"ckpt_updates_total{rank="3",result="committed"} 2"#,
            r#"ckpt_updates_total{rank="3",result="failed"} 3"#,
            r#"ckpt_update_failures_total{rank="3",kind="timeout"} 3"#,
            r#"ckpt_update_stage_seconds_total{rank="3",stage="transfer"} 1.5"#,
            r#"ckpt_version_installed{rank="3",checkpoint="a \"b\" \\ c"} 7"#,
            r#"ckpt_device_free_bytes{rank="3"} 1073741824"#,
        ] {
            assert!(text.lines().any(|one| one == line), "{line} is missing in\n{text}");
        }
    }
}
