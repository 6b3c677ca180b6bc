//! The laws that are about the end.

use std::time::Duration;

use super::SimCluster;
use crate::{
    error::{Error, Key},
    testkit::{Fault, Law, Violation, WorkerStep, model::End},
    types::Rank,
    update::Outcome,
};

/// The rank that a cause must name.
fn culprit(fault: Fault) -> Option<Rank> {
    match fault {
        Fault::RankDies { rank, .. }
        | Fault::WorkerFails { rank, .. }
        | Fault::WorkerHangs { rank, .. }
        | Fault::EngineFails { rank }
        | Fault::EngineEarly { rank }
        | Fault::EngineHangs { rank }
        | Fault::Freeze { rank, .. }
        | Fault::Partition { rank }
        | Fault::PrepareHangs { rank }
        | Fault::NeverCalls { rank } => Some(rank),
        _ => None,
    }
}

impl SimCluster {
    /// Longer than any fault may take; what has not ended then never will.
    pub(super) fn patience(&self) -> Duration {
        let d = &self.config.deadlines;
        (d.join + d.ready * 2 + d.total * 2 + d.release * 8 + d.dead_after * 8) * 2
    }

    pub(super) fn check_end(&self) -> Result<(), Violation> {
        let fault = self.config.fault.map(|f| f.fault);
        self.check_all_ended(fault)?;
        for (round, model) in self.rounds.iter().enumerate() {
            let ends = || model.ranks.iter().filter(|r| !r.dead).filter_map(|r| r.end);
            let committed = ends().any(|e| matches!(e, End::Committed { .. }));
            if committed && ends().any(|e| e == End::Failed) {
                return Err(Violation::new(Law::Agreement, "some ranks committed and others failed"));
            }
            let doubt = ends().any(|e| e == End::InDoubt);
            let may_doubt = matches!(
                fault,
                Some(
                    Fault::HubDies { .. }
                        | Fault::Partition { .. }
                        | Fault::Freeze { .. }
                        | Fault::MessageLost { .. }
                )
            );
            if doubt && !may_doubt {
                return Err(Violation::new(Law::Agreement, "a rank is in doubt though its hub is there"));
            }
            let healthy = round == 1
                || matches!(fault, None | Some(Fault::Stale { .. } | Fault::SecondCall { .. }))
                || self.struck_at.is_none();
            if healthy && !ends().all(|e| e == End::Committed { well: true }) {
                let causes: Vec<&String> = model.ranks.iter().filter_map(|r| r.cause.as_ref()).collect();
                return Err(Violation::new(
                    Law::Progress,
                    format!("update {round} did not commit well, with nothing wrong: {causes:?}"),
                ));
            }
        }
        self.check_known_everywhere(fault)?;
        self.check_blame(fault)?;
        if self.second_call == Some(false) {
            return Err(Violation::new(Law::OneUpdate, "a second update over a running one was not refused"));
        }
        Ok(())
    }

    fn check_all_ended(&self, fault: Option<Fault>) -> Result<(), Violation> {
        let never = |rank: Rank| fault == Some(Fault::NeverCalls { rank });
        for (rank, process) in (0..).zip(&self.processes) {
            let ended = self.rounds[process.round].ranks[rank as usize].end.is_some();
            let excused = process.dead || (never(rank) && process.round == 0);
            if !ended && !excused {
                return Err(Violation::new(Law::Ends, format!("rank {rank} never ended")));
            }
        }
        let (Some(struck), Some(within)) = (self.struck_at, self.config.ends_within) else { return Ok(()) };
        for (rank, at) in self.report.ended_at.iter().enumerate() {
            let latest = struck + within;
            if at.is_some_and(|at| at > latest) {
                return Err(Violation::new(
                    Law::Ends,
                    format!(
                        "rank {rank} ended at {at:?}, later than {latest:?} ({:?})",
                        self.report.outcomes[rank]
                    ),
                ));
            }
        }
        Ok(())
    }

    /// A worker or engine that failed after the commit is a failure on every rank that still hears the hub.
    fn check_known_everywhere(&self, fault: Option<Fault>) -> Result<(), Violation> {
        let late = match fault {
            Some(Fault::WorkerFails { step, .. } | Fault::WorkerHangs { step, .. }) => {
                matches!(step, WorkerStep::Release | WorkerStep::Hook)
            }
            Some(Fault::EngineHangs { .. }) => true,
            _ => false,
        };
        let well = self.rounds[0].ranks.iter().any(|r| r.end == Some(End::Committed { well: true }));
        if late && self.struck_at.is_some() && well {
            return Err(Violation::new(
                Law::SharedResult,
                "a rank did not hear of a failure after the commit",
            ));
        }
        Ok(())
    }

    fn check_blame(&self, fault: Option<Fault>) -> Result<(), Violation> {
        let Some(culprit) = fault.and_then(culprit).filter(|_| self.struck_at.is_some()) else {
            return Ok(());
        };
        let names = |error: &Error, key: Key| error.get(key) == Some(culprit.to_string().as_str());
        // Nobody saw its connection break, so its peers' links were the first to tell.
        let silent = matches!(fault, Some(Fault::RankDies { fin: false, .. }));
        for (rank, outcome) in self.report.outcomes.iter().enumerate() {
            let cause = match outcome {
                Some(Outcome::Failed { cause }) => cause,
                Some(Outcome::Committed { failure: Some(cause) }) => cause,
                _ => continue,
            };
            let own = self.processes[rank].cut_off;
            let quoted =
                [' ', ']'].iter().any(|end| cause.message().contains(&format!("rank={culprit}{end}")));
            let named = names(cause, Key::Rank) || (silent && names(cause, Key::Peer)) || quoted;
            if !own && !named {
                return Err(Violation::new(
                    Law::Blame,
                    format!("rank {rank} blames another than rank {culprit}: {cause}"),
                ));
            }
        }
        Ok(())
    }
}
