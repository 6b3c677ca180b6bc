//! The checkpoint-engine link against another implementation of ZeroMQ, driven to misbehave in every way a worker can.
//! What Python makes of the messages is tested beside the emitter and, over pyzmq, in `integration-tests`.
#![allow(clippy::unwrap_used, reason = "a test that fails may panic")]

mod sink_support;

use std::{
    io::Write,
    os::unix::net::UnixStream as StdStream,
    path::Path,
    time::{Duration, Instant},
};

use bytes::Bytes;
use ckpt_core::{
    DType, Error, ErrorKind, Key,
    sink::{
        BucketMessage, CheckpointEngineSink, TensorInRing, WeightSink, WireVersion, release_stranded_workers,
    },
    types::TensorMeta,
};
use proptest::prelude::*;
use sink_support::*;
use zeromq::{DealerSocket, PubSocket, RepSocket, Socket, SocketRecv, SocketSend};

const UUID: &str = "HOST-test-0";

fn bind(dir: &Path, wire: WireVersion) -> CheckpointEngineSink {
    CheckpointEngineSink::bind(dir, UUID, wire).unwrap()
}

async fn connect(sink: &CheckpointEngineSink) -> RepSocket {
    let mut socket = RepSocket::new();
    socket.connect(sink.endpoint()).await.unwrap();
    socket
}

async fn receive(socket: &mut RepSocket) -> Bytes {
    let message = tokio::time::timeout(Duration::from_secs(20), socket.recv()).await.unwrap().unwrap();
    assert_eq!(message.len(), 1);
    message.get(0).unwrap().clone()
}

async fn reply(socket: &mut RepSocket, bytes: impl Into<Bytes>) {
    socket.send(bytes.into().into()).await.unwrap();
}

fn is_exception(message: &[u8], text: &str) -> bool {
    message.starts_with(b"\x80\x04cbuiltins\nRuntimeError\n")
        && message.windows(text.len()).any(|w| w == text.as_bytes())
}

fn cause() -> Error {
    Error::new(ErrorKind::PeerLost, "update", "rank 3 has died").with(Key::Rank, 3)
}

fn bucket(number: u32) -> BucketMessage {
    message(number, &checkpoint()[number as usize % 2])
}

/// Opens the ring with a worker that says yes.
async fn opened(dir: &Path) -> (CheckpointEngineSink, RepSocket, FileRing) {
    let ring = FileRing::new(dir, "ring", RING_LEN);
    let mut sink = bind(dir, WireVersion::Ce04);
    let mut worker = connect(&sink).await;
    let worker_side = async {
        let first = receive(&mut worker).await;
        assert!(first.starts_with(b"\x80\x04cckpt_engine.worker\nrebuild_host_buffer\n("));
        reply(&mut worker, "").await;
    };
    let (result, ()) = tokio::join!(sink.open(&ring, soon()), worker_side);
    result.unwrap();
    (sink, worker, ring)
}

#[tokio::test]
async fn both_versions_take_an_update() {
    for (wire, nones) in [(WireVersion::Ce04, 2), (WireVersion::Ce03, 1)] {
        let dir = runtime_dir();
        let ring = FileRing::new(dir.path(), "ring", RING_LEN);
        let mut sink = bind(dir.path(), wire);
        assert!(sink.endpoint().len() < 6 + 108);
        let mut worker = connect(&sink).await;
        let worker_side = tokio::spawn(async move {
            let mut seen = Vec::new();
            for _ in 0..3 + nones {
                seen.push(receive(&mut worker).await);
                reply(&mut worker, "").await;
            }
            seen
        });
        sink.open(&ring, soon()).await.unwrap();
        sink.deliver(&bucket(0), soon()).await.unwrap();
        sink.deliver(&bucket(1), soon()).await.unwrap();
        sink.release(soon()).await.unwrap();
        sink.finish(soon()).await.unwrap();
        sink.fail(&cause(), soon()).await.unwrap();
        let seen = worker_side.await.unwrap();
        assert!(seen[3..].iter().all(|m| &m[..] == b"\x80\x04N."));
        let path = sink.endpoint().strip_prefix("ipc://").unwrap().to_owned();
        drop(sink);
        assert!(!Path::new(&path).exists());
    }
}

