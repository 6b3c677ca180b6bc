//! Events of host streams.

use std::{
    any::Any,
    fmt,
    pin::pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Instant,
};

use async_trait::async_trait;
use tokio::sync::Notify;

use super::{adversary::PATIENCE, stream::Owner};
use crate::{
    device::EventState,
    error::{Error, ErrorKind, Result},
};

/// Set once, by the stream.
#[derive(Debug, Default)]
pub(super) struct Completion {
    outcome: OnceLock<Result<()>>,
    notify: Notify,
}

impl Completion {
    pub(super) fn complete(&self, outcome: Result<()>) {
        // Only the stream completes it, once; a second call would be the drain guard after a finished record.
        let _ = self.outcome.set(outcome);
        self.notify.notify_waiters();
    }

    pub(super) fn outcome(&self) -> Option<&Result<()>> {
        self.outcome.get()
    }

    pub(super) async fn wait(&self) -> Result<()> {
        let mut notified = pin!(self.notify.notified());
        notified.as_mut().enable();
        if self.outcome.get().is_none() {
            notified.await;
        }
        self.outcome.get().cloned().unwrap_or(Ok(()))
    }
}

/// A point in a host stream. Holding it holds the work before it, and so that work's memory.
pub struct HostEvent {
    pub(super) completion: Arc<Completion>,
    pub(super) owner: Arc<Owner>,
    pub(super) position: u64,
    pub(super) polls: AtomicU32,
}

impl fmt::Debug for HostEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostEvent")
            .field("stream", &self.owner.stream().label())
            .field("position", &self.position)
            .field("outcome", &self.completion.outcome())
            .finish()
    }
}

#[async_trait]
impl EventState for HostEvent {
    fn is_complete(&self) -> Result<bool> {
        match self.completion.outcome() {
            Some(outcome) => outcome.clone().map(|()| true),
            None => {
                if self.polls.fetch_add(1, Ordering::Relaxed) >= PATIENCE {
                    self.owner.stream().demand(self.position);
                }
                Ok(false)
            }
        }
    }

    async fn done(&self, deadline: Instant) -> Result<()> {
        self.owner.stream().demand(self.position);
        match tokio::time::timeout_at(deadline.into(), self.completion.wait()).await {
            Ok(outcome) => outcome,
            // A completion that raced with the deadline counts.
            Err(_) => self.completion.outcome().cloned().unwrap_or_else(|| {
                Err(Error::new(
                    ErrorKind::Timeout,
                    "wait for a stream",
                    format!("work on stream `{}` did not end by its deadline", self.owner.stream().label()),
                ))
            }),
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
