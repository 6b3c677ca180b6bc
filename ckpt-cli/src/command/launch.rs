//! `ckpt launch`: starts the ranks of a job on this host, as torchrun does.

mod child;
mod output;
mod supervise;
#[cfg(test)]
mod tests;

use std::{
    ffi::{OsStr, OsString},
    io::IsTerminal,
    net::{Ipv4Addr, SocketAddr},
    os::unix::ffi::OsStrExt,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use ckpt_core::{Error, ErrorKind, cluster, control::Token};
use clap::Args;
use serde::Serialize;
use tokio::net::TcpSocket;

use crate::Context;

const OPERATION: &str = "launch the ranks";
const LOOPBACK: &str = "127.0.0.1";
const DEFAULT_MASTER_PORT: u16 = 29500;
/// Attempts to find two free ports beside each other.
const PORT_ATTEMPTS: usize = 64;

/// Start one process per rank on this host and end them together
#[derive(Args, Debug)]
#[command(after_help = "\
Each process gets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_ADDR, MASTER_PORT, CKPT_JOB and
CKPT_TOKEN, its own process group, and no standard input. When one fails, the others get SIGTERM and, after the grace
period, SIGKILL; the exit code is that of the first failure, 128 + signal for one that was killed. SIGINT, SIGTERM and
SIGHUP are passed on; a second one kills. If the launcher itself is killed, the kernel kills its direct children.

Examples:
  ckpt launch --nproc-per-node 8 -- ckpt update --checkpoint-path /models/qwen
  CKPT_TOKEN=... ckpt launch --nnodes 2 --node-rank 1 --master-addr node0 --master-port 29500 --nproc-per-node 8 -- \\
      ckpt update --checkpoint-path /models/qwen")]
pub(crate) struct LaunchArgs {
    /// Ranks on this host
    #[arg(long, alias = "nproc_per_node", value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    nproc_per_node: u32,
    /// Hosts of the job; run this command on each, with the same number of ranks
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    nnodes: u32,
    /// This host's number among them
    #[arg(long, alias = "node_rank", value_name = "I", default_value_t = 0)]
    node_rank: u32,
    /// Name or address of the host with node rank 0; needed for several hosts
    #[arg(long, alias = "master_addr", value_name = "HOST")]
    master_addr: Option<String>,
    /// A port there whose successor is free too; on one host the default is any free one, else 29500
    #[arg(long, alias = "master_port", value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..=65534))]
    master_port: Option<u16>,
    /// The job's name, the same on all hosts
    #[arg(long, env = "CKPT_JOB", value_name = "NAME")]
    job: Option<String>,
    /// File with the job's secret; without it CKPT_TOKEN is used, and on one host a secret is made up
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Put `[rank]` before each line of output even if it does not go to a terminal
    #[arg(long)]
    tag_output: bool,
    /// Start a rank that fails anew, alone, up to N times in all; the others go on. For `ckpt serve`
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_restarts: u32,
    /// Seconds between SIGTERM and SIGKILL
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    grace: u64,
    /// What each rank runs
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// What `--json` prints, after all output of the ranks.
#[derive(Debug, Serialize)]
struct Report {
    world_size: u32,
    local_world_size: u32,
    exit_code: u8,
    first_failure: Option<supervise::Failure>,
}

pub(crate) async fn run(args: LaunchArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let plan = LaunchPlan::new(args, &|name| std::env::var_os(name))?;
    let tagged = plan.tag_output || std::io::stdout().is_terminal();
    let signals = supervise::forwarded_signals()?;
    let first_failure = supervise::run(&plan, tagged, signals).await?;
    let exit_code = first_failure.as_ref().map_or(0, supervise::Failure::exit_code);
    context.output.object(&Report {
        world_size: plan.world_size,
        local_world_size: plan.local_world_size,
        exit_code,
        first_failure,
    })?;
    Ok(ExitCode::from(exit_code))
}

/// Checked arguments with all that was chosen.
#[derive(Debug)]
struct LaunchPlan {
    command: Vec<OsString>,
    world_size: u32,
    local_world_size: u32,
    node_rank: u32,
    master_addr: String,
    master_port: u16,
    job: String,
    token: Token,
    tag_output: bool,
    grace: Duration,
    max_restarts: u32,
    /// Keeps a port that was chosen here from being given to others.
    _reserved: Option<[TcpSocket; 2]>,
}

impl LaunchPlan {
    fn new(args: LaunchArgs, variable: &dyn Fn(&str) -> Option<OsString>) -> anyhow::Result<Self> {
        let LaunchArgs { nproc_per_node, nnodes, node_rank, .. } = args;
        if node_rank >= nnodes {
            return Err(invalid(format!("--node-rank {node_rank} is not below --nnodes {nnodes}")).into());
        }
        let world_size =
            nproc_per_node.checked_mul(nnodes).filter(|ranks| *ranks <= 1 << 20).ok_or_else(|| {
                invalid(format!(
                    "{nnodes} hosts with {nproc_per_node} ranks each are more than this program can lead"
                ))
            })?;
        let several = nnodes > 1;
        if several && args.master_addr.is_none() {
            return Err(
                invalid("several hosts need --master-addr, the name of the host with --node-rank 0").into()
            );
        }
        let named = variable(cluster::TOKEN_VARIABLE).filter(|token| !token.is_empty());
        let token = match (&args.token_file, named) {
            (Some(path), _) => Token::from_file(path)?,
            (None, Some(token)) => Token::new(token.as_bytes().to_vec())?,
            (None, None) if several => {
                return Err(invalid(format!(
                    "the ranks run on several hosts and have no token; set the same {} on all of them, or pass \
                     --token-file",
                    cluster::TOKEN_VARIABLE
                ))
                .into());
            }
            (None, None) => Token::random()?,
        };
        if token.reveal().contains(&0) {
            return Err(invalid("the token has a zero byte, which no environment variable can hold").into());
        }
        let (master_port, reserved) = match args.master_port {
            Some(port) => (port, None),
            None if several => (DEFAULT_MASTER_PORT, None),
            None => reserve_ports().map(|(port, sockets)| (port, Some(sockets)))?,
        };
        let job = match args.job.filter(|job| !job.is_empty()) {
            Some(job) => job,
            None if several => "default".to_owned(),
            // Two launches on one host are two jobs.
            None => format!("launch-{}-{master_port}", std::process::id()),
        };
        Ok(Self {
            command: args.command,
            world_size,
            local_world_size: nproc_per_node,
            node_rank,
            master_addr: args.master_addr.unwrap_or_else(|| LOOPBACK.to_owned()),
            master_port,
            job,
            token,
            tag_output: args.tag_output,
            grace: Duration::from_secs(args.grace),
            max_restarts: args.max_restarts,
            _reserved: reserved,
        })
    }

    fn rank(&self, local_rank: u32) -> u32 {
        self.node_rank * self.local_world_size + local_rank
    }

    /// The environment of one rank, on top of this process's own.
    fn variables(&self, local_rank: u32) -> Vec<(&'static str, OsString)> {
        vec![
            ("RANK", self.rank(local_rank).to_string().into()),
            ("WORLD_SIZE", self.world_size.to_string().into()),
            ("LOCAL_RANK", local_rank.to_string().into()),
            ("LOCAL_WORLD_SIZE", self.local_world_size.to_string().into()),
            ("GROUP_RANK", self.node_rank.to_string().into()),
            ("MASTER_ADDR", self.master_addr.clone().into()),
            ("MASTER_PORT", self.master_port.to_string().into()),
            (cluster::JOB_VARIABLE, self.job.clone().into()),
            (cluster::TOKEN_VARIABLE, OsStr::from_bytes(self.token.reveal()).to_owned()),
        ]
    }
}

/// A free port whose successor is free too. The sockets are bound and do not listen: the system gives the ports to
/// nobody who asks for any port, and rank 0, which asks for this one with SO_REUSEADDR, gets it.
fn reserve_ports() -> anyhow::Result<(u16, [TcpSocket; 2])> {
    let bind = |port| -> std::io::Result<(u16, TcpSocket)> {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
        Ok((socket.local_addr()?.port(), socket))
    };
    let mut last = None;
    for _ in 0..PORT_ATTEMPTS {
        let (port, first) = bind(0).map_err(no_port)?;
        match port.checked_add(1).map(bind) {
            Some(Ok((_, second))) => return Ok((port, [first, second])),
            Some(Err(error)) => last = Some(error),
            None => {}
        }
    }
    Err(no_port(last.unwrap_or_else(|| std::io::Error::other("no two free ports beside each other"))).into())
}

fn no_port(error: std::io::Error) -> Error {
    Error::new(
        ErrorKind::ResourceExhausted,
        OPERATION,
        format!("found no free port ({error}); choose one with --master-port"),
    )
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::ConfigInvalid, OPERATION, message)
}
