//! The transport over a real verbs library and real (or soft-RoCE) devices.
//!
//! `CKPT_TEST_HCAS` names the devices of rank 0 and of the others, `rxe_a0,rxe_a1/rxe_b0,rxe_b1`; without it all ranks
//! use all devices. `CKPT_TEST_LINK` is a network interface that may be taken down.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{BufRead, BufReader, Write},
    net::Ipv4Addr,
    os::fd::OwnedFd,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::{
    ErrorKind, Key, Result,
    device::{
        Buffer, BufferSlice, DeviceBackend, DeviceConfig, MemoryKind, host::HostBuffer, host::HostDevice,
    },
    testkit::conformance::{self, Factory},
    transport::{ReadOp, RemoteRegion, Transport, TransportConfig, TransportProvider},
};
use ckpt_transport_rdma::{RdmaConfig, RdmaProvider};

struct Verbs {
    folder: tempfile::TempDir,
}

impl Verbs {
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

fn hcas(rank: u32) -> Option<String> {
    let sides = std::env::var("CKPT_TEST_HCAS").ok()?;
    let mut sides = sides.split('/');
    let first = sides.next()?;
    Some(if rank == 0 { first } else { sides.next().unwrap_or(first) }.to_owned())
}

impl Factory for Verbs {
    fn device(&self, rank: u32) -> Result<Arc<dyn DeviceBackend>> {
        let runtime_dir = self.folder.path().join("run");
        Ok(Arc::new(HostDevice::open(&DeviceConfig { rank, local_rank: rank, runtime_dir })?))
    }

