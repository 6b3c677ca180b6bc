//! One queue pair of this side, and the batches whose pieces it carries.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
};

use ckpt_core::{device::BufferSlice, transport::Way};
use tokio::sync::Notify;

use crate::{
    error::VerbsError,
    memory::MrSet,
    nic::Nic,
    queue::SendQueue,
    sys::{self, Sge},
    verbs::Qp,
};

/// Numbers of work requests: each lane has its own range.
static LANES: AtomicU64 = AtomicU64::new(1);

/// One work request. It owns the memory that the device writes or reads.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) batch: Arc<Batch>,
    /// Which piece of the batch.
    pub(crate) index: usize,
    pub(crate) way: Way,
    pub(crate) memory: BufferSlice,
    pub(crate) registered: Arc<MrSet>,
    pub(crate) remote_address: u64,
    pub(crate) remote_key: u32,
}

const fn opcode(way: Way) -> u32 {
    match way {
        Way::Read => sys::WR_RDMA_READ,
        Way::Write => sys::WR_RDMA_WRITE,
    }
}

/// Why a piece did not arrive.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) index: usize,
    pub(crate) error: VerbsError,
    /// The reader's device, the owner's, and the queue pair's number.
    pub(crate) hca: String,
    pub(crate) lane: usize,
}

/// Pieces that are waited for together.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    left: AtomicUsize,
    failed: AtomicBool,
    failures: Mutex<Vec<Failure>>,
    /// Somebody wants to be woken.
    awaited: AtomicBool,
    done: Notify,
}

impl Batch {
    pub(crate) fn new(pieces: usize) -> Arc<Self> {
        Arc::new(Self { left: AtomicUsize::new(pieces), ..Self::default() })
    }

