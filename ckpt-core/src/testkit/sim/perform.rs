//! What the modelled driver, devices, links, workers and engines do with a machine's actions.

use std::time::Duration;

use super::{Answer, SimCluster, Span, SpanKind, What};
use crate::{
    error::Key,
    testkit::{Fault, Law, Violation, WorkerStep, wire},
    types::Rank,
    update::{Action, Event, Outcome},
};

fn transfer(bytes: u64, bytes_per_sec: u64) -> Duration {
    Duration::from_secs_f64(bytes as f64 / bytes_per_sec.max(1) as f64)
}

impl SimCluster {
    pub(super) fn perform(&mut self, rank: Rank, action: Action) -> Result<(), Violation> {
        let me = rank as usize;
        if let Action::Publish { bucket } = action {
            let dead_at = self.processes[me].hub_heard + self.config.deadlines.dead_after;
            if self.now >= dead_at {
                let what = format!("rank {rank} publishes bucket {bucket} when the hub may hold it dead");
                return Err(Violation::new(Law::Fence, what));
            }
        }
        self.world(rank).act(rank, &action)?;
        if let Some(message) = wire::to_hub(&action) {
            self.send_hub(rank, message);
            return Ok(());
        }
        let costs = self.config.costs;
        let prepare = self.jitter(costs.prepare);
        let open = self.jitter(costs.open);
        let wind_up = self.jitter(costs.wind_up);
        match action {
            Action::Prepare { .. } => {
                if self.is_fault(rank, Fault::PrepareHangs { rank }) {
                    self.struck_at.get_or_insert(self.now);
                } else {
                    self.answer(rank, prepare, Answer::Prepared);
                }
            }
            Action::StartEngine => {
                let round = self.processes[me].round;
                for other in 0..self.count() {
                    let waits = self.processes[other as usize].round == round
                        && self.rounds[round].ranks[other as usize].opening
                        && self.leader(other) == Some(rank);
                    if waits {
                        self.worker_step(other, WorkerStep::Open, open, Answer::Opened);
                    }
                }
            }
            Action::OpenSink => {
                let called = match self.leader(rank) {
                    None => true,
                    Some(leader) => {
                        let round = self.processes[me].round;
                        self.rounds[round].ranks[leader as usize].engine_running
                    }
                };
                if called {
                    self.worker_step(rank, WorkerStep::Open, open, Answer::Opened);
                }
            }
            Action::Load { bucket } => {
                let plan = self.config.plan.clone();
                let own = plan.buckets[bucket as usize].segments.iter().filter(|s| s.root == rank);
                let bytes: u64 = own.map(|s| s.len_bytes).sum();
                let process = &mut self.processes[me];
                if bytes > 0 {
                    let start = self.now.max(process.h2d_busy);
                    let end = start + transfer(bytes, costs.h2d_bytes_per_sec) + costs.step;
                    process.h2d_busy = end;
                    process.load_done[bucket as usize] = end;
                    self.span(rank, bucket, SpanKind::Load, start, end);
                }
            }
            Action::Exchange { .. } | Action::Free { .. } => {}
            Action::Publish { bucket } => {
                let bytes = self.config.plan.buckets[bucket as usize].len_bytes;
                let cost = transfer(bytes, costs.worker_bytes_per_sec) + self.jitter(costs.step);
                let (start, end) = (self.now, self.now + cost);
                self.span(rank, bucket, SpanKind::Worker, start, end);
                self.worker_step(rank, WorkerStep::Bucket(bucket), cost, Answer::Ack);
            }
            Action::ReleaseSink => {
                self.worker_step(rank, WorkerStep::Release, wind_up, Answer::Released);
            }
            Action::RunPostHook => {
                self.worker_step(rank, WorkerStep::Hook, wind_up, Answer::HookDone);
            }
            Action::AbortLocal { cause } => {
                self.answer(rank, wind_up, Answer::AbortDone);
                if let Some(leader) = self.leader(rank) {
                    let round = self.processes[me].round;
                    let at = self.now + self.jitter(costs.wind_up * 2);
                    // The engine's answer quotes what its worker raised.
                    let error = wire::engine_error(leader).caused_by(cause).flattened();
                    self.schedule(at, What::Answer(leader, round, Answer::Failed(error)));
                }
            }
            Action::End(outcome) => {
                let failed = matches!(outcome, Outcome::Failed { .. });
                let first = self.processes[me].round == 0;
                if first {
                    self.report.outcomes[me] = Some(outcome);
                    self.report.ended_at[me] = Some(self.now);
                }
                self.processes[me].machine = None;
                if first && failed && self.retries_at_once() {
                    self.next_round(rank);
                    self.schedule(self.now, What::Call(rank));
                }
            }
            Action::SendReady { .. }
            | Action::SendOpened { .. }
            | Action::SendLoaded { .. }
            | Action::SendFinished { .. }
            | Action::SendFailed { .. } => {}
        }
        Ok(())
    }

    fn span(&mut self, rank: Rank, bucket: u32, kind: SpanKind, start: Duration, end: Duration) {
        if self.processes[rank as usize].round == 0 {
            self.report.spans.push(Span { rank, bucket, kind, start, end });
        }
    }

    pub(super) fn is_fault(&self, rank: Rank, fault: Fault) -> bool {
        self.processes[rank as usize].round == 0 && self.config.fault.is_some_and(|f| f.fault == fault)
    }

    fn answer(&mut self, rank: Rank, cost: Duration, answer: Answer) {
        let round = self.processes[rank as usize].round;
        let at = self.now + cost;
        self.schedule(at, What::Answer(rank, round, answer));
    }

