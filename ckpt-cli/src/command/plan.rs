//! `ckpt plan`: what an update would do on a cluster, without the cluster.

mod clusters;
mod compare;
mod failure;
mod made;
mod page;
mod published;
mod source;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use ckpt_core::{
    Error, ErrorKind,
    plan::PlanLimits,
    predict::{LinkKind, WorkerCosts},
};
use clap::{Args, ValueEnum};
use serde::Serialize;

use self::{
    compare::{Axis, Variant},
    failure::Failure,
    made::{Made, Task},
    published::PublishedRow,
};
use super::{http_get::TrustArgs, shape::Shape, update::Ranks};
use crate::{
    Context,
    output::{Table, format_bytes},
};

/// Predict an update: buckets, load of every link, memory and time, from a checkpoint and a description of the cluster
#[derive(Args)]
#[command(after_help = "\
The checkpoint is a folder or file (only headers are read), the metas of a running instance, or a model's shape. The cluster
is a TOML file: docs/tuning.md explains it; those that come with ckpt are named by --list-clusters. The time is that of a
healthy, idle cluster with these rates; `bound` is what no order of the same bytes can beat.

Examples:
  ckpt plan --shape qwen3-8b --cluster 1x8-h800
  ckpt plan --checkpoint-path /models/qwen3-8b --cluster my-cluster.toml --html plan.html
  ckpt plan --shape kimi-k2 --cluster 32x8-h20 --method p2p --ranks 0-15
  ckpt plan --metas metas.json --cluster 2x8-h20 --method join --ranks 8-15
  ckpt plan --shape deepseek-v3.1 --cluster 2x8-h20 --compare bucket-mib=64,128,256 --compare window=1,8
  ckpt plan --shape qwen:2048 --cluster laptop --simulate-failure kill:1@50
  ckpt plan --published")]
pub(crate) struct PlanArgs {
    /// A .safetensors file or a folder of them
    #[arg(long, value_name = "PATH", conflicts_with_all = ["metas", "shape"])]
    checkpoint_path: Option<PathBuf>,
    /// Metas: a file, http://HOST:PORT of a `ckpt serve`, or unix:SOCKET
    #[arg(long, value_name = "FILE|URL", conflicts_with = "shape")]
    metas: Option<String>,
    #[command(flatten)]
    trust: TrustArgs,
    /// A model's shape: qwen3-8b, qwen:MIB, tiny:COUNT, kimi-small, kimi-k2, glm-4.5-air, qwen3-235b or deepseek-v3.1
    #[arg(long, value_name = "SHAPE")]
    shape: Option<Shape>,
    /// A cluster file, or the name of one that comes with ckpt
    #[arg(long, value_name = "FILE|NAME")]
    cluster: Option<String>,
    /// Name the clusters that come with ckpt
    #[arg(long)]
    list_clusters: bool,
    /// Ranks that take part, from the first device on; without it all devices
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    world_size: Option<u32>,
    /// How the weights reach the ranks
    #[arg(long, value_enum, default_value_t = Way::Broadcast)]
    method: Way,
    /// Ranks that a P2P update updates, or that join: `4-7` or `0,2,4-7`
    #[arg(long, value_name = "RANKS", required_if_eq("method", "join"))]
    ranks: Option<Ranks>,
    /// What takes the weights
    #[arg(long, value_enum, default_value_t = Worker::Native)]
    worker: Worker,
    /// Aim at buckets of this size
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    bucket_mib: Option<u64>,
    /// The ring holds the largest tensor and this much more
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(0..=1 << 20))]
    slack_mib: Option<u64>,
    /// Owners that send at once
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    window: Option<u32>,
    /// Plan again for each value: bucket-mib, slack-mib, window or method. Several of these make a grid
    #[arg(long, value_name = "WHAT=VALUES")]
    compare: Vec<Axis>,
    /// Let something go wrong in a simulation of the update: kill:RANK, silent:RANK, freeze:RANK, partition:RANK,
    /// link:RANK, worker-fails:RANK, worker-hangs:RANK, engine-fails:RANK or hub; `@P` says after P percent [default: @50]
    #[arg(long, value_name = "WHAT")]
    simulate_failure: Option<Failure>,
    /// Show checkpoint-engine's published times beside predictions and bounds for the same clusters
    #[arg(long)]
    published: bool,
    /// Write a report with the cluster, its flows and the timeline
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the timeline for chrome://tracing or Perfetto
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

/// How the weights reach the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Way {
    /// Every rank sends its share to all
    Broadcast,
    /// Some ranks pull from the others' memory
    P2p,
    /// A new job takes its weights from the job on all other devices
    Join,
}

