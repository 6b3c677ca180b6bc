//! The driver: performs what the update machine asks for, through the seams, and tells it what came of it.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    Action, Event, MachineConfig, Outcome, UpdateMachine,
    device_lane::{DeviceLane, DeviceWork},
    engine_lane::{EngineLane, Verdict},
    kept::KeptRing,
    pull::{Pull, Puller},
    trace::{OpenSpan, Stage, Trace},
    worker_lane::{Call, WorkerLane},
};
use crate::{
    control::{CommunicatorChoice, Member, Session, SessionEvent, ToHub, ToRank, Updates},
    deadlines::Deadlines,
    device::{Buffer, DeviceBackend, Ring},
    engine::{Engine, EngineRequest, PauseMode},
    error::{Error, ErrorKind, Key, Recovery, Result},
    manifest::Manifest,
    plan::{self, Method, PlanInput, PlanLimits, UpdatePlan},
    sink::WeightSink,
    transport::{Communicator, GroupSpec, Transport},
    types::{Epoch, Rank, Version},
};

/// The machine's clock at the update's start. Not zero, so that a lease from before the start has a time too.
const CLOCK_START: Duration = Duration::from_secs(1 << 20);

/// A plan without bytes still hands a ring to the worker.
const SMALLEST_RING: u64 = 4096;

/// A communicator that outlives an update.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) epoch: Epoch,
    pub(crate) members: Vec<Rank>,
    pub(crate) communicator: Communicator,
}

/// An engine that this rank tells, and the ranks whose workers it has.
#[derive(Clone)]
pub struct EngineCall {
    /// The engine.
    pub engine: Arc<dyn Engine>,
    /// Its ranks.
    pub ranks: Vec<Rank>,
}

/// Everything that one attempt works with.
pub(crate) struct Attempt {
    pub(crate) rank: Rank,
    pub(crate) version: Version,
    pub(crate) device: Arc<dyn DeviceBackend>,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) deadlines: Deadlines,
    pub(crate) limits: PlanLimits,
    pub(crate) manifest: Arc<Manifest>,
    pub(crate) arenas: Vec<Arc<dyn Buffer>>,
    /// Set in a P2P update.
    pub(crate) pull: Option<Pull>,
    pub(crate) sink: Option<Box<dyn WeightSink>>,
    pub(crate) engine: Option<EngineCall>,
    /// How the engine is paused; `None`: it is not.
    pub(crate) pause: Option<PauseMode>,
    /// After a failure in the middle the engine serves again, whatever its weights are.
    pub(crate) leave: bool,
    pub(crate) group: Option<Group>,
    /// Keep the ring for the next update.
    pub(crate) keep_ring: bool,
    /// The last update's.
    pub(crate) kept_ring: Option<Arc<KeptRing>>,
    /// Rings of failed updates that a worker may still have mapped.
    pub(crate) quarantine: Vec<Arc<dyn Ring>>,
    pub(crate) trace: Trace,
}

/// What is left of an attempt.
pub(crate) struct Ended {
    pub(crate) outcome: Outcome,
    pub(crate) epoch: Option<Epoch>,
    pub(crate) plan: Option<Arc<UpdatePlan>>,
    /// For the next update, if all went well.
    pub(crate) group: Option<Group>,
    /// The same.
    pub(crate) kept_ring: Option<Arc<KeptRing>>,
    /// Rings that a worker may still have mapped.
    pub(crate) quarantine: Vec<Arc<dyn Ring>>,
    /// This rank's worker was given a bucket.
    pub(crate) touched: bool,
    /// Some rank's worker may have been given one. The same on all members that still hear the hub.
    pub(crate) may_be_mixed: bool,
    /// After the commit: this rank's worker and engine are through.
    pub(crate) finished: bool,
}

/// Tells the hub of an update whose caller went away in the middle: nobody else would, and all others would wait.
struct Cancelled {
    session: Session,
    rank: Rank,
    epoch: Option<Epoch>,
    over: bool,
}

