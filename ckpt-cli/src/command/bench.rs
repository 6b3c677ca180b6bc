//! `ckpt bench`: whole updates, and the rates of single parts.

mod files;
mod measure;
mod one_sided;
mod parts;
mod rank;
mod report;
mod size;
mod update;

use std::{
    io::Write,
    path::PathBuf,
    process::{ExitCode, Stdio},
    time::Duration,
};

use anyhow::Context as _;
use ckpt_core::{
    Error, ErrorKind,
    cluster::{ClusterEnv, Launcher},
    control::{Hub, HubAddress, HubOptions, Session, SessionConfig, Token},
    deadlines::Deadlines,
    device::{DeviceConfig, runtime_dir},
    transport::{Requirement, TransportConfig, Way},
};
use clap::{Args, Subcommand, ValueEnum};
use tokio::process::Command;

use self::{
    files::FileArgs,
    measure::{Bench, Sample},
    report::Report,
    size::Size,
};
use crate::{Context, exit::Exit, machine::Machine, registry_in};

/// Measure whole updates, or one part by itself: transports, files into memory, metas, plans
#[derive(Args)]
#[command(after_help = "\
Examples:
  ckpt bench update --device cuda --shape qwen3-8b --ranks 2 --iterations 4 --trace trace.json
  ckpt bench transport --transport tcp --op broadcast --sizes 1MiB,64MiB --ranks 2 --check
  ckpt bench transport --transport local --op read --sizes 4KiB,1MiB --json
  ckpt bench load --shape qwen:512 --csv load.csv
  ckpt bench plan --shape kimi-k2 --ranks 256
  torchrun --nproc-per-node 8 --no-python ckpt bench transport --transport nccl --op allgather --sizes 256MiB")]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    Update(Box<update::BenchUpdateArgs>),
    /// One rank of `ckpt bench update`
    #[command(hide = true)]
    UpdateRank(Box<update::RankArgs>),
    Transport(Box<TransportArgs>),
    Load(Box<parts::LoadArgs>),
    Metas(Box<parts::MetasArgs>),
    Plan(Box<parts::PlanArgs>),
}

/// Measure a transport's broadcasts, allgathers, or one-sided reads and writes
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Without a launcher it starts its own ranks on this machine: as tasks for `local`, as processes for other transports. Under
torchrun, srun, mpirun or `ckpt launch` each process is a rank.

The columns are those of nccl-tests: algbw is size / time; busbw is what one link carries, so that it can be compared with
the hardware's rate whatever the number of ranks (broadcast: algbw; allgather: algbw x (n-1)/n, where size is the whole
result). Time is that of the slowest rank.

For reads and writes the columns are those of perftest, with rates of the slowest rank: every rank but 0 reads from, or
writes into, rank 0's memory, all at once, with --depth messages in flight. BW peak is that of the fastest stretch; MsgRate
is in million messages a second. p50 and p99 are those of single messages, one after the other. MiB/s is what perftest calls
MB/sec. To compare with `ib_read_bw -q N -t N` give the same --qps and --depth, and --one-buffer, since perftest's messages
share one buffer, which stays in the caches.

Examples:
  ckpt bench transport --transport tcp --op broadcast --sizes 1MiB,64MiB --ranks 2 --check
  ckpt bench transport --transport local --op read --sizes 4KiB,1MiB --json
  ckpt bench transport --transport rdma --op write --sizes 64KiB,1MiB --qps 4 --hcas mlx5_0,mlx5_1 --check")]
