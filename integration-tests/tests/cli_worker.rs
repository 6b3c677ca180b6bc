//! The reference engine against a parameter server that the test plays itself.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use ckpt_core::{
    DType, ErrorKind, Result, Version,
    checkpoint::{CheckpointSource, NamedTensor, compare},
    device::{
        BufferSlice, DeviceBackend, DeviceConfig, Ring,
        host::{HostBuffer, HostDevice, private_dir},
    },
    engine::{Engine, EngineConfig, EngineRequest, create},
    sink::{BucketMessage, NativeSink, NativeSinkConfig, TensorInRing, WeightSink},
    types::TensorMeta,
};
use integration_tests::{LONG, Process, ckpt, http_get};
use rustix::process::Signal;
use tempfile::TempDir;

const TENSOR_BYTES: u64 = 1000;
const SLOT: u64 = 1024;

/// One rank without a hub: a ring, a sink, and the bytes of two tensors, one a bucket.
struct Server {
    folder: TempDir,
    device: HostDevice,
    ring: Arc<dyn Ring>,
    tensors: Vec<(TensorMeta, Vec<u8>)>,
}

impl Server {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let runtime_dir = folder.path().join("run");
        private_dir(&runtime_dir).unwrap();
        let device = HostDevice::open(&DeviceConfig { rank: 0, local_rank: 0, runtime_dir }).unwrap();
        let ring = device.allocate_ring(2 * SLOT).unwrap();
        let mut server = Self { folder, device, ring, tensors: Vec::new() };
        server.fill(1).await;
        server
    }

    /// Puts new bytes into the ring.
    async fn fill(&mut self, seed: u8) {
        let stream = self.device.stream("fill").unwrap();
        self.tensors.clear();
        for (number, name) in ["model.norm.weight", "lm_head.weight"].into_iter().enumerate() {
            let meta = TensorMeta::new(name, DType::BF16, [TENSOR_BYTES / 2]).unwrap();
            let bytes: Vec<u8> =
                (0..TENSOR_BYTES).map(|i| (i as u8).wrapping_mul(7).wrapping_add(seed)).collect();
            let source = HostBuffer::from_bytes(&bytes).unwrap().slice();
            let start = number as u64 * SLOT;
            let place = BufferSlice::whole(self.ring.buffer()).slice(start..start + TENSOR_BYTES).unwrap();
            stream.copy(source, place).unwrap();
            self.tensors.push((meta, bytes));
        }
        stream.record().unwrap().done(deadline()).await.unwrap();
    }

    fn sink(&self, uuid: &str) -> NativeSink {
        NativeSink::bind(&self.folder.path().join("run"), uuid, NativeSinkConfig::default()).unwrap()
    }

    fn bucket(&self, number: u32) -> BucketMessage {
        let meta = self.tensors[number as usize].0.clone();
        let tensors = vec![TensorInRing { meta, offset: u64::from(number) * SLOT }];
        BucketMessage { bucket: number, tensors }
    }

    /// The whole update over one link. After an error the worker is told, as the driver does it.
    async fn send(&self, sink: &mut NativeSink) -> Result<()> {
        let sent = async {
            sink.open(&*self.ring, deadline()).await?;
            for number in 0..2 {
                sink.deliver(&self.bucket(number), deadline()).await?;
            }
            sink.release(deadline()).await?;
            sink.finish(deadline()).await
        }
        .await;
        if let Err(error) = &sent {
            // The worker may be dead; the first error is what counts.
            let _ = sink.fail(error, deadline()).await;
        }
        sent
    }

    fn source(&self) -> CheckpointSource {
        let tensors =
            self.tensors.iter().map(|(meta, bytes)| NamedTensor::from_slice(meta.clone(), bytes).unwrap());
        CheckpointSource::from_tensors(tensors).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

fn deadline() -> Instant {
    Instant::now() + LONG
}

/// Starts an engine for these devices and waits for its address.
async fn engine(server: &Server, uuids: &[&str], more: &[&str]) -> (Process, String) {
    let names = uuids.iter().flat_map(|uuid| ["--uuid", uuid]);
    let program = ckpt!("worker", "--exit-with-parent", "--dump", server.path("dump")).args(names).args(more);
    let mut process = program.env("CKPT_RUNTIME_DIR", server.path("run")).spawn();
    let line = process.stdout_line("listens on").await;
    let address = line.rsplit(' ').next().unwrap().to_owned();
    (process, address)
}

fn client(address: &str) -> Arc<dyn Engine> {
    create(EngineConfig {
        kind: "vllm".into(),
        endpoint: address.into(),
        uds: None,
        ca: None,
        template: None,
    })
    .unwrap()
}

fn request(endpoints: &[(&str, &NativeSink)]) -> EngineRequest {
    let endpoints: BTreeMap<String, String> =
        endpoints.iter().map(|(uuid, sink)| ((*uuid).to_owned(), sink.endpoint().to_owned())).collect();
    EngineRequest { endpoints, version: Version(1) }
}

/// One update of one device: what the parameter server and what the engine's client saw.
async fn update(server: &Server, address: &str, uuid: &str) -> (Result<()>, Result<()>) {
    let mut sink = server.sink(uuid);
    let request = request(&[(uuid, &sink)]);
    let client = client(address);
    client.ready(deadline()).await.unwrap();
    tokio::join!(server.send(&mut sink), client.update(&request, deadline()))
}

fn assert_holds(server: &Server, dump: &Path) {
    let held = CheckpointSource::open(dump).unwrap();
    let comparison = compare(&server.source(), &held).unwrap();
    assert!(comparison.is_equal(), "{comparison:?}");
}

#[tokio::test]
async fn an_engine_takes_updates_and_shows_what_it_holds() {
    let mut server = Server::new().await;
    let (process, address) = engine(&server, &["HOST-a-0"], &[]).await;
    for (number, seed) in [(1, 1), (2, 99)] {
        server.fill(seed).await;
        let (sent, told) = update(&server, &address, "HOST-a-0").await;
        sent.unwrap();
        told.unwrap();
        assert_holds(&server, &server.path("dump/HOST-a-0.safetensors"));
        let state = http_get(&address, "/v1/state").await.json();
        assert_eq!(state[0]["tensors"], 2);
        assert_eq!(state[0]["len_bytes"], 2 * TENSOR_BYTES);
        assert_eq!(state[0]["updates"], number);
        assert_eq!(state[0]["mixed"], false);
    }
    let tensors = http_get(&address, "/v1/tensors?uuid=HOST-a-0").await.json();
    assert_eq!(tensors[0]["name"], "lm_head.weight");
    assert_eq!(tensors[0]["dtype"], "BF16");
    assert_eq!(tensors[0]["digest"], tensors[1]["digest"], "both tensors have the same bytes");
    assert_eq!(http_get(&address, "/v1/tensors?uuid=other").await.status, 404);

    process.signal(Signal::TERM);
    process.finish(LONG).await.expect_code(0);
}

#[tokio::test]
async fn one_engine_owns_several_devices() {
    let server = Server::new().await;
    let (_process, address) = engine(&server, &["HOST-a-0", "HOST-a-1"], &[]).await;
    let (mut first, mut second) = (server.sink("HOST-a-0"), server.sink("HOST-a-1"));
    let request = request(&[("HOST-a-0", &first), ("HOST-a-1", &second)]);
    let client = client(&address);
    let (one, two, told) =
        tokio::join!(server.send(&mut first), server.send(&mut second), client.update(&request, deadline()));
    one.unwrap();
    two.unwrap();
    told.unwrap();
    let state = http_get(&address, "/v1/state").await.json();
    assert_eq!(state[0]["digest"], state[1]["digest"]);
    assert_holds(&server, &server.path("dump/HOST-a-1.safetensors"));
}

#[tokio::test]
async fn a_failure_in_a_bucket_reaches_both_sides_and_the_next_update_works() {
    let server = Server::new().await;
    let (_process, address) =
        engine(&server, &["HOST-a-0"], &["--fail-at-bucket", "1", "--fault-once"]).await;
    let (sent, told) = update(&server, &address, "HOST-a-0").await;
    for error in [sent.unwrap_err(), told.unwrap_err()] {
        assert!(error.to_string().contains("bucket 1 fails because"), "{error}");
    }
    assert_eq!(http_get(&address, "/v1/state").await.json()[0]["mixed"], true);
    let (sent, told) = update(&server, &address, "HOST-a-0").await;
    sent.unwrap();
    told.unwrap();
    assert_eq!(http_get(&address, "/v1/state").await.json()[0]["mixed"], false);
}

#[tokio::test]
async fn a_failure_in_the_post_hook_reaches_both_sides() {
    let server = Server::new().await;
    let (_process, address) = engine(&server, &["HOST-a-0"], &["--fail-in-post-hook"]).await;
    let (sent, told) = update(&server, &address, "HOST-a-0").await;
    for error in [sent.unwrap_err(), told.unwrap_err()] {
        assert!(error.to_string().contains("post hook fails because"), "{error}");
    }
}

#[tokio::test]
async fn an_engine_that_is_killed_is_a_lost_peer() {
    let server = Server::new().await;
    let (process, address) = engine(&server, &["HOST-a-0"], &["--exit-at-bucket", "1"]).await;
    let (sent, told) = update(&server, &address, "HOST-a-0").await;
    assert_eq!(sent.unwrap_err().kind(), ErrorKind::PeerLost);
    assert_eq!(told.unwrap_err().kind(), ErrorKind::PeerLost);
    let finished = process.finish(LONG).await;
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&finished.status), Some(9));
}

