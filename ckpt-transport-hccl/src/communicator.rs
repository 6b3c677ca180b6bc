//! One group: a thread of its own for every call, and others to end it.
//!
//! HCCL has no abort: all that can be done about a group that hangs is to destroy it, which may hang as well. So an end
//! runs on a thread of its own, and the transport remembers it: no new group is formed while one is overdue. HCCL's calls
//! may also block, while they build links that an operation needs first; nobody but the group's thread waits for them.

use std::{
    fmt,
    sync::{
        Arc, Mutex, OnceLock, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Instant,
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
    config::HcclConfig,
    device::Npu,
    library::{CommConfig, Hccl, RootInfo, UINT8},
    table::Handle,
    warm_up,
};

const JOIN: &str = "join an HCCL group";
const BROADCAST: &str = "broadcast";

/// What one member brings into a group.
#[derive(Clone)]
pub(crate) struct Member {
    pub(crate) hccl: Arc<Hccl>,
    pub(crate) npu: Arc<Npu>,
    pub(crate) device: Arc<dyn DeviceBackend>,
    pub(crate) config: HcclConfig,
    pub(crate) endings: Arc<Endings>,
    pub(crate) rank: u32,
    pub(crate) world_size: u32,
}

/// How a group is made.
pub(crate) enum Start {
    /// Of all that have this root info.
    Root(Box<RootInfo>),
    /// Of these ranks of another group, under a number that no other of its subgroups has.
    Part { parent: Arc<Shared>, ranks: Vec<u32>, id: u64 },
}

/// Work for the group's thread.
type Job = Box<dyn FnOnce(&Arc<Shared>) + Send>;

/// Joins; the group's thread lives until the group is dropped.
pub(crate) async fn join(member: Member, start: Start, deadline: Instant) -> Result<HcclGroup> {
    let rank = member.rank;
    let stream = member.device.stream("hccl warm-up")?;
    // HCCL gives an incomplete group up after its own time, whatever our deadline is.
    let joining = member.endings.begin(member.config.connect_limit);
    let shared = Arc::new(Shared {
        member,
        communicator: RwLock::new(0),
        last: Mutex::new(None),
        cause: OnceLock::new(),
        ending: AtomicBool::new(false),
    });
    let (jobs, inbox) = mpsc::channel::<Job>();
    let (ready, joined) = oneshot::channel();
    let for_thread = shared.clone();
    std::thread::Builder::new()
        .name(format!("hccl-{rank}"))
        .spawn(move || for_thread.serve(start, &stream, deadline, joining, ready, &inbox))
        .map_err(|e| Error::new(ErrorKind::ResourceExhausted, JOIN, "cannot start a thread").caused_by(e))?;
    let group = HcclGroup { shared: shared.clone(), jobs };
    // Whoever stops waiting (a deadline, a dropped future) leaves no half-made group behind.
    let unfinished = AbortUnlessDone(Some(shared.clone()));
    match tokio::time::timeout_at(deadline.into(), joined).await {
        Ok(Ok(Ok(()))) => {}
        Ok(Ok(Err(error))) => return Err(error),
        Ok(Err(_)) => return Err(Error::new(ErrorKind::Internal, JOIN, "the group's thread ended early")),
        Err(_) => {
            return Err(Error::new(
                ErrorKind::Timeout,
                JOIN,
                "HCCL was not through by the deadline; another member is missing or not reachable",
            )
            .with(Key::Rank, rank));
        }
    }
    unfinished.done();
    Ok(group)
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
            shared.abort(Error::new(ErrorKind::Aborted, JOIN, "this rank stopped waiting for the group"));
        }
    }
}

/// One member's view of a group.
#[derive(Debug)]
pub struct HcclGroup {
    shared: Arc<Shared>,
    /// Closing this channel ends the thread, which then destroys the communicator.
    jobs: mpsc::Sender<Job>,
}

impl HcclGroup {
    pub(crate) fn into_communicator(self) -> Communicator {
        let abort = Arc::new(HcclAbort(self.shared.clone()));
        Communicator { queue: Box::new(self), abort }
    }

