//! Hub and sessions over loopback and inside one process: what ranks agree on, and what must not disturb them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod deaths;
mod jobs;
mod processes;
mod strangers;
mod support;
#[cfg(feature = "tls")]
mod tls;
mod updates;
