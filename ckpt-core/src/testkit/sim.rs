//! A whole cluster in one thread and virtual time.

mod check;
mod messages;
mod perform;
mod strike;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, VecDeque},
    sync::Arc,
    time::Duration,
};

use super::{
    Fault, Law, Random, Skip, TimedFault, TransportModel, Violation,
    model::{End, Model},
    wire,
};
use crate::{
    control::{HubConfig, HubMachine, ToHub, ToRank},
    deadlines::Deadlines,
    error::Error,
    plan::UpdatePlan,
    types::{Epoch, Rank},
    update::{Event, Outcome, UpdateMachine},
};

/// One rank of a simulated cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimRank {
    /// It feeds a worker.
    pub has_worker: bool,
    /// The engine that its worker belongs to; the lowest rank of each engine sends its request.
    pub engine: Option<u32>,
}

/// How fast everything is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// Host to device, per rank.
    pub h2d_bytes_per_sec: u64,
    /// Into a rank's ring, per rank.
    pub net_bytes_per_sec: u64,
    /// A worker's copy out of the ring.
    pub worker_bytes_per_sec: u64,
    /// A message's way: at least this, at most twice this.
    pub message: Duration,
    /// Each step of a bucket, besides its bytes.
    pub step: Duration,
    /// Plan, ring, communicator.
    pub prepare: Duration,
    /// A worker's mapping of the ring, from when its engine calls it.
    pub open: Duration,
    /// Dropping the ring; the post hook; an engine's answer after that; an abort.
    pub wind_up: Duration,
}

impl Default for Costs {
    fn default() -> Self {
        Self {
            h2d_bytes_per_sec: 50_000_000_000,
            net_bytes_per_sec: 25_000_000_000,
            worker_bytes_per_sec: 200_000_000_000,
            message: Duration::from_micros(100),
            step: Duration::from_micros(50),
            prepare: Duration::from_millis(20),
            open: Duration::from_millis(5),
            wind_up: Duration::from_millis(10),
        }
    }
}

/// What to run.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// The members, from rank 0 on.
    pub ranks: Vec<SimRank>,
    /// The plan; its members are the same.
    pub plan: Arc<UpdatePlan>,
    /// The time limits.
    pub deadlines: Deadlines,
    /// Speeds.
    pub costs: Costs,
    /// How bytes move.
    pub transport: TransportModel,
    /// What goes wrong.
    pub fault: Option<TimedFault>,
    /// Each living rank must have ended this long after the fault struck; checked if given.
    pub ends_within: Option<Duration>,
    /// After a failure that it can recover from, the cluster updates once more, which must succeed.
    pub retry: bool,
    /// Decides every order and delay that is left open.
    pub seed: u64,
    /// What is left out on purpose.
    pub skip: Option<Skip>,
}

impl SimConfig {
    /// A healthy cluster of `ranks` equal ranks with workers and one engine.
    pub fn new(ranks: u32, plan: UpdatePlan) -> Self {
        Self {
            ranks: vec![SimRank { has_worker: true, engine: Some(0) }; ranks as usize],
            plan: Arc::new(plan),
            deadlines: Deadlines::default(),
            costs: Costs::default(),
            transport: TransportModel::Eager,
            fault: None,
            ends_within: None,
            retry: false,
            seed: 0,
            skip: None,
        }
    }
}

/// What a span of the trace is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SpanKind {
    /// Own segments, host to device.
    Load,
    /// Bytes into this rank's ring.
    Exchange,
    /// From published to acked.
    Worker,
}

/// Something that took time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where.
    pub rank: Rank,
    /// Of which bucket.
    pub bucket: u32,
    /// What.
    pub kind: SpanKind,
    /// From.
    pub start: Duration,
    /// To.
    pub end: Duration,
}

