//! The thread that makes all calls of UCX: its handles never leave it.
//!
//! Without hardware for one-sided operations UCX emulates them: then the *owner's* thread answers, so it sleeps only on
//! UCX's own events and looks again now and then.

use std::{
    collections::{HashMap, VecDeque},
    ffi::c_void,
    io::{Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    ptr::null_mut,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
    time::{Duration, Instant},
};

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{Buffer, BufferSlice},
    transport::Way,
};
use tokio::sync::oneshot;

use super::sys::{
    BUSY, EpParams, IN_PROGRESS, MapParams, RequestParam, Started, Status, StatusPtr, UNREACHABLE, Ucp,
    WorkerParams, check, started,
};

/// Operations of one batch that run at a time.
const WINDOW: usize = 16;
/// Rounds without progress before the thread sleeps.
const SPINS: u32 = 2000;
/// The thread looks around at least this often; without events of UCX's much more often.
const TICK_MILLIS: i32 = 100;
const BLIND_TICK_MILLIS: i32 = 1;
/// So long a closing thread waits for what runs.
const QUIET: Duration = Duration::from_secs(2);

/// An error of UCX's.
pub(super) fn failed(ucp: &Ucp, function: &'static str, status: Status) -> Error {
    let kind = match status {
        // Not reachable, timed out, not connected, reset, cancelled with its endpoint, and the failures of links and
        // endpoints.
        -6 | -16 | -20 | -24 | -25 | -89..=-40 => ErrorKind::PeerLost,
        -2 | -4 | -21 => ErrorKind::ResourceExhausted,
        -8 | -22 => ErrorKind::Unsupported,
        _ => ErrorKind::Backend,
    };
    Error::new(kind, "use UCX", format!("{function} failed: {}", ucp.name(status))).with(Key::Code, status)
}

/// A part of a batch.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) memory: BufferSlice,
    pub(super) address: u64,
    pub(super) rkey: Arc<[u8]>,
}

/// What the thread is asked to do.
pub(super) enum Command {
    /// Makes memory known to UCX; the answer is a number for `Unmap`, and the key for peers.
    Map(Arc<dyn Buffer>, oneshot::Sender<Result<(u64, Vec<u8>)>>),
    Unmap(u64),
    /// An endpoint to the worker at this address, by number.
    Connect(Vec<u8>, oneshot::Sender<Result<u64>>),
    /// Ends the endpoint; what runs on it fails.
    Close(u64),
    /// Answers when UCX has let go of all memory.
    Move(u64, Way, Vec<Part>, oneshot::Sender<Result<()>>),
    Stop,
}

/// The thread, from outside. Dropping it does not end it: see [`Worker::stop`].
pub(super) struct Worker {
    commands: Mutex<Sender<Command>>,
    wake: UnixStream,
    /// Where peers find it.
    pub(super) address: Vec<u8>,
    gone: Mutex<Receiver<()>>,
}

impl Worker {
    /// Starts the thread; blocks until UCX has looked at the machine.
    pub(super) fn start(ucp: Ucp, local: bool) -> Result<Self> {
        let io =
            |e: std::io::Error| Error::new(ErrorKind::Backend, "start UCX", "no socket pair").caused_by(e);
        let (wake, woken) = UnixStream::pair().map_err(io)?;
        wake.set_nonblocking(true).and_then(|()| woken.set_nonblocking(true)).map_err(io)?;
        let (commands, receiver) = channel();
        let (ready, address) = channel();
        let (alive, gone) = channel::<()>();
        let run = move || {
            match Thread::new(ucp, local) {
                Ok((thread, address)) => {
                    // The starter waits for this.
                    let _ = ready.send(Ok(address));
                    thread.run(&receiver, woken);
                }
                Err(error) => drop(ready.send(Err(error))),
            }
            drop(alive);
        };
        let spawned = std::thread::Builder::new().name("ckpt-ucx".to_owned()).spawn(run);
        spawned.map_err(|e| {
            Error::new(ErrorKind::ResourceExhausted, "start UCX", "the system has no more threads")
                .caused_by(e)
        })?;
        let address = address
            .recv()
            .map_err(|e| Error::new(ErrorKind::Internal, "start UCX", "its thread ended").caused_by(e))??;
        Ok(Self { commands: Mutex::new(commands), wake, address, gone: Mutex::new(gone) })
    }

