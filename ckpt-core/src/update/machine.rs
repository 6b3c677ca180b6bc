//! The update machine: one rank's side of one update, without I/O.
//!
//! Each wait of `docs/ARCHITECTURE.md`'s "life of one bucket" is one method or one condition here, named by a [`Rule`].

mod failure;
mod fingerprint;
#[cfg(test)]
mod tests;
mod timers;

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};

pub(crate) use self::timers::close_after;
use super::{Action, Event, Outcome, Rule};
use crate::{
    deadlines::Deadlines,
    error::{Error, ErrorKind, Key},
    types::{Epoch, Rank},
};

const OPERATION: &str = "update";

/// What a machine must know before it starts.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// This rank.
    pub rank: Rank,
    /// A worker is fed by this rank.
    pub has_worker: bool,
    /// This rank sends its engine's request.
    pub starts_engine: bool,
    /// The time limits.
    pub deadlines: Deadlines,
    /// Now, on the machine's clock: a `Duration` since any fixed instant. `Join` is sent at or after it.
    pub start: Duration,
    /// Tests only: leave this rule out.
    #[doc(hidden)]
    pub skip: Option<Rule>,
}

impl MachineConfig {
    /// A rank with a worker and without an engine.
    pub fn new(rank: Rank, deadlines: Deadlines, start: Duration) -> Self {
        Self { rank, has_worker: true, starts_engine: false, deadlines, start, skip: None }
    }
}

