//! One group: a task that pairs offers with bytes, and what it takes to end well.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Instant,
};

use async_trait::async_trait;
use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{Buffer, DeviceBackend, Event, RawStream, Stream},
    transport::{
        AbortHandle, CollectiveOp, Communicator, CommunicatorQueue,
        tcp::{Heard, Talk},
    },
};
use tokio::{sync::mpsc, task::JoinSet};

use super::{
    event::{Done, GroupEvent},
    lend::{self, Lender},
    message::{Message, Place, ProcessId},
    transport::LONG,
};
use crate::{
    communicator::check_op,
    device::{Context, memory::Block},
};

const OPERATION: &str = "broadcast";

/// What one member brings into a group.
pub(super) struct Member {
    pub(super) talk: Talk,
    pub(super) device: Arc<dyn DeviceBackend>,
    pub(super) context: Arc<Context>,
    pub(super) process: ProcessId,
    pub(super) host: u64,
}

/// What a group waits for on this member.
#[derive(Clone, Debug)]
pub(crate) struct Behind {
    /// Complete when nothing uses the ranges any more that this member receives.
    pub(crate) free: Event,
    /// Complete when the bytes are there that it sends.
    pub(crate) ready: Event,
    /// Who brought these bytes here: they count, and others are told of them, only if it is healthy after `ready`.
    pub(crate) source: Option<Arc<dyn AbortHandle>>,
}

/// A group of broadcasts for the task.
struct Job {
    ops: Vec<CollectiveOp>,
    behind: Behind,
    done: Done,
}

/// Starts the task of a connected group; it lives until its queue is dropped or the group is aborted, and then until all
/// others have let go of this member's memory.
pub(super) fn start(member: Member, heard: Heard<Message>) -> Result<Queue> {
    let Member { talk, device, context, process, host } = member;
    // Copies to different peers do not wait for each other.
    let streams = (0..talk.world_size()).map(|_| device.stream("push")).collect::<Result<Vec<_>>>()?;
    let (lender, returns) = Lender::new(context.clone(), process, host);
    let (jobs, inbox) = mpsc::unbounded_channel();
    let task = Task {
        talk: talk.clone(),
        process,
        host,
        streams,
        next: 0,
        groups: BTreeMap::new(),
        offers: BTreeMap::new(),
        mappings: HashMap::new(),
        lender,
        left: BTreeSet::new(),
        tasks: JoinSet::new(),
        context,
        _device: device,
    };
    tokio::spawn(task.run(inbox, heard, returns));
    Ok(Queue { talk, jobs })
}

/// Where a group's broadcasts go.
#[derive(Debug)]
pub(crate) struct Queue {
    talk: Talk,
    jobs: mpsc::UnboundedSender<Job>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("ops", &self.ops.len()).finish_non_exhaustive()
    }
}

impl Queue {
    /// The group's end.
    pub(crate) fn abort_handle(&self) -> Arc<dyn AbortHandle> {
        Arc::new(Abort(self.talk.clone()))
    }

    pub(crate) fn communicator(self) -> Communicator {
        let abort = self.abort_handle();
        Communicator { queue: Box::new(self), abort }
    }

    /// Enqueues a group that waits for `behind` instead of a stream.
    pub(crate) fn enqueue_behind(&self, ops: Vec<CollectiveOp>, behind: Behind) -> Result<Event> {
        let ended = |talk: &Talk| {
            let cause = talk
                .poisoned()
                .unwrap_or_else(|| Error::new(ErrorKind::Internal, OPERATION, "the group's task has ended"));
            Err(Error::new(ErrorKind::Aborted, OPERATION, "the group was aborted").caused_by(cause))
        };
        if self.talk.poisoned().is_some() {
            return ended(&self.talk);
        }
        ops.iter().try_for_each(|op| check_op(op, self.talk.world_size()))?;
        let (done, event) = GroupEvent::new();
        match self.jobs.send(Job { ops, behind, done }) {
            Ok(()) => Ok(Event::new(event)),
            Err(_) => ended(&self.talk),
        }
    }
}

