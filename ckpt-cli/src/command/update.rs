//! `ckpt update`: one rank of an update of running engines.

use std::{path::PathBuf, process::ExitCode, sync::Arc, time::Instant};

use ckpt_core::{
    Error, ErrorKind, Version,
    checkpoint::{CheckpointSource, LoadOptions, Pool, load},
    engine::{ENGINES, EngineConfig, HttpTemplate, create},
    server::{Stages, UpdateReport, UpdateRequest},
    sink::{CheckpointEngineSink, Layout, NativeSink, NativeSinkConfig, WeightSink, WireVersion},
    update::EngineCall,
};
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::{
    Context,
    job::{JobArgs, Rank},
    output::{Table, format_bytes},
    progress::LoadBar,
};

/// Load a checkpoint and put it into running engines: run one process per inference worker
#[derive(Args)]
#[command(after_help = "\
Run it once per inference worker, under torchrun, srun, mpirun or `ckpt launch`; every rank reads its share of the files.

Examples:
  ckpt launch --nproc-per-node 8 -- ckpt update --checkpoint-path /models/qwen3-8b --endpoint http://localhost:8000
  torchrun --nproc-per-node 8 --no-python ckpt update --checkpoint-path /models/qwen3-8b --inference-parallel-size 4
  ckpt update --checkpoint-path model.safetensors --engine http --endpoint http://localhost:8000/reload \\
      --http-template '{\"endpoints\": \"{{endpoints}}\"}'
  ckpt launch --nproc-per-node 2 -- ckpt update --checkpoint-path DIR --uds /run/engine-{rank}.sock --worker-protocol native \\
      --inference-parallel-size 1")]
pub(crate) struct UpdateArgs {
    /// A .safetensors file or a folder of them
    #[arg(long, value_name = "PATH")]
    checkpoint_path: PathBuf,
    /// Where the engine listens; `{rank}` stands for the rank
    #[arg(long, default_value = "http://localhost:19730", value_name = "URL")]
    endpoint: String,
    /// Reach the engine through this UNIX socket instead of the endpoint's host; `{rank}` stands for the rank
    #[arg(long, value_name = "PATH")]
    uds: Option<String>,
    /// Ranks of one engine; the first rank of each such group sends the engine's request
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    inference_parallel_size: u32,
    /// Name under which the checkpoint is registered
    #[arg(long, default_value = "my-checkpoint-iter-0", value_name = "NAME")]
    checkpoint_name: String,
    /// How the weights reach the ranks
    #[arg(long, value_enum, default_value_t = Method::Broadcast)]
    update_method: Method,
    /// What is told that an update begins
    #[arg(long, default_value = "vllm", value_parser = clap::builder::PossibleValuesParser::new(ENGINES))]
    engine: String,
    /// JSON body for `--engine http`
    #[arg(long, value_name = "JSON")]
    http_template: Option<String>,
    /// What the workers speak: checkpoint-engine 0.4 and newer, older ones, or ours
    #[arg(long, value_enum, default_value_t = WorkerProtocol::Ce04)]
    worker_protocol: WorkerProtocol,
    /// Number of the version that is installed
    #[arg(long, default_value_t = 1, value_name = "N")]
    weight_version: u64,
    /// Do the same update this many times, with rising versions
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..), value_name = "N")]
    repeat: u64,
    #[command(flatten)]
    job: JobArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Method {
    Broadcast,
}

/// The language of the worker link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WorkerProtocol {
    /// checkpoint-engine 0.4.0 and newer
    #[value(name = "ce-0.4")]
    Ce04,
    /// checkpoint-engine before 0.4.0
    #[value(name = "ce-0.3")]
    Ce03,
    /// ours: docs/worker-protocol.md
    #[value(name = "native")]
    Native,
}

#[derive(Serialize)]
struct Summary {
    checkpoint: String,
    ranks: u32,
    transport: &'static str,
    device: &'static str,
    load_s: f64,
    gather_metas_s: f64,
    /// Of the slowest rank, for each update.
    update_s: Vec<f64>,
    bucket_bytes: u64,
    ring_bytes: u64,
    tensor_bytes: u64,
    tensors: u64,
    buckets: u64,
    gib_per_s: f64,
    /// Of the last update, on rank 0.
    stages: Stages,
}

pub(crate) async fn run(args: UpdateArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let mut rank = Rank::start(&args.job, &context.registry).await?;
    let result = update(&args, context, &mut rank).await;
    rank.end(result.is_ok()).await;
    result.map(|()| ExitCode::SUCCESS)
}

