//! Layers over any transport: each wraps an `Arc<dyn Transport>` with both facets and is a transport itself.
//!
//! - [`Throttle`]: a link of a given rate and latency, for tests and estimates on one machine.
//! - [`Chaos`]: faults by seed: operations that are late, never happen, bring wrong bytes, or cut the link.
//! - [`Record`]: what was done when, with bytes.
//! - [`Timeout`]: limits of its own, below those of the caller.
//!
//! Layers stack. They act in the order of the stream where it is one of the host ([`crate::device::HostStream`]); on other
//! streams a fault or a delay happens when the operation is enqueued. No trait method is left to a default: a method that
//! is added to a seam must be thought about here.
//!
//! ```
//! # use std::sync::Arc; use ckpt_core::{layer, transport::Transport};
//! # fn example(tcp: Arc<dyn Transport>) -> ckpt_core::Result<Arc<dyn Transport>> {
//! let slow = layer::Throttle::wrap(tcp, layer::ThrottleConfig { bytes_per_sec: 1_250_000_000, ..Default::default() });
//! let watched = layer::Record::wrap(slow);
//! # Ok(watched) }
//! ```

mod chaos;
mod later;
mod record;
mod throttle;
mod timeout;

pub use chaos::{Chaos, ChaosConfig, ChaosCounters};
pub use record::{OpKind, OpSpan, Record};
pub use throttle::{Throttle, ThrottleConfig};
pub use timeout::{Timeout, TimeoutConfig};

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    error::{Error, ErrorKind, Result},
    transport::{AbortHandle, Collective, CollectiveOp, OneSided, Transport},
};

/// How often a layer that waits looks whether the communicator was aborted.
const LOOK: Duration = Duration::from_millis(5);

/// The wrapped transport's collective facet. Asked for only through a facet of ours, which exists where theirs does.
fn collective(inner: &dyn Transport) -> Result<&dyn Collective> {
    inner.collective().ok_or_else(|| no_facet(inner, "broadcasts"))
}

/// The wrapped transport's one-sided facet.
fn one_sided(inner: &dyn Transport) -> Result<&dyn OneSided> {
    inner.one_sided().ok_or_else(|| no_facet(inner, "one-sided reads"))
}

fn no_facet(inner: &dyn Transport, what: &str) -> Error {
    Error::new(ErrorKind::Unsupported, "use a layer", format!("transport `{}` has no {what}", inner.name()))
}

fn bytes_of(ops: &[CollectiveOp]) -> u64 {
    ops.iter().map(|op| op.buffer.len_bytes()).sum()
}

/// Sleeps until `at`, or until the communicator is poisoned, which is the error.
async fn sleep_unless_aborted(at: Instant, abort: &Arc<dyn AbortHandle>) -> Result<()> {
    loop {
        if let Some(cause) = abort.poisoned() {
            return Err(cause);
        }
        let now = Instant::now();
        if now >= at {
            return Ok(());
        }
        tokio::time::sleep(LOOK.min(at - now)).await;
    }
}

/// Both facets of a wrapper, present where the wrapped transport has them.
macro_rules! facets_of_inner {
    () => {
        fn name(&self) -> &'static str {
            self.inner.name()
        }

        fn capability(&self) -> $crate::transport::Capability {
            self.inner.capability()
        }

        fn collective(&self) -> Option<&dyn $crate::transport::Collective> {
            self.inner.collective().map(|_| self as _)
        }

        fn one_sided(&self) -> Option<&dyn $crate::transport::OneSided> {
            self.inner.one_sided().map(|_| self as _)
        }
    };
}
use facets_of_inner;
