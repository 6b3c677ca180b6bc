//! `ckpt serve`: one rank's parameter server behind an HTTP API.

mod actor;
mod api;
mod body;
mod metrics;
mod paths;
mod view;

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, OnceLock},
    time::Duration,
};

use ckpt_core::{
    Error, ErrorKind, Recovery, Result,
    checkpoint::Pool,
    cluster::{ClusterEnv, TOKEN_VARIABLE},
    control::{Job, Session, Token},
    tls::ServerTls,
};
use clap::{Args, ValueEnum};
use serde_json::json;
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinHandle,
};

use self::{actor::Actor, api::App, paths::AllowedPaths, view::View};
use super::{http_get::TrustArgs, update::WorkerProtocol};
use crate::{
    Context,
    exit::Exit,
    job::{JobArgs, Rank, Reading},
    listen::{self, Listener},
    policy::PolicyArgs,
    signals::Signals,
    trace_file::ATTEMPTS_KEPT,
    trace_folder::TraceFolder,
};

/// Requests that may wait for the one under way.
const QUEUE: usize = 64;
/// A job that ends signals its ranks and closes its hub; whichever comes first here, the end is orderly.
const LOST_OR_ENDED: Duration = Duration::from_secs(2);

/// Run one rank's parameter server with an HTTP API, until SIGTERM
#[derive(Args)]
#[command(after_help = "\
Run it once per inference worker, under torchrun, srun, mpirun or `ckpt launch`. docs/http-api.md has every request; the
API is that of checkpoint-engine's own parameter server. A TCP listener that other hosts reach asks for the job's token.

Examples:
  ckpt launch --nproc-per-node 8 -- ckpt serve --uds /run/user/1000/ps-{rank}.sock
  curl --unix-socket /run/user/1000/ps-0.sock http://ps/v1/healthz
  CKPT_TOKEN=... torchrun --nproc-per-node 8 --no-python ckpt serve --listen 0.0.0.0:1973{rank} --allow-path /models
  CKPT_TOKEN=... ckpt serve --listen 0.0.0.0:19730 --tls-cert ps.pem --tls-key ps-key.pem --allow-path /models")]
pub(crate) struct ServeArgs {
    /// Address of the HTTP server; `{rank}` and `{local_rank}` are filled in, port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", conflicts_with = "uds", required_unless_present = "uds")]
    listen: Option<String>,
    /// Listen on this UNIX socket instead; `{rank}` and `{local_rank}` are filled in
    #[arg(long, value_name = "PATH")]
    uds: Option<String>,
    /// Write the address here once requests are taken; `{rank}` and `{local_rank}` are filled in
    #[arg(long, value_name = "FILE")]
    port_file: Option<String>,
    /// Speak HTTPS over --listen, with this certificate (PEM, with those that it was signed with)
    #[arg(long, value_name = "FILE", requires = "tls_key", conflicts_with = "uds")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Only register files below this folder, links resolved; may be given several times [default: any file]
    #[arg(long, value_name = "ROOT")]
    allow_path: Vec<PathBuf>,
    /// What the workers speak: checkpoint-engine 0.4 and newer, older ones, or ours
    #[arg(long, value_enum, default_value_t = WorkerProtocol::Ce04)]
    worker_protocol: WorkerProtocol,
    /// File with the secret of the job whose metas are posted here, if it is not this job's
    #[arg(long, value_name = "FILE")]
    sender_token_file: Option<PathBuf>,
    /// Write every stage of every bucket of each update into a file in this folder, also when it fails, for chrome://tracing
    /// or Perfetto; the last 100 of each rank are kept
    #[arg(long, value_name = "FOLDER")]
    trace_dir: Option<PathBuf>,
    /// Time that a rank 0 which died gets to come back, with all checkpoints kept here; 0: this rank ends, too
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    rejoin_timeout: u32,
    /// Time that requests under way get to end after SIGTERM
    #[arg(long, default_value_t = 10, value_name = "SECONDS")]
    grace: u32,
    #[command(flatten)]
    trust: TrustArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    job: JobArgs,
}