    fn transport(&self, rank: u32, device: &Arc<dyn DeviceBackend>) -> Result<Arc<dyn Transport>> {
        let devices = hcas(rank);
        let config = RdmaConfig { devices, ..RdmaConfig::from_env(&|name| std::env::var(name).ok()) };
        RdmaProvider::new(config).open(&TransportConfig {
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

/// Reads all of `region` into other memory, and compares.
async fn read(reader: &Arc<dyn Transport>, region: &RemoteRegion) -> Result<()> {
    let into = BufferSlice::whole(HostBuffer::from_bytes(&vec![0xEE; region.len_bytes as usize])?);
    let op = ReadOp { region: Arc::new(region.clone()), offset: 0, into: into.clone() };
    let event = reader.one_sided().unwrap().post_read(vec![op], soon())?;
    event.done(soon() + Duration::from_secs(5)).await?;
    // SAFETY: the read into it is done.
    let arrived = unsafe { into.as_slice() }?;
    assert!(arrived == bytes(region.len_bytes as usize), "other bytes arrived");
    Ok(())
}

fn sent_packets(device: &str) -> u64 {
    let file = format!("/sys/class/infiniband/{device}/ports/1/hw_counters/sent_pkts");
    std::fs::read_to_string(file).unwrap().trim().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: integration-tests/rdma-vm/test.sh"]
async fn one_sided_conformance() {
    let report = conformance::one_sided(&Verbs::new()).await.unwrap();
    assert_eq!((report.passed.len(), report.skipped.len()), (19, 0), "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs two soft-RoCE devices a side: integration-tests/rdma-vm/test.sh"]
async fn both_devices_carry_bytes() {
    let verbs = Verbs::new();
    let (owner, reader) = (verbs.open(0), verbs.open(1));
    let memory = HostBuffer::from_bytes(&bytes(8 << 20)).unwrap();
    let registration = owner.one_sided().unwrap().register(memory).await.unwrap();
    let devices: Vec<String> = hcas(0).unwrap().split(',').map(str::to_owned).collect();
    assert!(devices.len() > 1);
    let before: Vec<u64> = devices.iter().map(|device| sent_packets(device)).collect();
    let began = Instant::now();
    read(&reader, registration.region()).await.unwrap();
    println!("8 MiB in {:?}", began.elapsed());
    for (device, before) in devices.iter().zip(before) {
        let sent = sent_packets(device) - before;
        println!("{device} sent {sent} packets");
        assert!(sent > 500, "{device} carried {sent} packets only");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: integration-tests/rdma-vm/test.sh"]
async fn a_wrong_key_names_device_peer_and_status_and_harms_no_other_read() {
    let verbs = Verbs::new();
    let (owner, reader) = (verbs.open(0), verbs.open(1));
    let memory = HostBuffer::from_bytes(&bytes(5 << 20)).unwrap();
    let registration = owner.one_sided().unwrap().register(memory).await.unwrap();
    let region = registration.region().clone();
    let mut descriptor = region.descriptor.to_vec();
    // The keys stand last; this changes a bit of the last one.
    *descriptor.last_mut().unwrap() ^= 1;
    let forged = RemoteRegion { descriptor: descriptor.into(), ..region.clone() };
    let (good, bad) = tokio::join!(read(&reader, &region), read(&reader, &forged));
    good.unwrap();
    let error = bad.unwrap_err();
    println!("{error}");
    assert_eq!(error.kind(), ErrorKind::Backend);
    assert_eq!(error.get(Key::Peer), Some(region.peer.as_str()));
    // REM_ACCESS_ERR.
    assert_eq!(error.get(Key::Code), Some("10"));
    assert!(error.get(Key::Hca).is_some_and(|hca| !hca.is_empty()));
    read(&reader, &region).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes a link down: integration-tests/rdma-vm/test.sh"]
async fn a_lost_link_is_survived_by_the_other() {
    let link = std::env::var("CKPT_TEST_LINK").unwrap();
    let verbs = Verbs::new();
    let (owner, reader) = (verbs.open(0), verbs.open(1));
    let memory = HostBuffer::from_bytes(&bytes(4 << 20)).unwrap();
    let registration = owner.one_sided().unwrap().register(memory).await.unwrap();
    read(&reader, registration.region()).await.unwrap();
    let ip = |state: &str| {
        let done = Command::new("/bin/ip").args(["link", "set", &link, state]).status().unwrap();
        assert!(done.success());
    };
    ip("down");
    let began = Instant::now();
    let outcome = read(&reader, registration.region()).await;
    println!("a read after the loss of {link}: {outcome:?} in {:?}", began.elapsed());
    let again = Instant::now();
    let second = read(&reader, registration.region()).await;
    println!("the next: {second:?} in {:?}", again.elapsed());
    ip("up");
    outcome.unwrap();
    second.unwrap();
}

/// Device memory whose "dma-buf" is none.
#[derive(Debug)]
struct Pretended;

// SAFETY: no byte of it is ever touched: it says that it is on a device.
unsafe impl Buffer for Pretended {
    fn address(&self) -> u64 {
        0x7000_0000
    }

    fn len_bytes(&self) -> u64 {
        4096
    }

    fn memory(&self) -> MemoryKind {
        MemoryKind::Device
    }

    fn dma_buf(&self) -> Option<Result<OwnedFd>> {
        Some(Ok(std::fs::File::open("/dev/zero").unwrap().into()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device without dma-buf: integration-tests/rdma-vm/test.sh"]
async fn device_memory_is_refused_where_the_device_cannot_register_it() {
    let owner = Verbs::new().open(0);
    let error = owner.one_sided().unwrap().register(Arc::new(Pretended)).await.unwrap_err();
    println!("{error}");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.get(Key::Hca).is_some_and(|hca| !hca.is_empty()));
}

/// Runs a tool of iproute2 that must succeed.
fn tool(program: &str, arguments: &str) {
    let done = Command::new(program).args(arguments.split(' ')).status().unwrap();
    assert!(done.success(), "{program} {arguments}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "loses all packets of a network interface: integration-tests/rdma-vm/test.sh"]
async fn lost_packets_are_an_error_in_time_and_the_next_read_works() {
    let links = ["a0", "a1"];
    let verbs = Verbs::new();
    let (owner, reader) = (verbs.open(0), verbs.open(1));
    let memory = HostBuffer::from_bytes(&bytes(4 << 20)).unwrap();
    let registration = owner.one_sided().unwrap().register(memory).await.unwrap();
    read(&reader, registration.region()).await.unwrap();
    for link in links {
        tool("/sbin/tc", &format!("qdisc add dev {link} root netem loss 100%"));
    }
    let began = Instant::now();
    let outcome = read(&reader, registration.region()).await;
    println!("without any packet: {outcome:?} in {:?}", began.elapsed());
    for link in links {
        tool("/sbin/tc", &format!("qdisc del dev {link} root"));
    }
    let error = outcome.unwrap_err();
    assert!([ErrorKind::PeerLost, ErrorKind::Timeout].contains(&error.kind()), "{error}");
    assert_eq!(error.get(Key::Peer), Some(registration.region().peer.as_str()));
    assert!(error.get(Key::Hca).is_some_and(|hca| !hca.is_empty()), "{error}");
    assert!(began.elapsed() < Duration::from_secs(70), "{:?}", began.elapsed());
    read(&reader, registration.region()).await.unwrap();
}

/// Between reader and owner: ends the owner's side of the first connection when told, and the reader's much later.
async fn proxy(owner: String, mut cut: tokio::sync::oneshot::Receiver<()>) -> String {
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let mut first = true;
        loop {
            let (mut here, _) = listener.accept().await.unwrap();
            let mut there = tokio::net::TcpStream::connect(&owner).await.unwrap();
            if std::mem::take(&mut first) {
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut here, &mut there) => {}
                    _ = &mut cut => {
                        drop(there);
                        // So long the reader knows of it only from its queue pairs.
                        tokio::time::sleep(Duration::from_secs(6)).await;
                    }
                }
            } else {
                tokio::spawn(async move { tokio::io::copy_bidirectional(&mut here, &mut there).await });
            }
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: integration-tests/rdma-vm/test.sh"]
async fn a_destroyed_queue_pair_is_replaced_and_nothing_is_lost() {
    let verbs = Verbs::new();
    let (owner, reader) = (verbs.open(0), verbs.open(1));
    let memory = HostBuffer::from_bytes(&bytes(8 << 20)).unwrap();
    let registration = owner.one_sided().unwrap().register(memory).await.unwrap();
    let (cut, told) = tokio::sync::oneshot::channel();
    let peer = proxy(registration.region().peer.clone(), told).await;
    let region = RemoteRegion { peer, ..registration.region().clone() };
    read(&reader, &region).await.unwrap();
    let flying = {
        let (reader, region) = (reader.clone(), region.clone());
        tokio::spawn(async move { read(&reader, &region).await })
    };
    // The owner's queue pairs go with its side of the TCP connection.
    cut.send(()).unwrap();
    let began = Instant::now();
    let outcome = flying.await.unwrap();
    println!("a read over queue pairs that were destroyed: {outcome:?} in {:?}", began.elapsed());
    outcome.unwrap();
    read(&reader, &region).await.unwrap();
}

/// Another process that lets its memory be read; it is this test again, told so by the environment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "is started by a_killed_owner_is_an_error"]
async fn owner_process() {
    if std::env::var_os("CKPT_TEST_OWNER").is_none() {
        return;
    }
    let owner = Verbs::new().open(0);
    let memory = HostBuffer::from_bytes(&bytes(4 << 20)).unwrap();
    let registration = owner.one_sided().unwrap().register(memory).await.unwrap();
    let region = registration.region();
    let hex: String = region.descriptor.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("\nREGION {} {} {} {} {hex}", region.peer, region.address, region.len_bytes, region.generation);
    std::io::stdout().flush().unwrap();
    tokio::time::sleep(Duration::from_secs(120)).await;
}

/// The child's output must stay open: it ends if it cannot write.
type Output = std::io::Lines<BufReader<std::process::ChildStdout>>;

fn start_owner() -> (Child, RemoteRegion, Output) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "owner_process", "--nocapture"])
        .env("CKPT_TEST_OWNER", "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: integration-tests/rdma-vm/test.sh"]
async fn a_killed_owner_is_an_error_and_a_new_one_is_read() {
    let reader = Verbs::new().open(1);
    let (mut child, region, _output) = start_owner();
    read(&reader, &region).await.unwrap();
    // In the middle of reads.
    let flying: Vec<_> = (0..4)
        .map(|_| {
            let (reader, region) = (reader.clone(), region.clone());
            tokio::spawn(async move { read(&reader, &region).await })
        })
        .collect();
    child.kill().unwrap();
    child.wait().unwrap();
    let killed = Instant::now();
    let mut errors = 0;
    for read in flying {
        if let Err(error) = read.await.unwrap() {
            println!("{error}");
            assert_eq!(error.kind(), ErrorKind::PeerLost);
            errors += 1;
        }
    }
    let error = read(&reader, &region).await.unwrap_err();
    println!("{errors} of 4 failed; after the death: {error}; {:?}", killed.elapsed());
    assert_eq!(error.kind(), ErrorKind::PeerLost);
    assert_eq!(error.get(Key::Peer), Some(region.peer.as_str()));
    assert!(killed.elapsed() < Duration::from_secs(15), "{:?}", killed.elapsed());
    let (mut child, region, _output) = start_owner();
    let outcome = read(&reader, &region).await;
    child.kill().unwrap();
    child.wait().unwrap();
    outcome.unwrap();
}

fn resources() -> String {
    let shown = Command::new("/bin/rdma").args(["resource", "show"]).output().unwrap();
    assert!(shown.status.success());
    String::from_utf8(shown.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: integration-tests/rdma-vm/test.sh"]
async fn joining_and_leaving_leaks_nothing() {
    let cycles = std::env::var("CKPT_TEST_CYCLES").map_or(10, |cycles| cycles.parse().unwrap());
    let before = resources();
    for _ in 0..cycles {
        let verbs = Verbs::new();
        let (owner, reader) = (verbs.open(0), verbs.open(1));
        let memory = HostBuffer::from_bytes(&bytes(100_000)).unwrap();
        let registration = owner.one_sided().unwrap().register(memory).await.unwrap();
        read(&reader, registration.region()).await.unwrap();
    }
    let deadline = soon();
    while resources() != before {
        assert!(Instant::now() < deadline, "{before}\nis now\n{}", resources());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
