//! For tests: whole clusters in one thread and virtual time, an exhaustive search of small ones, and the behaviour that
//! every device and transport must show ([`conformance`]).
//!
//! [`SimCluster`] runs real update machines and a real hub over modelled rings, links, workers and engines, with one
//! injected fault, and checks the laws of `docs/ARCHITECTURE.md` at every step. [`explore`] visits every interleaving
//! of a small cluster. Nothing here is meant for production code, except that `ckpt plan` simulates failures with it.

pub mod conformance;
mod explore;
mod fault;
pub mod fuzz;
mod law;
mod model;
mod plans;
mod random;
mod relay;
mod scenario;
mod sim;
mod wire;

pub use explore::{Exploration, ExploreConfig, ExploreFault, explore};
pub use fault::{Fault, Skip, TimedFault, WorkerStep};
pub use law::{Law, Violation};
pub use model::TransportModel;
pub use plans::{planned, random_plan, ring_plan, waits_for};
pub use random::Random;
pub use relay::{LinkFault, Relay, RelayConfig};
pub use scenario::{scenario, tight_deadlines};
pub use sim::{Costs, SimCluster, SimConfig, SimRank, SimReport, Span, SpanKind};
