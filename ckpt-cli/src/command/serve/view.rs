//! What a server tells about itself at any time, also while an update runs.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use ckpt_core::{
    Result, Version,
    checkpoint::RegisteredCheckpoint,
    control::Weights,
    metas::Metas,
    server::{Stages, UpdateReport},
};
use serde::Serialize;

/// Shared by the actor, which writes it, and the handlers, which read it.
#[derive(Debug, Default)]
pub(super) struct View(Mutex<State>);

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) doing: Doing,
    /// Registrations under way, and those done.
    pub(super) checkpoints: BTreeMap<String, Option<Held>>,
    pub(super) metas: Option<CurrentMetas>,
    /// Sets of metas ever gathered or loaded.
    pub(super) metas_seen: u64,
    pub(super) updates: u64,
    pub(super) totals: Totals,
    pub(super) installed: Option<Installed>,
    /// The version that is kept for going back to it.
    pub(super) kept: Option<Version>,
    /// What the worker has.
    pub(super) weights: Weights,
    pub(super) last_update: Option<LastUpdate>,
}

/// What the actor is at.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(super) enum Doing {
    #[default]
    Idle,
    GatheringMetas {
        checkpoint: String,
    },
    Updating {
        checkpoint: String,
        version: Version,
        ranks: Vec<u32>,
        /// Where this rank's worker is expected.
        worker_endpoint: String,
        #[serde(skip)]
        since: Option<Instant>,
    },
}

/// One registered checkpoint.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Held {
    tensors: usize,
    pub(super) tensor_bytes: u64,
    copied_bytes: u64,
    in_place_bytes: u64,
    load_s: f64,
}

impl From<&RegisteredCheckpoint> for Held {
    fn from(checkpoint: &RegisteredCheckpoint) -> Self {
        Self {
            tensors: checkpoint.share.tensors().count(),
            tensor_bytes: checkpoint.share.tensor_bytes(),
            copied_bytes: checkpoint.copied_bytes,
            in_place_bytes: checkpoint.in_place_bytes,
            load_s: checkpoint.elapsed.as_secs_f64(),
        }
    }
}

/// The metas that the next update uses: there is one set, as in checkpoint-engine.
#[derive(Clone, Debug)]
pub(super) struct CurrentMetas {
    pub(super) metas: Arc<Metas>,
    /// Of which checkpoint they were gathered; `None` for loaded ones.
    pub(super) checkpoint: Option<String>,
    /// The version that an update with these metas installs, unless the request says another.
    pub(super) version: Version,
}

/// What the workers have.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Installed {
    pub(super) checkpoint: String,
    pub(super) version: Version,
}

/// Sums over all updates of this process.
#[derive(Debug, Default)]
pub(super) struct Totals {
    pub(super) committed: u64,
    /// Failures by the name of their kind.
    pub(super) failed: BTreeMap<String, u64>,
    pub(super) stages: Stages,
    pub(super) tensor_bytes: u64,
    pub(super) rooted_bytes: u64,
    pub(super) buckets: u64,
    /// Of the last update.
    pub(super) ring_bytes: u64,
}

impl Totals {
    fn add(&mut self, result: &Result<UpdateReport>) {
        let report = match result {
            Ok(report) => report,
            Err(error) => {
                let kind = serde_json::to_value(error.kind()).ok();
                let kind = kind.as_ref().and_then(|kind| kind.as_str()).unwrap_or("unknown").to_owned();
                *self.failed.entry(kind).or_default() += 1;
                return;
            }
        };
        self.committed += 1;
        self.tensor_bytes += report.tensor_bytes;
        self.rooted_bytes += report.rooted_bytes;
        self.buckets += report.buckets;
        self.ring_bytes = report.ring_bytes;
        let (sum, one) = (&mut self.stages, &report.stages);
        for (sum, one) in [
            (&mut sum.join_s, one.join_s),
            (&mut sum.prepare_s, one.prepare_s),
            (&mut sum.transfer_s, one.transfer_s),
            (&mut sum.commit_s, one.commit_s),
            (&mut sum.release_s, one.release_s),
            (&mut sum.post_hook_s, one.post_hook_s),
            (&mut sum.total_s, one.total_s),
        ] {
            *sum += one;
        }
    }
}

/// How the last update went here.
#[derive(Clone, Debug, Serialize)]
pub(super) struct LastUpdate {
    checkpoint: String,
    version: Version,
    seconds: f64,
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    buckets: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ring_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stages: Option<Stages>,
}

impl View {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The actor has finished an update.
    pub(super) fn updated(&self, result: &Result<UpdateReport>) {
        let mut state = self.lock();
        let Doing::Updating { checkpoint, version, since, .. } = std::mem::take(&mut state.doing) else {
            return;
        };
        let report = result.as_ref().ok();
        state.updates += 1;
        state.totals.add(result);
        if report.is_some() {
            state.installed = Some(Installed { checkpoint: checkpoint.clone(), version });
        }
        state.last_update = Some(LastUpdate {
            checkpoint,
            version,
            seconds: since.map_or(0.0, |since| since.elapsed().as_secs_f64()),
            error: result.as_ref().err().map(ToString::to_string),
            buckets: report.map(|r| r.buckets),
            ring_bytes: report.map(|r| r.ring_bytes),
            stages: report.map(|r| r.stages),
        });
    }
}