async fn update(args: &UpdateArgs, context: &Context, rank: &mut Rank) -> anyhow::Result<()> {
    let Method::Broadcast = args.update_method;
    let started = Instant::now();
    let registered = {
        let (path, name) = (args.checkpoint_path.clone(), args.checkpoint_name.clone());
        let (number, world_size) = (rank.rank(), rank.world_size());
        let device = rank.server.device().clone();
        tokio::task::spawn_blocking(move || {
            let source = CheckpointSource::open(&path)?;
            let range = source.split(world_size)?.swap_remove(number as usize);
            let bytes = source.tensors()[range.clone()].iter().map(|t| t.meta.len_bytes()).sum();
            let mut options = LoadOptions::new(name);
            options.progress = LoadBar::start(&format!("rank {number}: load"), bytes);
            load(&source, range, &Pool::new(device), &options)
        })
        .await??
    };
    let load_s = started.elapsed().as_secs_f64();
    rank.server.register(&args.checkpoint_name, registered)?;
    let started = Instant::now();
    let manifest = rank.server.gather_metas(&args.checkpoint_name).await?;
    let tensors: Vec<_> = manifest.tensors().map(|(_, t)| t.meta.clone()).collect();
    let layout = Arc::new(Layout::new(tensors)?);
    let gather_metas_s = started.elapsed().as_secs_f64();

    let mut update_s = Vec::new();
    let mut last: Option<UpdateReport> = None;
    for i in 0..args.repeat {
        let request = UpdateRequest {
            checkpoint: args.checkpoint_name.clone(),
            version: Version(args.weight_version + i),
            ranks: Vec::new(),
            sink: Some(sink(args, &layout, rank)?),
            engine: engine(args, rank)?,
        };
        let report = rank.server.update(request).await?;
        update_s.push(rank.slowest("update", report.stages.total_s).await?);
        last = Some(report);
    }
    let report =
        last.ok_or_else(|| Error::new(ErrorKind::Internal, "update weights", "no update was made"))?;
    if rank.rank() != 0 {
        return Ok(());
    }
    let best = update_s.iter().copied().fold(f64::INFINITY, f64::min);
    let gib_per_s = report.tensor_bytes as f64 / best / (1_u64 << 30) as f64;
    let summary = Summary {
        checkpoint: args.checkpoint_name.clone(),
        ranks: rank.world_size(),
        transport: rank.transport,
        device: rank.server.device().kind(),
        load_s,
        gather_metas_s,
        update_s,
        bucket_bytes: report.bucket_bytes,
        ring_bytes: report.ring_bytes,
        tensor_bytes: report.tensor_bytes,
        tensors: report.tensors,
        buckets: report.buckets,
        gib_per_s,
        stages: report.stages,
    };
    print(&summary, context);
    context.output.object(&summary)
}

fn print(summary: &Summary, context: &Context) {
    let mut table = Table::new(&["what", "value"]);
    let rows = [
        (
            "checkpoint",
            format!(
                "{} ({}, {} tensors)",
                summary.checkpoint,
                format_bytes(summary.tensor_bytes),
                summary.tensors
            ),
        ),
        ("ranks", format!("{} over {} on {}", summary.ranks, summary.transport, summary.device)),
        ("load", format!("{:.3} s", summary.load_s)),
        ("gather metas", format!("{:.3} s", summary.gather_metas_s)),
        ("update", summary.update_s.iter().map(|s| format!("{s:.3} s")).collect::<Vec<_>>().join(", ")),
        (
            "transfer",
            format!(
                "{:.3} s in {} buckets of up to {}",
                summary.stages.transfer_s,
                summary.buckets,
                format_bytes(summary.bucket_bytes)
            ),
        ),
        ("ring", format_bytes(summary.ring_bytes)),
        ("rate", format!("{:.2} GiB/s", summary.gib_per_s)),
    ];
    for (what, value) in rows {
        table.row([what.to_owned(), value]);
    }
    context.output.table(&table);
}

/// The link to this rank's worker.
fn sink(args: &UpdateArgs, layout: &Arc<Layout>, rank: &Rank) -> anyhow::Result<Box<dyn WeightSink>> {
    let uuid = &rank.server.device().info().uuid;
    Ok(match args.worker_protocol {
        WorkerProtocol::Native => {
            let config = NativeSinkConfig { layout: Some(layout.clone()), ..NativeSinkConfig::default() };
            Box::new(NativeSink::bind(&rank.runtime_dir, uuid, config)?)
        }
        WorkerProtocol::Ce04 => {
            Box::new(CheckpointEngineSink::bind(&rank.runtime_dir, uuid, WireVersion::Ce04)?)
        }
        WorkerProtocol::Ce03 => {
            Box::new(CheckpointEngineSink::bind(&rank.runtime_dir, uuid, WireVersion::Ce03)?)
        }
    })
}

/// The engine's request, on the first rank of each engine.
fn engine(args: &UpdateArgs, rank: &Rank) -> anyhow::Result<Option<EngineCall>> {
    if !rank.rank().is_multiple_of(args.inference_parallel_size) {
        return Ok(None);
    }
    let here = |text: &str| text.replace("{rank}", &rank.rank().to_string());
    let engine = create(EngineConfig {
        kind: args.engine.clone(),
        endpoint: here(&args.endpoint),
        uds: args.uds.as_deref().map(|path| PathBuf::from(here(path))),
        template: args.http_template.as_deref().map(HttpTemplate::parse).transpose()?,
    })?;
    let last = rank.world_size().min(rank.rank().saturating_add(args.inference_parallel_size));
    Ok(Some(EngineCall { engine, ranks: (rank.rank()..last).collect() }))
}
