//! One update as the hub sees it, and the pure decisions on it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use bytes::Bytes;

use super::super::{CommunicatorChoice, Joining};
use crate::{
    error::{Error, ErrorKind, Key, Recovery, Result},
    types::{Epoch, Rank, Version},
};

/// Where an update stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Stage {
    /// Until all members called.
    Joining,
    /// Until all are ready.
    Preparing,
    /// Until all have loaded.
    Moving,
    /// Until all have finished.
    Committed,
}

impl Stage {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Stage::Joining => "joining",
            Stage::Preparing => "preparing",
            Stage::Moving => "moving",
            Stage::Committed => "committed",
        }
    }
}

/// One update.
#[derive(Clone, Debug)]
pub(super) struct Attempt {
    pub epoch: Option<Epoch>,
    pub checkpoint: String,
    pub version: Version,
    pub ranks: Vec<Rank>,
    pub stage: Stage,
    /// When the first member called; then when it began; then when it was committed.
    pub since: Duration,
    pub joined: BTreeMap<Rank, Joining>,
    pub digests: BTreeMap<Rank, u64>,
    pub opened: BTreeSet<Rank>,
    pub loaded: BTreeSet<Rank>,
    pub finished: BTreeSet<Rank>,
    /// The first failure after the commit.
    pub failure: Option<Error>,
    /// A failure that looks like the consequence of another, and until when its cause may still come.
    pub suspect: Option<(Error, Duration)>,
}

impl Attempt {
    pub(super) fn new(joining: &Joining, ranks: Vec<Rank>, now: Duration) -> Self {
        Self {
            epoch: None,
            checkpoint: joining.checkpoint.clone(),
            version: joining.version,
            ranks,
            stage: Stage::Joining,
            since: now,
            joined: BTreeMap::new(),
            digests: BTreeMap::new(),
            opened: BTreeSet::new(),
            loaded: BTreeSet::new(),
            finished: BTreeSet::new(),
            failure: None,
            suspect: None,
        }
    }

    pub(super) fn overlaps(&self, ranks: &[Rank]) -> bool {
        ranks.iter().any(|r| self.ranks.contains(r))
    }

    /// The members that are not in `there`.
    pub(super) fn missing<T>(&self, there: impl Fn(Rank) -> Option<T>) -> Vec<Rank> {
        self.ranks.iter().copied().filter(|r| there(*r).is_none()).collect()
    }

    pub(super) fn all_in(&self, set: &BTreeSet<Rank>) -> bool {
        self.ranks.iter().all(|r| set.contains(r))
    }

    /// Reuse the communicator only if all members still have the same; else build with the lowest member's token.
    pub(super) fn communicator(&self) -> Result<CommunicatorChoice> {
        let mut kept = self.joined.values().map(|j| j.communicator);
        let first = kept.next().flatten();
        if let Some(epoch) = first
            && kept.all(|k| k == first)
        {
            return Ok(CommunicatorChoice::Reuse(epoch));
        }
        let lowest = self.joined.first_key_value();
        let token: Option<Bytes> = lowest.and_then(|(_, j)| j.token.clone());
        token.map(CommunicatorChoice::Build).ok_or_else(|| {
            // Ranks drop what they kept after a failure, so the next call builds.
            let error = Error::new(
                ErrorKind::PeerLost,
                "begin update",
                "some member has lost the communicator that the lowest one kept; call update again",
            )
            .recovery_is(Recovery::Retry);
            match lowest {
                Some((rank, _)) => error.with(Key::Rank, rank),
                None => error,
            }
        })
    }

    /// All plans are equal; else an error that names the first rank whose plan differs from the lowest member's.
    pub(super) fn compare_plans(&self) -> Result<()> {
        let Some((first, digest)) = self.digests.first_key_value() else { return Ok(()) };
        match self.digests.iter().find(|(_, d)| *d != digest) {
            None => Ok(()),
            Some((rank, other)) => Err(Error::new(
                ErrorKind::ConfigInvalid,
                "compare plans",
                format!(
                    "rank {first} planned {digest:016x} and rank {rank} planned {other:016x}; start all ranks with the \
                     same program, checkpoint and settings"
                ),
            )
            .with(Key::Rank, rank)),
        }
    }

    /// Whether a caller means this update; the error names both sides' wishes.
    pub(super) fn agrees_with(&self, rank: Rank, joining: &Joining, ranks: &[Rank]) -> Result<()> {
        let there = self.joined.keys().next().copied().unwrap_or(rank);
        let differ = |what: &str, a: String, b: String| {
            Err(Error::new(
                ErrorKind::ConfigInvalid,
                "join update",
                format!("rank {there} updates {what} {a} and rank {rank} {b}; all ranks must name the same"),
            )
            .with(Key::Rank, rank))
        };
        if self.ranks != ranks {
            return differ("ranks", format!("{:?}", self.ranks), format!("{ranks:?}"));
        }
        if self.checkpoint != joining.checkpoint {
            return differ("checkpoint", self.checkpoint.clone(), joining.checkpoint.clone());
        }
        if self.version != joining.version {
            return differ("version", self.version.to_string(), joining.version.to_string());
        }
        Ok(())
    }
}

/// `rank 3`, `ranks 5, 6`.
pub(super) fn name_ranks(ranks: &[Rank]) -> String {
    match ranks {
        [one] => format!("rank {one}"),
        many => format!("ranks {}", join_ranks(many)),
    }
}

/// `5, 6`.
pub(super) fn join_ranks(ranks: &[Rank]) -> String {
    ranks.iter().map(Rank::to_string).collect::<Vec<_>>().join(", ")
}

/// "My link to a peer broke" is what the others see when one rank fails: its own words are the cause.
pub(super) fn is_symptom(cause: &Error) -> bool {
    cause.kind() == ErrorKind::Aborted
        || (cause.kind() == ErrorKind::PeerLost
            && cause.get(Key::Peer).is_some()
            && cause.get(Key::Worker).is_none())
}

/// An engine whose worker was made to raise answers with an error: no news once a rank has reported something.
pub(super) fn is_echo(cause: &Error) -> bool {
    cause.get(Key::Endpoint).is_some() && cause.get(Key::Worker).is_none()
}