#[async_trait]
impl CommunicatorQueue for Queue {
    /// Work that is put on `stream` later does not wait for the group: who needs its bytes waits for the event.
    async fn enqueue(&mut self, ops: Vec<CollectiveOp>, stream: &Arc<dyn Stream>) -> Result<Event> {
        check_stream(stream)?;
        let before = stream.record()?;
        self.enqueue_behind(ops, Behind { free: before.clone(), ready: before, source: None })
    }
}

/// A stream of another device would be taken for one of CUDA's.
pub(crate) fn check_stream(stream: &Arc<dyn Stream>) -> Result<()> {
    if matches!(stream.raw(), RawStream::Cuda(_)) {
        return Ok(());
    }
    let message = "this transport enqueues on CUDA streams only";
    Err(Error::new(ErrorKind::Unsupported, OPERATION, message))
}

/// Ends a group from any thread.
#[derive(Debug)]
struct Abort(Talk);

impl AbortHandle for Abort {
    fn abort(&self, cause: Error) {
        self.0.fail(cause);
    }

    fn poisoned(&self) -> Option<Error> {
        self.0.poisoned()
    }
}

/// A group that is not done here.
struct Group {
    ops: Vec<CollectiveOp>,
    behind: Behind,
    /// Its ranges are free, as the host saw it.
    is_free: bool,
    /// No earlier group touches the same bytes any more.
    is_started: bool,
    is_offered: bool,
    /// Members whose bytes have not come.
    unwritten: BTreeSet<u32>,
    /// Members that do not have this one's bytes.
    unpushed: BTreeSet<u32>,
    done: Done,
}

impl Group {
    /// Whether both touch some byte that one of them writes.
    fn conflicts(&self, other: &Self, rank: u32) -> bool {
        let range = |op: &CollectiveOp| op.buffer.address()..op.buffer.address() + op.buffer.len_bytes();
        let overlap = |a: &CollectiveOp, b: &CollectiveOp| {
            let (left, right) = (range(a), range(b));
            let written = a.root != rank || b.root != rank;
            written && left.start < right.end && right.start < left.end
        };
        self.ops.iter().any(|a| other.ops.iter().any(|b| overlap(a, b)))
    }
}

/// A block of another member.
enum Mapping {
    Opening,
    Open(Arc<dyn Buffer>),
}

/// What the task waits for besides messages.
enum Step {
    Free(u64, Result<()>),
    Pushed { group: u64, peer: u32, result: Result<()> },
    Opened { peer: u32, block: u64, result: Result<Arc<dyn Buffer>> },
    Closed { peer: u32, block: u64 },
    Nothing,
}

struct Task {
    talk: Talk,
    process: ProcessId,
    host: u64,
    /// By peer.
    streams: Vec<Arc<dyn Stream>>,
    next: u64,
    groups: BTreeMap<u64, Group>,
    /// Offers whose group has not been enqueued here, or whose block is not mapped yet.
    offers: BTreeMap<(u64, u32), Vec<Place>>,
    mappings: HashMap<(u32, u64), Mapping>,
    lender: Lender,
    /// Members that have closed their end.
    left: BTreeSet<u32>,
    tasks: JoinSet<Step>,
    context: Arc<Context>,
    /// Keeps the context alive; the last field, so dropped last.
    _device: Arc<dyn DeviceBackend>,
}

impl Task {
    async fn run(
        mut self,
        mut jobs: mpsc::UnboundedReceiver<Job>,
        mut heard: Heard<Message>,
        mut returns: mpsc::UnboundedReceiver<Arc<Block>>,
    ) {
        let outcome = self.serve(&mut jobs, &mut heard, &mut returns).await;
        if let Err(error) = outcome {
            let cause = self.talk.fail(error);
            for (_, group) in std::mem::take(&mut self.groups) {
                group.done.send_replace(Some(Err(cause.clone())));
            }
            jobs.close();
            while let Ok(job) = jobs.try_recv() {
                job.done.send_replace(Some(Err(cause.clone())));
            }
        }
        drop(jobs);
        self.close(heard, &mut returns).await;
    }

