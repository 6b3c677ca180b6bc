//! `ckpt demo`: the whole program on this machine, verified.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use ckpt_core::{
    Error, ErrorKind, Key,
    checkpoint::{CheckpointSource, DigestAlgorithm, generate, save_checkpoint},
    control::Token,
};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

use super::http_get::{self, TrustArgs};
use crate::{
    Context,
    exit::Exit,
    output::{Table, format_bytes},
};

const OPERATION: &str = "run the demo";
const TOKEN_FILE: &str = "token";
const METAS_FILE: &str = "metas.json";
/// Seed of the generated checkpoint: its bytes are the same on every machine.
const SEED: u64 = 2026;
/// Generated files are about this large, so that there are several.
const SHARD_BYTES: u64 = 256 << 20;
/// For a process to end once it was asked.
const GRACE: Duration = Duration::from_secs(10);

/// Try it on this machine: parameter servers, workers, one update, every tensor verified
#[derive(Args)]
#[command(after_help = "\
It starts N workers and N parameter servers as separate processes, updates the workers by broadcast, and compares every
tensor that they hold with the files. Then one more instance joins: it has no files and pulls the weights from the
parameter servers' memory (P2P, over tcp), and is compared in the same way.

Examples:
  ckpt demo
  ckpt demo --ranks 4 --size-mib 2048
  ckpt demo --device cuda --size-mib 4096
  ckpt demo --checkpoint-path /models/all-MiniLM-L6-v2 --dump /tmp/held --json")]
pub(crate) struct DemoArgs {
    /// A real checkpoint; without it one is generated
    #[arg(long, value_name = "PATH")]
    checkpoint_path: Option<PathBuf>,
    /// Size of the generated checkpoint
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..=1 << 20), value_name = "MIB")]
    size_mib: u64,
    /// Parameter servers, and workers
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64), value_name = "N")]
    ranks: u32,
    /// Write what each worker holds at the end to DIR
    #[arg(long, value_name = "DIR")]
    dump: Option<PathBuf>,
    /// How bytes reach other ranks
    #[arg(long, default_value = "auto", value_name = "NAME")]
    transport: String,
    /// Where the weights go; with cuda or ascend each rank has a device of its own
    #[arg(long, default_value = "host", value_name = "KIND")]
    device: String,
    /// Updates to make
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1000), value_name = "N")]
    repeat: u64,
    /// Time for everything after the checkpoint was made
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400), value_name = "SECONDS")]
    timeout: u64,
}

/// What `ckpt update --json` says.
#[derive(Debug, Deserialize)]
struct Updated {
    transport: String,
    device: String,
    load_s: f64,
    gather_metas_s: f64,
    update_s: Vec<f64>,
    bucket_bytes: u64,
    ring_bytes: u64,
    buckets: u64,
}

/// What `ckpt join --json` says.
#[derive(Debug, Deserialize)]
struct Joined {
    p2p_transport: String,
    sender_ranks: u32,
    load_metas_s: f64,
    update_s: Vec<f64>,
    gib_per_s: f64,
}

/// The instance that came later.
#[derive(Serialize)]
struct Third {
    p2p_transport: String,
    sender_ranks: u32,
    load_metas_s: f64,
    update_s: f64,
    gib_per_s: f64,
    verified_tensors: usize,
}

#[derive(Serialize)]
struct Summary {
    verified: bool,
    checkpoint: String,
    tensors: usize,
    tensor_bytes: u64,
    ranks: u32,
    workers: u32,
    transport: String,
    device: String,
    load_s: f64,
    gather_metas_s: f64,
    update_s: Vec<f64>,
    verify_s: f64,
    gib_per_s: f64,
    buckets: u64,
    bucket_bytes: u64,
    ring_bytes: u64,
    verified_tensors: usize,
    joined: Third,
}

