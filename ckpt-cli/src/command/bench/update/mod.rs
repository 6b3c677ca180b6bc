//! `ckpt bench update`: whole updates with processes like in production, part by part.

mod rank;
mod report;
mod shape;

use std::{
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use ckpt_core::{Error, ErrorKind, Key};
use clap::{Args, ValueEnum};
use tokio::process::{Child, Command};

pub(crate) use self::rank::{RankArgs, run_rank};
use self::{report::Report, shape::Shape};
use crate::{Context, policy::Verify};

const OPERATION: &str = "run the benchmark";
/// For the workers to end after their standard input was closed.
const GRACE: Duration = Duration::from_secs(10);
/// Between two looks for a worker's port file.
const LOOK: Duration = Duration::from_millis(20);

/// Measure whole updates: parameter servers and workers as processes, made-up weights, each part's time
#[derive(Args)]
#[command(after_help = "\
Each rank holds its share in pinned memory. Times are those of the slowest rank. `transfer` is the first byte enqueued
until the last bucket acked; `x limit` compares it with a plain copy of the shares to the devices, measured in the same
processes. The rows `empty` are updates with no tensors: the floor that the worker and the messages cost.

Examples:
  ckpt bench update --device host --shape qwen:256 --ranks 2
  ckpt bench update --device cuda --shape qwen3-8b --ranks 2 --iterations 4 --trace trace.json
  ckpt bench update --device cuda --shape qwen3-8b --worker ce --ce-worker 'python3 scripts/gpu/ce_engine.py'")]
pub(crate) struct BenchUpdateArgs {
    /// qwen3-8b, qwen:MIB, tiny:COUNT or kimi-small
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
    /// Aim at buckets of this size
    #[arg(long, value_name = "MIB")]
    bucket_mib: Option<u64>,
    /// Which bytes are compared with digests: nothing, pulls (digests are made when the weights are loaded), or also what
    /// native workers are handed
    #[arg(long, value_enum, default_value_t = Verify::None, value_name = "WHICH")]
    verify: Verify,
    /// Write every stage of every bucket to FILE, for chrome://tracing or Perfetto
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Time for everything
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400), value_name = "SECONDS")]
    timeout: u64,
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
    let report = tokio::time::timeout(limit, measure(&args, scratch.path(), Instant::now() + limit))
        .await
        .map_err(|_| {
        let message = format!("not over after {} s; allow more with --timeout", args.timeout);
        Error::new(ErrorKind::Timeout, OPERATION, message)
    })??;
    report.print(&context.output);
    context.output.object(&report)?;
    Ok(ExitCode::SUCCESS)
}

async fn measure(args: &BenchUpdateArgs, scratch: &Path, deadline: Instant) -> anyhow::Result<Report> {
    let mut workers = Vec::new();
    if args.worker != WorkerKind::None {
        let shapes = scratch.join("shapes.json");
        if args.worker == WorkerKind::Ce {
            let each = args.shape.tensors().into_iter();
            let each = each.map(|t| (t.name.to_string(), t.dtype.safetensors_name(), t.shape.to_vec()));
            std::fs::write(&shapes, serde_json::to_vec(&each.collect::<Vec<_>>())?)?;
        }
        for rank in 0..args.ranks {
            workers.push(start_worker(args, scratch, &shapes, rank)?);
        }
        for (rank, worker) in (0..args.ranks).zip(&mut workers) {
            ready(worker, scratch, rank, deadline).await?;
        }
    }
    let report = run_ranks(args, scratch).await;
    for worker in &mut workers {
        // Its standard input is our pipe: closing it is the request; it is killed when dropped if it does not end.
        drop(worker.stdin.take());
        let _ = tokio::time::timeout(GRACE, worker.wait()).await;
    }
    report.map_err(|error| {
        let logs = (0..args.ranks).map(|rank| last_lines(&log_of(scratch, rank)));
        let said: Vec<String> = logs.filter(|text| !text.is_empty()).collect();
        if said.is_empty() { error } else { error.context(format!("the workers said: {}", said.join("; "))) }
    })
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

fn start_worker(args: &BenchUpdateArgs, scratch: &Path, shapes: &Path, rank: u32) -> anyhow::Result<Child> {
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
    command.arg("--uds").arg(scratch.join(format!("worker-{rank}.sock")));
    command.arg("--port-file").arg(port_file(scratch, rank));
    command.args(["--local-rank", &rank.to_string(), "--exit-with-parent"]);
    let mut command = prepare(command, &log_of(scratch, rank))?;
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
    command.args(["bench", "update-rank", "--json", "--worker", args.worker.name()]);
    command.args(["--shape", &args.shape.to_string(), "--iterations", &args.iterations.to_string()]);
    command.args(["--floor-iterations", &args.floor_iterations.to_string()]);
    command.args(["--device", &args.device, "--transport", &args.transport]);
    command.args(["--verify", args.verify.name()]);
    command.args(["--timeout", &args.timeout.to_string()]);
    if let Some(mib) = args.bucket_mib {
        command.args(["--bucket-mib", &mib.to_string()]);
    }
    if let Some(file) = &args.trace {
        command.arg("--trace").arg(file);
    }
    command.arg("--uds").arg(scratch.join("worker-{rank}.sock"));
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

/// What went wrong, as the process said it: its error lines, or else its last ones.
fn last_lines(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let wrong = |line: &&str| ["error: ", "ERROR", "WARN", "Error"].iter().any(|word| line.contains(word));
    let errors: Vec<&str> = lines.iter().copied().filter(wrong).collect();
    let chosen = if errors.is_empty() { &lines } else { &errors };
    chosen[chosen.len().saturating_sub(6)..].join(" | ")
}
