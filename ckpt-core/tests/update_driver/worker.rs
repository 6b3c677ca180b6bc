//! Workers that compare every byte with the source, and misbehave on request.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use ckpt_core::{
    Error, ErrorKind, Result,
    device::{Buffer, BufferSlice, Ring},
    sink::{Afterwards, BucketMessage, WeightSink},
};
use tokio::sync::watch;

use crate::{support::Expected, watch::Watched};

/// What goes wrong in a worker.
#[derive(Clone, Debug, Default)]
pub enum Fault {
    #[default]
    None,
    /// This call returns an error.
    Raise(At),
    /// This call never returns; it is cut short by its deadline or an abort.
    Hang(At),
    /// The same, and the worker cannot even be told of a failure.
    Gone(At),
    /// Every bucket takes this long.
    Slow(Duration),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    Open,
    Bucket(u32),
    Release,
    Finish,
}

/// The test's side of one worker.
pub struct Worker {
    pub rank: u32,
    pub state: Arc<State>,
    pub fault: Fault,
    /// Buckets before `ahead_until` are taken only once this many exchanges more than the bucket's number were enqueued.
    pub ahead: u64,
    pub ahead_until: u32,
}

/// What a worker has seen.
pub struct State {
    expected: Arc<Expected>,
    watch: Arc<Watched>,
    pub seen: Mutex<BTreeMap<String, u32>>,
    pub buckets: AtomicU64,
    /// How many calls are waiting in [`Fault::Hang`].
    pub hanging: watch::Sender<u64>,
    pub finished: AtomicU64,
    pub told: Mutex<Option<String>>,
}

impl State {
    /// The worker is as new.
    pub fn forget(&self) {
        self.seen.lock().unwrap().clear();
        self.buckets.store(0, Ordering::SeqCst);
        self.finished.store(0, Ordering::SeqCst);
        *self.told.lock().unwrap() = None;
    }
}

impl Worker {
    pub fn new(rank: u32, expected: &Arc<Expected>, watch: &Arc<Watched>) -> Self {
        let state = State {
            expected: expected.clone(),
            watch: watch.clone(),
            seen: Mutex::default(),
            buckets: AtomicU64::new(0),
            hanging: watch::Sender::new(0),
            finished: AtomicU64::new(0),
            told: Mutex::default(),
        };
        Self { rank, state: Arc::new(state), fault: Fault::None, ahead: 0, ahead_until: 0 }
    }

    pub fn sink(&self) -> TestSink {
        let base = *self.state.watch.enqueued.borrow();
        TestSink {
            endpoint: format!("test://{}", self.rank),
            state: self.state.clone(),
            fault: self.fault.clone(),
            target: base + self.ahead,
            ahead_until: self.ahead_until,
            ring: None,
        }
    }

    /// Every tensor came once, and the post hook ran.
    #[track_caller]
    pub fn assert_complete(&self) {
        let seen = self.state.seen.lock().unwrap();
        let expected = &self.state.expected.0;
        assert_eq!(seen.len(), expected.len(), "rank {}: {:?}", self.rank, seen.keys());
        assert!(seen.values().all(|n| *n == 1), "rank {}: a tensor came twice: {seen:?}", self.rank);
        assert_eq!(self.state.finished.load(Ordering::SeqCst), 1, "rank {}", self.rank);
        assert_eq!(*self.state.told.lock().unwrap(), None, "rank {}", self.rank);
    }

    /// What [`WeightSink::fail`] said.
    pub fn told(&self) -> Option<String> {
        self.state.told.lock().unwrap().clone()
    }
}

pub struct TestSink {
    endpoint: String,
    state: Arc<State>,
    fault: Fault,
    target: u64,
    ahead_until: u32,
    ring: Option<Arc<dyn Buffer>>,
}

