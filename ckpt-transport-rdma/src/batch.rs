//! What work requests carry, and batches of them that are waited for together.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use ckpt_core::transport::{Transfer, Way};
use tokio::sync::Notify;

use crate::{error::VerbsError, memory::MrSet, wire::Descriptor};

/// What one work request carries. It owns the memory that the device writes or reads.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) transfer: Transfer,
    pub(crate) registered: Arc<MrSet>,
    /// Of the transfer's region.
    pub(crate) descriptor: Arc<Descriptor>,
}

impl Part {
    pub(crate) fn remote_address(&self) -> u64 {
        self.transfer.region.address + self.transfer.offset
    }
}

/// A part that did not arrive, and why.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) part: Part,
    pub(crate) error: VerbsError,
    /// This side's device, and which of the connection's lanes.
    pub(crate) hca: String,
    pub(crate) lane: usize,
}

/// Parts that are waited for together, and what belongs to whoever waits for them: an event, or nothing. One allocation
/// for both, as a small read is hardly longer than a few.
pub(crate) struct Batch<T: ?Sized = dyn Send + Sync> {
    pub(crate) way: Way,
    left: AtomicUsize,
    failed: AtomicBool,
    failures: Mutex<Vec<Failure>>,
    /// Somebody wants to be woken.
    awaited: AtomicBool,
    done: Notify,
    pub(crate) waiter: T,
}

impl<T: ?Sized> fmt::Debug for Batch<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch").field("way", &self.way).field("left", &self.left).finish_non_exhaustive()
    }
}

impl<T> Batch<T> {
    pub(crate) fn new(way: Way, parts: usize, waiter: T) -> Self {
        Self {
            way,
            left: AtomicUsize::new(parts),
            failed: AtomicBool::new(false),
            failures: Mutex::default(),
            awaited: AtomicBool::new(false),
            done: Notify::new(),
            waiter,
        }
    }
}

impl<T: ?Sized> Batch<T> {
    fn failures(&self) -> MutexGuard<'_, Vec<Failure>> {
        // Each change under this lock is whole even after a panic elsewhere.
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One part has ended.
    pub(crate) fn finish(&self, failure: Option<Failure>) {
        let failed = failure.is_some();
        if let Some(failure) = failure {
            self.failures().push(failure);
            self.failed.store(true, Ordering::SeqCst);
        }
        // Before `awaited` is asked, as who waits sets that before it looks: one of the two sees the other.
        let last = self.left.fetch_sub(1, Ordering::SeqCst) == 1;
        if (last || failed) && self.awaited.load(Ordering::SeqCst) {
            self.done.notify_waiters();
        }
    }

    /// Whether all parts have arrived; `Err` if one has failed.
    pub(crate) fn arrived(&self) -> Result<bool, ()> {
        // In this order: the last part's failure is there before nothing is left.
        let over = self.left.load(Ordering::SeqCst) == 0;
        if self.failed.load(Ordering::SeqCst) { Err(()) } else { Ok(over) }
    }

    /// Waits until `look` finds something.
    async fn until<F>(&self, look: impl Fn() -> Option<F>) -> F {
        self.awaited.store(true, Ordering::SeqCst);
        loop {
            let mut notified = std::pin::pin!(self.done.notified());
            notified.as_mut().enable();
            if let Some(found) = look() {
                return found;
            }
            notified.await;
        }
    }

    /// Waits until all parts have arrived (`true`), or one has failed.
    pub(crate) async fn decided(&self) -> bool {
        let decided = || match self.arrived() {
            Ok(false) => None,
            outcome => Some(outcome.is_ok()),
        };
        self.until(decided).await
    }

    /// Waits until no part is on a device any more; answers those that failed.
    pub(crate) async fn finished(&self) -> Vec<Failure> {
        let over = || self.left.load(Ordering::SeqCst) == 0;
        self.until(|| over().then(|| std::mem::take(&mut *self.failures()))).await
    }
}
