//! Every interleaving of a small cluster: a depth-first search over all orders in which messages, completions, acks
//! and one fault can come, with states that were seen before left out.

use std::{
    collections::{HashSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;

use super::{
    Law, Skip, TransportModel, Violation,
    model::{End, Model},
    wire,
};
use crate::{
    control::{Hello, HubConfig, HubMachine, Joining, ToHub, ToRank},
    deadlines::Deadlines,
    error::Error,
    plan::UpdatePlan,
    types::{Epoch, Rank, Version},
    update::{Event, MachineConfig, UpdateMachine},
};

/// What may go wrong once, at any point of a search.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExploreFault {
    /// The rank's worker fails.
    WorkerFails(Rank),
    /// The rank's process dies; hub and peers notice some time later.
    RankDies(Rank),
    /// The hub dies; each rank notices some time later.
    HubDies,
    /// The rank's session breaks; both ends notice some time later.
    SessionBreaks(Rank),
    /// The rank's link breaks; its driver says so some time later.
    LinkBreaks(Rank),
    /// The rank's driver reports a broken link although all bytes are there and said to be.
    LateSymptom(Rank),
    /// The rank's engine fails.
    EngineFails(Rank),
    /// The rank's engine answers early.
    EngineEarly(Rank),
    /// A decision of an older attempt reaches the rank.
    StaleCommit(Rank),
    /// An abort of an older attempt reaches the rank.
    StaleAbort(Rank),
}

/// What to search.
#[derive(Clone, Debug)]
pub struct ExploreConfig {
    /// The plan; its members are ranks from 0 on.
    pub plan: Arc<UpdatePlan>,
    /// For each rank, whether it has a worker.
    pub workers: Vec<bool>,
    /// Rank 0 starts an engine.
    pub engine: bool,
    /// How bytes move.
    pub transport: TransportModel,
    /// What may go wrong once.
    pub fault: Option<ExploreFault>,
    /// What is left out on purpose.
    pub skip: Option<Skip>,
    /// More states than this end the search.
    pub max_states: usize,
}

/// What a search found.
#[derive(Clone, Debug)]
pub struct Exploration {
    /// Different states seen.
    pub states: usize,
    /// Different ends seen.
    pub ends: usize,
    /// The search saw everything, or stopped at a violation.
    pub complete: bool,
    /// The first broken law, with the steps that lead there.
    pub violation: Option<(Violation, Vec<String>)>,
}

const NOW: Duration = Duration::ZERO;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    ToHub(Rank),
    ToRank(Rank),
    Prepared(Rank),
    Opened(Rank),
    Receive(Rank, u32),
    Complete(Rank, u32, bool),
    Ack(Rank),
    Released(Rank),
    HookDone(Rank),
    EngineDone(Rank),
    AbortDone(Rank),
    Notice(Rank),
    HubNotices(Rank),
    HubLost(Rank),
    HubGrace,
    Fault(ExploreFault),
}

#[derive(Clone)]
struct State {
    machines: Vec<UpdateMachine>,
    hub: HubMachine,
    hub_dead: bool,
    model: Model,
    to_hub: Vec<VecDeque<ToHub>>,
    to_rank: Vec<VecDeque<ToRank>>,
    fault: Option<ExploreFault>,
    struck: bool,
    /// Driver errors that are on their way to their machine.
    notices: Vec<Option<Error>>,
    /// Session ends that hub and rank have yet to notice.
    hub_notices: Vec<bool>,
    hub_lost: Vec<bool>,
}

