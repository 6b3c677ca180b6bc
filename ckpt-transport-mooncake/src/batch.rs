//! One posted batch: what its caller waits for, and which memory Mooncake may still touch.

use std::{
    any::Any,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Instant,
};

use async_trait::async_trait;
use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{BufferSlice, EventState},
    transport::Way,
};
use tokio::sync::Notify;

/// Shared by the caller's event and the peers' threads.
#[derive(Debug)]
pub(crate) struct Posted {
    outcome: OnceLock<Result<()>>,
    notify: Notify,
    /// Peers that still work on it.
    parts: AtomicUsize,
    failure: Mutex<Option<Error>>,
    way: Way,
    peers: String,
    pub(crate) deadline: Instant,
    /// Addresses of this side's memory.
    memory: Vec<(u64, u64)>,
}

impl Posted {
    pub(crate) fn new(way: Way, peers: &[&str], deadline: Instant, memory: &[&BufferSlice]) -> Arc<Self> {
        let posted = Self {
            outcome: OnceLock::new(),
            notify: Notify::new(),
            parts: AtomicUsize::new(peers.len()),
            failure: Mutex::default(),
            way,
            peers: peers.join(", "),
            deadline,
            memory: memory.iter().map(|s| (s.address(), s.address() + s.len_bytes())).collect(),
        };
        if peers.is_empty() {
            posted.complete(Ok(()));
        }
        Arc::new(posted)
    }

    fn complete(&self, outcome: Result<()>) {
        // The first outcome stays: a timeout that was reported is not taken back.
        let _ = self.outcome.set(outcome);
        self.notify.notify_waiters();
    }

    fn failure(&self) -> MutexGuard<'_, Option<Error>> {
        // One assignment under this lock.
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One peer's part has ended and its memory is free.
    pub(crate) fn part_ended(&self, outcome: Result<()>) {
        if let Err(error) = outcome {
            self.failure().get_or_insert(error);
        }
        if self.parts.fetch_sub(1, Ordering::AcqRel) == 1 {
            let failure = self.failure().take();
            self.complete(failure.map_or(Ok(()), Err));
        }
    }

    /// Whether nobody waits for it any more.
    pub(crate) fn is_over(&self) -> bool {
        self.outcome.get().is_some()
    }

    /// Whether Mooncake has let go of all its memory.
    pub(crate) fn is_retired(&self) -> bool {
        self.parts.load(Ordering::Acquire) == 0
    }

    /// Whether it was given up while Mooncake may still touch `memory`.
    pub(crate) fn haunts(&self, memory: &BufferSlice) -> bool {
        let (start, end) = (memory.address(), memory.address() + memory.len_bytes());
        self.is_over() && !self.is_retired() && self.memory.iter().any(|(s, e)| start < *e && *s < end)
    }

    pub(crate) fn peers(&self) -> &str {
        &self.peers
    }

    /// Ends the wait if the deadline has passed.
    pub(crate) fn expire(&self) {
        if !self.is_over() && Instant::now() >= self.deadline {
            let what =
                "the bytes did not arrive by the deadline; their memory stays in use until Mooncake gives up";
            let error = Error::new(ErrorKind::Timeout, self.way.operation(), what);
            let error = if self.peers.is_empty() { error } else { error.with(Key::Peer, &self.peers) };
            self.complete(Err(error));
        }
    }
}

/// The caller's end of a batch.
#[derive(Debug)]
pub(crate) struct Ending(pub(crate) Arc<Posted>);

#[async_trait]
impl EventState for Ending {
    fn is_complete(&self) -> Result<bool> {
        self.0.expire();
        self.0.outcome.get().map_or(Ok(false), |outcome| outcome.clone().map(|()| true))
    }

    async fn done(&self, deadline: Instant) -> Result<()> {
        let posted = &self.0;
        let mut notified = pin!(posted.notify.notified());
        notified.as_mut().enable();
        if !posted.is_over() {
            let until = deadline.min(posted.deadline);
            // Whether it was woken or timed out is seen below.
            let _ = tokio::time::timeout_at(until.into(), notified).await;
            posted.expire();
        }
        posted.outcome.get().cloned().unwrap_or_else(|| {
            let what = "the wait was shorter than the batch's own deadline";
            Err(Error::new(ErrorKind::Timeout, posted.way.operation(), what).with(Key::Peer, &posted.peers))
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// All batches that are not retired.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    batches: Mutex<Vec<Arc<Posted>>>,
    warned: AtomicBool,
}

impl InFlight {
    /// Takes a batch in, unless a batch that was given up may still touch the same memory.
    pub(crate) fn admit(&self, posted: &Arc<Posted>, memory: &[&BufferSlice]) -> Result<()> {
        // Nothing that can panic runs under this lock.
        let mut batches = self.batches.lock().unwrap_or_else(PoisonError::into_inner);
        batches.retain(|batch| !batch.is_retired());
        if let Some(late) = batches.iter().find(|batch| memory.iter().any(|slice| batch.haunts(slice))) {
            if !self.warned.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    peer = late.peers(),
                    "a batch that missed its deadline still holds its memory"
                );
            }
            let what = "this memory still belongs to a batch that missed its deadline, which Mooncake cannot cancel; \
                        use other memory, or try again when the peer has answered or is gone";
            return Err(
                Error::new(ErrorKind::Backend, posted.way.operation(), what).with(Key::Peer, late.peers())
            );
        }
        batches.push(posted.clone());
        Ok(())
    }
}
