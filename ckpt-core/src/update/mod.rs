//! The life of one update: a sans-IO machine and the driver that performs what it asks for.

mod action;
mod device_lane;
pub(crate) mod driver;
mod engine_lane;
pub(crate) mod kept;
mod machine;
pub(crate) mod pull;
mod rule;
pub mod trace;
mod worker_lane;

pub use action::{Action, Event, Outcome};
pub use driver::EngineCall;
pub(crate) use machine::close_after;
pub use machine::{MachineConfig, UpdateMachine};
#[doc(hidden)]
pub use rule::Rule;
