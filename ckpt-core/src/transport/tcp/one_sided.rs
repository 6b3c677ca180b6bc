//! Reads and writes of another process's memory: requests and answers on connections of their own.
//!
//! The owner serves them on tasks of the transport. After a read's bytes it says once more whether the region is still
//! registered, so that a reader never takes bytes of a region that was released meanwhile. Writes are in `write.rs`.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::try_join;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::{
    TcpTransport,
    link::Link,
    node::Node,
    socket::{Heard, read_exact, write_all},
    wire::{Hello, Id, Purpose, RangeRequest, broken, decode, encode, introduce},
};
use crate::{
    device::{Buffer, BufferSlice, Event, HostJob, OnAbort, host},
    error::{Error, ErrorKind, Key, Result},
    transport::{
        OneSided, ReadOp, Registration, RemoteRegion, Transfer, Way, WriteOp,
        regions::{Access, stale},
    },
};

/// One request asks for at most this much.
pub(super) const PIECE_BYTES: u64 = 4 << 20;
/// A connection that asks for nothing this long is closed.
pub(super) const IDLE_TIME: Duration = Duration::from_secs(300);
/// A peer that takes this long for one piece is gone.
pub(super) const PIECE_TIME: Duration = Duration::from_secs(60);
/// An owner that sends nothing this long, while it owes bytes or answers, is given up.
const SILENCE: Duration = Duration::from_secs(5);
/// Connections to one owner that wait for the next batch. A receiver has about as many batches under way.
const IDLE_CONNECTIONS: usize = 32;
/// Status and length before the bytes or the error's text.
const ANSWER_BYTES: usize = 16;
const ERROR_LIMIT: u64 = 1 << 16;

pub(super) const FINE: u64 = 0;
const FAILED: u64 = 1;

/// What [`RemoteRegion::descriptor`] holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Descriptor {
    /// Tells a restarted owner from the one that wrote this.
    id: Id,
    secret: [u8; 32],
}

/// Connections that wait for the next batch.
#[derive(Default)]
pub(super) struct Pool {
    idle: Mutex<HashMap<Line, Vec<Link>>>,
}

/// Whom a connection leads to, and whether it is for reads or writes.
type Line = (SocketAddr, Id, Way);

impl Pool {
    fn lock(&self) -> MutexGuard<'_, HashMap<Line, Vec<Link>>> {
        // Nothing that can panic runs under this lock.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, peer: &Line) -> Option<Link> {
        let mut idle = self.lock();
        let streams = idle.get_mut(peer)?;
        while let Some(stream) = streams.pop() {
            if stream.is_idle() {
                return Some(stream);
            }
        }
        idle.remove(peer);
        None
    }

    fn give(&self, peer: Line, stream: Link) {
        let mut idle = self.lock();
        let streams = idle.entry(peer).or_default();
        if streams.len() < IDLE_CONNECTIONS {
            streams.push(stream);
        }
    }
}

/// Answers one reader until it leaves.
pub(super) async fn serve(node: &Node, stream: &Link) {
    let mut request = [0; RangeRequest::BYTES];
    while let Ok(Ok(())) = tokio::time::timeout(IDLE_TIME, read_exact(stream, &mut request)).await {
        let answered = answer(node, stream, RangeRequest::decode(&request));
        match tokio::time::timeout(PIECE_TIME, answered).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return tracing::debug!(%error, "a reader left"),
            Err(_) => return tracing::warn!("a reader did not take its bytes in time"),
        }
    }
}

pub(super) fn answer_head(status: u64, len_bytes: u64) -> [u8; ANSWER_BYTES] {
    let mut head = [0; ANSWER_BYTES];
    head[..8].copy_from_slice(&status.to_le_bytes());
    head[8..].copy_from_slice(&len_bytes.to_le_bytes());
    head
}

async fn answer(node: &Node, stream: &Link, request: RangeRequest) -> io::Result<()> {
    let RangeRequest { generation, address, offset, len_bytes } = request;
    let found = if len_bytes <= PIECE_BYTES {
        node.regions.find(generation, address, offset, len_bytes)
    } else {
        Err(Error::new(
            ErrorKind::Corrupt,
            "read remote memory",
            format!("{len_bytes} bytes at once are too many"),
        ))
    };
    match found {
        Ok(slice) => {
            // SAFETY: `slice` keeps the memory mapped; an owner that changes registered memory gives up the region
            // first, and then the byte behind makes the reader throw these away.
            let bytes = unsafe { slice.as_slice() }.map_err(io::Error::other)?;
            write_all(stream, &answer_head(FINE, len_bytes), bytes).await?;
            write_all(stream, &[u8::from(node.regions.is_live(generation))], &[]).await
        }
        Err(error) => refuse(stream, &error).await,
    }
}

