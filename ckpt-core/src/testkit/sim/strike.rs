//! Faults, and the update after them.

use std::time::Duration;

use super::{Answer, SimCluster, What};
use crate::{
    control::{HubMachine, ToHub, ToRank},
    testkit::{Fault, Violation, WorkerStep, model::End, wire},
    types::{Epoch, Rank, Version},
    update::Event,
};

impl SimCluster {
    /// The fault's time has come. Faults that are tied to a step strike there.
    pub(super) fn strike(&mut self) -> Result<(), Violation> {
        let Some(fault) = self.config.fault.map(|f| f.fault) else { return Ok(()) };
        let message = self.config.costs.message;
        match fault {
            Fault::RankDies { rank, fin } => {
                self.struck_at = Some(self.now);
                let me = rank as usize;
                let round = self.processes[me].round;
                self.rounds[round].ranks[me].dead = true;
                let process = &mut self.processes[me];
                (process.dead, process.session, process.machine) = (true, false, None);
                if fin {
                    // A system takes its time to clear a large process away.
                    let clearing = Duration::from_micros(self.random.below(100_000));
                    let at = self.processes[me].last_to_hub.max(self.now) + message + clearing;
                    self.schedule(at, What::HubSees(rank));
                }
                // Over some transports nobody notices a dead peer.
                if !self.random.one_in(3) {
                    for other in (0..self.count()).filter(|r| *r != rank) {
                        let r = &mut self.rounds[round].ranks[other as usize];
                        if r.enqueued > r.exchanged {
                            r.link_broken = true;
                            let at = self.now + self.jitter(message) / 2;
                            let cause = wire::link_error(other, rank);
                            self.schedule(at, What::Answer(other, round, Answer::Failed(cause)));
                        }
                    }
                }
            }
            Fault::HubDies { fin } => {
                self.struck_at = Some(self.now);
                self.hub = None;
                for rank in 0..self.count() {
                    self.processes[rank as usize].cut_off = true;
                    if fin {
                        self.send_rank(rank, What::RankSees);
                    }
                }
            }
            Fault::EngineFails { rank } | Fault::EngineEarly { rank } => {
                let round = self.processes[rank as usize].round;
                let model = &mut self.rounds[round];
                let r = &mut model.ranks[rank as usize];
                let early = matches!(fault, Fault::EngineEarly { .. });
                if r.engine_running && !(early && (r.hook_running || r.hook_done)) {
                    self.struck_at = Some(self.now);
                    r.engine_running = false;
                    if early {
                        model.engine_lied = true;
                        return self.feed(rank, Event::EngineDone);
                    }
                    model.hook_failed |= model.committed;
                    return self.feed(rank, Event::Failed { cause: wire::engine_error(rank) });
                }
            }
            Fault::Freeze { rank, duration } => {
                self.struck_at = Some(self.now);
                self.processes[rank as usize].frozen = true;
                let thaw = self.now + duration;
                self.schedule(thaw, What::Thaw(rank));
            }
            Fault::Partition { rank } => {
                self.struck_at = Some(self.now);
                let process = &mut self.processes[rank as usize];
                (process.partitioned, process.cut_off) = (true, true);
            }
            Fault::LinkBreaks { rank } => {
                let round = self.processes[rank as usize].round;
                let peer = (rank + 1) % self.count();
                let r = &mut self.rounds[round].ranks[rank as usize];
                if r.enqueued > r.exchanged {
                    self.struck_at = Some(self.now);
                    r.link_broken = true;
                    let at = self.now + self.jitter(message) * 5;
                    self.schedule(
                        at,
                        What::Answer(rank, round, Answer::Failed(wire::link_error(rank, peer))),
                    );
                    self.flow();
                }
            }
            Fault::Stale { rank } => {
                self.struck_at = Some(self.now);
                let epoch = Epoch(0);
                let cause = wire::session_error("an older update failed");
                let stale = [
                    ToRank::Committed { epoch },
                    ToRank::Go { epoch },
                    ToRank::Closed { epoch, failure: None },
                    ToRank::Abort { epoch: Some(epoch), cause },
                ];
                let which = self.random.below(stale.len() as u64) as usize;
                if let Some(message) = stale.into_iter().nth(which) {
                    self.send_rank(rank, |rank| What::ToRank(rank, message));
                }
            }
            Fault::SecondCall { rank } => {
                let runs = |hub: &HubMachine| hub.attempts().iter().any(|a| a.stage != "joining");
                if !self.hub.as_ref().is_some_and(runs) {
                    return Ok(());
                }
                self.struck_at = Some(self.now);
                let outsider = self.count();
                // It may have been silent for too long by now; then it comes anew.
                let _ = self.connect(outsider);
                let joining = self.joining(vec![rank, outsider], Version(2));
                self.schedule(self.now, What::ToHub(outsider, ToHub::Join(joining)));
            }
            Fault::WorkerFails { .. }
            | Fault::WorkerHangs { .. }
            | Fault::EngineHangs { .. }
            | Fault::ExchangeHangs { .. }
            | Fault::PrepareHangs { .. }
            | Fault::PlanDiffers { .. }
            | Fault::NeverCalls { .. }
            | Fault::OtherVersion { .. }
            | Fault::MessageLost { .. } => {}
        }
        Ok(())
    }