    /// Gathers `own` of every member into `all`, in the order of ranks. Both are device memory that does not overlap.
    pub async fn all_gather(
        &mut self,
        own: BufferSlice,
        all: BufferSlice,
        stream: &Arc<dyn Stream>,
    ) -> Result<Event> {
        const OPERATION: &str = "gather";
        let wanted = own.len_bytes().checked_mul(u64::from(self.shared.member.world_size));
        if wanted != Some(all.len_bytes()) {
            let message = format!("{} bytes of each member do not fill {}", own.len_bytes(), all.len_bytes());
            return Err(Error::new(ErrorKind::Internal, OPERATION, message));
        }
        check_memory(&own, OPERATION)?;
        check_memory(&all, OPERATION)?;
        let stream = stream.clone();
        self.call(OPERATION, move |shared| {
            let memory = vec![own.clone(), all.clone()];
            shared.launch_on(&stream, memory, |raw| shared.all_gather(&own, &all, raw))
        })
        .await
    }

    /// An event that completes when all members have got to it.
    pub async fn barrier(&mut self, stream: &Arc<dyn Stream>) -> Result<Event> {
        let stream = stream.clone();
        let enter =
            move |shared: &Arc<Shared>| shared.launch_on(&stream, Vec::new(), |raw| shared.barrier(raw));
        self.call("wait for all members", enter).await
    }

    /// A group of some of this one's members, which all of them form, and nobody else. `id` is the same on all of them and
    /// used for no other subgroup. Ranks are counted anew, in the order of `ranks`.
    pub async fn subgroup(&mut self, ranks: Vec<u32>, id: u64, deadline: Instant) -> Result<HcclGroup> {
        const OPERATION: &str = "form a subgroup";
        let member = &self.shared.member;
        let mut seen = vec![false; member.world_size as usize];
        let distinct = ranks.iter().all(|rank| match seen.get_mut(*rank as usize) {
            Some(seen) => !std::mem::replace(seen, true),
            None => false,
        });
        let own = ranks.iter().position(|rank| *rank == member.rank).filter(|_| distinct);
        let Some(rank) = own else {
            let message = format!(
                "{ranks:?} are not distinct ranks of a group of {} with rank {} among them",
                member.world_size, member.rank
            );
            return Err(Error::new(ErrorKind::Internal, OPERATION, message));
        };
        let part = Member { rank: rank as u32, world_size: ranks.len() as u32, ..self.shared.member.clone() };
        join(part, Start::Part { parent: self.shared.clone(), ranks, id }, deadline).await
    }

    /// Runs `job` on the group's thread.
    async fn call<T: Send + 'static>(
        &mut self,
        operation: &'static str,
        job: impl FnOnce(&Arc<Shared>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let shared = self.shared.clone();
        shared.healthy()?;
        let gone = || {
            shared
                .healthy()
                .err()
                .unwrap_or_else(|| Error::new(ErrorKind::Internal, operation, "the group's thread has ended"))
        };
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |shared| {
            // A dropped call is no reason to stop: the work is on the stream, and its memory is kept.
            let _ = reply.send(job(shared));
        });
        self.jobs.send(job).map_err(|_| gone())?;
        match tokio::time::timeout(shared.member.config.launch_deadline, answer).await {
            Ok(Ok(result)) => result.map_err(|error| error.with(Key::Rank, shared.member.rank)),
            Ok(Err(_)) => Err(gone()),
            Err(_) => {
                let message = "a call of HCCL's does not return; another member is missing or not reachable";
                let error =
                    Error::new(ErrorKind::Timeout, operation, message).with(Key::Rank, shared.member.rank);
                shared.abort(error.clone());
                Err(error)
            }
        }
    }
}