impl Drop for Cancelled {
    fn drop(&mut self) {
        if !self.over {
            let cause = Error::new(
                ErrorKind::Aborted,
                "update weights",
                "the caller cancelled its call in the middle of the update",
            );
            let cause = cause.with(Key::Rank, self.rank);
            // A hub that is gone needs no telling.
            let _ = self.session.send(&ToHub::Failed { epoch: self.epoch, cause });
        }
    }
}

struct Prepared {
    plan: Arc<UpdatePlan>,
    ring: Arc<dyn Ring>,
    kept_ring: Option<Arc<KeptRing>>,
    /// On a rank that pulls.
    puller: Option<Puller>,
    group: Option<Group>,
}

/// Runs one attempt to its end; `updates` must have been subscribed before `Join` was sent.
pub(crate) async fn drive(mut attempt: Attempt, session: Session, mut updates: Updates) -> Ended {
    let mut config = MachineConfig::new(attempt.rank, attempt.deadlines, CLOCK_START);
    config.has_worker = attempt.sink.is_some();
    config.starts_engine = attempt.engine.is_some();
    let (events, inbox) = mpsc::unbounded_channel();
    let worker = attempt
        .sink
        .take()
        .map(|sink| WorkerLane::spawn(sink, attempt.deadlines, attempt.trace.clone(), events.clone()));
    let driver = Driver {
        machine: UpdateMachine::new(config),
        events,
        worker,
        device_lane: None,
        prepare: None,
        engine_lane: None,
        touched: false,
        all_opened: false,
        finished: false,
        members: Vec::new(),
        epoch: None,
        plan: None,
        ring: None,
        group_head: None,
        aborted: false,
        cancelled: Cancelled { session: session.clone(), rank: attempt.rank, epoch: None, over: false },
        session,
        attempt,
    };
    // On the heap: callers nest this future in theirs, and threads of tests and of Python have small stacks.
    Box::pin(driver.run(inbox, &mut updates)).await
}

struct Driver {
    /// The first field, so dropped first: the hub hears the cause before the others see its consequences.
    cancelled: Cancelled,
    machine: UpdateMachine,
    events: mpsc::UnboundedSender<Event>,
    worker: Option<WorkerLane>,
    device_lane: Option<DeviceLane>,
    prepare: Option<JoinHandle<Result<Prepared>>>,
    engine_lane: Option<EngineLane>,
    touched: bool,
    all_opened: bool,
    finished: bool,
    members: Vec<Member>,
    epoch: Option<Epoch>,
    plan: Option<Arc<UpdatePlan>>,
    ring: Option<Arc<dyn Ring>>,
    /// Epoch and members of the communicator in the device lane.
    group_head: Option<(Epoch, Vec<Rank>)>,
    aborted: bool,
    session: Session,
    attempt: Attempt,
}

