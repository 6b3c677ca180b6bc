//! The checkpoint-engine link against libzmq: a pyzmq worker written from the protocol's description, on a ring of the
//! host device. `CKPT_TEST_PYTHON` names a Python that has pyzmq.
#![allow(clippy::unwrap_used, reason = "a test that fails may panic")]

use std::{
    collections::BTreeMap,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::{
    DType, Error, ErrorKind, Key, Result,
    device::{BufferSlice, DeviceBackend, DeviceConfig, Ring, host::HostDevice},
    sink::{
        BucketMessage, CheckpointEngineSink, TensorInRing, WeightSink, WireVersion, release_stranded_workers,
    },
    types::{TensorMeta, align_up},
};
use integration_tests::{LONG, Process, Program};

const RING_LEN: u64 = 4 << 20;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn worker(endpoint: &str, options: &[&str]) -> Process {
    let python = std::env::var("CKPT_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python/ce_worker.py");
    Program::new(python).arg(script).arg(endpoint).args(options).spawn()
}

struct Setup {
    _dir: tempfile::TempDir,
    runtime_dir: PathBuf,
    uuid: String,
    ring: Arc<dyn Ring>,
}

fn setup() -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let runtime_dir = dir.path().join("run");
    std::fs::DirBuilder::new().mode(0o700).create(&runtime_dir).unwrap();
    let config = DeviceConfig { rank: 0, local_rank: 0, runtime_dir: runtime_dir.clone() };
    let device = HostDevice::open(&config).unwrap();
    let ring = device.allocate_ring(RING_LEN).unwrap();
    Setup { _dir: dir, runtime_dir, uuid: device.info().uuid.clone(), ring }
}

impl Setup {
    fn bind(&self, wire: WireVersion) -> CheckpointEngineSink {
        CheckpointEngineSink::bind(&self.runtime_dir, &self.uuid, wire).unwrap()
    }

    /// Puts a bucket's bytes into the ring.
    fn load(&self, bucket: &BucketMessage) {
        for tensor in &bucket.tensors {
            let range = tensor.offset..tensor.offset + tensor.meta.len_bytes();
            let slice = BufferSlice::new(self.ring.buffer(), range).unwrap();
            // SAFETY: the worker reads a bucket only between its message and its ack; this is before the message.
            unsafe { slice.as_mut_slice() }.unwrap().copy_from_slice(&content(&tensor.meta));
        }
    }
}

fn content(meta: &TensorMeta) -> Vec<u8> {
    (0..meta.len_bytes()).map(|i| (i as u8).wrapping_mul(37) ^ meta.name.len() as u8).collect()
}

/// Three buckets: every dtype that torch has, odd shapes, and a message of several hundred kilobytes.
fn buckets() -> Vec<BucketMessage> {
    let torch = |d: &&DType| !matches!(d, DType::F6_E2M3 | DType::F6_E3M2);
    let every = DType::ALL.iter().filter(torch).map(|d| (format!("dtype.{d}"), *d, vec![3, 2]));
    let odd = [("scalar", vec![]), ("empty", vec![0, 7]), ("long \u{e9}", vec![1, 2, 1, 3, 1])];
    let odd = odd.map(|(name, shape)| (name.to_owned(), DType::BF16, shape));
    let many = (0..3000).map(|i| (format!("model.layers.{i}.{}", "x".repeat(100)), DType::U8, vec![5]));
    let place = |number: u32, tensors: Vec<(String, DType, Vec<u64>)>| {
        let mut offset = u64::from(number % 2) * (RING_LEN / 2);
        let tensors = tensors.into_iter().map(|(name, dtype, shape)| {
            let meta = TensorMeta::new(name, dtype, shape).unwrap();
            let placed = TensorInRing { offset, meta };
            offset += align_up(placed.meta.len_bytes());
            placed
        });
        BucketMessage { bucket: number, tensors: tensors.collect() }
    };
    vec![place(0, every.collect()), place(1, odd.into()), place(2, many.collect())]
}

async fn deliver(setup: &Setup, sink: &mut CheckpointEngineSink) -> Result<()> {
    sink.open(&*setup.ring, soon()).await?;
    for bucket in buckets() {
        setup.load(&bucket);
        sink.deliver(&bucket, soon()).await?;
    }
    sink.release(soon()).await?;
    sink.finish(soon()).await
}

fn cause() -> Error {
    Error::new(ErrorKind::PeerLost, "update", "rank 3 has died").with(Key::Rank, 3)
}

#[tokio::test]
#[ignore = "needs pyzmq: pip install pyzmq; cargo test -p integration-tests --test pyzmq_worker -- --ignored"]
async fn every_tensor_arrives_in_both_versions() {
    for (wire, version) in [(WireVersion::Ce04, "0.4"), (WireVersion::Ce03, "0.3")] {
        let setup = setup();
        let mut sink = setup.bind(wire);
        let worker = worker(sink.endpoint(), &["--version", version]);
        deliver(&setup, &mut sink).await.unwrap();
        let seen = worker.finish(LONG).await.expect_code(0).json();
        assert_eq!(seen["events"], serde_json::json!(["release", "hook"]));
        let expected: BTreeMap<String, serde_json::Value> = buckets()
            .iter()
            .flat_map(|b| &b.tensors)
            .map(|t| {
                let meta = &t.meta;
                let mut shape = meta.shape.to_vec();
                if meta.dtype == DType::F4 {
                    // Two elements in each of torch's.
                    shape[1] /= 2;
                }
                let hex: String = content(meta).iter().map(|b| format!("{b:02x}")).collect();
                let value = serde_json::json!({"dtype": meta.dtype.torch_name(), "shape": shape, "hex": hex});
                (meta.name.to_string(), value)
            })
            .collect();
        let seen: BTreeMap<String, serde_json::Value> =
            serde_json::from_value(seen["tensors"].clone()).unwrap();
        assert_eq!(seen.len(), expected.len());
        for (name, expected) in expected {
            assert_eq!(seen[&name], expected, "{name}");
        }
    }
}