#[tokio::test]
async fn a_workers_traceback_is_in_the_error_and_the_exception_follows() {
    let dir = runtime_dir();
    let (mut sink, mut worker, _ring) = opened(dir.path()).await;
    let worker_side = tokio::spawn(async move {
        receive(&mut worker).await;
        reply(&mut worker, "").await;
        receive(&mut worker).await;
        reply(&mut worker, "Traceback (most recent call last):\nValueError: no lm_head").await;
        receive(&mut worker).await
    });
    sink.deliver(&bucket(0), soon()).await.unwrap();
    let error = sink.deliver(&bucket(1), soon()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Backend);
    assert!(error.message().contains("ValueError: no lm_head"), "{error}");
    assert_eq!((error.get(Key::Worker), error.get(Key::Bucket)), (Some(UUID), Some("1")));
    assert_eq!(error.get(Key::Pid), Some(std::process::id().to_string().as_str()));
    sink.fail(&error, soon()).await.unwrap();
    assert!(is_exception(&worker_side.await.unwrap(), "no lm_head"));
}

#[tokio::test]
async fn a_failure_waits_for_the_owed_reply_before_it_is_told() {
    let dir = runtime_dir();
    let (mut sink, mut worker, _ring) = opened(dir.path()).await;
    let (go, gone) = tokio::sync::oneshot::channel::<()>();
    let worker_side = tokio::spawn(async move {
        receive(&mut worker).await;
        gone.await.unwrap();
        reply(&mut worker, "").await;
        receive(&mut worker).await
    });
    let error = sink.deliver(&bucket(0), within(100)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    // Still busy at the deadline of `fail`: that is said, and the worker hears it all the same.
    let busy = sink.fail(&cause(), within(100)).await.unwrap_err();
    assert!(busy.message().contains("will be told when it is back"), "{busy}");
    drop(sink);
    go.send(()).unwrap();
    assert!(is_exception(&worker_side.await.unwrap(), "rank 3 has died"));
}

#[tokio::test]
async fn a_worker_that_waits_for_its_first_message_raises_too() {
    let dir = runtime_dir();
    let mut sink = bind(dir.path(), WireVersion::Ce04);
    let mut worker = connect(&sink).await;
    let worker_side = tokio::spawn(async move {
        let first = receive(&mut worker).await;
        reply(&mut worker, "AssertionError: not a tuple").await;
        // It waits for one more message of any kind, then raises.
        (first, receive(&mut worker).await)
    });
    sink.fail(&cause(), soon()).await.unwrap();
    let (first, second) = worker_side.await.unwrap();
    assert!(is_exception(&first, "rank 3 has died") && is_exception(&second, "rank 3 has died"));
}

#[tokio::test]
async fn a_worker_that_never_comes_or_dies_is_an_error_that_says_so() {
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let mut sink = bind(dir.path(), WireVersion::Ce04);
    let error = sink.open(&ring, within(50)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.message().contains("no worker has connected"), "{error}");
    assert_eq!(error.get(Key::Worker), Some(UUID));

    let (mut sink, mut worker, _ring) = opened(dir.path().join("b").as_path().make()).await;
    let worker_side = tokio::spawn(async move {
        receive(&mut worker).await;
        drop(worker);
    });
    let begun = Instant::now();
    let error = sink.deliver(&bucket(0), soon()).await.unwrap_err();
    worker_side.await.unwrap();
    assert_eq!(error.kind(), ErrorKind::PeerLost);
    assert!(error.message().contains("died or raised"), "{error}");
    sink.fail(&error, soon()).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5));
}

