//! The device's lane: H2D of own segments (or pulls of others'), the group of broadcasts behind them, and the watch over
//! all of it.

use std::{
    collections::BTreeMap,
    iter::repeat,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    task::JoinHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Event,
    pull::Puller,
    trace::{OpenSpan, Stage, Trace},
};
use crate::{
    device::{Buffer, BufferSlice, DeviceBackend, Event as DeviceEvent, Ring, Stream},
    error::{Error, ErrorKind, Key, Result},
    plan::{Segment, UpdatePlan},
    transport::{AbortHandle, CollectiveOp, Communicator, CommunicatorQueue},
    types::Rank,
};

/// A bucket on its way: what its completion depends on.
struct InFlight {
    bucket: u32,
    loading: Option<Loading>,
    /// Pulled bytes on their way from the host into the ring.
    staged: Option<DeviceEvent>,
    exchanged: Option<(DeviceEvent, OpenSpan)>,
    deadline: Instant,
}

/// A read shares its links with the others under way, so it takes as long as this many that have them alone.
const SHARED_LINKS: u32 = 2;

/// A tensor larger than a bucket is loaded and sent in pieces of a bucket's size, but no smaller than this: the group
/// would otherwise wait for the whole load, and the next loads for the whole exchange.
const MIN_PIECE_BYTES: u64 = 32 << 20;

/// What is sent at once: parts of segments, as ranges from their starts. Usually a bucket is one group; a large tensor
/// is several. Every member finds the same groups in the plan.
fn groups(plan: &UpdatePlan, bucket: u32) -> Vec<Vec<(&Segment, Range<u64>)>> {
    let piece = plan.bucket_bytes.max(MIN_PIECE_BYTES);
    match plan.buckets[bucket as usize].segments.as_slice() {
        [segment] if segment.len_bytes > piece => (0..segment.len_bytes.div_ceil(piece))
            .map(|n| vec![(segment, n * piece..segment.len_bytes.min((n + 1) * piece))])
            .collect(),
        segments => vec![segments.iter().map(|segment| (segment, 0..segment.len_bytes)).collect()],
    }
}

fn shifted(range: &Range<u64>, by: u64) -> Range<u64> {
    range.start + by..range.end + by
}

/// H2D of a bucket's own segments.
struct Loading {
    /// For each group of broadcasts: its bytes are in the ring.
    loaded: Vec<DeviceEvent>,
    span: OpenSpan,
}

/// How a pull ended: with what the exchange has still to wait for.
type PullOutcome = Result<Option<DeviceEvent>>;
type Pulled = oneshot::Receiver<PullOutcome>;
/// A bucket to be pulled, and who waits for it.
type PullOrder = (u32, oneshot::Sender<PullOutcome>);

struct Exchange {
    bucket: u32,
    loading: Option<Loading>,
    pulled: Option<Pulled>,
}

/// What the lane works on.
pub(super) struct DeviceWork {
    pub(super) rank: Rank,
    pub(super) plan: Arc<UpdatePlan>,
    pub(super) ring: Arc<dyn Ring>,
    /// The arenas of this rank's share.
    pub(super) arenas: Vec<Arc<dyn Buffer>>,
    /// On a rank that pulls from others' memory.
    pub(super) puller: Option<Arc<Puller>>,
    /// `None` for a group of one.
    pub(super) communicator: Option<Communicator>,
    pub(super) bucket_deadline: Duration,
    /// For the watch over broadcasts: other ranks' workers may hold a bucket up before it moves. The machine keeps the
    /// clock of each bucket and names who is late.
    pub(super) exchange_deadline: Duration,
}

/// The driver's end.
pub(super) struct DeviceLane {
    rank: Rank,
    plan: Arc<UpdatePlan>,
    memory: Arc<dyn Buffer>,
    arenas: Vec<Arc<dyn Buffer>>,
    h2d: Arc<dyn Stream>,
    loads: BTreeMap<u32, Loading>,
    puller: Option<Arc<Puller>>,
    pulls: Option<mpsc::UnboundedSender<PullOrder>>,
    pulled: BTreeMap<u32, Pulled>,
    /// All tasks that pull: they hold the ring.
    pulling: TaskTracker,
    /// Ends the wait for pulls.
    stop: CancellationToken,
    exchanges: mpsc::UnboundedSender<Exchange>,
    exchange_task: JoinHandle<Option<Box<dyn CommunicatorQueue>>>,
    watch_task: JoinHandle<()>,
    abort: Option<Arc<dyn AbortHandle>>,
    trace: Trace,
}

