//! `ckpt bench load`, `metas` and `plan`: what happens before bytes move, beside what the machine could do.

use std::{
    collections::BTreeMap,
    fs::File,
    hint::black_box,
    os::unix::fs::FileExt,
    path::PathBuf,
    process::ExitCode,
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use anyhow::Context as _;
use ckpt_core::{
    Error, ErrorKind, Rank,
    checkpoint::{CheckpointSource, InPlace, LoadOptions, Pool, load, save_checkpoint},
    device::{DeviceConfig, runtime_dir},
    manifest::Manifest,
    metas::{Metas, Placement},
    plan::{Method, PlanInput, PlanLimits, bucket_message, plan},
    predict::spread,
};
use clap::Args;
use serde::Serialize;

use super::{files::FileArgs, update::SEED};
use crate::{
    Context,
    command::shape::Shape,
    machine::Machine,
    output::{Table, format_bytes},
};

/// Chunks of the plain read.
const CHUNK_BYTES: usize = 4 << 20;
/// Of the files that are made.
const SHARD_BYTES: u64 = 256 << 20;

/// Measure files into pinned memory, beside a plain read of the same files
#[derive(Args)]
#[command(after_help = "\
The plain read is what any program could do: all cores read the files into memory that is there already. `first` allocates
and pins, `again` reuses the pool. Digests are made on the way unless --no-digests. Files stay in the page cache, so this is
memory speed; with --drop-cache they are read from the disk.

Examples:
  ckpt bench load --shape qwen:512
  ckpt bench load --checkpoint-path /models/qwen3-8b --drop-cache --json")]
pub(super) struct LoadArgs {
    /// A .safetensors file or a folder of them
    #[arg(long, value_name = "PATH", conflicts_with = "shape")]
    checkpoint_path: Option<PathBuf>,
    /// Without files: a shape, written to a temporary folder first
    #[arg(long, default_value = "qwen:512", value_name = "SHAPE")]
    shape: Shape,
    /// Load this many times
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000), value_name = "N")]
    iterations: u32,
    /// Where the memory is pinned for
    #[arg(long, default_value = "auto", value_name = "KIND")]
    device: String,
    /// Make no digests
    #[arg(long)]
    no_digests: bool,
    /// Ask the system to forget the files before each read
    #[arg(long)]
    drop_cache: bool,
    #[command(flatten)]
    files: FileArgs,
}

/// Measure how metas are written and read
#[derive(Args)]
#[command(after_help = "\
Examples:
  ckpt bench metas --shape kimi-k2 --ranks 16
  ckpt bench metas --shape qwen3-8b --ranks 8 --json")]
pub(super) struct MetasArgs {
    /// A model's shape, as `ckpt plan --shape` takes it
    #[arg(long, default_value = "kimi-k2", value_name = "SHAPE")]
    shape: Shape,
    /// Ranks that hold it
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65_536), value_name = "N")]
    ranks: u32,
    /// Measure this many times
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000), value_name = "N")]
    iterations: u32,
    #[command(flatten)]
    files: FileArgs,
}

/// Measure the planner
#[derive(Args)]
#[command(after_help = "\
Examples:
  ckpt bench plan --shape kimi-k2 --ranks 256
  ckpt bench plan --shape tiny:100000 --ranks 1024 --receivers 64 --json")]
pub(super) struct PlanArgs {
    #[command(flatten)]
    metas: MetasArgs,
    /// Ranks that pull in the P2P plan
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65_536), value_name = "N")]
    receivers: u32,
}

/// What `--json` prints: `docs/schemas/bench-parts.json`.
#[derive(Debug, Serialize)]
struct Report {
    what: &'static str,
    shape: String,
    ranks: u32,
    tensors: usize,
    tensor_bytes: u64,
    iterations: u32,
    results: Vec<Line>,
    machine: Machine,
}

#[derive(Debug, Serialize)]
struct Line {
    name: &'static str,
    best_s: f64,
    mean_s: f64,
    /// What was written or read, if that means something.
    bytes: Option<u64>,
    gb_per_s: Option<f64>,
    /// Of the machine's own limit, measured in the same run.
    of_limit_percent: Option<f64>,
}

impl Line {
    fn new(name: &'static str, times: &[f64], bytes: Option<u64>) -> Self {
        let best_s = times.iter().copied().fold(f64::INFINITY, f64::min);
        Self {
            name,
            best_s,
            mean_s: times.iter().sum::<f64>() / times.len().max(1) as f64,
            bytes,
            gb_per_s: bytes.map(|bytes| bytes as f64 / best_s.max(1e-12) / 1e9),
            of_limit_percent: None,
        }
    }
}