/// What happened.
#[derive(Clone, Debug)]
pub struct SimReport {
    /// How each rank's first update ended; `None` for the dead.
    pub outcomes: Vec<Option<Outcome>>,
    /// When each rank's first update ended.
    pub ended_at: Vec<Option<Duration>>,
    /// When the last rank's first update ended, from the start.
    pub makespan: Duration,
    /// What the first update spent its time on.
    pub spans: Vec<Span>,
    /// When the fault struck, if it did.
    pub struck_at: Option<Duration>,
    /// The second update was run.
    pub retried: bool,
    /// Events handled.
    pub events: u64,
    /// The first law that broke.
    pub violation: Option<Violation>,
}

#[derive(Clone, Debug)]
enum Answer {
    Prepared,
    Opened,
    Ack,
    Released,
    HookDone,
    EngineDone,
    AbortDone,
    Failed(Error),
}

#[derive(Clone, Debug)]
enum What {
    Call(Rank),
    ToHub(Rank, ToHub),
    ToRank(Rank, ToRank),
    HubSees(Rank),
    RankSees(Rank),
    Receive(Rank, usize, u32),
    Complete(Rank, usize),
    Answer(Rank, usize, Answer),
    Heartbeat(Rank),
    Timer(Rank),
    HubTimer,
    Strike,
    Thaw(Rank),
    Retry,
}

impl What {
    /// Whose process must run for this to be handled; `None` for the world's doings.
    fn process(&self) -> Option<Rank> {
        match self {
            What::Call(r)
            | What::ToRank(r, _)
            | What::RankSees(r)
            | What::Complete(r, _)
            | What::Answer(r, ..)
            | What::Heartbeat(r)
            | What::Timer(r) => Some(*r),
            _ => None,
        }
    }
}

/// Ordered by time, then by a number drawn from the seed, then by age.
struct Entry(Duration, u64, u64, What);

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1, self.2).cmp(&(other.0, other.1, other.2))
    }
}

#[derive(Debug, Default)]
struct Process {
    machine: Option<UpdateMachine>,
    round: usize,
    dead: bool,
    frozen: bool,
    deferred: VecDeque<What>,
    /// The rank's side of its session.
    session: bool,
    incarnation: u64,
    partitioned: bool,
    /// When each unanswered heartbeat was sent.
    asked: VecDeque<Duration>,
    /// When the last message on the way arrives, in each direction.
    last_to_hub: Duration,
    last_to_rank: Duration,
    /// Messages from the hub so far, heartbeats aside.
    heard_count: u32,
    /// When the hub last heard it.
    hub_heard: Duration,
    h2d_busy: Duration,
    net_busy: Duration,
    /// When each bucket's own segments are in the ring.
    load_done: Vec<Duration>,
    receiving: bool,
    completing: bool,
    timer_at: Option<Duration>,
    /// The hub was lost or silent: this rank's cause is its own.
    cut_off: bool,
}

/// The cluster.
pub struct SimCluster {
    config: SimConfig,
    random: Random,
    now: Duration,
    queue: BinaryHeap<Reverse<Entry>>,
    sequence: u64,
    processes: Vec<Process>,
    hub: Option<HubMachine>,
    hub_timer_at: Option<Duration>,
    /// One world for each update.
    rounds: Vec<Model>,
    epoch_rounds: BTreeMap<Epoch, usize>,
    struck_at: Option<Duration>,
    /// A second caller came while an update ran; whether it was refused.
    second_call: Option<bool>,
    retry_planned: bool,
    report: SimReport,
}

const EVENT_LIMIT: u64 = 50_000_000;

impl SimCluster {
    /// A cluster at its start.
    pub fn new(config: SimConfig) -> Self {
        let count = config.ranks.len();
        let report = SimReport {
            outcomes: vec![None; count],
            ended_at: vec![None; count],
            makespan: Duration::ZERO,
            spans: Vec::new(),
            struck_at: None,
            retried: false,
            events: 0,
            violation: None,
        };
        let mut hub = HubConfig::new(count as u32 + 1, config.deadlines);
        hub.skip = config.skip.and_then(Skip::rule);
        let mut sim = Self {
            random: Random::new(config.seed),
            now: Duration::ZERO,
            queue: BinaryHeap::new(),
            sequence: 0,
            processes: (0..count).map(|_| Process::default()).collect(),
            hub: Some(HubMachine::new(hub)),
            hub_timer_at: None,
            rounds: Vec::new(),
            epoch_rounds: BTreeMap::new(),
            struck_at: None,
            second_call: None,
            retry_planned: false,
            report,
            config,
        };
        sim.open_round();
        sim
    }