impl DeviceLane {
    pub(super) fn spawn(
        device: &dyn DeviceBackend,
        work: DeviceWork,
        trace: Trace,
        events: mpsc::UnboundedSender<Event>,
    ) -> Result<Self> {
        let h2d = device.stream("h2d")?;
        let net = device.stream("net")?;
        let memory = work.ring.buffer();
        let (queue, abort) = match work.communicator {
            Some(Communicator { queue, abort }) => (Some(queue), Some(abort)),
            None => (None, None),
        };
        let (exchanges, exchange_inbox) = mpsc::unbounded_channel();
        let (in_flight, watch_inbox) = mpsc::unbounded_channel();
        let stop = CancellationToken::new();
        let pulling = TaskTracker::new();
        let pulls = work.puller.clone().map(|puller| {
            let (pulls, inbox) = mpsc::unbounded_channel();
            let task = PullTask {
                plan: work.plan.clone(),
                puller,
                h2d: h2d.clone(),
                limit: work.bucket_deadline * SHARED_LINKS,
                trace: trace.clone(),
                inbox,
                pulling: pulling.clone(),
            };
            pulling.spawn(stop.clone().run_until_cancelled_owned(task.run(stop.clone())));
            pulls
        });
        let exchange = ExchangeTask {
            plan: work.plan.clone(),
            memory: memory.clone(),
            net,
            queue,
            stop: stop.clone(),
            deadline: work.exchange_deadline,
            trace: trace.clone(),
            events: events.clone(),
            inbox: exchange_inbox,
            in_flight,
        };
        let watch = WatchTask { plan: work.plan.clone(), abort: abort.clone(), events, inbox: watch_inbox };
        Ok(Self {
            rank: work.rank,
            plan: work.plan,
            memory,
            arenas: work.arenas,
            h2d,
            loads: BTreeMap::new(),
            puller: work.puller,
            pulls,
            pulled: BTreeMap::new(),
            pulling,
            stop,
            exchanges,
            exchange_task: tokio::spawn(exchange.run()),
            watch_task: tokio::spawn(watch.run()),
            abort,
            trace,
        })
    }

    /// Enqueues H2D of this rank's own segments of `bucket`, and asks for those that it pulls.
    pub(super) fn load(&mut self, bucket: u32) -> Result<()> {
        let (mut loaded, mut pulls, mut span) = (Vec::new(), false, None);
        let plan = self.plan.clone();
        for group in groups(&plan, bucket) {
            let mut any = false;
            for (segment, range) in group.into_iter().filter(|(s, _)| s.root == self.rank) {
                if self.puller.as_ref().is_some_and(|p| p.pulls(segment)) {
                    pulls = true;
                    continue;
                }
                let arena = self.arenas.get(segment.arena as usize).ok_or_else(|| {
                    Error::new(
                        ErrorKind::Internal,
                        "load a bucket",
                        format!("the plan names arena {} of {} here", segment.arena, self.arenas.len()),
                    )
                    .with(Key::Rank, self.rank)
                    .with(Key::Bucket, bucket)
                })?;
                span.get_or_insert_with(|| self.trace.begin(Stage::Load, Some(bucket)));
                let from = BufferSlice::new(arena.clone(), shifted(&range, segment.arena_offset))?;
                let to = BufferSlice::new(self.memory.clone(), shifted(&range, segment.ring_offset))?;
                self.h2d.copy(from, to)?;
                any = true;
            }
            if any {
                loaded.push(self.h2d.record()?);
            }
        }
        if let Some(span) = span {
            self.loads.insert(bucket, Loading { loaded, span });
        }
        if let (Some(queue), true) = (&self.pulls, pulls) {
            let (done, pulled) = oneshot::channel();
            // A task that was stopped leaves `pulled` without an answer, which the exchange reports.
            let _ = queue.send((bucket, done));
            self.pulled.insert(bucket, pulled);
        }
        Ok(())
    }