    pub(super) fn tell(&self, command: Command) {
        // One call under this lock. A thread that has ended drops the command, and with it the answer's sender.
        let _ = self.commands.lock().unwrap_or_else(PoisonError::into_inner).send(command);
        // Full means that it will wake up anyway.
        let _ = (&self.wake).write(&[1]);
    }

    /// Tells the thread and waits for its answer.
    pub(super) async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T>>) -> Command,
    ) -> Result<T> {
        let (sender, answer) = oneshot::channel();
        self.tell(command(sender));
        answer
            .await
            .unwrap_or_else(|_| Err(Error::new(ErrorKind::Aborted, "use UCX", "the transport is closed")))
    }

    /// Ends the thread; it has let go of all memory when this returns, or keeps it for ever.
    pub(super) fn stop(&self) {
        self.tell(Command::Stop);
        let gone = self.gone.lock().unwrap_or_else(PoisonError::into_inner);
        if gone.recv_timeout(QUIET * 2) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            tracing::warn!("UCX's thread does not end; it is left behind");
        }
    }
}

/// Memory that UCX knows.
struct Mapped {
    memh: *mut c_void,
    /// Kept until it is unmapped.
    _buffer: Arc<dyn Buffer>,
}

struct Ep {
    raw: *mut c_void,
    /// UCX tells when the peer is lost, and can end what runs.
    watched: bool,
    /// Set by UCX when the peer is lost; read by it through a raw pointer until the endpoint is closed.
    failed: Arc<AtomicBool>,
    rkeys: HashMap<Arc<[u8]>, *mut c_void>,
}

/// A batch under way.
struct Job {
    ep: u64,
    way: Way,
    waiting: VecDeque<Part>,
    flying: Vec<(StatusPtr, Option<BufferSlice>)>,
    /// Writes are over when they were flushed.
    flushed: bool,
    failure: Option<Error>,
    reply: Option<oneshot::Sender<Result<()>>>,
}

struct Thread {
    ucp: Ucp,
    context: *mut c_void,
    worker: *mut c_void,
    event_fd: Option<i32>,
    /// False once an endpoint could be had only without: the shared memory of older versions.
    watches: bool,
    next: u64,
    mapped: HashMap<u64, Mapped>,
    /// This side's memory of transfers; unmapped when the buffer is gone.
    local: Vec<(Weak<dyn Buffer>, *mut c_void)>,
    eps: HashMap<u64, Ep>,
    closing: Vec<StatusPtr>,
    jobs: Vec<Job>,
}

/// UCX says that an endpoint's peer is lost.
unsafe extern "C" fn on_error(arg: *mut c_void, _ep: *mut c_void, _status: Status) {
    // SAFETY: `arg` is the flag of an `Ep`, which `Thread` keeps until the endpoint was closed.
    unsafe { &*arg.cast::<AtomicBool>() }.store(true, Ordering::Release);
}

impl Thread {
    fn new(ucp: Ucp, local: bool) -> Result<(Self, Vec<u8>)> {
        let error = |function| move |status| failed(&ucp, function, status);
        // A build without events works, too: the thread then looks often.
        let context = ucp.context(true, local).or_else(|_| ucp.context(false, local));
        let context = context.map_err(error("ucp_init"))?;
        let (params, mut worker) = (WorkerParams::one_thread(), null_mut());
        // SAFETY: the context lives; the parameters live for the call.
        let created = check(unsafe { (ucp.worker_create)(context, &params, &mut worker) });
        if let Err(status) = created {
            // SAFETY: nothing was made of the context.
            unsafe { (ucp.cleanup)(context) };
            return Err(failed(&ucp, "ucp_worker_create", status));
        }
        let mut fd = -1;
        // SAFETY: the worker lives.
        let event_fd = (unsafe { (ucp.event_fd)(worker, &mut fd) } == 0).then_some(fd);
        let thread = Self {
            ucp,
            context,
            worker,
            event_fd,
            watches: true,
            next: 0,
            mapped: HashMap::new(),
            local: Vec::new(),
            eps: HashMap::new(),
            closing: Vec::new(),
            jobs: Vec::new(),
        };
        let (mut raw, mut len) = (null_mut(), 0);
        // SAFETY: the worker lives; the address is copied and released at once.
        let address = unsafe {
            check((ucp.worker_address)(worker, &mut raw, &mut len))
                .map_err(error("ucp_worker_get_address"))?;
            let address = std::slice::from_raw_parts(raw.cast::<u8>(), len).to_vec();
            (ucp.release_address)(worker, raw);
            address
        };
        Ok((thread, address))
    }

