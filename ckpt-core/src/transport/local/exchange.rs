//! A formed local group: members offer their operations, receivers copy, roots wait until all have.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use futures_util::{FutureExt, future::try_join_all};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    device::{BufferSlice, Event, Stream, host::copy_bytes},
    error::{Error, ErrorKind, Key, Result},
    transport::{AbortHandle, CollectiveOp, CommunicatorQueue, group::Order, poison::Poison},
};

/// Copies go in pieces of this size, so that an abort ends them soon.
const PIECE_BYTES: u64 = 16 << 20;
/// Smaller pieces are copied on the async thread.
const INLINE_BYTES: u64 = 64 << 10;

/// What the members share.
#[derive(Debug)]
pub(super) struct Group {
    world_size: u32,
    pub(super) formed: CancellationToken,
    poison: Poison,
    exchanges: Mutex<HashMap<u64, Arc<watch::Sender<Exchange>>>>,
    /// By member: the number of the first group of operations that it will never enqueue.
    left: watch::Sender<Vec<Option<u64>>>,
}

/// One group of operations.
#[derive(Debug)]
struct Exchange {
    /// By member: its operations, once its job runs.
    offers: Vec<Option<Arc<Vec<CollectiveOp>>>>,
    /// By member: whether it has all its bytes.
    done: Vec<bool>,
    /// By member: how many copies out of its memory run now.
    readers: Vec<u32>,
}

impl Group {
    pub(super) fn new(world_size: u32) -> Self {
        Self {
            world_size,
            formed: CancellationToken::new(),
            poison: Poison::default(),
            exchanges: Mutex::default(),
            left: watch::Sender::new(vec![None; world_size as usize]),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<watch::Sender<Exchange>>>> {
        // Nothing that can panic runs under this lock.
        self.exchanges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn exchange(&self, number: u64) -> Arc<watch::Sender<Exchange>> {
        let members = self.world_size as usize;
        let fresh = || {
            Arc::new(watch::Sender::new(Exchange {
                offers: vec![None; members],
                done: vec![false; members],
                readers: vec![0; members],
            }))
        };
        self.lock().entry(number).or_insert_with(fresh).clone()
    }

    /// Poisons the group and answers the first cause.
    fn fail(&self, cause: Error) -> Error {
        self.poison.set(cause.clone());
        self.poison.get().unwrap_or(cause)
    }

    /// Waits for `ready`, for poison, or for `peer` to leave before it takes part in group `number`.
    async fn until(
        &self,
        number: u64,
        exchange: &watch::Sender<Exchange>,
        peer: u32,
        ready: impl Fn(&Exchange) -> bool,
    ) -> Result<()> {
        let (mut state, mut left) = (exchange.subscribe(), self.left.subscribe());
        tokio::select! {
            biased;
            // The senders live in `self` and in the caller's `Arc`, so neither wait can fail.
            _ = state.wait_for(ready) => Ok(()),
            cause = self.poison.wait() => Err(cause),
            _ = left.wait_for(|left| left[peer as usize].is_some_and(|first| first <= number)) => {
                Err(self.fail(lost(peer, "a member left the group before this broadcast")))
            }
        }
    }

    /// One member's part of group `number`.
    async fn run(self: Arc<Self>, rank: u32, number: u64, ops: Vec<CollectiveOp>) -> Result<()> {
        self.poison.check()?;
        let mut unfinished = Unfinished { group: &self, rank, armed: true };
        let exchange = self.exchange(number);
        let ops = Arc::new(ops);
        exchange.send_modify(|e| e.offers[rank as usize] = Some(ops.clone()));
        let outcome = self.transfer(rank, number, &ops, &exchange).await;
        if outcome.is_err() {
            // A receiver may still be in the middle of a piece of our memory.
            let _ = exchange.subscribe().wait_for(|e| e.readers[rank as usize] == 0).await;
        }
        unfinished.armed = false;
        outcome
    }

    async fn transfer(
        &self,
        rank: u32,
        number: u64,
        ops: &Arc<Vec<CollectiveOp>>,
        exchange: &Arc<watch::Sender<Exchange>>,
    ) -> Result<()> {
        let receive =
            ops.iter().enumerate().filter(|(_, op)| op.root != rank).map(|(index, op)| async move {
                let root = op.root as usize;
                self.until(number, exchange, op.root, |e| e.offers[root].is_some()).await?;
                let offer = exchange.borrow().offers[root].clone();
                let source =
                    offer.and_then(|theirs| matching(&theirs, ops).then(|| theirs[index].buffer.clone()));
                let Some(source) = source else {
                    let message = "members enqueued different operations in the same group";
                    return Err(self.fail(
                        Error::new(ErrorKind::Corrupt, "broadcast", message).with(Key::Peer, op.root),
                    ));
                };
                self.copy(exchange, op.root, source, op.buffer.clone()).await
            });
        try_join_all(receive).await?;
        let mut all = false;
        exchange.send_modify(|e| {
            e.done[rank as usize] = true;
            all = e.done.iter().all(|done| *done);
        });
        if all {
            self.lock().remove(&number);
        }
        if ops.iter().any(|op| op.root == rank) {
            for peer in 0..self.world_size {
                self.until(number, exchange, peer, |e| e.done[peer as usize]).await?;
            }
        }
        Ok(())
    }

    async fn copy(
        &self,
        exchange: &Arc<watch::Sender<Exchange>>,
        root: u32,
        src: BufferSlice,
        dst: BufferSlice,
    ) -> Result<()> {
        let mut start = 0;
        while start < src.len_bytes() {
            let end = src.len_bytes().min(start + PIECE_BYTES);
            let (from, to) = (src.slice(start..end)?, dst.slice(start..end)?);
            let reader = Reader::enter(exchange.clone(), root);
            // After the count was raised: a root that has seen it at 0 was poisoned before.
            self.poison.check()?;
            let piece = move || {
                let outcome = copy_bytes(&from, &to);
                drop(reader);
                outcome
            };
            if end - start <= INLINE_BYTES {
                piece()?;
            } else {
                tokio::task::spawn_blocking(piece).await.map_err(|e| {
                    Error::new(ErrorKind::Aborted, "broadcast", "the runtime of this stream has ended")
                        .caused_by(e)
                })??;
            }
            start = end;
        }
        Ok(())
    }
}

fn lost(peer: u32, message: &str) -> Error {
    Error::new(ErrorKind::PeerLost, "broadcast", message).with(Key::Rank, peer)
}

fn matching(theirs: &[CollectiveOp], ours: &[CollectiveOp]) -> bool {
    let shape = |op: &CollectiveOp| (op.root, op.buffer.len_bytes());
    theirs.iter().map(shape).eq(ours.iter().map(shape))
}

/// A copy out of `root`'s memory is running.
struct Reader {
    exchange: Arc<watch::Sender<Exchange>>,
    root: u32,
}

impl Reader {
    fn enter(exchange: Arc<watch::Sender<Exchange>>, root: u32) -> Self {
        exchange.send_modify(|e| e.readers[root as usize] += 1);
        Self { exchange, root }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.exchange.send_modify(|e| e.readers[self.root as usize] -= 1);
    }
}

/// A job that its runtime dropped in the middle is a dead member to the others.
struct Unfinished<'a> {
    group: &'a Group,
    rank: u32,
    armed: bool,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.group.fail(lost(self.rank, "a member's runtime ended in the middle of a broadcast"));
        }
    }
}