    /// Enqueues the bucket's broadcasts behind its loads; [`Event::Exchanged`] or [`Event::Failed`] follows.
    pub(super) fn exchange(&mut self, bucket: u32) {
        // A task that has ended has already reported why.
        let (loading, pulled) = (self.loads.remove(&bucket), self.pulled.remove(&bucket));
        let _ = self.exchanges.send(Exchange { bucket, loading, pulled });
    }

    /// Poisons the communicator and frees whoever waits in it or for a pull. Reads that are under way own their memory
    /// and end by themselves.
    pub(super) fn abort(&self, cause: Error) {
        self.stop.cancel();
        if let Some(abort) = &self.abort {
            abort.abort(cause);
        }
    }

    /// Aborts what is under way and waits, at most `limit`, until this lane touches the ring no more.
    pub(super) async fn stop(self, limit: Duration) {
        self.abort(Error::new(ErrorKind::Aborted, "update weights", "the update has ended"));
        let Self { exchanges, pulls, pulling, mut exchange_task, mut watch_task, .. } = self;
        drop((exchanges, pulls));
        pulling.close();
        let all = async { tokio::join!(&mut exchange_task, &mut watch_task, pulling.wait()) };
        if tokio::time::timeout(limit, all).await.is_err() {
            exchange_task.abort();
            watch_task.abort();
        }
    }

    /// Ends the lane after the last bucket; returns the communicator for the next update if it is still healthy.
    pub(super) async fn finish(self, limit: Duration) -> Option<Communicator> {
        drop((self.exchanges, self.pulls));
        self.pulling.close();
        // They have answered and have nothing left to do but to end, which drops the ring.
        tokio::time::timeout(limit, self.pulling.wait()).await.ok()?;
        let queue = tokio::time::timeout(limit, self.exchange_task).await.ok()?.ok()??;
        tokio::time::timeout(limit, self.watch_task).await.ok()?.ok()?;
        let abort = self.abort?;
        abort.poisoned().is_none().then_some(Communicator { queue, abort })
    }
}

/// Begins buckets in plan order: each when all reads of the one before are under way.
struct PullTask {
    plan: Arc<UpdatePlan>,
    puller: Arc<Puller>,
    h2d: Arc<dyn Stream>,
    limit: Duration,
    trace: Trace,
    pulling: TaskTracker,
    inbox: mpsc::UnboundedReceiver<PullOrder>,
}

impl PullTask {
    async fn run(mut self, stop: CancellationToken) {
        let turns = Arc::new(Semaphore::new(1));
        while let Some((bucket, done)) = self.inbox.recv().await {
            // The semaphore is never closed.
            let Ok(turn) = turns.clone().acquire_owned().await else { return };
            let (plan, puller, h2d) = (self.plan.clone(), self.puller.clone(), self.h2d.clone());
            let (trace, limit) = (self.trace.clone(), self.limit);
            self.pulling.spawn(stop.clone().run_until_cancelled_owned(async move {
                let span = trace.begin(Stage::Pull, Some(bucket));
                let outcome = puller.pull(&plan.buckets[bucket as usize], bucket, &*h2d, limit, turn).await;
                if outcome.is_ok() {
                    span.end();
                }
                // Nobody waits after an abort.
                let _ = done.send(outcome);
            }));
        }
    }
}

struct ExchangeTask {
    plan: Arc<UpdatePlan>,
    memory: Arc<dyn Buffer>,
    net: Arc<dyn Stream>,
    queue: Option<Box<dyn CommunicatorQueue>>,
    stop: CancellationToken,
    deadline: Duration,
    trace: Trace,
    events: mpsc::UnboundedSender<Event>,
    inbox: mpsc::UnboundedReceiver<Exchange>,
    in_flight: mpsc::UnboundedSender<InFlight>,
}

impl ExchangeTask {
    async fn run(mut self) -> Option<Box<dyn CommunicatorQueue>> {
        while let Some(exchange) = self.inbox.recv().await {
            let bucket = exchange.bucket;
            match self.enqueue(exchange).await {
                // The watch task ends only with its channel, which this task holds.
                Ok(in_flight) => drop(self.in_flight.send(in_flight)),
                Err(cause) => {
                    let cause = of_members(cause, &self.plan).with(Key::Bucket, bucket);
                    let _ = self.events.send(Event::Failed { cause });
                    return None;
                }
            }
        }
        self.queue
    }