    /// The worker answers after `cost`, unless it fails or hangs here.
    fn worker_step(&mut self, rank: Rank, step: WorkerStep, cost: Duration, answer: Answer) {
        if self.is_fault(rank, Fault::WorkerFails { rank, step }) {
            self.struck_at.get_or_insert(self.now);
            let round = self.processes[rank as usize].round;
            self.rounds[round].hook_failed |= matches!(step, WorkerStep::Release | WorkerStep::Hook);
            self.answer(rank, cost, Answer::Failed(wire::worker_error(rank)));
        } else if self.is_fault(rank, Fault::WorkerHangs { rank, step }) {
            self.struck_at.get_or_insert(self.now);
            let round = self.processes[rank as usize].round;
            self.rounds[round].hook_failed |= matches!(step, WorkerStep::Release | WorkerStep::Hook);
        } else {
            self.answer(rank, cost, answer);
        }
    }

    pub(super) fn answered(&mut self, rank: Rank, round: usize, answer: Answer) -> Result<(), Violation> {
        if self.processes[rank as usize].round != round {
            return Ok(());
        }
        let me = rank as usize;
        let model = &mut self.rounds[round];
        let r = &mut model.ranks[me];
        let event = match answer {
            Answer::Prepared if r.preparing => {
                r.preparing = false;
                let mut plan_digest = model.plan.digest;
                let (waits_for, loads) = (model.waits_for(), model.loads(rank));
                if self.is_fault(rank, Fault::PlanDiffers { rank }) {
                    self.struck_at.get_or_insert(self.now);
                    plan_digest ^= 1;
                }
                Event::Prepared { plan_digest, waits_for, loads }
            }
            Answer::Opened if r.opening => {
                (r.opening, r.opened) = (false, true);
                Event::SinkOpened
            }
            Answer::Ack => match model.ack(rank)? {
                Some(bucket) => Event::Acked { bucket },
                None => return Ok(()),
            },
            Answer::Released if r.releasing => {
                (r.releasing, r.released) = (false, true);
                Event::Released
            }
            Answer::HookDone if r.hook_running => {
                (r.hook_running, r.hook_done) = (false, true);
                self.engine_may_end(rank);
                Event::PostHookDone
            }
            Answer::EngineDone if r.engine_running => {
                (r.engine_running, r.engine_done) = (false, true);
                Event::EngineDone
            }
            Answer::AbortDone if r.aborting => {
                r.aborting = false;
                Event::AbortDone
            }
            Answer::Failed(cause) => {
                r.engine_running &= cause.get(Key::Endpoint).is_none();
                (r.opening, r.publishing) = (false, None);
                (r.releasing, r.hook_running) = (false, false);
                Event::Failed { cause }
            }
            _ => return Ok(()),
        };
        self.feed(rank, event)
    }

    /// The engine answers once its last worker is through.
    fn engine_may_end(&mut self, rank: Rank) {
        let Some(leader) = self.leader(rank) else { return };
        let round = self.processes[rank as usize].round;
        let all = (0..self.count()).filter(|r| self.leader(*r) == Some(leader)).all(|r| {
            let r = &self.rounds[round].ranks[r as usize];
            !r.has_worker || r.hook_done
        });
        if all && !self.is_fault(leader, Fault::EngineHangs { rank: leader }) {
            let wind_up = self.jitter(self.config.costs.wind_up);
            self.answer(leader, wind_up, Answer::EngineDone);
        }
        if all && self.is_fault(leader, Fault::EngineHangs { rank: leader }) {
            self.struck_at.get_or_insert(self.now);
            self.rounds[round].hook_failed = true;
        }
    }

    /// Starts whatever links can carry now.
    pub(super) fn flow(&mut self) {
        for rank in 0..self.count() {
            let me = rank as usize;
            let round = self.processes[me].round;
            if self.processes[me].machine.is_none() {
                continue;
            }
            let model = &self.rounds[round];
            if !self.processes[me].receiving
                && let Some(bucket) = model.can_receive(rank)
            {
                self.receive(rank, round, bucket);
            }
            if !self.processes[me].completing && self.rounds[round].can_complete(rank).is_some() {
                self.processes[me].completing = true;
                let at = self.now + self.jitter(self.config.costs.step) / 10;
                self.schedule(at, What::Complete(rank, round));
            }
        }
    }

    fn receive(&mut self, rank: Rank, round: usize, bucket: u32) {
        if self.is_fault(rank, Fault::ExchangeHangs { rank, bucket }) {
            self.struck_at.get_or_insert(self.now);
            return;
        }
        let plan = self.config.plan.clone();
        let segments = &plan.buckets[bucket as usize].segments;
        let inbound: u64 = segments.iter().filter(|s| s.root != rank).map(|s| s.len_bytes).sum();
        // Own and foreign segments must have been loaded where they come from.
        let loaded = segments
            .iter()
            .map(|s| self.processes[s.root as usize].load_done[bucket as usize])
            .max()
            .unwrap_or_default();
        let jitter = self.jitter(self.config.costs.step);
        let process = &mut self.processes[rank as usize];
        let start = self.now.max(process.net_busy).max(loaded);
        let end = start + transfer(inbound, self.config.costs.net_bytes_per_sec) + jitter;
        process.net_busy = end;
        process.receiving = true;
        self.span(rank, bucket, SpanKind::Exchange, start, end);
        self.schedule(end, What::Receive(rank, round, bucket));
    }

    pub(super) fn completes(&mut self, rank: Rank, round: usize) -> Result<(), Violation> {
        if self.processes[rank as usize].round != round {
            return Ok(());
        }
        self.processes[rank as usize].completing = false;
        let Some((bucket, means_something)) = self.rounds[round].can_complete(rank) else { return Ok(()) };
        self.rounds[round].complete(rank, bucket, means_something);
        self.feed(rank, Event::Exchanged { bucket })
    }
}
