//! What tells two hubs apart when no time passes: for searches that must not visit a state twice.

use std::hash::{Hash, Hasher};

use super::{HubMachine, attempt::Stage};

impl HubMachine {
    /// Feeds everything but times and gathers. Only for drained hubs: pending messages are not part of it.
    #[doc(hidden)]
    pub fn fingerprint(&self, state: &mut impl Hasher) {
        debug_assert!(self.out.is_empty(), "poll_message is called until None before a state is compared");
        self.last_epoch.hash(state);
        for rank in &self.ranks {
            (rank.session.is_some(), rank.lost.is_some()).hash(state);
        }
        for a in &self.attempts {
            (a.epoch, a.stage, &a.ranks, &a.digests).hash(state);
            (&a.opened, &a.loaded, &a.finished).hash(state);
            for rank in a.joined.keys() {
                rank.hash(state);
            }
            for error in [&a.failure, &a.suspect.as_ref().map(|(e, _)| e.clone())] {
                error.as_ref().map(|e| (e.kind(), e.message())).hash(state);
            }
        }
    }

    /// A symptom waits for its cause.
    #[doc(hidden)]
    pub fn weighs_a_symptom(&self) -> bool {
        self.attempts.iter().any(|a| a.suspect.is_some() && a.stage != Stage::Committed)
    }
}
