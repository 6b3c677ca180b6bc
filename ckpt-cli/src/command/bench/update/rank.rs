//! One rank of the benchmark.

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use ckpt_core::{
    Error, ErrorKind, Version,
    checkpoint::{CheckpointSource, DigestAlgorithm, LoadOptions, Pool, RegisteredCheckpoint, load},
    cluster::ClusterEnv,
    device::{
        BufferSlice, DeviceBackend, DeviceConfig, runtime_dir,
        usage::{AroundUpdate, MemoryWatch},
    },
    engine::{EngineConfig, create},
    server::{UpdateReport, UpdateRequest},
    sink::{CheckpointEngineSink, Layout, NativeSink, NativeSinkConfig, WeightSink, WireVersion},
    update::EngineCall,
};
use clap::Args;

use super::{
    WorkerKind,
    drawing::draw,
    report::{Measured, Memory, RankReport, Report, Times, slowest, write_trace},
};
use crate::{
    Context,
    command::{bench::files::FileArgs, shape::Shape},
    job::{JobArgs, Rank},
    machine::Machine,
    policy::Verify,
};

/// Seed of the bytes: the same on every machine.
pub(crate) const SEED: u64 = 2026;
const WEIGHTS: &str = "weights";
const EMPTY: &str = "empty";
/// Of the plain copies that are the limit.
const LIMIT_CHUNK: u64 = 64 << 20;
const LIMIT_ROUNDS: usize = 3;

/// Run one rank; `ckpt bench update` starts it
#[derive(Args)]
pub(crate) struct RankArgs {
    /// See `ckpt bench update`
    #[arg(long)]
    shape: Shape,
    /// See `ckpt bench update`
    #[arg(long, value_enum)]
    worker: WorkerKind,
    /// See `ckpt bench update`
    #[arg(long)]
    iterations: usize,
    /// Updates with an empty checkpoint
    #[arg(long)]
    floor_iterations: usize,
    /// The workers' sockets, `{local_rank}` stands for the rank's number on its host
    #[arg(long)]
    uds: String,
    /// See `ckpt bench update`
    #[arg(long, value_enum)]
    verify: Verify,
    /// See `ckpt bench update`
    #[arg(long)]
    trace: Option<PathBuf>,
    #[command(flatten)]
    files: FileArgs,
    #[command(flatten)]
    job: JobArgs,
}

