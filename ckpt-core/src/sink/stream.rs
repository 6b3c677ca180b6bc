//! An in-process sink: the update as a stream of buckets whose consumer sets the pace.
//!
//! ```no_run
//! # async fn example() -> ckpt_core::Result<()> {
//! let (sink, mut stream) = ckpt_core::sink::stream("trainer");
//! // `sink` goes to the update; here the other end is drained:
//! while let Some(bucket) = stream.next_bucket().await? {
//!     for tensor in bucket.tensors() {
//!         let _bytes = tensor.bytes()?; // use them while `bucket` lives
//!     }
//! } // dropping `bucket` lets its ring bytes be overwritten
//! # drop(sink); Ok(()) }
//! ```

use std::{sync::Arc, time::Instant};

use async_trait::async_trait;
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout_at,
};

use super::{Afterwards, BucketMessage, WeightSink};
use crate::{
    device::{Buffer, BufferSlice, Ring},
    error::{Error, ErrorKind, Key, Result},
    types::TensorMeta,
};

/// Makes both ends of an in-process link. `consumer` names the consumer in errors.
pub fn stream(consumer: &str) -> (StreamSink, TensorStream) {
    // Room for one: a bucket is sent only after the last one was let go.
    let (sender, receiver) = mpsc::channel(1);
    let sink = StreamSink { consumer: consumer.to_owned(), sender: Some(sender), ring: None, owed: None };
    (sink, TensorStream { receiver, ended: false })
}

/// The update's end. It waits for the consumer at each bucket.
#[derive(Debug)]
pub struct StreamSink {
    consumer: String,
    sender: Option<mpsc::Sender<Item>>,
    ring: Option<Arc<dyn Buffer>>,
    owed: Option<oneshot::Receiver<Result<()>>>,
}

/// The consumer's end. Dropping it before the stream has ended fails the update.
#[derive(Debug)]
pub struct TensorStream {
    receiver: mpsc::Receiver<Item>,
    ended: bool,
}

/// What is on its way, with the answer that it asks for. One that is dropped on the way is not answered: only the
/// consumer turns a bucket into the guard whose drop is an ack.
#[derive(Debug)]
struct Item {
    what: What,
    answer: oneshot::Sender<Result<()>>,
}

#[derive(Debug)]
enum What {
    Bucket(u32, Vec<StreamTensor>),
    End,
    Failed(Error),
}

/// The tensors of one bucket. Dropping it is the ack: the bytes may be overwritten from then on.
#[derive(Debug)]
pub struct StreamBucket {
    bucket: u32,
    tensors: Vec<StreamTensor>,
    ack: Option<oneshot::Sender<Result<()>>>,
}

/// One tensor in the ring.
#[derive(Debug)]
pub struct StreamTensor {
    meta: TensorMeta,
    slice: BufferSlice,
}

impl StreamTensor {
    /// Name, dtype, shape.
    pub fn meta(&self) -> &TensorMeta {
        &self.meta
    }

    /// Where the bytes are. A clone keeps the memory, but not the bytes: they change after the bucket was dropped.
    pub fn slice(&self) -> &BufferSlice {
        &self.slice
    }

    /// The bytes; an error for device memory.
    pub fn bytes(&self) -> Result<&[u8]> {
        // SAFETY: nothing writes these bytes before the bucket is acked, which is when it is dropped, and the
        // reference cannot outlive it. The update keeps that (`waits_for` in the plan).
        unsafe { self.slice.as_slice() }
    }
}

impl StreamBucket {
    /// Its number in the plan.
    pub fn bucket(&self) -> u32 {
        self.bucket
    }

    /// Its tensors.
    pub fn tensors(&self) -> &[StreamTensor] {
        &self.tensors
    }

    /// Refuses the bucket: the update fails on every rank with this error.
    pub fn reject(mut self, cause: Error) {
        if let Some(ack) = self.ack.take() {
            // The update may have ended already.
            let _ = ack.send(Err(cause));
        }
    }
}

impl Drop for StreamBucket {
    fn drop(&mut self) {
        if let Some(ack) = self.ack.take() {
            // A consumer that dies is not one that is done.
            let outcome = if std::thread::panicking() {
                Err(Error::new(ErrorKind::PeerLost, "take a bucket", "the consumer panicked"))
            } else {
                Ok(())
            };
            // The update may have ended already.
            let _ = ack.send(outcome);
        }
    }
}

impl TensorStream {
    /// The next bucket; `None` when the update is complete (and only then are the new weights whole). An error when it
    /// failed anywhere: what was taken before may be a mixture.
    pub async fn next_bucket(&mut self) -> Result<Option<StreamBucket>> {
        if self.ended {
            return Ok(None);
        }
        let Some(Item { what, answer }) = self.receiver.recv().await else {
            return Err(Error::new(
                ErrorKind::Aborted,
                "take the next bucket",
                "the update ended without a word; it was dropped or has failed already",
            ));
        };
        if let What::Bucket(bucket, tensors) = what {
            return Ok(Some(StreamBucket { bucket, tensors, ack: Some(answer) }));
        }
        // The update may have stopped waiting; what it has to say is the same.
        let _ = answer.send(Ok(()));
        match what {
            What::Failed(cause) => {
                self.receiver.close();
                Err(cause)
            }
            What::End | What::Bucket(..) => {
                self.ended = true;
                Ok(None)
            }
        }
    }
}

