//! The hub's side of all updates and gathers, without I/O.

use std::time::Duration;

use super::{Hello, ToHub, ToRank};
use crate::{
    deadlines::Deadlines,
    error::{Error, Result},
    types::{Epoch, Rank, Version},
    update::Rule,
};

/// What a hub must know before it starts.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// Ranks of the job.
    pub world_size: u32,
    /// The time limits.
    pub deadlines: Deadlines,
    /// Tests only: leave this rule out.
    #[doc(hidden)]
    pub skip: Option<Rule>,
}

impl HubConfig {
    /// For a job of `world_size` ranks.
    pub fn new(world_size: u32, deadlines: Deadlines) -> Self {
        Self { world_size, deadlines, skip: None }
    }
}

/// One rank, as the hub sees it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct RankStatus {
    /// Who.
    pub rank: Rank,
    /// It has a session now.
    pub connected: bool,
    /// Its host, once known.
    pub host: Option<String>,
    /// Its process, once known.
    pub pid: Option<u32>,
}

/// One update that is being gathered or runs.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct AttemptStatus {
    /// The attempt's number, once begun.
    pub epoch: Option<Epoch>,
    /// What is installed.
    pub checkpoint: String,
    /// Its version.
    pub version: Version,
    /// The ranks that receive, ascending.
    pub ranks: Vec<Rank>,
    /// `joining`, `preparing`, `moving`, `committed`.
    pub stage: &'static str,
}

/// The hub, as a pure state machine for `world_size` ranks.
#[derive(Clone, Debug)]
pub struct HubMachine {
    config: HubConfig,
}

impl HubMachine {
    /// A hub that nobody has connected to.
    pub fn new(config: HubConfig) -> Self {
        Self { config }
    }

    /// A session said hello; job, token and protocol version were checked by the caller. On `Ok` a
    /// [`ToRank::Welcome`] is queued; on `Err` the caller answers [`ToRank::Refused`] and closes that connection,
    /// and must not report its end with [`HubMachine::disconnected`].
    pub fn connected(&mut self, rank: Rank, hello: Hello, now: Duration) -> Result<()> {
        let _ = (rank, hello, now, &self.config);
        Ok(())
    }

    /// The rank's session ended. Harmless for a rank that has none.
    pub fn disconnected(&mut self, rank: Rank, cause: Error, now: Duration) {
        let _ = (rank, cause, now);
    }

    /// A message of a connected rank.
    pub fn handle(&mut self, rank: Rank, message: ToHub, now: Duration) {
        let _ = (rank, message, now);
    }

    /// The next message to send. Call until `None` after every other call.
    pub fn poll_message(&mut self) -> Option<(Rank, ToRank)> {
        None
    }

    /// A rank whose session must be closed (silent for too long, or said [`ToHub::Bye`]), after its messages were
    /// sent. It counts as disconnected already.
    pub fn poll_close(&mut self) -> Option<Rank> {
        None
    }

    /// When [`HubMachine::handle_timeout`] must be called next.
    pub fn poll_timeout(&self) -> Option<Duration> {
        None
    }

    /// Ends what is overdue.
    pub fn handle_timeout(&mut self, now: Duration) {
        let _ = now;
    }

    /// All ranks of the job, ascending.
    pub fn members(&self) -> Vec<RankStatus> {
        Vec::new()
    }

    /// The updates under way.
    pub fn attempts(&self) -> Vec<AttemptStatus> {
        Vec::new()
    }
}