#[async_trait]
impl CommunicatorQueue for HcclGroup {
    async fn enqueue(&mut self, ops: Vec<CollectiveOp>, stream: &Arc<dyn Stream>) -> Result<Event> {
        self.shared.healthy()?;
        let world_size = self.shared.member.world_size;
        for op in &ops {
            if op.root >= world_size {
                let message = format!("root {} is not in a group of {world_size}", op.root);
                return Err(Error::new(ErrorKind::Internal, BROADCAST, message));
            }
            check_memory(&op.buffer, BROADCAST)?;
        }
        raw_of(stream)?;
        let stream = stream.clone();
        self.call(BROADCAST, move |shared| {
            let memory = ops.iter().map(|op| op.buffer.clone()).collect();
            shared.launch_on(&stream, memory, |raw| shared.broadcast(&ops, raw))
        })
        .await
    }
}

/// Memory that is not the device's would be read by the NPU as if it were.
fn check_memory(memory: &BufferSlice, operation: &'static str) -> Result<()> {
    if memory.len_bytes() == 0 || memory.memory() == MemoryKind::Device {
        return Ok(());
    }
    let message = "HCCL moves device memory only; copy the bytes into the ring first";
    Err(Error::new(ErrorKind::Unsupported, operation, message))
}

fn raw_of(stream: &Arc<dyn Stream>) -> Result<Handle> {
    match stream.raw() {
        RawStream::Ascend(raw) => Ok(raw),
        _ => Err(Error::new(ErrorKind::Unsupported, "use HCCL", "HCCL enqueues on streams of an NPU only")),
    }
}

