//! The transport `rdma` over an emulated libibverbs (`verbs-emulator/README.md`): what devices seldom do, and in any order.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod closing;
mod conforms;
mod connecting;
mod failures;
mod keys;
mod lost;
mod ports;
mod refused;
mod slots;
mod storm;
mod support;
