//! Timelines of the last attempts, for whoever wants to see where the time went.

use std::collections::VecDeque;

use super::ParameterServer;
use crate::{
    error::Error,
    types::{Epoch, Version},
    update::trace::{Timeline, Trace},
};

/// The last attempts, the newest last.
#[derive(Debug, Default)]
pub(super) struct Timelines {
    kept: VecDeque<Timeline>,
    limit: usize,
}

impl Timelines {
    /// Takes down how an attempt went.
    pub(super) fn add(
        &mut self,
        checkpoint: &str,
        version: Version,
        epoch: Option<Epoch>,
        trace: &Trace,
        failure: Option<&Error>,
    ) {
        if self.limit == 0 {
            return;
        }
        if self.kept.len() == self.limit {
            self.kept.pop_front();
        }
        let took = trace.now();
        self.kept.push_back(Timeline {
            checkpoint: checkpoint.to_owned(),
            version,
            epoch,
            began: trace.began(),
            took,
            spans: trace.spans(),
            failure: failure.map(|error| (trace.failed_at().unwrap_or(took), error.clone())),
        });
    }
}

impl ParameterServer {
    /// Keeps the timelines of the last `count` attempts, failed ones too, until they are taken; at first none.
    pub fn keep_timelines(&mut self, count: usize) {
        self.timelines = Timelines { limit: count, ..Timelines::default() };
    }

    /// Takes what [`Self::keep_timelines`] has kept, the oldest first.
    pub fn take_timelines(&mut self) -> Vec<Timeline> {
        std::mem::take(&mut self.timelines.kept).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_attempts_are_kept_and_only_if_wanted() {
        let add = |timelines: &mut Timelines, version| {
            timelines.add("model", Version(version), None, &Trace::default(), None);
        };
        let mut none = Timelines::default();
        add(&mut none, 1);
        assert!(none.kept.is_empty());
        let mut two = Timelines { limit: 2, ..Timelines::default() };
        (1..=4).for_each(|version| add(&mut two, version));
        assert_eq!(two.kept.iter().map(|t| t.version.0).collect::<Vec<_>>(), [3, 4]);
    }
}