impl Driver {
    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Event>, updates: &mut Updates) -> Ended {
        let mut stage = Some(self.attempt.trace.begin(Stage::Join, None));
        let first_lease = lease(&self.attempt.trace, self.session.lease());
        self.machine.handle_event(first_lease, self.clock());
        let outcome = loop {
            // Timeouts come before actions: a process that was stopped must not publish when it wakes.
            let now = self.clock();
            if self.machine.poll_timeout().is_some_and(|at| at <= now) {
                self.machine.handle_timeout(now);
            }
            if let Some(action) = self.machine.poll_action(now) {
                if let Action::End(outcome) = action {
                    break outcome;
                }
                if let Err(cause) = self.perform(action, &mut stage).await {
                    self.machine.handle_event(Event::Failed { cause }, self.clock());
                }
                continue;
            }
            let event = tokio::select! {
                biased;
                event = updates.next() => self.heard(event, &mut stage),
                prepared = joined(&mut self.prepare) => Some(self.prepared(prepared)),
                event = inbox.recv() => event,
                () = sleep_until(self.machine.poll_timeout().map(|at| self.attempt.trace.start() + at.saturating_sub(CLOCK_START))) => None,
            };
            if let Some(event) = event {
                self.machine.handle_event(event, self.clock());
            }
        };
        self.end(outcome).await
    }

    fn heard(&mut self, event: SessionEvent, stage: &mut Option<OpenSpan>) -> Option<Event> {
        let trace = &self.attempt.trace;
        let message = match event {
            SessionEvent::Message(message) => message,
            SessionEvent::LeaseRenewed { sent_at } => {
                return Some(lease(trace, sent_at));
            }
            SessionEvent::HubLost { cause } => return Some(Event::HubLost { cause }),
        };
        match message {
            ToRank::Begin { epoch, members, communicator } => {
                over(stage);
                self.epoch = Some(epoch);
                self.cancelled.epoch = Some(epoch);
                self.members = members.clone();
                Some(Event::Begun { epoch, members, communicator })
            }
            ToRank::Go { epoch } => {
                over(stage);
                Some(Event::Go { epoch })
            }
            ToRank::Committed { epoch } => {
                over(stage);
                Some(Event::Committed { epoch })
            }
            ToRank::Closed { epoch, failure } => Some(Event::Closed { epoch, failure }),
            ToRank::Abort { epoch, cause } => Some(Event::HubAborted { epoch, cause }),
            ToRank::AllOpened { epoch } => {
                self.all_opened |= self.epoch == Some(epoch);
                Some(Event::AllOpened { epoch })
            }
            // Welcome, refusals and gathers are the session's own business.
            _ => None,
        }
    }

    async fn perform(&mut self, action: Action, stage: &mut Option<OpenSpan>) -> Result<()> {
        match action {
            Action::Prepare { epoch, members, communicator } => self.prepare(epoch, &members, communicator),
            Action::SendReady { epoch, plan_digest } => {
                *stage = Some(self.attempt.trace.begin(Stage::Go, None));
                self.session.send(&ToHub::Ready { epoch, plan_digest })?;
            }
            Action::StartEngine => self.start_engine()?,
            Action::OpenSink => {
                let (Some(worker), Some(ring), Some(plan)) = (&self.worker, &self.ring, &self.plan) else {
                    return Err(out_of_order("open the worker link"));
                };
                worker.call(Call::Open {
                    ring: ring.clone(),
                    plan: plan.clone(),
                    manifest: self.attempt.manifest.clone(),
                });
            }
            Action::SendOpened { epoch } => {
                if self.worker.is_some() {
                    // The worker is in this update, so it has left the failed one behind.
                    self.attempt.quarantine.clear();
                }
                self.session.send(&ToHub::Opened { epoch })?;
            }
            Action::Load { bucket } => self.device_lane()?.load(bucket)?,
            Action::Exchange { bucket } => self.device_lane()?.exchange(bucket),
            Action::Publish { bucket } => {
                self.touched = true;
                self.worker()?.call(Call::Deliver { bucket });
            }
            Action::Free { bucket } => {
                if let (Some(ring), Some(plan)) = (&self.ring, &self.plan) {
                    let bucket = &plan.buckets[bucket as usize];
                    ring.freed(bucket.ring_offset..bucket.ring_offset + bucket.len_bytes);
                }
            }
            Action::SendLoaded { epoch } => {
                *stage = Some(self.attempt.trace.begin(Stage::Commit, None));
                self.covered()?;
                self.session.send(&ToHub::Loaded { epoch })?;
            }
            Action::ReleaseSink => self.worker()?.call(Call::Release),
            Action::RunPostHook => {
                // The worker has dropped its mapping; with the lane's end the memory is free for its post-processing.
                self.end_device_lane().await;
                self.ring = None;
                self.worker()?.call(Call::Finish);
            }
            Action::SendFinished { epoch, failure } => {
                self.finished = failure.is_none();
                let failure = failure.map(|f| f.flattened());
                self.session.send(&ToHub::Finished { epoch, failure })?;
            }
            Action::SendFailed { epoch, cause } => {
                // A hub that is gone needs no telling.
                let _ = self.session.send(&ToHub::Failed { epoch, cause: cause.flattened() });
            }
            Action::AbortLocal { cause } => self.abort_local(cause),
            Action::End(_) => {}
        }
        Ok(())
    }

    /// The gate before the word that leads to the commit: the worker has taken every tensor, each once.
    fn covered(&self) -> Result<()> {
        let (Some(worker), Some(plan)) = (&self.worker, &self.plan) else { return Ok(()) };
        let (taken, all) = (worker.taken(), plan.tensor_count());
        if taken == all {
            return Ok(());
        }
        let text = format!("the worker took {taken} of {all} tensors; the update is not committed");
        Err(Error::new(ErrorKind::Corrupt, "update weights", text).with(Key::Rank, self.attempt.rank))
    }

    fn prepare(&mut self, epoch: Epoch, members: &[Member], choice: CommunicatorChoice) {
        let device = self.attempt.device.clone();
        let transport = self.attempt.transport.clone();
        let limits = self.attempt.limits.clone();
        let manifest = self.attempt.manifest.clone();
        let group = self.attempt.group.take();
        let (keep_ring, kept_ring) = (self.attempt.keep_ring, self.attempt.kept_ring.take());
        let rank = self.attempt.rank;
        let pull = self.attempt.pull.clone();
        let method = match &pull {
            Some(pull) => Method::P2p { receivers: pull.receivers(members) },
            None => Method::Broadcast,
        };
        let ranks: Vec<Rank> = members.iter().map(|m| m.rank).collect();
        let free_bytes = members.iter().map(|m| m.free_bytes).min().unwrap_or(0);
        let deadline = Instant::now() + self.attempt.deadlines.ready;
        let trace = self.attempt.trace.clone();
        self.prepare = Some(tokio::spawn(async move {
            let preparing = trace.begin(Stage::Prepare, None);
            let (plan_ranks, planned) = (ranks.clone(), trace.clone());
            let plan_and_ring = tokio::task::spawn_blocking(move || -> Result<_> {
                let plan = plan::plan(&PlanInput {
                    manifest: &manifest,
                    members: &plan_ranks,
                    free_bytes,
                    limits,
                    method,
                })?;
                let ring_bytes = plan.ring_bytes.max(SMALLEST_RING);
                let (ring, kept_ring): (Arc<dyn Ring>, _) = if keep_ring {
                    let kept = KeptRing::take(kept_ring, &*device, ring_bytes)?;
                    (kept.clone(), Some(kept))
                } else {
                    drop(kept_ring);
                    (device.allocate_ring(ring_bytes)?, None)
                };
                plan::check_coverage(&plan, &manifest).map_err(|violation| {
                    Error::new(ErrorKind::Internal, "plan an update", violation.to_string())
                })?;
                let puller =
                    pull.map(|pull| pull.puller(&plan, rank, &*ring, &planned)).transpose()?.flatten();
                Ok((Arc::new(plan), ring, kept_ring, puller))
            });
            let group = connect(&*transport, rank, ranks, epoch, choice, group, deadline);
            let (plan_and_ring, group) = tokio::join!(plan_and_ring, group);
            let (plan, ring, kept_ring, puller) = plan_and_ring.map_err(|e| {
                Error::new(ErrorKind::Internal, "plan an update", "the planner panicked").caused_by(e)
            })??;
            let group = group?;
            preparing.end();
            Ok(Prepared { plan, ring, kept_ring, puller, group })
        }));
    }

    fn prepared(&mut self, prepared: Result<Prepared>) -> Event {
        match prepared.and_then(|prepared| self.start_device_lane(prepared)) {
            Ok(event) => event,
            Err(cause) => Event::Failed { cause: cause.with(Key::Rank, self.attempt.rank) },
        }
    }

    fn start_device_lane(&mut self, prepared: Prepared) -> Result<Event> {
        let Prepared { plan, ring, kept_ring, puller, group } = prepared;
        self.attempt.kept_ring = kept_ring;
        self.group_head = group.as_ref().map(|g| (g.epoch, g.members.clone()));
        let work = DeviceWork {
            rank: self.attempt.rank,
            plan: plan.clone(),
            ring: ring.clone(),
            arenas: self.attempt.arenas.clone(),
            puller: puller.map(Arc::new),
            communicator: group.map(|g| g.communicator),
            bucket_deadline: self.attempt.deadlines.bucket,
            exchange_deadline: self.attempt.deadlines.total,
        };
        let lane =
            DeviceLane::spawn(&*self.attempt.device, work, self.attempt.trace.clone(), self.events.clone())?;
        if self.aborted {
            // The abort came while the communicator was being built.
            lane.abort(Error::new(ErrorKind::Aborted, "update weights", "the update had been aborted"));
        }
        self.device_lane = Some(lane);
        self.ring = Some(ring);
        self.plan = Some(plan.clone());
        Ok(Event::Prepared {
            plan_digest: plan.digest,
            waits_for: plan.buckets.iter().map(|b| b.waits_for).collect(),
            loads: plan.loads(self.attempt.rank),
        })
    }

    fn start_engine(&mut self) -> Result<()> {
        let Some(call) = self.attempt.engine.clone() else { return Err(out_of_order("tell the engine")) };
        let endpoints: BTreeMap<String, String> = self
            .members
            .iter()
            .filter(|m| call.ranks.contains(&m.rank))
            .filter_map(|m| Some((m.device_uuid.clone(), m.endpoint.clone()?)))
            .collect();
        let request = EngineRequest { endpoints, version: self.attempt.version };
        let Attempt { pause, deadlines, rank, trace, .. } = &self.attempt;
        let events = self.events.clone();
        self.engine_lane =
            Some(EngineLane::spawn(call, request, *pause, *deadlines, *rank, trace.clone(), events));
        Ok(())
    }

    /// Poison first, abort then, tell the worker last: nothing is published from a poisoned epoch.
    fn abort_local(&mut self, cause: Error) {
        self.aborted = true;
        self.attempt.trace.failed();
        if let Some(prepare) = &self.prepare {
            prepare.abort();
        }
        if let Some(lane) = &self.device_lane {
            lane.abort(cause.clone());
        }
        match &self.worker {
            Some(worker) => worker.abort(cause),
            None => drop(self.events.send(Event::AbortDone)),
        }
    }

    async fn end(mut self, mut outcome: Outcome) -> Ended {
        let limit = self.attempt.deadlines.abort;
        self.cancelled.over = true;
        let well = matches!(outcome, Outcome::Committed { failure: None });
        let verdict = match &outcome {
            Outcome::Committed { failure: None } => Verdict::Well,
            Outcome::Committed { failure: Some(_) } => Verdict::AfterCommit,
            Outcome::Failed { .. } | Outcome::InDoubt { .. } if !self.all_opened => Verdict::Untouched,
            Outcome::Failed { .. } | Outcome::InDoubt { .. } => Verdict::Mixed { leave: self.attempt.leave },
        };
        let (engine_lane, deadlines) = (self.engine_lane.take(), self.attempt.deadlines);
        let engine_ended = async {
            match engine_lane {
                Some(lane) => lane.end(verdict, deadlines).await,
                None => Ok(()),
            }
        };
        let stopped = async {
            if let Some(prepare) = self.prepare.take() {
                prepare.abort();
                // It may hold the ring, or have it in its result. Once aborted it ends at its next step.
                let _ = tokio::time::timeout(limit, prepare).await;
            }
            if let Some(lane) = self.device_lane.take_if(|_| !well) {
                lane.stop(limit).await;
            }
        };
        let let_go = async {
            match self.worker.take() {
                Some(worker) => Some(worker.finished(limit * 2).await),
                None => None,
            }
        };
        let ((), let_go, resumed) = tokio::join!(stopped, let_go, engine_ended);
        match (&mut outcome, resumed) {
            (_, Ok(())) => {}
            // The new weights are in, but nobody gets to use them.
            (Outcome::Committed { failure: failure @ None }, Err(cause)) => *failure = Some(cause),
            (_, Err(error)) => tracing::warn!(%error, "the engine could not be resumed"),
        }
        if well {
            self.end_device_lane().await;
        }
        // After a failure all members start afresh, so that none is left with a communicator that others lack.
        let group = self.attempt.group.take().filter(|_| well);
        let kept_ring = self.attempt.kept_ring.take().filter(|_| well);
        let mut quarantine = std::mem::take(&mut self.attempt.quarantine);
        if let Some(let_go) = let_go.filter(|q| !q.worker_let_go) {
            quarantine.extend(let_go.ring.or_else(|| self.ring.take()));
        }
        Ended {
            outcome,
            epoch: self.epoch,
            plan: self.plan,
            group,
            kept_ring,
            quarantine,
            touched: self.touched,
            may_be_mixed: self.all_opened,
            finished: self.finished,
        }
    }

    /// After the last bucket: takes the communicator out of the lane, for the next update.
    async fn end_device_lane(&mut self) {
        let Some(lane) = self.device_lane.take() else { return };
        let communicator = lane.finish(self.attempt.deadlines.abort).await;
        if let (Some(communicator), Some((epoch, members))) = (communicator, self.group_head.take()) {
            self.attempt.group = Some(Group { epoch, members, communicator });
        }
    }

    fn clock(&self) -> Duration {
        CLOCK_START + self.attempt.trace.now()
    }

    fn device_lane(&mut self) -> Result<&mut DeviceLane> {
        self.device_lane.as_mut().ok_or_else(|| out_of_order("move a bucket"))
    }

    fn worker(&self) -> Result<&WorkerLane> {
        self.worker.as_ref().ok_or_else(|| out_of_order("call the worker"))
    }
}

