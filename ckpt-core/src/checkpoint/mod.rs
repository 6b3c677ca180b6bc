//! Checkpoints: where the bytes come from, which rank holds which, and how they get into host memory.
//!
//! A [`CheckpointSource`] names every tensor and where its bytes are: in safetensors files, in this process's
//! memory, or made up by [`generate`]. [`CheckpointSource::split`] gives each rank a range of its tensors, balanced
//! by bytes. [`load`] reads one such range into the memory of a [`Pool`] and returns a [`RegisteredCheckpoint`].
//! All of this blocks on files and memory: call it from `spawn_blocking` in async code.

mod compare;
mod digest;
mod fill;
pub mod generate;
pub(crate) mod header;
mod load;
mod memory;
mod place;
mod pool;
mod source;
mod split;
mod writer;

pub use compare::{Comparison, Difference, compare};
pub use digest::{DigestAlgorithm, Digests, RunningDigest};
pub use load::{InPlace, LoadOptions, Progress, RegisteredCheckpoint, load};
pub use memory::HostMemory;
pub use pool::{Pool, PoolCounters};
pub use source::{CheckpointSource, NamedTensor, SourceTensor};
pub use split::split;
pub use writer::{save_checkpoint, write_safetensors};
