//! The native worker link: parameter server and worker in one process, over a real socket and a real file.
#![allow(clippy::unwrap_used, reason = "a test that fails may panic")]

mod sink_support;

use std::{
    collections::HashMap,
    io::{Read, Write},
    os::unix::net::UnixStream as StdStream,
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::{
    DType, Error, ErrorKind, Key, Result,
    sink::{BucketMessage, Layout, NativeSink, NativeSinkConfig, TensorInRing, WeightSink},
    types::TensorMeta,
    worker::{Apply, ENDPOINT_SCHEME, NativeWorker, TensorView, UpdateSummary},
};
use proptest::prelude::*;
use sink_support::*;
use tokio::task::JoinHandle;

const UUID: &str = "HOST-test-0";

type Ended = (NativeWorker, Store, Result<UpdateSummary>);

fn start(mut worker: NativeWorker, endpoint: &str, mut store: Store) -> JoinHandle<Ended> {
    let endpoint = endpoint.to_owned();
    tokio::task::spawn_blocking(move || {
        let result = worker.update(&endpoint, &mut store, soon());
        (worker, store, result)
    })
}

fn layout() -> Arc<Layout> {
    let all: Vec<TensorMeta> = checkpoint().into_iter().flatten().map(|(meta, _)| meta).collect();
    Arc::new(Layout::new(all).unwrap())
}

async fn deliver_all(sink: &mut NativeSink, ring: &FileRing) -> Result<()> {
    sink.open(ring, soon()).await?;
    for (number, tensors) in checkpoint().iter().enumerate() {
        let bucket = message(number as u32, tensors);
        fill(ring, &bucket, tensors);
        sink.deliver(&bucket, soon()).await?;
    }
    sink.release(soon()).await?;
    sink.finish(soon()).await
}

fn cause() -> Error {
    Error::new(ErrorKind::PeerLost, "update", "rank 3 has died").with(Key::Rank, 3)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_arrives_whole_and_the_next_one_reuses_mapping_and_layout() {
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let config =
        NativeSinkConfig { kept_ring: Some(7), layout: Some(layout()), ..NativeSinkConfig::default() };
    let mut worker = NativeWorker::new(UUID);
    for round in 0..3 {
        let mut sink = NativeSink::bind(dir.path(), UUID, config.clone()).unwrap();
        let task = start(worker, sink.endpoint(), Store::default());
        deliver_all(&mut sink, &ring).await.unwrap();
        let (back, store, result) = task.await.unwrap();
        worker = back;
        let summary = result.unwrap();
        assert_holds_checkpoint(&store);
        assert_eq!(store.layout.unwrap(), layout().tensors().to_vec());
        assert_eq!(store.indices, (0..5).map(Some).collect::<Vec<_>>());
        assert_eq!((store.post_hooks, summary.buckets, summary.tensors), (1, 2, 5));
        assert_eq!(summary.mapping_kept, round > 0);
    }
    // Another number is another ring: the old mapping must not be used.
    let other = FileRing::new(dir.path(), "other", RING_LEN);
    let config = NativeSinkConfig { kept_ring: Some(8), ..config };
    let mut sink = NativeSink::bind(dir.path(), UUID, config).unwrap();
    let task = start(worker, sink.endpoint(), Store::default());
    deliver_all(&mut sink, &other).await.unwrap();
    let (_, store, result) = task.await.unwrap();
    assert!(!result.unwrap().mapping_kept);
    assert_holds_checkpoint(&store);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_travel_with_the_buckets_when_no_layout_was_given() {
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let mut sink = NativeSink::bind(dir.path(), UUID, NativeSinkConfig::default()).unwrap();
    let task = start(NativeWorker::new(UUID), sink.endpoint(), Store::default());
    deliver_all(&mut sink, &ring).await.unwrap();
    let (_, store, result) = task.await.unwrap();
    assert!(!result.unwrap().mapping_kept);
    assert_eq!((store.layout.as_ref(), store.indices.iter().flatten().count()), (None, 0));
    assert_holds_checkpoint(&store);
    let socket = sink.endpoint().strip_prefix(ENDPOINT_SCHEME).unwrap().to_owned();
    assert!(std::fs::exists(&socket).unwrap());
    drop(sink);
    assert!(!std::fs::exists(&socket).unwrap(), "the socket's file outlived the sink");
}

#[tokio::test(flavor = "multi_thread")]
async fn several_buckets_may_be_under_way() {
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let mut sink = NativeSink::bind(dir.path(), UUID, NativeSinkConfig::default()).unwrap();
    let task = start(NativeWorker::new(UUID).with_window(2), sink.endpoint(), Store::default());
    sink.open(&ring, soon()).await.unwrap();
    assert_eq!(sink.window(), 2);
    let all = checkpoint();
    for (number, tensors) in all.iter().enumerate() {
        let bucket = message(number as u32, tensors);
        fill(&ring, &bucket, tensors);
        sink.post(&bucket, soon()).await.unwrap();
    }
    let full = sink.post(&message(2, &all[0]), soon()).await.unwrap_err();
    assert_eq!(full.kind(), ErrorKind::Internal);
    assert_eq!(sink.acked(soon()).await.unwrap(), 0);
    assert_eq!(sink.acked(soon()).await.unwrap(), 1);
    sink.release(soon()).await.unwrap();
    sink.finish(soon()).await.unwrap();
    assert_holds_checkpoint(&task.await.unwrap().1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workers_error_carries_its_text_and_the_worker_raises_its_own() {
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let mut sink = NativeSink::bind(dir.path(), UUID, NativeSinkConfig::default()).unwrap();
    let store = Store { fail_at: Some(1), ..Store::default() };
    let task = start(NativeWorker::new(UUID), sink.endpoint(), store);
    let error = deliver_all(&mut sink, &ring).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Backend);
    assert!(error.message().contains("no parameter called lm_head"), "{error}");
    assert_eq!((error.get(Key::Worker), error.get(Key::Bucket)), (Some(UUID), Some("1")));
    sink.fail(&error, soon()).await.unwrap();
    let (_, store, result) = task.await.unwrap();
    let own = result.unwrap_err();
    assert!(own.to_string().starts_with("load weights: no parameter called lm_head"), "{own}");
    assert_eq!(store.failed.unwrap(), own.to_string());
    assert_eq!(store.post_hooks, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_ranks_failure_is_raised_by_the_worker_at_any_stage() {
    for stage in 0..4 {
        let dir = runtime_dir();
        let ring = FileRing::new(dir.path(), "ring", RING_LEN);
        let mut sink = NativeSink::bind(dir.path(), UUID, NativeSinkConfig::default()).unwrap();
        let task = start(NativeWorker::new(UUID), sink.endpoint(), Store::default());
        if stage > 0 {
            sink.open(&ring, soon()).await.unwrap();
        }
        if stage > 1 {
            let tensors = &checkpoint()[0];
            sink.deliver(&message(0, tensors), soon()).await.unwrap();
        }
        if stage > 2 {
            sink.release(soon()).await.unwrap();
        }
        sink.fail(&cause(), soon()).await.unwrap();
        let (_, store, result) = task.await.unwrap();
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Aborted);
        assert!(error.message().contains("rank 3 has died"), "stage {stage}: {error}");
        assert_eq!(store.post_hooks, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_parameter_server_ends_the_worker_at_once() {
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let mut sink = NativeSink::bind(dir.path(), UUID, NativeSinkConfig::default()).unwrap();
    let task = start(NativeWorker::new(UUID), sink.endpoint(), Store::default());
    sink.open(&ring, soon()).await.unwrap();
    let begun = Instant::now();
    drop(sink);
    let error = task.await.unwrap().2.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PeerLost);
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_parameter_server_or_a_cancelled_worker_ends_the_wait() {
    let dir = runtime_dir();
    let sink = NativeSink::bind(dir.path(), UUID, NativeSinkConfig::default()).unwrap();
    let endpoint = sink.endpoint().to_owned();
    let late = tokio::task::spawn_blocking({
        let endpoint = endpoint.clone();
        move || NativeWorker::new(UUID).update(&endpoint, &mut Store::default(), within(200))
    });
    assert_eq!(late.await.unwrap().unwrap_err().kind(), ErrorKind::Timeout);
    drop(sink);

    let mut sink = NativeSink::bind(dir.path(), UUID, NativeSinkConfig::default()).unwrap();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let worker = NativeWorker::new(UUID);
    let canceller = worker.canceller();
    let task = start(worker, sink.endpoint(), Store::default());
    sink.open(&ring, soon()).await.unwrap();
    canceller.cancel();
    assert_eq!(task.await.unwrap().2.unwrap_err().kind(), ErrorKind::Aborted);
    let error = sink.deliver(&message(0, &checkpoint()[0]), soon()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PeerLost);
    assert_eq!(error.get(Key::Worker), Some(UUID));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_worker_is_told_why_and_the_right_one_still_gets_in() {
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let mut sink = NativeSink::bind(dir.path(), UUID, NativeSinkConfig::default()).unwrap();
    let (_, _, result) =
        start(NativeWorker::new("HOST-test-1"), sink.endpoint(), Store::default()).await.unwrap();
    let error = result.unwrap_err();
    assert!(error.message().contains("for the worker of HOST-test-0, not of HOST-test-1"), "{error}");
    let waited = sink.open(&ring, within(100)).await.unwrap_err();
    assert_eq!(waited.kind(), ErrorKind::Timeout);
    assert!(waited.message().contains("not of HOST-test-1"), "{waited}");
    // The driver would give up here; the link itself still takes the right one.
    let task = start(NativeWorker::new(UUID), sink.endpoint(), Store::default());
    deliver_all(&mut sink, &ring).await.unwrap();
    assert_holds_checkpoint(&task.await.unwrap().1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_worker_of_the_same_device_raises_and_disturbs_nothing() {
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let mut sink = NativeSink::bind(dir.path(), UUID, NativeSinkConfig::default()).unwrap();
    let first = start(NativeWorker::new(UUID), sink.endpoint(), Store::default());
    sink.open(&ring, soon()).await.unwrap();
    let (_, _, second) = start(NativeWorker::new(UUID), sink.endpoint(), Store::default()).await.unwrap();
    let error = second.unwrap_err();
    assert!(error.message().contains("another worker is already connected"), "{error}");
    for (number, tensors) in checkpoint().iter().enumerate() {
        let bucket = message(number as u32, tensors);
        fill(&ring, &bucket, tensors);
        sink.deliver(&bucket, soon()).await.unwrap();
    }
    sink.release(soon()).await.unwrap();
    sink.finish(soon()).await.unwrap();
    assert_holds_checkpoint(&first.await.unwrap().1);
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_differ_from_the_source_are_refused() {
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let mut digests: HashMap<Arc<str>, u64> = checkpoint()
        .into_iter()
        .flatten()
        .map(|(meta, bytes)| (meta.name, twox_hash::XxHash3_64::oneshot(&bytes)))
        .collect();
    for wrong in [false, true] {
        if wrong {
            digests.insert("layer.0.weight".into(), 1);
        }
        let config =
            NativeSinkConfig { digests: Some(Arc::new(digests.clone())), ..NativeSinkConfig::default() };
        let mut sink = NativeSink::bind(dir.path(), UUID, config).unwrap();
        let task = start(NativeWorker::new(UUID), sink.endpoint(), Store::default());
        let result = deliver_all(&mut sink, &ring).await;
        if wrong {
            let error = result.unwrap_err();
            assert!(error.message().contains("tensor=layer.0.weight"), "{error}");
            sink.fail(&error, soon()).await.unwrap();
        } else {
            result.unwrap();
        }
        assert_eq!(task.await.unwrap().2.is_err(), wrong);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tensor_outside_the_ring_is_the_parameter_servers_error() {
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let mut sink = NativeSink::bind(dir.path(), UUID, NativeSinkConfig::default()).unwrap();
    let task = start(NativeWorker::new(UUID), sink.endpoint(), Store::default());
    sink.open(&ring, soon()).await.unwrap();
    let mut bucket = message(0, &checkpoint()[0]);
    bucket.tensors[0].offset = u64::MAX - 3;
    let error = sink.deliver(&bucket, soon()).await.unwrap_err();
    assert!(error.message().contains("outside the ring of 4096 bytes"), "{error}");
    sink.fail(&error, soon()).await.unwrap();
    assert_eq!(task.await.unwrap().2.unwrap_err().kind(), ErrorKind::Corrupt);
}

#[tokio::test(flavor = "multi_thread")]
async fn open_endpoints_and_rings_are_refused() {
    use std::os::unix::fs::PermissionsExt;
    let chmod = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let dir = runtime_dir();
    let shared = dir.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    chmod(&shared, 0o755);
    let error = NativeSink::bind(&shared, UUID, NativeSinkConfig::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    assert!(error.message().contains("chmod 0700"), "{error}");
    let long = dir.path().join("x".repeat(100));
    let error = NativeSink::bind(&long, UUID, NativeSinkConfig::default()).unwrap_err();
    assert!(error.message().contains("CKPT_RUNTIME_DIR"), "{error}");

    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    chmod(&ring.path, 0o644);
    let mut sink = NativeSink::bind(dir.path(), UUID, NativeSinkConfig::default()).unwrap();
    let socket = sink.endpoint().strip_prefix(ENDPOINT_SCHEME).unwrap();
    assert_eq!(std::fs::metadata(socket).unwrap().permissions().mode() & 0o777, 0o600);
    let task = start(NativeWorker::new(UUID), sink.endpoint(), Store::default());
    let error = sink.open(&ring, soon()).await.unwrap_err();
    assert!(error.message().contains("mode 0600"), "{error}");
    sink.fail(&error, soon()).await.unwrap();
    assert_eq!(task.await.unwrap().2.unwrap_err().kind(), ErrorKind::ConfigInvalid);
}

fn raw(sink: &NativeSink) -> StdStream {
    let stream = StdStream::connect(sink.endpoint().strip_prefix(ENDPOINT_SCHEME).unwrap()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

fn preamble(min: u16, max: u16) -> Vec<u8> {
    let mut bytes = b"CKPTWRKR".to_vec();
    bytes.extend(min.to_le_bytes());
    bytes.extend(max.to_le_bytes());
    bytes.extend([0; 4]);
    bytes
}

fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend([kind, 0, 0, 0]);
    bytes.extend(body);
    bytes
}

fn hello() -> Vec<u8> {
    let mut body = 4711_u32.to_le_bytes().to_vec();
    body.extend(1_u64.to_le_bytes());
    body.extend(1_u32.to_le_bytes());
    body.extend([0; 16]);
    for text in [UUID, "test"] {
        body.extend((text.len() as u32).to_le_bytes());
        body.extend(text.as_bytes());
    }
    frame(16, &body)
}

#[tokio::test(flavor = "multi_thread")]
async fn another_version_is_refused_by_both_sides_in_words() {
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let mut sink = NativeSink::bind(dir.path(), UUID, NativeSinkConfig::default()).unwrap();
    let mut stream = raw(&sink);
    stream.write_all(&preamble(2, 9)).unwrap();
    let error = sink.open(&ring, within(300)).await.unwrap_err();
    assert!(error.message().contains("speaks versions 2 to 9, this build 1 to 1"), "{error}");

    let path = dir.path().join("newer.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&preamble(2, 9)).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
    });
    let path = path.to_str().unwrap().to_owned();
    let worker = tokio::task::spawn_blocking(move || {
        NativeWorker::new(UUID).update(&path, &mut Store::default(), soon())
    });
    let error = worker.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("speaks versions 2 to 9"), "{error}");
    server.join().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn oversized_frames_and_wrong_acks_are_protocol_errors() {
    for (answer, expected) in [
        (vec![0xff, 0xff, 0xff, 0x7f, 17, 0, 0, 0], "over the limit"),
        (frame(99, b""), "unknown message 99"),
        (frame(17, b""), "ends inside `kept`"),
        (frame(17, &[0, 0]), "1 bytes too many"),
        (frame(18, &0_u32.to_le_bytes()), "out of turn"),
    ] {
        let dir = runtime_dir();
        let ring = FileRing::new(dir.path(), "ring", RING_LEN);
        let mut sink = NativeSink::bind(dir.path(), UUID, NativeSinkConfig::default()).unwrap();
        let mut stream = raw(&sink);
        stream.write_all(&[preamble(1, 1), hello(), answer].concat()).unwrap();
        let error = sink.open(&ring, soon()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(error.get(Key::Pid), Some("4711"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever comes instead of a worker or of its answers: an error by the deadline, no panic, no hang.
    #[test]
    fn garbage_from_a_client_is_an_error(
        prefix in prop::sample::select(vec![Vec::new(), preamble(1, 1), [preamble(1, 1), hello()].concat()]),
        noise in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let dir = runtime_dir();
            let ring = FileRing::new(dir.path(), "ring", RING_LEN);
            let mut sink = NativeSink::bind(dir.path(), UUID, NativeSinkConfig::default()).unwrap();
            let mut stream = raw(&sink);
            stream.write_all(&prefix).unwrap();
            stream.write_all(&noise).unwrap();
            drop(stream);
            let opened = sink.open(&ring, within(100)).await;
            // Only the two bytes of a real answer would do.
            prop_assert!(opened.is_err() || noise.starts_with(&[1, 0, 0, 0, 17, 0, 0, 0]));
            Ok(())
        })?;
    }

    /// And the same for a worker whose parameter server talks nonsense.
    #[test]
    fn garbage_from_a_parameter_server_is_an_error(
        open in any::<bool>(),
        noise in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let dir = runtime_dir();
        let path = dir.path().join("s");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let begin = if open { preamble(1, 1) } else { Vec::new() };
            // The worker may have left before the last byte.
            let _ = stream.write_all(&[begin, noise].concat());
        });
        let mut worker = NativeWorker::new(UUID);
        let error = worker.update(path.to_str().unwrap(), &mut Store::default(), soon()).unwrap_err();
        prop_assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::PeerLost), "{error}");
        server.join().unwrap();
    }
}

/// Host time of the link alone: nothing is copied.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: cargo test -p ckpt-core --release --test sink_native -- --ignored --nocapture"]
async fn time_of_the_link_for_a_large_model() {
    struct Nothing(u64);
    impl Apply for Nothing {
        fn bucket(&mut self, _bucket: u32, tensors: &[TensorView<'_>]) -> Result<()> {
            self.0 = tensors.iter().map(TensorView::address).fold(self.0, u64::wrapping_add);
            Ok(())
        }
    }
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let all: Vec<TensorMeta> = (0..138_980)
        .map(|i| {
            let name = format!("model.layers.{}.mlp.experts.{}.gate_proj.weight", i / 2300, i % 2300);
            TensorMeta::new(name, DType::U8, [16]).unwrap()
        })
        .collect();
    let place = |(i, meta): (usize, &TensorMeta)| TensorInRing { meta: meta.clone(), offset: i as u64 * 16 };
    let buckets: Vec<BucketMessage> = all
        .chunks(200)
        .zip(0..)
        .map(|(metas, bucket)| BucketMessage {
            bucket,
            tensors: metas.iter().enumerate().map(place).collect(),
        })
        .collect();
    let layout = Arc::new(Layout::new(all).unwrap());
    let mut worker = NativeWorker::new(UUID);
    for layout in [None, Some(layout.clone()), Some(layout)] {
        let config = NativeSinkConfig { layout, ..NativeSinkConfig::default() };
        let mut sink = NativeSink::bind(dir.path(), UUID, config).unwrap();
        let endpoint = sink.endpoint().to_owned();
        let task = tokio::task::spawn_blocking(move || {
            let result = worker.update(&endpoint, &mut Nothing(0), soon());
            (worker, result)
        });
        let begun = Instant::now();
        sink.open(&ring, soon()).await.unwrap();
        let opened = begun.elapsed();
        for bucket in &buckets {
            sink.deliver(bucket, soon()).await.unwrap();
        }
        println!("open {opened:?}, {} buckets {:?}", buckets.len(), begun.elapsed() - opened);
        sink.release(soon()).await.unwrap();
        sink.finish(soon()).await.unwrap();
        let (back, result) = task.await.unwrap();
        result.unwrap();
        worker = back;
    }
}
