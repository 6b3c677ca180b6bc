//! A formed group: its connections, how a death or an abort spreads, and how it ends.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use async_trait::async_trait;
use futures_util::FutureExt;
use tokio_util::sync::CancellationToken;

use super::{
    link::Link,
    socket,
    wire::{Notice, frame, receive},
};
use crate::{
    device::{Event, Stream},
    error::{Error, ErrorKind, Key, Result},
    transport::{AbortHandle, CollectiveOp, Communicator, CommunicatorQueue, group::Order, poison::Poison},
};

/// After a lane broke: how long the reason may take on the control connection before the lane's peer is blamed.
const REASON_TIME: Duration = Duration::from_millis(500);

/// Another member.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) rank: u32,
    /// What errors call it.
    pub(super) name: u32,
    pub(super) address: SocketAddr,
    pub(super) lanes: Vec<Link>,
    pub(super) control: Arc<Link>,
    /// Cancelled once the peer has closed its end: it has left for good, or is dead.
    pub(super) gone: CancellationToken,
}

/// A member's view of the group. Its connections close when the last job and the queue are gone.
#[derive(Debug)]
pub(super) struct Mesh {
    pub(super) rank: u32,
    pub(super) world_size: u32,
    pub(super) peers: Vec<Peer>,
    pub(super) poison: Arc<Poison>,
    /// Held from before there is a cause until the others have been told.
    telling: Mutex<()>,
    ended: CancellationToken,
}

impl Mesh {
    /// Starts to listen for notices.
    pub(super) fn start(rank: u32, world_size: u32, peers: Vec<Peer>) -> Arc<Self> {
        let mesh = Arc::new(Self {
            rank,
            world_size,
            peers,
            poison: Arc::default(),
            telling: Mutex::default(),
            ended: CancellationToken::new(),
        });
        for (index, peer) in mesh.peers.iter().enumerate() {
            let listen = listen(Arc::downgrade(&mesh), index, peer.control.clone());
            tokio::spawn(mesh.ended.clone().run_until_cancelled_owned(listen));
        }
        mesh
    }

    /// The group as one that broadcasts over its lanes.
    pub(super) fn communicator(self: Arc<Self>) -> Communicator {
        let abort = TcpAbort { mesh: Arc::downgrade(&self), poison: self.poison.clone() };
        let queue = TcpQueue { mesh: self, next: 0, order: Order::default() };
        Communicator { queue: Box::new(queue), abort: Arc::new(abort) }
    }

    /// Poisons the communicator, tells the others why, frees whoever waits. Answers the first cause.
    pub(super) fn fail(&self, cause: Error) -> Error {
        let cause = cause.flattened();
        let _telling = self.telling();
        if self.poison.set(cause.clone()) {
            tracing::debug!(rank = self.rank, %cause, "a tcp group ends");
            self.tell(&Notice::Aborted(cause.clone()));
            for lane in self.peers.iter().flat_map(|peer| &peer.lanes) {
                lane.shut();
            }
        }
        self.poison.get().unwrap_or(cause)
    }

    /// Whoever closes connections because there is a cause takes this first: else the others may see only the end.
    pub(super) fn telling(&self) -> MutexGuard<'_, ()> {
        // Nothing that can panic runs under this lock.
        self.telling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The error for a lane that broke: the reason that came, or else this peer's death.
    pub(super) async fn broken(&self, peer: &Peer, error: std::io::Error) -> Error {
        if let Ok(cause) = tokio::time::timeout(REASON_TIME, self.poison.wait()).await {
            return cause;
        }
        self.fail(lost(peer, "a member's connection broke").caused_by(error))
    }

    /// Writes without waiting: the control connections carry one notice in their lives, so there is room.
    fn tell(&self, notice: &Notice) {
        let Ok(bytes) = frame(notice) else { return };
        for peer in &self.peers {
            // A peer that cannot be told has closed its end and knows already.
            let _ = peer.control.send_now(&bytes);
        }
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if self.poison.get().is_none() {
            self.tell(&Notice::Left);
        }
        self.ended.cancel();
    }
}

pub(super) fn lost(peer: &Peer, message: &'static str) -> Error {
    Error::new(ErrorKind::PeerLost, "broadcast", message)
        .with(Key::Rank, peer.name)
        .with(Key::Peer, peer.address)
}

async fn listen(mesh: Weak<Mesh>, index: usize, control: Arc<Link>) {
    let notice = receive::<Notice>(&control).await;
    let gone = {
        // A group that has ended needs no notices.
        let Some(mesh) = mesh.upgrade() else { return };
        let peer = &mesh.peers[index];
        match notice {
            // Its lanes close too; a broadcast that still needs it ends by that.
            Ok(Notice::Left) => tracing::trace!(peer = peer.rank, "a member left"),
            Ok(Notice::Aborted(cause)) => {
                mesh.fail(cause);
            }
            Err(error) => {
                mesh.fail(lost(peer, "a member died or was cut off").caused_by(error));
            }
        }
        peer.gone.clone()
    };
    // Nothing more is said: what comes is the end.
    let _ = socket::read_exact(&control, &mut [0]).await;
    gone.cancel();
}

#[derive(Debug)]
struct TcpQueue {
    mesh: Arc<Mesh>,
    next: u64,
    order: Order,
}

#[async_trait]
impl CommunicatorQueue for TcpQueue {
    async fn enqueue(&mut self, ops: Vec<CollectiveOp>, stream: &Arc<dyn Stream>) -> Result<Event> {
        self.mesh.poison.check()?;
        let (mesh, number) = (self.mesh.clone(), self.next);
        let member = (mesh.rank, mesh.world_size);
        let run = |ops| super::broadcast::run(mesh, number, ops).boxed();
        let event = self.order.enqueue(member, ops, &**stream, run)?;
        self.next += 1;
        Ok(event)
    }
}

/// Does not keep the connections: a handle that outlives its queue must not look like a live member.
#[derive(Debug)]
struct TcpAbort {
    mesh: Weak<Mesh>,
    poison: Arc<Poison>,
}

impl AbortHandle for TcpAbort {
    fn abort(&self, cause: Error) {
        match self.mesh.upgrade() {
            Some(mesh) => drop(mesh.fail(cause)),
            None => drop(self.poison.set(cause.flattened())),
        }
    }

    fn poisoned(&self) -> Option<Error> {
        self.poison.get()
    }
}
