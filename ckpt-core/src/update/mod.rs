//! The life of one update: a sans-IO machine and the driver that performs what it asks for.

mod action;

pub use action::{Action, Event, Outcome};
