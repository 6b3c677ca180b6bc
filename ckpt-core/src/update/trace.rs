//! What happened when: spans of every stage of every bucket, for reports, tests and timelines.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use serde::{Deserialize, Serialize};

use crate::{
    error::Error,
    types::{Epoch, Version},
};

/// A stage of an update on one rank; one lane of a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
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
    /// End, or how far it was seen.
    pub end: Duration,
    /// It came to its end; else a failure cut it short.
    pub complete: bool,
}

/// One attempt of an update on one rank, from the call to the end, however it ended.
#[derive(Clone, Debug)]
pub struct Timeline {
    /// What was to be installed.
    pub checkpoint: String,
    /// The same.
    pub version: Version,
    /// The attempt's number; `None` if not all members came.
    pub epoch: Option<Epoch>,
    /// When it began, by this host's clock, so that ranks can be compared.
    pub began: SystemTime,
    /// How long it took.
    pub took: Duration,
    /// Every span, by start.
    pub spans: Vec<Span>,
    /// Why it failed, and when this rank knew.
    pub failure: Option<(Duration, Error)>,
}

#[derive(Debug, Default)]
struct Recorded {
    /// Each, and whether it is under way.
    spans: Vec<(Span, bool)>,
    failed: Option<Duration>,
}

/// Collects spans; cheap to clone, any thread.
#[derive(Clone, Debug)]
pub struct Trace {
    start: Instant,
    began: SystemTime,
    recorded: Arc<Mutex<Recorded>>,
}

impl Default for Trace {
    fn default() -> Self {
        Self { start: Instant::now(), began: SystemTime::now(), recorded: Arc::default() }
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

    /// The same, by this host's clock.
    pub fn began(&self) -> SystemTime {
        self.began
    }

    /// A stage begins now. It is seen from now on, so that a failure shows what was under way.
    pub fn begin(&self, stage: Stage, bucket: Option<u32>) -> OpenSpan {
        let now = self.now();
        let span = Span { stage, bucket, start: now, end: now, complete: false };
        let mut recorded = self.lock();
        recorded.spans.push((span, true));
        OpenSpan { index: recorded.spans.len() - 1, trace: self.clone() }
    }

    /// The attempt has failed, as far as this rank knows; the first call counts.
    pub fn failed(&self) {
        let now = self.now();
        self.lock().failed.get_or_insert(now);
    }

    /// When [`Self::failed`] was first called.
    pub fn failed_at(&self) -> Option<Duration> {
        self.lock().failed
    }

    /// All spans so far, by start. Those under way end now.
    pub fn spans(&self) -> Vec<Span> {
        let now = self.now();
        let seen = |(span, open): &(Span, bool)| if *open { Span { end: now, ..*span } } else { *span };
        let mut spans: Vec<Span> = self.lock().spans.iter().map(seen).collect();
        spans.sort_by_key(|s| (s.start, s.end));
        spans
    }

    fn lock(&self) -> MutexGuard<'_, Recorded> {
        // A panic elsewhere must not hide what was recorded before it.
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, index: usize, complete: bool) {
        let end = self.now();
        if let Some((span, open)) = self.lock().spans.get_mut(index)
            && *open
        {
            (span.end, span.complete, *open) = (end, complete, false);
        }
    }
}

/// A stage that is under way. Dropped without [`OpenSpan::end`], it was cut short.
#[derive(Debug)]
pub struct OpenSpan {
    trace: Trace,
    index: usize,
}

impl OpenSpan {
    /// The stage is over, and went well.
    pub fn end(self) {
        self.trace.close(self.index, true);
    }
}

impl Drop for OpenSpan {
    fn drop(&mut self) {
        self.trace.close(self.index, false);
    }
}

/// Sum, first start and last end of the spans of `stage`; `None` if there is none.
pub fn extent(spans: &[Span], stage: Stage) -> Option<(Duration, Duration)> {
    let mine = || spans.iter().filter(|s| s.stage == stage);
    Some((mine().map(|s| s.start).min()?, mine().map(|s| s.end).max()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_that_was_cut_short_or_is_under_way_is_seen_as_such() {
        let trace = Trace::default();
        let (whole, cut) = (trace.begin(Stage::Load, Some(0)), trace.begin(Stage::Exchange, Some(1)));
        let under_way = trace.begin(Stage::Reload, Some(2));
        whole.end();
        drop(cut);
        let states = || trace.spans().iter().map(|s| (s.bucket, s.complete)).collect::<Vec<_>>();
        assert_eq!(states(), [(Some(0), true), (Some(1), false), (Some(2), false)]);
        let seen = trace.spans()[2].end;
        while trace.now() == seen {}
        assert!(trace.spans()[2].end > seen, "what is under way grows");
        under_way.end();
        let ended = trace.spans()[2];
        assert!(ended.complete && ended.end == trace.spans()[2].end);
    }

    #[test]
    fn the_first_failure_counts() {
        let trace = Trace::default();
        assert_eq!(trace.failed_at(), None);
        trace.failed();
        let first = trace.failed_at().unwrap();
        while trace.now() == first {}
        trace.failed();
        assert_eq!(trace.failed_at(), Some(first));
    }
}
