//! Events, and the thread that notices their completion.
//!
//! One thread a device asks the driver for the oldest event of each stream. It sleeps while nothing is enqueued, looks
//! once a millisecond while nobody waits (to let go of memory), and looks all the time while somebody waits. Host
//! callbacks on the stream would be simpler, but hold the stream up for the length of each callback, and are not
//! called at all once the context has failed.

use std::{
    any::Any,
    collections::{BTreeMap, VecDeque},
    fmt,
    num::NonZeroU64,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use ckpt_core::{
    Error, ErrorKind, Result,
    device::{BufferSlice, EventState},
};
use tokio::sync::Notify;

use super::driver::{Bound, Context, Functions};
use crate::{error::CUDA_NOT_READY, pause::Pause, table::Handle};

/// A `CUevent` without timing.
pub(crate) struct RawEvent {
    context: Arc<Context>,
    pub(crate) raw: Handle,
}

impl RawEvent {
    const DISABLE_TIMING: u32 = 2;

    /// A new event, recorded on `stream`.
    pub(crate) fn record(context: &Arc<Context>, stream: Handle) -> Result<Arc<Self>> {
        let mut raw = 0;
        // SAFETY: writes one handle.
        let create = |f: &Functions| unsafe { (f.event_create)(&mut raw, Self::DISABLE_TIMING) };
        context.run("create a CUDA event", create)?;
        let event = Arc::new(Self { context: context.clone(), raw });
        // SAFETY: both handles are live, and of one context.
        context.run("record a CUDA event", |f| unsafe { (f.event_record)(raw, stream) })?;
        Ok(event)
    }

    /// Whether the work before it is done.
    fn query(&self) -> Result<bool> {
        let _bound = self.context.bind()?;
        self.query_bound()
    }

    /// The same, on a thread where the context is current.
    fn query_bound(&self) -> Result<bool> {
        // SAFETY: the event lives as long as `self`.
        match unsafe { (self.context.driver.functions.event_query)(self.raw) } {
            CUDA_NOT_READY => Ok(false),
            code => self.context.driver.check("finish work on a CUDA stream", code).map(|()| true),
        }
    }
}

impl Drop for RawEvent {
    fn drop(&mut self) {
        // SAFETY: created by `record`, destroyed once; the driver allows it while the event is pending.
        let _ = self.context.run("destroy a CUDA event", |f| unsafe { (f.event_destroy)(self.raw) });
    }
}

/// What the poller found out about one event.
#[derive(Debug, Default)]
pub(crate) struct Completion {
    result: OnceLock<Result<()>>,
    changed: Notify,
}

/// An event on a CUDA stream.
pub struct CudaEvent {
    pub(crate) event: Arc<RawEvent>,
    completion: Arc<Completion>,
    poller: Arc<Poller>,
}

impl fmt::Debug for CudaEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaEvent").field("result", &self.completion.result.get()).finish_non_exhaustive()
    }
}

impl CudaEvent {
    /// [`EventState::done`] for a thread that may block.
    pub fn wait(&self, mut deadline: Instant) -> Result<()> {
        let _interest = self.poller.shared.interest();
        let mut pause = Pause::default();
        loop {
            if let Some(result) = self.completion.result.get() {
                return result.clone();
            }
            if Instant::now() >= deadline {
                deadline = self.late(deadline)?;
            }
            pause.take();
        }
    }

    /// What a wait does at its deadline. Work that is over counts as done, though the poller has yet to let go of its
    /// memory: it gets a moment.
    fn late(&self, deadline: Instant) -> Result<Instant> {
        let moment = Duration::from_secs(1);
        if self.event.query()? && deadline.elapsed() < moment {
            return Ok(Instant::now() + moment);
        }
        Err(Error::new(
            ErrorKind::Timeout,
            "wait for a CUDA stream",
            "the work was not done by its deadline; a peer may be dead, or the device hangs",
        ))
    }
}

#[async_trait]
impl EventState for CudaEvent {
    fn is_complete(&self) -> Result<bool> {
        match self.completion.result.get() {
            Some(result) => result.clone().map(|()| true),
            None => self.event.query(),
        }
    }

