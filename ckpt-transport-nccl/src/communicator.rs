//! One communicator: a thread of its own for every call, a second one to abort it.
//!
//! NCCL allows one thread at a time in a communicator, and a group call belongs to the thread that opened it. A
//! non-blocking group call returns "in progress" and launches its kernels from a thread of NCCL's: only once that has
//! cleared may an event be recorded, or another call made. All calls are short, so a lock around each of them is enough
//! to let the abort in between.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, TryLockError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{BufferSlice, DeviceBackend, Event, MemoryKind, RawStream, Stream, poll::Pause},
    transport::{
        AbortHandle, CollectiveOp, Communicator, CommunicatorQueue,
        endings::{EndingTicket, Endings},
    },
};
use tokio::sync::oneshot;

use crate::{
    config::NcclConfig,
    device::Context,
    error::NCCL_IN_PROGRESS,
    library::{Nccl, RawConfig, UINT8, UniqueId},
    table::Handle,
    warm_up,
};

/// What one member brings into a group.
pub(crate) struct Member {
    pub(crate) nccl: Arc<Nccl>,
    pub(crate) context: Arc<Context>,
    #[expect(dead_code, reason = "keeps the context alive")]
    pub(crate) device: Arc<dyn DeviceBackend>,
    pub(crate) config: NcclConfig,
    pub(crate) aborts: Arc<Endings>,
    pub(crate) id: UniqueId,
    pub(crate) rank: u32,
    pub(crate) world_size: u32,
}

/// A group of broadcasts for the communicator's thread.
struct Job {
    ops: Vec<CollectiveOp>,
    stream: Arc<dyn Stream>,
    reply: oneshot::Sender<Result<Event>>,
}

/// Joins; the communicator's thread lives until its queue is dropped or it is aborted.
pub(crate) async fn join(member: Member, stream: Arc<dyn Stream>, deadline: Instant) -> Result<Communicator> {
    let (rank, world_size) = (member.rank, member.world_size);
    let shared = Arc::new(Shared {
        member,
        communicator: Mutex::new(0),
        cause: OnceLock::new(),
        aborting: AtomicBool::new(false),
    });
    let (jobs, inbox) = mpsc::channel::<Job>();
    let (ready, joined) = oneshot::channel();
    let for_thread = shared.clone();
    std::thread::Builder::new()
        .name(format!("nccl-{rank}"))
        .spawn(move || for_thread.serve(&stream, deadline, ready, &inbox))
        .map_err(|e| {
            Error::new(ErrorKind::ResourceExhausted, "join an NCCL group", "cannot start a thread")
                .caused_by(e)
        })?;
    // Whoever stops waiting (a deadline, a dropped future) leaves no half-made communicator behind.
    let unfinished = AbortUnlessDone(Some(shared.clone()));
    // The thread watches the deadline; the margin is for a call of NCCL's that does not return.
    let margin = Duration::from_secs(1);
    match tokio::time::timeout_at((deadline + margin).into(), joined).await {
        Ok(Ok(Ok(()))) => {}
        Ok(Ok(Err(error))) => return Err(error),
        Ok(Err(_)) => {
            return Err(Error::new(ErrorKind::Internal, "join an NCCL group", "the thread ended early"));
        }
        Err(_) => {
            let error =
                Error::new(ErrorKind::Timeout, "join an NCCL group", "NCCL did not return by the deadline");
            shared.abort(error.clone());
            return Err(error);
        }
    }
    unfinished.done();
    let queue = Box::new(NcclQueue { shared: shared.clone(), jobs, rank, world_size });
    Ok(Communicator { queue, abort: Arc::new(NcclAbort(shared)) })
}

struct AbortUnlessDone(Option<Arc<Shared>>);

impl AbortUnlessDone {
    fn done(mut self) {
        self.0 = None;
    }
}

impl Drop for AbortUnlessDone {
    fn drop(&mut self) {
        if let Some(shared) = self.0.take() {
            shared.abort(Error::new(
                ErrorKind::Aborted,
                "join an NCCL group",
                "this rank stopped waiting for the group",
            ));
        }
    }
}

/// A communicator's queue.
#[derive(Debug)]
struct NcclQueue {
    shared: Arc<Shared>,
    /// Closing this channel ends the thread, which then frees the communicator.
    jobs: mpsc::Sender<Job>,
    rank: u32,
    world_size: u32,
}

