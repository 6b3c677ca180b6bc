//! `ckpt bench update`: whole updates with processes like in production, part by part.

mod drawing;
mod rank;
mod report;

use std::{
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use ckpt_core::{Error, ErrorKind, Key, cluster::ClusterEnv};
use clap::{Args, Parser as _, ValueEnum};
use tokio::process::{Child, Command};

pub(super) use self::rank::SEED;
pub(crate) use self::rank::{RankArgs, run_rank};
use self::report::Report;
use super::{files::FileArgs, is_launched};
use crate::{Context, command::shape::Shape, policy::Verify};

const OPERATION: &str = "run the benchmark";
/// For the workers to end after their standard input was closed.
const GRACE: Duration = Duration::from_secs(10);
/// Between two looks for a worker's port file.
const LOOK: Duration = Duration::from_millis(20);

/// Measure whole updates: parameter servers and workers as processes, made-up weights, each part's time
#[derive(Args)]
#[command(after_help = "\
Without a launcher it starts its own ranks on this machine. Under torchrun, srun, mpirun or `ckpt launch` each process is a
rank and starts its worker. Each rank holds its share in pinned memory. Times are those of the slowest rank. `transfer` is
the first byte enqueued until the last bucket acked; `of limit` compares it with the machine's own limit: a plain copy of the
shares to the devices, measured in the same processes. The rows `empty` are updates with no tensors: the floor that the worker and the messages cost.

Examples:
  ckpt bench update --device host --shape qwen:256 --ranks 2
  ckpt bench update --device cuda --shape qwen3-8b --ranks 2 --iterations 4 --trace trace.json --html report.html
  torchrun --nproc-per-node 8 --no-python ckpt bench update --device cuda --shape qwen3-8b
  ckpt bench update --device cuda --shape qwen3-8b --worker ce --ce-worker 'python3 scripts/gpu/ce_engine.py'")]
pub(crate) struct BenchUpdateArgs {
    /// qwen3-8b, qwen:MIB, tiny:COUNT, kimi-small or another model that `ckpt plan` knows
    #[arg(long, default_value = "qwen:512", value_name = "SHAPE")]
    shape: Shape,
    /// Parameter servers, and workers
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64), value_name = "N")]
    ranks: u32,
    /// What takes the weights
    #[arg(long, value_enum, default_value_t = WorkerKind::Native)]
    worker: WorkerKind,
    /// For `--worker ce`: the engine's command; it gets --uds, --port-file, --local-rank and --shapes
    #[arg(long, value_name = "COMMAND", required_if_eq("worker", "ce"))]
    ce_worker: Option<String>,
    /// Updates
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=10_000), value_name = "N")]
    iterations: u32,
    /// Updates with an empty checkpoint, afterwards
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(0..=10_000), value_name = "N")]
    floor_iterations: u32,
    /// Where the weights go
    #[arg(long, default_value = "host", value_name = "KIND")]
    device: String,
    /// How bytes reach other ranks
    #[arg(long, default_value = "auto", value_name = "NAME")]
    transport: String,
    /// Keep the device buffer between updates
    #[arg(long)]
    keep_ring: bool,
    /// Aim at buckets of this size
    #[arg(long, value_name = "MIB")]
    bucket_mib: Option<u64>,
    /// Which bytes are compared with digests: nothing, pulls (digests are made when the weights are loaded), or also what
    /// native workers are handed
    #[arg(long, value_enum, default_value_t = Verify::None, value_name = "WHICH")]
    verify: Verify,
    /// Seconds between two heartbeats of a rank: what they cost is seen with many
    #[arg(long, hide = true, value_name = "SECONDS")]
    heartbeat: Option<f64>,
    /// Write every stage of every bucket to FILE, for chrome://tracing or Perfetto
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Time for everything
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400), value_name = "SECONDS")]
    timeout: u64,
    #[command(flatten)]
    files: FileArgs,
}

/// What takes the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WorkerKind {
    /// `ckpt worker`
    Native,
    /// Nothing: the bytes only reach the devices
    None,
    /// An engine with checkpoint-engine's own worker
    Ce,
}

impl WorkerKind {
    fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::None => "none",
            Self::Ce => "ce",
        }
    }
}

