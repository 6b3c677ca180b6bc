//! The worker's side of the native protocol: what an inference engine links to take new weights.
//!
//! ```no_run
//! use std::time::{Duration, Instant};
//! use ckpt_core::{Result, worker::{Apply, NativeWorker, TensorView}};
//!
//! struct Model;
//! impl Apply for Model {
//!     fn bucket(&mut self, _bucket: u32, tensors: &[TensorView<'_>]) -> Result<()> {
//!         for tensor in tensors {
//!             let _bytes = tensor.bytes()?; // copy them to where the model keeps them
//!         }
//!         Ok(())
//!     }
//! }
//!
//! # fn main() -> Result<()> {
//! let mut worker = NativeWorker::new("HOST-node1-0"); // keep it between updates
//! worker.update("ckpt+unix:///run/user/1000/ckpt/native-1.sock", &mut Model, Instant::now() + Duration::from_secs(300))?;
//! # Ok(()) }
//! ```
//!
//! Everything here blocks, since applying weights does: an async program calls [`NativeWorker::update`] on a blocking
//! thread (`tokio::task::spawn_blocking`) and ends it early through a [`Canceller`]. Nothing waits past the deadline,
//! and a parameter server that dies ends the update at once.

mod link;
mod map;
mod run;
mod view;
pub(crate) mod wire;

pub use link::Canceller;
pub use map::{HostMapper, HostRing, RingMapper};
pub use run::{Apply, NativeWorker, UpdateSummary};
pub use view::TensorView;

/// How the endpoint of a native worker link begins; the path of a UNIX socket follows.
pub const ENDPOINT_SCHEME: &str = "ckpt+unix://";
