//! The transport over a real UCX, on this host: shared memory, and TCP over loopback.
//!
//! UCX reads `UCX_TLS` when it is opened, so each way is a process: this test again, told so by the environment.

#![cfg(feature = "ucx")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{BufRead, BufReader, Write},
    net::Ipv4Addr,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::{
    ErrorKind, Key, Result,
    device::{BufferSlice, DeviceBackend, DeviceConfig, host::HostBuffer, host::HostDevice},
    testkit::conformance::{self, Factory},
    transport::{ReadOp, RemoteRegion, Transport, TransportConfig, TransportProvider, WriteOp},
};
use ckpt_transport_rdma::{RdmaConfig, UcxProvider};

const TCP: &str = "tcp";
/// Of both UCX 1.13 and newer: memory of another process over the kernel, messages over POSIX shared memory.
const SHARED_MEMORY: &str = "posix,cma,self";

struct Ucx {
    folder: tempfile::TempDir,
}

impl Ucx {
    fn new() -> Self {
        // The first of the process stays.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn open(&self, rank: u32) -> Arc<dyn Transport> {
        self.transport(rank, &self.device(rank).unwrap()).unwrap()
    }
}

impl Factory for Ucx {
    fn device(&self, rank: u32) -> Result<Arc<dyn DeviceBackend>> {
        let runtime_dir = self.folder.path().join("run");
        Ok(Arc::new(HostDevice::open(&DeviceConfig { rank, local_rank: rank, runtime_dir })?))
    }

    fn transport(&self, _rank: u32, device: &Arc<dyn DeviceBackend>) -> Result<Arc<dyn Transport>> {
        let config = RdmaConfig::from_env(&|name| std::env::var(name).ok());
        UcxProvider::new(config).open(&TransportConfig {
            bind: Ipv4Addr::LOCALHOST.into(),
            runtime_dir: self.folder.path().join("run"),
            tls: false,
            secret: b"conformance".to_vec(),
            connections: 2,
            device: device.clone(),
        })
    }

    fn max_members(&self) -> u32 {
        3
    }

    fn detects_mismatch(&self) -> bool {
        true
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251) as u8).collect()
}

/// This test binary once more, to run one of its parts.
fn part(name: &str, transports: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", name, "--nocapture"]);
    command.env("CKPT_TEST_PART", name).env("UCX_TLS", transports).env("UCX_WARN_UNUSED_ENV_VARS", "n");
    command
}

fn plays(name: &str) -> bool {
    std::env::var("CKPT_TEST_PART").is_ok_and(|part| part == name)
}

fn run(name: &str, transports: &str) {
    assert!(part(name, transports).status().unwrap().success(), "{name} failed over {transports}");
}

#[test]
#[ignore = "needs UCX: apt-get install libucx0, or .ci/run ucx"]
fn one_sided_conformance_over_tcp() {
    run("suite", TCP);
}

#[test]
#[ignore = "needs UCX: apt-get install libucx0, or .ci/run ucx"]
fn one_sided_conformance_over_shared_memory() {
    run("suite", SHARED_MEMORY);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of the conformance tests, which start it as a process"]
async fn suite() {
    if !plays("suite") {
        return;
    }
    let report = conformance::one_sided(&Ucx::new()).await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((report.passed.len(), report.skipped.len()), (19, 0), "{report:?}");
}

#[test]
#[ignore = "needs UCX: apt-get install libucx0, or .ci/run ucx"]
fn a_killed_owner_is_an_error_and_a_new_one_is_read() {
    for transports in [TCP, SHARED_MEMORY] {
        run("peers", transports);
    }
}

/// Another process that lets its memory be read and written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of a_killed_owner_is_an_error_and_a_new_one_is_read, which starts it as a process"]
async fn owner() {
    if !plays("owner") {
        return;
    }
    let owner = Ucx::new().open(0);
    let memory = HostBuffer::from_bytes(&bytes(16 << 20)).unwrap();
    let registration = owner.one_sided().unwrap().register_writable(memory).await.unwrap();
    let region = registration.region();
    let hex: String = region.descriptor.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("\nREGION {} {} {} {} {hex}", region.peer, region.address, region.len_bytes, region.generation);
    std::io::stdout().flush().unwrap();
    // Ends with its parent, which holds the other end.
    let mut line = String::new();
    tokio::task::spawn_blocking(move || std::io::stdin().read_line(&mut line)).await.unwrap().unwrap();
}

fn start_owner() -> (Child, RemoteRegion, impl Sized) {
    let transports = std::env::var("UCX_TLS").unwrap();
    let mut child = part("owner", &transports).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = lines.by_ref().map(|line| line.unwrap()).find(|line| line.starts_with("REGION ")).unwrap();
    let words: Vec<&str> = line.split(' ').collect();
    let hex = words[5].as_bytes().chunks(2);
    let descriptor: Vec<u8> =
        hex.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect();
    let region = RemoteRegion {
        peer: words[1].to_owned(),
        address: words[2].parse().unwrap(),
        len_bytes: words[3].parse().unwrap(),
        generation: words[4].parse().unwrap(),
        descriptor: descriptor.into(),
    };
    (child, region, lines)
}

async fn read(reader: &Arc<dyn Transport>, region: &RemoteRegion) -> Result<Vec<u8>> {
    let into = BufferSlice::whole(HostBuffer::from_bytes(&vec![0xEE; region.len_bytes as usize])?);
    let op = ReadOp { region: Arc::new(region.clone()), offset: 0, into: into.clone() };
    reader.one_sided().unwrap().post_read(vec![op], soon())?.done(soon()).await?;
    // SAFETY: the read into it is done.
    Ok(unsafe { into.as_slice() }?.to_vec())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of a_killed_owner_is_an_error_and_a_new_one_is_read, which starts it as a process"]
async fn peers() {
    if !plays("peers") {
        return;
    }
    let here = Ucx::new().open(1);
    let (mut child, region, _output) = start_owner();
    let mut expected = bytes(16 << 20);
    assert!(read(&here, &region).await.unwrap() == expected, "other bytes arrived");
    expected[5 << 20..6 << 20].fill(0x77);
    let from = HostBuffer::from_bytes(&vec![0x77; 1 << 20]).unwrap().slice();
    let op = WriteOp { region: Arc::new(region.clone()), offset: 5 << 20, from };
    here.one_sided().unwrap().post_write(vec![op], soon()).unwrap().done(soon()).await.unwrap();
    assert!(read(&here, &region).await.unwrap() == expected, "other bytes after a write");
    // In the middle of reads.
    let flying: Vec<_> = (0..4)
        .map(|_| {
            let (here, region) = (here.clone(), region.clone());
            tokio::spawn(async move { read(&here, &region).await.map(drop) })
        })
        .collect();
    child.kill().unwrap();
    child.wait().unwrap();
    let killed = Instant::now();
    for read in flying {
        if let Err(error) = read.await.unwrap() {
            assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
        }
    }
    let error = read(&here, &region).await.unwrap_err();
    assert_eq!((error.kind(), error.get(Key::Peer)), (ErrorKind::PeerLost, Some(region.peer.as_str())));
    assert!(killed.elapsed() < Duration::from_secs(15), "{:?}", killed.elapsed());
    let (mut child, region, _output) = start_owner();
    let again = read(&here, &region).await;
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(again.unwrap() == bytes(16 << 20), "other bytes from the new owner");
}