    /// The stopped process goes on, and finds everything that came meanwhile. Its sockets keep their own order; which
    /// of them it reads first is open.
    pub(super) fn thaw(&mut self, rank: Rank) -> Result<(), Violation> {
        let process = &mut self.processes[rank as usize];
        process.frozen = false;
        let waiting: Vec<What> = process.deferred.drain(..).collect();
        let messages = |what: &What| matches!(what, What::ToRank(..) | What::RankSees(_));
        let (mut first, mut second): (Vec<What>, Vec<What>) = waiting.into_iter().partition(messages);
        if self.random.one_in(2) {
            std::mem::swap(&mut first, &mut second);
        }
        for what in first.into_iter().chain(second) {
            self.handle(what)?;
        }
        Ok(())
    }

    // ---- the next update ----

    /// The fault leaves all sessions up and strikes after Begin: a rank may call again as soon as it has ended.
    pub(super) fn retries_at_once(&self) -> bool {
        self.config.retry
            && match self.config.fault.map(|f| f.fault) {
                Some(Fault::WorkerFails { step, .. } | Fault::WorkerHangs { step, .. }) => {
                    matches!(step, WorkerStep::Open | WorkerStep::Bucket(_))
                }
                Some(
                    Fault::EngineFails { .. }
                    | Fault::EngineEarly { .. }
                    | Fault::LinkBreaks { .. }
                    | Fault::ExchangeHangs { .. }
                    | Fault::PrepareHangs { .. }
                    | Fault::PlanDiffers { .. },
                ) => true,
                _ => false,
            }
    }

    pub(super) fn may_retry(&self) -> bool {
        let again = match self.config.fault.map(|f| f.fault) {
            Some(Fault::RankDies { .. } | Fault::Freeze { .. } | Fault::OtherVersion { .. }) => true,
            // A rank that missed the end of a session-preserving failure calls again, too.
            Some(_) => self.retries_at_once(),
            None => false,
        };
        let failed = (0..self.count()).any(|r| self.last_end(r) == Some(End::Failed));
        self.config.retry && again && failed && self.rounds.len() == 1 && self.hub.is_some()
    }

    pub(super) fn next_round(&mut self, rank: Rank) {
        let process = &mut self.processes[rank as usize];
        process.round += 1;
        if process.round == self.rounds.len() {
            self.open_round();
            self.report.retried = true;
        }
    }

    /// Everybody has ended and the dead are restarted: call again.
    pub(super) fn retry(&mut self) -> Result<(), Violation> {
        for rank in 0..self.count() {
            let process = &mut self.processes[rank as usize];
            if process.frozen {
                // Its process is still stopped; there is nobody to call.
                return Ok(());
            }
            let restarted = process.dead;
            process.dead = false;
            if restarted {
                process.incarnation = 0;
            }
            if !process.session {
                self.connect(rank)?;
            }
        }
        for rank in 0..self.count() {
            self.next_round(rank);
            let at = self.now + Duration::from_nanos(self.random.below(2_000_000));
            self.schedule(at, What::Call(rank));
        }
        Ok(())
    }
}
