//! The `tcp` transport between real processes, one of which is killed in the middle.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{BufRead, BufReader},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use ckpt_core::{
    Epoch, Error, ErrorKind, Key,
    device::{
        BufferSlice, DeviceBackend, DeviceConfig, Stream,
        host::{HostBuffer, HostDevice},
    },
    transport::{
        CollectiveOp, Communicator, GroupSpec, ReadOp, RemoteRegion, Transport, TransportConfig,
        TransportProvider, tcp::TcpProvider,
    },
};

const MEMBERS: u32 = 3;
const ROUNDS: u64 = 4;
const LEN: u64 = (1 << 20) + 5;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn bytes(seed: u64) -> Vec<u8> {
    (0..LEN).map(|i| (i.wrapping_mul(seed | 1) >> 3) as u8).collect()
}

struct Member {
    rank: u32,
    transport: Arc<dyn Transport>,
    stream: Arc<dyn Stream>,
}

impl Member {
    fn open(rank: u32, runtime_dir: &Path) -> Self {
        let runtime_dir = runtime_dir.to_owned();
        let config = DeviceConfig { rank, local_rank: rank, runtime_dir: runtime_dir.clone() };
        let device: Arc<dyn DeviceBackend> = Arc::new(HostDevice::open(&config).unwrap());
        let stream = device.stream("test").unwrap();
        let config = TransportConfig {
            bind: Ipv4Addr::LOCALHOST.into(),
            runtime_dir,
            tls: false,
            secret: b"test".to_vec(),
            connections: 2,
            device,
        };
        Self { rank, transport: TcpProvider.open(&config).unwrap(), stream }
    }

    async fn join(&self, token: Bytes) -> Communicator {
        let spec = GroupSpec { token, rank: self.rank, world_size: MEMBERS, epoch: Epoch(1) };
        self.transport.collective().unwrap().join(spec, soon()).await.unwrap()
    }

    async fn rounds(&self, communicator: &mut Communicator) {
        for round in 0..ROUNDS {
            let ops: Vec<CollectiveOp> = (0..MEMBERS)
                .map(|root| {
                    let buffer = if root == self.rank {
                        HostBuffer::from_bytes(&bytes(round * 10 + u64::from(root)))
                    } else {
                        HostBuffer::allocate(LEN)
                    };
                    CollectiveOp { root, buffer: buffer.unwrap().slice() }
                })
                .collect();
            communicator.queue.enqueue(ops.clone(), &self.stream).await.unwrap().done(soon()).await.unwrap();
            assert!(communicator.abort.poisoned().is_none());
            for op in &ops {
                assert!(
                    content(&op.buffer) == bytes(round * 10 + u64::from(op.root)),
                    "wrong bytes in {round}"
                );
            }
        }
    }

    /// Waits for a broadcast that member 2 never sends.
    async fn wait_for_the_dead(&self, communicator: &mut Communicator) -> Error {
        let op = CollectiveOp { root: 2, buffer: HostBuffer::allocate(LEN).unwrap().slice() };
        match communicator.queue.enqueue(vec![op], &self.stream).await {
            Ok(event) => event.done(soon()).await.unwrap_err(),
            // It died before this member came so far.
            Err(error) => error,
        }
    }
}

fn content(slice: &BufferSlice) -> Vec<u8> {
    // SAFETY: what writes the slice is done.
    unsafe { slice.as_slice() }.unwrap().to_vec()
}

fn spawn(rank: u32, runtime_dir: &Path, token: &[u8], region: &RemoteRegion) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "member", "--ignored", "--nocapture"])
        .env("CONFORMANCE_RANK", rank.to_string())
        .env("CONFORMANCE_DIR", runtime_dir)
        .env("CONFORMANCE_TOKEN", serde_json::to_string(token).unwrap())
        .env("CONFORMANCE_REGION", serde_json::to_string(region).unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_processes_broadcast_read_and_lose_one() {
    let folder = tempfile::tempdir().unwrap();
    let runtime_dir = folder.path().join("run");
    let root = Member::open(0, &runtime_dir);
    let token = root.transport.collective().unwrap().create_token().await.unwrap();
    let memory = HostBuffer::from_bytes(&bytes(99)).unwrap();
    let registration = root.transport.one_sided().unwrap().register(memory).await.unwrap();
    let mut one = spawn(1, &runtime_dir, &token, registration.region());
    let mut two = spawn(2, &runtime_dir, &token, registration.region());
    let mut communicator = root.join(token).await;
    root.rounds(&mut communicator).await;

    let waiting = tokio::spawn(async move { root.wait_for_the_dead(&mut communicator).await });
    // None is still in a round that the death would end. Who lives goes on writing, so the readers stay.
    let mut said = [&mut one, &mut two].map(|member| BufReader::new(member.stdout.take().unwrap()).lines());
    let _said = tokio::task::spawn_blocking(move || {
        for lines in &mut said {
            let through = lines.map_while(Result::ok).any(|line| line.ends_with("through its rounds"));
            assert!(through, "a member ended early");
        }
        said
    })
    .await
    .unwrap();
    let killed = Instant::now();
    two.kill().unwrap();
    two.wait().unwrap();
    let error = waiting.await.unwrap();
    assert_eq!((error.kind(), error.get(Key::Rank)), (ErrorKind::PeerLost, Some("2")), "{error}");
    assert!(error.get(Key::Peer).is_some(), "{error}");
    let status = tokio::task::spawn_blocking(move || one.wait().unwrap()).await.unwrap();
    assert!(status.success(), "member 1 saw something else");
    assert!(killed.elapsed() < Duration::from_secs(10));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of three_processes_broadcast_read_and_lose_one, which starts it as a process"]
async fn member() {
    if std::env::var_os("CONFORMANCE_RANK").is_none() {
        // Run by hand, with all ignored tests.
        return;
    }
    let variable = |name: &str| std::env::var(format!("CONFORMANCE_{name}")).unwrap();
    let token: Vec<u8> = serde_json::from_str(&variable("TOKEN")).unwrap();
    let region: RemoteRegion = serde_json::from_str(&variable("REGION")).unwrap();
    let member = Member::open(variable("RANK").parse().unwrap(), &PathBuf::from(variable("DIR")));
    let mut communicator = member.join(token.into()).await;
    let into = HostBuffer::allocate(LEN).unwrap().slice();
    let op = ReadOp { region: Arc::new(region), offset: 0, into: into.clone() };
    member.transport.one_sided().unwrap().post_read(vec![op], soon()).unwrap().done(soon()).await.unwrap();
    assert!(content(&into) == bytes(99));
    member.rounds(&mut communicator).await;
    println!("through its rounds");
    if member.rank == 2 {
        tokio::time::sleep(Duration::from_secs(60)).await;
        panic!("nobody killed member 2");
    }
    let error = member.wait_for_the_dead(&mut communicator).await;
    assert_eq!((error.kind(), error.get(Key::Rank)), (ErrorKind::PeerLost, Some("2")), "{error}");
}
