//! One queue pair of this side, and the batches whose pieces it carries.

use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use ckpt_core::transport::Way;

use crate::{
    batch::{Batch, Failure, Part},
    error::VerbsError,
    nic::Nic,
    queue::SendQueue,
    room::Share,
    sys::{self, Sge},
    verbs::Qp,
};

/// Numbers of work requests: each lane has its own range.
static LANES: AtomicU64 = AtomicU64::new(1);

/// One work request.
#[derive(Debug)]
struct Piece {
    batch: Arc<Batch>,
    part: Part,
    remote_key: u32,
}

const fn opcode(way: Way) -> u32 {
    match way {
        Way::Read => sys::WR_RDMA_READ,
        Way::Write => sys::WR_RDMA_WRITE,
    }
}

/// Pieces that no device has any more. They are settled without the queue's lock: whatever ends with them may end the
/// lane.
#[derive(Default)]
struct Returned {
    /// Mostly it is one that arrived.
    arrived: Option<Piece>,
    others: Option<Vec<(Piece, Option<VerbsError>)>>,
}

impl Returned {
    fn arrived(&mut self, piece: Piece) {
        match self.arrived {
            None => self.arrived = Some(piece),
            Some(_) => self.others.get_or_insert_default().push((piece, None)),
        }
    }

    fn failed(&mut self, pieces: impl IntoIterator<Item = Piece>, error: &VerbsError) {
        let failed = pieces.into_iter().map(|piece| (piece, Some(error.clone())));
        self.others.get_or_insert_default().extend(failed);
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
    /// The request that the device did not take, and why.
    refusal: OnceLock<(u64, VerbsError)>,
    /// That request is still to be posted again; changed under the queue's lock.
    unposted: AtomicBool,
    /// Where its completions have room: as many as fly at most.
    _room: Share,
}

impl Lane {
    pub(crate) fn new(qp: Qp, nic: Arc<Nic>, index: usize, remote_nic: usize, room: Share) -> Arc<Self> {
        let first = LANES.fetch_add(1, Ordering::Relaxed) << 40;
        let lane = Arc::new(Self {
            qp,
            nic: nic.clone(),
            index,
            remote_nic,
            queue: Mutex::new(SendQueue::new(room.entries as usize, first)),
            closed: AtomicBool::new(false),
            refusal: OnceLock::new(),
            unposted: AtomicBool::new(false),
            _room: room,
        });
        nic.add_lane(lane.number(), &lane);
        lane
    }

    pub(crate) fn number(&self) -> u32 {
        self.qp.number()
    }

    fn lock(&self) -> MutexGuard<'_, SendQueue<Piece>> {
        // Each change under this lock is whole even after a panic elsewhere.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_open(&self) -> bool {
        !self.closed.load(Ordering::Acquire)
    }

    /// Does what is still to be done, and answers whether requests fly. Does not wait for whoever posts, who may post again
    /// and again: then requests fly.
    pub(crate) fn tend(&self) -> bool {
        let queue = match self.queue.try_lock() {
            Ok(queue) => queue,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return true,
        };
        self.post_again(&queue);
        !queue.is_idle()
    }

    /// Posts `parts` of `batch`, or keeps them until slots are free.
    pub(crate) fn submit(&self, batch: &Arc<Batch>, parts: impl IntoIterator<Item = Part>) {
        let mut returned = Returned::default();
        let mut queue = self.lock();
        for part in parts {
            let remote_key = part.descriptor.key(self.remote_nic);
            if let Err(piece) = queue.push(Piece { batch: batch.clone(), part, remote_key }) {
                returned.failed([piece], &FLUSHED);
            }
        }
        self.pump(&mut queue, &mut returned);
        drop(queue);
        self.settle(returned);
    }

    fn pump(&self, queue: &mut SendQueue<Piece>, returned: &mut Returned) {
        while let Some((piece, number, signalled)) = queue.start() {
            if let Err(error) = self.post(piece, number, signalled) {
                return self.refused(queue, number, error, returned);
            }
        }
    }

    fn post(&self, piece: &Piece, number: u64, signalled: bool) -> Result<(), VerbsError> {
        let Piece { batch, part, remote_key } = piece;
        let memory = &part.transfer.memory;
        let local = Sge {
            addr: memory.address(),
            length: memory.len_bytes() as u32,
            lkey: part.registered.local_key(self.nic.index),
        };
        let remote = (part.remote_address(), *remote_key);
        // SAFETY: the piece owns memory and registration, and stays in `queue` until its completion was polled or the
        // queue pair was destroyed; the caller of the transport lets nobody else write it.
        unsafe { self.qp.post(opcode(batch.way), number, local, remote, signalled) }
    }