    /// Until the queue is dropped and everything is done, or something fails.
    async fn serve(
        &mut self,
        jobs: &mut mpsc::UnboundedReceiver<Job>,
        heard: &mut Heard<Message>,
        returns: &mut mpsc::UnboundedReceiver<Arc<Block>>,
    ) -> Result<()> {
        let talk = self.talk.clone();
        let mut open = true;
        while open || !self.groups.is_empty() {
            tokio::select! {
                biased;
                cause = talk.failed() => return Err(cause),
                Some(step) = self.tasks.join_next() => {
                    let step = step.map_err(|e| {
                        Error::new(ErrorKind::Internal, OPERATION, "a step of a group panicked").caused_by(e)
                    });
                    self.step(step?)?;
                }
                (peer, message) = heard.next() => match message {
                    Some(message) => self.told(peer, message?)?,
                    None => self.closed_by(peer).await?,
                },
                Some(block) = returns.recv() => self.returned(block)?,
                job = jobs.recv(), if open => match job {
                    Some(job) => self.enqueue(job)?,
                    None => open = false,
                },
            }
        }
        Ok(())
    }

    fn enqueue(&mut self, job: Job) -> Result<()> {
        let number = self.next;
        self.next += 1;
        let rank = self.talk.rank();
        let Job { ops, behind, done } = job;
        let roots: BTreeSet<u32> = ops.iter().map(|op| op.root).collect();
        let peers = (0..self.talk.world_size()).filter(|peer| *peer != rank);
        let unpushed = if roots.contains(&rank) { peers.collect() } else { BTreeSet::new() };
        let unwritten = roots.into_iter().filter(|root| *root != rank).collect();
        let free = behind.free.clone();
        self.tasks.spawn(async move { Step::Free(number, free.done(Instant::now() + LONG).await) });
        let group = Group {
            ops,
            behind,
            is_free: false,
            is_started: false,
            is_offered: false,
            unwritten,
            unpushed,
            done,
        };
        let gone =
            self.left.iter().copied().find(|p| group.unwritten.contains(p) || group.unpushed.contains(p));
        self.groups.insert(number, group);
        match gone {
            Some(peer) => Err(gone_early(self.talk.name(peer))),
            None => self.advance(number),
        }
    }

    fn step(&mut self, step: Step) -> Result<()> {
        match step {
            Step::Free(number, result) => {
                result?;
                if let Some(group) = self.groups.get_mut(&number) {
                    group.is_free = true;
                }
                self.advance(number)
            }
            Step::Pushed { group: number, peer, result } => {
                result.map_err(|e| e.with(Key::Rank, self.talk.name(self.talk.rank())))?;
                self.talk.send(peer, &Message::Written { group: number })?;
                if let Some(group) = self.groups.get_mut(&number) {
                    group.unpushed.remove(&peer);
                }
                self.advance(number)
            }
            Step::Opened { peer, block, result } => {
                let (own, other) = (self.talk.name(self.talk.rank()), self.talk.name(peer));
                let mapping = result.map_err(|e| e.with(Key::Rank, own).with(Key::Peer, other))?;
                self.mappings.insert((peer, block), Mapping::Open(mapping));
                let waiting: Vec<u64> =
                    self.offers.keys().filter(|(_, from)| *from == peer).map(|(group, _)| *group).collect();
                waiting.into_iter().try_for_each(|group| self.advance(group))
            }
            Step::Closed { peer, block } => self.talk.send(peer, &Message::Forgotten { block }),
            Step::Nothing => Ok(()),
        }
    }

