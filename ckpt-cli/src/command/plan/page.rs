//! The plan as a picture: the cluster and its flows, the timeline, bandwidth, bucket times.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use ckpt_core::predict::{LinkKind, Span, Step};
use serde_json::json;

use super::{
    compare::{self, Variant},
    failure::Outcome,
    links_table,
    made::Made,
};
use crate::{
    chrome::ChromeTrace,
    output::Table,
    picture::{Bar, Kind, Lane, Page, Rate, bandwidth, histogram, lanes, topology},
};

/// Lanes that are drawn.
const LANES: usize = 16;

fn kind(step: Step) -> Kind {
    match step {
        Step::Load => Kind::Load,
        Step::Pull => Kind::Pull,
        Step::Exchange => Kind::Exchange,
        Step::Reload => Kind::Reload,
    }
}

pub(super) fn page(made: &Made, variants: &[Variant], failure: Option<&Outcome>) -> Page {
    let mut page = Page::new(&format!("ckpt plan: {} on {}", made.summary.checkpoint, made.summary.cluster));
    page.text("A prediction by simulation, not a measurement.");
    let mut table = Table::new(&["what", "value"]);
    table.pairs(made.rows());
    page.table(&table);
    page.heading("The cluster and its flows");
    page.drawing(&flows(made));
    page.table(&links_table(made));
    page.heading("Timeline");
    page.text("Exchange and reload happen on all ranks alike and are drawn on their first. Time counts from the first byte.");
    page.drawing(&lanes(&timeline(made), &[]));
    page.heading("Bandwidth over time");
    let rate = |step: Step, name: &str| Rate {
        name: name.to_owned(),
        kind: kind(step),
        moved: made
            .prediction
            .spans
            .iter()
            .filter(|span| span.step == step)
            .map(|span| (span.start_s, span.end_s, span.bytes as f64))
            .collect(),
    };
    let rates = [
        rate(Step::Pull, "pulled by all"),
        rate(Step::Load, "H2D of all ranks"),
        rate(Step::Exchange, "into one rank"),
    ];
    let rates: Vec<Rate> = rates.into_iter().filter(|rate| !rate.moved.is_empty()).collect();
    page.drawing(&bandwidth(&rates));
    page.heading("Buckets");
    page.drawing(&histogram("first byte of a bucket until its ack", &bucket_times(&made.prediction.spans)));
    if !variants.is_empty() {
        page.heading("Compared");
        page.table(&compare::table(variants));
    }
    if let Some(outcome) = failure {
        page.heading("With a failure");
        page.table(&outcome.table());
    }
    page
}

fn timeline(made: &Made) -> Vec<Lane> {
    let mut by_slot: BTreeMap<u32, Vec<Bar>> = BTreeMap::new();
    for span in &made.prediction.spans {
        let name = format!("bucket {}", span.bucket);
        let bar = Bar { kind: kind(span.step), start: span.start_s, end: span.end_s, name };
        by_slot.entry(span.slot).or_default().push(bar);
    }
    let lane = |(slot, bars)| Lane { name: format!("device {slot}"), bars };
    by_slot.into_iter().take(LANES).map(lane).collect()
}

fn bucket_times(spans: &[Span]) -> Vec<f64> {
    let mut times: BTreeMap<u32, (f64, f64)> = BTreeMap::new();
    for span in spans {
        let time = times.entry(span.bucket).or_insert((f64::INFINITY, 0.0));
        *time = (time.0.min(span.start_s), time.1.max(span.end_s));
    }
    times.into_values().map(|(start, end)| end - start).collect()
}

/// The first nodes with what crosses their links.
fn flows(made: &Made) -> String {
    let mut nodes: BTreeMap<u32, topology::Node> = BTreeMap::new();
    let transfer = made.prediction.transfer_s.max(1e-12);
    for number in 0..made.task.world_size.unwrap_or_else(|| made.task.cluster.devices()) {
        let Some(slot) = made.task.cluster.slot(number) else { break };
        let node = nodes.entry(slot.node).or_default();
        node.devices.push(topology::Device { number, ..topology::Device::default() });
    }
    for link in &made.prediction.links {
        let Some(node) = nodes.get_mut(&link.node) else { continue };
        let flow = topology::Flow { bytes: link.bytes, busy: link.busy_s / transfer };
        match link.kind {
            LinkKind::H2d => {
                if let Some(device) = node.devices.get_mut(link.index as usize) {
                    device.h2d = flow;
                }
            }
            LinkKind::DeviceIn => {
                if let Some(device) = node.devices.get_mut(link.index as usize) {
                    device.into = flow;
                }
            }
            LinkKind::NicOut => node.out.push(flow),
            LinkKind::NicIn => node.into.push(flow),
        }
    }
    topology::draw(&nodes.into_values().collect::<Vec<_>>())
}

/// Writes the timeline as a Chrome trace: a process per device, a thread per step.
pub(super) fn write_trace(made: &Made, file: &Path) -> anyhow::Result<()> {
    let mut trace = ChromeTrace::default();
    let slots: BTreeSet<u32> = made.prediction.spans.iter().map(|span| span.slot).collect();
    for slot in slots {
        trace.process(slot, &format!("device {slot}"));
        for step in [Step::Load, Step::Pull, Step::Exchange, Step::Reload] {
            trace.thread((slot, step as u32), kind(step).label());
        }
    }
    for span in &made.prediction.spans {
        let step = kind(span.step).label();
        let name = format!("{step} {}", span.bucket);
        let at = (span.start_s * 1e6, (span.end_s - span.start_s) * 1e6);
        let bytes = json!({ "bytes": span.bytes });
        trace.span((span.slot, span.step as u32), &name, step, at, Some(bytes));
    }
    trace.write(file)
}
