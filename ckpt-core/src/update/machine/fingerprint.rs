//! What tells two machines apart when no time passes: for searches that must not visit a state twice.

use std::hash::{Hash, Hasher};

use super::UpdateMachine;

impl UpdateMachine {
    /// Feeds everything but times. Only for drained machines: pending actions are not part of it.
    #[doc(hidden)]
    pub fn fingerprint(&self, state: &mut impl Hasher) {
        debug_assert!(self.queue.is_empty(), "poll_action is called until None before a state is compared");
        (self.stage, self.epoch, self.sink, self.engine).hash(state);
        (self.written, &self.unloaded, self.published, self.acked, self.freed).hash(state);
        self.waits_for.len().hash(state);
        self.exchanged.hash(state);
        (self.all_opened.is_some(), self.committed.is_some(), self.reported.is_some()).hash(state);
        (self.aborted, self.abort_done, self.hub_settled, self.in_doubt).hash(state);
        self.closed.is_some().hash(state);
        for error in [&self.failure, &self.hub_gone] {
            error.as_ref().map(|e| (e.kind(), e.message())).hash(state);
        }
    }
}