/// One member's queue.
#[derive(Debug)]
pub(super) struct LocalQueue {
    group: Arc<Group>,
    rank: u32,
    next: u64,
    order: Order,
}

impl LocalQueue {
    pub(super) fn new(group: Arc<Group>, rank: u32) -> Self {
        Self { group, rank, next: 0, order: Order::default() }
    }
}

#[async_trait]
impl CommunicatorQueue for LocalQueue {
    async fn enqueue(&mut self, ops: Vec<CollectiveOp>, stream: &Arc<dyn Stream>) -> Result<Event> {
        self.group.poison.check()?;
        let (group, rank, number) = (self.group.clone(), self.rank, self.next);
        let member = (rank, self.group.world_size);
        let event = self.order.enqueue(member, ops, &**stream, |ops| group.run(rank, number, ops).boxed())?;
        self.next += 1;
        Ok(event)
    }
}

impl Drop for LocalQueue {
    fn drop(&mut self) {
        self.group.left.send_modify(|left| left[self.rank as usize] = Some(self.next));
    }
}

/// Ends the group for all members.
#[derive(Debug)]
pub(super) struct LocalAbort(pub(super) Arc<Group>);

impl AbortHandle for LocalAbort {
    fn abort(&self, cause: Error) {
        self.0.poison.set(cause);
    }

    fn poisoned(&self) -> Option<Error> {
        self.0.poison.get()
    }
}