impl Report {
    fn table(&self) -> Table {
        let mut table = Table::new(&["what", "best s", "mean s", "bytes", "GB/s", "% of limit"]);
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        for line in &self.results {
            table.row([
                line.name.to_owned(),
                format!("{:.6}", line.best_s),
                format!("{:.6}", line.mean_s),
                or_dash(line.bytes.map(|bytes| bytes.to_string())),
                or_dash(line.gb_per_s.map(|rate| format!("{rate:.3}"))),
                or_dash(line.of_limit_percent.map(|percent| format!("{percent:.1}"))),
            ]);
        }
        table
    }

    fn emit(&self, files: &FileArgs, context: &Context) -> anyhow::Result<ExitCode> {
        context.output.line(self.machine.line());
        context.output.line(format!(
            "{}: {} tensors, {}, {} ranks",
            self.shape,
            self.tensors,
            format_bytes(self.tensor_bytes),
            self.ranks
        ));
        let table = self.table();
        context.output.table(&table);
        files.write(&format!("ckpt bench {}: {}", self.what, self.shape), &self.machine, &table, |_| {})?;
        context.output.object(self)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Seconds of each of `times` runs.
fn time<T>(times: u32, mut run: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<Vec<f64>> {
    let one = |_| {
        let started = Instant::now();
        black_box(run()?);
        Ok(started.elapsed().as_secs_f64())
    };
    (0..times).map(one).collect()
}

pub(super) async fn run_load(args: LoadArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let config = DeviceConfig { rank: 0, local_rank: 0, runtime_dir: runtime_dir()? };
    let device = context.registry.open_device(&args.device, &config)?;
    let machine = tokio::task::block_in_place(|| Machine::look(&context.registry));
    let (report, args) = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
        let folder = tempfile::Builder::new().prefix("ckpt-bench-").tempdir().context("make a folder")?;
        let (name, path) = match &args.checkpoint_path {
            Some(path) => (path.display().to_string(), path.clone()),
            None => {
                let made = CheckpointSource::generated(args.shape.tensors(), SEED);
                save_checkpoint(&made, folder.path(), SHARD_BYTES)?;
                (args.shape.to_string(), folder.path().to_owned())
            }
        };
        let source = CheckpointSource::open(path)?;
        let paths: Vec<PathBuf> = source.paths().map(Into::into).collect();
        let before = || match args.drop_cache {
            true => forget(&paths),
            false => Ok(()),
        };
        let all = source.tensors().len();
        let mut options = LoadOptions { in_place: InPlace::Never, ..LoadOptions::new("bench") };
        if args.no_digests {
            options.digests = None;
        }
        let mut memory: Vec<Vec<u8>> = vec![vec![1; CHUNK_BYTES]; machine.cores];
        let mut plain = Vec::new();
        let mut first = Vec::new();
        let mut again = Vec::new();
        for _ in 0..args.iterations {
            before()?;
            plain.extend(time(1, || plain_read(&paths, &mut memory))?);
            before()?;
            first.extend(time(1, || Ok(load(&source, 0..all, &Pool::new(device.clone()), &options)?))?);
        }
        drop(memory);
        let pool = Pool::new(device);
        load(&source, 0..all, &pool, &options)?;
        for _ in 0..args.iterations {
            before()?;
            again.extend(time(1, || Ok(load(&source, 0..all, &pool, &options)?))?);
        }
        let bytes = source.len_bytes();
        let mut results = vec![
            Line::new("plain read (limit)", &plain, Some(bytes)),
            Line::new("load, first", &first, Some(bytes)),
            Line::new("load, again", &again, Some(bytes)),
        ];
        let limit = results[0].best_s;
        results
            .iter_mut()
            .for_each(|line| line.of_limit_percent = Some(limit / line.best_s.max(1e-12) * 100.0));
        let report = Report {
            what: "load",
            shape: name,
            ranks: 1,
            tensors: all,
            tensor_bytes: bytes,
            iterations: args.iterations,
            results,
            machine,
        };
        Ok((report, args))
    })
    .await??;
    report.emit(&args.files, context)
}

/// All cores read chunks of the files into memory that is there already.
fn plain_read(paths: &[PathBuf], memory: &mut [Vec<u8>]) -> anyhow::Result<()> {
    let files = paths.iter().map(File::open).collect::<Result<Vec<_>, _>>().context("open the files")?;
    let mut chunks = Vec::new();
    for (index, file) in files.iter().enumerate() {
        let len = file.metadata()?.len();
        let each = (0..len).step_by(CHUNK_BYTES);
        chunks.extend(each.map(|at| (index, at, (len - at).min(CHUNK_BYTES as u64) as usize)));
    }
    let next = AtomicUsize::new(0);
    let (next, chunks, files) = (&next, &chunks, &files);
    std::thread::scope(|scope| {
        let readers: Vec<_> = memory
            .iter_mut()
            .map(|buffer| {
                scope.spawn(move || {
                    while let Some((file, at, len)) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                        files[*file].read_exact_at(&mut buffer[..*len], *at)?;
                    }
                    black_box(&buffer);
                    Ok::<(), std::io::Error>(())
                })
            })
            .collect();
        readers.into_iter().try_for_each(|reader| match reader.join() {
            Ok(read) => read.context("read the files"),
            Err(_) => Err(anyhow::anyhow!("a reading thread died")),
        })
    })
}