    async fn done(&self, mut deadline: Instant) -> Result<()> {
        // Only the poller's word counts here: it has let go of the work's memory before, also that of earlier events.
        if let Some(result) = self.completion.result.get() {
            return result.clone();
        }
        let _interest = self.poller.shared.interest();
        loop {
            let changed = self.completion.changed.notified();
            tokio::pin!(changed);
            // Listen first, then look: a completion in between is not missed.
            changed.as_mut().enable();
            if let Some(result) = self.completion.result.get() {
                return result.clone();
            }
            if tokio::time::timeout_at(deadline.into(), changed).await.is_err() {
                deadline = self.late(deadline)?;
            }
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// One recorded event with the memory that the work before it uses.
struct Entry {
    stream: u64,
    event: Arc<RawEvent>,
    completion: Arc<Completion>,
    keep: Vec<BufferSlice>,
}

#[derive(Default)]
struct Inbox {
    entries: Vec<Entry>,
    /// The thread sleeps until it is told.
    asleep: bool,
    /// No more entries will come.
    closed: bool,
}

#[derive(Default)]
struct Shared {
    inbox: Mutex<Inbox>,
    wake: Condvar,
    waiting: AtomicUsize,
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().expect("nothing panics while the inbox is locked")
    }

    fn interest(self: &Arc<Self>) -> Interest {
        if self.waiting.fetch_add(1, Ordering::AcqRel) == 0 {
            // Under the lock, so that the thread is either before its look at `waiting` or already asleep.
            let _inbox = self.inbox();
            self.wake.notify_one();
        }
        Interest(self.clone())
    }
}

/// Somebody waits: the poller looks without pause. Dropped with the waiting future.
struct Interest(Arc<Shared>);

impl Drop for Interest {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The handle of a device's poller thread; the thread ends when the last handle is gone and all work is done.
pub(crate) struct Poller {
    shared: Arc<Shared>,
}

impl Poller {
    /// Between two looks while nobody waits.
    const IDLE_LOOK: Duration = Duration::from_millis(1);
    /// Looks without sleep after the last completion, about a microsecond each, before the thread starts to nap.
    const EAGER_LOOKS: u32 = 64;
    /// A nap between two looks while somebody waits; the kernel adds its own wake-up time.
    const NAP: Duration = Duration::from_micros(3);

    /// Starts the thread.
    pub(crate) fn start(context: Arc<Context>) -> Result<Arc<Self>> {
        let shared = Arc::new(Shared::default());
        let for_thread = shared.clone();
        let spawned =
            std::thread::Builder::new().name("cuda-events".into()).spawn(move || run(&for_thread, &context));
        spawned.map_err(|e| {
            Error::new(ErrorKind::ResourceExhausted, "open a CUDA device", "cannot start a thread")
                .caused_by(e)
        })?;
        Ok(Arc::new(Self { shared }))
    }

    /// Watches an event of the stream numbered `stream`; `keep` stays alive until it completes.
    pub(crate) fn watch(
        self: &Arc<Self>,
        stream: u64,
        event: Arc<RawEvent>,
        keep: Vec<BufferSlice>,
    ) -> CudaEvent {
        let completion = Arc::new(Completion::default());
        let entry = Entry { stream, event: event.clone(), completion: completion.clone(), keep };
        let mut inbox = self.shared.inbox();
        inbox.entries.push(entry);
        if inbox.asleep {
            self.shared.wake.notify_one();
        }
        drop(inbox);
        CudaEvent { event, completion, poller: self.clone() }
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.shared.inbox().closed = true;
        self.shared.wake.notify_one();
    }
}

fn run(shared: &Shared, context: &Context) {
    // Without this the kernel lengthens each nap by 50 us. A refusal costs only speed.
    let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
    let bound = context.bind();
    if let Err(error) = &bound {
        tracing::error!(%error, "the CUDA event thread has no context; waits will fail");
    }
    let mut streams: BTreeMap<u64, VecDeque<Entry>> = BTreeMap::new();
    let mut looks = 0u32;
    while collect(shared, &mut streams) {
        let before: usize = streams.values().map(VecDeque::len).sum();
        for queue in streams.values_mut() {
            retire(queue, &bound);
        }
        streams.retain(|_, queue| !queue.is_empty());
        let after: usize = streams.values().map(VecDeque::len).sum();
        looks = if after < before { 0 } else { looks.saturating_add(1) };
        if shared.waiting.load(Ordering::Acquire) > 0 && looks > Poller::EAGER_LOOKS {
            std::thread::sleep(Poller::NAP);
        }
    }
}

/// Takes new entries in; sleeps as long as may be. False when all is over.
fn collect(shared: &Shared, streams: &mut BTreeMap<u64, VecDeque<Entry>>) -> bool {
    let mut inbox = shared.inbox();
    loop {
        for entry in inbox.entries.drain(..) {
            streams.entry(entry.stream).or_default().push_back(entry);
        }
        if !streams.is_empty() {
            break;
        }
        if inbox.closed {
            return false;
        }
        inbox.asleep = true;
        inbox = shared.wake.wait(inbox).expect("nothing panics while the inbox is locked");
        inbox.asleep = false;
    }
    if shared.waiting.load(Ordering::Acquire) == 0 {
        let (mut inbox, _) = shared
            .wake
            .wait_timeout(inbox, Poller::IDLE_LOOK)
            .expect("nothing panics while the inbox is locked");
        for entry in inbox.entries.drain(..) {
            streams.entry(entry.stream).or_default().push_back(entry);
        }
    }
    true
}

/// Completes the events at the head of one stream that are over, in order.
fn retire(queue: &mut VecDeque<Entry>, bound: &Result<Bound<'_>>) {
    while let Some(entry) = queue.front() {
        let result = match bound {
            Ok(_) => entry.event.query_bound(),
            Err(error) => Err(error.clone()),
        };
        if matches!(result, Ok(false)) {
            return;
        }
        if let Some(Entry { completion, keep, .. }) = queue.pop_front() {
            // Memory first: who was told that the work is done may rely on it.
            drop(keep);
            // Set once: an entry is retired once.
            let _ = completion.result.set(result.map(|_| ()));
            completion.changed.notify_waiters();
        }
    }
}