trait Make {
    fn make(&self) -> &Self;
}

impl Make for Path {
    /// Creates it as a private folder.
    fn make(&self) -> &Self {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new().mode(0o700).create(self).unwrap();
        self
    }
}

#[tokio::test]
async fn a_second_worker_gets_an_exception_and_no_bucket() {
    let dir = runtime_dir();
    let (mut sink, mut first, _ring) = opened(dir.path()).await;
    let mut second = connect(&sink).await;
    let told = receive(&mut second).await;
    assert!(is_exception(&told, "another worker is already connected"), "{told:?}");
    let worker_side = tokio::spawn(async move {
        for _ in 0..3 {
            let message = receive(&mut first).await;
            assert!(message.starts_with(b"\x80\x04](}("));
            reply(&mut first, "").await;
        }
    });
    for number in 0..3 {
        sink.deliver(&bucket(number), soon()).await.unwrap();
    }
    worker_side.await.unwrap();
}

#[tokio::test]
async fn a_reply_sent_twice_never_acks_the_next_bucket() {
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let mut sink = bind(dir.path(), WireVersion::Ce04);
    // A raw peer that speaks ZMTP as a REP socket; real ones cannot do this.
    let path = sink.endpoint().strip_prefix("ipc://").unwrap().to_owned();
    let mut raw = StdStream::connect(path).unwrap();
    let mut hello = vec![0_u8; 64];
    (hello[0], hello[9], hello[10]) = (0xff, 0x7f, 3);
    hello[12..16].copy_from_slice(b"NULL");
    hello.extend_from_slice(b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03REP");
    let answer = |n: u8| [1, 4, 0, 0, 0, n, 1, 0, 0, 0];
    raw.write_all(&hello).unwrap();
    // The answer to message 1 twice, before anything was asked: the first is early, the second stale.
    raw.write_all(&answer(1)).unwrap();
    raw.write_all(&answer(1)).unwrap();
    let mut acks = 0;
    let mut result = sink.open(&ring, soon()).await;
    while result.is_ok() && acks < 3 {
        acks += 1;
        result = sink.deliver(&bucket(acks), soon()).await;
    }
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(acks <= 1, "a bucket was acked by a stale reply");
}

#[tokio::test]
async fn other_socket_types_and_noise_do_not_take_the_workers_place() {
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let mut sink = bind(dir.path(), WireVersion::Ce04);
    let path = sink.endpoint().strip_prefix("ipc://").unwrap().to_owned();
    let _silent = StdStream::connect(&path).unwrap();
    let mut noisy = StdStream::connect(&path).unwrap();
    noisy.write_all(&[0x55; 100]).unwrap();
    // Neither can be a worker; their handshakes end on their own side or on ours.
    let _ = tokio::time::timeout(Duration::from_secs(5), DealerSocket::new().connect(sink.endpoint())).await;
    let _ = tokio::time::timeout(Duration::from_secs(5), PubSocket::new().connect(sink.endpoint())).await;
    let error = sink.open(&ring, within(100)).await.unwrap_err();
    assert!(error.message().contains("a client came that is no such worker"), "{error}");
    let mut worker = connect(&sink).await;
    let worker_side = async {
        receive(&mut worker).await;
        reply(&mut worker, "").await;
    };
    let (result, ()) = tokio::join!(sink.open(&ring, soon()), worker_side);
    result.unwrap();
}

#[tokio::test]
async fn replies_that_are_no_text_are_never_loaded() {
    let pickled: &[u8] = b"\x80\x04\x8c\x08builtins\x94\x8c\x0aValueError\x94\x93\x8c\x07no head\x85R.";
    for (bytes, kind, expected) in [
        (pickled, ErrorKind::Backend, "builtins | ValueError | no head"),
        (&[0xff, 0xfe][..], ErrorKind::Corrupt, "neither empty nor text"),
    ] {
        let dir = runtime_dir();
        let (mut sink, mut worker, _ring) = opened(dir.path()).await;
        let worker_side = tokio::spawn(async move {
            receive(&mut worker).await;
            reply(&mut worker, bytes.to_vec()).await;
            receive(&mut worker).await
        });
        let error = sink.deliver(&bucket(0), soon()).await.unwrap_err();
        assert_eq!(error.kind(), kind);
        assert!(error.message().contains(expected), "{error}");
        sink.fail(&error, soon()).await.unwrap();
        assert!(is_exception(&worker_side.await.unwrap(), "deliver a bucket"));
    }
}

#[tokio::test]
async fn a_tensor_that_torch_cannot_hold_is_named_and_nothing_is_sent() {
    let dir = runtime_dir();
    let (mut sink, mut worker, _ring) = opened(dir.path()).await;
    let meta = TensorMeta::new("layers.3.q", DType::F6_E2M3, [4]).unwrap();
    let bad = BucketMessage { bucket: 0, tensors: vec![TensorInRing { meta, offset: 0 }] };
    let error = sink.deliver(&bad, soon()).await.unwrap_err();
    assert_eq!((error.kind(), error.get(Key::Tensor)), (ErrorKind::Unsupported, Some("layers.3.q")));
    let worker_side = tokio::spawn(async move { receive(&mut worker).await });
    sink.fail(&error, soon()).await.unwrap();
    assert!(is_exception(&worker_side.await.unwrap(), "layers.3.q"));
}

#[tokio::test]
async fn a_worker_of_a_dead_parameter_server_is_freed() {
    let dir = runtime_dir();
    // What a killed process leaves: a socket file that nobody listens on.
    let sink = bind(dir.path(), WireVersion::Ce04);
    let path = sink.endpoint().strip_prefix("ipc://").unwrap().to_owned();
    drop(sink);
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let live = bind(dir.path(), WireVersion::Ce04);
    let worker_side = tokio::spawn(async move {
        let mut worker = RepSocket::new();
        // Retries until somebody listens again, as libzmq does.
        worker.connect(&format!("ipc://{path}")).await.unwrap();
        receive(&mut worker).await
    });
    assert_eq!(release_stranded_workers(dir.path(), Some(UUID), soon()).await.unwrap(), 1);
    assert!(is_exception(&worker_side.await.unwrap(), "died"));
    // Nothing is left to do, and the live endpoint was not touched.
    assert_eq!(release_stranded_workers(dir.path(), Some(UUID), soon()).await.unwrap(), 0);
    assert!(Path::new(live.endpoint().strip_prefix("ipc://").unwrap()).exists());
}

#[tokio::test]
async fn calls_out_of_order_are_bugs_that_are_reported() {
    let dir = runtime_dir();
    let mut sink = bind(dir.path(), WireVersion::Ce04);
    for error in [
        sink.deliver(&bucket(0), soon()).await.unwrap_err(),
        sink.release(soon()).await.unwrap_err(),
        sink.finish(soon()).await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Internal);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever comes from a client, before or after a proper handshake: an error by the deadline, no panic, no hang.
    #[test]
    fn garbage_is_an_error(
        greeted in any::<bool>(),
        noise in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let dir = runtime_dir();
            let ring = FileRing::new(dir.path(), "ring", RING_LEN);
            let mut sink = bind(dir.path(), WireVersion::Ce04);
            let mut raw = StdStream::connect(sink.endpoint().strip_prefix("ipc://").unwrap()).unwrap();
            if greeted {
                let mut hello = vec![0_u8; 64];
                (hello[0], hello[9], hello[10]) = (0xff, 0x7f, 3);
                hello[12..16].copy_from_slice(b"NULL");
                hello.extend_from_slice(b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03REP");
                raw.write_all(&hello).unwrap();
            }
            raw.write_all(&noise).unwrap();
            drop(raw);
            prop_assert!(sink.open(&ring, within(100)).await.is_err());
            Ok(())
        })?;
    }
}