/// Asks the system to drop the files from its cache. Pages that are not on the disk yet stay, so they are written first.
fn forget(paths: &[PathBuf]) -> anyhow::Result<()> {
    for path in paths {
        let file = File::open(path).context("open the files")?;
        file.sync_all().context("write the files out")?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).context("drop the files' cache")?;
    }
    Ok(())
}

/// The checkpoint as a running instance would describe it.
fn metas(manifest: &Manifest) -> anyhow::Result<Metas> {
    let placement = |(rank, share): (&Rank, &std::sync::Arc<ckpt_core::manifest::Share>)| {
        let placement = Placement {
            p2p_store_addr: Some("10.0.0.1:15428".to_owned()),
            rdma_device: "mlx5_0".to_owned(),
            arena_addresses: vec![1 << 40; share.arenas.len()],
            extension: None,
        };
        (*rank, placement)
    };
    let placements: BTreeMap<Rank, Placement> = manifest.shares.iter().map(placement).collect();
    Ok(Metas::new(manifest, placements)?)
}

fn report(
    what: &'static str,
    args: &MetasArgs,
    manifest: &Manifest,
    results: Vec<Line>,
    machine: Machine,
) -> Report {
    Report {
        what,
        shape: args.shape.to_string(),
        ranks: args.ranks,
        tensors: manifest.tensors().count(),
        tensor_bytes: manifest.tensor_bytes(),
        iterations: args.iterations,
        results,
        machine,
    }
}

pub(super) async fn run_metas(args: MetasArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let machine = tokio::task::block_in_place(|| Machine::look(&context.registry));
    let (report, args) = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
        let manifest = spread(args.shape.tensors(), args.ranks)?;
        let metas = metas(&manifest)?;
        let (compact, json) = (metas.encode()?, metas.to_json()?);
        let small = Some(compact.len() as u64);
        let large = Some(json.len() as u64);
        let n = args.iterations;
        let results = vec![
            Line::new("encode", &time(n, || Ok(metas.encode()?))?, small),
            Line::new("decode", &time(n, || Ok(Metas::decode(&compact)?))?, small),
            Line::new("to JSON", &time(n, || Ok(metas.to_json()?))?, large),
            Line::new("from JSON", &time(n, || Ok(Metas::from_json(json.as_bytes())?))?, large),
        ];
        Ok((report("metas", &args, &manifest, results, machine), args))
    })
    .await??;
    report.emit(&args.files, context)
}

pub(super) async fn run_plan(args: PlanArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let machine = tokio::task::block_in_place(|| Machine::look(&context.registry));
    let (report, args) = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
        let metas = &args.metas;
        if args.receivers > metas.ranks {
            let message = format!("--receivers {} of {} ranks", args.receivers, metas.ranks);
            return Err(Error::new(ErrorKind::ConfigInvalid, "measure the planner", message).into());
        }
        let manifest = spread(metas.shape.tensors(), metas.ranks)?;
        let members: Vec<Rank> = (0..metas.ranks).collect();
        let make = |method: Method| {
            let limits = PlanLimits::default();
            let (manifest, members) = (&manifest, &members[..]);
            let input = PlanInput { manifest, members, free_bytes: 64 << 30, limits, method };
            plan(&input).map_err(|error| Error::from(error).into())
        };
        let n = metas.iterations;
        let receivers: Vec<Rank> = (0..args.receivers).collect();
        let made = make(Method::Broadcast)?;
        let messages = || {
            let each = (0..made.buckets.len() as u32).map(|bucket| bucket_message(&made, bucket, &manifest));
            Ok(each.map(|message| message.map(|m| m.tensors.len())).sum::<ckpt_core::Result<usize>>()?)
        };
        let results = vec![
            Line::new("plan, broadcast", &time(n, || make(Method::Broadcast))?, None),
            Line::new("plan, P2P", &time(n, || make(Method::P2p { receivers: receivers.clone() }))?, None),
            Line::new("all bucket messages", &time(n, messages)?, None),
        ];
        Ok((report("plan", metas, &manifest, results, machine), args))
    })
    .await??;
    report.emit(&args.metas.files, context)
}