/// Searches all interleavings; stops at the first violation.
pub fn explore(config: &ExploreConfig) -> Exploration {
    let mut found = Exploration { states: 0, ends: 0, complete: true, violation: None };
    let mut seen = HashSet::new();
    let first = match State::new(config) {
        Ok(state) => state,
        Err(violation) => {
            found.violation = Some((violation, Vec::new()));
            return found;
        }
    };
    seen.insert(first.fingerprint());
    let mut stack: Vec<(State, Vec<Step>, usize)> = vec![(first.clone(), first.steps(), 0)];
    while let Some((state, steps, next)) = stack.last_mut() {
        if steps.is_empty() {
            found.ends += 1;
            if let Err(violation) = state.check_end() {
                let path = path(&stack);
                found.violation = Some((violation, path));
                break;
            }
            stack.pop();
            continue;
        }
        let Some(step) = steps.get(*next).copied() else {
            stack.pop();
            continue;
        };
        *next += 1;
        let mut after = state.clone();
        if let Err(violation) = after.take(step) {
            found.violation = Some((violation, path(&stack)));
            break;
        }
        if seen.insert(after.fingerprint()) {
            if seen.len() > config.max_states {
                found.complete = false;
                break;
            }
            let steps = after.steps();
            stack.push((after, steps, 0));
        }
    }
    found.states = seen.len();
    found
}

fn path(stack: &[(State, Vec<Step>, usize)]) -> Vec<String> {
    stack
        .iter()
        .filter_map(|(_, steps, next)| steps.get(next.checked_sub(1)?))
        .map(|s| format!("{s:?}"))
        .collect()
}

impl State {
    fn new(config: &ExploreConfig) -> Result<Self, Violation> {
        let world_size = config.workers.len() as u32;
        let deadlines = Deadlines::default();
        let rule = config.skip.and_then(Skip::rule);
        let mut hub_config = HubConfig::new(world_size, deadlines);
        hub_config.skip = rule;
        let mut hub = HubMachine::new(hub_config);
        let kinds: Vec<(bool, bool)> =
            (0..).zip(&config.workers).map(|(r, w)| (*w, r == 0 && config.engine)).collect();
        let mut to_hub = Vec::new();
        let mut machines = Vec::new();
        for (rank, (has_worker, starts_engine)) in (0..).zip(&kinds) {
            let hello = Hello {
                protocol: 1,
                job: "sim".into(),
                token: Bytes::new(),
                rank,
                world_size,
                incarnation: 0,
                host: "sim".into(),
                pid: rank,
            };
            if let Err(error) = hub.connected(rank, hello, NOW) {
                return Err(Violation::new(Law::Progress, error.to_string()));
            }
            to_hub.push(VecDeque::from([ToHub::Join(Joining {
                checkpoint: "sim".into(),
                version: Version(1),
                ranks: Vec::new(),
                device_uuid: String::new(),
                endpoint: None,
                free_bytes: 0,
                communicator: None,
                token: Some(Bytes::new()),
            })]));
            let mut machine = MachineConfig::new(rank, deadlines, NOW);
            machine.has_worker = *has_worker;
            machine.starts_engine = *starts_engine;
            machine.skip = rule;
            machines.push(UpdateMachine::new(machine));
        }
        while hub.poll_message().is_some() {}
        let count = kinds.len();
        Ok(Self {
            machines,
            hub,
            hub_dead: false,
            model: Model::new(config.plan.clone(), &kinds, config.transport, config.skip),
            to_hub,
            to_rank: vec![VecDeque::new(); count],
            fault: config.fault,
            struck: false,
            notices: vec![None; count],
            hub_notices: vec![false; count],
            hub_lost: vec![false; count],
        })
    }

    fn ranks(&self) -> std::ops::Range<Rank> {
        0..self.machines.len() as Rank
    }

