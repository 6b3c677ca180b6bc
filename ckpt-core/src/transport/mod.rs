//! The transport seam: broadcasts in a group (collective facet) and reads of remote memory (one-sided facet).

mod group;
pub mod library;
pub mod local;
mod poison;
mod regions;