pub(crate) async fn run(args: DemoArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let scratch =
        tempfile::Builder::new().prefix("ckpt-demo-").tempdir().context("make a folder for the demo")?;
    let (path, name) = match &args.checkpoint_path {
        Some(path) => (path.clone(), path.display().to_string()),
        None => {
            let path = scratch.path().join("checkpoint");
            let started = Instant::now();
            generate_checkpoint(path.clone(), args.size_mib << 20).await?;
            tracing::info!(seconds = started.elapsed().as_secs_f64(), "generated a checkpoint");
            (path, format!("generated, Qwen-shaped, {}", format_bytes(args.size_mib << 20)))
        }
    };
    let source = {
        let path = path.clone();
        Arc::new(tokio::task::spawn_blocking(move || CheckpointSource::open(path)).await??)
    };
    let limit = Duration::from_secs(args.timeout);
    let summary = tokio::time::timeout(limit, demonstrate(&args, &path, name, source, scratch.path()))
        .await
        .map_err(|_| {
            Error::new(
                ErrorKind::Timeout,
                OPERATION,
                format!("not over after {} s; allow more with --timeout", args.timeout),
            )
        })??;
    print(&summary, context);
    context.output.object(&summary)?;
    Ok(if summary.verified { Exit::Success } else { Exit::Corrupt }.into())
}

async fn generate_checkpoint(folder: PathBuf, bytes: u64) -> anyhow::Result<()> {
    let made = tokio::task::spawn_blocking(move || {
        let source = CheckpointSource::generated(generate::qwen_shaped(bytes), SEED);
        save_checkpoint(&source, folder, SHARD_BYTES)
    });
    made.await??;
    Ok(())
}

async fn demonstrate(
    args: &DemoArgs,
    checkpoint: &Path,
    name: String,
    source: Arc<CheckpointSource>,
    scratch: &Path,
) -> anyhow::Result<Summary> {
    let mut workers = Vec::new();
    for rank in 0..args.ranks {
        workers.push(start_worker(args, scratch, rank, rank)?);
    }
    let (updated, mut sender) = update(args, checkpoint, scratch).await?;
    let started = Instant::now();
    let expected = digests_of(source.clone()).await?;
    let mut verified_tensors = 0;
    for (rank, worker) in (0..args.ranks).zip(&mut workers) {
        verified_tensors += verify(rank, worker, scratch, &expected).await?;
    }
    let verify_s = started.elapsed().as_secs_f64();
    // The workers that were updated have done their part; on accelerators the newcomer takes the first one's device.
    for worker in &mut workers {
        end(worker).await;
    }
    let joined = join(args, scratch, &expected).await?;
    end(&mut sender).await;
    let tensor_bytes = source.len_bytes();
    let best = updated.update_s.iter().copied().fold(f64::INFINITY, f64::min);
    Ok(Summary {
        verified: verified_tensors == expected.len() * args.ranks as usize
            && joined.verified_tensors == expected.len(),
        checkpoint: name,
        tensors: expected.len(),
        tensor_bytes,
        ranks: args.ranks,
        workers: args.ranks,
        transport: updated.transport,
        device: updated.device,
        load_s: updated.load_s,
        gather_metas_s: updated.gather_metas_s,
        gib_per_s: tensor_bytes as f64 / best / (1_u64 << 30) as f64,
        update_s: updated.update_s,
        verify_s,
        buckets: updated.buckets,
        bucket_bytes: updated.bucket_bytes,
        ring_bytes: updated.ring_bytes,
        verified_tensors,
        joined,
    })
}

fn socket(scratch: &Path, rank: u32) -> PathBuf {
    scratch.join(format!("worker-{rank}.sock"))
}

fn worker_log(scratch: &Path, rank: u32) -> PathBuf {
    scratch.join(format!("worker-{rank}.log"))
}

/// This program again, ended when this process forgets it.
fn ckpt(log: &Path) -> anyhow::Result<Command> {
    let log = std::fs::File::create(log).context("make a log file")?;
    let mut command = Command::new(std::env::current_exe().context("find this program")?);
    command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    Ok(command)
}

/// Starts worker number `number`, which belongs to rank `rank` of its instance.
fn start_worker(args: &DemoArgs, scratch: &Path, number: u32, rank: u32) -> anyhow::Result<Child> {
    let mut command = ckpt(&worker_log(scratch, number))?;
    command.arg("worker").arg("--uds").arg(socket(scratch, number)).args(["--rank", &rank.to_string()]);
    command.args(["--device", &args.device, "--local-rank", &rank.to_string()]);
    // The pipe is never written; it closes when this process dies.
    command.arg("--exit-with-parent").stdin(Stdio::piped());
    if let Some(folder) = &args.dump {
        // The newcomer's only worker is called as the first instance's first.
        command.arg("--dump").arg(if number == rank { folder.clone() } else { folder.join("joined") });
    }
    command.spawn().with_context(|| format!("start worker {number}"))
}

