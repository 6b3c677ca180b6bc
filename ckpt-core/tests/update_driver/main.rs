//! Whole updates of parameter servers that are tasks of this process: driver, hub, transports, devices and planner
//! together. Workers compare every byte with the source in every bucket.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod failures;
mod moves;
mod recovery;
mod support;
mod watch;
mod worker;
