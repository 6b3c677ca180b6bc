//! What the hub remembers of every rank's worker, and the decisions that a rank in doubt asks for.

use super::{HubMachine, attempt::Stage};
use crate::{
    control::{Decision, Mark, MarkKind, ToRank, Weights},
    error::Error,
    types::{Epoch, Rank},
};

/// Decisions that are remembered. A rank asks for one right after it was lost.
const DECISIONS_KEPT: usize = 64;

impl HubMachine {
    /// A rank says what its worker has: after each update, and when it has joined.
    pub(super) fn reported(&mut self, rank: Rank, weights: Weights) {
        let state = &mut self.ranks[rank as usize];
        state.reported = true;
        match (&state.weights, weights.is_unknown()) {
            // A restarted process knows nothing of the worker that it finds; the hub may.
            (Some(known), true) => {
                let known = known.clone();
                self.send(rank, ToRank::Weights(known));
            }
            _ => state.weights = Some(weights),
        }
        self.resolve_doubts();
    }

    /// Tells ranks in doubt how their attempt ended, once that is certain.
    fn resolve_doubts(&mut self) {
        for rank in self.all_ranks() {
            let mark = self.ranks[rank as usize].weights.as_ref().and_then(|w| w.mark.as_ref());
            let Some(mark) = mark.filter(|m| m.kind == MarkKind::InDoubt) else { continue };
            let (epoch, Some(committed)) = (mark.epoch, self.outcome(mark)) else { continue };
            if let Some(weights) = &mut self.ranks[rank as usize].weights {
                weights.resolve(epoch, committed);
                let weights = weights.clone();
                self.send(rank, ToRank::Weights(weights));
            }
        }
    }

    /// How the attempt of `mark` ended. A hub that was restarted asks the members: one that heard the commit is enough,
    /// and without one, all must be there and have loaded.
    fn outcome(&self, mark: &Mark) -> Option<bool> {
        if let Some(decision) = self.decisions.iter().find(|d| d.epoch == mark.epoch) {
            return Some(decision.committed);
        }
        let members = || mark.members.iter().filter_map(|r| self.ranks.get(*r as usize));
        let heard = |w: &Weights| w.committed.as_ref().is_some_and(|c| c.epoch == mark.epoch);
        if members().any(|r| r.weights.as_ref().is_some_and(heard)) {
            return Some(true);
        }
        if members().any(|r| r.session.is_none() || !r.reported) {
            return None;
        }
        let loaded = |w: &Weights| {
            w.mark.as_ref().is_some_and(|m| m.kind == MarkKind::InDoubt && m.epoch == mark.epoch)
        };
        Some(members().all(|r| r.weights.as_ref().is_some_and(loaded)))
    }

    pub(super) fn decided(&mut self, epoch: Epoch, committed: bool) {
        if self.decisions.len() == DECISIONS_KEPT {
            self.decisions.pop_front();
        }
        self.decisions.push_back(Decision { epoch, committed });
        self.undrained_decisions |= committed;
    }

    /// The decisions to be written down before any further message is sent; `None` if there is nothing new in them.
    pub fn poll_decisions(&mut self) -> Option<Vec<Decision>> {
        std::mem::take(&mut self.undrained_decisions).then(|| self.decisions.iter().copied().collect())
    }

    /// A hub that goes on from another one's decisions, with epochs after `epoch` and after theirs.
    #[must_use]
    pub fn going_on(mut self, epoch: Epoch, decisions: Vec<Decision>) -> Self {
        let last = decisions.iter().map(|d| d.epoch).max().unwrap_or_default();
        self.last_epoch = self.last_epoch.max(epoch).max(last);
        self.decisions = decisions.into();
        self
    }

    /// A rank is gone in the middle of an attempt. Its worker lives on, and nobody else can say what it has.
    pub(super) fn mark_of_the_lost(&mut self, rank: Rank, index: usize, cause: &Error) {
        let attempt = &self.attempts[index];
        let kind = match attempt.stage {
            Stage::Moving if attempt.all_in(&attempt.opened) => MarkKind::Mixed,
            Stage::Committed if !attempt.finished.contains(&rank) => MarkKind::Unfinished,
            _ => return,
        };
        let has_worker = attempt.joined.get(&rank).is_some_and(|j| j.endpoint.is_some());
        if let (Some(epoch), true) = (attempt.epoch, has_worker) {
            let mark = Mark {
                kind,
                checkpoint: attempt.checkpoint.clone(),
                version: attempt.version,
                epoch,
                members: attempt.ranks.clone(),
                cause: cause.to_string(),
            };
            self.ranks[rank as usize].weights.get_or_insert_default().mark = Some(mark);
        }
    }
}
