//! What can be made to go wrong, and what can be left out.

use std::time::Duration;

use crate::{types::Rank, update::Rule};

/// Where a worker fails or hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WorkerStep {
    /// Mapping the ring.
    Open,
    /// Taking this bucket.
    Bucket(u32),
    /// Dropping the ring.
    Release,
    /// Its post hook.
    Hook,
}

/// One thing that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The rank's process is killed; with `fin` the hub's connection breaks at once, else it only goes silent.
    RankDies {
        /// Who.
        rank: Rank,
        /// The connection is seen to break.
        fin: bool,
    },
    /// The hub is killed.
    HubDies {
        /// The connections are seen to break.
        fin: bool,
    },
    /// The worker answers with an error.
    WorkerFails {
        /// Whose.
        rank: Rank,
        /// When.
        step: WorkerStep,
    },
    /// The worker never answers.
    WorkerHangs {
        /// Whose.
        rank: Rank,
        /// When.
        step: WorkerStep,
    },
    /// The engine's request ends with an error.
    EngineFails {
        /// The rank that sent it.
        rank: Rank,
    },
    /// The engine's request ends well long before it should.
    EngineEarly {
        /// The rank that sent it.
        rank: Rank,
    },
    /// The engine's request never ends.
    EngineHangs {
        /// The rank that sent it.
        rank: Rank,
    },
    /// The rank's process is stopped and goes on later.
    Freeze {
        /// Who.
        rank: Rank,
        /// How long.
        duration: Duration,
    },
    /// Nothing passes between rank and hub any more, in either direction.
    Partition {
        /// Who.
        rank: Rank,
    },
    /// A link of the rank's breaks: completions "succeed" over garbage, and a little later the driver reports it.
    LinkBreaks {
        /// Who.
        rank: Rank,
    },
    /// A bucket never arrives at this rank, and nothing says so.
    ExchangeHangs {
        /// Who.
        rank: Rank,
        /// Which.
        bucket: u32,
    },
    /// The driver never finishes preparing.
    PrepareHangs {
        /// Who.
        rank: Rank,
    },
    /// The rank computes another plan.
    PlanDiffers {
        /// Who.
        rank: Rank,
    },
    /// The rank never calls update.
    NeverCalls {
        /// Who.
        rank: Rank,
    },
    /// The rank names another version.
    OtherVersion {
        /// Who.
        rank: Rank,
    },
    /// Messages of an older attempt reach this rank.
    Stale {
        /// Who.
        rank: Rank,
    },
    /// The nth message from the hub to this rank, heartbeats aside, is lost. TCP does not do that; a mistake in a hub
    /// could, and no rank may hang for it.
    MessageLost {
        /// Who.
        rank: Rank,
        /// Which.
        nth: u32,
    },
    /// A rank calls a second update over itself and the others while the first runs.
    SecondCall {
        /// Who.
        rank: Rank,
    },
}

/// A fault and when it strikes (if it is not tied to a step).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimedFault {
    /// When, in virtual time.
    pub at: Duration,
    /// What.
    pub fault: Fault,
}

/// A rule left out on purpose, wherever it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Skip {
    /// A rule of the update machine or the hub.
    Rule(Rule),
    /// Driver: a completion counts only if the communicator is healthy after it was seen.
    PoisonCheck,
    /// One-sided transports: a root reports a bucket only when all pullers have read it.
    PullersDone,
}

impl Skip {
    /// The rule, if the machine or the hub keeps it.
    pub fn rule(self) -> Option<Rule> {
        match self {
            Skip::Rule(rule) => Some(rule),
            Skip::PoisonCheck | Skip::PullersDone => None,
        }
    }
}
