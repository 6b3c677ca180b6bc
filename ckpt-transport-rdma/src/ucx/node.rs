//! What one opened transport holds, and how a batch goes.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    transport::{Transfer, TransportConfig, Way},
};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::{
    link::{self, Link},
    sys::Ucp,
    worker::{Command, Part, Worker},
};
use crate::{
    memory::{Claim, Regions, transfer_own},
    owner::{self, Door},
    wire::{Id, random},
};

/// One operation moves at most this much.
const PIECE_BYTES: u64 = 4 << 20;
/// Times that a batch is begun: a link that was kept may have ended since.
const ATTEMPTS: usize = 2;
/// UCX lets go of a closed endpoint's memory at once; so long a batch waits for it.
const QUIET: Duration = Duration::from_secs(2);

/// An owner, as its descriptors name it.
pub(super) type Peer = (SocketAddr, Id);

/// What a region's descriptor holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Descriptor {
    /// Version of this format.
    pub(super) version: u8,
    pub(super) id: Id,
    pub(super) secret: [u8; 32],
    /// UCX's key; empty for a region without bytes.
    pub(super) rkey: Vec<u8>,
}

/// Only one link to a peer is made at a time.
type Slot = Arc<tokio::sync::Mutex<Option<Arc<Link>>>>;

pub(super) struct Node {
    pub(super) id: Id,
    pub(super) secret: [u8; 32],
    pub(super) listens: SocketAddr,
    pub(super) worker: Arc<Worker>,
    pub(super) regions: Arc<Regions>,
    stop: CancellationToken,
    job_secret: Vec<u8>,
    links: Mutex<HashMap<Peer, Slot>>,
}

impl Node {
    /// Starts UCX and listens. Must be called in a tokio runtime.
    pub(super) fn start(ucp: Ucp, transport: &TransportConfig) -> Result<Arc<Self>> {
        let failed = |kind, message: &str| {
            Error::new(kind, "open the transport ucx", message.to_owned()).with(Key::Endpoint, transport.bind)
        };
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(failed(ErrorKind::Internal, "must be called in a tokio runtime"));
        }
        if transport.bind.is_unspecified() {
            let what = "peers cannot reach this address; bind that of one interface";
            return Err(failed(ErrorKind::ConfigInvalid, what));
        }
        let local = transport.bind.is_loopback();
        if !local {
            tracing::warn!(
                "UCX's own ports accept connections on all interfaces and ask for no secret; keep them behind a \
                 firewall, or limit them with UCX_NET_DEVICES (docs/rdma.md)"
            );
        }
        let listen = || {
            let listener = std::net::TcpListener::bind((transport.bind, 0))?;
            listener.set_nonblocking(true)?;
            let listener = tokio::net::TcpListener::from_std(listener)?;
            Ok::<_, std::io::Error>((listener.local_addr()?, listener))
        };
        let (listens, listener) = listen().map_err(|e| {
            failed(ErrorKind::Backend, "cannot listen; bind an address of this host").caused_by(e)
        })?;
        // What the user says counts.
        let worker = Worker::start(ucp, local && std::env::var_os("UCX_NET_DEVICES").is_none())?;
        let node = Arc::new(Self {
            id: random()?,
            secret: random()?,
            listens,
            worker: Arc::new(worker),
            regions: Arc::default(),
            stop: CancellationToken::new(),
            job_secret: transport.secret.clone(),
            links: Mutex::default(),
        });
        let door = Door { key: node.key(&node.secret), id: node.id, stop: node.stop.clone() };
        let served = node.clone();
        let accept = owner::accept(door, listener, move |stream| link::serve(served.clone(), stream));
        tokio::spawn(node.stop.clone().run_until_cancelled_owned(accept));
        Ok(node)
    }

    /// The key of a connection: what was handed out with the descriptor, and the job's secret.
    pub(super) fn key(&self, secret: &[u8]) -> Vec<u8> {
        [secret, &self.job_secret].concat()
    }

    /// Ends everything that runs for this transport. UCX first: nothing touches memory that the rest then lets go.
    pub(super) fn close(&self) {
        self.worker.stop();
        self.stop.cancel();
        let links = std::mem::take(&mut *self.links.lock().unwrap_or_else(PoisonError::into_inner));
        drop(links);
    }

    async fn link(&self, peer: Peer, secret: &[u8]) -> Result<Arc<Link>> {
        // One call under this lock.
        let slot = {
            let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
            links.retain(|_, slot| {
                slot.try_lock().map_or(true, |link| link.as_ref().is_some_and(|link| link.is_usable()))
            });
            links.entry(peer).or_default().clone()
        };
        let mut slot = slot.lock().await;
        if let Some(link) = slot.as_ref().filter(|link| link.is_usable()) {
            return Ok(link.clone());
        }
        *slot = None;
        let link = Link::open(self, peer, secret).await?;
        *slot = Some(link.clone());
        Ok(link)
    }
}

