//! The update machine: one rank's side of one update, without I/O.

use std::time::Duration;

use super::{Action, Event, Rule};
use crate::{deadlines::Deadlines, types::Rank};

/// What a machine must know before it starts.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// This rank.
    pub rank: Rank,
    /// A worker is fed by this rank.
    pub has_worker: bool,
    /// This rank sends its engine's request.
    pub starts_engine: bool,
    /// The time limits.
    pub deadlines: Deadlines,
    /// Now, on the machine's clock: a `Duration` since any fixed instant. `Join` is sent at or after it.
    pub start: Duration,
    /// Tests only: leave this rule out.
    #[doc(hidden)]
    pub skip: Option<Rule>,
}

impl MachineConfig {
    /// A rank with a worker and without an engine.
    pub fn new(rank: Rank, deadlines: Deadlines, start: Duration) -> Self {
        Self { rank, has_worker: true, starts_engine: false, deadlines, start, skip: None }
    }
}

/// One rank's side of one update.
#[derive(Clone, Debug)]
pub struct UpdateMachine {
    config: MachineConfig,
}

impl UpdateMachine {
    /// A machine that waits for [`Event::Begun`]. The driver sends `Join` itself.
    pub fn new(config: MachineConfig) -> Self {
        Self { config }
    }

    /// What to do next. Handles timeouts first, so that a process that was stopped finds its lease over before it
    /// publishes anything. Call until `None` after every event and timeout.
    pub fn poll_action(&mut self, now: Duration) -> Option<Action> {
        let _ = (now, &self.config);
        None
    }

    /// Tells the machine what happened. Stale and foreign events change nothing.
    pub fn handle_event(&mut self, event: Event, now: Duration) {
        let _ = (event, now);
    }

    /// When [`UpdateMachine::handle_timeout`] must be called next; `None` once ended.
    pub fn poll_timeout(&self) -> Option<Duration> {
        None
    }

    /// Ends what is overdue.
    pub fn handle_timeout(&mut self, now: Duration) {
        let _ = now;
    }

    /// [`Action::End`] was returned.
    pub fn is_ended(&self) -> bool {
        false
    }
}
