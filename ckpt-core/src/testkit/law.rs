//! What must hold in every run.

use std::fmt;

/// A law of the update. `docs/ARCHITECTURE.md` states them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Law {
    /// No byte moves before all ranks are ready with equal plans.
    NoMoveBeforeAgreement,
    /// A ring byte is never written before each of its readers has released it.
    NoOverwrite,
    /// What is published are the bucket's bytes, from the moment of publishing until the ack.
    NoGarbage,
    /// A worker is asked one thing at a time, and only after it mapped the ring.
    Lockstep,
    /// No worker is given a bucket before every worker has mapped its ring.
    Together,
    /// Nothing is published after this rank's epoch was aborted.
    NoPublishAfterAbort,
    /// Nothing is published by a rank that the hub may hold dead.
    Fence,
    /// Ring bytes are not freed while somebody reads them.
    NoEarlyFree,
    /// Loaded, Committed, release, post hook, Finished: none before what it stands for.
    NoEarlyWord,
    /// All ranks end alike: none as failed and another as committed.
    Agreement,
    /// A failure after the commit is known to all ranks, and a success is one on all.
    SharedResult,
    /// All ranks name the first cause.
    FirstCause,
    /// The culprit is named.
    Blame,
    /// An epoch is aborted once and reported once.
    AbortOnce,
    /// Every rank ends, by its deadlines and in bounded steps.
    Ends,
    /// A healthy update, and the next one after a failure, commits.
    Progress,
    /// A rank is in one update at a time.
    OneUpdate,
}

/// A broken law.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub law: Law,
    /// Who did what.
    pub what: String,
}

impl Violation {
    pub(crate) fn new(law: Law, what: impl Into<String>) -> Self {
        Self { law, what: what.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.law, self.what)
    }
}
