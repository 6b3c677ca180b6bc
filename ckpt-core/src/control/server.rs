//! The hub on rank 0: a listener, a gate that checks strangers, and one task that runs the [`HubMachine`].
//!
//! [`HubMachine`]: super::HubMachine

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use serde::Serialize;
use tokio::{
    io::DuplexStream,
    net::{TcpListener, TcpSocket},
    sync::{Semaphore, mpsc, oneshot},
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

use super::{
    address::HubAddress,
    hub_machine::{AttemptStatus, RankStatus},
    journal::Journal,
    server_core::{Core, Input},
    server_gate::{Door, Gate},
    token::Token,
};
use crate::{
    deadlines::Deadlines,
    error::{Error, ErrorKind, Key, Result},
    tls::JobTls,
};

const OPERATION: &str = "start the hub";
/// Connections that the system may hold before they are accepted.
const BACKLOG: u32 = 1024;
/// Inputs that may wait for the hub's task; readers wait when it is full.
const INPUTS: usize = 1024;
/// Connections that may be without a valid greeting at the same time, besides two a rank.
const STRANGERS: usize = 64;
/// A pause after an `accept` that failed: out of descriptors does not get better at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Bytes between two halves of a connection inside this process.
const DUPLEX_BYTES: usize = 64 << 10;

/// What rank 0 must know to start the hub.
#[derive(Clone, Debug)]
pub struct HubOptions {
    /// Where to listen; port 0 lets the system choose.
    pub address: HubAddress,
    /// The job; sessions of another one are refused.
    pub job: String,
    /// The job's secret.
    pub token: Token,
    /// Ranks of the job.
    pub world_size: u32,
    /// The time limits.
    pub deadlines: Deadlines,
    /// Whether the connections are encrypted ([`crate::tls`]); ranks of this process have none.
    pub tls: bool,
}

/// The hub's view of the job, ready to be printed as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HubStatus {
    /// The job.
    pub job: String,
    /// Ranks of the job.
    pub world_size: u32,
    /// Every rank, ascending.
    pub ranks: Vec<RankStatus>,
    /// The updates under way.
    pub attempts: Vec<AttemptStatus>,
}

/// A running hub. It ends when this value is dropped; [`Hub::shutdown`] also says so to the ranks.
#[derive(Debug)]
pub struct Hub {
    address: Option<SocketAddr>,
    gate: Arc<Gate>,
    inputs: mpsc::Sender<Input>,
    tasks: TaskTracker,
    cancel: CancellationToken,
    _cancel_on_drop: DropGuard,
}

impl Hub {
    /// Listens and runs the hub.
    pub async fn bind(options: HubOptions) -> Result<Hub> {
        Self::bind_keeping(options, None).await
    }

    /// The same; each commit is written to the file `decisions` before anybody is told, and a hub that is started in the
    /// place of a dead one knows from it how the last updates ended.
    pub async fn bind_keeping(options: HubOptions, decisions: Option<PathBuf>) -> Result<Hub> {
        let tls = options.tls.then(|| JobTls::new(options.token.reveal())).transpose()?;
        let listener = listen(&options.address).await?;
        let address = listener.local_addr().map_err(|e| cannot_listen(&options.address, &e))?;
        let strangers = STRANGERS + 2 * options.world_size as usize;
        let hub = Self::start(options, Some(address), decisions);
        tracing::info!(%address, "the hub listens");
        let door = Door { gate: hub.gate.clone(), tls };
        hub.tasks.spawn(accept(listener, door, hub.tasks.clone(), strangers, hub.cancel.clone()));
        Ok(hub)
    }

    /// Runs a hub without a socket, for ranks that are tasks of this process. `options.address` is not used.
    /// Must be called inside a tokio runtime.
    pub fn in_process(options: HubOptions) -> Hub {
        Self::start(options, None, None)
    }