/// What takes the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Worker {
    /// The native worker
    Native,
    /// checkpoint-engine's own worker
    Ce,
    /// Nothing: the bytes only reach the devices
    None,
}

impl Worker {
    fn costs(self) -> Option<WorkerCosts> {
        match self {
            Self::Native => Some(WorkerCosts::NATIVE),
            Self::Ce => Some(WorkerCosts::CHECKPOINT_ENGINE),
            Self::None => None,
        }
    }
}

/// What `--json` prints: `docs/schemas/plan.json`.
#[derive(Serialize)]
struct Report {
    #[serde(skip_serializing_if = "Option::is_none")]
    plan: Option<made::Summary>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    compare: Vec<Variant>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<failure::Outcome>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    published: Vec<PublishedRow>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    clusters: Vec<clusters::Listed>,
}

pub(crate) async fn run(args: PlanArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let mut report =
        Report { plan: None, compare: vec![], failure: None, published: vec![], clusters: vec![] };
    if args.list_clusters {
        report.clusters = clusters::list()?;
        let mut table = Table::new(&["cluster", "nodes", "devices", "about"]);
        for one in &report.clusters {
            table.row([
                one.name.to_owned(),
                one.nodes.to_string(),
                one.devices.to_string(),
                one.about.clone(),
            ]);
        }
        context.output.table(&table);
    } else if args.published {
        report.published = tokio::task::spawn_blocking(published::rows).await??;
        context.output.line(published::LABEL);
        context.output.table(&published::table(&report.published));
    } else {
        predict(&args, context, &mut report).await?;
    }
    context.output.object(&report)?;
    Ok(ExitCode::SUCCESS)
}

fn wrong(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::ConfigInvalid, "plan an update", message)
}

async fn predict(args: &PlanArgs, context: &Context, report: &mut Report) -> anyhow::Result<()> {
    let name = args
        .cluster
        .as_deref()
        .ok_or_else(|| wrong("--cluster is missing; write a file or a name that --list-clusters shows"))?;
    let cluster = clusters::load(name)?;
    let source =
        source::load(args.checkpoint_path.clone(), args.metas.as_deref(), &args.trust, args.shape).await?;
    let mut limits = PlanLimits::from_env(&|name: &str| std::env::var(name).ok()).map_err(Error::from)?;
    if let Some(mib) = args.bucket_mib {
        limits.target_bucket_bytes = mib << 20;
    }
    if let Some(mib) = args.slack_mib {
        limits.ring_slack_bytes = mib << 20;
    }
    limits.window = args.window.or(limits.window);
    let task = Task {
        cluster,
        world_size: args.world_size,
        way: args.method,
        ranks: args.ranks.clone().unwrap_or_default().0,
        worker: args.worker,
        limits,
    };
    let (axes, failure) = (args.compare.clone(), args.simulate_failure);
    let (made, variants, outcome) = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
        let made = Made::new(&source, &task)?;
        let variants = compare::grid(&source, &task, &axes)?;
        let outcome = failure.map(|failure| failure::simulate(failure, &source, &made)).transpose()?;
        Ok((made, variants, outcome))
    })
    .await
    .context("the planning thread died")??;
    print(&made, context);
    if !variants.is_empty() {
        context.output.line("");
        context.output.table(&compare::table(&variants));
    }
    if let Some(outcome) = &outcome {
        context.output.line("");
        context.output.table(&outcome.table());
    }
    if let Some(file) = &args.html {
        page::page(&made, &variants, outcome.as_ref()).write(file)?;
    }
    if let Some(file) = &args.trace {
        page::write_trace(&made, file)?;
    }
    (report.plan, report.compare, report.failure) = (Some(made.summary), variants, outcome);
    Ok(())
}

fn print(made: &Made, context: &Context) {
    let mut table = Table::new(&["what", "value"]);
    table.pairs(made.rows());
    context.output.table(&table);
    context.output.line("");
    context.output.table(&links_table(made));
}

/// The links by kind: how many, and how loaded they are.
fn links_table(made: &Made) -> Table {
    let mut table =
        Table::new(&["links", "used", "most each", "least each", "rate each", "busy of the transfer"]);
    for links in &made.summary.links {
        let kind = match links.kind {
            LinkKind::H2d => "host to device",
            LinkKind::DeviceIn => "into a device",
            LinkKind::NicOut => "out of a NIC",
            LinkKind::NicIn => "into a NIC",
        };
        table.row([
            kind.to_owned(),
            links.count.to_string(),
            format_bytes(links.most_bytes),
            format_bytes(links.least_bytes),
            format!("{} GB/s", (links.gb_per_s * 1000.0).round() / 1000.0),
            format!("{:.0}%", links.busy_share * 100.0),
        ]);
    }
    table
}
