//! Gathers: every rank brings a part, every rank gets all parts.

use std::{
    collections::{BTreeMap, VecDeque},
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
    failed: VecDeque<(String, Error)>,
}

#[derive(Clone, Debug)]
pub(super) struct Gather {
    pub parts: BTreeMap<Rank, Bytes>,
    pub since: Duration,
}

impl HubMachine {
    pub(super) fn gather(&mut self, rank: Rank, name: String, part: Bytes, now: Duration) {
        if let Some((_, cause)) = self.gathers.failed.iter().find(|(n, _)| *n == name) {
            let cause = cause.clone();
            return self.send(rank, ToRank::GatherFailed { name, cause });
        }
        let gather = self
            .gathers
            .pending
            .entry(name.clone())
            .or_insert_with(|| Gather { parts: BTreeMap::new(), since: now });
        gather.parts.entry(rank).or_insert(part);
        if gather.parts.len() == self.ranks.len() {
            if let Some(gather) = self.gathers.pending.remove(&name) {
                let parts: Vec<Bytes> = gather.parts.into_values().collect();
                for to in self.all_ranks() {
                    self.send(to, ToRank::Gathered { name: name.clone(), parts: parts.clone() });
                }
            }
        } else if let Some(cause) = self.a_lost_rank() {
            self.fail_gather(&name, cause);
        }
    }

    /// A rank is gone: whatever is being gathered cannot complete. Its part, if there, belongs to a dead process.
    pub(super) fn fail_gathers(&mut self, cause: &Error) {
        let names: Vec<String> = self.gathers.pending.keys().cloned().collect();
        for name in names {
            self.fail_gather(&name, cause.clone());
        }
    }

    pub(super) fn fail_late_gathers(&mut self, now: Duration) {
        let limit = self.config.deadlines.join;
        let late: Vec<(String, Vec<Rank>)> = self
            .gathers
            .pending
            .iter()
            .filter(|(_, g)| g.since.saturating_add(limit) <= now)
            .map(|(name, g)| {
                (name.clone(), self.all_ranks().filter(|r| !g.parts.contains_key(r)).collect::<Vec<_>>())
            })
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
            self.fail_gather(&name, cause);
        }
    }

    fn fail_gather(&mut self, name: &str, cause: Error) {
        if let Some(gather) = self.gathers.pending.remove(name) {
            for rank in gather.parts.into_keys() {
                self.send(rank, ToRank::GatherFailed { name: name.to_owned(), cause: cause.clone() });
            }
            if self.gathers.failed.len() == FAILED_KEPT {
                self.gathers.failed.pop_front();
            }
            self.gathers.failed.push_back((name.to_owned(), cause));
        }
    }
}