    fn start(options: HubOptions, address: Option<SocketAddr>, decisions: Option<PathBuf>) -> Hub {
        let (inputs, queue) = mpsc::channel(INPUTS);
        let tasks = TaskTracker::new();
        let cancel = CancellationToken::new();
        let gate = Arc::new(Gate::new(&options, inputs.clone()));
        let core = Core::new(options, inputs.clone(), tasks.clone(), Journal::open(decisions));
        tasks.spawn(core.run(queue, cancel.clone()));
        let _cancel_on_drop = cancel.clone().drop_guard();
        Hub { address, gate, inputs, tasks, cancel, _cancel_on_drop }
    }

    /// Where it listens, with the real port; `None` for a hub without a socket.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// What it knows about ranks and updates.
    pub async fn status(&self) -> Result<HubStatus> {
        let (reply, answer) = oneshot::channel();
        let gone = || Error::new(ErrorKind::Unavailable, "ask the hub", "the hub has stopped");
        self.inputs.send(Input::Status(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }

    /// Stops; tells the ranks and gives the last messages about a second to get out.
    pub async fn shutdown(self) {
        self.cancel.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// A new connection from inside this process.
    pub(super) fn attach(&self) -> DuplexStream {
        let (ours, theirs) = tokio::io::duplex(DUPLEX_BYTES);
        let (read, write) = tokio::io::split(ours);
        let gate = self.gate.clone();
        let cancel = self.cancel.clone();
        self.tasks.spawn(async move {
            cancel
                .run_until_cancelled_owned(async move {
                    gate.admit(Box::new(read), Box::new(write), "this process", gate.deadline()).await;
                })
                .await
        });
        theirs
    }
}

async fn listen(address: &HubAddress) -> Result<TcpListener> {
    let found = address.resolve().await.map_err(|e| {
        Error::new(
            ErrorKind::ConfigInvalid,
            OPERATION,
            format!(
                "cannot resolve {:?} ({e}); set MASTER_ADDR to a name or address of rank 0's host",
                address.host
            ),
        )
    })?;
    let mut last = std::io::Error::other("the name has no address");
    for one in &found {
        match listen_at(*one) {
            Ok(listener) => return Ok(listener),
            Err(e) => last = e,
        }
    }
    if last.kind() == std::io::ErrorKind::AddrNotAvailable
        && let Some(one) = found.first()
    {
        // Behind address translation rank 0 does not have the address by which others reach it.
        tracing::warn!(%address, "this host does not have the hub's address; listening on all of its addresses");
        let all: SocketAddr = match one {
            SocketAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, address.port).into(),
            SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, address.port).into(),
        };
        return listen_at(all).map_err(|e| cannot_listen(address, &e));
    }
    Err(cannot_listen(address, &last))
}

fn listen_at(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A hub that restarts must not wait for the old connections' TIME_WAIT.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn cannot_listen(address: &HubAddress, error: &std::io::Error) -> Error {
    let message = match error.kind() {
        std::io::ErrorKind::AddrInUse => format!(
            "{address} is in use by another program; end it or choose another MASTER_PORT (the hub listens on \
             MASTER_PORT + 1)"
        ),
        _ => format!("cannot listen on {address}: {error}; check MASTER_ADDR and MASTER_PORT"),
    };
    Error::new(ErrorKind::ConfigInvalid, OPERATION, message).with(Key::Port, address.port)
}

/// Accepts until cancelled. A stranger costs a permit until it has greeted or its time is up.
async fn accept(
    listener: TcpListener,
    door: Door,
    tasks: TaskTracker,
    strangers: usize,
    cancel: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(strangers));
    let run = async {
        loop {
            let Ok(permit) = permits.clone().acquire_owned().await else { return };
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "cannot set TCP_NODELAY");
            }
            let (door, cancel, peer) = (door.clone(), cancel.clone(), peer.to_string());
            tasks.spawn(async move {
                cancel.run_until_cancelled(door.open(stream, &peer)).await;
                drop(permit);
            });
        }
    };
    cancel.run_until_cancelled(run).await;
}
