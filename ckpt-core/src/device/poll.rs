//! Events of accelerators whose libraries can only be asked, and the thread that asks.
//!
//! One thread a device asks for the oldest event of each stream. It sleeps while nothing is enqueued, looks once a
//! millisecond while nobody waits (to let go of memory), and looks all the time while somebody waits. Host callbacks on
//! the stream would be simpler, but hold the stream up for the length of each callback, and may not be called at all
//! once the device has failed.

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
use tokio::sync::Notify;

use super::EventState;
use crate::error::{Error, ErrorKind, Result};

/// A native event.
pub trait Polled: Send + Sync + 'static {
    /// What the work before the event uses; dropped by the poller when that work is done.
    type Keep: Send;
    /// Whether the work before it is done. Called from any thread.
    fn query(&self) -> Result<bool>;
    /// The same, called from the poller's thread only.
    fn query_on_poller(&self) -> Result<bool>;
}

/// Waits that are short at first and never long, for what tells nobody when it is over.
#[derive(Debug, Default)]
pub struct Pause(u32);

impl Pause {
    /// Waits.
    pub fn take(&mut self) {
        self.0 = self.0.saturating_add(1);
        match self.0 {
            ..200 => std::thread::yield_now(),
            200..2000 => std::thread::sleep(Duration::from_micros(20)),
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// What the poller found out about one event.
#[derive(Debug, Default)]
struct Completion {
    result: OnceLock<Result<()>>,
    changed: Notify,
}

/// A recorded event that a [`Poller`] watches.
pub struct PolledEvent<P: Polled> {
    event: Arc<P>,
    completion: Arc<Completion>,
    poller: Arc<Poller<P>>,
}

impl<P: Polled> fmt::Debug for PolledEvent<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolledEvent").field("result", &self.completion.result.get()).finish_non_exhaustive()
    }
}

impl<P: Polled> PolledEvent<P> {
    /// The native event.
    pub fn native(&self) -> &Arc<P> {
        &self.event
    }

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
            "wait for a device's stream",
            "the work was not done by its deadline; a peer may be dead, or the device hangs",
        ))
    }
}

#[async_trait]
impl<P: Polled> EventState for PolledEvent<P> {
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

/// One recorded event with what the work before it uses.
struct Entry<P: Polled> {
    stream: u64,
    event: Arc<P>,
    completion: Arc<Completion>,
    keep: P::Keep,
}

struct Inbox<P: Polled> {
    entries: Vec<Entry<P>>,
    /// The thread sleeps until it is told.
    asleep: bool,
    /// No more entries will come.
    closed: bool,
}

struct Shared<P: Polled> {
    inbox: Mutex<Inbox<P>>,
    wake: Condvar,
    waiting: AtomicUsize,
}

impl<P: Polled> Shared<P> {
    fn inbox(&self) -> MutexGuard<'_, Inbox<P>> {
        self.inbox.lock().expect("nothing panics while the inbox is locked")
    }

    fn interest(&self) -> Interest<'_, P> {
        if self.waiting.fetch_add(1, Ordering::AcqRel) == 0 {
            // Under the lock, so that the thread is either before its look at `waiting` or already asleep.
            let _inbox = self.inbox();
            self.wake.notify_one();
        }
        Interest(self)
    }
}

/// Somebody waits: the poller looks without pause. Dropped with the waiting future.
struct Interest<'a, P: Polled>(&'a Shared<P>);

impl<P: Polled> Drop for Interest<'_, P> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The handle of a device's polling thread; the thread ends when the last handle is gone and all work is done.
pub struct Poller<P: Polled> {
    shared: Arc<Shared<P>>,
}

impl<P: Polled> fmt::Debug for Poller<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Poller")
    }
}

/// Between two looks while nobody waits.
const IDLE_LOOK: Duration = Duration::from_millis(1);
/// Looks without sleep after the last completion, about a microsecond each, before the thread starts to nap.
const EAGER_LOOKS: u32 = 64;
/// A nap between two looks while somebody waits; the kernel adds its own wake-up time.
const NAP: Duration = Duration::from_micros(3);

impl<P: Polled> Poller<P> {
    /// Starts the thread. It calls `around` once, whose argument does all the work: the place to make a device current.
    pub fn start(name: &str, around: impl FnOnce(&mut dyn FnMut()) + Send + 'static) -> Result<Arc<Self>> {
        let shared = Arc::new(Shared {
            inbox: Mutex::new(Inbox { entries: Vec::new(), asleep: false, closed: false }),
            wake: Condvar::new(),
            waiting: AtomicUsize::new(0),
        });
        let for_thread = shared.clone();
        let body = move || around(&mut || run(&for_thread));
        std::thread::Builder::new().name(name.to_owned()).spawn(body).map_err(|e| {
            Error::new(ErrorKind::ResourceExhausted, "open a device", "cannot start a thread").caused_by(e)
        })?;
        Ok(Arc::new(Self { shared }))
    }

    /// Watches an event of the stream numbered `stream`; `keep` stays alive until it completes.
    pub fn watch(self: &Arc<Self>, stream: u64, event: Arc<P>, keep: P::Keep) -> PolledEvent<P> {
        let completion = Arc::new(Completion::default());
        let entry = Entry { stream, event: event.clone(), completion: completion.clone(), keep };
        let mut inbox = self.shared.inbox();
        inbox.entries.push(entry);
        if inbox.asleep {
            self.shared.wake.notify_one();
        }
        drop(inbox);
        PolledEvent { event, completion, poller: self.clone() }
    }
}

impl<P: Polled> Drop for Poller<P> {
    fn drop(&mut self) {
        self.shared.inbox().closed = true;
        self.shared.wake.notify_one();
    }
}

fn run<P: Polled>(shared: &Shared<P>) {
    // Without this the kernel lengthens each nap by 50 us. A refusal costs only speed.
    let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
    let mut streams: BTreeMap<u64, VecDeque<Entry<P>>> = BTreeMap::new();
    let mut looks = 0u32;
    while collect(shared, &mut streams) {
        let before: usize = streams.values().map(VecDeque::len).sum();
        for queue in streams.values_mut() {
            retire(queue);
        }
        streams.retain(|_, queue| !queue.is_empty());
        let after: usize = streams.values().map(VecDeque::len).sum();
        looks = if after < before { 0 } else { looks.saturating_add(1) };
        if shared.waiting.load(Ordering::Acquire) > 0 && looks > EAGER_LOOKS {
            std::thread::sleep(NAP);
        }
    }
}

/// Takes new entries in; sleeps as long as may be. False when all is over.
fn collect<P: Polled>(shared: &Shared<P>, streams: &mut BTreeMap<u64, VecDeque<Entry<P>>>) -> bool {
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
        let (mut inbox, _) =
            shared.wake.wait_timeout(inbox, IDLE_LOOK).expect("nothing panics while the inbox is locked");
        for entry in inbox.entries.drain(..) {
            streams.entry(entry.stream).or_default().push_back(entry);
        }
    }
    true
}

/// Completes the events at the head of one stream that are over, in order.
fn retire<P: Polled>(queue: &mut VecDeque<Entry<P>>) {
    while let Some(entry) = queue.front() {
        let result = entry.event.query_on_poller();
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