/// Where the update stands on this rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Stage {
    /// Until Begun.
    Joining,
    /// Until Prepared.
    Preparing,
    /// Until Go.
    Ready,
    /// Bytes move.
    Moving,
    /// All acked; the decision is the hub's.
    Loaded,
    /// Committed; the worker drops the ring.
    Releasing,
    /// The worker's post hook runs.
    PostHook,
    /// A failure after the commit: the worker is made to raise.
    Settling,
    /// The engine's request is still open.
    Engine,
    /// Until Closed.
    Finished,
    /// Not committed and never will be here: until this rank is cleaned up and the hub has answered.
    Failing,
    /// `End` is queued or was returned.
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Sink {
    Closed,
    Opening,
    Open,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum EngineState {
    /// Not this rank's, or not started.
    Idle,
    Running,
    Done,
}

/// One rank's side of one update.
#[derive(Clone, Debug)]
pub struct UpdateMachine {
    config: MachineConfig,
    stage: Stage,
    /// When the stage began.
    since: Duration,
    /// When Begun came; `start` before that.
    begun: Duration,
    committed: Option<Duration>,
    epoch: Option<Epoch>,
    /// Actions that wait for nothing.
    queue: VecDeque<Action>,
    waits_for: Vec<Option<u32>>,
    /// Buckets whose exchange was enqueued; also the number of the next one.
    written: u32,
    /// When each was enqueued.
    written_at: Vec<Duration>,
    /// Buckets that this rank brings bytes to and whose load was not asked for, ascending.
    unloaded: BTreeSet<u32>,
    /// Releases that the last search for an early load knew of: nothing new, nothing to find.
    searched: Option<u32>,
    exchanged: Vec<bool>,
    exchanged_count: u32,
    last_exchanged: Duration,
    /// Buckets handed to the worker, and when the last was.
    published: u32,
    published_at: Duration,
    acked: u32,
    freed: u32,
    sink: Sink,
    engine: EngineState,
    all_opened: Option<Duration>,
    /// When the last answered heartbeat was sent.
    lease: Duration,
    /// The lease is over while the decision is out: until then the decision may still be read.
    doubt_at: Option<Duration>,
    /// What failed here first (before the commit: what the update fails with, unless the hub knows better).
    failure: Option<Error>,
    /// SendFailed was queued.
    reported: Option<Duration>,
    /// AbortLocal was queued.
    aborted: bool,
    abort_done: bool,
    /// The hub knows that this attempt is over, or is gone.
    hub_settled: bool,
    hub_gone: Option<Error>,
    /// What Closed said; it comes early where the hub gave up waiting for this rank.
    closed: Option<Option<Error>>,
    in_doubt: bool,
}

impl UpdateMachine {
    /// A machine that waits for [`Event::Begun`]. The driver sends `Join` itself.
    pub fn new(config: MachineConfig) -> Self {
        let start = config.start;
        Self {
            config,
            stage: Stage::Joining,
            since: start,
            begun: start,
            committed: None,
            epoch: None,
            queue: VecDeque::new(),
            waits_for: Vec::new(),
            written: 0,
            written_at: Vec::new(),
            unloaded: BTreeSet::new(),
            searched: None,
            exchanged: Vec::new(),
            exchanged_count: 0,
            last_exchanged: start,
            published: 0,
            published_at: start,
            acked: 0,
            freed: 0,
            sink: Sink::Closed,
            engine: EngineState::Idle,
            all_opened: None,
            lease: start,
            doubt_at: None,
            failure: None,
            reported: None,
            aborted: false,
            abort_done: false,
            hub_settled: false,
            hub_gone: None,
            closed: None,
            in_doubt: false,
        }
    }

    /// What to do next. Handles timeouts first, so that a process that was stopped finds its lease over before it
    /// publishes anything. Call until `None` after every event and timeout.
    pub fn poll_action(&mut self, now: Duration) -> Option<Action> {
        if self.keeps(Rule::TimeoutsFirst) {
            self.handle_timeout(now);
        }
        if let Some(action) = self.queue.pop_front() {
            return Some(action);
        }
        if self.moves() { self.next_move(now) } else { None }
    }

    /// Tells the machine what happened. Stale and foreign events change nothing.
    pub fn handle_event(&mut self, event: Event, now: Duration) {
        match event {
            Event::Begun { epoch, members, communicator } => {
                if self.stage == Stage::Joining {
                    self.epoch = Some(epoch);
                    self.begun = now;
                    self.queue.push_back(Action::Prepare { epoch, members, communicator });
                    self.enter(Stage::Preparing, now);
                } else if self.stage == Stage::Failing && self.epoch.is_none() {
                    // It crossed our Failed; the abort that follows names this epoch.
                    self.epoch = Some(epoch);
                }
            }
            Event::Prepared { plan_digest, waits_for, loads } => {
                self.prepared(plan_digest, waits_for, loads, now);
            }
            Event::Go { epoch } if self.is_ours(epoch) && self.stage == Stage::Ready => self.go(epoch, now),
            Event::SinkOpened => self.sink_opened(now),
            Event::AllOpened { epoch } if self.is_ours(epoch) && self.stage == Stage::Moving => {
                self.all_opened.get_or_insert(now);
            }
            Event::Exchanged { bucket } => self.bucket_exchanged(bucket, now),
            Event::Acked { bucket } => self.bucket_acked(bucket, now),
            Event::Committed { epoch } if self.is_ours(epoch) => self.decided(now),
            Event::Released if self.stage == Stage::Releasing => {
                if self.keeps(Rule::HookAfterRelease) {
                    self.queue.push_back(Action::RunPostHook);
                }
                self.enter(Stage::PostHook, now);
            }
            Event::PostHookDone if self.stage == Stage::PostHook => self.await_engine(now),
            Event::EngineDone => self.engine_done(now),
            Event::Closed { epoch, failure } if self.is_ours(epoch) && self.committed.is_some() => {
                self.closed = Some(failure);
                if self.stage == Stage::Finished {
                    self.end_committed(None, now);
                }
            }
            Event::Failed { cause } => self.fail(cause, now),
            Event::HubAborted { epoch, cause } => self.hub_aborted(epoch, cause, now),
            Event::HubLost { cause } => self.hub_lost(cause, now),
            Event::LeaseRenewed { asked } => {
                // An answer that lay in a socket while this process was stopped carries its old time and renews nothing.
                self.lease = self.lease.max(asked.min(now));
                if now < self.lease_end() {
                    self.doubt_at = None;
                }
            }
            Event::AbortDone if self.aborted => {
                self.abort_done = true;
                match self.stage {
                    Stage::Failing => self.maybe_end(now),
                    Stage::Settling => self.finish(now),
                    _ => {}
                }
            }
            Event::Go { .. }
            | Event::AllOpened { .. }
            | Event::Committed { .. }
            | Event::Closed { .. }
            | Event::Released
            | Event::PostHookDone
            | Event::AbortDone => {}
        }
    }

    /// [`Action::End`] was returned or is the last action queued.
    pub fn is_ended(&self) -> bool {
        self.stage == Stage::Ended
    }

    /// The attempt, once begun.
    pub fn epoch(&self) -> Option<Epoch> {
        self.epoch
    }

    /// The lease at the hub is valid at `now`: a driver may look once more right before it hands out a bucket.
    pub fn lease_is_valid(&self, now: Duration) -> bool {
        now < self.lease_end()
    }

    fn keeps(&self, rule: Rule) -> bool {
        self.config.skip != Some(rule)
    }

    fn is_ours(&self, epoch: Epoch) -> bool {
        self.epoch == Some(epoch) || !self.keeps(Rule::ForeignEpoch)
    }

    fn enter(&mut self, stage: Stage, now: Duration) {
        self.stage = stage;
        self.since = now;
    }

    fn bucket_count(&self) -> u32 {
        // `prepared` refuses plans whose count does not fit.
        self.waits_for.len() as u32
    }

    fn error(&self, kind: ErrorKind, message: impl Into<String>) -> Error {
        Error::new(kind, OPERATION, message).with(Key::Rank, self.config.rank)
    }

    // ---- before bytes move ----

    fn prepared(&mut self, plan_digest: u64, waits_for: Vec<Option<u32>>, loads: Vec<u32>, now: Duration) {
        let Some(epoch) = self.epoch else { return };
        if self.stage != Stage::Preparing {
            return;
        }
        let in_order = waits_for
            .iter()
            .enumerate()
            .all(|(b, w)| w.is_none_or(|w| usize::try_from(w).is_ok_and(|w| w < b)));
        if !in_order || u32::try_from(waits_for.len()).is_err() {
            let cause = self.error(ErrorKind::Internal, "the plan has a bucket that waits for a later one");
            return self.fail(cause, now);
        }
        self.exchanged = vec![false; waits_for.len()];
        // A bucket that the plan does not have is never written, so naming it does no harm.
        self.unloaded = loads.into_iter().collect();
        self.waits_for = waits_for;
        self.queue.push_back(Action::SendReady { epoch, plan_digest });
        self.enter(Stage::Ready, now);
    }

    fn go(&mut self, epoch: Epoch, now: Duration) {
        self.last_exchanged = now;
        if self.config.starts_engine {
            self.engine = EngineState::Running;
            self.queue.push_back(Action::StartEngine);
        }
        if self.config.has_worker {
            self.sink = Sink::Opening;
            self.queue.push_back(Action::OpenSink);
        } else {
            self.sink = Sink::Open;
            self.queue.push_back(Action::SendOpened { epoch });
        }
        self.enter(Stage::Moving, now);
    }

    fn sink_opened(&mut self, now: Duration) {
        if let (Stage::Moving, Sink::Opening, Some(epoch)) = (self.stage, self.sink, self.epoch) {
            self.sink = Sink::Open;
            self.published_at = now;
            self.queue.push_back(Action::SendOpened { epoch });
        }
    }

    // ---- the life of a bucket ----

    /// Buckets may be moved. The epoch is healthy exactly as long as no failure was taken up.
    fn moves(&self) -> bool {
        match self.stage {
            Stage::Moving => true,
            Stage::Ready => !self.keeps(Rule::MoveAfterGo),
            Stage::Failing => !self.keeps(Rule::PublishHealthy),
            _ => false,
        }
    }

    fn next_move(&mut self, now: Duration) -> Option<Action> {
        if self.may_free(self.freed) {
            self.freed += 1;
            return Some(Action::Free { bucket: self.freed - 1 });
        }
        if self.may_publish(self.published) {
            self.published += 1;
            self.published_at = now;
            return Some(Action::Publish { bucket: self.published - 1 });
        }
        if self.stage == Stage::Failing {
            return None;
        }
        if self.may_write(self.written) {
            if self.unloaded.remove(&self.written) {
                return Some(Action::Load { bucket: self.written });
            }
            self.written += 1;
            self.written_at.push(now);
            return Some(Action::Exchange { bucket: self.written - 1 });
        }
        if let Some(bucket) = self.early_load() {
            self.unloaded.remove(&bucket);
            return Some(Action::Load { bucket });
        }
        self.all_loaded(now)
    }

    /// Exchanges keep the plan's order, loads need not: while the next bucket waits for its place, a later one whose place
    /// is free already can be on its way. So a large tensor comes in while small ones pass through the rest of the ring.
    fn early_load(&mut self) -> Option<u32> {
        let released = if self.config.has_worker { self.acked } else { self.exchanged_count };
        if self.searched == Some(released) {
            return None;
        }
        let found = self.unloaded.iter().copied().find(|b| self.may_write(*b));
        if found.is_none() {
            self.searched = Some(released);
        }
        found
    }

    /// The local reader of `bucket` is through: the worker, or on a rank without one the exchange itself.
    fn is_released(&self, bucket: u32, worker: Rule, no_worker: Rule) -> bool {
        if self.config.has_worker {
            self.acked > bucket || !self.keeps(worker)
        } else {
            self.exchanged[bucket as usize] || !self.keeps(no_worker)
        }
    }

    fn may_write(&self, bucket: u32) -> bool {
        bucket < self.bucket_count()
            && self.waits_for[bucket as usize]
                .is_none_or(|w| self.is_released(w, Rule::WriteAfterAck, Rule::WriteAfterExchange))
    }

    fn may_publish(&self, bucket: u32) -> bool {
        self.config.has_worker
            && bucket < self.bucket_count()
            && bucket < self.written
            && (self.exchanged[bucket as usize] || !self.keeps(Rule::PublishAfterExchange))
            && (self.acked == bucket || !self.keeps(Rule::PublishAfterAck))
            && (self.all_opened.is_some() || !self.keeps(Rule::PublishAfterAllOpened))
    }

    fn may_free(&self, bucket: u32) -> bool {
        bucket < self.written
            && (self.exchanged[bucket as usize])
            && self.is_released(bucket, Rule::FreeAfterAck, Rule::FreeAfterAck)
    }

    fn all_loaded(&mut self, now: Duration) -> Option<Action> {
        let delivered = if self.config.has_worker && !self.keeps(Rule::LoadedAfterAcks) {
            self.published
        } else {
            self.freed
        };
        let epoch = self.epoch?;
        if self.stage != Stage::Moving || self.sink != Sink::Open || delivered < self.bucket_count() {
            return None;
        }
        self.enter(Stage::Loaded, now);
        if !self.keeps(Rule::ReleaseAfterCommit) {
            self.queue.push_back(Action::ReleaseSink);
        }
        Some(Action::SendLoaded { epoch })
    }

    fn bucket_exchanged(&mut self, bucket: u32, now: Duration) {
        if !self.moves() {
            return;
        }
        if bucket >= self.written || self.exchanged[bucket as usize] {
            let cause = self.error(ErrorKind::Internal, "a bucket was exchanged that was not enqueued");
            return self.fail(cause.with(Key::Bucket, bucket), now);
        }
        self.exchanged[bucket as usize] = true;
        self.exchanged_count += 1;
        self.last_exchanged = now;
    }

    fn bucket_acked(&mut self, bucket: u32, now: Duration) {
        if !self.moves() {
            return;
        }
        if bucket != self.acked || bucket >= self.published {
            let cause =
                self.error(ErrorKind::Corrupt, "the worker acknowledged a bucket that it was not given");
            return self.fail(cause.with(Key::Bucket, bucket), now);
        }
        self.acked += 1;
    }

    // ---- the decision and what follows it ----

    fn decided(&mut self, now: Duration) {
        let early = self.stage < Stage::Loaded && !self.keeps(Rule::ForeignEpoch);
        if self.stage != Stage::Loaded && !early {
            return;
        }
        self.committed = Some(now);
        self.doubt_at = None;
        if let Some(cause) = self.failure.clone() {
            // It failed here while the decision was on its way: the decision stands.
            return self.settle(cause, now);
        }
        if !self.config.has_worker {
            return self.await_engine(now);
        }
        if self.keeps(Rule::ReleaseAfterCommit) {
            self.queue.push_back(Action::ReleaseSink);
        }
        if !self.keeps(Rule::HookAfterRelease) {
            self.queue.push_back(Action::RunPostHook);
        }
        self.enter(Stage::Releasing, now);
        if !self.keeps(Rule::FinishAfterHook) {
            self.await_engine(now);
        }
    }

    fn engine_done(&mut self, now: Duration) {
        if self.engine != EngineState::Running {
            return;
        }
        self.engine = EngineState::Done;
        // An engine ends when its last worker has run its post hook, so never before ours was told to.
        let due = if self.config.has_worker { Stage::PostHook } else { Stage::Loaded };
        if self.stage == Stage::Engine {
            self.finish(now);
        } else if self.stage < due && self.keeps(Rule::EngineEarly) {
            let cause = self.error(
                ErrorKind::Corrupt,
                "the engine answered its update request before its worker had all weights; look at the engine's log, \
                 and check that the request runs the worker's update",
            );
            self.fail(cause, now);
        }
    }

    fn await_engine(&mut self, now: Duration) {
        self.enter(Stage::Engine, now);
        if self.engine != EngineState::Running || !self.keeps(Rule::FinishAfterEngine) {
            self.finish(now);
        }
    }

    /// A failure after the commit that leaves the worker in the middle: make it raise, then finish.
    fn settle(&mut self, cause: Error, now: Duration) {
        self.enter(Stage::Settling, now);
        self.abort_local(cause);
    }

    fn finish(&mut self, now: Duration) {
        let Some(epoch) = self.epoch else { return };
        if self.hub_gone.is_none() {
            self.queue.push_back(Action::SendFinished { epoch, failure: self.failure.clone() });
        }
        self.enter(Stage::Finished, now);
        if self.hub_gone.is_some() || self.closed.is_some() || !self.keeps(Rule::EndAfterClosed) {
            let gone = self.hub_gone.take();
            self.end_committed(gone, now);
        }
    }

    /// The hub's word on the first failure of all ranks wins over this rank's own.
    fn end_committed(&mut self, otherwise: Option<Error>, now: Duration) {
        let failure = self.closed.take().flatten().or(self.failure.take()).or(otherwise);
        self.end(Outcome::Committed { failure }, now);
    }
}
