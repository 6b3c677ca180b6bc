//! A group on several hosts: copies inside each, and NCCL along rails.
//!
//! A broadcast from a root on this host is copied to the neighbours as it is, and beside that sent along the root's rail.
//! One from another host comes along the rail of its root to the member with that number here, who copies it on to the
//! neighbours. So a member has up to three things to do for a group, always in this order: copies from roots on this
//! host, its rail's NCCL group, copies of what came along rails. Every member finds them in the list of operations, so
//! members of a host agree on the copies, and members of a rail on NCCL's.

use std::{
    any::Any,
    fmt,
    ops::Range,
    sync::{Arc, OnceLock},
    time::Instant,
};

use async_trait::async_trait;
use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{Event, EventState, Stream},
    transport::{AbortHandle, CollectiveOp, Communicator, CommunicatorQueue},
};
use futures_util::future::try_join_all;

use super::layout::Rails;
use crate::{
    communicator::check_op,
    ipc::{Behind, LONG, Queue, check_stream},
};

const OPERATION: &str = "broadcast";

/// Makes one group of a host's and a rail's.
pub(super) fn communicator(rails: Rails, node: Queue, rail: Communicator) -> Communicator {
    let parts = Arc::new(Parts {
        rank: rails.rank,
        cause: OnceLock::new(),
        node: node.abort_handle(),
        rail: rail.abort,
    });
    let queue = RailsQueue { rails, node, rail: rail.queue, parts: parts.clone(), under_way: Vec::new() };
    Communicator { queue: Box::new(queue), abort: parts }
}

/// The ends of both parts. Neither outlives the other.
#[derive(Debug)]
struct Parts {
    rank: u32,
    cause: OnceLock<Error>,
    node: Arc<dyn AbortHandle>,
    rail: Arc<dyn AbortHandle>,
}

impl AbortHandle for Parts {
    fn abort(&self, cause: Error) {
        let first = self.cause.get_or_init(|| cause).clone();
        // The host's part first: it tells the neighbours nothing more from here on, so no bytes of a kernel that the
        // rail's abort cuts short are taken for good.
        self.node.abort(first.clone());
        self.rail.abort(first);
    }

    fn poisoned(&self) -> Option<Error> {
        if self.cause.get().is_none() {
            // The host's part calls members what the group calls them; NCCL names this member by its number on the rail.
            let of_rail = || Some(self.rail.poisoned()?.renamed(Key::Rank, |_| self.rank.to_string()));
            self.abort(self.node.poisoned().or_else(of_rail)?);
        }
        self.cause.get().cloned()
    }
}

/// Bytes of a group that is not known to be done.
struct UnderWay {
    ranges: Vec<(Range<u64>, bool)>,
    done: Event,
}

impl fmt::Debug for UnderWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnderWay").field("ranges", &self.ranges).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct RailsQueue {
    rails: Rails,
    node: Queue,
    rail: Box<dyn CommunicatorQueue>,
    parts: Arc<Parts>,
    under_way: Vec<UnderWay>,
}

/// What a member does for one group.
#[derive(Debug, Default)]
struct Work {
    /// Broadcasts from roots on this host, with their numbers there.
    own: Vec<CollectiveOp>,
    /// Broadcasts along this member's rail, with the roots' hosts.
    rail: Vec<CollectiveOp>,
    /// Broadcasts from other hosts, with the numbers of those who get them here.
    forwarded: Vec<CollectiveOp>,
}

impl Work {
    fn of(rails: &Rails, ops: Vec<CollectiveOp>) -> Result<Self> {
        let mut work = Self::default();
        for op in ops {
            check_op(&op, rails.world_size())?;
            let Some((host, index)) = rails.place(op.root) else { continue };
            let by = |root| CollectiveOp { root, buffer: op.buffer.clone() };
            if index == rails.index() {
                work.rail.push(by(host));
            }
            if host == rails.host() { &mut work.own } else { &mut work.forwarded }.push(by(index));
        }
        Ok(work)
    }
}

