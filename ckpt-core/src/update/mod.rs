//! The life of one update: a sans-IO machine and the driver that performs what it asks for.

mod action;
mod machine;
mod rule;

pub use action::{Action, Event, Outcome};
pub use machine::{MachineConfig, UpdateMachine};
#[doc(hidden)]
pub use rule::Rule;