    fn failures(&self) -> MutexGuard<'_, Vec<Failure>> {
        // Each change under this lock is whole even after a panic elsewhere.
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn finish(&self, failure: Option<Failure>) {
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

    /// Whether all pieces have arrived; `Err` if one has failed.
    pub(crate) fn arrived(&self) -> Result<bool, ()> {
        // In this order: the last piece's failure is there before nothing is left.
        let over = self.left.load(Ordering::SeqCst) == 0;
        if self.failed.load(Ordering::SeqCst) { Err(()) } else { Ok(over) }
    }

    /// Waits until `look` finds something.
    async fn until<T>(&self, look: impl Fn() -> Option<T>) -> T {
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

    /// Waits until all pieces have arrived (`true`), or one has failed.
    pub(crate) async fn decided(&self) -> bool {
        let decided = || match self.arrived() {
            Ok(false) => None,
            outcome => Some(outcome.is_ok()),
        };
        self.until(decided).await
    }

    /// Waits until no piece is on a device any more; answers those that failed.
    pub(crate) async fn finished(&self) -> Vec<Failure> {
        let over = || self.left.load(Ordering::SeqCst) == 0;
        self.until(|| over().then(|| std::mem::take(&mut *self.failures()))).await
    }
}

/// One queue pair.
#[derive(Debug)]
pub(crate) struct Lane {
    /// Destroyed before the pieces behind it in `queue` are dropped.
    qp: Qp,
    pub(crate) nic: Arc<Nic>,
    /// Which of the connection's lanes.
    pub(crate) index: usize,
    /// Which of the owner's NICs is on the other side.
    pub(crate) remote_nic: usize,
    queue: Mutex<SendQueue<Piece>>,
    /// The queue takes no more; asked without its lock.
    closed: AtomicBool,
}

impl Lane {
    pub(crate) fn new(qp: Qp, nic: Arc<Nic>, index: usize, remote_nic: usize, depth: u32) -> Arc<Self> {
        let first = LANES.fetch_add(1, Ordering::Relaxed) << 40;
        let lane = Arc::new(Self {
            qp,
            nic: nic.clone(),
            index,
            remote_nic,
            queue: Mutex::new(SendQueue::new(depth as usize, first)),
            closed: AtomicBool::new(false),
        });
        nic.add_lane(lane.number(), &lane);
        lane
    }

    pub(crate) fn number(&self) -> u32 {
        self.qp.number()
    }

    fn lock(&self) -> MutexGuard<'_, SendQueue<Piece>> {
        // As for the batch.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_open(&self) -> bool {
        !self.closed.load(Ordering::Acquire)
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.lock().is_idle()
    }

    /// Posts `pieces`, or keeps them until slots are free.
    pub(crate) fn submit(&self, pieces: impl Iterator<Item = Piece>) {
        let mut queue = self.lock();
        let refused: Vec<Piece> = pieces.filter_map(|piece| queue.push(piece).err()).collect();
        self.pump(&mut queue);
        drop(queue);
        self.settle(refused, Some(&FLUSHED));
    }

    fn pump(&self, queue: &mut SendQueue<Piece>) {
        while let Some((piece, number, signalled)) = queue.start() {
            let local = Sge {
                addr: piece.memory.address(),
                length: piece.memory.len_bytes() as u32,
                lkey: piece.registered.local_key(self.nic.index),
            };
            let remote = (piece.remote_address, piece.remote_key);
            // SAFETY: the piece owns memory and registration, and stays in `queue` until its completion was polled or
            // the queue pair was destroyed; the caller of the transport lets nobody else write it.
            let posted = unsafe { self.qp.post(opcode(piece.way), number, local, remote, signalled) };
            if let Err(error) = posted {
                // The device has not taken it. Those before it may be unsignalled: the error state flushes them.
                self.fail(queue, number, &error);
                return self.end_queue_pair();
            }
        }
    }

    /// A completion of this lane.
    pub(crate) fn completed(&self, number: u64, outcome: Result<(), VerbsError>) {
        let mut queue = self.lock();
        match outcome {
            Ok(()) => {
                let done = queue.complete(number);
                self.settle(done, None);
                self.pump(&mut queue);
            }
            Err(error) => self.fail(&mut queue, number, &error),
        }
    }

    /// A request has failed, and with it the lane.
    fn fail(&self, queue: &mut SendQueue<Piece>, number: u64, error: &VerbsError) {
        self.closed.store(true, Ordering::Release);
        let failed = queue.fail(number);
        self.settle(failed.done, None);
        self.settle(failed.culprit, Some(error));
        self.settle(queue.close(), Some(&FLUSHED));
    }

    /// Ends the lane: what is in flight fails with a flush error.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        let waiting = self.lock().close();
        self.settle(waiting, Some(&FLUSHED));
        self.end_queue_pair();
        self.nic.wake();
    }

    fn end_queue_pair(&self) {
        if let Err(error) = self.qp.to_error() {
            tracing::debug!(%error, hca = self.nic.name(), "a queue pair cannot be ended");
        }
    }

    fn settle(&self, pieces: impl IntoIterator<Item = Piece>, error: Option<&VerbsError>) {
        for piece in pieces {
            let failure = error.map(|error| Failure {
                index: piece.index,
                error: error.clone(),
                hca: self.nic.name().to_owned(),
                lane: self.index,
            });
            let Piece { batch, memory, registered, .. } = piece;
            // The memory is free before anybody is told.
            drop((memory, registered));
            batch.finish(failure);
        }
    }
}

/// What happens to requests behind one that failed.
pub(crate) const FLUSHED: VerbsError = VerbsError::Completion { status: 5, vendor: 0 };

impl Drop for Lane {
    fn drop(&mut self) {
        // The NIC holds lanes with requests in flight, so there are some only if it gave up on its device. Their memory
        // must outlive the queue pair, which is destroyed after this: it is never freed.
        let abandoned = self.lock().abandon();
        if !abandoned.is_empty() {
            tracing::error!(
                hca = self.nic.name(),
                "{} requests never completed; their memory is kept",
                abandoned.len()
            );
        }
        for piece in abandoned {
            let Piece { batch, memory, registered, index, .. } = piece;
            std::mem::forget((memory, registered));
            let hca = self.nic.name().to_owned();
            batch.finish(Some(Failure { index, error: FLUSHED, hca, lane: self.index }));
        }
    }
}