/// Says why a request failed.
pub(super) async fn refuse(stream: &Link, error: &Error) -> io::Result<()> {
    let text = encode(&error.flattened()).map_err(io::Error::other)?;
    write_all(stream, &answer_head(FAILED, text.len() as u64), &text).await
}

#[async_trait]
impl OneSided for TcpTransport {
    async fn register(&self, buffer: Arc<dyn Buffer>) -> Result<Arc<dyn Registration>> {
        self.serve(buffer, Access::Read)
    }

    fn post_read(&self, batch: Vec<ReadOp>, deadline: Instant) -> Result<Event> {
        self.post(Way::Read, "read", batch, deadline)
    }

    async fn register_writable(&self, buffer: Arc<dyn Buffer>) -> Result<Arc<dyn Registration>> {
        self.serve(buffer, Access::ReadWrite)
    }

    fn post_write(&self, batch: Vec<WriteOp>, deadline: Instant) -> Result<Event> {
        self.post(Way::Write, "write", batch, deadline)
    }
}

impl TcpTransport {
    fn serve(&self, buffer: Arc<dyn Buffer>, access: Access) -> Result<Arc<dyn Registration>> {
        let descriptor = encode(&Descriptor { id: self.node.id, secret: self.node.read_secret })?;
        self.node.regions.register(buffer, access, self.node.listens.to_string(), Bytes::from(descriptor))
    }

    fn post(
        &self,
        way: Way,
        label: &'static str,
        batch: Vec<impl Into<Transfer>>,
        deadline: Instant,
    ) -> Result<Event> {
        way.check_deadline(deadline)?;
        let mut owners = Owners::new();
        for op in batch {
            let transfer: Transfer = op.into();
            transfer.check_on_host(way)?;
            let owner = owner_of(way, &transfer.region)?;
            cut(&transfer, owners.entry(owner).or_default())?;
        }
        let node = self.node.clone();
        let run = Box::pin(async move { move_all(node, way, owners, deadline).await });
        host::submit_alone(&*self.node.device, HostJob { label, on_abort: OnAbort::Fails, run })
    }
}

/// What each owner is asked.
type Owners = HashMap<(SocketAddr, Descriptor), Vec<Piece>>;

fn owner_of(way: Way, region: &RemoteRegion) -> Result<(SocketAddr, Descriptor)> {
    let error = || {
        let what = "the region was not described by the transport `tcp`";
        Error::new(ErrorKind::ConfigInvalid, way.operation(), what).with(Key::Peer, &region.peer)
    };
    let address = region.peer.parse().map_err(|e: std::net::AddrParseError| error().caused_by(e))?;
    let descriptor = decode(&region.descriptor).map_err(|e| error().caused_by(e))?;
    Ok((address, descriptor))
}

/// One request.
pub(super) struct Piece {
    pub(super) request: RangeRequest,
    /// Where the bytes go, or come from.
    pub(super) memory: BufferSlice,
}

fn cut(transfer: &Transfer, pieces: &mut Vec<Piece>) -> Result<()> {
    let Transfer { region, offset, memory } = transfer;
    let len = memory.len_bytes();
    let mut start = 0;
    // An empty request still asks whether the region is there.
    while start < len || (len == 0 && start == 0) {
        let end = len.min(start + PIECE_BYTES);
        let request = RangeRequest {
            generation: region.generation,
            address: region.address,
            offset: offset + start,
            len_bytes: end - start,
        };
        pieces.push(Piece { request, memory: memory.slice(start..end)? });
        if len == 0 {
            break;
        }
        start = end;
    }
    Ok(())
}

async fn move_all(node: Arc<Node>, way: Way, owners: Owners, deadline: Instant) -> Result<()> {
    let operation = way.operation();
    let mut tasks = JoinSet::new();
    for ((address, descriptor), pieces) in owners {
        let lanes = node.lanes.min(pieces.len());
        let mut shares: Vec<Vec<Piece>> = (0..lanes).map(|_| Vec::new()).collect();
        for (index, piece) in pieces.into_iter().enumerate() {
            shares[index % lanes].push(piece);
        }
        for share in shares {
            let (node, descriptor) = (node.clone(), descriptor.clone());
            tasks.spawn(async move {
                let moved = move_share(&node, way, address, descriptor, share).await;
                moved.map_err(|e| e.with(Key::Peer, address))
            });
        }
    }
    let all = async {
        while let Some(task) = tasks.join_next().await {
            task.map_err(|e| Error::new(ErrorKind::Internal, operation, "a task ended").caused_by(e))
                .flatten()?;
        }
        Ok(())
    };
    let outcome = tokio::time::timeout_at(deadline.into(), all).await.unwrap_or_else(|_| {
        Err(Error::new(ErrorKind::Timeout, operation, "the bytes did not arrive by the deadline"))
    });
    if outcome.is_err() {
        // No task touches the batch's memory after this.
        tasks.shutdown().await;
    }
    outcome
}