    async fn enqueue(&mut self, mut exchange: Exchange) -> Result<InFlight> {
        // Pulls are waited for here and not on the stream: on accelerators a collective that waits for bytes would keep
        // the worker from the device. A pull ends by its own deadline.
        let staged = match exchange.pulled.take() {
            None => None,
            Some(pulled) => {
                let answer = self.stop.run_until_cancelled(pulled).await;
                answer.and_then(std::result::Result::ok).unwrap_or_else(|| Err(stopped()))?
            }
        };
        let deadline = Instant::now() + self.deadline;
        let mut exchanged = None;
        if let Some(queue) = &mut self.queue {
            let span = self.trace.begin(Stage::Exchange, Some(exchange.bucket));
            let mut last = None;
            if let Some(event) = &staged {
                self.net.wait(event)?;
            }
            let loaded = exchange.loading.iter().flat_map(|l| &l.loaded).map(Some).chain(repeat(None));
            for (group, loaded) in groups(&self.plan, exchange.bucket).into_iter().zip(loaded) {
                if let Some(event) = loaded {
                    self.net.wait(event)?;
                }
                let mut ops = Vec::with_capacity(group.len());
                for (segment, range) in group {
                    let root = self.plan.members.binary_search(&segment.root).map_err(|_| {
                        Error::new(
                            ErrorKind::Internal,
                            "exchange a bucket",
                            format!("root {} is not a member", segment.root),
                        )
                    })?;
                    let buffer = BufferSlice::new(self.memory.clone(), shifted(&range, segment.ring_offset))?;
                    ops.push(CollectiveOp { root: root as u32, buffer });
                }
                last = Some(queue.enqueue(ops, &self.net).await?);
            }
            exchanged = last.map(|event| (event, span));
        }
        Ok(InFlight { bucket: exchange.bucket, loading: exchange.loading, staged, exchanged, deadline })
    }
}

struct WatchTask {
    plan: Arc<UpdatePlan>,
    abort: Option<Arc<dyn AbortHandle>>,
    events: mpsc::UnboundedSender<Event>,
    inbox: mpsc::UnboundedReceiver<InFlight>,
}

impl WatchTask {
    async fn run(mut self) {
        while let Some(in_flight) = self.inbox.recv().await {
            let bucket = in_flight.bucket;
            let event = match self.complete(in_flight).await {
                Ok(()) => Event::Exchanged { bucket },
                Err(cause) => {
                    Event::Failed { cause: of_members(cause, &self.plan).with(Key::Bucket, bucket) }
                }
            };
            let failed = matches!(event, Event::Failed { .. });
            let _ = self.events.send(event);
            if failed {
                return;
            }
        }
    }

    async fn complete(&self, in_flight: InFlight) -> Result<()> {
        if let Some(Loading { loaded, span }) = in_flight.loading {
            // The stream is a queue: the last one ends last.
            if let Some(last) = loaded.last() {
                last.done(in_flight.deadline).await?;
            }
            span.end();
        }
        if let Some(staged) = &in_flight.staged {
            staged.done(in_flight.deadline).await?;
        }
        let mut exchanging = None;
        if let Some((exchanged, span)) = in_flight.exchanged {
            exchanged.done(in_flight.deadline).await?;
            exchanging = Some(span);
        }
        // An aborted kernel ends normally and its event fires over garbage: a completion counts only if the
        // communicator is seen healthy after it.
        match self.abort.as_ref().and_then(|a| a.poisoned()) {
            Some(cause) => Err(cause),
            None => {
                if let Some(span) = exchanging {
                    span.end();
                }
                Ok(())
            }
        }
    }
}

/// Transports count the members of a group; people count the ranks of the job.
fn of_members(cause: Error, plan: &UpdatePlan) -> Error {
    let index = cause.get(Key::Rank).and_then(|index| index.parse::<usize>().ok());
    match index.and_then(|index| plan.members.get(index).map(|rank| (index, *rank))) {
        Some((index, rank)) if cause.kind() == ErrorKind::PeerLost && rank as usize != index => {
            Error::new(cause.kind(), "broadcast", cause.message())
                .recovery_is(cause.recovery())
                .with(Key::Rank, rank)
        }
        _ => cause,
    }
}

fn stopped() -> Error {
    Error::new(ErrorKind::Aborted, "pull weights", "the update had been aborted")
}
