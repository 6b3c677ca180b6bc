//! Host streams: FIFO queues of async jobs, drained by a task that exists only while there is work.

use std::{
    collections::VecDeque,
    fmt,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU32},
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use tokio::runtime::Handle;

use super::{
    adversary::Adversary,
    event::{Completion, HostEvent},
};
use crate::{
    device::{BufferSlice, DeviceBackend, Event, HostJob, HostStream, OnAbort, RawStream, Stream},
    error::{Error, ErrorKind, Result},
};

/// Copies up to this size run on the async thread: they take less time than a hop to another thread.
const INLINE_COPY_BYTES: u64 = 64 << 10;

/// How long a stream waits for an event of another kind of device before it fails.
const FOREIGN_EVENT_LIMIT: Duration = Duration::from_secs(900);

enum Item {
    Job(HostJob),
    Copy { src: BufferSlice, dst: BufferSlice },
    WaitHost { completion: Arc<Completion>, stream: Arc<Shared>, position: u64 },
    WaitForeign(Event),
    Record(Arc<Completion>),
}

#[derive(Default)]
struct Queue {
    items: VecDeque<Item>,
    /// Items ever pushed, and ever taken out to be run.
    pushed: u64,
    taken: u64,
    /// Items up to here may run. A normal stream allows all, the adversary's only what somebody waits for.
    demanded: u64,
    draining: bool,
    /// The first error; what comes after it is not run.
    failure: Option<Error>,
}

pub(super) struct Shared {
    label: &'static str,
    runtime: Handle,
    adversary: Option<Arc<Adversary>>,
    queue: Mutex<Queue>,
}

impl Shared {
    pub(super) fn label(&self) -> &'static str {
        self.label
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing that can panic runs under this lock; if it did, the queue would still be whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends and returns the position behind the item.
    fn push(self: &Arc<Self>, item: Item) -> u64 {
        let mut queue = self.lock();
        queue.items.push_back(item);
        queue.pushed += 1;
        let position = queue.pushed;
        self.start(queue);
        position
    }

    /// Somebody needs all work before `position`.
    pub(super) fn demand(self: &Arc<Self>, position: u64) {
        let mut queue = self.lock();
        if queue.demanded < position {
            queue.demanded = position;
            self.start(queue);
        }
    }

    fn start(self: &Arc<Self>, mut queue: MutexGuard<'_, Queue>) {
        if !queue.draining && queue.taken < queue.demanded && !queue.items.is_empty() {
            queue.draining = true;
            drop(queue);
            let drain = Drain { shared: self.clone(), finished: false };
            self.runtime.spawn(drain.run());
        }
    }

    async fn perform(&self, item: Item) {
        if let Item::Record(completion) = item {
            let outcome = self.lock().failure.clone().map_or(Ok(()), Err);
            completion.complete(outcome);
            return;
        }
        if self.lock().failure.is_some() {
            return;
        }
        if let Some(adversary) = &self.adversary {
            adversary.dawdle().await;
        }
        let outcome = match item {
            Item::Job(job) => self.run_job(job).await,
            Item::Copy { src, dst } => copy(src, dst).await,
            Item::WaitHost { completion, stream, position } => {
                stream.demand(position);
                completion.wait().await
            }
            Item::WaitForeign(event) => event.done(Instant::now() + FOREIGN_EVENT_LIMIT).await,
            Item::Record(_) => Ok(()),
        };
        if let Err(error) = outcome {
            tracing::debug!(stream = self.label, %error, "a host stream failed");
            self.lock().failure.get_or_insert(error);
        }
    }

    async fn run_job(&self, job: HostJob) -> Result<()> {
        let HostJob { label, on_abort, run } = job;
        let outcome = AssertUnwindSafe(run).catch_unwind().await.unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<&str>()
                .map(|s| (*s).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_default();
            Err(Error::new(ErrorKind::Internal, label, format!("the job panicked: {text}")))
        });
        match (&self.adversary, on_abort, outcome) {
            // As on an accelerator: the aborted kernel ends normally, over garbage.
            (Some(adversary), OnAbort::MaySucceed(writes), Err(error))
                if matches!(error.kind(), ErrorKind::Aborted | ErrorKind::PeerLost) =>
            {
                tracing::debug!(stream = self.label, %error, "aborted work ends as if it had succeeded");
                adversary.scribble(&writes);
                Ok(())
            }
            (_, _, outcome) => outcome,
        }
    }
}

/// The draining task. If the runtime drops it, everything still queued fails instead of hanging.
struct Drain {
    shared: Arc<Shared>,
    finished: bool,
}

impl Drain {
    async fn run(mut self) {
        loop {
            let item = {
                let mut queue = self.shared.lock();
                let item = if queue.taken < queue.demanded { queue.items.pop_front() } else { None };
                match item {
                    Some(item) => {
                        queue.taken += 1;
                        item
                    }
                    None => {
                        queue.draining = false;
                        self.finished = true;
                        return;
                    }
                }
            };
            self.shared.perform(item).await;
        }
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let gone =
            Error::new(ErrorKind::Aborted, "run a host stream", "the runtime of this stream has ended");
        let items = {
            let mut queue = self.shared.lock();
            queue.failure.get_or_insert(gone.clone());
            queue.taken = queue.pushed;
            queue.draining = false;
            std::mem::take(&mut queue.items)
        };
        for item in items {
            if let Item::Record(completion) = item {
                completion.complete(Err(gone.clone()));
            }
        }
    }
}