pub(crate) async fn run_rank(args: RankArgs, context: &Context) -> anyhow::Result<ExitCode> {
    if let Some(report) = measure_rank(&args, context).await? {
        context.output.object(&report)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The answer is on rank 0.
pub(super) async fn measure_rank(args: &RankArgs, context: &Context) -> anyhow::Result<Option<Report>> {
    let unopened = free_memory(args, context);
    let mut rank = Rank::start(&args.job, &context.registry).await?;
    let opened = unopened.zip(free_memory(args, context));
    let result = measure(args, context, &mut rank, opened).await;
    rank.end(result.is_ok()).await;
    result
}

/// Free memory of this rank's device as others see it, whether this process has opened it or not.
fn free_memory(args: &RankArgs, context: &Context) -> Option<u64> {
    let ClusterEnv { rank, local_rank, .. } = ClusterEnv::from_process().ok()?;
    let config = DeviceConfig { rank, local_rank, runtime_dir: runtime_dir().ok()? };
    let provider = context.registry.devices().find(|provider| provider.kind() == args.job.device)?;
    provider.free_memory_bytes(&config)
}

async fn measure(
    args: &RankArgs,
    context: &Context,
    rank: &mut Rank,
    opened: Option<(u64, u64)>,
) -> anyhow::Result<Option<Report>> {
    let mut mine = RankReport::default();
    mine.free.opened = opened;
    let device = rank.server.device().clone();
    let (number, world_size) = (rank.rank(), rank.world_size());
    let digests = args.verify.digests();
    let load_share = |name: &'static str, tensors| {
        let device = device.clone();
        tokio::task::spawn_blocking(move || -> ckpt_core::Result<RegisteredCheckpoint> {
            let source = CheckpointSource::generated(tensors, SEED);
            let range = source.split(world_size)?.swap_remove(number as usize);
            let options = LoadOptions { digests, ..LoadOptions::new(name) };
            load(&source, range, &Pool::new(device), &options)
        })
    };
    let started = Instant::now();
    let registered = load_share(WEIGHTS, args.shape.tensors()).await??;
    mine.load_s = started.elapsed().as_secs_f64();
    rank.server.register(WEIGHTS, registered)?;
    rank.server.register(EMPTY, load_share(EMPTY, Vec::new()).await??)?;
    let started = Instant::now();
    let manifest = rank.server.gather_metas(WEIGHTS).await?;
    mine.gather_metas_s = started.elapsed().as_secs_f64();
    rank.server.gather_metas(EMPTY).await?;
    let tensors: Vec<_> = manifest.tensors().map(|(_, tensor)| tensor.meta.clone()).collect();
    let layout = Arc::new(Layout::new(tensors)?);

    let share = rank.server.checkpoint(WEIGHTS).cloned().ok_or_else(|| lost("the share"))?;
    for _ in 0..LIMIT_ROUNDS {
        rank.collect("limit", Bytes::new()).await?;
        let (seconds, bytes) = plain_copy(&*device, &share).await?;
        mine.h2d_bytes = bytes;
        mine.h2d_s = if mine.h2d_s == 0.0 { seconds } else { mine.h2d_s.min(seconds) };
    }

    let mut last: Option<UpdateReport> = None;
    for i in 0..args.iterations {
        let (measured, report, free) = update(args, rank, WEIGHTS, Some(&layout), i as u64 + 1).await?;
        mine.updates.push(measured);
        mine.free.updates.extend(free);
        last = Some(report);
    }
    for i in 0..args.floor_iterations {
        let version = (args.iterations + i) as u64 + 1;
        mine.floor.push(update(args, rank, EMPTY, None, version).await?.0);
    }

    let text = serde_json::to_vec(&mine)?;
    let parts = rank.collect("report", Bytes::from(text)).await?;
    if rank.rank() != 0 {
        return Ok(None);
    }
    let ranks = parts.iter().map(|part| serde_json::from_slice(part)).collect::<Result<Vec<_>, _>>()?;
    if let Some(file) = &args.trace {
        write_trace(file, &ranks)?;
    }
    let last = last.ok_or_else(|| lost("the last update"))?;
    let most = |of: fn(&RankReport) -> f64| ranks.iter().map(of).fold(0.0, f64::max);
    let limit_s = most(|rank| rank.h2d_s);
    let beside = |times: Vec<Times>| times.into_iter().map(|times| times.beside(limit_s)).collect();
    let report = Report {
        shape: args.shape.to_string(),
        device: rank.server.device().kind().to_owned(),
        transport: rank.transport.to_owned(),
        worker: args.worker.name().to_owned(),
        ranks: rank.world_size(),
        tensors: last.tensors,
        tensor_bytes: last.tensor_bytes,
        buckets: last.buckets,
        bucket_bytes: last.bucket_bytes,
        ring_bytes: last.ring_bytes,
        memory: (rank.server.device().kind() != "host")
            .then(|| Memory::of(&ranks, last.ring_bytes, args.job.keeps_ring())),
        load_s: most(|rank| rank.load_s),
        gather_metas_s: most(|rank| rank.gather_metas_s),
        h2d_limit_s: limit_s,
        h2d_gib_per_s: ranks
            .iter()
            .map(|rank| rank.h2d_bytes as f64 / rank.h2d_s.max(1e-9) / (1_u64 << 30) as f64)
            .collect(),
        updates: beside(slowest(&ranks, |rank| &rank.updates)),
        floor: slowest(&ranks, |rank| &rank.floor),
        machine: tokio::task::block_in_place(|| Machine::look(&context.registry)),
    };
    let title = format!("ckpt bench update: {} on {} x {}", report.shape, report.ranks, report.device);
    args.files.write(&title, &report.machine, &report.table(), |page| draw(page, &report, &ranks))?;
    Ok(Some(report))
}

/// Copies this rank's share to the device, in chunks into one buffer; seconds and bytes.
async fn plain_copy(device: &dyn DeviceBackend, share: &RegisteredCheckpoint) -> anyhow::Result<(f64, u64)> {
    let stream = device.stream("limit")?;
    let ring = device.allocate_ring(LIMIT_CHUNK)?;
    let started = Instant::now();
    let mut copied = 0;
    for (buffer, arena) in share.arenas.iter().zip(&share.share.arenas) {
        let mut at = 0;
        while at < arena.len_bytes {
            let len = LIMIT_CHUNK.min(arena.len_bytes - at);
            stream.copy(
                BufferSlice::new(buffer.clone(), at..at + len)?,
                BufferSlice::new(ring.buffer(), 0..len)?,
            )?;
            at += len;
        }
        copied += arena.len_bytes;
    }
    stream.record()?.done(Instant::now() + Duration::from_secs(120)).await?;
    Ok((started.elapsed().as_secs_f64(), copied))
}

async fn update(
    args: &RankArgs,
    rank: &mut Rank,
    checkpoint: &str,
    layout: Option<&Arc<Layout>>,
    version: u64,
) -> anyhow::Result<(Measured, UpdateReport, Option<AroundUpdate>)> {
    let uuid = &rank.server.device().info().uuid;
    let mut sink: Option<Box<dyn WeightSink>> = match args.worker {
        WorkerKind::None => None,
        WorkerKind::Native => {
            let metas = rank.server.metas_of(checkpoint).filter(|_| args.verify.checks_workers());
            let digests = metas.map(|m| Arc::new(m.digests(DigestAlgorithm::Xxh3_64)));
            let config = NativeSinkConfig { layout: layout.cloned(), digests, ..NativeSinkConfig::default() };
            Some(Box::new(NativeSink::bind(&rank.runtime_dir, uuid, config)?))
        }
        WorkerKind::Ce => {
            Some(Box::new(CheckpointEngineSink::bind(&rank.runtime_dir, uuid, WireVersion::Ce04)?))
        }
    };
    let engine = match args.worker {
        WorkerKind::None => None,
        WorkerKind::Native | WorkerKind::Ce => {
            let path = args.uds.replace("{local_rank}", &rank.job.cluster.local_rank.to_string());
            let engine = create(EngineConfig {
                kind: "vllm".to_owned(),
                endpoint: "http://localhost".to_owned(),
                uds: Some(PathBuf::from(path)),
                ca: None,
                template: None,
            })?;
            Some(EngineCall { engine, ranks: vec![rank.rank()] })
        }
    };
    // So that joining is not what is measured.
    rank.collect("start", Bytes::new()).await?;
    let device = rank.server.device().clone();
    // Free memory of the host is everybody's.
    let watch = match device.kind() {
        "host" => None,
        _ => Some(MemoryWatch::before(device)?),
    };
    if let Some(watch) = &watch {
        sink = sink.map(|sink| watch.over(sink));
    }
    let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let request = UpdateRequest {
        checkpoint: checkpoint.to_owned(),
        version: Version(version),
        ranks: Vec::new(),
        sink,
        engine,
    };
    let report = rank.server.update(request).await?;
    let free = watch.map(MemoryWatch::after).transpose()?;
    Ok((Measured::of(&report, began.as_micros() as u64), report, free))
}

fn lost(what: &str) -> Error {
    Error::new(ErrorKind::Internal, "run the benchmark", format!("{what} is gone"))
}