#[tokio::test]
async fn requests_that_cannot_be_served_say_why() {
    let server = Server::new().await;
    let (_process, address) = engine(&server, &["HOST-a-0"], &[]).await;
    // A device that the request forgets.
    let other = server.sink("HOST-b-7");
    let error = client(&address).update(&request(&[("HOST-b-7", &other)]), deadline()).await.unwrap_err();
    assert!(error.to_string().contains("HOST-a-0") && error.to_string().contains("HOST-b-7"), "{error}");
    // An endpoint of another protocol.
    let endpoints = BTreeMap::from([("HOST-a-0".to_owned(), "ipc:///run/x".to_owned())]);
    let request_of_ce = EngineRequest { endpoints, version: Version(1) };
    let error = client(&address).update(&request_of_ce, deadline()).await.unwrap_err();
    assert!(error.to_string().contains("--worker-protocol native"), "{error}");
    // A second update while one is under way: the first has opened the ring and waits for its buckets.
    let mut sink = server.sink("HOST-a-0");
    let request = request(&[("HOST-a-0", &sink)]);
    let client = client(&address);
    let first = client.update(&request, deadline());
    let second = async {
        sink.open(&*server.ring, deadline()).await.unwrap();
        let error = client.update(&request, deadline()).await.unwrap_err();
        assert!(error.to_string().contains("409"), "{error}");
        for number in 0..2 {
            sink.deliver(&server.bucket(number), deadline()).await.unwrap();
        }
        sink.release(deadline()).await.unwrap();
        sink.finish(deadline()).await.unwrap();
    };
    let (first, ()) = tokio::join!(first, second);
    first.unwrap();
}

#[tokio::test]
async fn a_unix_socket_is_private_survives_a_dead_owner_and_is_removed() {
    use std::os::unix::fs::PermissionsExt;
    let server = Server::new().await;
    let (socket, port_file) = (server.path("engine.sock"), server.path("address"));
    // What a killed engine leaves.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let mut process =
        ckpt!("worker", "--exit-with-parent", "--json", "--uds", &socket, "--port-file", &port_file).spawn();
    process.stderr_line("the reference engine is up").await;
    let address = std::fs::read_to_string(&port_file).unwrap();
    assert_eq!(address, format!("unix:{}\n", socket.display()));
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(http_get(address.trim(), "/health").await.status, 200);
    // A living owner keeps its socket.
    let refused = ckpt!("worker", "--uds", &socket).finish().await.expect_code(2);
    assert!(refused.error_line().contains("in use"), "{}", refused.stderr);
    assert_eq!(http_get(address.trim(), "/health").await.status, 200);

    process.close_stdin();
    let ended = process.finish(LONG).await.expect_code(0).json();
    assert_eq!(ended["updates"], 0);
    assert!(!socket.exists());
}