impl StreamSink {
    fn error(&self, kind: ErrorKind, operation: &'static str, message: impl Into<String>) -> Error {
        Error::new(kind, operation, message).with(Key::Worker, &self.consumer)
    }

    /// Hands `item` over and waits for the consumer's answer.
    async fn hand_over(&mut self, operation: &'static str, deadline: Instant, what: What) -> Result<()> {
        let Some(sender) = self.sender.clone() else {
            return Err(self.error(ErrorKind::Internal, operation, "the stream has ended"));
        };
        let (answer, owed) = oneshot::channel();
        match timeout_at(deadline.into(), sender.send(Item { what, answer })).await {
            Ok(Ok(())) => self.owed = Some(owed),
            Ok(Err(_)) => return Err(self.consumer_left(operation)),
            Err(_) => return Err(self.too_slow(operation)),
        }
        self.settle(operation, deadline).await
    }

    /// Waits for the answer that the consumer owes, if any.
    async fn settle(&mut self, operation: &'static str, deadline: Instant) -> Result<()> {
        let Some(answer) = &mut self.owed else { return Ok(()) };
        let answered = timeout_at(deadline.into(), answer).await;
        if answered.is_ok() {
            self.owed = None;
        }
        match answered {
            Ok(Ok(outcome)) => outcome.map_err(|e| e.with(Key::Worker, &self.consumer)),
            Ok(Err(_)) => Err(self.consumer_left(operation)),
            Err(_) => Err(self.too_slow(operation)),
        }
    }

    fn consumer_left(&self, operation: &'static str) -> Error {
        self.error(
            ErrorKind::PeerLost,
            operation,
            "the consumer of the tensor stream is gone; it was cancelled",
        )
    }

    fn too_slow(&self, operation: &'static str) -> Error {
        self.error(ErrorKind::Timeout, operation, "the consumer of the tensor stream still holds a bucket")
    }
}

#[async_trait]
impl WeightSink for StreamSink {
    /// Nothing has to be told to anybody.
    fn endpoint(&self) -> &str {
        ""
    }

    async fn open(&mut self, ring: &dyn Ring, _deadline: Instant) -> Result<()> {
        self.ring = Some(ring.buffer());
        Ok(())
    }

    async fn deliver(&mut self, bucket: &BucketMessage, deadline: Instant) -> Result<()> {
        const OPERATION: &str = "deliver a bucket";
        let Some(ring) = &self.ring else {
            return Err(self.error(ErrorKind::Internal, OPERATION, "the ring was not opened"));
        };
        let place = |tensor: &super::TensorInRing| {
            let end = tensor.offset.saturating_add(tensor.meta.len_bytes());
            let slice = BufferSlice::new(ring.clone(), tensor.offset..end)
                .map_err(|e| e.with(Key::Tensor, &tensor.meta.name))?;
            Ok(StreamTensor { meta: tensor.meta.clone(), slice })
        };
        let tensors = bucket.tensors.iter().map(place).collect::<Result<Vec<_>>>()?;
        let number = bucket.bucket;
        self.hand_over(OPERATION, deadline, What::Bucket(number, tensors))
            .await
            .map_err(|e| e.with(Key::Bucket, number))
    }

    async fn release(&mut self, deadline: Instant) -> Result<()> {
        self.settle("release the ring", deadline).await?;
        self.ring = None;
        Ok(())
    }

    async fn finish(&mut self, deadline: Instant) -> Result<()> {
        let ended = self.hand_over("end the stream", deadline, What::End).await;
        self.sender = None;
        ended
    }

    async fn fail(&mut self, cause: &Error, deadline: Instant) -> Result<Afterwards> {
        if self.sender.is_none() {
            return Ok(Afterwards::LetGo);
        }
        // A bucket that is held is let go first, so that the ring is free when this returns; how it ended is no matter.
        if let Err(error) = self.settle("tell the consumer", deadline).await
            && error.kind() == ErrorKind::Timeout
        {
            if let Some(sender) = self.sender.take() {
                let (answer, _) = oneshot::channel();
                // Room is free unless the bucket was not even fetched; then the closed stream says it.
                let _ = sender.try_send(Item { what: What::Failed(cause.clone()), answer });
            }
            return Err(error);
        }
        let told = self.hand_over("tell the consumer", deadline, What::Failed(cause.clone())).await;
        self.sender = None;
        self.ring = None;
        match told {
            // Nobody is left to be told.
            Err(error) if error.kind() == ErrorKind::PeerLost => Ok(Afterwards::LetGo),
            other => other.map(|()| Afterwards::LetGo),
        }
    }
}
