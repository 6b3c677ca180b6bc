//! Failing: before the commit nothing stays, after Loaded the hub decides, after the commit it is only told.

use std::time::Duration;

use super::{Stage, UpdateMachine};
use crate::{
    error::{Error, ErrorKind, Key},
    types::Epoch,
    update::{Action, Outcome, Rule},
};

impl UpdateMachine {
    /// Something of this rank's failed.
    pub(super) fn fail(&mut self, cause: Error, now: Duration) {
        let cause = cause.with(Key::Rank, self.config.rank);
        match self.stage {
            Stage::Joining | Stage::Preparing | Stage::Ready | Stage::Moving => {
                self.queue.clear();
                self.report(cause.clone(), now);
                self.fall(cause, now);
            }
            Stage::Loaded => {
                // All may have loaded and the hub decided: only its answer says which way this attempt went.
                if self.failure.is_none() {
                    self.report(cause.clone(), now);
                    self.failure = Some(cause.clone());
                    if !self.keeps(Rule::HoldAfterLoaded) {
                        self.fall(cause, now);
                    }
                }
            }
            Stage::Releasing | Stage::PostHook => {
                self.queue.clear();
                self.failure.get_or_insert(cause.clone());
                self.settle(cause, now);
            }
            Stage::Engine => {
                self.failure.get_or_insert(cause);
                self.finish(now);
            }
            Stage::Settling | Stage::Finished => {
                self.failure.get_or_insert(cause);
            }
            Stage::Failing => {
                if !self.keeps(Rule::AbortOnce) {
                    self.aborted = false;
                    self.abort_local(cause);
                }
            }
            Stage::Ended => {}
        }
    }

    pub(super) fn report(&mut self, cause: Error, now: Duration) {
        if self.reported.is_none() {
            self.reported = Some(now);
            self.queue.push_back(Action::SendFailed { epoch: self.epoch, cause });
        }
    }

    /// Nothing of this attempt will be published here any more.
    pub(super) fn fall(&mut self, cause: Error, now: Duration) {
        self.enter(Stage::Failing, now);
        self.failure = Some(cause.clone());
        self.abort_local(cause);
    }

    pub(super) fn abort_local(&mut self, cause: Error) {
        if !self.aborted {
            self.aborted = true;
            self.queue.push_back(Action::AbortLocal { cause });
        }
    }

    pub(super) fn hub_aborted(&mut self, epoch: Option<Epoch>, cause: Error, now: Duration) {
        let crossed = self.stage == Stage::Failing && (self.epoch.is_none() || epoch.is_none());
        if epoch != self.epoch && !crossed && self.keeps(Rule::ForeignEpoch) {
            return;
        }
        match self.stage {
            Stage::Joining | Stage::Preparing | Stage::Ready | Stage::Moving | Stage::Loaded => {
                self.hub_settled = true;
                self.queue.clear();
                self.fall(cause, now);
            }
            Stage::Failing => {
                self.hub_settled = true;
                if self.keeps(Rule::FirstCause) && !self.in_doubt {
                    self.failure = Some(cause);
                }
                self.maybe_end(now);
            }
            // Decided: what comes after is told with Closed.
            _ => {}
        }
    }

    pub(super) fn hub_lost(&mut self, cause: Error, now: Duration) {
        match self.stage {
            Stage::Joining | Stage::Preparing | Stage::Ready | Stage::Moving => {
                self.hub_settled = true;
                self.queue.clear();
                self.fall(cause.with(Key::Rank, self.config.rank), now);
            }
            Stage::Loaded => self.doubt(cause, now),
            Stage::Failing => {
                self.hub_settled = true;
                self.maybe_end(now);
            }
            Stage::Releasing | Stage::PostHook | Stage::Settling | Stage::Engine => {
                self.hub_gone.get_or_insert(cause);
            }
            Stage::Finished => self.end_committed(Some(cause), now),
            Stage::Ended => {}
        }
    }

    /// Everything is loaded and the decision cannot be heard.
    pub(super) fn doubt(&mut self, cause: Error, now: Duration) {
        self.in_doubt = self.keeps(Rule::DoubtWithoutHub);
        self.hub_settled = true;
        self.fall(cause.with(Key::Rank, self.config.rank), now);
    }

    pub(super) fn maybe_end(&mut self, now: Duration) {
        if self.abort_done && self.hub_settled {
            self.end_failed(now);
        }
    }

    pub(super) fn end_failed(&mut self, now: Duration) {
        let cause = match self.failure.take() {
            Some(cause) => cause,
            None => self.error(ErrorKind::Internal, "the update failed without a cause"),
        };
        let outcome = if self.in_doubt { Outcome::InDoubt { cause } } else { Outcome::Failed { cause } };
        self.end(outcome, now);
    }

    pub(super) fn end(&mut self, outcome: Outcome, now: Duration) {
        self.enter(Stage::Ended, now);
        self.queue.push_back(Action::End(outcome));
    }
}