struct TransportArgs {
    /// Which transport: a name, or `auto` for the first that works here
    #[arg(long, default_value = "auto", value_name = "NAME")]
    transport: String,
    /// Where the buffers are: a kind, or `auto` for the first that works here
    #[arg(long, default_value = "auto", value_name = "KIND")]
    device: String,
    /// What to measure
    #[arg(long, value_enum, default_value_t = Op::Broadcast)]
    op: Op,
    /// Sizes, with units B, KiB, MiB, GiB, KB, MB or GB
    #[arg(long, default_value = "1MiB,16MiB,64MiB", value_delimiter = ',', value_name = "LIST")]
    sizes: Vec<Size>,
    /// Ranks to start, where no launcher has done so
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1024), value_name = "N")]
    ranks: u32,
    /// Reads or writes in flight
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536), value_name = "N")]
    depth: u32,
    /// All reads or writes in flight use the same bytes, not bytes of their own
    #[arg(long)]
    one_buffer: bool,
    /// Queue pairs for each pair of NICs (transport rdma); else CKPT_RDMA_QPS
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=16), value_name = "N")]
    qps: Option<u32>,
    /// RDMA devices (transports rdma and mooncake), rank 0's before a `/` if it has others; else
    /// PS_P2P_STORE_RDMA_DEVICES
    #[arg(long, value_name = "LIST[/LIST]")]
    hcas: Option<String>,
    /// Operations before the clock starts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=1_000_000), value_name = "N")]
    warmup: u32,
    /// Operations that are measured
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1_000_000), value_name = "N")]
    iters: u32,
    /// Compare every byte that arrives in one more operation
    #[arg(long)]
    check: bool,
    /// Connections between two ranks, for transports that stripe
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64), value_name = "N")]
    connections: u8,
    /// Encrypt what the ranks send each other, where the transport can; else CKPT_TLS=1
    #[arg(long)]
    tls: bool,
    /// File with the job's secret; else CKPT_TOKEN, and ranks on one host need none
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Time for each step: all ranks come, one size is measured
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400), value_name = "SECONDS")]
    timeout: u64,
    #[command(flatten)]
    files: FileArgs,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Op {
    /// Rank 0 sends to all
    Broadcast,
    /// Each rank sends its part to all
    Allgather,
    /// Every other rank reads rank 0's memory
    Read,
    /// Every other rank writes into rank 0's memory
    Write,
}

impl Op {
    /// Whether it needs the one-sided facet.
    fn way(self) -> Option<Way> {
        match self {
            Op::Read => Some(Way::Read),
            Op::Write => Some(Way::Write),
            Op::Broadcast | Op::Allgather => None,
        }
    }
}

impl TransportArgs {
    fn requirement(&self, world_size: u32, across_hosts: bool) -> Requirement {
        let one_sided = self.op.way().is_some();
        Requirement { collective: !one_sided, one_sided, across_processes: world_size > 1, across_hosts }
    }