/// Updates the workers; the parameter servers then go on serving their memory until they are ended.
async fn update(args: &DemoArgs, checkpoint: &Path, scratch: &Path) -> anyhow::Result<(Updated, Child)> {
    let program = std::env::current_exe().context("find this program")?;
    Token::random()?.write_to(&scratch.join(TOKEN_FILE))?;
    let log = scratch.join("update.log");
    let mut command = ckpt(&log)?;
    command.args(["launch", "--nproc-per-node", &args.ranks.to_string(), "--"]).arg(program);
    command.args(["update", "--transport", &args.transport, "--repeat", &args.repeat.to_string()]);
    command.arg("--checkpoint-path").arg(checkpoint).arg("--uds").arg(scratch.join("worker-{rank}.sock"));
    command.arg("--save-metas-file").arg(scratch.join(METAS_FILE));
    command.args(["--sleep-time", &args.timeout.to_string()]);
    instance(&mut command, args, scratch);
    let mut child = command.stdout(Stdio::piped()).spawn().context("start the update")?;
    // After a failure it is a line of another form.
    match result_of(&mut child).await?.and_then(|line| serde_json::from_str(&line).ok()) {
        Some(updated) => Ok((updated, child)),
        None => anyhow::bail!("the update ended with {}: {}", child.wait().await?, last_lines(&log)),
    }
}

/// One more instance takes its weights from the memory of the first one.
async fn join(args: &DemoArgs, scratch: &Path, expected: &HashMap<String, Held>) -> anyhow::Result<Third> {
    let number = args.ranks;
    let mut worker = start_worker(args, scratch, number, 0)?;
    let log = scratch.join("join.log");
    let mut command = ckpt(&log)?;
    command
        .arg("join")
        .arg("--metas")
        .arg(scratch.join(METAS_FILE))
        .arg("--uds")
        .arg(socket(scratch, number));
    instance(&mut command, args, scratch);
    let mut child = command.stdout(Stdio::piped()).spawn().context("start the join")?;
    let line = result_of(&mut child).await?;
    let status = child.wait().await?;
    let (true, Some(line)) = (status.success(), line) else {
        anyhow::bail!("the join ended with {status}: {}", last_lines(&log));
    };
    let joined: Joined = serde_json::from_str(&line).context("read the join's result")?;
    let verified_tensors = verify(number, &mut worker, scratch, expected).await?;
    end(&mut worker).await;
    Ok(Third {
        p2p_transport: joined.p2p_transport,
        sender_ranks: joined.sender_ranks,
        load_metas_s: joined.load_metas_s,
        update_s: joined.update_s.iter().sum(),
        gib_per_s: joined.gib_per_s,
        verified_tensors,
    })
}

/// What both instances are told.
fn instance(command: &mut Command, args: &DemoArgs, scratch: &Path) {
    command.args(["--json", "--device", &args.device, "--worker-protocol", "native"]);
    command.args(["--inference-parallel-size", "1", "--checkpoint-name", "demo", "--p2p-transport", "tcp"]);
    command.arg("--token-file").arg(scratch.join(TOKEN_FILE));
}

/// The JSON that a command ends with; `None` if it wrote none.
async fn result_of(child: &mut Child) -> anyhow::Result<Option<String>> {
    // The pipe stays with the child: nobody that writes more finds it closed.
    let Some(stdout) = child.stdout.as_mut() else { return Ok(None) };
    let mut lines = BufReader::new(stdout).lines();
    while let Some(line) = lines.next_line().await? {
        if line.starts_with('{') {
            return Ok(Some(line));
        }
    }
    Ok(None)
}

/// What went wrong, as the process said it: its error lines, or else its last ones.
fn last_lines(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let errors: Vec<&str> = lines.iter().copied().filter(|line| line.contains("error: ")).collect();
    let chosen = if errors.is_empty() { &lines } else { &errors };
    chosen[chosen.len().saturating_sub(4)..].join(" | ")
}