    /// Runs until every living rank has ended, a law broke, or nothing can happen any more.
    pub fn run(mut self) -> SimReport {
        let result = self.run_checked();
        self.report.struck_at = self.struck_at;
        self.report.makespan = self.report.ended_at.iter().flatten().max().copied().unwrap_or_default();
        self.report.violation = result.err();
        self.report
    }

    fn run_checked(&mut self) -> Result<(), Violation> {
        for rank in 0..=self.count() {
            self.connect(rank)?;
        }
        for rank in 0..self.count() {
            let at = Duration::from_nanos(self.random.below(2_000_000));
            self.schedule(at, What::Call(rank));
        }
        if let Some(fault) = self.config.fault {
            self.schedule(fault.at, What::Strike);
        }
        let give_up = self.patience();
        while let Some(Reverse(Entry(at, _, _, what))) = self.queue.pop() {
            self.now = self.now.max(at);
            self.report.events += 1;
            if self.report.events > EVENT_LIMIT {
                return Err(Violation::new(Law::Ends, "the cluster runs without end"));
            }
            if self.now > give_up {
                break;
            }
            self.handle(what)?;
            if self.all_ended() {
                if !self.may_retry() {
                    break;
                }
                if !self.retry_planned {
                    self.retry_planned = true;
                    let at = self.now + self.config.deadlines.dead_after * 2;
                    self.schedule(at, What::Retry);
                }
            }
        }
        self.check_end()
    }

    fn count(&self) -> Rank {
        self.config.ranks.len() as Rank
    }

    fn schedule(&mut self, at: Duration, what: What) {
        self.sequence += 1;
        let tie = self.random.draw();
        self.queue.push(Reverse(Entry(at.max(self.now), tie, self.sequence, what)));
    }

    /// `cost`, more or less.
    fn jitter(&mut self, cost: Duration) -> Duration {
        cost + Duration::from_nanos(self.random.below(cost.as_nanos() as u64 + 1))
    }

    fn world(&mut self, rank: Rank) -> &mut Model {
        let round = self.processes[rank as usize].round;
        &mut self.rounds[round]
    }

    fn open_round(&mut self) {
        let kinds: Vec<(bool, bool)> =
            (0..self.count()).map(|r| (self.config.ranks[r as usize].has_worker, self.leads(r))).collect();
        self.rounds.push(Model::new(
            self.config.plan.clone(),
            &kinds,
            self.config.transport,
            self.config.skip,
        ));
    }

    /// The rank sends its engine's request.
    fn leads(&self, rank: Rank) -> bool {
        let engine = self.config.ranks[rank as usize].engine;
        engine.is_some() && self.config.ranks.iter().position(|r| r.engine == engine) == Some(rank as usize)
    }

    fn leader(&self, rank: Rank) -> Option<Rank> {
        let engine = self.config.ranks[rank as usize].engine?;
        self.config.ranks.iter().position(|r| r.engine == Some(engine)).map(|r| r as Rank)
    }

    // ---- events ----