/// Moves a batch of one owner. When it returns, UCX has let go of this side's memory.
pub(super) async fn run(
    node: &Arc<Node>,
    way: Way,
    peer: Peer,
    transfers: Vec<(Transfer, Arc<Descriptor>)>,
    deadline: Instant,
) -> Result<()> {
    let outcome = match peer.1 == node.id {
        true => own(node, way, transfers, deadline).await,
        false => remote(node, way, peer, transfers, deadline).await,
    };
    outcome.map_err(|e| e.with(Key::Peer, peer.0))
}

/// Transfers with this process's own regions are copies.
async fn own(
    node: &Node,
    way: Way,
    transfers: Vec<(Transfer, Arc<Descriptor>)>,
    deadline: Instant,
) -> Result<()> {
    let late = move || if Instant::now() < deadline { Ok(()) } else { Err(too_late(way)) };
    let claims = claims(way, &transfers);
    node.regions.check(&claims)?;
    let regions = node.regions.clone();
    let copied = tokio::task::spawn_blocking(move || {
        transfers.iter().try_for_each(|(transfer, _)| transfer_own(&regions, way, transfer, late))
    });
    copied.await.unwrap_or_else(|e| {
        Err(Error::new(ErrorKind::Internal, way.operation(), "the task ended").caused_by(e))
    })?;
    late()?;
    node.regions.check(&claims)
}

async fn remote(
    node: &Arc<Node>,
    way: Way,
    peer: Peer,
    transfers: Vec<(Transfer, Arc<Descriptor>)>,
    deadline: Instant,
) -> Result<()> {
    let Some(secret) = transfers.first().map(|(_, descriptor)| descriptor.secret) else { return Ok(()) };
    let claims = claims(way, &transfers);
    let begin = async {
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let link = match node.link(peer, &secret).await {
                Ok(link) => link,
                Err(error) => return Err(last.unwrap_or(error)),
            };
            match link.hold(claims.clone()).await {
                Ok(number) => return Ok((link, number)),
                Err(error) if error.kind() == ErrorKind::PeerLost => {
                    link.kill();
                    last = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| too_late(way)))
    };
    let begun = tokio::time::timeout_at(deadline.into(), begin).await;
    let (link, number) = begun.unwrap_or_else(|_| Err(too_late(way)))?;
    let parts = parts(&transfers)?;
    let mut moving = std::pin::pin!(node.worker.ask(|reply| Command::Move(link.ep, way, parts, reply)));
    let moved = tokio::select! {
        moved = &mut moving => moved,
        () = link.lost.cancelled() => {
            let what = "the owner has ended or closed its transport";
            give_up(&link, moving, Error::new(ErrorKind::PeerLost, way.operation(), what)).await
        }
        () = tokio::time::sleep_until(deadline.into()) => give_up(&link, moving, too_late(way)).await,
    };
    let told = tokio::time::timeout_at(deadline.into(), link.done(number)).await;
    match (moved, told) {
        (Ok(()), told) => told.unwrap_or_else(|_| Err(too_late(way))),
        // The owner knows better why: it has released the region.
        (Err(_), Ok(Err(word))) if word.kind() != ErrorKind::PeerLost => Err(word),
        (Err(error), _) => {
            // What failed on it may have broken it. When the last batch lets go of it, the owner learns.
            link.kill();
            node.links.lock().unwrap_or_else(PoisonError::into_inner).remove(&peer);
            Err(error)
        }
    }
}

/// Ends the endpoint and waits until UCX has let go of the batch.
async fn give_up(link: &Link, moving: impl Future<Output = Result<()>>, error: Error) -> Result<()> {
    link.kill();
    if tokio::time::timeout(QUIET, moving).await.is_err() {
        // The parts own their memory, so nothing breaks but the promise that it may be reused.
        tracing::error!("UCX does not let go of a batch that has failed");
    }
    Err(error)
}

fn too_late(way: Way) -> Error {
    Error::new(ErrorKind::Timeout, way.operation(), "the bytes did not arrive by the deadline")
}

/// What the owner is asked for each region.
fn claims(way: Way, transfers: &[(Transfer, Arc<Descriptor>)]) -> Vec<Claim> {
    let mut ends: BTreeMap<(u64, u64), u64> = BTreeMap::new();
    for (transfer, _) in transfers {
        let end = ends.entry((transfer.region.generation, transfer.region.address)).or_default();
        *end = (*end).max(transfer.offset + transfer.memory.len_bytes());
    }
    let write = way == Way::Write;
    ends.into_iter().map(|((generation, address), end)| Claim { generation, address, end, write }).collect()
}

fn parts(transfers: &[(Transfer, Arc<Descriptor>)]) -> Result<Vec<Part>> {
    let mut parts = Vec::new();
    for (transfer, descriptor) in transfers {
        let rkey: Arc<[u8]> = descriptor.rkey.as_slice().into();
        let (mut start, len) = (0, transfer.memory.len_bytes());
        while start < len {
            let end = len.min(start + PIECE_BYTES);
            parts.push(Part {
                memory: transfer.memory.slice(start..end)?,
                address: transfer.region.address + transfer.offset + start,
                rkey: rkey.clone(),
            });
            start = end;
        }
    }
    Ok(parts)
}
