//! The sink seam: how an inference worker is told where new weights lie and says that it has taken them.

mod ce_message;
pub(crate) mod checkpoint_engine;
mod gate;
mod layout;
mod native;
mod pickle;
mod protocol;
mod stranded;
mod stream;
pub(crate) mod zmtp;

use std::time::Instant;

use async_trait::async_trait;

pub use checkpoint_engine::{CheckpointEngineSink, WireVersion};
pub use layout::Layout;
pub use native::{NativeSink, NativeSinkConfig};
pub use protocol::WorkerProtocol;
pub use stranded::{release_in_background, release_stranded_workers};
pub use stream::{StreamBucket, StreamSink, StreamTensor, TensorStream, stream};

use crate::{
    device::Ring,
    error::{Error, Result},
    types::TensorMeta,
};

/// One tensor of a bucket, in the ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInRing {
    /// Name, dtype, shape.
    pub meta: TensorMeta,
    /// Bytes from the ring's start.
    pub offset: u64,
}

/// "This bucket is in the ring."
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BucketMessage {
    /// Number of the bucket in the plan.
    pub bucket: u32,
    /// Its whole tensors.
    pub tensors: Vec<TensorInRing>,
}

/// What a worker that was told to raise is known to do with the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// It has no mapping, or none any more.
    LetGo,
    /// It was told, and did not say that it has let go.
    MayHold,
}

/// One worker's link during one update, in the order of the methods. Every call ends by its deadline.
///
/// After an error of any method only [`WeightSink::fail`] may follow. A worker's own words are in the error's message.
#[async_trait]
pub trait WeightSink: Send {
    /// What the engine must tell the worker so that it connects here.
    fn endpoint(&self) -> &str;
    /// Hands over the ring; returns when the worker has mapped it.
    async fn open(&mut self, ring: &dyn Ring, deadline: Instant) -> Result<()>;
    /// Hands over one bucket; returns when the worker has copied it out.
    async fn deliver(&mut self, bucket: &BucketMessage, deadline: Instant) -> Result<()>;
    /// Asks the worker to drop its mapping; returns when the ring may be freed.
    async fn release(&mut self, deadline: Instant) -> Result<()>;
    /// Runs the worker's post hook; returns when the new weights are in use.
    async fn finish(&mut self, deadline: Instant) -> Result<()>;
    /// Makes the worker raise `cause`, after the reply that it still owes. Returns when it was told or by the deadline, and
    /// says what is known of the ring: memory that a worker may still have mapped must not be freed.
    async fn fail(&mut self, cause: &Error, deadline: Instant) -> Result<Afterwards>;
}