    /// The environment of rank `rank`, in which options stand before variables.
    fn env(&self, rank: u32) -> impl Fn(&str) -> Option<String> {
        let devices = self.hcas.as_deref().map(|lists| match lists.split_once('/') {
            Some((first, _)) if rank == 0 => first.to_owned(),
            Some((_, others)) => others.to_owned(),
            None => lists.to_owned(),
        });
        let queue_pairs = self.qps.map(|count| count.to_string());
        move |name| match name {
            "PS_P2P_STORE_RDMA_DEVICES" if devices.is_some() => devices.clone(),
            // The ranks of a host share out what is not said for each.
            "LOCAL_RANK" | "LOCAL_WORLD_SIZE" if devices.is_some() => None,
            "CKPT_RDMA_QPS" if queue_pairs.is_some() => queue_pairs.clone(),
            _ => std::env::var(name).ok(),
        }
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

pub(crate) async fn run(args: BenchArgs, context: &Context) -> anyhow::Result<ExitCode> {
    match args.what {
        What::Update(args) => update::run(*args, context).await,
        What::UpdateRank(args) => update::run_rank(*args, context).await,
        What::Transport(args) => run_transport(*args, context).await,
        What::Load(args) => parts::run_load(*args, context).await,
        What::Metas(args) => parts::run_metas(*args, context).await,
        What::Plan(args) => parts::run_plan(*args, context).await,
    }
}

async fn run_transport(args: TransportArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let measured = if is_launched() {
        match rank::run(&args).await? {
            Some(of_all) => of_all,
            // Rank 0 tells.
            None => return Ok(Exit::Success.into()),
        }
    } else if args.transport == "local" || args.ranks == 1 {
        tasks(&args).await?
    } else {
        return processes(&args).await;
    };
    let machine = tokio::task::block_in_place(|| Machine::look(&context.registry));
    let report = Report::new(&args, &measured, machine);
    let table = report.table();
    context.output.line(report.machine.line());
    context.output.table(&table);
    args.files.write(&report.title(), &report.machine, &table, |_| {})?;
    context.output.object(&report)?;
    Ok(if report.is_correct() { Exit::Success } else { Exit::Corrupt }.into())
}

/// A launcher has started this process as a rank. What cannot be told is an error when the rank joins its job.
fn is_launched() -> bool {
    ClusterEnv::from_process().map_or(true, |cluster| cluster.launcher != Launcher::Single)
}

/// What rank 0 knows at the end.
struct Measured {
    transport: &'static str,
    device: &'static str,
    ranks: u32,
    /// By size.
    samples: Vec<Sample>,
}

/// All ranks as tasks of this process.
async fn tasks(args: &TransportArgs) -> anyhow::Result<Measured> {
    // One for all ranks: `local` reaches only its own.
    let registry = registry_in(&args.env(0));
    // Ranks that are tasks of one process cannot die one by one: a silent one is only short of processors.
    let deadlines = Deadlines { join: args.limit(), dead_after: args.limit(), ..Deadlines::default() };
    let (token, address) = (Token::random()?, HubAddress::new("127.0.0.1", 0));
    let hub = Hub::in_process(HubOptions {
        address: address.clone(),
        job: "bench".to_owned(),
        token: token.clone(),
        world_size: args.ranks,
        deadlines,
        tls: false,
    });
    let runtime_dir = runtime_dir()?;
    let mut running = tokio::task::JoinSet::new();
    let mut names = None;
    for rank in 0..args.ranks {
        let config = DeviceConfig { rank, local_rank: rank, runtime_dir: runtime_dir.clone() };
        let device = registry.open_device(&args.device, &config)?;
        let config = TransportConfig {
            bind: std::net::Ipv4Addr::LOCALHOST.into(),
            runtime_dir: runtime_dir.clone(),
            tls: false,
            secret: token.reveal().to_vec(),
            connections: usize::from(args.connections),
            device: device.clone(),
        };
        let transport = registry.open_transport(&args.transport, &config, args.requirement(1, false))?;
        names.get_or_insert((transport.name(), device.kind()));
        let config =
            SessionConfig::new(address.clone(), "bench", token.clone(), rank, args.ranks, deadlines)?;
        let session = Session::in_process(&hub, config).await?;
        let bench = Bench::new(args.clone(), session, device, transport)?;
        running.spawn(bench.run());
    }
    let mut samples = Vec::new();
    // The first failure ends all: dropping the set ends the others.
    while let Some(ended) = running.join_next().await {
        if let Some(of_rank_0) = ended.context("a rank's task died")?? {
            samples = of_rank_0;
        }
    }
    hub.shutdown().await;
    let (transport, device) =
        names.ok_or_else(|| Error::new(ErrorKind::Internal, "run the benchmark", "it had no ranks"))?;
    Ok(Measured { transport, device, ranks: args.ranks, samples })
}

/// All ranks as processes of this host, under our own launcher.
async fn processes(args: &TransportArgs) -> anyhow::Result<ExitCode> {
    let program = std::env::current_exe().context("find this program")?;
    let mut command = Command::new(&program);
    command.args(["launch", "--nproc-per-node", &args.ranks.to_string(), "--"]).arg(&program);
    command.args(std::env::args_os().skip(1));
    command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::piped());
    let output = command.output().await.context("start the ranks")?;
    // Unchanged, so that the object stays the last line. A reader that went away is no error.
    let _ = std::io::stdout().write_all(&output.stdout);
    let code = output.status.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(Exit::Failed as u8)))
}