    fn handle(&mut self, what: What) -> Result<(), Violation> {
        if let Some(rank) = what.process() {
            let process = &mut self.processes[rank as usize];
            if process.dead {
                return Ok(());
            }
            if process.frozen {
                process.deferred.push_back(what);
                return Ok(());
            }
        }
        match what {
            What::Call(rank) => self.call(rank),
            What::ToHub(rank, message) => {
                if let Some(process) = self.processes.get_mut(rank as usize) {
                    process.hub_heard = self.now;
                }
                if let ToHub::Failed { epoch: Some(epoch), .. } = &message
                    && let Some(round) = self.epoch_rounds.get(epoch)
                {
                    self.rounds[*round].hub_hears(&message);
                }
                if let Some(hub) = &mut self.hub {
                    if rank == self.config.ranks.len() as Rank && !hub.attempts().is_empty() {
                        self.second_call.get_or_insert(false);
                    }
                    hub.handle(rank, message, self.now);
                }
                self.drain_hub()
            }
            What::ToRank(rank, message) => self.rank_reads(rank, message),
            What::HubSees(rank) => {
                if let Some(hub) = &mut self.hub {
                    hub.disconnected(rank, wire::session_error("connection reset"), self.now);
                }
                self.drain_hub()
            }
            What::RankSees(rank) => {
                let process = &mut self.processes[rank as usize];
                process.session = false;
                process.cut_off = true;
                self.feed(rank, Event::HubLost { cause: wire::session_error("the hub's connection ended") })
            }
            What::Receive(rank, round, bucket) => {
                if self.processes[rank as usize].round == round {
                    self.processes[rank as usize].receiving = false;
                    if self.rounds[round].can_receive(rank) == Some(bucket) {
                        self.rounds[round].receive(rank, bucket);
                    }
                    self.flow();
                }
                Ok(())
            }
            What::Complete(rank, round) => self.completes(rank, round),
            What::Answer(rank, round, answer) => self.answered(rank, round, answer),
            What::Heartbeat(rank) => {
                let now = self.now;
                let next = now + self.config.deadlines.heartbeat;
                let process = &mut self.processes[rank as usize];
                if process.session {
                    process.asked.push_back(now);
                    self.send_hub(rank, ToHub::Alive);
                }
                self.schedule(next, What::Heartbeat(rank));
                Ok(())
            }
            What::Timer(rank) => {
                self.processes[rank as usize].timer_at = None;
                if let Some(machine) = &mut self.processes[rank as usize].machine {
                    machine.handle_timeout(self.now);
                }
                self.drain(rank)
            }
            What::HubTimer => {
                self.hub_timer_at = None;
                if let Some(hub) = &mut self.hub {
                    hub.handle_timeout(self.now);
                }
                self.drain_hub()
            }
            What::Strike => self.strike(),
            What::Thaw(rank) => self.thaw(rank),
            What::Retry => self.retry(),
        }
    }

    fn feed(&mut self, rank: Rank, event: Event) -> Result<(), Violation> {
        match &mut self.processes[rank as usize].machine {
            Some(machine) => machine.handle_event(event, self.now),
            None => return Ok(()),
        }
        self.drain(rank)
    }

    fn drain(&mut self, rank: Rank) -> Result<(), Violation> {
        loop {
            let Some(machine) = &mut self.processes[rank as usize].machine else { return Ok(()) };
            let Some(action) = machine.poll_action(self.now) else { break };
            self.perform(rank, action)?;
        }
        let due = self.processes[rank as usize].machine.as_ref().and_then(UpdateMachine::poll_timeout);
        let process = &mut self.processes[rank as usize];
        if let Some(at) = due.filter(|at| process.timer_at.is_none_or(|t| *at < t)) {
            process.timer_at = Some(at);
            self.schedule(at, What::Timer(rank));
        }
        self.flow();
        Ok(())
    }

    fn all_ended(&self) -> bool {
        let last = self.rounds.len() - 1;
        let fault = self.config.fault.map(|f| f.fault);
        (0..self.count()).zip(&self.processes).all(|(rank, p)| {
            let never = last == 0 && fault == Some(Fault::NeverCalls { rank });
            p.dead || never || (p.round == last && self.rounds[last].ranks[rank as usize].end.is_some())
        })
    }

    /// How a rank's update of the newest round ended.
    fn last_end(&self, rank: Rank) -> Option<End> {
        self.rounds.last().and_then(|m| m.ranks[rank as usize].end)
    }
}
