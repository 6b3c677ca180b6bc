//! checkpoint-engine's published times beside our predictions.

use ckpt_core::plan::PlanLimits;
use serde::Serialize;

use super::{
    Way, Worker, clusters,
    made::{Made, Task},
    source::Source,
};
use crate::{command::shape::Shape, output::Table, picture::seconds};

pub(super) const LABEL: &str = "checkpoint-engine: as its README publishes it, measured there. ckpt: predicted from data-sheet rates \
with checkpoint-engine's own worker, NOT measured. bound: what no order of the same bytes can beat at these rates.";

/// A row of the published table: model, shape, cluster, broadcast and P2P seconds.
const PUBLISHED: [(&str, &str, &str, f64, f64); 6] = [
    ("GLM-4.5-Air bf16", "glm-4.5-air", "1x8-h800", 3.47, 4.12),
    ("Qwen3-235B-A22B bf16", "qwen3-235b", "1x8-h800", 6.22, 7.10),
    ("DeepSeek-V3.1 fp8", "deepseek-v3.1", "2x8-h20", 10.19, 11.80),
    ("Kimi-K2 fp8", "kimi-k2", "2x8-h20", 14.36, 17.49),
    ("DeepSeek-V3.1 fp8", "deepseek-v3.1", "32x8-h20", 11.33, 11.81),
    ("Kimi-K2 fp8", "kimi-k2", "32x8-h20", 16.04, 16.75),
];
/// P2P updates of the table go to at most so many ranks.
const P2P_RANKS: u32 = 16;

/// One row of the answer, seconds.
#[derive(Clone, Debug, Serialize)]
pub(super) struct PublishedRow {
    model: &'static str,
    cluster: &'static str,
    published_broadcast_s: f64,
    predicted_broadcast_s: f64,
    bound_broadcast_s: f64,
    published_p2p_s: f64,
    predicted_p2p_s: f64,
    bound_p2p_s: f64,
}

pub(super) fn rows() -> anyhow::Result<Vec<PublishedRow>> {
    let row = |(model, shape, cluster, broadcast, p2p): (&'static str, &str, &'static str, f64, f64)| {
        let shape: Shape = shape.parse().map_err(anyhow::Error::msg)?;
        let source = Source::Tensors { name: shape.to_string(), tensors: shape.tensors() };
        let mut task = Task {
            cluster: clusters::load(cluster)?,
            world_size: None,
            way: Way::Broadcast,
            ranks: Vec::new(),
            worker: Worker::Ce,
            limits: PlanLimits::default(),
        };
        let all = Made::new(&source, &task)?.prediction;
        task.ranks = (0..P2P_RANKS.min(task.cluster.devices())).collect();
        task.way = Way::P2p;
        let some = Made::new(&source, &task)?.prediction;
        Ok(PublishedRow {
            model,
            cluster,
            published_broadcast_s: broadcast,
            predicted_broadcast_s: all.total_s,
            bound_broadcast_s: all.bound.seconds,
            published_p2p_s: p2p,
            predicted_p2p_s: some.total_s,
            bound_p2p_s: some.bound.seconds,
        })
    };
    PUBLISHED.into_iter().map(row).collect()
}

pub(super) fn table(rows: &[PublishedRow]) -> Table {
    let mut table = Table::new(&[
        "model",
        "cluster",
        "broadcast: published",
        "predicted",
        "bound",
        "P2P: published",
        "predicted",
        "bound",
    ]);
    for row in rows {
        let times = [
            row.published_broadcast_s,
            row.predicted_broadcast_s,
            row.bound_broadcast_s,
            row.published_p2p_s,
            row.predicted_p2p_s,
            row.bound_p2p_s,
        ];
        table.row([row.model, row.cluster].map(str::to_owned).into_iter().chain(times.map(seconds)));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_names_a_known_model_and_cluster() {
        for (_, shape, cluster, broadcast, p2p) in PUBLISHED {
            shape.parse::<Shape>().unwrap();
            assert!(clusters::load(cluster).unwrap().devices() >= 8);
            assert!(broadcast < p2p);
        }
    }
}