    /// Everything that can happen next.
    fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        for rank in self.ranks() {
            let me = rank as usize;
            if !self.hub_dead && !self.to_hub[me].is_empty() {
                steps.push(Step::ToHub(rank));
            }
            // A connection that breaks may take what was on its way with it.
            if self.hub_notices[me] && !self.hub_dead {
                steps.push(Step::HubNotices(rank));
            }
            let r = &self.model.ranks[me];
            if r.dead {
                continue;
            }
            if !self.to_rank[me].is_empty() {
                steps.push(Step::ToRank(rank));
            }
            if self.hub_lost[me] {
                steps.push(Step::HubLost(rank));
            }
            // Pullers read at any moment; elsewhere landing and completing are one step for all that anybody can see.
            if let Some(bucket) = self.model.can_receive(rank) {
                steps.push(Step::Receive(rank, bucket));
            }
            if let Some((bucket, means_something)) = self.model.can_complete(rank) {
                steps.push(Step::Complete(rank, bucket, means_something));
            }
            let all_hooks = self.model.ranks.iter().all(|r| !r.has_worker || r.hook_done);
            let can = [
                (r.preparing, Step::Prepared(rank)),
                (r.opening, Step::Opened(rank)),
                (r.publishing.is_some(), Step::Ack(rank)),
                (r.releasing, Step::Released(rank)),
                (r.hook_running, Step::HookDone(rank)),
                (r.engine_running && all_hooks, Step::EngineDone(rank)),
                (r.aborting, Step::AbortDone(rank)),
                (self.notices[me].is_some(), Step::Notice(rank)),
            ];
            steps.extend(can.into_iter().filter(|(can, _)| *can).map(|(_, step)| step));
        }
        if !self.hub_dead && self.hub.weighs_a_symptom() {
            steps.push(Step::HubGrace);
        }
        if let Some(fault) = self.fault.filter(|f| self.can_fail(*f)) {
            steps.push(Step::Fault(fault));
        }
        steps
    }

    fn can_fail(&self, fault: ExploreFault) -> bool {
        let rank = |r: Rank| &self.model.ranks[r as usize];
        match fault {
            ExploreFault::WorkerFails(r) => {
                let r = rank(r);
                (r.opening || r.publishing.is_some() || r.releasing || r.hook_running) && !r.aborted
            }
            ExploreFault::EngineFails(r) => rank(r).engine_running,
            // Early: before its worker was told that all is over.
            ExploreFault::EngineEarly(r) => {
                rank(r).engine_running && !rank(r).hook_running && !rank(r).hook_done
            }
            ExploreFault::LinkBreaks(r) => rank(r).enqueued > rank(r).exchanged,
            ExploreFault::LateSymptom(r) => {
                self.model.has_worker_loaded(r) && rank(r).end.is_none() && !rank(r).commit_heard
            }
            ExploreFault::RankDies(r) | ExploreFault::SessionBreaks(r) => rank(r).end.is_none(),
            ExploreFault::StaleCommit(r) | ExploreFault::StaleAbort(r) => rank(r).end.is_none(),
            ExploreFault::HubDies => true,
        }
    }

    fn take(&mut self, step: Step) -> Result<(), Violation> {
        match step {
            Step::ToHub(rank) => {
                if let Some(message) = self.to_hub[rank as usize].pop_front() {
                    self.model.hub_hears(&message);
                    self.hub.handle(rank, message, NOW);
                }
                self.drain_hub()
            }
            Step::HubNotices(rank) => {
                self.hub_notices[rank as usize] = false;
                self.to_hub[rank as usize].clear();
                self.hub.disconnected(rank, wire::session_error("connection reset"), NOW);
                self.drain_hub()
            }
            Step::HubGrace => {
                self.hub.handle_timeout(NOW + Deadlines::default().heartbeat);
                self.drain_hub()
            }
            Step::ToRank(rank) => {
                let Some(message) = self.to_rank[rank as usize].pop_front() else { return Ok(()) };
                self.model.rank_hears(rank, &message);
                match wire::to_event(message) {
                    Some(event) => self.feed(rank, event),
                    None => Ok(()),
                }
            }
            Step::HubLost(rank) => {
                self.hub_lost[rank as usize] = false;
                self.to_rank[rank as usize].clear();
                self.feed(rank, Event::HubLost { cause: wire::session_error("the hub's connection ended") })
            }
            Step::Prepared(rank) => {
                self.model.ranks[rank as usize].preparing = false;
                let event = Event::Prepared {
                    plan_digest: self.model.plan.digest,
                    waits_for: self.model.waits_for(),
                    loads: self.model.loads(rank),
                };
                self.feed(rank, event)
            }
            Step::Opened(rank) => {
                let r = &mut self.model.ranks[rank as usize];
                (r.opening, r.opened) = (false, true);
                self.feed(rank, Event::SinkOpened)
            }
            Step::Receive(rank, bucket) => {
                self.model.receive(rank, bucket);
                match self.model.can_complete(rank) {
                    Some((bucket, means_something)) if self.model.transport != TransportModel::Pull => {
                        self.take(Step::Complete(rank, bucket, means_something))
                    }
                    _ => Ok(()),
                }
            }
            Step::Complete(rank, bucket, means_something) => {
                self.model.complete(rank, bucket, means_something);
                self.feed(rank, Event::Exchanged { bucket })
            }
            Step::Ack(rank) => match self.model.ack(rank)? {
                Some(bucket) => self.feed(rank, Event::Acked { bucket }),
                None => Ok(()),
            },
            Step::Released(rank) => {
                let r = &mut self.model.ranks[rank as usize];
                (r.releasing, r.released) = (false, true);
                self.feed(rank, Event::Released)
            }
            Step::HookDone(rank) => {
                let r = &mut self.model.ranks[rank as usize];
                (r.hook_running, r.hook_done) = (false, true);
                self.feed(rank, Event::PostHookDone)
            }
            Step::EngineDone(rank) => {
                let r = &mut self.model.ranks[rank as usize];
                (r.engine_running, r.engine_done) = (false, true);
                self.feed(rank, Event::EngineDone)
            }
            Step::AbortDone(rank) => {
                self.model.ranks[rank as usize].aborting = false;
                self.feed(rank, Event::AbortDone)
            }
            Step::Notice(rank) => match self.notices[rank as usize].take() {
                Some(cause) => self.feed(rank, Event::Failed { cause }),
                None => Ok(()),
            },
            Step::Fault(fault) => self.strike(fault),
        }
    }

    fn strike(&mut self, fault: ExploreFault) -> Result<(), Violation> {
        self.fault = None;
        self.struck = true;
        match fault {
            ExploreFault::WorkerFails(rank) => {
                let r = &mut self.model.ranks[rank as usize];
                let after_commit = r.releasing || r.hook_running;
                (r.opening, r.publishing, r.releasing, r.hook_running) = (false, None, false, false);
                self.model.hook_failed |= after_commit;
                self.feed(rank, Event::Failed { cause: wire::worker_error(rank) })
            }
            ExploreFault::RankDies(rank) => {
                let me = rank as usize;
                self.model.ranks[me].dead = true;
                self.to_rank[me].clear();
                self.hub_notices[me] = true;
                for other in self.ranks().filter(|r| *r != rank) {
                    let r = &self.model.ranks[other as usize];
                    if r.enqueued > r.exchanged {
                        self.notices[other as usize] = Some(wire::link_error(other, rank));
                    }
                }
                Ok(())
            }
            ExploreFault::HubDies => {
                self.hub_dead = true;
                self.to_hub.iter_mut().for_each(VecDeque::clear);
                self.hub_lost = vec![true; self.hub_lost.len()];
                Ok(())
            }
            ExploreFault::SessionBreaks(rank) => {
                // What either side sent before may still arrive.
                self.hub_notices[rank as usize] = true;
                self.hub_lost[rank as usize] = true;
                Ok(())
            }
            ExploreFault::LinkBreaks(rank) => {
                self.model.ranks[rank as usize].link_broken = true;
                let peer = (rank + 1) % self.machines.len() as Rank;
                self.notices[rank as usize] = Some(wire::link_error(rank, peer));
                Ok(())
            }
            ExploreFault::LateSymptom(rank) => {
                let peer = (rank + 1) % self.machines.len() as Rank;
                self.feed(rank, Event::Failed { cause: wire::link_error(rank, peer) })
            }
            ExploreFault::EngineFails(rank) => {
                self.model.ranks[rank as usize].engine_running = false;
                self.model.hook_failed |= self.model.committed;
                self.feed(rank, Event::Failed { cause: wire::engine_error(rank) })
            }
            ExploreFault::EngineEarly(rank) => {
                self.model.ranks[rank as usize].engine_running = false;
                self.model.engine_lied = true;
                self.feed(rank, Event::EngineDone)
            }
            ExploreFault::StaleCommit(rank) => self.feed(rank, Event::Committed { epoch: Epoch(0) }),
            ExploreFault::StaleAbort(rank) => {
                let cause = wire::session_error("an older update failed");
                self.feed(rank, Event::HubAborted { epoch: Some(Epoch(0)), cause })
            }
        }
    }

    fn drain_hub(&mut self) -> Result<(), Violation> {
        while let Some((rank, message)) = self.hub.poll_message() {
            self.model.hub_says(&message)?;
            if !self.model.ranks[rank as usize].dead {
                self.to_rank[rank as usize].push_back(message);
            }
        }
        Ok(())
    }

    fn feed(&mut self, rank: Rank, event: Event) -> Result<(), Violation> {
        let me = rank as usize;
        self.machines[me].handle_event(event, NOW);
        while let Some(action) = self.machines[me].poll_action(NOW) {
            self.model.act(rank, &action)?;
            if let Some(message) = wire::to_hub(&action)
                && !self.hub_dead
                && !self.hub_notices[me]
            {
                self.to_hub[me].push_back(message);
            }
        }
        Ok(())
    }

    /// Nothing can happen any more: every rank that lives must have ended, and all alike.
    fn check_end(&self) -> Result<(), Violation> {
        let living = || self.model.ranks.iter().enumerate().filter(|(_, r)| !r.dead);
        if let Some((rank, _)) = living().find(|(_, r)| r.end.is_none()) {
            return Err(Violation::new(Law::Ends, format!("rank {rank} waits for ever")));
        }
        let committed = living().filter(|(_, r)| matches!(r.end, Some(End::Committed { .. }))).count();
        let failed = living().filter(|(_, r)| r.end == Some(End::Failed)).count();
        if committed > 0 && failed > 0 {
            return Err(Violation::new(Law::Agreement, "some ranks committed and others failed"));
        }
        let well = living().all(|(_, r)| r.end == Some(End::Committed { well: true }));
        if !self.struck && !well {
            return Err(Violation::new(Law::Progress, "a healthy update did not commit"));
        }
        if self.model.engine_lied && well {
            return Err(Violation::new(Law::NoEarlyWord, "an engine that answered early was believed"));
        }
        Ok(())
    }

    fn fingerprint(&self) -> u64 {
        let mut state = DefaultHasher::new();
        for machine in &self.machines {
            machine.fingerprint(&mut state);
        }
        self.hub.fingerprint(&mut state);
        self.model.hash(&mut state);
        (self.hub_dead, self.fault, &self.hub_notices, &self.hub_lost).hash(&mut state);
        for queue in &self.to_hub {
            queue.len().hash(&mut state);
            for message in queue {
                std::mem::discriminant(message).hash(&mut state);
                if let ToHub::Failed { epoch, cause } = message {
                    (epoch, cause.message()).hash(&mut state);
                }
                if let ToHub::Finished { failure, .. } = message {
                    failure.is_some().hash(&mut state);
                }
            }
        }
        for queue in &self.to_rank {
            queue.len().hash(&mut state);
            for message in queue {
                std::mem::discriminant(message).hash(&mut state);
                if let ToRank::Abort { epoch, cause } = message {
                    (epoch, cause.message()).hash(&mut state);
                }
                if let ToRank::Closed { failure, .. } = message {
                    failure.is_some().hash(&mut state);
                }
            }
        }
        for notice in &self.notices {
            notice.is_some().hash(&mut state);
        }
        state.finish()
    }
}
