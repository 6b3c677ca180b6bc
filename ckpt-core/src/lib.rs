//! The core of `ckpt`: puts new weights into running LLM inference engines.
//!
//! Four seams are pluggable and nothing else is: [`transport::Transport`], [`device::DeviceBackend`],
//! [`sink::WeightSink`] and [`engine::Engine`]. Between them stand a pure planner ([`plan`]), a sans-IO update
//! machine ([`update`]) and one control plane ([`control`]). `docs/ARCHITECTURE.md` shows the life of one bucket.

pub mod checkpoint;
pub mod cluster;
pub mod control;
pub mod deadlines;
pub mod device;
pub mod engine;
pub mod error;
pub mod layer;
mod liveness;
pub mod manifest;
pub mod metas;
pub mod plan;
pub mod predict;
pub mod server;
pub mod sink;
pub mod testkit;
pub mod tls;
pub mod topology;
pub mod transport;
pub mod types;
pub mod update;
pub mod worker;

pub use error::{Error, ErrorKind, Key, Recovery, Result};
pub use types::{DType, Epoch, Rank, Version};