impl TestSink {
    async fn go_wrong(&self, at: At, deadline: Instant) -> Result<()> {
        match &self.fault {
            Fault::Raise(when) if *when == at => {
                Err(Error::new(ErrorKind::Backend, "load weights", format!("no parameter at {at:?}")))
            }
            Fault::Hang(when) | Fault::Gone(when) if *when == at => {
                self.state.hanging.send_modify(|n| *n += 1);
                tokio::time::sleep_until(deadline.into()).await;
                Err(Error::new(ErrorKind::Timeout, "wait for the worker", format!("no answer at {at:?}")))
            }
            Fault::Slow(time) if matches!(at, At::Bucket(_)) => {
                tokio::time::sleep(*time).await;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// A panic in a sink would only show as a missing answer.
fn ensure(holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::new(ErrorKind::Corrupt, "check the update", message())) }
}

#[async_trait]
impl WeightSink for TestSink {
    fn endpoint(&self) -> &str {
        &self.endpoint
    }

    async fn open(&mut self, ring: &dyn Ring, deadline: Instant) -> Result<()> {
        self.go_wrong(At::Open, deadline).await?;
        self.ring = Some(ring.buffer());
        Ok(())
    }

    async fn deliver(&mut self, bucket: &BucketMessage, deadline: Instant) -> Result<()> {
        if bucket.bucket < self.ahead_until {
            let mut enqueued = self.state.watch.enqueued.subscribe();
            let wanted = self.target + u64::from(bucket.bucket);
            let ahead = enqueued.wait_for(|n| *n >= wanted);
            let waited = tokio::time::timeout_at(deadline.into(), ahead).await;
            ensure(waited.is_ok(), || {
                format!("bucket {}: later exchanges did not start meanwhile", bucket.bucket)
            })?;
        }
        self.go_wrong(At::Bucket(bucket.bucket), deadline).await?;
        let number = self.state.buckets.fetch_add(1, Ordering::SeqCst);
        ensure(number == u64::from(bucket.bucket), || {
            format!("bucket {} came as number {number}", bucket.bucket)
        })?;
        let ring = self.ring.clone().expect("the ring is open");
        for tensor in &bucket.tensors {
            let (meta, bytes) = &self.state.expected.0[&*tensor.meta.name];
            let name = &meta.name;
            ensure(&tensor.meta == meta, || format!("{:?} instead of {meta:?}", tensor.meta))?;
            let slice = BufferSlice::new(ring.clone(), tensor.offset..tensor.offset + meta.len_bytes())?;
            // SAFETY: nothing writes a bucket's bytes before its ack: what these tests check under the adversary.
            let held = unsafe { slice.as_slice() }?;
            ensure(held == bytes.as_slice(), || format!("{name} of bucket {}: wrong bytes", bucket.bucket))?;
            *self.state.seen.lock().unwrap().entry(name.to_string()).or_default() += 1;
        }
        // A worker takes a while; others run meanwhile.
        tokio::task::yield_now().await;
        Ok(())
    }

    async fn release(&mut self, deadline: Instant) -> Result<()> {
        self.go_wrong(At::Release, deadline).await?;
        self.ring = None;
        Ok(())
    }

    async fn finish(&mut self, deadline: Instant) -> Result<()> {
        let live = self.state.watch.live_rings.load(Ordering::SeqCst);
        ensure(live <= self.state.watch.kept_rings.load(Ordering::SeqCst), || {
            format!("{live} rings live on in the post hook")
        })?;
        self.go_wrong(At::Finish, deadline).await?;
        self.state.finished.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    async fn fail(&mut self, cause: &Error, deadline: Instant) -> Result<Afterwards> {
        if matches!(self.fault, Fault::Gone(_)) {
            tokio::time::sleep_until(deadline.into()).await;
            return Err(Error::new(ErrorKind::Timeout, "tell the worker", "it does not listen"));
        }
        self.ring = None;
        *self.state.told.lock().unwrap() = Some(cause.to_string());
        Ok(Afterwards::LetGo)
    }
}
