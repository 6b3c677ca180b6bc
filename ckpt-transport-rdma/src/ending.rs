//! The event of a posted batch.

use std::{
    any::Any,
    sync::{Arc, OnceLock},
    time::Instant,
};

use async_trait::async_trait;
use ckpt_core::{
    Error, ErrorKind, Result,
    device::{Event, EventState},
};
use tokio::{runtime::Handle, sync::Notify};

/// Runs `jobs`, one for each owner; the event completes when all have ended, with the first error.
pub(crate) fn spawn(
    operation: &'static str,
    jobs: Vec<impl Future<Output = Result<()>> + Send + 'static>,
) -> Result<Event> {
    let runtime = Handle::try_current().map_err(|e| {
        Error::new(ErrorKind::Internal, operation, "must be called in a tokio runtime").caused_by(e)
    })?;
    let state = Arc::new(Completion::new(operation));
    let ended = Ended(state.clone());
    runtime.spawn(async move {
        let jobs: Vec<_> = jobs.into_iter().map(tokio::spawn).collect();
        let mut outcome = Ok(());
        // All are waited for, also after a failure: then nothing touches the batch's memory any more.
        for job in jobs {
            let ended = job.await.unwrap_or_else(|e| {
                Err(Error::new(ErrorKind::Internal, operation, "a task ended").caused_by(e))
            });
            outcome = outcome.and(ended);
        }
        ended.0.complete(outcome);
    });
    Ok(Event::new(Ending(state)))
}

/// Set once, when a batch has ended.
#[derive(Debug, Default)]
pub(crate) struct Completion {
    operation: &'static str,
    pub(crate) outcome: OnceLock<Result<()>>,
    notify: Notify,
}

impl Completion {
    pub(crate) fn new(operation: &'static str) -> Self {
        Self { operation, ..Self::default() }
    }

    pub(crate) fn complete(&self, outcome: Result<()>) {
        // A second call is the guard after a finished batch.
        let _ = self.outcome.set(outcome);
        self.notify.notify_waiters();
    }

    pub(crate) async fn done(&self, deadline: Instant) -> Result<()> {
        let wait = async {
            loop {
                let mut notified = std::pin::pin!(self.notify.notified());
                notified.as_mut().enable();
                if let Some(outcome) = self.outcome.get() {
                    return outcome.clone();
                }
                notified.await;
            }
        };
        tokio::time::timeout_at(deadline.into(), wait).await.unwrap_or_else(|_| {
            // A completion that raced with the deadline counts.
            self.outcome.get().cloned().unwrap_or_else(|| {
                Err(Error::new(ErrorKind::Timeout, self.operation, "it did not end by its deadline"))
            })
        })
    }
}

/// Completes an event also when its task is dropped with the runtime. The work requests own their memory, so that the
/// event's failure does not free it.
pub(crate) struct Ended(pub(crate) Arc<Completion>);

impl Drop for Ended {
    fn drop(&mut self) {
        let what = "the runtime of this batch has ended";
        self.0.complete(Err(Error::new(ErrorKind::Aborted, self.0.operation, what)));
    }
}

#[derive(Debug)]
struct Ending(Arc<Completion>);

#[async_trait]
impl EventState for Ending {
    fn is_complete(&self) -> Result<bool> {
        self.0.outcome.get().map_or(Ok(false), |outcome| outcome.clone().map(|()| true))
    }

    async fn done(&self, deadline: Instant) -> Result<()> {
        self.0.done(deadline).await
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
