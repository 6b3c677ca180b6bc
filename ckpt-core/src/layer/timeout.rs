//! Limits below those of the caller.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::time::timeout_at;

use super::{collective, facets_of_inner, one_sided};
use crate::{
    device::{Buffer, Event, Stream},
    error::{Error, ErrorKind, Key, Result},
    transport::{
        AbortHandle, Collective, CollectiveOp, Communicator, CommunicatorQueue, GroupSpec, OneSided, ReadOp,
        Registration, Transport, WriteOp,
    },
};

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeoutConfig {
    /// Making a token, joining a group, registering memory.
    pub join: Duration,
    /// One group of broadcasts or one batch of reads, from enqueued to done.
    pub operation: Duration,
}

impl Default for TimeoutConfig {
    fn default() -> Self {
        Self { join: Duration::from_secs(60), operation: Duration::from_secs(30) }
    }
}

/// Ends what takes too long, even where the caller waits longer. A group of broadcasts that is late aborts its
/// communicator, since no other way frees a stream.
#[derive(Debug)]
pub struct Timeout {
    inner: Arc<dyn Transport>,
    config: TimeoutConfig,
}

impl Timeout {
    /// `inner` with limits.
    pub fn wrap(inner: Arc<dyn Transport>, config: TimeoutConfig) -> Arc<Self> {
        Arc::new(Self { inner, config })
    }

    fn join_by(&self) -> Instant {
        Instant::now() + self.config.join
    }
}

fn late(operation: &'static str, limit: Duration) -> Error {
    Error::new(ErrorKind::Timeout, operation, format!("it took longer than {limit:?}"))
}

#[deny(clippy::missing_trait_methods)]
impl Transport for Timeout {
    facets_of_inner!();
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl Collective for Timeout {
    async fn create_token(&self) -> Result<Bytes> {
        let made = timeout_at(self.join_by().into(), collective(&*self.inner)?.create_token()).await;
        made.unwrap_or_else(|_| Err(late("make a token", self.config.join)))
    }

    async fn join(&self, group: GroupSpec, deadline: Instant) -> Result<Communicator> {
        let rank = group.rank;
        let joined = collective(&*self.inner)?.join(group, deadline.min(self.join_by())).await?;
        let Communicator { queue, abort } = joined;
        let queue = Queue { inner: queue, abort: abort.clone(), limit: self.config.operation, rank };
        Ok(Communicator { queue: Box::new(queue), abort })
    }
}

#[derive(Debug)]
struct Queue {
    inner: Box<dyn CommunicatorQueue>,
    abort: Arc<dyn AbortHandle>,
    limit: Duration,
    rank: u32,
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl CommunicatorQueue for Queue {
    async fn enqueue(&mut self, ops: Vec<CollectiveOp>, stream: &Arc<dyn Stream>) -> Result<Event> {
        let deadline = Instant::now() + self.limit;
        let error = late("broadcast", self.limit).with(Key::Rank, self.rank);
        let event = match timeout_at(deadline.into(), self.inner.enqueue(ops, stream)).await {
            Ok(enqueued) => enqueued?,
            Err(_) => {
                self.abort.abort(error.clone());
                return Err(error);
            }
        };
        // The watch holds the event, and so the memory, only until the work ends, at most until the deadline.
        let (watched, abort) = (event.clone(), self.abort.clone());
        tokio::spawn(async move {
            let ended = watched.done(deadline).await;
            if ended.is_err_and(|e| e.kind() == ErrorKind::Timeout) && Instant::now() >= deadline {
                abort.abort(error);
            }
        });
        Ok(event)
    }
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl OneSided for Timeout {
    async fn register(&self, buffer: Arc<dyn Buffer>) -> Result<Arc<dyn Registration>> {
        let registered = timeout_at(self.join_by().into(), one_sided(&*self.inner)?.register(buffer)).await;
        registered.unwrap_or_else(|_| Err(late("register memory", self.config.join)))
    }

    async fn register_writable(&self, buffer: Arc<dyn Buffer>) -> Result<Arc<dyn Registration>> {
        let registering = one_sided(&*self.inner)?.register_writable(buffer);
        let registered = timeout_at(self.join_by().into(), registering).await;
        registered.unwrap_or_else(|_| Err(late("register memory", self.config.join)))
    }

    fn post_write(&self, batch: Vec<WriteOp>, deadline: Instant) -> Result<Event> {
        one_sided(&*self.inner)?.post_write(batch, deadline.min(Instant::now() + self.config.operation))
    }

    fn post_read(&self, batch: Vec<ReadOp>, deadline: Instant) -> Result<Event> {
        one_sided(&*self.inner)?.post_read(batch, deadline.min(Instant::now() + self.config.operation))
    }
}
