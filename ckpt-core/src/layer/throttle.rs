//! A link of a given rate and latency.

use std::{
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::FutureExt;

use super::{collective, facets_of_inner, later, one_sided, sleep_unless_aborted};
use crate::{
    device::{Buffer, Event, HostJob, OnAbort, Stream},
    error::{Error, ErrorKind, Result},
    transport::{
        AbortHandle, Collective, CollectiveOp, Communicator, CommunicatorQueue, GroupSpec, OneSided, ReadOp,
        Registration, Transport, WriteOp,
    },
};

/// How slow the link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThrottleConfig {
    /// Bytes per second in each direction; 0 sets no limit.
    pub bytes_per_sec: u64,
    /// Added to each operation.
    pub latency: Duration,
}

impl Default for ThrottleConfig {
    /// 10 GbE: 1.25 GB/s, 50 us.
    fn default() -> Self {
        Self { bytes_per_sec: 1_250_000_000, latency: Duration::from_micros(50) }
    }
}

/// Makes one member's link slow: what it sends and what it receives each pass at the given rate. An operation takes as
/// long as the wrapped transport needs or as the rate says, whichever is more.
#[derive(Debug)]
pub struct Throttle {
    inner: Arc<dyn Transport>,
    link: Arc<Link>,
}

/// Both directions of the link.
#[derive(Debug)]
struct Link {
    config: ThrottleConfig,
    outbound: Mutex<Option<Instant>>,
    inbound: Mutex<Option<Instant>>,
}

impl Link {
    /// Takes the link for so many bytes, behind what took it before; when they are through.
    fn reserve(&self, direction: &Mutex<Option<Instant>>, bytes: u64) -> Instant {
        let now = Instant::now();
        // Nothing panics under this lock, and any instant is valid.
        let mut free = direction.lock().unwrap_or_else(PoisonError::into_inner);
        let start = free.map_or(now, |free| free.max(now));
        let seconds = match self.config.bytes_per_sec {
            0 => 0.0,
            rate => bytes as f64 / rate as f64,
        };
        let end = start + Duration::from_secs_f64(seconds);
        *free = Some(end);
        end + self.config.latency
    }

    fn reserve_group(&self, (sent, received): (u64, u64)) -> Instant {
        self.reserve(&self.outbound, sent).max(self.reserve(&self.inbound, received))
    }
}

impl Throttle {
    /// `inner` behind a slow link.
    pub fn wrap(inner: Arc<dyn Transport>, config: ThrottleConfig) -> Arc<Self> {
        let link = Link { config, outbound: Mutex::default(), inbound: Mutex::default() };
        Arc::new(Self { inner, link: Arc::new(link) })
    }
}

#[deny(clippy::missing_trait_methods)]
impl Transport for Throttle {
    facets_of_inner!();
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl Collective for Throttle {
    async fn create_token(&self) -> Result<Bytes> {
        collective(&*self.inner)?.create_token().await
    }

    async fn join(&self, group: GroupSpec, deadline: Instant) -> Result<Communicator> {
        let rank = group.rank;
        let Communicator { queue, abort } = collective(&*self.inner)?.join(group, deadline).await?;
        let queue = Box::new(Queue { inner: queue, abort: abort.clone(), link: self.link.clone(), rank });
        Ok(Communicator { queue, abort })
    }
}

#[derive(Debug)]
struct Queue {
    inner: Box<dyn CommunicatorQueue>,
    abort: Arc<dyn AbortHandle>,
    link: Arc<Link>,
    rank: u32,
}

impl Queue {
    fn bytes(&self, ops: &[CollectiveOp]) -> (u64, u64) {
        ops.iter().fold((0, 0), |(sent, received), op| {
            let bytes = op.buffer.len_bytes();
            if op.root == self.rank { (sent + bytes, received) } else { (sent, received + bytes) }
        })
    }
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl CommunicatorQueue for Queue {
    async fn enqueue(&mut self, ops: Vec<CollectiveOp>, stream: &Arc<dyn Stream>) -> Result<Event> {
        let (link, bytes) = (self.link.clone(), self.bytes(&ops));
        let Some(host) = stream.host() else {
            // The link is taken when the work is enqueued; the caller waits, since the stream cannot.
            let free_at = link.reserve_group(bytes);
            let event = self.inner.enqueue(ops, stream).await?;
            sleep_unless_aborted(free_at, &self.abort).await?;
            return Ok(event);
        };
        if let Some(cause) = self.abort.poisoned() {
            return Err(cause);
        }
        // One job takes the link when the stream comes to it, one behind the group waits until it is free.
        let free_at = Arc::new(OnceLock::new());
        let taken = free_at.clone();
        let run = async move {
            taken.get_or_init(|| link.reserve_group(bytes));
            Ok(())
        };
        host.submit(HostJob { label: "throttle", on_abort: OnAbort::Fails, run: run.boxed() })?;
        self.inner.enqueue(ops, stream).await?;
        let abort = self.abort.clone();
        let run = async move {
            match free_at.get() {
                Some(at) => sleep_unless_aborted(*at, &abort).await,
                None => Ok(()),
            }
        };
        // After an abort this may be skipped as the group itself: the poison tells.
        host.submit(HostJob {
            label: "throttle",
            on_abort: OnAbort::MaySucceed(Vec::new()),
            run: run.boxed(),
        })?;
        stream.record()
    }
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl OneSided for Throttle {
    async fn register(&self, buffer: Arc<dyn Buffer>) -> Result<Arc<dyn Registration>> {
        one_sided(&*self.inner)?.register(buffer).await
    }

    fn post_read(&self, batch: Vec<ReadOp>, deadline: Instant) -> Result<Event> {
        let bytes = batch.iter().map(|op| op.into.len_bytes()).sum();
        let event = one_sided(&*self.inner)?.post_read(batch, deadline)?;
        let free_at = self.link.reserve(&self.link.inbound, bytes);
        throttled("read remote memory", event, free_at, deadline)
    }

    async fn register_writable(&self, buffer: Arc<dyn Buffer>) -> Result<Arc<dyn Registration>> {
        one_sided(&*self.inner)?.register_writable(buffer).await
    }

    fn post_write(&self, batch: Vec<WriteOp>, deadline: Instant) -> Result<Event> {
        let bytes = batch.iter().map(|op| op.from.len_bytes()).sum();
        let event = one_sided(&*self.inner)?.post_write(batch, deadline)?;
        let free_at = self.link.reserve(&self.link.outbound, bytes);
        throttled("write remote memory", event, free_at, deadline)
    }
}

/// Complete when `event` is and the link is free, if that is in time.
fn throttled(operation: &'static str, event: Event, free_at: Instant, deadline: Instant) -> Result<Event> {
    later::spawn(operation, async move {
        event.done(deadline).await?;
        tokio::time::sleep_until(free_at.min(deadline).into()).await;
        if free_at > deadline {
            let what = "the throttled link does not bring the bytes by the deadline";
            return Err(Error::new(ErrorKind::Timeout, operation, what));
        }
        Ok(())
    })
}