/// What the group, its thread and its abort handle share.
pub(crate) struct Shared {
    pub(crate) member: Member,
    /// 0 before and after. Calls hold it for reading, since HCCL takes questions while another call is inside; whoever
    /// takes it out waits until none is.
    communicator: RwLock<Handle>,
    /// The last work enqueued, and on which stream. Operations of one communicator share its buffers, so they follow each
    /// other also across streams.
    last: Mutex<Option<(RawStream, Event)>>,
    cause: OnceLock<Error>,
    ending: AtomicBool,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HcclGroup")
            .field("rank", &self.member.rank)
            .field("world_size", &self.member.world_size)
            .field("cause", &self.cause.get())
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn locked(&self) -> RwLockReadGuard<'_, Handle> {
        self.communicator.read().expect("nothing panics while the communicator is locked")
    }

    fn healthy(&self) -> Result<()> {
        match self.cause.get() {
            None => Ok(()),
            Some(cause) => {
                let cause = cause.clone();
                Err(Error::new(ErrorKind::Aborted, BROADCAST, "the group was aborted").caused_by(cause))
            }
        }
    }

    /// The first cause stays.
    fn poison(&self, cause: Error) {
        // A second cause is refused, as it should be.
        let _ = self.cause.set(cause);
    }

    /// Calls `call` with the communicator, if it is healthy and there is one.
    fn with(&self, call: impl FnOnce(&Hccl, Handle) -> Result<()>) -> Result<()> {
        let communicator = self.locked();
        self.healthy()?;
        if *communicator == 0 {
            return Err(Error::new(ErrorKind::Internal, BROADCAST, "the communicator is gone"));
        }
        call(&self.member.hccl, *communicator)
    }

    /// The group's life, on its own thread.
    fn serve(
        self: Arc<Self>,
        start: Start,
        stream: &Arc<dyn Stream>,
        deadline: Instant,
        joining: EndingTicket,
        ready: oneshot::Sender<Result<()>>,
        jobs: &mpsc::Receiver<Job>,
    ) {
        let npu = self.member.npu.clone();
        let joined = npu.bind().and_then(|bound| {
            self.init(start)?;
            drop(joining);
            warm_up::run(&self, stream, deadline)?;
            Ok(bound)
        });
        let _bound = match joined {
            Ok(bound) => bound,
            Err(error) => {
                let error = error.with(Key::Rank, self.member.rank);
                self.abort(error.clone());
                // Nobody listens if the caller stopped waiting.
                let _ = ready.send(Err(error));
                return;
            }
        };
        if ready.send(Ok(())).is_err() {
            return self.abort(Error::new(ErrorKind::Aborted, JOIN, "nobody waits for it any more"));
        }
        while let Ok(job) = jobs.recv() {
            job(&self);
        }
        self.close();
    }

    /// Returns when all members have come, or HCCL gave up.
    fn init(&self, start: Start) -> Result<()> {
        let member = &self.member;
        let mut config = CommConfig::new(member.config.buffer_mib);
        let mut made = 0;
        match start {
            Start::Root(root) => {
                // SAFETY: writes one handle; root info and config are read during the call; the device is current.
                let code = unsafe {
                    (member.hccl.functions.init)(member.world_size, &*root, member.rank, &config, &mut made)
                };
                member.hccl.check(JOIN, "HcclCommInitRootInfoConfig", code)?;
            }
            Start::Part { parent, mut ranks, id } => parent.with(|hccl, communicator| {
                let Some(subgroup) = hccl.functions.subgroup else {
                    let message = "this HCCL has no HcclCreateSubCommConfig; form a new group instead";
                    return Err(Error::new(ErrorKind::Unsupported, JOIN, message));
                };
                let (mut communicator, count) = (communicator, ranks.len() as u32);
                // SAFETY: the parent lives while its lock is held; `ranks` has `count` elements; writes one handle.
                let code = unsafe {
                    let ranks = ranks.as_mut_ptr();
                    subgroup(&mut communicator, count, ranks, id, member.rank, &mut config, &mut made)
                };
                hccl.check(JOIN, "HcclCreateSubCommConfig", code)
            })?,
        }
        *self.communicator.write().expect("nothing panics while the communicator is locked") = made;
        // Who aborted before found nothing to destroy.
        self.healthy().inspect_err(|_| self.destroy())
    }

    /// Enqueues what `enqueue` does on `stream`, after all earlier work of the group. The event keeps `memory`.
    pub(crate) fn launch_on(
        &self,
        stream: &Arc<dyn Stream>,
        memory: Vec<BufferSlice>,
        enqueue: impl FnOnce(Handle) -> Result<()>,
    ) -> Result<Event> {
        let mut last = self.last.lock().expect("nothing panics while the last event is locked");
        let raw = raw_of(stream)?;
        if let Some((on, event)) = &*last
            && *on != stream.raw()
        {
            stream.wait(event)?;
        }
        let enqueued = enqueue(raw);
        // Also after a failure: part of it may be on the stream.
        let kept = stream.keep_alive(memory);
        let event = kept.and_then(|()| stream.record());
        if let Err(error) = enqueued {
            // What this rank sent is unknown; nobody may count on the group any more.
            self.poison(error.clone());
            return Err(error);
        }
        let event = event?;
        *last = Some((stream.raw(), event.clone()));
        Ok(event)
    }

    pub(crate) fn broadcast(&self, ops: &[CollectiveOp], stream: Handle) -> Result<()> {
        self.healthy()?;
        // Lengths are equal on all members, so all leave the same ones out.
        for op in ops.iter().filter(|op| op.buffer.len_bytes() > 0) {
            let (address, len) = (op.buffer.address(), op.buffer.len_bytes());
            self.with(|hccl, communicator| {
                // SAFETY: the range is device memory that the stream keeps until the work is done (`launch_on`); the
                // communicator lives while the lock is held.
                let code =
                    unsafe { (hccl.functions.broadcast)(address, len, UINT8, op.root, communicator, stream) };
                hccl.check(BROADCAST, "HcclBroadcast", code)
            })?;
        }
        Ok(())
    }

    pub(crate) fn all_gather(&self, own: &BufferSlice, all: &BufferSlice, stream: Handle) -> Result<()> {
        if own.len_bytes() == 0 {
            return self.healthy();
        }
        self.with(|hccl, communicator| {
            // SAFETY: as for a broadcast; `all` has room for `own` of every member.
            let code = unsafe {
                let (from, to, len) = (own.address(), all.address(), own.len_bytes());
                (hccl.functions.all_gather)(from, to, len, UINT8, communicator, stream)
            };
            hccl.check("gather", "HcclAllGather", code)
        })
    }

    pub(crate) fn barrier(&self, stream: Handle) -> Result<()> {
        self.with(|hccl, communicator| {
            // SAFETY: communicator and stream live.
            let code = unsafe { (hccl.functions.barrier)(communicator, stream) };
            hccl.check("wait for all members", "HcclBarrier", code)
        })
    }

    /// A clean end: everything enqueued is carried through first, within the abort deadline.
    fn close(&self) {
        let deadline = Instant::now() + self.member.config.abort_deadline;
        let ticket = self.member.endings.begin(self.member.config.abort_deadline * 2);
        let last = self.last.lock().ok().and_then(|mut last| last.take());
        let mut pause = Pause::default();
        // A failed event is over, too.
        while let Some((_, event)) = &last
            && matches!(event.is_complete(), Ok(false))
            && self.cause.get().is_none()
            && Instant::now() < deadline
        {
            pause.take();
        }
        self.poison(Error::new(ErrorKind::Aborted, BROADCAST, "the group was closed"));
        self.destroy();
        drop(ticket);
    }

    /// Poisons first: whoever sees the work end finds the cause. HCCL is told by a thread that may take its time.
    fn abort(self: &Arc<Self>, cause: Error) {
        self.poison(cause);
        if self.ending.swap(true, Ordering::AcqRel) {
            return;
        }
        let ticket = self.member.endings.begin(self.member.config.abort_deadline);
        let for_thread = self.clone();
        let spawned =
            std::thread::Builder::new().name(format!("hccl-end-{}", self.member.rank)).spawn(move || {
                let began = Instant::now();
                for_thread.destroy();
                tracing::debug!(rank = for_thread.member.rank, elapsed = ?began.elapsed(), "an HCCL group was ended");
                drop(ticket);
            });
        if let Err(error) = spawned {
            // The ticket is dropped with the closure; the communicator leaks, as does what waits in it.
            tracing::error!(%error, "no thread could be started to end an HCCL group; restart this process");
        }
    }

    /// Destroys the communicator once no call is inside it. May not return: then its ticket tells the next join that this
    /// process must be restarted.
    fn destroy(&self) {
        let taken = {
            let mut communicator =
                self.communicator.write().expect("nothing panics while the communicator is locked");
            std::mem::take(&mut *communicator)
        };
        if taken == 0 {
            return;
        }
        let destroyed = self.member.npu.bind().and_then(|_bound| {
            // SAFETY: taken out under the lock, so nobody else has it, and it is used no more.
            let code = unsafe { (self.member.hccl.functions.destroy)(taken) };
            self.member.hccl.check("end an HCCL group", "HcclCommDestroy", code)
        });
        if let Err(error) = destroyed {
            tracing::warn!(%error, "an HCCL communicator was not destroyed");
        }
    }

    /// The cause, or HCCL's own asynchronous error as one.
    pub(crate) fn poisoned(&self) -> Option<Error> {
        if let Some(cause) = self.cause.get() {
            return Some(cause.clone());
        }
        // While somebody takes the communicator out there is nothing to ask, and a cause.
        let asked = self.communicator.try_read().ok().filter(|communicator| **communicator != 0).map(
            |communicator| {
                let _bound = self.member.npu.bind()?;
                let (hccl, mut state) = (&self.member.hccl, 0);
                // SAFETY: the communicator lives while the lock is held; writes one integer.
                let code = unsafe { (hccl.functions.async_error)(*communicator, &mut state) };
                hccl.check(BROADCAST, "HcclGetCommAsyncError", code)?;
                hccl.check(BROADCAST, "an HCCL operation", state)
            },
        );
        if let Some(Err(error)) = asked {
            self.poison(error.with(Key::Rank, self.member.rank));
        }
        self.cause.get().cloned()
    }
}

/// Ends a group from any thread.
#[derive(Debug)]
struct HcclAbort(Arc<Shared>);

impl AbortHandle for HcclAbort {
    fn abort(&self, cause: Error) {
        self.0.abort(cause);
    }

    fn poisoned(&self) -> Option<Error> {
        self.0.poisoned()
    }
}
