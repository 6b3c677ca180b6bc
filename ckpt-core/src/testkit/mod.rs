//! For tests of this workspace and of crates that plug into it; nothing here runs in production.

pub mod conformance;
