//! Events whose end a layer decides.

use std::{any::Any, future::Future, sync::Arc, time::Instant};

use async_trait::async_trait;
use tokio::{runtime::Handle, sync::watch};

use crate::{
    device::{Event, EventState},
    error::{Error, ErrorKind, Result},
};

/// An event that is a task: complete when the task has ended, with its result.
#[derive(Debug)]
struct Later {
    label: &'static str,
    outcome: watch::Receiver<Option<Result<()>>>,
}

/// Runs `work`, which must end by itself. It goes on if the event is dropped, so it owns what it needs.
pub(super) fn spawn(
    label: &'static str,
    work: impl Future<Output = Result<()>> + Send + 'static,
) -> Result<Event> {
    let runtime = Handle::try_current().map_err(|error| {
        Error::new(ErrorKind::Internal, label, "must be called in a tokio runtime").caused_by(error)
    })?;
    let (sender, outcome) = watch::channel(None);
    runtime.spawn(async move {
        // Nobody may be waiting any more.
        let _ = sender.send(Some(work.await));
    });
    Ok(Event::new(Later { label, outcome }))
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl EventState for Later {
    fn is_complete(&self) -> Result<bool> {
        let outcome = self.outcome.borrow().clone();
        match outcome {
            Some(outcome) => outcome.map(|()| true),
            None if self.outcome.has_changed().is_err() => Err(gone(self.label)),
            None => Ok(false),
        }
    }

    async fn done(&self, deadline: Instant) -> Result<()> {
        let mut outcome = self.outcome.clone();
        let ended = tokio::time::timeout_at(deadline.into(), outcome.wait_for(Option::is_some)).await;
        match ended {
            Ok(Ok(outcome)) => outcome.clone().unwrap_or(Ok(())),
            Ok(Err(_)) => Err(gone(self.label)),
            Err(_) => Err(Error::new(ErrorKind::Timeout, self.label, "it did not end by its deadline")),
        }
    }

    fn done_now(&self) -> Option<Result<()>> {
        None
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn gone(label: &'static str) -> Error {
    Error::new(ErrorKind::Aborted, label, "the runtime has ended")
}

/// An event that tells when it is first seen complete.
pub(super) struct Observed<F> {
    inner: Event,
    seen: Arc<F>,
}

impl<F: Fn(&Result<()>) + Send + Sync + 'static> Observed<F> {
    pub(super) fn event(inner: Event, seen: F) -> Event {
        Event::new(Self { inner, seen: Arc::new(seen) })
    }
}

impl<F> std::fmt::Debug for Observed<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Observed").field(&self.inner).finish()
    }
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl<F: Fn(&Result<()>) + Send + Sync + 'static> EventState for Observed<F> {
    fn is_complete(&self) -> Result<bool> {
        let outcome = self.inner.is_complete();
        match &outcome {
            Ok(true) => (self.seen)(&Ok(())),
            Ok(false) => {}
            Err(error) => (self.seen)(&Err(error.clone())),
        }
        outcome
    }

    async fn done(&self, deadline: Instant) -> Result<()> {
        let outcome = self.inner.done(deadline).await;
        // The caller's own deadline says nothing about the work.
        let still_runs = outcome.is_err() && matches!(self.inner.is_complete(), Ok(false));
        if !still_runs {
            (self.seen)(&outcome);
        }
        outcome
    }

    /// `done` asks the inner event, which would otherwise be polled twice.
    fn done_now(&self) -> Option<Result<()>> {
        None
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
