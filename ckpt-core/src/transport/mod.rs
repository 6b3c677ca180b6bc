//! The transport seam: broadcasts in a group (collective facet), reads and writes of remote memory (one-sided facet).

pub mod endings;
mod group;
pub mod library;
pub mod local;
mod poison;
mod regions;
mod registry;
pub mod tcp;
mod transfer;

use std::{fmt, sync::Arc, time::Instant};

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use registry::{AUTO, Probe, Registry, Requirement, TransportConfig, TransportProvider};
pub use transfer::{Transfer, Way};

use crate::{
    device::{Buffer, BufferSlice, Event, Stream},
    error::{Error, ErrorKind, Result},
    types::Epoch,
};

/// What a transport can do; asked before planning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Capability {
    /// It broadcasts in groups.
    pub collective: bool,
    /// It reads remote regions.
    pub one_sided: bool,
    /// It writes remote regions as well.
    pub one_sided_write: bool,
    /// It reaches other processes.
    pub across_processes: bool,
    /// It reaches other hosts.
    pub across_hosts: bool,
    /// It encrypts what leaves the host where the job has TLS.
    pub encrypts: bool,
    /// The device kinds whose streams it enqueues on, `host`, `cuda`, `ascend`.
    pub devices: &'static [&'static str],
}

/// The unit that is registered, chosen and benchmarked.
pub trait Transport: Send + Sync + fmt::Debug {
    /// `local`, `tcp`, `nccl`, `hccl`, `mooncake`, `rdma`, `ucx`.
    fn name(&self) -> &'static str;
    /// What it can do here.
    fn capability(&self) -> Capability;
    /// The collective facet.
    fn collective(&self) -> Option<&dyn Collective>;
    /// The one-sided facet.
    fn one_sided(&self) -> Option<&dyn OneSided>;
}

/// One member's view of a group that is to be formed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupSpec {
    /// Made by group rank 0 with [`Collective::create_token`], told to all members by the control plane.
    pub token: Bytes,
    /// This member's number in the group, not in the world.
    pub rank: u32,
    /// Members.
    pub world_size: u32,
    /// The epoch that the group belongs to.
    pub epoch: Epoch,
}

/// Forms groups.
#[async_trait]
pub trait Collective: Send + Sync {
    /// What the others need to find group rank 0. Only group rank 0 calls it, and must call `join` afterwards.
    async fn create_token(&self) -> Result<Bytes>;
    /// Joins; returns when all members are connected and links are warm.
    async fn join(&self, group: GroupSpec, deadline: Instant) -> Result<Communicator>;
}

/// A formed group. Two objects, so that abort works while a call is inside the queue.
#[derive(Debug)]
pub struct Communicator {
    /// Where operations go; one caller.
    pub queue: Box<dyn CommunicatorQueue>,
    /// Ends it from any thread.
    pub abort: Arc<dyn AbortHandle>,
}

/// One broadcast: on the root `buffer` is the source, on others the destination. Lengths are equal on all members.
#[derive(Clone, Debug)]
pub struct CollectiveOp {
    /// The source's number in the group.
    pub root: u32,
    /// This member's bytes.
    pub buffer: BufferSlice,
}

/// Enqueues groups of broadcasts.
#[async_trait]
pub trait CommunicatorQueue: Send + fmt::Debug {
    /// Enqueues `ops` as one group on `stream`; every member must enqueue the same groups in the same order.
    /// Returns when the work is really on the stream; the event completes when this member's bytes are there.
    /// Enqueuing a receive offers its range: the bytes may be written from then on. Work that is put on the stream later
    /// need not wait for the group: who needs its bytes waits for the event.
    async fn enqueue(&mut self, ops: Vec<CollectiveOp>, stream: &Arc<dyn Stream>) -> Result<Event>;
}

/// Ends a communicator. Any thread, idempotent, never blocks for long.
pub trait AbortHandle: Send + Sync + fmt::Debug {
    /// Poisons the communicator and frees whoever waits in it. The first cause stays.
    fn abort(&self, cause: Error);
    /// The cause, once poisoned or once the library reported an asynchronous error. A completion counts only if this
    /// is `None` after the completion was seen.
    fn poisoned(&self) -> Option<Error>;
}

/// Memory of another process, as its owner described it. Opaque to all but the transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteRegion {
    /// The owner's address in this transport's own form.
    pub peer: String,
    /// Address of the first byte in the owner.
    pub address: u64,
    /// Bytes.
    pub len_bytes: u64,
    /// Raised whenever the owner re-registers this memory; checked before and after a transfer.
    pub generation: u64,
    /// Keys, GIDs, queue pairs: whatever the transport needs.
    pub descriptor: Bytes,
}

/// One read.
#[derive(Clone, Debug)]
pub struct ReadOp {
    /// Whose memory.
    pub region: Arc<RemoteRegion>,
    /// Bytes from the region's start.
    pub offset: u64,
    /// Where to; its length is the read's.
    pub into: BufferSlice,
}

/// One write.
#[derive(Clone, Debug)]
pub struct WriteOp {
    /// Whose memory; registered with [`OneSided::register_writable`].
    pub region: Arc<RemoteRegion>,
    /// Bytes from the region's start.
    pub offset: u64,
    /// Where from; its length is the write's.
    pub from: BufferSlice,
}

/// Memory that peers can read, or also write, until this is dropped. From then on no byte of a peer arrives (over Mooncake
/// one that is under way may), and a peer whose bytes came too late learns that they did not count.
pub trait Registration: Send + Sync + fmt::Debug {
    /// What to tell them.
    fn region(&self) -> &RemoteRegion;
}

/// Reads and writes remote memory without attention of the owner's code.
#[async_trait]
pub trait OneSided: Send + Sync {
    /// Makes `buffer` readable by peers.
    async fn register(&self, buffer: Arc<dyn Buffer>) -> Result<Arc<dyn Registration>>;
    /// Starts a batch of reads; the event completes when all bytes are there, or fails by `deadline`; none is started
    /// after it. The batch owns its memory until it is retired, also when the event is dropped.
    fn post_read(&self, batch: Vec<ReadOp>, deadline: Instant) -> Result<Event>;
    /// Makes `buffer` readable and writable by peers. Refused by transports that cannot write.
    async fn register_writable(&self, _buffer: Arc<dyn Buffer>) -> Result<Arc<dyn Registration>> {
        Err(cannot_write("register memory"))
    }
    /// Starts a batch of writes; the event completes when all bytes are in the owners' memory, or fails by `deadline`.
    /// After a failure any part of them may have arrived. Otherwise as [`Self::post_read`].
    fn post_write(&self, _batch: Vec<WriteOp>, _deadline: Instant) -> Result<Event> {
        Err(cannot_write("write remote memory"))
    }
}

fn cannot_write(operation: &'static str) -> Error {
    Error::new(ErrorKind::Unsupported, operation, "this transport reads remote memory only; choose another")
}
