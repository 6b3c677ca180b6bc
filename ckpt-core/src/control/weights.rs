//! What a rank's worker has: the last decided version, and whether a failed update has left its mark.

use serde::{Deserialize, Serialize};

use crate::types::{Epoch, Rank, Version};

/// A version that was decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Installed {
    /// The checkpoint's name.
    pub checkpoint: String,
    /// Its version.
    pub version: Version,
    /// The attempt that installed it.
    pub epoch: Epoch,
}

/// What a failed update has left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MarkKind {
    /// The worker took some buckets of a version that was never decided: old and new weights are mixed.
    Mixed,
    /// The worker took all buckets, and the hub was lost before it told its decision.
    InDoubt,
    /// The version was decided, and this worker's release or post hook failed or never ran.
    Unfinished,
}

/// A worker that was touched by a failed update. The next update that succeeds takes the mark away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// How bad it is.
    pub kind: MarkKind,
    /// What was being installed.
    pub checkpoint: String,
    /// Its version.
    pub version: Version,
    /// The attempt.
    pub epoch: Epoch,
    /// All ranks of that attempt.
    pub members: Vec<Rank>,
    /// Why it failed.
    pub cause: String,
}

/// One rank's worker, as far as parameter servers and hub know. Nobody asks the worker itself: with unmodified workers a
/// commit is a recorded decision, and each post hook takes effect locally.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Weights {
    /// The last version that was decided.
    pub committed: Option<Installed>,
    /// What a later, failed update has left.
    pub mark: Option<Mark>,
}

impl Weights {
    /// Nothing is known.
    pub fn is_unknown(&self) -> bool {
        self.committed.is_none() && self.mark.is_none()
    }

    /// A decision was heard late: a rank in doubt about `epoch` is not in doubt any more.
    pub fn resolve(&mut self, epoch: Epoch, committed: bool) {
        let Some(mark) = self.mark.as_mut().filter(|m| m.kind == MarkKind::InDoubt && m.epoch == epoch)
        else {
            return;
        };
        if committed {
            // Its worker has every byte, and was made to raise before its post hook.
            mark.kind = MarkKind::Unfinished;
            let (checkpoint, version) = (mark.checkpoint.clone(), mark.version);
            self.committed = Some(Installed { checkpoint, version, epoch });
        } else {
            mark.kind = MarkKind::Mixed;
        }
    }

    /// Takes over what the hub remembers, where this rank knows less: after a restart, or in doubt.
    pub fn learn(&mut self, told: &Weights) {
        if self.is_unknown() {
            *self = told.clone();
            return;
        }
        let Some(Mark { kind: MarkKind::InDoubt, epoch, .. }) = self.mark else { return };
        let decided = told.committed.as_ref().is_some_and(|c| c.epoch == epoch);
        let settled = told.mark.as_ref().is_some_and(|m| m.epoch == epoch && m.kind != MarkKind::InDoubt);
        if decided || settled {
            self.resolve(epoch, decided);
        }
    }
}

/// What the hub decided about one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// The attempt.
    pub epoch: Epoch,
    /// All had loaded, so its version is in force; else nothing of it is.
    pub committed: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn in_doubt(epoch: u64) -> Weights {
        let mark = Mark {
            kind: MarkKind::InDoubt,
            checkpoint: "c".into(),
            version: Version(3),
            epoch: Epoch(epoch),
            members: vec![0, 1],
            cause: "the hub is lost".into(),
        };
        Weights { committed: None, mark: Some(mark) }
    }

    #[test]
    fn a_doubt_is_resolved_once_and_only_by_its_own_epoch() {
        let mut weights = in_doubt(7);
        weights.resolve(Epoch(8), true);
        assert_eq!(weights, in_doubt(7));
        weights.resolve(Epoch(7), true);
        assert_eq!(weights.mark.as_ref().unwrap().kind, MarkKind::Unfinished);
        assert_eq!(weights.committed.as_ref().unwrap().version, Version(3));
        weights.resolve(Epoch(7), false);
        assert_eq!(weights.mark.unwrap().kind, MarkKind::Unfinished, "a decision stands");
        let mut weights = in_doubt(7);
        weights.resolve(Epoch(7), false);
        assert_eq!((weights.mark.unwrap().kind, weights.committed), (MarkKind::Mixed, None));
    }

    #[test]
    fn only_who_knows_less_learns() {
        let told = Weights {
            committed: Some(Installed { checkpoint: "c".into(), version: Version(2), epoch: Epoch(5) }),
            mark: None,
        };
        let mut restarted = Weights::default();
        restarted.learn(&told);
        assert_eq!(restarted, told);
        let mut knows = Weights {
            committed: Some(Installed { checkpoint: "c".into(), version: Version(9), epoch: Epoch(9) }),
            mark: None,
        };
        let before = knows.clone();
        knows.learn(&told);
        assert_eq!(knows, before);
        let mut doubts = in_doubt(5);
        doubts.learn(&told);
        assert_eq!(doubts.mark.unwrap().kind, MarkKind::Unfinished);
    }
}