/// Moves `share` over one connection, which goes back to the pool only if all went well.
async fn move_share(
    node: &Node,
    way: Way,
    address: SocketAddr,
    descriptor: Descriptor,
    share: Vec<Piece>,
) -> Result<()> {
    let line = (address, descriptor.id, way);
    let heard = node.heard(address);
    let stream = match node.pool.take(&line) {
        Some(stream) => stream,
        None => {
            let meet = async {
                let stream = node.dial(address).await?;
                let (rank, world_size, epoch) = (0, 0, 0);
                let purpose = if way == Way::Read { Purpose::Read } else { Purpose::Write };
                let hello = Hello { id: descriptor.id, rank, world_size, epoch, purpose };
                introduce(&stream, &node.key(&descriptor.secret), &hello).await?;
                Ok::<_, Error>(stream)
            };
            heard.unless_silent(SILENCE, async { Ok(meet.await) }).await.map_err(|e| lost(way, e))??
        }
    };
    match way {
        Way::Read => read(&stream, &share, &heard).await?,
        Way::Write => super::write::write(&stream, &share, &heard).await?,
    }
    node.pool.give(line, stream);
    Ok(())
}

fn lost(way: Way, error: io::Error) -> Error {
    if error.kind() != io::ErrorKind::TimedOut {
        return broken(error);
    }
    let text =
        format!("the owner owes bytes and has sent none for {} s; it may be stopped", SILENCE.as_secs());
    Error::new(ErrorKind::PeerLost, way.operation(), text)
}

async fn read(stream: &Link, share: &[Piece], heard: &Heard) -> Result<()> {
    let ask = async {
        let requests: Vec<u8> = share.iter().flat_map(|piece| piece.request.encode()).collect();
        write_all(stream, &requests, &[]).await.map_err(broken)
    };
    let take = async {
        for piece in share {
            take_piece(stream, piece, heard).await?;
        }
        Ok(())
    };
    try_join(ask, take).await.map(drop)
}

async fn take_piece(stream: &Link, piece: &Piece, heard: &Heard) -> Result<()> {
    let answer = take_answer(Way::Read, stream, heard).await?;
    if answer != piece.memory.len_bytes() {
        return Err(Error::new(
            ErrorKind::Corrupt,
            Way::Read.operation(),
            "the owner's answer does not fit the request",
        ));
    }
    // SAFETY: the destination belongs to this read until its event has completed, pieces do not overlap, and `piece`
    // keeps the memory mapped.
    let bytes = unsafe { piece.memory.as_mut_slice() }?;
    let lost = |error| lost(Way::Read, error);
    heard.read(stream, bytes, SILENCE).await.map_err(lost)?;
    let mut live = [0];
    heard.read(stream, &mut live, SILENCE).await.map_err(lost)?;
    if live == [1] { Ok(()) } else { Err(stale(Way::Read, piece.request.generation)) }
}

/// The length in an answer that says that all is well, or the owner's error.
pub(super) async fn take_answer(way: Way, stream: &Link, heard: &Heard) -> Result<u64> {
    let lost = |error| lost(way, error);
    let mut head = [0; ANSWER_BYTES];
    heard.read(stream, &mut head, SILENCE).await.map_err(lost)?;
    let word = |range: std::ops::Range<usize>| {
        let mut le = [0; 8];
        le.copy_from_slice(&head[range]);
        u64::from_le_bytes(le)
    };
    let (status, len) = (word(0..8), word(8..16));
    if status == FINE {
        return Ok(len);
    }
    if status == FAILED && len <= ERROR_LIMIT {
        let mut text = vec![0; len as usize];
        heard.read(stream, &mut text, SILENCE).await.map_err(lost)?;
        return Err(decode::<Error>(&text)?);
    }
    Err(Error::new(ErrorKind::Corrupt, way.operation(), "the owner's answer does not fit the request"))
}