/// Every tensor's name, dtype, shape and digest, straight from the files.
async fn digests_of(source: Arc<CheckpointSource>) -> anyhow::Result<HashMap<String, Held>> {
    let read = tokio::task::spawn_blocking(move || {
        let each = source.tensors().iter().enumerate().map(|(index, tensor)| {
            let digest = format!("{:016x}", DigestAlgorithm::Xxh3_64.digest(&source.read(index)?));
            let meta = &tensor.meta;
            let name = meta.name.to_string();
            let dtype = meta.dtype.safetensors_name().to_owned();
            Ok((name.clone(), Held { name, dtype, shape: meta.shape.to_vec(), digest }))
        });
        each.collect::<ckpt_core::Result<HashMap<_, _>>>()
    });
    Ok(read.await??)
}

/// One tensor, as `GET /v1/tensors` of the worker shows it.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Held {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    digest: String,
}

/// Compares what a worker holds with `expected`; the number of tensors, or the first difference.
async fn verify(
    number: u32,
    worker: &mut Child,
    scratch: &Path,
    expected: &HashMap<String, Held>,
) -> anyhow::Result<usize> {
    if let Some(status) = worker.try_wait()? {
        anyhow::bail!("worker {number} ended early, {status}: {}", last_lines(&worker_log(scratch, number)));
    }
    let socket = socket(scratch, number);
    let source = format!("unix:{}", socket.display());
    let answer = http_get::get(&source, "/v1/tensors", &TrustArgs::default(), "verify the workers").await?;
    let held: Vec<Held> = serde_json::from_slice(&answer).context("read the worker's answer")?;
    let wrong = |tensor: &str, message: &str| {
        Error::new(ErrorKind::Corrupt, "verify the workers", message)
            .with(Key::Worker, number)
            .with(Key::Tensor, tensor)
    };
    for tensor in &held {
        match expected.get(&tensor.name) {
            None => {
                return Err(
                    wrong(&tensor.name, "the worker holds a tensor that the files do not have").into()
                );
            }
            Some(source) if source != tensor => {
                return Err(wrong(&tensor.name, "the worker's bytes differ from the files'").into());
            }
            Some(_) => {}
        }
    }
    if held.len() != expected.len() {
        let names: std::collections::HashSet<_> = held.iter().map(|t| t.name.as_str()).collect();
        let missing = expected.keys().find(|name| !names.contains(name.as_str())).map_or("", String::as_str);
        return Err(wrong(missing, "the worker lacks a tensor").into());
    }
    Ok(held.len())
}

/// Asks a process to end; it is killed when dropped if it does not.
async fn end(child: &mut Child) {
    // A worker's standard input is our pipe: closing it is the request. Others take a signal.
    if child.stdin.take().is_none()
        && let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed()))
    {
        // It has not been waited for, so the number is still its own.
        let _ = kill_process(pid, Signal::TERM);
    }
    let _ = tokio::time::timeout(GRACE, child.wait()).await;
}

fn print(summary: &Summary, context: &Context) {
    let seconds = |all: &[f64]| all.iter().map(|s| format!("{s:.3}")).collect::<Vec<_>>().join(", ");
    let mut table = Table::new(&["what", "result"]);
    let verdict =
        if summary.verified { "verified: every tensor is the file's, byte for byte" } else { "NOT verified" };
    let rows = [
        (
            "checkpoint",
            format!(
                "{}: {} tensors, {}",
                summary.checkpoint,
                summary.tensors,
                format_bytes(summary.tensor_bytes)
            ),
        ),
        ("processes", format!("{} parameter servers, {} workers", summary.ranks, summary.workers)),
        ("transport", format!("{} on device {}", summary.transport, summary.device)),
        ("load", format!("{:.3} s", summary.load_s)),
        ("gather metas", format!("{:.3} s", summary.gather_metas_s)),
        ("update", format!("{} s, {:.2} GiB/s", seconds(&summary.update_s), summary.gib_per_s)),
        (
            "buckets",
            format!(
                "{} of up to {}, ring {}",
                summary.buckets,
                format_bytes(summary.bucket_bytes),
                format_bytes(summary.ring_bytes)
            ),
        ),
        (
            "workers hold",
            format!("{} tensors, {verdict} ({:.3} s)", summary.verified_tensors, summary.verify_s),
        ),
        (
            "a third joins",
            format!(
                "pulls from {} ranks over {}: {:.3} s, {:.2} GiB/s, {} tensors verified",
                summary.joined.sender_ranks,
                summary.joined.p2p_transport,
                summary.joined.update_s,
                summary.joined.gib_per_s,
                summary.joined.verified_tensors
            ),
        ),
    ];
    table.pairs(rows);
    context.output.table(&table);
}
