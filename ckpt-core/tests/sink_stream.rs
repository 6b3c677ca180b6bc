//! The in-process stream of buckets: pace, rejection, cancellation.
#![allow(clippy::unwrap_used, reason = "a test that fails may panic")]

mod sink_support;

use ckpt_core::{
    Error, ErrorKind, Key,
    sink::{TensorStream, WeightSink, stream},
};
use sink_support::*;

async fn drain(mut stream: TensorStream) -> Store {
    let mut store = Store::default();
    while let Some(bucket) = stream.next_bucket().await.unwrap() {
        for tensor in bucket.tensors() {
            let bytes = tensor.bytes().unwrap().to_vec();
            store.tensors.insert(tensor.meta().name.to_string(), (tensor.meta().clone(), bytes));
        }
    }
    store
}

fn cause() -> Error {
    Error::new(ErrorKind::PeerLost, "update", "rank 3 has died").with(Key::Rank, 3)
}

#[tokio::test]
async fn every_tensor_passes_and_the_end_is_the_end() {
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let (mut sink, stream) = stream("trainer");
    let consumer = tokio::spawn(drain(stream));
    sink.open(&ring, soon()).await.unwrap();
    for (number, tensors) in checkpoint().iter().enumerate() {
        let bucket = message(number as u32, tensors);
        fill(&ring, &bucket, tensors);
        sink.deliver(&bucket, soon()).await.unwrap();
    }
    sink.release(soon()).await.unwrap();
    sink.finish(soon()).await.unwrap();
    assert_holds_checkpoint(&consumer.await.unwrap());
}

#[tokio::test]
async fn a_bucket_that_is_held_holds_the_update() {
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let (mut sink, mut stream) = stream("trainer");
    sink.open(&ring, soon()).await.unwrap();
    let first = message(0, &checkpoint()[0]);
    let (delivered, held) = tokio::join!(sink.deliver(&first, within(100)), stream.next_bucket());
    let held = held.unwrap().unwrap();
    let error = delivered.unwrap_err();
    assert_eq!((error.kind(), error.get(Key::Bucket)), (ErrorKind::Timeout, Some("0")));
    // The ring is not released under the reader either.
    assert_eq!(sink.release(within(50)).await.unwrap_err().kind(), ErrorKind::Timeout);
    assert_eq!(held.tensors().len(), 3);
    drop(held);
    sink.release(soon()).await.unwrap();
}

#[tokio::test]
async fn rejection_and_cancellation_are_errors_of_the_update() {
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let bucket = message(0, &checkpoint()[0]);

    let (mut sink, mut rejecting) = stream("trainer");
    sink.open(&ring, soon()).await.unwrap();
    let consumer = async {
        let held = rejecting.next_bucket().await.unwrap().unwrap();
        held.reject(Error::new(ErrorKind::Backend, "load weights", "no parameter called lm_head"));
    };
    let (delivered, ()) = tokio::join!(sink.deliver(&bucket, soon()), consumer);
    let error = delivered.unwrap_err();
    assert!(error.message().contains("lm_head"), "{error}");
    assert_eq!(error.get(Key::Worker), Some("trainer"));
    let (told, raised) = tokio::join!(sink.fail(&error, soon()), rejecting.next_bucket());
    told.unwrap();
    assert!(raised.unwrap_err().message().contains("lm_head"));

    let (mut sink, cancelled) = stream("trainer");
    sink.open(&ring, soon()).await.unwrap();
    let gone = async { drop(cancelled) };
    let (delivered, ()) = tokio::join!(sink.deliver(&bucket, soon()), gone);
    assert_eq!(delivered.unwrap_err().kind(), ErrorKind::PeerLost);
    sink.fail(&cause(), soon()).await.unwrap();

    let (mut sink, panicking) = stream("trainer");
    sink.open(&ring, soon()).await.unwrap();
    let consumer = tokio::spawn(async move {
        let mut panicking = panicking;
        let _held = panicking.next_bucket().await.unwrap().unwrap();
        panic!("on purpose");
    });
    let error = sink.deliver(&bucket, soon()).await.unwrap_err();
    assert!(error.message().contains("panicked"), "{error}");
    assert!(consumer.await.is_err());
}

#[tokio::test]
async fn a_failure_elsewhere_reaches_the_consumer() {
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let (mut sink, mut waiting) = stream("trainer");
    sink.open(&ring, soon()).await.unwrap();
    let died = cause();
    let (told, raised) = tokio::join!(sink.fail(&died, soon()), waiting.next_bucket());
    told.unwrap();
    assert!(raised.unwrap_err().message().contains("rank 3 has died"));

    // A consumer that holds a bucket past the deadline hears it when it comes back.
    let (mut sink, mut slow) = stream("trainer");
    sink.open(&ring, soon()).await.unwrap();
    let bucket = message(0, &checkpoint()[0]);
    let (_, held) = tokio::join!(sink.deliver(&bucket, within(50)), slow.next_bucket());
    assert_eq!(sink.fail(&cause(), within(50)).await.unwrap_err().kind(), ErrorKind::Timeout);
    drop(held);
    assert!(slow.next_bucket().await.unwrap_err().message().contains("rank 3 has died"));
    // And an update that is dropped without a word is no success.
    let (sink, mut abandoned) = stream("trainer");
    drop(sink);
    assert_eq!(abandoned.next_bucket().await.unwrap_err().kind(), ErrorKind::Aborted);
}