    fn told(&mut self, peer: u32, message: Message) -> Result<()> {
        match message {
            Message::Lend(lent) => {
                self.mappings.insert((peer, lent.block), Mapping::Opening);
                let (context, process, host) = (self.context.clone(), self.process, self.host);
                self.tasks.spawn_blocking(move || {
                    let result = lend::map(&context, (&process, host), &lent);
                    Step::Opened { peer, block: lent.block, result }
                });
                Ok(())
            }
            Message::Offer { group, places } => {
                self.offers.insert((group, peer), places);
                self.advance(group)
            }
            Message::Written { group: number } => {
                let expected =
                    self.groups.get_mut(&number).is_some_and(|group| group.unwritten.remove(&peer));
                if !expected {
                    return Err(differ(self.talk.name(peer)));
                }
                self.advance(number)
            }
            Message::Forget { block } => {
                let mapping = self.mappings.remove(&(peer, block));
                self.tasks.spawn_blocking(move || {
                    drop(mapping);
                    Step::Closed { peer, block }
                });
                Ok(())
            }
            Message::Forgotten { block } => {
                let free = self.lender.forgotten(peer, Some(block));
                self.free(free);
                Ok(())
            }
        }
    }

    /// Does what can be done for group `number`, and for later ones once it is over.
    fn advance(&mut self, number: u64) -> Result<()> {
        let rank = self.talk.rank();
        let Some(group) = self.groups.get(&number) else { return Ok(()) };
        if !group.is_started {
            if self.groups.range(..number).any(|(_, earlier)| group.conflicts(earlier, rank)) {
                return Ok(());
            }
            if let Some(group) = self.groups.get_mut(&number) {
                group.is_started = true;
            }
        }
        self.offer(number)?;
        self.push(number)?;
        let over = |group: &Group| group.is_free && group.unwritten.is_empty() && group.unpushed.is_empty();
        if self.groups.get(&number).is_some_and(over)
            && let Some(group) = self.groups.remove(&number)
        {
            drop(group.ops);
            group.done.send_replace(Some(Ok(())));
            let waiting: Vec<u64> =
                self.groups.iter().filter(|(_, g)| !g.is_started).map(|(number, _)| *number).collect();
            waiting.into_iter().try_for_each(|number| self.advance(number))?;
        }
        Ok(())
    }

    /// Offers this member's ranges, once nothing here uses them.
    fn offer(&mut self, number: u64) -> Result<()> {
        let Some(group) = self.groups.get_mut(&number) else { return Ok(()) };
        if !group.is_free || group.is_offered {
            return Ok(());
        }
        group.is_offered = true;
        for root in group.unwritten.clone() {
            let mut places = Vec::new();
            for (index, op) in (0..).zip(&group.ops).filter(|(_, op)| op.root == root) {
                let (news, place) = self.lender.place(root, index, &op.buffer)?;
                if let Some(lent) = news {
                    self.talk.send(root, &Message::Lend(lent))?;
                }
                places.push(place);
            }
            self.talk.send(root, &Message::Offer { group: number, places })?;
        }
        Ok(())
    }

    /// Enqueues copies to those who have offered, behind the work that makes the bytes.
    fn push(&mut self, number: u64) -> Result<()> {
        let Some(group) = self.groups.get(&number) else { return Ok(()) };
        for peer in group.unpushed.clone() {
            let Some(places) = self.offers.get(&(number, peer)) else { continue };
            let mut copies = Vec::with_capacity(places.len());
            for place in places.iter().filter(|place| place.len_bytes > 0) {
                match self.mappings.get(&(peer, place.block)) {
                    Some(Mapping::Open(mapping)) => copies.push((place.op, lend::inside(mapping, place)?)),
                    Some(Mapping::Opening) => break,
                    None => return Err(differ(self.talk.name(peer))),
                }
            }
            if copies.len() < places.iter().filter(|place| place.len_bytes > 0).count() {
                continue;
            }
            let own = (0..).zip(&group.ops).filter(|(_, op)| op.root == self.talk.rank());
            let same = own.clone().map(|(index, op)| (index, op.buffer.len_bytes()));
            if !same.eq(places.iter().map(|place| (place.op, place.len_bytes))) {
                return Err(differ(self.talk.name(peer)));
            }
            let stream = &self.streams[peer as usize];
            stream.wait(&group.behind.ready)?;
            let sources = own.filter(|(_, op)| op.buffer.len_bytes() > 0);
            for ((_, op), (_, place)) in sources.zip(copies) {
                stream.copy(op.buffer.clone(), place)?;
            }
            let pushed = stream.record()?;
            self.offers.remove(&(number, peer));
            let source = group.behind.source.clone();
            self.tasks.spawn(async move {
                let mut result = pushed.done(Instant::now() + LONG).await;
                // A source that was aborted ends as if it had brought something.
                if let (Ok(()), Some(source)) = (&result, source) {
                    result = source.poisoned().map_or(Ok(()), Err);
                }
                Step::Pushed { group: number, peer, result }
            });
        }
        Ok(())
    }

