//! The transport `cuda-ipc`: broadcasts between GPUs of one host by copy engines, without a kernel.
//!
//! A receiver offers its range with a message; the root copies its bytes there, through a mapping of the receiver's
//! block, and tells when they are written. A pull would cost the same two messages, but a push has the offer out of the
//! way before the bytes are there: the copy is enqueued behind the root's own H2D on the device, and only its end has
//! to be told. It also fits the rule of all broadcasts here, that enqueuing a receive offers the range; a pull needs
//! one more, that the root's range stays until each reader is through.

mod event;
mod group;
mod lend;
mod message;
#[cfg(test)]
mod tests;
mod transport;

pub(crate) use group::{Behind, Queue, check_stream};
pub use transport::{CudaIpcProvider, CudaIpcTransport};
pub(crate) use transport::{FailUnlessDone, LONG};
