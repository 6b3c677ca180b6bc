//! How attempts end without a commit, and what the hub does when ranks are lost or late.

use std::time::Duration;

use super::{
    HubMachine,
    attempt::{Attempt, Stage, is_echo, is_symptom, join_ranks, name_ranks},
};
use crate::{
    control::ToRank,
    error::{Error, ErrorKind, Key},
    types::{Epoch, Rank},
    update::{Rule, close_after},
};

/// What [`HubMachine::lose`] is told of a rank that said goodbye.
pub(super) const LEFT: &str = "it left the job";

impl HubMachine {
    pub(super) fn failed(&mut self, rank: Rank, epoch: Option<Epoch>, cause: Error, now: Duration) {
        let index = match epoch {
            Some(epoch) => self.find(rank, epoch),
            // Before Begin, as far as that rank knew; only an update that it has called itself is meant.
            None => self.attempts.iter().position(|a| a.joined.contains_key(&rank)),
        };
        let Some(index) = index else { return };
        let cause = self.with_culprit(rank, cause);
        let until = now.saturating_add(self.patience());
        let attempt = &mut self.attempts[index];
        let waits = is_symptom(&cause) || (attempt.suspect.is_some() && is_echo(&cause));
        if attempt.stage == Stage::Committed {
            attempt.failure.get_or_insert(cause);
        } else if waits && self.keeps(Rule::HubSymptomsWait) {
            self.attempts[index].suspect.get_or_insert((cause, until));
        } else {
            self.abort(index, cause);
        }
    }

    /// How long a symptom waits for its cause.
    pub(super) fn patience(&self) -> Duration {
        self.config.deadlines.heartbeat.min(self.config.deadlines.dead_after / 2)
    }

    /// Adds rank, host and pid of whoever is to blame: the rank that the error names, else its sender.
    pub(super) fn with_culprit(&self, sender: Rank, cause: Error) -> Error {
        let cause = cause.with(Key::Rank, sender);
        let named: Option<Rank> = cause.get(Key::Rank).and_then(|r| r.parse().ok());
        match named.and_then(|r| self.ranks.get(r as usize)).and_then(|r| r.was.clone()) {
            Some((host, pid)) => cause.with(Key::Host, host).with(Key::Pid, pid),
            None => cause,
        }
    }

    /// The end of an attempt that was not committed: all who called hear the same cause.
    pub(super) fn abort(&mut self, index: usize, cause: Error) {
        let attempt = self.attempts.remove(index);
        let cause = cause.flattened();
        if let Some(epoch) = attempt.epoch {
            self.decided(epoch, false);
        }
        for rank in attempt.joined.keys() {
            self.send(*rank, ToRank::Abort { epoch: attempt.epoch, cause: cause.clone() });
        }
    }

    pub(super) fn lose(&mut self, rank: Rank, what: &str, cause: Option<Error>, now: Duration) {
        let Some(session) = self.ranks.get_mut(rank as usize).and_then(|r| r.session.take()) else { return };
        let mut error = Error::new(
            ErrorKind::PeerLost,
            "update",
            match what {
                LEFT => format!("rank {rank} is gone: {what}; gather metas again to go on without it"),
                _ => format!(
                    "rank {rank} is gone: {what}; restart it, register its checkpoint, and call again"
                ),
            },
        )
        .with(Key::Rank, rank)
        .with(Key::Host, session.host)
        .with(Key::Pid, session.pid);
        if let Some(cause) = cause {
            error = error.caused_by(cause);
        }
        let error = error.flattened();
        self.ranks[rank as usize].lost = Some(error.clone());
        self.out.retain(|(to, _)| *to != rank);
        let mut index = 0;
        while index < self.attempts.len() {
            if self.attempts[index].ranks.contains(&rank) {
                self.mark_of_the_lost(rank, index, &error);
            }
            let attempt = &mut self.attempts[index];
            if !attempt.ranks.contains(&rank) {
                index += 1;
            } else if attempt.stage != Stage::Committed {
                self.abort(index, error.clone());
            } else {
                // A rank that had finished took nothing with it that this update still needs.
                if attempt.finished.insert(rank) {
                    attempt.failure.get_or_insert(error.clone());
                }
                if attempt.all_in(&attempt.finished) {
                    self.close_attempt(index);
                } else {
                    index += 1;
                }
            }
        }
        if what != LEFT {
            self.fail_gathers(&error, now);
        }
        self.clock = self.clock.max(now);
    }

    /// The first rank, if any, that was here and is gone.
    pub(super) fn a_lost_rank(&self) -> Option<Error> {
        self.ranks.iter().filter(|r| !r.left).find_map(|r| r.lost.clone())
    }

    /// When the hub's patience ends. Longer than the ranks' own limits, so that a rank with trouble names it itself.
    pub(super) fn attempt_ends(&self, attempt: &Attempt) -> Duration {
        let d = &self.config.deadlines;
        let limit = match attempt.stage {
            Stage::Joining => d.join,
            Stage::Preparing => d.ready.saturating_add(d.dead_after),
            Stage::Moving => d.total.saturating_add(d.dead_after),
            Stage::Committed => close_after(d),
        };
        let end = attempt.since.saturating_add(limit);
        match &attempt.suspect {
            Some((_, until)) if attempt.stage != Stage::Committed => end.min(*until),
            _ => end,
        }
    }

    pub(super) fn end_overdue(&mut self, index: usize) {
        let d = self.config.deadlines;
        let attempt = &self.attempts[index];
        if let (Some((suspect, _)), true) = (&attempt.suspect, attempt.stage != Stage::Committed) {
            let cause = suspect.clone();
            return self.abort(index, cause);
        }
        let (missing, what, limit) = match attempt.stage {
            Stage::Joining => (attempt.missing(|r| attempt.joined.get(&r)), "never called update", d.join),
            Stage::Preparing => (attempt.missing(|r| attempt.digests.get(&r)), "did not get ready", d.ready),
            Stage::Moving => {
                (attempt.missing(|r| attempt.loaded.get(&r)), "did not load all buckets", d.total)
            }
            Stage::Committed => (
                attempt.missing(|r| attempt.finished.get(&r)),
                "did not finish after the commit",
                close_after(&d),
            ),
        };
        let absent: Vec<Rank> = missing.iter().copied().filter(|r| !self.is_connected(*r)).collect();
        let mut text = format!("{} {what} within {} s", name_ranks(&missing), limit.as_secs_f64());
        if !absent.is_empty() {
            text = format!("{text} (not connected: {})", join_ranks(&absent));
        }
        let mut cause = Error::new(ErrorKind::Timeout, "update", text);
        if let Some(first) = missing.first() {
            cause = self.with_culprit(*first, cause);
        }
        if attempt.stage == Stage::Committed {
            self.attempts[index].failure.get_or_insert(cause);
            self.close_attempt(index);
        } else {
            self.abort(index, cause);
        }
    }
}
