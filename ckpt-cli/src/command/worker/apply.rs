//! Taking buckets, and the faults that tests ask for.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use ckpt_core::{
    Error, ErrorKind, Result,
    types::TensorMeta,
    worker::{Apply, TensorView},
};
use clap::{Args, ValueEnum};
use rustix::process::{Signal, getpid, kill_process};

use super::store::Store;

/// What goes wrong on purpose; hidden from the help, since only tests want it.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(super) struct Faults {
    /// Answer the bucket with this number with an error
    #[arg(long, hide = true, value_name = "BUCKET")]
    fail_at_bucket: Option<u32>,
    /// Die as if by kill -9 in the bucket with this number
    #[arg(long, hide = true, value_name = "BUCKET")]
    exit_at_bucket: Option<u32>,
    /// Stop as if by SIGSTOP in the bucket with this number
    #[arg(long, hide = true, value_name = "BUCKET")]
    stop_at_bucket: Option<u32>,
    /// Fail in the post hook
    #[arg(long, hide = true)]
    fail_in_post_hook: bool,
    /// Take this long for each bucket
    #[arg(long, hide = true, value_name = "MILLISECONDS", default_value_t = 0)]
    slow_ms: u64,
    /// Wait at this stage, having logged `held at STAGE`: a place where a test strikes
    #[arg(long, hide = true, value_enum, value_name = "STAGE")]
    hold_at: Option<Stage>,
    /// How long
    #[arg(long, hide = true, value_name = "MILLISECONDS", default_value_t = 3000)]
    hold_ms: u64,
    /// Only in the first update
    #[arg(long, hide = true)]
    fault_once: bool,
    /// Only in the update with this number, from 0
    #[arg(long, hide = true, value_name = "UPDATE", conflicts_with = "fault_once")]
    fault_in: Option<u64>,
}

impl Faults {
    /// The faults of update number `update`, from 0.
    pub(super) fn in_update(self, update: u64) -> Self {
        let only = self.fault_in.or(self.fault_once.then_some(0));
        if only.is_some_and(|only| only != update) { Self::default() } else { self }
    }
}

/// A stage of an update, as a worker sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Stage {
    /// The ring is mapped and no bucket has come
    Open,
    /// In the third bucket
    Bucket,
    Release,
    PostHook,
}

/// Where [`Stage::Bucket`] is.
const HELD_BUCKET: u32 = 2;

impl Faults {
    fn hold(self, stage: Stage) {
        if self.hold_at == Some(stage) {
            let name = stage.to_possible_value();
            tracing::info!("held at {}", name.as_ref().map_or("", |name| name.get_name()));
            std::thread::sleep(Duration::from_millis(self.hold_ms));
        }
    }
}

/// Applies buckets to one device's store.
pub(super) struct Applier {
    pub(super) store: Arc<Mutex<Store>>,
    pub(super) faults: Faults,
}

impl Applier {
    fn store(&self) -> MutexGuard<'_, Store> {
        // A panic in here leaves whole tensors, and `mixed` says the rest.
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Apply for Applier {
    fn layout(&mut self, tensors: &Arc<[TensorMeta]>) -> Result<()> {
        self.store().layout(tensors)?;
        self.faults.hold(Stage::Open);
        Ok(())
    }

    fn bucket(&mut self, bucket: u32, tensors: &[TensorView<'_>]) -> Result<()> {
        let faults = self.faults;
        if bucket == HELD_BUCKET {
            faults.hold(Stage::Bucket);
        }
        if faults.slow_ms > 0 {
            std::thread::sleep(Duration::from_millis(faults.slow_ms));
        }
        let signal_at = |at: Option<u32>, signal| {
            if at == Some(bucket) {
                // A process may always signal itself; if it could not, the test would see that nothing happened.
                let _ = kill_process(getpid(), signal);
            }
        };
        signal_at(faults.exit_at_bucket, Signal::KILL);
        signal_at(faults.stop_at_bucket, Signal::STOP);
        if faults.fail_at_bucket == Some(bucket) {
            return Err(asked_for(format!("bucket {bucket} fails because --fail-at-bucket asked for it")));
        }
        self.store().bucket(bucket, tensors)
    }

    fn release(&mut self) -> Result<()> {
        self.faults.hold(Stage::Release);
        Ok(())
    }

    fn post_hook(&mut self) -> Result<()> {
        self.faults.hold(Stage::PostHook);
        if self.faults.fail_in_post_hook {
            return Err(asked_for("the post hook fails because --fail-in-post-hook asked for it".into()));
        }
        self.store().complete()
    }

    fn failed(&mut self, cause: &Error) {
        self.store().failed(cause);
    }
}

fn asked_for(message: String) -> Error {
    Error::new(ErrorKind::Backend, "apply weights", message)
}