pub(crate) async fn run(args: ServeArgs, context: &Context) -> anyhow::Result<ExitCode> {
    // Before anything listens: a signal that comes early is not missed.
    let signals = Signals::new()?;
    let allowed = AllowedPaths::new(&args.allow_path)?;
    let tls = match (&args.tls_cert, &args.tls_key) {
        (Some(certificate), Some(key)) => Some(ServerTls::load(certificate, key)?),
        _ => None,
    };
    let secret = args.sender_token_file.as_deref().map(Token::from_file).transpose()?;
    let open = |folder: &Path| TraceFolder::open(folder, ClusterEnv::from_process()?.rank);
    let traces = args.trace_dir.as_deref().map(open).transpose()?;
    let reading = Reading { needed: secret.is_some(), secret };
    let rank = Rank::start_reading(&args.job, &context.registry, reading).await?;
    serve(args, context, rank, allowed, tls, signals, traces).await.map(|()| Exit::Success.into())
}

async fn serve(
    args: ServeArgs,
    context: &Context,
    rank: Rank,
    allowed: AllowedPaths,
    tls: Option<ServerTls>,
    signals: Signals,
    traces: Option<TraceFolder>,
) -> anyhow::Result<()> {
    let Rank { job, server, transport, runtime_dir, .. } = rank;
    let job = Arc::new(job);
    let cluster = job.cluster.clone();
    let here = |text: &str| {
        let text = text.replace("{rank}", &cluster.rank.to_string());
        text.replace("{local_rank}", &cluster.local_rank.to_string())
    };
    let (listener, token) = match (&args.uds, &args.listen) {
        (Some(path), _) => (Listener::unix(Path::new(&here(path)))?, None),
        (None, Some(address)) => tcp(&here(address), &args, tls, &job.session, &allowed).await?,
        (None, None) => return Err(invalid("choose where to listen with --uds or --listen").into()),
    };
    let mut server = server.with_policy(args.policy.policy());
    if traces.is_some() {
        server.keep_timelines(ATTEMPTS_KEPT);
    }
    let address = listener.address().to_owned();
    let view = Arc::<View>::default();
    let (orders, queue) = mpsc::channel(QUEUE);
    let device = server.device().clone();
    let app = Arc::new(App {
        job: job.clone(),
        orders,
        view: view.clone(),
        allowed,
        token,
        turn: Arc::new(Semaphore::new(1)),
        loading: tokio::sync::Mutex::new(()),
        pool: Pool::new(device.clone()),
        other_pool: Pool::new(device.clone()),
        digests: args.policy.verify().digests(),
        about: json!({
            "rank": cluster.rank,
            "world_size": cluster.world_size,
            "job": cluster.job,
            "pid": std::process::id(),
            "ckpt_version": env!("CARGO_PKG_VERSION"),
            "transport": transport,
            "device": device.kind(),
            "worker": device.info().uuid,
            "worker_protocol": args.worker_protocol.to_possible_value().map(|v| v.get_name().to_owned()),
        }),
        device,
    });
    let actor = Actor {
        deadlines: server.deadlines(),
        server,
        rank: cluster.rank,
        world_size: cluster.world_size,
        runtime_dir,
        protocol: args.worker_protocol,
        trust: args.trust.clone(),
        check_workers: args.policy.verify().checks_workers(),
        view,
        traces,
        layouts: HashMap::new(),
    };
    let abort_wait = actor.deadlines.abort + LOST_OR_ENDED;
    let actor = tokio::spawn(actor.run(queue));

    if let Some(file) = &args.port_file {
        listen::announce(Path::new(&here(file)), &address)?;
    }
    context.output.line(format!("rank {} listens on {address}", cluster.rank));
    tracing::info!(rank = cluster.rank, %address, "the parameter server takes requests");
    let grace = Duration::from_secs(args.grace.into());
    let waits = Waits {
        grace,
        abort: abort_wait,
        // Rank 0's hub lives in its own process.
        rejoin: Duration::from_secs(if cluster.rank == 0 { 0 } else { args.rejoin_timeout.into() }),
    };
    let lost = answer_until_the_end(listener, app, job.session.clone(), signals, waits).await?;
    end(job, actor, abort_wait).await;
    match lost {
        Some(cause) => Err(cause.into()),
        None => Ok(context.output.object(&json!({ "rank": cluster.rank, "address": address }))?),
    }
}

/// How long the end may take.
struct Waits {
    /// For requests under way to end by themselves.
    grace: Duration,
    /// For them to end after they were told to.
    abort: Duration,
    /// For a rank 0 that died to come back.
    rejoin: Duration,
}