#[async_trait]
impl CommunicatorQueue for NcclQueue {
    async fn enqueue(&mut self, ops: Vec<CollectiveOp>, stream: &Arc<dyn Stream>) -> Result<Event> {
        self.shared.healthy()?;
        for op in &ops {
            check_op(op, self.world_size)?;
        }
        if !matches!(stream.raw(), RawStream::Cuda(_)) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "broadcast",
                "NCCL enqueues on CUDA streams only",
            ));
        }
        let (reply, answer) = oneshot::channel();
        let gone = |shared: &Shared| {
            shared.healthy().err().unwrap_or_else(|| {
                Error::new(ErrorKind::Internal, "broadcast", "the communicator's thread has ended")
            })
        };
        self.jobs.send(Job { ops, stream: stream.clone(), reply }).map_err(|_| gone(&self.shared))?;
        answer.await.map_err(|_| gone(&self.shared))?.map_err(|e| e.with(Key::Rank, self.rank))
    }
}

pub(crate) fn check_op(op: &CollectiveOp, world_size: u32) -> Result<()> {
    if op.root >= world_size {
        return Err(Error::new(
            ErrorKind::Internal,
            "broadcast",
            format!("root {} is not in a group of {world_size}", op.root),
        ));
    }
    // Memory that is not the device's would be read by a kernel as if it were.
    if op.buffer.len_bytes() > 0 && op.buffer.memory() != MemoryKind::Device {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "broadcast",
            "only device memory is broadcast; copy the bytes into the ring first",
        ));
    }
    Ok(())
}

/// What the queue, the thread and the abort handle share.
pub(crate) struct Shared {
    pub(crate) member: Member,
    /// 0 before and after. Every NCCL call on it is made under this lock.
    communicator: Mutex<Handle>,
    cause: OnceLock<Error>,
    aborting: AtomicBool,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NcclCommunicator")
            .field("rank", &self.member.rank)
            .field("world_size", &self.member.world_size)
            .field("cause", &self.cause.get())
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// How long a look at the health waits for the communicator's thread to leave NCCL.
    const LOOK: Duration = Duration::from_millis(250);