    fn run(mut self, commands: &Receiver<Command>, mut woken: UnixStream) {
        let (mut spins, mut stopping) = (0, None);
        loop {
            loop {
                match commands.try_recv() {
                    Ok(Command::Stop) | Err(TryRecvError::Disconnected) if stopping.is_none() => {
                        stopping = Some(Instant::now() + QUIET);
                        self.fail_all();
                    }
                    Ok(Command::Stop) => {}
                    Ok(command) => self.take(command),
                    Err(_) => break,
                }
                spins = 0;
            }
            self.advance();
            // SAFETY: the worker lives, and this is its thread.
            let progressed = unsafe { (self.ucp.progress)(self.worker) } > 0;
            if let Some(until) = stopping
                && (self.is_quiet() || Instant::now() >= until)
            {
                return self.end();
            }
            spins = if progressed { 0 } else { spins + 1 };
            if spins < SPINS && !self.is_quiet() || progressed {
                continue;
            }
            if self.event_fd.is_some() {
                // SAFETY: as above.
                let armed = unsafe { (self.ucp.arm)(self.worker) };
                if armed == BUSY {
                    continue;
                }
            }
            self.sleep(&mut woken, stopping.is_some());
            spins = 0;
        }
    }

    fn sleep(&mut self, woken: &mut UnixStream, stopping: bool) {
        let blind = self.event_fd.is_none() || stopping;
        let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // A negative descriptor is left out.
        let mut fds = [poll(woken.as_raw_fd()), poll(self.event_fd.unwrap_or(-1))];
        // SAFETY: the array and its length belong together; the descriptors are open.
        unsafe { libc::poll(fds.as_mut_ptr(), 2, if blind { BLIND_TICK_MILLIS } else { TICK_MILLIS }) };
        let mut bytes = [0; 64];
        // Only the waking counts.
        let _ = woken.read(&mut bytes);
        self.sweep();
    }