#[tokio::test]
#[ignore = "needs pyzmq: pip install pyzmq; cargo test -p integration-tests --test pyzmq_worker -- --ignored"]
async fn a_worker_that_raises_is_quoted_and_told_to_leave() {
    for (option, expected) in [
        (&["--fail-at-bucket", "1"][..], "ValueError: there is no parameter called lm_head"),
        (&["--fail-at-open"][..], "MemoryError: cannot map the buffer"),
    ] {
        let setup = setup();
        let mut sink = setup.bind(WireVersion::Ce04);
        let worker = worker(sink.endpoint(), option);
        let error = deliver(&setup, &mut sink).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Backend);
        assert!(error.message().contains(expected), "{error}");
        assert_eq!(error.get(Key::Worker), Some(setup.uuid.as_str()));
        assert_eq!(error.get(Key::Pid), Some(worker.pid().to_string().as_str()));
        sink.fail(&error, soon()).await.unwrap();
        let ended = worker.finish(LONG).await.expect_code(1);
        assert!(ended.stderr.contains(expected.split(": ").next().unwrap()), "{}", ended.stderr);
    }
}

#[tokio::test]
#[ignore = "needs pyzmq: pip install pyzmq; cargo test -p integration-tests --test pyzmq_worker -- --ignored"]
async fn a_failure_elsewhere_makes_the_worker_raise_at_any_stage() {
    for stage in 0..4 {
        let setup = setup();
        let mut sink = setup.bind(WireVersion::Ce04);
        let worker = worker(sink.endpoint(), &[]);
        if stage > 0 {
            sink.open(&*setup.ring, soon()).await.unwrap();
        }
        if stage > 1 {
            setup.load(&buckets()[0]);
            sink.deliver(&buckets()[0], soon()).await.unwrap();
        }
        if stage > 2 {
            sink.release(soon()).await.unwrap();
        }
        sink.fail(&cause(), soon()).await.unwrap();
        drop(sink);
        let ended = worker.finish(LONG).await.expect_code(1);
        // Before the ring and after its release the worker complains in its own words.
        if (1..3).contains(&stage) {
            assert!(
                ended.stderr.contains("RuntimeError: update: rank 3 has died [rank=3]"),
                "{}",
                ended.stderr
            );
        }
    }
}

#[tokio::test]
#[ignore = "needs pyzmq: pip install pyzmq; cargo test -p integration-tests --test pyzmq_worker -- --ignored"]
async fn a_worker_killed_while_it_owes_a_reply_shows_at_once() {
    let setup = setup();
    let mut sink = setup.bind(WireVersion::Ce04);
    let worker = worker(sink.endpoint(), &["--die-at-bucket", "1"]);
    let pid = worker.pid();
    let begun = Instant::now();
    let error = deliver(&setup, &mut sink).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PeerLost);
    assert_eq!(error.get(Key::Pid), Some(pid.to_string().as_str()));
    sink.fail(&error, soon()).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    worker.finish(LONG).await;
}

#[tokio::test]
#[ignore = "needs pyzmq: pip install pyzmq; cargo test -p integration-tests --test pyzmq_worker -- --ignored"]
async fn a_second_worker_raises_and_the_first_goes_on() {
    let setup = setup();
    let mut sink = setup.bind(WireVersion::Ce04);
    let first = worker(sink.endpoint(), &[]);
    sink.open(&*setup.ring, soon()).await.unwrap();
    let second = worker(sink.endpoint(), &[]).finish(LONG).await.expect_code(1);
    assert!(!second.stdout.contains("opened"));
    for bucket in buckets() {
        setup.load(&bucket);
        sink.deliver(&bucket, soon()).await.unwrap();
    }
    sink.release(soon()).await.unwrap();
    sink.finish(soon()).await.unwrap();
    first.finish(LONG).await.expect_code(0);
}

#[tokio::test]
#[ignore = "needs pyzmq: pip install pyzmq; cargo test -p integration-tests --test pyzmq_worker -- --ignored"]
async fn a_worker_whose_parameter_server_died_is_freed_by_the_next_one() {
    let setup = setup();
    let mut sink = setup.bind(WireVersion::Ce04);
    let worker = worker(sink.endpoint(), &[]);
    sink.open(&*setup.ring, soon()).await.unwrap();
    let path = sink.endpoint().strip_prefix("ipc://").unwrap().to_owned();
    drop(sink);
    // A killed process leaves its socket's file.
    assert!(!Path::new(&path).exists());
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let freed = release_stranded_workers(&setup.runtime_dir, Some(&setup.uuid), soon()).await.unwrap();
    assert_eq!(freed, 1);
    let ended = worker.finish(LONG).await.expect_code(1);
    assert!(ended.stderr.contains("the parameter server of this update died"), "{}", ended.stderr);
}
