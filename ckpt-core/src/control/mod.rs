//! The control plane: one hub on rank 0, one session a rank. Small messages only; bytes go over transports.
//!
//! # Why this wire
//! Each rank holds one TCP connection to the hub (or, in one process, an in-memory pipe). A frame is a length, a magic
//! byte, a version byte and a postcard message ([`ToHub`], [`ToRank`]); the `codec` file shows the bytes. That is all
//! that the job needs: two enums in one crate, one stream in order, and the closed connection as the sign of death.
//! An RPC framework would add HTTP/2, a second description of the same messages, its own timeouts and a large
//! dependency tree, and answer none of the questions that matter here: who is dead, and since when.
//!
//! - *Order is the contract.* All that one side says arrives in the order in which it was said, so `Committed` is never
//!   overtaken by the loss of the session that carried it.
//! - *Death.* The kernel closes the connection of a process that ends, however it ends; the hub sees it at once. A
//!   process that is stopped, or a host that vanishes, is noticed after
//!   [`dead_after`](crate::deadlines::Deadlines::dead_after) of silence, by either side.
//! - *Leases.* A rank's lease counts from the moment when the answered heartbeat was sent, not from when the answer was
//!   read, so a process that slept cannot take an old answer for a new lease.
//! - *Strangers.* Before a valid greeting a connection gets 5 seconds, one frame of at most 64 KiB, and one of a limited
//!   number of places. The token is compared in constant time.
//! - *Nobody waits for a stuck rank.* Each connection has its own bounded queue and writer; a rank whose queue is full is
//!   given up.
//! - The token and all messages cross the network in clear text, unless the job has TLS ([`crate::tls`]): then the same
//!   frames go inside it.

mod address;
pub(crate) mod codec;
mod connect;
mod hub_machine;
mod job;
mod journal;
mod message;
mod server;
mod server_core;
mod server_gate;
#[cfg(test)]
mod server_tests;
mod session;
mod session_task;
mod token;
mod weights;

pub use address::HubAddress;
pub use codec::PROTOCOL_VERSION;
pub use hub_machine::{AttemptStatus, HubConfig, HubMachine, RankStatus};
pub use job::{Job, JobOptions};
pub use message::{CommunicatorChoice, Hello, Joining, Member, ToHub, ToRank};
pub use server::{Hub, HubOptions, HubStatus};
pub use session::{Session, SessionConfig, SessionEvent, Updates, host_name};
pub use token::{PublishedToken, Token, TokenSource};
pub use weights::{Decision, Installed, Mark, MarkKind, Weights};