    fn is_quiet(&self) -> bool {
        self.jobs.is_empty() && self.closing.is_empty()
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    // Whoever asked may be gone: then nobody needs the answer, and what was made is undone where it would stay.
    fn take(&mut self, command: Command) {
        match command {
            Command::Map(buffer, reply) => {
                let made = self.map(&*buffer).and_then(|memh| {
                    let number = self.number();
                    self.mapped.insert(number, Mapped { memh, _buffer: buffer });
                    Ok((number, self.pack(memh)?))
                });
                if let Err(Ok((number, _))) = reply.send(made) {
                    self.take(Command::Unmap(number));
                }
            }
            Command::Unmap(number) => {
                if let Some(Mapped { memh, _buffer }) = self.mapped.remove(&number) {
                    self.unmap(memh);
                }
            }
            Command::Connect(address, reply) => {
                let made = self.connect(&address);
                if let Err(Ok(number)) = reply.send(made) {
                    self.close(number);
                }
            }
            Command::Close(number) => self.close(number),
            Command::Move(ep, way, parts, reply) => self.jobs.push(Job {
                ep,
                way,
                waiting: parts.into(),
                flying: Vec::new(),
                flushed: way == Way::Read,
                failure: None,
                reply: Some(reply),
            }),
            Command::Stop => {}
        }
    }

    fn map(&self, buffer: &dyn Buffer) -> Result<*mut c_void> {
        let (params, mut memh) = (MapParams::range(buffer.address(), buffer.len_bytes()), null_mut());
        // SAFETY: the context lives; the range is mapped while `buffer` lives. For peers' memory that is until it is
        // unmapped here; for this side's, batches hold it, and nothing names the handle afterwards.
        check(unsafe { (self.ucp.map)(self.context, &params, &mut memh) })
            .map_err(|status| failed(&self.ucp, "ucp_mem_map", status))?;
        Ok(memh)
    }

    fn unmap(&self, memh: *mut c_void) {
        // SAFETY: the handle is of this context and is forgotten by the caller.
        if let Err(status) = check(unsafe { (self.ucp.unmap)(self.context, memh) }) {
            let error = failed(&self.ucp, "ucp_mem_unmap", status);
            tracing::warn!(%error, "memory stays registered");
        }
    }

    fn pack(&self, memh: *mut c_void) -> Result<Vec<u8>> {
        let (mut raw, mut len) = (null_mut(), 0);
        // SAFETY: context and handle live; the key is copied and released at once.
        unsafe {
            check((self.ucp.pack)(self.context, memh, &mut raw, &mut len))
                .map_err(|status| failed(&self.ucp, "ucp_rkey_pack", status))?;
            let key = std::slice::from_raw_parts(raw.cast::<u8>(), len).to_vec();
            (self.ucp.release_packed)(raw);
            Ok(key)
        }
    }

    fn connect(&mut self, address: &[u8]) -> Result<u64> {
        let failure = Arc::new(AtomicBool::new(false));
        let flag = Arc::as_ptr(&failure).cast_mut().cast();
        let create = |watched| {
            let (params, mut raw) = (EpParams::to(address, on_error, flag, watched), null_mut());
            // SAFETY: the worker lives; the address is whole, since its sender has proved the secret, and is copied;
            // the flag lives until the endpoint was closed.
            check(unsafe { (self.ucp.ep_create)(self.worker, &params, &mut raw) }).map(|()| (raw, watched))
        };
        // Unwatched, a peer's end is learnt from the TCP exchange alone.
        let created = match self.watches {
            true => {
                create(true).or_else(|status| if status == UNREACHABLE { create(false) } else { Err(status) })
            }
            false => create(false),
        };
        let (raw, watched) = created.map_err(|status| failed(&self.ucp, "ucp_ep_create", status))?;
        self.watches = watched;
        let number = self.number();
        self.eps.insert(number, Ep { raw, watched, failed: failure, rkeys: HashMap::new() });
        Ok(number)
    }

    fn close(&mut self, number: u64) {
        let Some(ep) = self.eps.remove(&number) else { return };
        for rkey in ep.rkeys.into_values() {
            // SAFETY: the key is of this endpoint; operations that name it keep what they need.
            unsafe { (self.ucp.rkey_destroy)(rkey) };
        }
        let how = if ep.watched { RequestParam::force() } else { RequestParam::plain() };
        // SAFETY: the endpoint lives and is forgotten here.
        let answer = unsafe { (self.ucp.ep_close)(ep.raw, &how) };
        if let Started::Runs(request) = started(answer) {
            self.closing.push(request);
        }
        // UCX may still call `on_error` while it closes: the flag is a byte, and stays.
        std::mem::forget(ep.failed);
    }

    /// This side's memory, known to UCX while its buffer lives.
    fn local(&mut self, buffer: &Arc<dyn Buffer>) -> Result<*mut c_void> {
        let same = |kept: &Weak<dyn Buffer>| std::ptr::addr_eq(kept.as_ptr(), Arc::as_ptr(buffer));
        if let Some((_, memh)) = self.local.iter().find(|(kept, _)| same(kept)) {
            return Ok(*memh);
        }
        let memh = self.map(&**buffer)?;
        self.local.push((Arc::downgrade(buffer), memh));
        Ok(memh)
    }

    /// Unmaps memory whose buffers are gone.
    fn sweep(&mut self) {
        let (kept, gone): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.local).into_iter().partition(|(buffer, _)| buffer.strong_count() > 0);
        self.local = kept;
        gone.into_iter().for_each(|(_, memh)| self.unmap(memh));
    }

    /// Takes all jobs a step further.
    fn advance(&mut self) {
        let mut jobs = std::mem::take(&mut self.jobs);
        jobs.retain_mut(|job| {
            self.settle(job);
            while job.failure.is_none() && job.flying.len() < WINDOW {
                let Some(part) = job.waiting.pop_front() else { break };
                match self.begin(job, part) {
                    Ok(flying) => job.flying.extend(flying),
                    Err(error) => job.failure = Some(error),
                }
            }
            if job.flying.is_empty() && job.waiting.is_empty() && !job.flushed && job.failure.is_none() {
                job.flushed = true;
                match self.flush(job.ep) {
                    Ok(request) => job.flying.extend(request.map(|request| (request, None))),
                    Err(error) => job.failure = Some(error),
                }
            }
            if !job.flying.is_empty() || job.failure.is_none() && !(job.waiting.is_empty() && job.flushed) {
                return true;
            }
            job.waiting.clear();
            let outcome = job.failure.take().map_or(Ok(()), Err);
            // Whoever waits for it may have given up.
            job.reply.take().map(|reply| reply.send(outcome));
            false
        });
        jobs.append(&mut self.jobs);
        self.jobs = jobs;
        let ucp = self.ucp;
        self.closing.retain(|request| take_request(&ucp, *request).is_none());
    }