/// Held by the stream and by its events. When the last is gone nobody can wait any more: what is left runs now.
pub(super) struct Owner(Arc<Shared>);

impl Owner {
    pub(super) fn stream(&self) -> &Arc<Shared> {
        &self.0
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.demand(u64::MAX);
    }
}

/// A stream of the host device.
pub(super) struct HostQueue {
    owner: Arc<Owner>,
}

impl HostQueue {
    pub(super) fn new(label: &'static str, runtime: Handle, adversary: Option<Arc<Adversary>>) -> Self {
        let demanded = if adversary.is_some() { 0 } else { u64::MAX };
        let queue = Mutex::new(Queue { demanded, ..Queue::default() });
        Self { owner: Arc::new(Owner(Arc::new(Shared { label, runtime, adversary, queue }))) }
    }

    fn shared(&self) -> &Arc<Shared> {
        self.owner.stream()
    }
}

impl fmt::Debug for HostQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let queue = self.shared().lock();
        f.debug_struct("HostQueue")
            .field("label", &self.shared().label)
            .field("pushed", &queue.pushed)
            .field("taken", &queue.taken)
            .field("failure", &queue.failure)
            .finish()
    }
}

impl Stream for HostQueue {
    fn raw(&self) -> RawStream {
        RawStream::Host
    }

    fn host(&self) -> Option<&dyn HostStream> {
        Some(self)
    }

    fn copy(&self, src: BufferSlice, dst: BufferSlice) -> Result<()> {
        if src.len_bytes() != dst.len_bytes() {
            return Err(Error::new(
                ErrorKind::Internal,
                "copy",
                format!("{} bytes do not fit a range of {}", src.len_bytes(), dst.len_bytes()),
            ));
        }
        src.host_ptr()?;
        dst.host_ptr()?;
        self.shared().push(Item::Copy { src, dst });
        Ok(())
    }

    fn record(&self) -> Result<Event> {
        let completion = Arc::new(Completion::default());
        let position = self.shared().push(Item::Record(completion.clone()));
        Ok(Event::new(HostEvent {
            completion,
            owner: self.owner.clone(),
            position,
            polls: AtomicU32::new(0),
        }))
    }

    fn wait(&self, event: &Event) -> Result<()> {
        let item = match event.downcast::<HostEvent>() {
            // The queue is FIFO: its own events are behind it already.
            Some(own) if Arc::ptr_eq(&own.owner, &self.owner) => return Ok(()),
            // Holds the other stream, not its owner: two streams that wait for each other must not keep each other.
            Some(other) => Item::WaitHost {
                completion: other.completion.clone(),
                stream: other.owner.stream().clone(),
                position: other.position,
            },
            None => Item::WaitForeign(event.clone()),
        };
        self.shared().push(item);
        Ok(())
    }
}

impl HostStream for HostQueue {
    fn submit(&self, job: HostJob) -> Result<()> {
        self.shared().push(Item::Job(job));
        Ok(())
    }
}

/// Runs `job` on a stream of its own: one of `device` if that has host streams (so that the adversary sees it), else a
/// plain one of the current runtime.
pub(crate) fn submit_alone(device: &dyn DeviceBackend, job: HostJob) -> Result<Event> {
    let mut stream = device.stream(job.label)?;
    if stream.host().is_none() {
        let runtime = Handle::try_current().map_err(|e| {
            Error::new(ErrorKind::Internal, job.label, "must be called in a tokio runtime").caused_by(e)
        })?;
        stream = Arc::new(HostQueue::new(job.label, runtime, None));
    }
    if let Some(host) = stream.host() {
        host.submit(job)?;
    }
    stream.record()
}

async fn copy(src: BufferSlice, dst: BufferSlice) -> Result<()> {
    if src.len_bytes() <= INLINE_COPY_BYTES {
        return copy_bytes(&src, &dst);
    }
    // The closure owns both slices, so a runtime that ends in the middle frees nothing under the copy.
    tokio::task::spawn_blocking(move || copy_bytes(&src, &dst)).await.unwrap_or_else(|error| {
        Err(Error::new(ErrorKind::Aborted, "copy", "the runtime of this stream has ended").caused_by(error))
    })
}

/// Copies equal ranges of host memory; they may overlap.
pub(crate) fn copy_bytes(src: &BufferSlice, dst: &BufferSlice) -> Result<()> {
    let (from, to) = (src.host_ptr()?, dst.host_ptr()?);
    let len = src.len_bytes().min(dst.len_bytes()) as usize;
    // SAFETY: both ranges are mapped while the slices live (`Buffer`); streams order this copy against every other
    // use of them (the caller enqueued it), and `copy` allows overlap.
    unsafe { std::ptr::copy(from.as_ptr(), to.as_ptr(), len) };
    Ok(())
}
