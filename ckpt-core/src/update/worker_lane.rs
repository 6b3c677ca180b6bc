//! The worker's lane: one task owns the sink and performs its calls in order, and can be cut short by an abort.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};

use super::{
    Event,
    trace::{Stage, Trace},
};
use crate::{
    deadlines::Deadlines,
    device::Ring,
    error::{Error, Result},
    manifest::Manifest,
    plan::{self, UpdatePlan},
    sink::{Afterwards, WeightSink},
};

/// What the lane is asked to do, in order.
#[derive(Debug)]
pub(super) enum Call {
    Open { ring: Arc<dyn Ring>, plan: Arc<UpdatePlan>, manifest: Arc<Manifest> },
    Deliver { bucket: u32 },
    Release,
    Finish,
}

/// The driver's end of the lane.
#[derive(Debug)]
pub(super) struct WorkerLane {
    calls: mpsc::UnboundedSender<Call>,
    abort: watch::Sender<Option<Error>>,
    /// Tensors that the worker has acked.
    taken: Arc<AtomicU64>,
    task: JoinHandle<Quarantine>,
}

/// What may be freed once the lane has ended: whether the worker is known to have let go of the ring.
#[derive(Debug)]
pub(super) struct Quarantine {
    pub(super) ring: Option<Arc<dyn Ring>>,
    pub(super) worker_let_go: bool,
}

impl WorkerLane {
    pub(super) fn spawn(
        sink: Box<dyn WeightSink>,
        deadlines: Deadlines,
        trace: Trace,
        events: mpsc::UnboundedSender<Event>,
    ) -> Self {
        let (calls, inbox) = mpsc::unbounded_channel();
        let (abort, aborted) = watch::channel(None);
        let taken = Arc::<AtomicU64>::default();
        let ours = taken.clone();
        let lane =
            Lane { sink, deadlines, trace, events, inbox, aborted, taken: ours, ring: None, layout: None };
        Self { calls, abort, taken, task: tokio::spawn(lane.run()) }
    }

    /// Appends a call. A lane that has ended ignores it: it has already reported why.
    pub(super) fn call(&self, call: Call) {
        let _ = self.calls.send(call);
    }

    /// How many tensors the worker has taken.
    pub(super) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Acquire)
    }

    /// Interrupts whatever is in flight and makes the worker raise `cause`.
    pub(super) fn abort(&self, cause: Error) {
        self.abort.send_replace(Some(cause));
    }

    /// Waits until the lane has ended, at most `limit`; a lane that does not end keeps its ring for ever.
    pub(super) async fn finished(mut self, limit: Duration) -> Quarantine {
        drop(self.calls);
        match tokio::time::timeout(limit, &mut self.task).await {
            Ok(Ok(quarantine)) => quarantine,
            Ok(Err(_)) | Err(_) => {
                self.task.abort();
                Quarantine { ring: None, worker_let_go: false }
            }
        }
    }
}

struct Lane {
    sink: Box<dyn WeightSink>,
    deadlines: Deadlines,
    trace: Trace,
    events: mpsc::UnboundedSender<Event>,
    inbox: mpsc::UnboundedReceiver<Call>,
    aborted: watch::Receiver<Option<Error>>,
    taken: Arc<AtomicU64>,
    ring: Option<Arc<dyn Ring>>,
    layout: Option<(Arc<UpdatePlan>, Arc<Manifest>)>,
}

impl Lane {
    async fn run(mut self) -> Quarantine {
        let cause = loop {
            let call = tokio::select! {
                biased;
                cause = aborted(&mut self.aborted) => break Some(cause),
                call = self.inbox.recv() => match call {
                    Some(call) => call,
                    // The driver has dropped its end: the update is over.
                    None => break None,
                },
            };
            let mut abort = self.aborted.clone();
            let result = tokio::select! {
                biased;
                cause = aborted(&mut abort) => break Some(cause),
                result = self.perform(call) => result,
            };
            match result {
                Ok(event) => self.tell(event),
                Err(cause) => {
                    self.tell(Event::Failed { cause });
                    // Only `fail` may follow an error: wait for the abort that the machine now decides.
                    let cause = aborted(&mut self.aborted).await;
                    break Some(cause);
                }
            }
        };
        let Some(cause) = cause else {
            return Quarantine { worker_let_go: self.ring.is_none(), ring: self.ring };
        };
        let aborting = self.trace.begin(Stage::Abort, None);
        let told = self.sink.fail(&cause, Instant::now() + self.deadlines.abort).await;
        aborting.end();
        if let Err(error) = &told {
            tracing::warn!(%error, "the worker could not be told of the failure");
        }
        self.tell(Event::AbortDone);
        let worker_let_go = self.ring.is_none() || matches!(told, Ok(Afterwards::LetGo));
        Quarantine { worker_let_go, ring: self.ring }
    }

    async fn perform(&mut self, call: Call) -> Result<Event> {
        let (stage, bucket) = match &call {
            Call::Open { .. } => (Stage::Open, None),
            Call::Deliver { bucket } => (Stage::Reload, Some(*bucket)),
            Call::Release => (Stage::Release, None),
            Call::Finish => (Stage::PostHook, None),
        };
        let span = self.trace.begin(stage, bucket);
        let after = |limit: Duration| Instant::now() + limit;
        let event = match call {
            Call::Open { ring, plan, manifest } => {
                self.ring = Some(ring.clone());
                self.layout = Some((plan, manifest));
                self.sink.open(&*ring, after(self.deadlines.ready)).await?;
                Event::SinkOpened
            }
            Call::Deliver { bucket } => {
                let (plan, manifest) = self.layout.as_ref().ok_or_else(|| {
                    Error::new(crate::ErrorKind::Internal, "deliver a bucket", "the sink was not opened")
                })?;
                let message = plan::bucket_message(plan, bucket, manifest)?;
                self.sink.deliver(&message, after(self.deadlines.bucket)).await?;
                self.taken.fetch_add(message.tensors.len() as u64, Ordering::AcqRel);
                Event::Acked { bucket }
            }
            Call::Release => {
                self.sink.release(after(self.deadlines.release)).await?;
                self.ring = None;
                Event::Released
            }
            Call::Finish => {
                self.sink.finish(after(self.deadlines.release)).await?;
                Event::PostHookDone
            }
        };
        span.end();
        Ok(event)
    }

    fn tell(&self, event: Event) {
        let _ = self.events.send(event);
    }
}

/// Completes when an abort was asked for.
async fn aborted(abort: &mut watch::Receiver<Option<Error>>) -> Error {
    match abort.wait_for(Option::is_some).await.map(|cause| cause.clone()) {
        Ok(Some(cause)) => cause,
        // The driver is gone without a word: it was cancelled.
        _ => Error::new(crate::ErrorKind::Aborted, "update weights", "the update was cancelled"),
    }
}
