//! What ranks and hub say to each other. One update is four agreements:
//! Join/Begin, Ready/Go, Loaded/Committed, Finished/Closed; any Failed before Committed turns into Abort for all.

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::Weights;
use crate::{
    error::Error,
    types::{Epoch, Rank, Version},
};

/// The first message of a session. Its `Debug` hides the token.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Version of this protocol; the hub refuses another.
    pub protocol: u32,
    /// The job; a session of another job on the port is refused.
    pub job: String,
    /// The job's shared secret, compared in constant time.
    pub token: Bytes,
    /// The sender.
    pub rank: Rank,
    /// Ranks of the job.
    pub world_size: u32,
    /// Random per process: tells a restarted rank from a live duplicate.
    pub incarnation: u64,
    /// For messages.
    pub host: String,
    /// For messages.
    pub pid: u32,
}

impl fmt::Debug for Hello {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hello")
            .field("protocol", &self.protocol)
            .field("job", &self.job)
            .field("rank", &self.rank)
            .field("world_size", &self.world_size)
            .field("incarnation", &self.incarnation)
            .field("host", &self.host)
            .field("pid", &self.pid)
            .finish_non_exhaustive()
    }
}

/// A rank's call of `update`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joining {
    /// The registered checkpoint's name; all members must name the same.
    pub checkpoint: String,
    /// The version being installed; all members must agree.
    pub version: Version,
    /// Members of this update, ascending; all callers must name the same. Empty: all ranks of the job.
    pub ranks: Vec<Rank>,
    /// Its device.
    pub device_uuid: String,
    /// Its worker link's endpoint; `None` for a rank without a worker.
    pub endpoint: Option<String>,
    /// Free device memory, bytes.
    pub free_bytes: u64,
    /// The epoch of a healthy communicator over the same members that it still has.
    pub communicator: Option<Epoch>,
    /// From the lowest member only: a fresh group token, used if the communicator must be built.
    pub token: Option<Bytes>,
}

/// What all members learn of each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Who.
    pub rank: Rank,
    /// Its host.
    pub host: String,
    /// Its process.
    pub pid: u32,
    /// Its device.
    pub device_uuid: String,
    /// Its worker link's endpoint.
    pub endpoint: Option<String>,
    /// Free device memory, bytes.
    pub free_bytes: u64,
}

/// Whether the members' communicator can be used again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CommunicatorChoice {
    /// All members still have the one of this epoch.
    Reuse(Epoch),
    /// Join a new one with this token.
    Build(Bytes),
}

/// Rank to hub.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToHub {
    /// First message.
    Hello(Hello),
    /// I am alive; answered with [`ToRank::Alive`].
    Alive,
    /// My part of a gather called `name` (metas, barriers); answered with [`ToRank::Gathered`] when all ranks' came.
    Gather {
        /// Which gather, with a counter in it so that no two are alike.
        name: String,
        /// My part.
        part: Bytes,
    },
    /// I call `update`.
    Join(Joining),
    /// Plan, ring, communicator and worker link are up. Digest of my plan.
    Ready {
        /// The attempt.
        epoch: Epoch,
        /// [`crate::plan::UpdatePlan::digest`].
        plan_digest: u64,
    },
    /// My worker acked every bucket.
    Loaded {
        /// The attempt.
        epoch: Epoch,
    },
    /// My worker's post hook has run, or failed after the commit.
    Finished {
        /// The attempt.
        epoch: Epoch,
        /// What failed after the commit.
        failure: Option<Error>,
    },
    /// I cannot go on; `epoch` is `None` before Begin.
    Failed {
        /// The attempt.
        epoch: Option<Epoch>,
        /// Why.
        cause: Error,
    },
    /// I leave in order.
    Bye,
    /// My worker has mapped the ring, or I have none.
    Opened {
        /// The attempt.
        epoch: Epoch,
    },
    /// What my worker has: after each update, and after joining. Answered only where the hub knows more.
    Weights(Weights),
}

/// Hub to rank.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToRank {
    /// The session is up.
    Welcome {
        /// Interval of [`ToHub::Alive`], milliseconds.
        heartbeat_ms: u64,
        /// Silence after which either side holds the other dead, milliseconds.
        dead_after_ms: u64,
    },
    /// The session is refused; the reason is one line for the user.
    Refused {
        /// Why.
        cause: Error,
    },
    /// Answer to [`ToHub::Alive`]: the sender's lease is valid.
    Alive,
    /// A gather is complete: the parts by rank.
    Gathered {
        /// Which.
        name: String,
        /// One part per rank, ascending.
        parts: Vec<Bytes>,
    },
    /// A gather cannot complete.
    GatherFailed {
        /// Which.
        name: String,
        /// Why: who is missing or dead.
        cause: Error,
    },
    /// All members called `update`.
    Begin {
        /// The attempt.
        epoch: Epoch,
        /// All members, ascending by rank.
        members: Vec<Member>,
        /// Communicator to use.
        communicator: CommunicatorChoice,
    },
    /// All members are ready with equal plans: bytes may move.
    Go {
        /// The attempt.
        epoch: Epoch,
    },
    /// All members have loaded: the version is decided.
    Committed {
        /// The attempt.
        epoch: Epoch,
    },
    /// All members have finished.
    Closed {
        /// The attempt.
        epoch: Epoch,
        /// The first failure after the commit, if any.
        failure: Option<Error>,
    },
    /// The attempt is over; the *first* cause, naming the culprit. `epoch` is `None` before Begin.
    Abort {
        /// The attempt.
        epoch: Option<Epoch>,
        /// Why.
        cause: Error,
    },
    /// All members' workers have mapped their rings: from now on they are given buckets, and a slow bucket is slow and
    /// not waiting for a worker. A member that hears [`ToRank::Abort`] instead knows that no worker was touched.
    AllOpened {
        /// The attempt.
        epoch: Epoch,
    },
    /// What the hub knows of the rank's worker and the rank may not: after a restart, or when it was in doubt.
    Weights(Weights),
    /// A rank has a new session: it has lost the communicators that it was part of.
    Returned {
        /// Who.
        rank: Rank,
    },
}
