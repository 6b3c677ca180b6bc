//! The control plane: one hub on rank 0, one session a rank. Small messages only; bytes go over transports.

mod message;

pub use message::{CommunicatorChoice, Hello, Joining, Member, ToHub, ToRank};
