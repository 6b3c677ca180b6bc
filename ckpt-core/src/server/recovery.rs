//! What a failed update leaves behind, and the ways back: the record of what the worker has, the last version kept, and
//! the job joined again.

use std::{sync::Arc, time::Duration};

use super::{ParameterServer, Source, UpdateReport, UpdateRequest};
use crate::{
    control::{Installed, Mark, MarkKind, ToHub, Weights},
    engine::PauseMode,
    error::{Error, ErrorKind, Key, Result},
    sink::WeightSink,
    types::{Epoch, Rank, Version},
    update::{EngineCall, Outcome},
};

/// What becomes of workers that a failed update has touched. Their rank is marked in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFailure {
    /// Their engine stays paused where it can be; the next update that succeeds resumes it.
    #[default]
    Mark,
    /// The last committed version is sent again: see [`ParameterServer::rollback`].
    Rollback,
    /// Their engine serves, with old and new weights mixed.
    Leave,
}

/// How careful updates are with engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// How engines are paused before their first bucket; `None`: they serve during updates.
    pub pause: Option<PauseMode>,
    /// After a failure in the middle.
    pub on_failure: OnFailure,
    /// The memory of the last committed version is kept until the next one is committed, also when its checkpoint is
    /// unregistered: twice the host memory, and what [`OnFailure::Rollback`] needs.
    pub keep_previous: bool,
    /// Receivers of a P2P update compare what they pulled with the digests that its owner made.
    pub check_pulls: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            pause: Some(PauseMode::default()),
            on_failure: OnFailure::default(),
            keep_previous: false,
            check_pulls: true,
        }
    }
}

/// The last committed version, with all that is needed to send it again.
pub(super) struct Kept {
    pub(super) checkpoint: String,
    pub(super) version: Version,
    pub(super) source: Source,
}

/// How an attempt ended, as far as the worker is concerned.
pub(super) struct Aftermath<'a> {
    pub(super) outcome: &'a Outcome,
    pub(super) epoch: Epoch,
    pub(super) checkpoint: &'a str,
    pub(super) version: Version,
    pub(super) members: &'a [Rank],
    /// This rank's worker was given a bucket.
    pub(super) touched: bool,
    /// This rank's worker and engine went through to the end.
    pub(super) finished: bool,
}

impl ParameterServer {
    /// How careful updates are with engines; see [`Policy::default`].
    #[must_use]
    pub fn with_policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    /// How careful updates are with engines.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// What this rank's worker has, as far as this server and the hub know.
    pub fn weights(&mut self) -> &Weights {
        if let Some(told) = self.session.told_weights() {
            self.weights.learn(&told);
        }
        &self.weights
    }

    /// The version that [`Self::rollback`] would install.
    pub fn kept_version(&self) -> Option<Version> {
        self.kept.as_ref().map(|kept| kept.version)
    }

    /// Whether the last update failed after some worker, here or on another rank, may have been given a bucket. All
    /// members that still have the hub agree on it.
    pub fn may_be_mixed(&self) -> bool {
        self.may_be_mixed
    }

    /// Collective over `ranks`, as [`Self::update`]: sends the last committed version again, from memory that
    /// [`Policy::keep_previous`] has kept.
    pub async fn rollback(
        &mut self,
        ranks: Vec<Rank>,
        sink: Option<Box<dyn WeightSink>>,
        engine: Option<EngineCall>,
    ) -> Result<UpdateReport> {
        let Some(kept) = &self.kept else {
            return Err(Error::new(
                ErrorKind::Unavailable,
                "roll back",
                "no version was kept here: none was committed before, or --keep-previous was not given",
            )
            .with(Key::Rank, self.rank));
        };
        let (checkpoint, version, source) = (kept.checkpoint.clone(), kept.version, kept.source.clone());
        tracing::warn!(rank = self.rank, %checkpoint, version = version.0, "going back to the last version");
        // A rank that has nothing to go back to, or calls update meanwhile, must not be taken for one that agrees.
        let request = UpdateRequest {
            checkpoint: format!("{checkpoint} (last version)"),
            version,
            ranks,
            sink,
            engine,
        };
        self.move_weights(request, source, &checkpoint).await
    }

    /// Joins the job again after its session was lost: rank 0 may come back within `wait`. Checkpoints, pinned memory and
    /// what is known of the worker stay; metas and communicators do not, since rank 0 has lost its own.
    pub async fn rejoin(&mut self, wait: Duration) -> Result<()> {
        self.session.rejoin(wait).await?;
        self.rejoined();
        Ok(())
    }

    /// As [`Self::rejoin`], after somebody else has made this server's session join again.
    pub fn rejoined(&mut self) {
        self.groups.clear();
        self.gathered.clear();
        self.latest.take_if(|latest| !latest.foreign);
        self.report_weights();
    }

    /// Tells the hub what this rank's worker has, for its status and for ranks in doubt.
    pub(super) fn report_weights(&self) {
        if let Err(error) = self.session.send(&ToHub::Weights(self.weights.clone())) {
            tracing::debug!(rank = self.rank, %error, "the hub does not hear what the worker has");
        }
    }

    /// Takes down how an attempt ended.
    pub(super) fn record(&mut self, after: &Aftermath<'_>) {
        let mark = |kind, cause: &Error| Mark {
            kind,
            checkpoint: after.checkpoint.to_owned(),
            version: after.version,
            epoch: after.epoch,
            members: after.members.to_vec(),
            cause: cause.to_string(),
        };
        let installed = || Installed {
            checkpoint: after.checkpoint.to_owned(),
            version: after.version,
            epoch: after.epoch,
        };
        match after.outcome {
            Outcome::Committed { failure } => {
                self.weights.committed = Some(installed());
                self.weights.mark = match failure {
                    Some(cause) if !after.finished => Some(mark(MarkKind::Unfinished, cause)),
                    _ => None,
                };
            }
            Outcome::Failed { cause } if after.touched => {
                self.weights.mark = Some(mark(MarkKind::Mixed, cause));
            }
            Outcome::InDoubt { cause } if after.touched => {
                self.weights.mark = Some(mark(MarkKind::InDoubt, cause));
            }
            Outcome::Failed { .. } | Outcome::InDoubt { .. } => return,
        }
        self.report_weights();
    }

    /// After a commit: what was sent can be sent again.
    pub(super) fn keep_source(&mut self, checkpoint: &str, version: Version, source: Source) {
        let wanted = self.policy.keep_previous || self.policy.on_failure == OnFailure::Rollback;
        self.kept = wanted.then(|| Kept { checkpoint: checkpoint.to_owned(), version, source });
    }
}

impl Source {
    /// Of the checkpoint `name`, as this server holds and knows it now.
    pub(super) fn of(server: &ParameterServer, name: &str) -> Result<Self> {
        let held = server.checkpoints.get(name);
        Ok(Self {
            known: server.known(name)?,
            _registrations: held.map(|h| h.registrations.clone()).unwrap_or_default(),
            checkpoint: held.map(|h| Arc::clone(&h.checkpoint)),
        })
    }
}