impl RailsQueue {
    /// Until no earlier group touches bytes that this one writes, or writes bytes that this one touches: what is under way
    /// by copies does not hold up the stream on which NCCL's kernels stand.
    async fn settle(&mut self, ranges: &[(Range<u64>, bool)]) -> Result<()> {
        let mut rest = Vec::new();
        for group in std::mem::take(&mut self.under_way) {
            let conflict = group.ranges.iter().any(|(a, a_written)| {
                let meets = |(b, b_written): &(Range<u64>, bool)| {
                    (*a_written || *b_written) && a.start < b.end && b.start < a.end
                };
                ranges.iter().any(meets)
            });
            if conflict {
                group.done.done(Instant::now() + LONG).await?;
            } else if !group.done.is_complete()? {
                rest.push(group);
            }
        }
        self.under_way = rest;
        Ok(())
    }

    async fn enqueue_parts(&mut self, work: Work, stream: &Arc<dyn Stream>) -> Result<Vec<Event>> {
        let mut parts = Vec::new();
        let before = stream.record()?;
        if !work.own.is_empty() {
            let behind = Behind { free: before.clone(), ready: before.clone(), source: None };
            parts.push(self.node.enqueue_behind(work.own, behind)?);
        }
        let mut came = before.clone();
        if !work.rail.is_empty() {
            came = self.rail.enqueue(work.rail, stream).await?;
            parts.push(came.clone());
        }
        if !work.forwarded.is_empty() {
            // The neighbours' ranges are none of the rail's: they are on offer before its kernels end.
            let behind = Behind { free: before.clone(), ready: came, source: Some(self.parts.clone()) };
            parts.push(self.node.enqueue_behind(work.forwarded, behind)?);
        }
        if parts.is_empty() {
            parts.push(before);
        }
        Ok(parts)
    }
}

#[async_trait]
impl CommunicatorQueue for RailsQueue {
    async fn enqueue(&mut self, ops: Vec<CollectiveOp>, stream: &Arc<dyn Stream>) -> Result<Event> {
        if let Some(cause) = self.parts.poisoned() {
            return Err(Error::new(ErrorKind::Aborted, OPERATION, "the group was aborted").caused_by(cause));
        }
        check_stream(stream)?;
        let ranges: Vec<(Range<u64>, bool)> = ops
            .iter()
            .map(|op| {
                let start = op.buffer.address();
                (start..start + op.buffer.len_bytes(), op.root != self.rails.rank)
            })
            .collect();
        let work = Work::of(&self.rails, ops)?;
        // From here on the others count on this group: what is not enqueued whole ends the communicator.
        let unfinished = AbortUnlessDone(Some(self.parts.clone()));
        let enqueued = match self.settle(&ranges).await {
            Ok(()) => self.enqueue_parts(work, stream).await,
            Err(error) => Err(error),
        };
        let events = enqueued.map_err(|error| {
            let first = self.parts.poisoned().unwrap_or(error);
            self.parts.abort(first.clone());
            first
        })?;
        unfinished.done();
        let done = Event::new(AllDone { events, parts: self.parts.clone() });
        self.under_way.push(UnderWay { ranges, done: done.clone() });
        Ok(done)
    }
}

struct AbortUnlessDone(Option<Arc<Parts>>);

impl AbortUnlessDone {
    fn done(mut self) {
        self.0 = None;
    }
}

impl Drop for AbortUnlessDone {
    fn drop(&mut self) {
        if let Some(parts) = self.0.take() {
            parts.abort(Error::new(ErrorKind::Aborted, OPERATION, "a group was enqueued in part only"));
        }
    }
}

/// Completes when all parts of a group have.
#[derive(Debug)]
struct AllDone {
    events: Vec<Event>,
    parts: Arc<Parts>,
}

impl AllDone {
    /// A part that failed ends the other. A deadline that passed is none.
    fn failed(&self, error: Error) -> Error {
        self.parts.poisoned().unwrap_or(error)
    }
}

#[async_trait]
impl EventState for AllDone {
    fn is_complete(&self) -> Result<bool> {
        let mut complete = true;
        for event in &self.events {
            complete &= event.is_complete().map_err(|error| self.failed(error))?;
        }
        Ok(complete)
    }

    async fn done(&self, deadline: Instant) -> Result<()> {
        // All at once: one that never ends must not hide that another has failed.
        let waits = self.events.iter().map(|event| event.done(deadline));
        try_join_all(waits).await.map(drop).map_err(|error| self.failed(error))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