    /// A block that was lent is used no more.
    fn returned(&mut self, block: Arc<Block>) -> Result<()> {
        let kept = block.clone();
        match self.lender.take_back(block) {
            Some((number, peers)) => {
                for peer in peers {
                    self.talk.send(peer, &Message::Forget { block: number })?;
                }
            }
            None => self.free(vec![kept]),
        }
        Ok(())
    }

    /// Freeing device memory may wait for the device.
    fn free(&mut self, blocks: Vec<Arc<Block>>) {
        if !blocks.is_empty() {
            self.tasks.spawn_blocking(move || {
                drop(blocks);
                Step::Nothing
            });
        }
    }

    /// Member `peer` has closed its end: well, if no group needs it any more.
    async fn closed_by(&mut self, peer: u32) -> Result<()> {
        let needed = |group: &Group| group.unwritten.contains(&peer) || group.unpushed.contains(&peer);
        if self.groups.values().any(needed) {
            return Err(self.talk.lost(peer).await);
        }
        self.left.insert(peer);
        let (gone, kept) =
            std::mem::take(&mut self.mappings).into_iter().partition(|((of, _), _)| *of == peer);
        self.mappings = kept;
        // It has unmapped everything before it closed its end, or it is dead.
        let free = self.lender.forgotten(peer, None);
        self.free(free);
        let gone: HashMap<(u32, u64), Mapping> = gone;
        let talk = self.talk.clone();
        self.tasks.spawn_blocking(move || {
            drop(gone);
            talk.leave(peer);
            Step::Nothing
        });
        Ok(())
    }

    /// Lets go of everybody's memory, says so, and keeps the own memory until the others have done the same.
    async fn close(mut self, heard: Heard<Message>, returns: &mut mpsc::UnboundedReceiver<Arc<Block>>) {
        // Copies that were enqueued end by themselves: they wait for this member's own work only.
        while self.tasks.join_next().await.is_some() {}
        let mappings = std::mem::take(&mut self.mappings);
        // A panic of the closing thread was reported already.
        let _ = tokio::task::spawn_blocking(move || drop(mappings)).await;
        let (talk, rank) = (self.talk.clone(), self.talk.rank());
        let peers = (0..talk.world_size()).filter(|peer| *peer != rank);
        peers.clone().for_each(|peer| talk.leave(peer));
        drop(heard);
        let mut gone: JoinSet<u32> = peers
            .map(|peer| {
                let talk = talk.clone();
                async move {
                    talk.gone(peer).await;
                    peer
                }
            })
            .collect();
        let mut held = Vec::new();
        loop {
            tokio::select! {
                biased;
                Some(block) = returns.recv() => {
                    let kept = block.clone();
                    if self.lender.take_back(block).is_none() {
                        held.push(kept);
                    }
                }
                peer = gone.join_next() => match peer {
                    Some(Ok(peer)) => held.extend(self.lender.forgotten(peer, None)),
                    Some(Err(_)) => {}
                    None => break,
                },
            }
            let free = std::mem::take(&mut held);
            // As above.
            let _ = tokio::task::spawn_blocking(move || drop(free)).await;
        }
    }
}

/// `peer` as errors call it.
fn differ(peer: u32) -> Error {
    let message = "members enqueued different operations in the same group";
    Error::new(ErrorKind::Corrupt, OPERATION, message).with(Key::Rank, peer)
}

fn gone_early(peer: u32) -> Error {
    Error::new(ErrorKind::PeerLost, OPERATION, "a member has left the group").with(Key::Rank, peer)
}
