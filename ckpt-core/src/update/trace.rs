//! What happened when: spans of every stage of every bucket, for reports, tests and timelines.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde::Serialize;

/// A stage of an update on one rank; one lane of a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Join called until Begin heard.
    Join,
    /// Plan, ring, communicator.
    Prepare,
    /// Ready told until Go heard.
    Go,
    /// The worker maps the ring.
    Open,
    /// The bucket's own segments go into the ring, from enqueued to done.
    Load,
    /// In a P2P update: the bucket's segments come from their owners' memory, from asked for to done.
    Pull,
    /// What was pulled is compared with its owner's digests.
    Check,
    /// The bucket's group of broadcasts, from enqueued to done.
    Exchange,
    /// The bucket is with the worker.
    Reload,
    /// Loaded told until Committed heard.
    Commit,
    /// The worker drops the ring.
    Release,
    /// The worker's post hook.
    PostHook,
    /// The engine gets ready and is paused.
    Pause,
    /// The engine's request.
    Engine,
    /// After a failure: abort and telling the worker.
    Abort,
}

/// One stage of one bucket (or of the whole update), relative to the update's start.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Span {
    /// Which stage.
    pub stage: Stage,
    /// Which bucket, if it belongs to one.
    pub bucket: Option<u32>,
    /// Start.
    pub start: Duration,
    /// End.
    pub end: Duration,
}

/// Collects spans; cheap to clone, any thread.
#[derive(Clone, Debug)]
pub struct Trace {
    start: Instant,
    spans: Arc<Mutex<Vec<Span>>>,
}

impl Default for Trace {
    fn default() -> Self {
        Self { start: Instant::now(), spans: Arc::default() }
    }
}

impl Trace {
    /// Time since the update's start.
    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// When the update started.
    pub fn start(&self) -> Instant {
        self.start
    }

    /// Adds a span that ends now.
    pub fn end(&self, stage: Stage, bucket: Option<u32>, start: Duration) {
        let span = Span { stage, bucket, start, end: self.now() };
        // A panic elsewhere must not hide what was recorded before it.
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).push(span);
    }

    /// All spans so far, by start.
    pub fn spans(&self) -> Vec<Span> {
        let mut spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone();
        spans.sort_by_key(|s| (s.start, s.end));
        spans
    }
}

/// Sum, first start and last end of the spans of `stage`; `None` if there is none.
pub fn extent(spans: &[Span], stage: Stage) -> Option<(Duration, Duration)> {
    let mine = || spans.iter().filter(|s| s.stage == stage);
    Some((mine().map(|s| s.start).min()?, mine().map(|s| s.end).max()?))
}
