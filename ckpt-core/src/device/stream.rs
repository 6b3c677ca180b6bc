//! Streams and events: "enqueued" and "done" are different things.

use std::{fmt, sync::Arc, time::Instant};

use async_trait::async_trait;
use futures_util::future::BoxFuture;

use super::BufferSlice;
use crate::error::Result;

/// A stream's handle for the crate that shares its library (nccl with cuda, hccl with ascend).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawStream {
    /// A queue of host jobs: use [`Stream::host`].
    Host,
    /// `CUstream`.
    Cuda(usize),
    /// `aclrtStream`.
    Ascend(usize),
}

/// FIFO work of one device. Nothing here waits for bytes to move.
pub trait Stream: Send + Sync + fmt::Debug {
    /// The native handle.
    fn raw(&self) -> RawStream;
    /// The host queue, if this is one: how `tcp` and `local` enqueue.
    fn host(&self) -> Option<&dyn HostStream>;
    /// Copies `src` to `dst` (equal lengths) when the work before it is done. Both stay alive until then.
    fn copy(&self, src: BufferSlice, dst: BufferSlice) -> Result<()>;
    /// Keeps `slices` alive as long as the work enqueued so far: for a transport that enqueued on [`Stream::raw`] by
    /// itself. To be called after that work was enqueued and before the event that stands for it is recorded.
    fn keep_alive(&self, slices: Vec<BufferSlice>) -> Result<()> {
        // A copy of no bytes owns its slices until the stream has passed it, on every device.
        slices.into_iter().try_for_each(|s| s.slice(0..0).and_then(|none| self.copy(none.clone(), none)))
    }
    /// An event that completes when all work enqueued so far is done; it keeps that work's memory alive.
    fn record(&self) -> Result<Event>;
    /// Work enqueued after this starts only when `event` has completed.
    fn wait(&self, event: &Event) -> Result<()>;
}

/// A stream whose work is host futures, run one at a time in order.
pub trait HostStream: Send + Sync {
    /// Appends a job. A job that fails fails the stream: later events report its error.
    fn submit(&self, job: HostJob) -> Result<()>;
}

/// One unit of host work. The future owns every [`BufferSlice`] that it touches.
pub struct HostJob {
    /// For traces: `h2d`, `broadcast`.
    pub label: &'static str,
    /// What the adversarial host device makes of it when it is aborted.
    pub on_abort: OnAbort,
    /// The work. It must end by itself (by its own deadline or by abort).
    pub run: BoxFuture<'static, Result<()>>,
}

/// How work may end that was aborted or lost its peer.
#[derive(Clone, Debug)]
pub enum OnAbort {
    /// Its event fails.
    Fails,
    /// As on an accelerator, its event may succeed over garbage in these ranges: whoever waits must then look whether
    /// the communicator was poisoned.
    MaySucceed(Vec<BufferSlice>),
}

impl fmt::Debug for HostJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostJob").field("label", &self.label).finish_non_exhaustive()
    }
}

/// The state behind an [`Event`].
#[async_trait]
pub trait EventState: Send + Sync + fmt::Debug {
    /// Whether it has completed; the error of the work if that failed.
    fn is_complete(&self) -> Result<bool>;
    /// Waits until it has completed, at most until `deadline`. Cancel safe.
    async fn done(&self, deadline: Instant) -> Result<()>;
    /// What `done` would answer at once; `None` if it would wait. For work that is so short that a wait's allocation
    /// counts. Promises all that `done` does: more than [`Self::is_complete`] may.
    fn done_now(&self) -> Option<Result<()>> {
        None
    }
    /// The state as [`std::any::Any`], so that a backend recognises its own events in [`Stream::wait`].
    fn as_any(&self) -> &dyn std::any::Any;
}

/// A point in a stream. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Event(Arc<dyn EventState>);

impl Event {
    /// Wraps a backend's state.
    pub fn new(state: impl EventState + 'static) -> Self {
        Self(Arc::new(state))
    }

    /// A backend's state that others hold as well.
    pub fn shared(state: Arc<impl EventState + 'static>) -> Self {
        Self(state)
    }

    /// See [`EventState::is_complete`].
    pub fn is_complete(&self) -> Result<bool> {
        self.0.is_complete()
    }

    /// See [`EventState::done`].
    pub async fn done(&self, deadline: Instant) -> Result<()> {
        match self.0.done_now() {
            Some(outcome) => outcome,
            None => self.0.done(deadline).await,
        }
    }

    /// The backend's own state, if this event is one of type `T`.
    pub fn downcast<T: 'static>(&self) -> Option<&T> {
        self.0.as_any().downcast_ref()
    }
}
