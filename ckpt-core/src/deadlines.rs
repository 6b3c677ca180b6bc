//! Every wait in the program ends; these are the times after which.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How long each stage of an update may take. Nothing waits without one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deadlines {
    /// Until all ranks have joined the job or called the same collective.
    pub join: Duration,
    /// Until the engine answers that it is ready, and until its worker has opened the ring.
    pub ready: Duration,
    /// For one bucket, from enqueued to acknowledged.
    pub bucket: Duration,
    /// For the worker to drop the ring, and again for its post hook.
    pub release: Duration,
    /// For a worker to answer what it owes after a failure, before its socket is given up.
    pub abort: Duration,
    /// For the whole update.
    pub total: Duration,
    /// Heartbeat interval between a rank and the hub.
    pub heartbeat: Duration,
    /// A rank that was silent this long is dead; a rank that heard nothing this long fences itself.
    pub dead_after: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            join: Duration::from_secs(60),
            ready: Duration::from_secs(300),
            bucket: Duration::from_secs(30),
            release: Duration::from_secs(60),
            abort: Duration::from_secs(3),
            total: Duration::from_secs(300),
            heartbeat: Duration::from_secs(1),
            dead_after: Duration::from_secs(5),
        }
    }
}