/// A lease counts from when the heartbeat was sent, which may be before the update's start.
fn lease(trace: &Trace, sent_at: Instant) -> Event {
    let start = trace.start();
    let asked = CLOCK_START + sent_at.saturating_duration_since(start);
    Event::LeaseRenewed { asked: asked.saturating_sub(start.saturating_duration_since(sent_at)) }
}

/// Ends the stage that the others were waited for in.
fn over(stage: &mut Option<OpenSpan>) {
    if let Some(span) = stage.take() {
        span.end();
    }
}

fn out_of_order(operation: &'static str) -> Error {
    Error::new(ErrorKind::Internal, operation, "the update machine asked for it out of order")
}

/// The communicator that `choice` names; none is needed by a group of one.
async fn connect(
    transport: &dyn Transport,
    rank: Rank,
    members: Vec<Rank>,
    epoch: Epoch,
    choice: CommunicatorChoice,
    kept: Option<Group>,
    deadline: Instant,
) -> Result<Option<Group>> {
    if members.len() == 1 {
        return Ok(None);
    }
    let token = match (choice, kept) {
        (CommunicatorChoice::Reuse(of), Some(group)) if group.epoch == of => return Ok(Some(group)),
        (CommunicatorChoice::Reuse(of), _) => {
            return Err(Error::new(
                ErrorKind::Internal,
                "reuse a communicator",
                format!("this rank has none of epoch {of}"),
            )
            .recovery_is(Recovery::Retry));
        }
        (CommunicatorChoice::Build(token), kept) => {
            if let Some(group) = kept {
                group.communicator.abort.abort(Error::new(
                    ErrorKind::Aborted,
                    "rebuild a communicator",
                    "a newer one takes its place",
                ));
            }
            token
        }
    };
    let collective = transport.collective().ok_or_else(|| no_broadcasts(transport))?;
    let index = members.binary_search(&rank).map_err(|_| {
        Error::new(ErrorKind::ConfigInvalid, "join a group", format!("rank {rank} is not among the members"))
    })?;
    let spec = GroupSpec { token, rank: index as u32, world_size: members.len() as u32, epoch };
    let communicator = collective.join(spec, deadline).await?;
    Ok(Some(Group { epoch, members, communicator }))
}

/// A transport that cannot serve a group.
pub(crate) fn no_broadcasts(transport: &dyn Transport) -> Error {
    let message =
        format!("transport `{}` has no broadcasts; choose another with --transport", transport.name());
    Error::new(ErrorKind::Unsupported, "join a group", message)
}

/// Completes when there is a task and it has ended.
async fn joined(task: &mut Option<JoinHandle<Result<Prepared>>>) -> Result<Prepared> {
    let Some(handle) = task else { return std::future::pending().await };
    let result = handle.await;
    *task = None;
    match result {
        Ok(result) => result,
        Err(error) => {
            Err(Error::new(ErrorKind::Internal, "prepare an update", "the task ended early").caused_by(error))
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