    /// The device has not taken a request, the last that was started. What becomes of those before it is not known yet, and
    /// the device may never tell of those that are unsignalled. So the request is posted again, signalled, behind the end of
    /// the queue pair: there it only completes, after them.
    #[cold]
    fn refused(&self, queue: &mut SendQueue<Piece>, number: u64, error: VerbsError, returned: &mut Returned) {
        self.closed.store(true, Ordering::Release);
        returned.failed(queue.close(), &FLUSHED);
        self.end_queue_pair();
        // A closed lane posts nothing else, so there is no other refusal.
        let _ = self.refusal.set((number, error));
        self.unposted.store(true, Ordering::Relaxed);
        self.post_again(queue);
    }

    /// Posts the request again that was refused, if that is still to be done. The send queue may be full until completions
    /// have been polled.
    fn post_again(&self, queue: &SendQueue<Piece>) {
        if !self.unposted.load(Ordering::Relaxed) {
            return;
        }
        if let Some((number, _)) = self.refusal.get()
            && let Some(piece) = queue.newest()
            && self.post(piece, *number, true).is_ok()
        {
            self.unposted.store(false, Ordering::Relaxed);
        }
    }

    /// A completion of this lane.
    pub(crate) fn completed(&self, completion: &sys::Wc) {
        let number = completion.wr_id;
        let mut returned = Returned::default();
        let mut queue = self.lock();
        match completion.status {
            0 => {
                queue.complete(number, |piece| returned.arrived(piece));
                self.pump(&mut queue, &mut returned);
            }
            status => {
                let error = VerbsError::Completion { status, vendor: completion.vendor_err };
                let refusal = self.refusal.get().filter(|(refused, _)| *refused == number);
                let error = refusal.map_or(&error, |(_, why)| why);
                self.fail(&mut queue, number, error, &mut returned);
            }
        }
        drop(queue);
        self.settle(returned);
    }

    /// A request has failed, and with it the lane.
    fn fail(&self, queue: &mut SendQueue<Piece>, number: u64, error: &VerbsError, returned: &mut Returned) {
        self.closed.store(true, Ordering::Release);
        let culprit = queue.fail(number, |piece| returned.arrived(piece));
        returned.failed(culprit, error);
        returned.failed(queue.close(), &FLUSHED);
    }

    /// Ends the lane: what is in flight fails with a flush error.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        let mut returned = Returned::default();
        returned.failed(self.lock().close(), &FLUSHED);
        self.settle(returned);
        self.end_queue_pair();
        self.nic.wake();
    }

    fn end_queue_pair(&self) {
        if let Err(error) = self.qp.to_error() {
            tracing::debug!(%error, hca = self.nic.name(), "a queue pair cannot be ended");
        }
    }

    fn settle(&self, returned: Returned) {
        let Returned { arrived, others } = returned;
        let settle = |piece: Piece, error: Option<VerbsError>| {
            let Piece { batch, part, .. } = piece;
            let Some(error) = error else {
                // The memory is free before anybody is told.
                drop(part);
                return batch.finish(None);
            };
            batch.finish(Some(Failure { part, error, hca: self.nic.name().to_owned(), lane: self.index }));
        };
        if let Some(piece) = arrived {
            settle(piece, None);
        }
        others.into_iter().flatten().for_each(|(piece, error)| settle(piece, error));
    }

    /// Gives up what is in flight: its memory is never freed, as the device may still touch it.
    pub(crate) fn abandon(&self) {
        let abandoned = self.lock().abandon();
        if !abandoned.is_empty() {
            tracing::error!(
                hca = self.nic.name(),
                "{} requests never completed; their memory is kept",
                abandoned.len()
            );
        }
        let mut returned = Returned::default();
        abandoned.iter().for_each(|piece| std::mem::forget(piece.part.clone()));
        returned.failed(abandoned, &FLUSHED);
        self.settle(returned);
    }
}

/// What happens to requests behind one that failed.
pub(crate) const FLUSHED: VerbsError = VerbsError::Completion { status: 5, vendor: 0 };

impl Drop for Lane {
    fn drop(&mut self) {
        // The NIC holds lanes with requests in flight, so there are some only if it gave up on its device. Their memory
        // must outlive the queue pair, which is destroyed after this.
        self.abandon();
    }
}
