//! What was done when.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::FutureExt;
use serde::Serialize;

use super::{bytes_of, collective, facets_of_inner, later::Observed, one_sided};
use crate::{
    device::{Buffer, Event, HostJob, OnAbort, Stream},
    error::{Error, ErrorKind, Result},
    transport::{
        AbortHandle, Collective, CollectiveOp, Communicator, CommunicatorQueue, GroupSpec, OneSided, ReadOp,
        Registration, Transport, WriteOp,
    },
};

/// Operations that are kept; later ones are counted only.
const SPANS: usize = 1 << 20;

/// What an operation was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OpKind {
    /// A token was made.
    Token,
    /// A group was joined.
    Join,
    /// A group of broadcasts.
    Broadcast,
    /// Memory was registered.
    Register,
    /// A batch of reads.
    Read,
    /// A batch of writes.
    Write,
    /// A communicator was aborted.
    Abort,
}

/// One operation, relative to when the layer was made.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OpSpan {
    /// What.
    pub kind: OpKind,
    /// Single operations in it.
    pub ops: usize,
    /// Bytes that this member sent or received.
    pub bytes: u64,
    /// When it was asked for.
    pub start: Duration,
    /// When it was done; `None`: not yet, or it failed and only the communicator's poison tells.
    pub end: Option<Duration>,
    /// How it failed.
    pub error: Option<ErrorKind>,
}

/// Keeps a span for each operation of a transport.
#[derive(Debug)]
pub struct Record {
    inner: Arc<dyn Transport>,
    log: Arc<Log>,
}

struct Log {
    began: Instant,
    spans: Mutex<Vec<OpSpan>>,
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").field("began", &self.began).finish_non_exhaustive()
    }
}

impl Log {
    fn begin(&self, kind: OpKind, ops: usize, bytes: u64) -> Option<usize> {
        let start = self.began.elapsed();
        let mut spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        if spans.len() == SPANS {
            return None;
        }
        spans.push(OpSpan { kind, ops, bytes, start, end: None, error: None });
        Some(spans.len() - 1)
    }

    /// The first end counts.
    fn end(&self, span: Option<usize>, error: Option<&Error>) {
        let end = self.began.elapsed();
        let mut spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(span) = span.and_then(|number| spans.get_mut(number))
            && span.end.is_none()
        {
            span.end = Some(end);
            span.error = error.map(Error::kind);
        }
    }

    fn ended<T>(&self, span: Option<usize>, result: Result<T>) -> Result<T> {
        self.end(span, result.as_ref().err());
        result
    }
}

impl Record {
    /// `inner`, watched.
    pub fn wrap(inner: Arc<dyn Transport>) -> Arc<Self> {
        let log = Log { began: Instant::now(), spans: Mutex::default() };
        Arc::new(Self { inner, log: Arc::new(log) })
    }

    /// Everything so far, by start.
    pub fn spans(&self) -> Vec<OpSpan> {
        // A span is written whole or not at all.
        self.log.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Bytes of all operations of one kind that were asked for.
    pub fn bytes(&self, kind: OpKind) -> u64 {
        let spans = self.log.spans.lock().unwrap_or_else(PoisonError::into_inner);
        spans.iter().filter(|span| span.kind == kind).map(|span| span.bytes).sum()
    }
}

#[deny(clippy::missing_trait_methods)]
impl Transport for Record {
    facets_of_inner!();
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl Collective for Record {
    async fn create_token(&self) -> Result<Bytes> {
        let span = self.log.begin(OpKind::Token, 1, 0);
        self.log.ended(span, collective(&*self.inner)?.create_token().await)
    }

    async fn join(&self, group: GroupSpec, deadline: Instant) -> Result<Communicator> {
        let span = self.log.begin(OpKind::Join, 1, 0);
        let joined = collective(&*self.inner)?.join(group, deadline).await;
        let Communicator { queue, abort } = self.log.ended(span, joined)?;
        Ok(Communicator {
            queue: Box::new(Queue { inner: queue, log: self.log.clone() }),
            abort: Arc::new(Abort { inner: abort, log: self.log.clone() }),
        })
    }
}

#[derive(Debug)]
struct Queue {
    inner: Box<dyn CommunicatorQueue>,
    log: Arc<Log>,
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl CommunicatorQueue for Queue {
    async fn enqueue(&mut self, ops: Vec<CollectiveOp>, stream: &Arc<dyn Stream>) -> Result<Event> {
        let span = self.log.begin(OpKind::Broadcast, ops.len(), bytes_of(&ops));
        let enqueued = self.inner.enqueue(ops, stream).await;
        if let Err(error) = &enqueued {
            self.log.end(span, Some(error));
        } else if let Some(host) = stream.host() {
            // In the order of the stream, so that nobody has to ask the event.
            let log = self.log.clone();
            let run = async move {
                log.end(span, None);
                Ok(())
            };
            host.submit(HostJob { label: "record", on_abort: OnAbort::Fails, run: run.boxed() })?;
        }
        // On a stream of a device the event must stay its own, so that streams know it; only the start is recorded.
        enqueued
    }
}

#[derive(Debug)]
struct Abort {
    inner: Arc<dyn AbortHandle>,
    log: Arc<Log>,
}

#[deny(clippy::missing_trait_methods)]
impl AbortHandle for Abort {
    fn abort(&self, cause: Error) {
        let span = self.log.begin(OpKind::Abort, 1, 0);
        self.inner.abort(cause.clone());
        self.log.end(span, Some(&cause));
    }

    fn poisoned(&self) -> Option<Error> {
        self.inner.poisoned()
    }
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl OneSided for Record {
    async fn register(&self, buffer: Arc<dyn Buffer>) -> Result<Arc<dyn Registration>> {
        let span = self.log.begin(OpKind::Register, 1, buffer.len_bytes());
        self.log.ended(span, one_sided(&*self.inner)?.register(buffer).await)
    }

    fn post_read(&self, batch: Vec<ReadOp>, deadline: Instant) -> Result<Event> {
        let bytes = batch.iter().map(|op| op.into.len_bytes()).sum();
        let span = self.log.begin(OpKind::Read, batch.len(), bytes);
        self.watch(span, one_sided(&*self.inner)?.post_read(batch, deadline))
    }

    async fn register_writable(&self, buffer: Arc<dyn Buffer>) -> Result<Arc<dyn Registration>> {
        let span = self.log.begin(OpKind::Register, 1, buffer.len_bytes());
        self.log.ended(span, one_sided(&*self.inner)?.register_writable(buffer).await)
    }

    fn post_write(&self, batch: Vec<WriteOp>, deadline: Instant) -> Result<Event> {
        let bytes = batch.iter().map(|op| op.from.len_bytes()).sum();
        let span = self.log.begin(OpKind::Write, batch.len(), bytes);
        self.watch(span, one_sided(&*self.inner)?.post_write(batch, deadline))
    }
}

impl Record {
    /// The span ends when its event is first seen complete.
    fn watch(&self, span: Option<usize>, posted: Result<Event>) -> Result<Event> {
        match posted {
            Ok(event) => {
                let log = self.log.clone();
                Ok(Observed::event(event, move |outcome| log.end(span, outcome.as_ref().err())))
            }
            Err(error) => self.log.ended(span, Err(error)),
        }
    }
}