/// Serves until a signal, or until the job is lost for good. The loss is the answer.
async fn answer_until_the_end(
    listener: Listener,
    app: Arc<App>,
    session: Session,
    mut signals: Signals,
    Waits { grace, abort, rejoin }: Waits,
) -> Result<Option<Error>> {
    let lost = Arc::new(OnceLock::new());
    let (ending, mut ended) = tokio::sync::watch::channel(());
    let stop = {
        let (lost, session, app) = (lost.clone(), session.clone(), app.clone());
        async move {
            loop {
                let cause = tokio::select! {
                    name = signals.next() => {
                        tracing::info!(signal = name, "ending");
                        break;
                    }
                    cause = session.until_lost() => cause,
                };
                if tokio::time::timeout(LOST_OR_ENDED, signals.next()).await.is_ok() {
                    break;
                }
                let back = async {
                    !rejoin.is_zero() && may_come_back(&cause) && join_again(&app, rejoin, &cause).await
                };
                let back = tokio::select! {
                    back = back => back,
                    _ = signals.next() => break,
                };
                if !back {
                    tracing::error!(error = %cause, "the job is lost; ending");
                    // Set once: this is the only place.
                    let _ = lost.set(cause);
                    break;
                }
            }
            drop(ending);
        }
    };
    let overdue = async {
        // The sender never sends; an error means that it is gone.
        let _ = ended.changed().await;
        tokio::time::sleep(grace).await;
    };
    let mut serving = std::pin::pin!(listener.serve(api::router(app), stop));
    tokio::select! {
        () = &mut serving => {}
        () = overdue => {
            tracing::warn!("requests under way are ended");
            // An update hears of it from its session, tells its worker, and fails: its client gets an answer.
            session.close().await;
            if tokio::time::timeout(abort, serving).await.is_err() {
                tracing::warn!("requests under way are cut off");
            }
        }
    }
    Ok(lost.get().cloned())
}

/// A rank 0 that ended in order said so, and the job is over.
fn may_come_back(cause: &Error) -> bool {
    cause.recovery() != Recovery::Fatal
}

/// Waits for a new rank 0; checkpoints and pinned memory stay meanwhile. Whether it came.
async fn join_again(app: &App, wait: Duration, cause: &Error) -> bool {
    tracing::error!(error = %cause, ?wait, "rank 0 is lost; this rank keeps its checkpoints and waits for it");
    match app.job.session.rejoin(wait).await {
        Ok(()) => {
            tracing::info!("joined the job again: gather metas before the next update");
            app.rejoined().await;
            true
        }
        Err(error) => {
            tracing::error!(%error, "rank 0 did not come back");
            false
        }
    }
}

/// Leaves the job.
async fn end(job: Arc<Job>, actor: JoinHandle<()>, wait: Duration) {
    match Arc::try_unwrap(job) {
        Ok(job) => job.leave().await,
        // A connection that was cut off still has it.
        Err(job) => job.session.clone().close().await,
    }
    if tokio::time::timeout(wait, actor).await.is_err() {
        tracing::warn!("an update was cut off in the middle");
    }
}

/// A TCP listener, and the token that it asks for if other hosts reach it.
async fn tcp(
    address: &str,
    args: &ServeArgs,
    tls: Option<ServerTls>,
    session: &Session,
    allowed: &AllowedPaths,
) -> Result<(Listener, Option<Token>)> {
    let address: SocketAddr = address
        .parse()
        .map_err(|_| invalid(format!("--listen {address} is no address such as 127.0.0.1:19730")))?;
    let token = if address.ip().is_loopback() {
        None
    } else {
        let named = std::env::var_os(TOKEN_VARIABLE).is_some_and(|token| !token.is_empty());
        if !named && args.job.token_file.is_none() {
            return Err(invalid(format!(
                "other hosts reach {address}, so clients must send the job's token: set {TOKEN_VARIABLE}, pass \
                 --token-file, or listen on 127.0.0.1 or --uds"
            )));
        }
        Some(session.secret()?)
    };
    if allowed.is_any() {
        tracing::warn!(%address, "clients may register any file that this process can read; limit them with --allow-path");
    }
    Ok((Listener::tcp(address, tls).await?, token))
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::ConfigInvalid, "start the parameter server", message)
}
