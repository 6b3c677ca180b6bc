//! A group whose members only talk: for transports that move the bytes another way and need to agree when.

use std::{
    marker::PhantomData,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::DropGuard;

use super::{
    join,
    mesh::{Mesh, lost},
    node::Node,
    socket,
    wire::{Notice, Token, frame},
};
use crate::{
    error::{Error, ErrorKind, Result},
    transport::{GroupSpec, TransportConfig, group::check_spec},
};

/// Messages of all peers that nobody has looked at; then their connections have to wait.
const WAITING: usize = 1024;
/// How long the cause of a broken connection may take to come by another way.
const REASON_TIME: Duration = Duration::from_millis(500);

/// Forms groups of members that send each other messages, over connections like those of the transport `tcp`: both sides
/// have proved that they know the job's secret and the group's, and a death is seen at once.
pub struct Messenger {
    node: Arc<Node>,
    _stop: DropGuard,
}

impl std::fmt::Debug for Messenger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Messenger").field("listens", &self.node.listens).finish_non_exhaustive()
    }
}

impl Messenger {
    /// Must be called in a tokio runtime, on which the listener is then served.
    pub fn open(config: &TransportConfig) -> Result<Self> {
        let node = Node::start(&TransportConfig { connections: 1, ..config.clone() })?;
        let stop = node.stop.clone().drop_guard();
        Ok(Self { node, _stop: stop })
    }

    /// See [`crate::transport::Collective::create_token`].
    pub fn create_token(&self) -> Result<Bytes> {
        let listens: SocketAddr = self.node.listens;
        let token = Token::new(listens)?;
        self.node.expect(&token);
        token.encode()
    }

    /// Joins; returns when all members are connected. What is heard is of type `T` on all members. Errors call member n
    /// `names[n]`, or n where there are no names: this group may be a part of a larger one.
    pub async fn join<T: DeserializeOwned + Send + 'static>(
        &self,
        group: &GroupSpec,
        names: &[u32],
        deadline: Instant,
    ) -> Result<(Talk, Heard<T>)> {
        check_spec(group)?;
        let mesh = join::join(&self.node, group, names, deadline).await?;
        let mut outgoing: Vec<_> = (0..group.world_size).map(|_| None).collect();
        let (sender, messages) = mpsc::channel(WAITING);
        let mut readers = JoinSet::new();
        for (index, peer) in mesh.peers.iter().enumerate() {
            let (out, inbox) = mpsc::unbounded_channel();
            outgoing[peer.rank as usize] = Some(out);
            tokio::spawn(write(mesh.clone(), index, inbox));
            readers.spawn(read(mesh.clone(), index, sender.clone()));
        }
        let talk = Talk { mesh, names: names.into(), outgoing: Arc::new(Mutex::new(outgoing)) };
        Ok((talk, Heard { messages, _readers: readers, _of: PhantomData }))
    }
}

type Outgoing = Vec<Option<mpsc::UnboundedSender<Vec<u8>>>>;

/// A member's voice in its group. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Talk {
    mesh: Arc<Mesh>,
    names: Arc<[u32]>,
    /// By member; `None` for this one and for those that it has taken leave of.
    outgoing: Arc<Mutex<Outgoing>>,
}

impl Talk {
    /// This member's number.
    pub fn rank(&self) -> u32 {
        self.mesh.rank
    }

    /// What errors call member `rank`.
    pub fn name(&self, rank: u32) -> u32 {
        self.names.get(rank as usize).copied().unwrap_or(rank)
    }

    /// Members.
    pub fn world_size(&self) -> u32 {
        self.mesh.world_size
    }

    fn outgoing(&self) -> MutexGuard<'_, Outgoing> {
        // Nothing that can panic runs under this lock.
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends `message` to member `to`, behind what was sent before; never waits. One who has left hears nothing.
    pub fn send(&self, to: u32, message: &impl Serialize) -> Result<()> {
        let bytes = frame(message)?;
        if let Some(Some(out)) = self.outgoing().get(to as usize) {
            let _ = out.send(bytes);
        }
        Ok(())
    }

    /// Poisons the group and tells the others why; answers the first cause.
    pub fn fail(&self, cause: Error) -> Error {
        self.mesh.fail(cause)
    }

    /// The cause, once poisoned here or by another member, or once one died.
    pub fn poisoned(&self) -> Option<Error> {
        self.mesh.poison.get()
    }

    /// Waits until there is a cause. Cancel safe.
    pub async fn failed(&self) -> Error {
        self.mesh.poison.wait().await
    }

    /// Poisons the group because member `peer` has closed its end too early; a cause that comes from elsewhere within a
    /// moment is the better one.
    pub async fn lost(&self, peer: u32) -> Error {
        if let Ok(cause) = tokio::time::timeout(REASON_TIME, self.failed()).await {
            return cause;
        }
        let cause = match self.mesh.peers.iter().find(|p| p.rank == peer) {
            Some(peer) => lost(peer, "a member left in the middle"),
            None => Error::new(ErrorKind::Internal, "talk to a peer", "there is no such member"),
        };
        self.fail(cause)
    }

    /// Tells member `peer`, behind all messages, that this one needs it no more. [`Talk::gone`] is the other side of it.
    pub fn leave(&self, peer: u32) {
        if let Some(out) = self.outgoing().get_mut(peer as usize) {
            *out = None;
        }
    }

    /// Completes when member `peer` has taken leave of this one, or is dead. Cancel safe.
    pub async fn gone(&self, peer: u32) {
        if let Some(peer) = self.mesh.peers.iter().find(|p| p.rank == peer) {
            peer.gone.cancelled().await;
        }
    }
}

/// What the other members say.
#[derive(Debug)]
pub struct Heard<T> {
    messages: mpsc::Receiver<(u32, Option<Vec<u8>>)>,
    /// Ended with this value: they hold the connections.
    _readers: JoinSet<()>,
    _of: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Heard<T> {
    /// The next message and who sent it; `None` in its place once that member has closed its end. Cancel safe. Never
    /// completes after the last member has.
    pub async fn next(&mut self) -> (u32, Option<Result<T>>) {
        match self.messages.recv().await {
            Some((peer, message)) => (peer, message.map(|bytes| super::wire::decode(&bytes))),
            None => std::future::pending().await,
        }
    }
}

async fn read(mesh: Arc<Mesh>, index: usize, messages: mpsc::Sender<(u32, Option<Vec<u8>>)>) {
    let peer = &mesh.peers[index];
    // An error is the end, whatever its reason: the control connection knows more.
    while let Ok(message) = super::wire::receive_frame(&peer.lanes[0], super::wire::FRAME_LIMIT).await {
        if messages.send((peer.rank, Some(message))).await.is_err() {
            return;
        }
    }
    let _ = messages.send((peer.rank, None)).await;
}

/// Writes until nothing more will come; then takes leave.
async fn write(mesh: Arc<Mesh>, index: usize, mut inbox: mpsc::UnboundedReceiver<Vec<u8>>) {
    let peer = &mesh.peers[index];
    let mut broken = false;
    while let Some(message) = inbox.recv().await {
        // After an abort the lane is shut; the control connection tells the rest.
        broken = broken || socket::write_all(&peer.lanes[0], &message, &[]).await.is_err();
    }
    let _telling = mesh.telling();
    if mesh.poison.get().is_none()
        && let Ok(bytes) = frame(&Notice::Left)
    {
        let _ = peer.control.send_now(&bytes);
    }
    peer.lanes[0].finish();
    peer.control.finish();
}
