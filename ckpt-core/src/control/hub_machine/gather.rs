//! Gathers: every rank brings a part, every rank gets all parts.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use bytes::Bytes;

use super::{HubMachine, attempt::name_ranks};
use crate::{
    control::ToRank,
    error::{Error, ErrorKind, Key},
    types::Rank,
};

/// How many failed gathers are remembered for their late callers.
const FAILED_KEPT: usize = 64;

#[derive(Clone, Debug, Default)]
pub(super) struct Gathers {
    pub pending: BTreeMap<String, Gather>,
    failed: VecDeque<Failed>,
}

impl Gathers {
    /// `rank` is a new process or has joined anew: it is on its way to no gather of before.
    pub fn owe_nothing_to(&mut self, rank: Rank) {
        self.failed.iter_mut().for_each(|failed| _ = failed.owed.remove(&rank));
    }
}

/// A gather that failed while some ranks were still on their way to it. They hear the same, for a moment: who comes
/// later than that means a new gather, since names need not be unique.
#[derive(Clone, Debug)]
struct Failed {
    name: String,
    cause: Error,
    owed: BTreeSet<Rank>,
    until: Duration,
}

#[derive(Clone, Debug)]
pub(super) struct Gather {
    pub parts: BTreeMap<Rank, Bytes>,
    pub since: Duration,
}

impl HubMachine {
    pub(super) fn gather(&mut self, rank: Rank, name: String, part: Bytes, now: Duration) {
        let mut failed = self.gathers.failed.iter_mut().filter(|f| f.name == name && now < f.until);
        if let Some(cause) = failed.find_map(|f| f.owed.remove(&rank).then(|| f.cause.clone())) {
            return self.send(rank, ToRank::GatherFailed { name, cause });
        }
        let gather = self
            .gathers
            .pending
            .entry(name.clone())
            .or_insert_with(|| Gather { parts: BTreeMap::new(), since: now });
        // A caller that gave up and calls again means its newest part.
        gather.parts.insert(rank, part);
        if !self.complete_gather(&name)
            && let Some(cause) = self.a_lost_rank()
        {
            self.fail_gather(&name, cause, now);
        }
    }

    /// Answers a gather that every rank has called, but for those that left the job: their parts are empty.
    fn complete_gather(&mut self, name: &str) -> bool {
        let Some(gather) = self.gathers.pending.get(name) else { return false };
        let there = |rank: Rank| gather.parts.contains_key(&rank) || self.ranks[rank as usize].left;
        if !self.all_ranks().all(there) {
            return false;
        }
        let part = |rank: Rank| match self.ranks[rank as usize].left {
            true => Bytes::new(),
            false => gather.parts.get(&rank).cloned().unwrap_or_default(),
        };
        let parts: Vec<Bytes> = self.all_ranks().map(part).collect();
        self.gathers.pending.remove(name);
        for to in self.all_ranks() {
            self.send(to, ToRank::Gathered { name: name.to_owned(), parts: parts.clone() });
        }
        true
    }

    /// A rank has left: what only it was missing from is complete.
    pub(super) fn complete_gathers(&mut self) {
        let names: Vec<String> = self.gathers.pending.keys().cloned().collect();
        for name in names {
            self.complete_gather(&name);
        }
    }

    /// A rank is gone: whatever is being gathered cannot complete. Its part, if there, belongs to a dead process.
    pub(super) fn fail_gathers(&mut self, cause: &Error, now: Duration) {
        let names: Vec<String> = self.gathers.pending.keys().cloned().collect();
        for name in names {
            self.fail_gather(&name, cause.clone(), now);
        }
    }

    pub(super) fn fail_late_gathers(&mut self, now: Duration) {
        let limit = self.config.deadlines.join;
        let late: Vec<(String, Vec<Rank>)> = self
            .gathers
            .pending
            .iter()
            .filter(|(_, g)| g.since.saturating_add(limit) <= now)
            .map(|(name, g)| (name.clone(), self.missing_from(g)))
            .collect();
        for (name, missing) in late {
            let text = format!(
                "{} did not take part in {name} within {} s",
                name_ranks(&missing),
                limit.as_secs_f64()
            );
            let mut cause = Error::new(ErrorKind::Timeout, "gather", text);
            if let Some(rank) = missing.first() {
                cause = cause.with(Key::Rank, rank);
            }
            self.fail_gather(&name, cause, now);
        }
    }

    fn missing_from(&self, gather: &Gather) -> Vec<Rank> {
        self.all_ranks().filter(|r| !gather.parts.contains_key(r) && !self.ranks[*r as usize].left).collect()
    }

    fn fail_gather(&mut self, name: &str, cause: Error, now: Duration) {
        if let Some(gather) = self.gathers.pending.remove(name) {
            let owed = self.missing_from(&gather).into_iter().collect();
            for rank in gather.parts.into_keys() {
                self.send(rank, ToRank::GatherFailed { name: name.to_owned(), cause: cause.clone() });
            }
            if self.gathers.failed.len() == FAILED_KEPT {
                self.gathers.failed.pop_front();
            }
            let until = now.saturating_add(self.config.deadlines.dead_after);
            self.gathers.failed.push_back(Failed { name: name.to_owned(), cause, owed, until });
        }
    }
}
