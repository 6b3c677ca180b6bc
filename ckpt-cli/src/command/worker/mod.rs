//! `ckpt worker`: a small inference engine that only holds weights. What tests and the demo update, and an example of
//! the worker side of the native protocol.

mod apply;
pub(crate) mod device;
mod serve;
mod store;

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::{Error, ErrorKind, Result};
use clap::Args;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

use self::{
    apply::Faults,
    device::Place,
    serve::{Device, Engine},
};
use crate::{
    Context,
    exit::Exit,
    listen::{self, Listener},
};

/// Time that a running update gets to end by itself after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

/// Run a reference engine: it takes weights like an inference engine, and shows what it holds
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  ckpt worker --listen 127.0.0.1:19730
  ckpt worker --device cuda --local-rank 1 --uds /run/user/1000/engine-1.sock
  ckpt worker --uds /run/user/1000/engine.sock --inference-parallel-size 2 --dump /tmp/held
  curl -s 127.0.0.1:19730/v1/state

It answers GET /health, POST /collective_rpc (as vLLM does, for method update_weights_from_ipc), POST /pause and /resume,
GET /is_paused, GET /v1/state and GET /v1/tensors. It speaks the native worker protocol: run
`ckpt update --worker-protocol native`. It runs until SIGTERM or SIGINT.")]
pub(crate) struct WorkerArgs {
    /// Address of the HTTP server; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0", conflicts_with = "uds")]
    listen: SocketAddr,
    /// Listen on this UNIX socket instead
    #[arg(long, value_name = "PATH")]
    uds: Option<PathBuf>,
    /// Write the address here once it accepts connections
    #[arg(long, value_name = "FILE")]
    port_file: Option<PathBuf>,
    /// Number of devices that this engine owns
    #[arg(long, visible_alias = "ranks-per-engine", value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1024))]
    inference_parallel_size: u32,
    /// Rank of the parameter server beside the first device; gives the devices' names
    #[arg(long, value_name = "RANK", env = "RANK", default_value_t = 0)]
    rank: u32,
    /// Where the weights are kept: host, cuda, ascend, or `auto` for the first that works here
    #[arg(long, value_name = "KIND", default_value = "host")]
    device: String,
    /// First of the visible devices that this engine owns, for kinds other than host
    #[arg(long, value_name = "N", env = "LOCAL_RANK", default_value_t = 0)]
    local_rank: u32,
    /// Name of a device on host, once for each; replaces the names made from --rank
    #[arg(long, value_name = "UUID")]
    uuid: Vec<String>,
    /// After each update write what each device holds to DIR/<uuid>.safetensors
    #[arg(long, value_name = "DIR")]
    dump: Option<PathBuf>,
    /// Longest update, if the request names no timeout
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u32,
    /// End when standard input is closed, as it is when the parent process dies
    #[arg(long)]
    exit_with_parent: bool,
    #[command(flatten)]
    faults: Faults,
}

#[derive(Serialize)]
struct Ended {
    address: String,
    updates: u64,
    failures: u64,
}

pub(crate) async fn run(args: WorkerArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let places = places(&args)?;
    if let Some(folder) = &args.dump {
        std::fs::create_dir_all(folder).map_err(|error| {
            Error::new(
                ErrorKind::ConfigInvalid,
                "make the dump folder",
                "it cannot be made; choose another --dump",
            )
            .with(ckpt_core::Key::Path, folder.display())
            .caused_by(error)
        })?;
    }
    let stop = stop_signal(args.exit_with_parent)?;
    let timeout = Duration::from_secs(args.timeout.into());
    let all = crate::worker_devices();
    let kind = device::choose(&all, &args.device)?;
    let open = |place| kind.open(place).map(|(worker, memory)| Device::new(worker, memory));
    let devices = places.iter().map(open).collect::<Result<Vec<_>>>()?;
    let uuids: Vec<String> = devices.iter().map(|device| device.uuid().to_owned()).collect();
    let engine = Arc::new(Engine::new(devices, args.dump.clone(), timeout, args.faults));
    if args.uds.is_none() && !args.listen.ip().is_loopback() {
        return Err(invalid(
            "it has no token and takes requests of this host only; listen on 127.0.0.1 or --uds".into(),
        )
        .into());
    }
    let listener = match &args.uds {
        Some(path) => Listener::unix(path)?,
        None => Listener::tcp(args.listen, None).await?,
    };
    let address = listener.address().to_owned();
    if let Some(file) = &args.port_file {
        listen::announce(file, &address)?;
    }
    context.output.line(format!("engine of {} listens on {address}", uuids.join(", ")));
    info!(%address, devices = %uuids.join(","), "the reference engine is up");

    let server = listener.serve(serve::router(engine.clone()), {
        let engine = engine.clone();
        async move {
            let why = stop.await;
            info!(why, "the reference engine ends");
            engine.end(Instant::now() + GRACE).await;
        }
    });
    server.await;
    let (updates, failures) = engine.counts();
    context.output.object(&Ended { address, updates, failures })?;
    Ok(Exit::Success.into())
}

/// The devices that were asked for.
fn places(args: &WorkerArgs) -> Result<Vec<Place>> {
    let wanted = args.inference_parallel_size as usize;
    let mut sorted = args.uuid.clone();
    sorted.sort();
    sorted.dedup();
    if sorted.len() != args.uuid.len() {
        return Err(invalid("--uuid names a device twice".into()));
    }
    if !args.uuid.is_empty() && args.inference_parallel_size != 1 && args.uuid.len() != wanted {
        let given = args.uuid.len();
        return Err(invalid(format!(
            "--inference-parallel-size is {wanted}, but --uuid was given {given} times"
        )));
    }
    let count = if args.uuid.is_empty() { wanted } else { args.uuid.len() };
    let place = |i: u32| {
        Some(Place {
            rank: args.rank.checked_add(i)?,
            local_rank: args.local_rank.checked_add(i)?,
            uuid: args.uuid.get(i as usize).cloned(),
        })
    };
    let places: Option<Vec<Place>> = (0..count as u32).map(place).collect();
    places.ok_or_else(|| invalid("--rank or --local-rank is too large".into()))
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::ConfigInvalid, "start the worker", message)
}

/// Completes when the process is asked to end; registered before anything listens, so that no request is missed.
fn stop_signal(exit_with_parent: bool) -> Result<impl Future<Output = &'static str>> {
    let listen_for = |kind| {
        signal(kind).map_err(|error| {
            Error::new(ErrorKind::Backend, "start the worker", "signals cannot be handled").caused_by(error)
        })
    };
    let mut terminate = listen_for(SignalKind::terminate())?;
    let mut interrupt = listen_for(SignalKind::interrupt())?;
    let (orphaned, parent) = tokio::sync::oneshot::channel();
    let orphaned = exit_with_parent.then_some(orphaned);
    if let Some(orphaned) = orphaned {
        // A plain thread: it stays in its read until the parent ends, and must not hold up the runtime.
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            let _ = orphaned.send(());
        });
    }
    Ok(async move {
        let parent = async {
            match parent.await {
                Ok(()) => {}
                // Nobody watches the parent.
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
            () = parent => "standard input was closed",
        }
    })
}