    fn locked(&self) -> MutexGuard<'_, Handle> {
        self.communicator.lock().expect("nothing panics while the communicator is locked")
    }

    /// The lock, unless a call of NCCL's holds it until `deadline`.
    fn locked_by(&self, deadline: Instant) -> Option<MutexGuard<'_, Handle>> {
        let mut pause = Pause::default();
        loop {
            match self.communicator.try_lock() {
                Ok(guard) => return Some(guard),
                Err(TryLockError::Poisoned(_)) => return None,
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return None,
                Err(TryLockError::WouldBlock) => pause.take(),
            }
        }
    }

    fn healthy(&self) -> Result<()> {
        match self.cause.get() {
            None => Ok(()),
            Some(cause) => {
                let cause = cause.clone();
                Err(Error::new(ErrorKind::Aborted, "broadcast", "the group was aborted").caused_by(cause))
            }
        }
    }

    /// The first cause stays.
    fn poison(&self, cause: Error) {
        // A second cause is refused, as it should be.
        let _ = self.cause.set(cause);
    }

    /// Calls `call` with the communicator, if it is healthy and there is one.
    pub(crate) fn with(&self, call: impl FnOnce(&Nccl, Handle) -> Result<()>) -> Result<()> {
        let communicator = self.locked();
        self.healthy()?;
        if *communicator == 0 {
            return Err(Error::new(ErrorKind::Internal, "broadcast", "the communicator is gone"));
        }
        call(&self.member.nccl, *communicator)
    }

    /// The communicator's life, on its own thread.
    fn serve(
        self: Arc<Self>,
        stream: &Arc<dyn Stream>,
        deadline: Instant,
        ready: oneshot::Sender<Result<()>>,
        jobs: &mpsc::Receiver<Job>,
    ) {
        // A group's launch is waited for in naps; without this the kernel adds 50 us to each.
        let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
        let context = self.member.context.clone();
        let _bound = match context.bind() {
            Ok(bound) => bound,
            Err(error) => {
                self.poison(error.clone());
                // Nobody listens if the caller stopped waiting.
                let _ = ready.send(Err(error));
                return;
            }
        };
        let joined = self.init(deadline).and_then(|()| warm_up::run(&self, stream, deadline));
        if let Err(error) = &joined {
            self.abort(error.clone());
        }
        if ready.send(joined.map_err(|e| e.with(Key::Rank, self.member.rank))).is_err() {
            return self.abort(Error::new(
                ErrorKind::Aborted,
                "join an NCCL group",
                "nobody waits for it any more",
            ));
        }
        while let Ok(Job { ops, stream, reply }) = jobs.recv() {
            let launched = self.launch_by(ops, &stream, Instant::now() + self.member.config.launch_deadline);
            // A dropped call is no reason to stop: the group is on the stream, and its memory is kept.
            let _ = reply.send(launched);
        }
        self.close();
    }

    fn init(&self, deadline: Instant) -> Result<()> {
        let member = &self.member;
        {
            let mut communicator = self.locked();
            self.healthy()?;
            let mut config = RawConfig::non_blocking(member.config.max_ctas);
            // SAFETY: writes one handle; the config and the id are read during the call; the context is current.
            let code = unsafe {
                (member.nccl.functions.init)(
                    &mut *communicator,
                    member.world_size as i32,
                    member.id,
                    member.rank as i32,
                    &mut config,
                )
            };
            member.nccl.check("join an NCCL group", *communicator, code)?;
        }
        self.wait_until_idle("join an NCCL group", deadline)
    }

    /// Until NCCL has done in the background what the last call asked for.
    pub(crate) fn wait_until_idle(&self, operation: &'static str, deadline: Instant) -> Result<()> {
        let mut pause = Pause::default();
        loop {
            let mut state = 0;
            self.with(|nccl, communicator| {
                // SAFETY: the communicator lives while the lock is held; writes one i32.
                let code = unsafe { (nccl.functions.async_error)(communicator, &mut state) };
                nccl.check(operation, communicator, code)?;
                nccl.check(operation, communicator, state)
            })?;
            if state != NCCL_IN_PROGRESS {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::new(
                    ErrorKind::Timeout,
                    operation,
                    "NCCL was not through by the deadline; another member is missing or not reachable",
                ));
            }
            pause.take();
        }
    }

    /// One group call. Returns once its kernels are on the stream.
    pub(crate) fn launch_by(
        &self,
        ops: Vec<CollectiveOp>,
        stream: &Arc<dyn Stream>,
        deadline: Instant,
    ) -> Result<Event> {
        let launched = self.launch_group(&ops, stream, deadline);
        // Also after a failure: part of the group may have been launched.
        let kept = stream.keep_alive(ops.into_iter().map(|op| op.buffer).collect::<Vec<BufferSlice>>());
        let event = kept.and_then(|()| stream.record());
        if let Err(error) = launched {
            // What this rank sent is unknown; nobody may count on the group any more.
            self.poison(error.clone());
            return Err(error);
        }
        event
    }

    fn launch_group(&self, ops: &[CollectiveOp], stream: &Arc<dyn Stream>, deadline: Instant) -> Result<()> {
        const OPERATION: &str = "broadcast";
        let RawStream::Cuda(raw) = stream.raw() else {
            return Err(Error::new(ErrorKind::Unsupported, OPERATION, "NCCL enqueues on CUDA streams only"));
        };
        // Lengths are equal on all members, so all leave the same ones out.
        if ops.iter().all(|op| op.buffer.len_bytes() == 0) {
            return self.healthy();
        }
        self.with(|nccl, communicator| {
            let f = &nccl.functions;
            // SAFETY: takes nothing; the matching end follows on this thread.
            nccl.check(OPERATION, communicator, unsafe { (f.group_start)() })?;
            let mut result = Ok(());
            for op in ops.iter().filter(|op| op.buffer.len_bytes() > 0) {
                let (address, len) = (op.buffer.address(), op.buffer.len_bytes() as usize);
                // SAFETY: the range is device memory that `ops`, then the stream, keeps until the group is done; the
                // communicator lives while the lock is held.
                let code =
                    unsafe { (f.broadcast)(address, address, len, UINT8, op.root as i32, communicator, raw) };
                result = nccl.check(OPERATION, communicator, code);
                if result.is_err() {
                    break;
                }
            }
            // SAFETY: ends the group of this thread, also after a failed call in it.
            let ended = nccl.check(OPERATION, communicator, unsafe { (f.group_end)() });
            result.and(ended)
        })?;
        self.wait_until_idle(OPERATION, deadline)
    }

    /// A clean end: everything enqueued is carried through first, within the abort deadline.
    fn close(self: &Arc<Self>) {
        let deadline = Instant::now() + self.member.config.abort_deadline;
        let finalized = self
            .with(|nccl, communicator| {
                // SAFETY: the communicator lives while the lock is held.
                nccl.check("close an NCCL group", communicator, unsafe {
                    (nccl.functions.finalize)(communicator)
                })
            })
            .and_then(|()| self.wait_until_idle("close an NCCL group", deadline));
        if let Err(error) = finalized {
            return self.abort(error);
        }
        let communicator = std::mem::take(&mut *self.locked());
        if communicator != 0 {
            self.poison(Error::new(ErrorKind::Aborted, "broadcast", "the group was closed"));
            // SAFETY: taken out under the lock, so nobody else has it; finalized before.
            let code = unsafe { (self.member.nccl.functions.destroy)(communicator) };
            if let Err(error) = self.member.nccl.check("close an NCCL group", 0, code) {
                tracing::warn!(%error, "an NCCL communicator was not destroyed");
            }
        }
    }

    /// Poisons first: whoever sees the kernels end finds the cause. NCCL is told by a thread that may take its time.
    fn abort(self: &Arc<Self>, cause: Error) {
        self.poison(cause);
        if self.aborting.swap(true, Ordering::AcqRel) {
            return;
        }
        let ticket = self.member.aborts.begin(self.member.config.abort_deadline);
        let for_thread = self.clone();
        let name = format!("nccl-abort-{}", self.member.rank);
        let spawned = std::thread::Builder::new().name(name).spawn(move || for_thread.run_abort(ticket));
        if let Err(error) = spawned {
            // The ticket is dropped with the closure; the communicator leaks, as does what waits in it.
            tracing::error!(%error, "no thread could be started to abort an NCCL communicator; restart this process");
        }
    }

    fn run_abort(&self, ticket: EndingTicket) {
        let began = Instant::now();
        let mut limit = began + self.member.config.abort_deadline;
        let mut communicator = loop {
            match self.locked_by(limit) {
                Some(guard) => break guard,
                None => {
                    // The ticket's age tells the next join that this process must be restarted.
                    tracing::error!(
                        rank = self.member.rank,
                        "a call of NCCL's does not return, so it cannot be aborted"
                    );
                    limit = Instant::now() + self.member.config.abort_deadline;
                }
            }
        };
        let taken = std::mem::take(&mut *communicator);
        drop(communicator);
        if taken == 0 {
            return;
        }
        let bound = self.member.context.bind();
        // SAFETY: taken out under the lock, so nobody else has it, and it is used no more.
        let code = unsafe { (self.member.nccl.functions.abort)(taken) };
        drop(bound);
        if let Err(error) = self.member.nccl.check("abort an NCCL group", 0, code) {
            tracing::warn!(%error, "NCCL's abort reported an error");
        }
        tracing::debug!(rank = self.member.rank, elapsed = ?began.elapsed(), "an NCCL communicator was aborted");
        drop(ticket);
    }

    /// The cause, or NCCL's own asynchronous error as one.
    pub(crate) fn poisoned(&self) -> Option<Error> {
        if let Some(cause) = self.cause.get() {
            return Some(cause.clone());
        }
        let Some(communicator) = self.locked_by(Instant::now() + Self::LOOK) else {
            return Some(Error::new(
                ErrorKind::Backend,
                "ask NCCL for errors",
                "a call of NCCL's does not return",
            ));
        };
        // An abort may have come first.
        if let Some(cause) = self.cause.get() {
            return Some(cause.clone());
        }
        if *communicator != 0 {
            let nccl = &self.member.nccl;
            let mut state = 0;
            // SAFETY: the communicator lives while the lock is held; writes one i32.
            let code = unsafe { (nccl.functions.async_error)(*communicator, &mut state) };
            let looked = nccl.check("broadcast", *communicator, code);
            if let Err(error) = looked.and_then(|()| nccl.check("broadcast", *communicator, state)) {
                self.poison(error.with(Key::Rank, self.member.rank));
            }
        }
        self.cause.get().cloned()
    }
}

/// Ends a communicator from any thread.
#[derive(Debug)]
struct NcclAbort(Arc<Shared>);

impl AbortHandle for NcclAbort {
    fn abort(&self, cause: Error) {
        self.0.abort(cause);
    }

    fn poisoned(&self) -> Option<Error> {
        self.0.poisoned()
    }
}
