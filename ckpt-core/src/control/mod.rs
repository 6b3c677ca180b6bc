//! The control plane: one hub on rank 0, one session a rank. Small messages only; bytes go over transports.

mod hub_machine;
mod message;

pub use hub_machine::{AttemptStatus, HubConfig, HubMachine, RankStatus};
pub use message::{CommunicatorChoice, Hello, Joining, Member, ToHub, ToRank};