pub(crate) async fn run(args: BenchUpdateArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let scratch =
        tempfile::Builder::new().prefix("ckpt-bench-").tempdir().context("make a folder for the run")?;
    let limit = Duration::from_secs(args.timeout);
    let deadline = Instant::now() + limit;
    let measured = async {
        match is_launched() {
            true => measure_one(&args, scratch.path(), deadline, context).await,
            false => measure(&args, scratch.path(), deadline).await.map(Some),
        }
    };
    let report = tokio::time::timeout(limit, measured).await.map_err(|_| {
        let message = format!("not over after {} s; allow more with --timeout", args.timeout);
        Error::new(ErrorKind::Timeout, OPERATION, message)
    })??;
    // Rank 0 tells.
    if let Some(report) = report {
        context.output.line(report.machine.line());
        report.print(&context.output);
        context.output.object(&report)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// This process is one rank of many, beside its worker.
async fn measure_one(
    args: &BenchUpdateArgs,
    scratch: &Path,
    deadline: Instant,
    context: &Context,
) -> anyhow::Result<Option<Report>> {
    let line = rank_line(args, scratch);
    let rank = RankLine::try_parse_from(std::iter::once("rank".to_owned()).chain(line))
        .map_err(|error| Error::new(ErrorKind::Internal, OPERATION, error.to_string()))?
        .args;
    let cluster = ClusterEnv::from_process()?;
    let local = cluster.local_rank;
    let mut worker = match args.worker {
        WorkerKind::None => None,
        WorkerKind::Native | WorkerKind::Ce => {
            let shapes = write_shapes(args, scratch)?;
            let mut worker = start_worker(args, scratch, &shapes, cluster.rank, local)?;
            ready(&mut worker, scratch, local, deadline).await?;
            Some(worker)
        }
    };
    let measured = rank::measure_rank(&rank, context).await;
    if let Some(worker) = &mut worker {
        end(worker).await;
    }
    measured.map_err(|error| match last_lines(&log_of(scratch, local)) {
        said if said.is_empty() => error,
        said => error.context(format!("the worker said: {said}")),
    })
}

/// The arguments of a rank, parsed without a process.
#[derive(clap::Parser)]
struct RankLine {
    #[command(flatten)]
    args: RankArgs,
}

async fn measure(args: &BenchUpdateArgs, scratch: &Path, deadline: Instant) -> anyhow::Result<Report> {
    let mut workers = Vec::new();
    if args.worker != WorkerKind::None {
        let shapes = write_shapes(args, scratch)?;
        for rank in 0..args.ranks {
            workers.push(start_worker(args, scratch, &shapes, rank, rank)?);
        }
        for (rank, worker) in (0..args.ranks).zip(&mut workers) {
            ready(worker, scratch, rank, deadline).await?;
        }
    }
    let report = run_ranks(args, scratch).await;
    for worker in &mut workers {
        end(worker).await;
    }
    report.map_err(|error| {
        let logs = (0..args.ranks).map(|rank| last_lines(&log_of(scratch, rank)));
        let said: Vec<String> = logs.filter(|text| !text.is_empty()).collect();
        if said.is_empty() { error } else { error.context(format!("the workers said: {}", said.join("; "))) }
    })
}

/// What `--worker ce` has to know.
fn write_shapes(args: &BenchUpdateArgs, scratch: &Path) -> anyhow::Result<PathBuf> {
    let file = scratch.join("shapes.json");
    if args.worker == WorkerKind::Ce {
        let each = args.shape.tensors().into_iter();
        let each = each.map(|t| (t.name.to_string(), t.dtype.safetensors_name(), t.shape.to_vec()));
        std::fs::write(&file, serde_json::to_vec(&each.collect::<Vec<_>>())?)?;
    }
    Ok(file)
}

/// Its standard input is our pipe: closing it is the request; it is killed when dropped if it does not end.
async fn end(worker: &mut Child) {
    drop(worker.stdin.take());
    let _ = tokio::time::timeout(GRACE, worker.wait()).await;
}

fn log_of(scratch: &Path, rank: u32) -> PathBuf {
    scratch.join(format!("worker-{rank}.log"))
}

fn port_file(scratch: &Path, rank: u32) -> PathBuf {
    scratch.join(format!("worker-{rank}.address"))
}

/// Its errors go to `log`; it is ended when this process forgets it.
fn prepare(mut command: Command, log: &Path) -> anyhow::Result<Command> {
    let log = std::fs::File::create(log).context("make a log file")?;
    command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    Ok(command)
}

fn start_worker(
    args: &BenchUpdateArgs,
    scratch: &Path,
    shapes: &Path,
    rank: u32,
    local_rank: u32,
) -> anyhow::Result<Child> {
    let mut command = match (args.worker, &args.ce_worker) {
        (WorkerKind::Ce, Some(words)) => {
            let mut command = Command::new("sh");
            command.args(["-c", &format!("exec {words} \"$@\""), "worker"]).arg("--shapes").arg(shapes);
            command
        }
        _ => {
            let mut command = Command::new(std::env::current_exe().context("find this program")?);
            command.args(["worker", "--device", &args.device, "--rank", &rank.to_string()]);
            command
        }
    };
    command.arg("--uds").arg(scratch.join(format!("worker-{local_rank}.sock")));
    command.arg("--port-file").arg(port_file(scratch, local_rank));
    command.args(["--local-rank", &local_rank.to_string(), "--exit-with-parent"]);
    let mut command = prepare(command, &log_of(scratch, local_rank))?;
    // The pipe is never written; it closes when this process dies.
    command.stdin(Stdio::piped());
    command.spawn().with_context(|| format!("start worker {rank}"))
}

/// Waits until the worker has announced itself.
async fn ready(worker: &mut Child, scratch: &Path, rank: u32, deadline: Instant) -> anyhow::Result<()> {
    while !port_file(scratch, rank).exists() {
        if let Some(status) = worker.try_wait()? {
            let said = last_lines(&log_of(scratch, rank));
            anyhow::bail!("worker {rank} ended before it was ready, {status}: {said}");
        }
        if Instant::now() >= deadline {
            let message = "the worker does not become ready; look at its command";
            return Err(Error::new(ErrorKind::Timeout, OPERATION, message).with(Key::Worker, rank).into());
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

async fn run_ranks(args: &BenchUpdateArgs, scratch: &Path) -> anyhow::Result<Report> {
    let program = std::env::current_exe().context("find this program")?;
    let log = scratch.join("ranks.log");
    let mut command = prepare(Command::new(&program), &log)?;
    command.args(["launch", "--nproc-per-node", &args.ranks.to_string(), "--"]).arg(&program);
    command.args(["bench", "update-rank", "--json"]).args(rank_line(args, scratch));
    let output = command.stdout(Stdio::piped()).output().await.context("run the ranks")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().rev().find(|line| line.starts_with('{'));
    match (output.status.success(), last) {
        (true, Some(line)) => serde_json::from_str(line).context("read the ranks' result"),
        // The first rank that fails says why on stdout.
        (_, said) => {
            let said = said.map_or_else(|| last_lines(&log), str::to_owned);
            anyhow::bail!("the ranks ended with {}: {said}", output.status)
        }
    }
}

/// What a rank is told.
fn rank_line(args: &BenchUpdateArgs, scratch: &Path) -> Vec<String> {
    let sockets = scratch.join("worker-{local_rank}.sock").display().to_string();
    let mut line: Vec<String> = Vec::new();
    let mut tell = |name: &str, value: String| line.extend([format!("--{name}"), value]);
    tell("worker", args.worker.name().to_owned());
    tell("shape", args.shape.to_string());
    tell("iterations", args.iterations.to_string());
    tell("floor-iterations", args.floor_iterations.to_string());
    tell("device", args.device.clone());
    tell("transport", args.transport.clone());
    tell("verify", args.verify.name().to_owned());
    tell("timeout", args.timeout.to_string());
    tell("uds", sockets);
    let optional = [
        ("bucket-mib", args.bucket_mib.map(|mib| mib.to_string())),
        ("heartbeat", args.heartbeat.map(|seconds| seconds.to_string())),
        ("trace", args.trace.as_ref().map(|file| file.display().to_string())),
        ("csv", args.files.csv.as_ref().map(|file| file.display().to_string())),
        ("html", args.files.html.as_ref().map(|file| file.display().to_string())),
    ];
    optional.into_iter().for_each(|(name, value)| value.into_iter().for_each(|value| tell(name, value)));
    if args.keep_ring {
        line.push("--keep-ring".to_owned());
    }
    line
}

/// What went wrong, as the process said it: its error lines, or else its last ones.
fn last_lines(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let wrong = |line: &&str| ["error: ", "ERROR", "WARN", "Error"].iter().any(|word| line.contains(word));
    let errors: Vec<&str> = lines.iter().copied().filter(wrong).collect();
    let chosen = if errors.is_empty() { &lines } else { &errors };
    chosen[chosen.len().saturating_sub(6)..].join(" | ")
}