    /// Takes back what has ended.
    fn settle(&mut self, job: &mut Job) {
        let (ucp, failure) = (self.ucp, &mut job.failure);
        job.flying.retain(|(request, _memory)| match take_request(&ucp, *request) {
            None => true,
            Some(Ok(())) => false,
            Some(Err(status)) => {
                failure.get_or_insert_with(|| failed(&ucp, "an operation", status));
                false
            }
        });
        let lost = self.eps.get(&job.ep).is_none_or(|ep| ep.failed.load(Ordering::Acquire));
        if lost && job.failure.is_none() {
            job.failure = Some(failed(&self.ucp, "the endpoint", -25));
        }
        if lost {
            // What runs on it ends as cancelled.
            self.close(job.ep);
        }
    }

    fn begin(&mut self, job: &Job, part: Part) -> Result<Option<(StatusPtr, Option<BufferSlice>)>> {
        let Part { memory, address, rkey } = part;
        let param = RequestParam::mapped(self.local(memory.buffer())?);
        let (here, len) = (memory.host_ptr()?.as_ptr().cast::<c_void>(), memory.len_bytes() as usize);
        let ucp = self.ucp;
        let gone = || failed(&ucp, "the endpoint", -25);
        let ep = self.eps.get_mut(&job.ep).ok_or_else(gone)?;
        let rkey = match ep.rkeys.get(&rkey) {
            Some(known) => *known,
            None => {
                let mut raw = null_mut();
                // SAFETY: the endpoint lives; the key is whole, since its owner has proved the secret, and is copied.
                check(unsafe { (ucp.unpack)(ep.raw, rkey.as_ptr().cast(), &mut raw) })
                    .map_err(|status| failed(&ucp, "ucp_ep_rkey_unpack", status))?;
                ep.rkeys.insert(rkey, raw);
                raw
            }
        };
        // SAFETY: endpoint and key live; the memory stays in the job until the request has ended, and nobody else uses
        // it, as whoever posted the batch promises.
        let answer = unsafe {
            match job.way {
                Way::Read => (ucp.get)(ep.raw, here, len, address, rkey, &param),
                Way::Write => (ucp.put)(ep.raw, here, len, address, rkey, &param),
            }
        };
        match started(answer) {
            Started::Done => Ok(None),
            Started::Failed(status) => Err(failed(&ucp, job.way.operation(), status)),
            Started::Runs(request) => Ok(Some((request, Some(memory)))),
        }
    }

    /// Until all that was written is in the peer's memory.
    fn flush(&self, ep: u64) -> Result<Option<StatusPtr>> {
        let gone = || failed(&self.ucp, "the endpoint", -25);
        let ep = self.eps.get(&ep).ok_or_else(gone)?;
        // SAFETY: the endpoint lives.
        match started(unsafe { (self.ucp.flush)(ep.raw, &RequestParam::plain()) }) {
            Started::Done => Ok(None),
            Started::Failed(status) => Err(failed(&self.ucp, "ucp_ep_flush_nbx", status)),
            Started::Runs(request) => Ok(Some(request)),
        }
    }

    fn fail_all(&mut self) {
        let numbers: Vec<u64> = self.eps.keys().copied().collect();
        numbers.into_iter().for_each(|number| self.close(number));
    }

    /// The last act. If a device holds on to a batch, its memory and UCX itself are never given back.
    fn end(mut self) {
        if !self.is_quiet() {
            tracing::error!("{} batches of UCX's never ended; their memory is kept", self.jobs.len());
            return std::mem::forget(self);
        }
        for (_, Mapped { memh, _buffer }) in std::mem::take(&mut self.mapped) {
            self.unmap(memh);
        }
        for (_, memh) in std::mem::take(&mut self.local) {
            self.unmap(memh);
        }
        // SAFETY: nothing of them is left, and this is the last use.
        unsafe {
            (self.ucp.worker_destroy)(self.worker);
            (self.ucp.cleanup)(self.context);
        }
    }
}

/// How a request ended, once it has; it is freed then.
fn take_request(ucp: &Ucp, request: StatusPtr) -> Option<Result<(), Status>> {
    // SAFETY: the request was not freed: whoever gets an answer here forgets it.
    match unsafe { (ucp.check_request)(request) } {
        IN_PROGRESS => None,
        status => {
            // SAFETY: as above.
            unsafe { (ucp.free_request)(request) };
            Some(check(status))
        }
    }
}
