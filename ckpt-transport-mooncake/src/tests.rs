//! The transport over a fake engine: what the seam promises, and what Mooncake's own habits ask for.

use std::{
    net::Ipv4Addr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{
        Buffer, BufferSlice, DeviceBackend, DeviceConfig, DeviceInfo, Ring, Stream, host::HostBuffer,
        host::HostDevice,
    },
    testkit::conformance::{self, Factory},
    transport::{OneSided, Probe, ReadOp, RemoteRegion, Transport, TransportProvider},
};

use crate::{
    MooncakeConfig, MooncakeProvider,
    fake::Fake,
    protocol::{Choice, Protocol},
    transport::MooncakeTransport,
};

fn choice(protocol: Protocol) -> Choice {
    Choice { protocol, why: "a test", nics: Vec::new() }
}

fn open(fake: &Arc<Fake>, protocol: Protocol) -> Result<Arc<MooncakeTransport>> {
    Ok(Arc::new(MooncakeTransport::start(fake.clone(), Ipv4Addr::LOCALHOST.into(), choice(protocol))?))
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn read(region: &RemoteRegion, offset: u64, into: &BufferSlice) -> ReadOp {
    ReadOp { region: Arc::new(region.clone()), offset, into: into.clone() }
}

fn target(len: u64) -> BufferSlice {
    HostBuffer::allocate(len).unwrap().slice()
}

fn content(slice: &BufferSlice) -> Vec<u8> {
    // SAFETY: the read into it has ended.
    unsafe { slice.as_slice() }.unwrap().to_vec()
}

async fn error_of(transport: &MooncakeTransport, op: ReadOp, deadline: Instant) -> Error {
    match transport.post_read(vec![op], deadline) {
        Ok(event) => event.done(soon()).await.unwrap_err(),
        Err(error) => error,
    }
}

/// What checkpoint-engine's metas say of a region.
fn bare(region: &RemoteRegion) -> RemoteRegion {
    RemoteRegion { generation: 0, descriptor: Bytes::new(), ..region.clone() }
}

struct Fakes {
    fake: Arc<Fake>,
    protocol: Protocol,
    folder: tempfile::TempDir,
}

impl Factory for Fakes {
    fn device(&self, rank: u32) -> Result<Arc<dyn DeviceBackend>> {
        let runtime_dir: PathBuf = self.folder.path().join("run");
        Ok(Arc::new(HostDevice::open(&DeviceConfig { rank, local_rank: rank, runtime_dir })?))
    }

    fn transport(&self, _: u32, _: &Arc<dyn DeviceBackend>) -> Result<Arc<dyn Transport>> {
        Ok(open(&self.fake, self.protocol)?)
    }

    fn max_members(&self) -> u32 {
        4
    }

    fn detects_mismatch(&self) -> bool {
        false
    }
}

async fn conforms(protocol: Protocol) {
    let fakes = Fakes { fake: Fake::new(), protocol, folder: tempfile::tempdir().unwrap() };
    let report = conformance::one_sided(&fakes).await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((report.passed.len(), report.skipped.len()), (19, 0), "{report:?}");
    assert_eq!(fakes.fake.open_batches(), 0);
    assert_eq!(fakes.fake.ranges(), 0, "an engine is left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms_over_tcp() {
    conforms(Protocol::Tcp).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms_where_destinations_are_registered() {
    conforms(Protocol::Rdma).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_that_misses_its_deadline_keeps_its_memory_and_stops_nobody_else() {
    let fake = Fake::new();
    let (slow, good, reader) = (
        open(&fake, Protocol::Tcp).unwrap(),
        open(&fake, Protocol::Tcp).unwrap(),
        open(&fake, Protocol::Tcp).unwrap(),
    );
    let bytes: Vec<u8> = (0..1000).map(|i| i as u8).collect();
    let registered = slow.register(HostBuffer::from_bytes(&bytes).unwrap()).await.unwrap();
    let other = good.register(HostBuffer::from_bytes(&bytes).unwrap()).await.unwrap();
    let peer = &registered.region().peer;
    fake.stall(peer);
    let into = target(1000);
    let buffer = Arc::downgrade(into.buffer());
    let deadline = Instant::now() + Duration::from_millis(50);
    let error = error_of(&reader, read(registered.region(), 0, &into), deadline).await;
    assert_eq!((error.kind(), error.get(Key::Peer)), (ErrorKind::Timeout, Some(peer.as_str())), "{error}");

    // The memory is Mooncake's until the transfer ends: reads into it are refused, and it is not freed.
    let error = reader.post_read(vec![read(other.region(), 0, &into)], soon()).unwrap_err();
    assert_eq!((error.kind(), error.get(Key::Peer)), (ErrorKind::Backend, Some(peer.as_str())), "{error}");
    drop(into);
    assert!(buffer.upgrade().is_some(), "memory went under a transfer");
    let elsewhere = target(1000);
    reader.post_read(vec![read(other.region(), 0, &elsewhere)], soon()).unwrap().done(soon()).await.unwrap();
    assert!(content(&elsewhere) == bytes);
    assert_eq!(fake.open_batches(), 1);

    fake.release(peer);
    while buffer.upgrade().is_some() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(fake.open_batches(), 0);
    reader
        .post_read(vec![read(registered.region(), 0, &elsewhere)], soon())
        .unwrap()
        .done(soon())
        .await
        .unwrap();
}

#[tokio::test]
async fn an_engine_with_a_transfer_under_way_is_not_ended() {
    let fake = Fake::new();
    let (owner, reader) = (open(&fake, Protocol::Tcp).unwrap(), open(&fake, Protocol::Tcp).unwrap());
    let registered = owner.register(HostBuffer::from_bytes(&[1; 100]).unwrap()).await.unwrap();
    fake.stall(&registered.region().peer);
    let event = reader.post_read(vec![read(registered.region(), 0, &target(100))], soon()).unwrap();
    assert!(!event.is_complete().unwrap());
    // Waits for its patience, and gives up.
    tokio::task::spawn_blocking(move || drop(reader)).await.unwrap();
    assert_eq!(fake.destroyed.load(Ordering::SeqCst), 0);
    fake.release(&registered.region().peer);
    while fake.destroyed.load(Ordering::SeqCst) == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(event);
}

#[tokio::test]
async fn regions_of_checkpoint_engine_are_read_by_address_alone() {
    let fake = Fake::new();
    let (owner, reader) = (open(&fake, Protocol::Tcp).unwrap(), open(&fake, Protocol::Tcp).unwrap());
    let memory = HostBuffer::from_bytes(&[7; 5000]).unwrap();
    let registered = owner.register(memory.clone()).await.unwrap();
    assert_eq!(registered.region().address, memory.address());
    let region = bare(registered.region());
    // Neighbours become one request; a hole stays a hole.
    let into = target(5000);
    let ops = [(0..100), (100..2000), (3000..5000)]
        .map(|r: std::ops::Range<u64>| read(&region, r.start, &into.slice(r).unwrap()));
    reader.post_read(ops.to_vec(), soon()).unwrap().done(soon()).await.unwrap();
    let mut expected = vec![7; 5000];
    expected[2000..3000].fill(0);
    assert!(content(&into) == expected);
    // A peer that has let go of it refuses; nothing tells more.
    drop(registered);
    // In order with the withdrawal.
    drop(owner.register(HostBuffer::allocate(1).unwrap()).await.unwrap());
    let error = error_of(&reader, read(&region, 0, &into), soon()).await;
    assert_eq!(
        (error.kind(), error.get(Key::Peer)),
        (ErrorKind::Backend, Some(region.peer.as_str())),
        "{error}"
    );
    assert_eq!(error.get(Key::Code), Some("6"));
}

#[tokio::test]
async fn failures_name_the_peer_and_the_next_batch_works() {
    let fake = Fake::new();
    let (owner, reader) = (open(&fake, Protocol::Tcp).unwrap(), open(&fake, Protocol::Tcp).unwrap());
    let registered = owner.register(HostBuffer::from_bytes(&[9; 300]).unwrap()).await.unwrap();
    let region = registered.region().clone();
    let into = target(300);
    let nobody = RemoteRegion { peer: "127.0.0.1:1".into(), ..region.clone() };
    let error = error_of(&reader, read(&nobody, 0, &into), soon()).await;
    assert_eq!((error.kind(), error.get(Key::Peer)), (ErrorKind::PeerLost, Some("127.0.0.1:1")), "{error}");
    for peer in ["", "host", ":80", "host:port", "ho\0st:80"] {
        let odd = RemoteRegion { peer: peer.into(), ..region.clone() };
        let error = error_of(&reader, read(&odd, 0, &into), soon()).await;
        assert_eq!(error.kind(), ErrorKind::ConfigInvalid, "{error}");
    }
    let forged = bare(&RemoteRegion { len_bytes: 1 << 40, ..region.clone() });
    let error = error_of(&reader, read(&forged, 200, &into), soon()).await;
    assert_eq!(error.kind(), ErrorKind::Backend, "{error}");
    let wrapped = RemoteRegion { address: u64::MAX - 5, len_bytes: 1 << 40, ..region.clone() };
    assert_eq!(error_of(&reader, read(&wrapped, 0, &into), soon()).await.kind(), ErrorKind::ConfigInvalid);
    // What fails once because a key was old works the second time.
    fake.hiccup(&region.peer);
    reader.post_read(vec![read(&region, 0, &into)], soon()).unwrap().done(soon()).await.unwrap();
    assert!(content(&into) == [9; 300]);
    fake.refuse(&region.peer, 8);
    let error = error_of(&reader, read(&bare(&region), 0, &into), soon()).await;
    assert!(error.to_string().contains("transport not supported (8)"), "{error}");
    assert_eq!(fake.open_batches(), 0);
    drop(owner);
    // The registration keeps the engine; without it the peer is gone.
    drop(registered);
    let error = error_of(&reader, read(&region, 0, &into), soon()).await;
    assert_eq!(
        (error.kind(), error.get(Key::Peer)),
        (ErrorKind::PeerLost, Some(region.peer.as_str())),
        "{error}"
    );
}

#[tokio::test]
async fn memory_that_is_registered_twice_stays_until_the_last_is_dropped() {
    let fake = Fake::new();
    let (owner, reader) = (open(&fake, Protocol::Tcp).unwrap(), open(&fake, Protocol::Tcp).unwrap());
    let memory = HostBuffer::from_bytes(&[3; 100]).unwrap();
    let first = owner.register(memory.clone()).await.unwrap();
    let second = owner.register(memory.clone()).await.unwrap();
    assert_eq!(fake.ranges(), 3, "two ledgers and one range");
    drop(first);
    let into = target(100);
    reader.post_read(vec![read(second.region(), 0, &into)], soon()).unwrap().done(soon()).await.unwrap();
    drop(second);
    // In order with the withdrawal.
    let empty = owner.register(HostBuffer::allocate(0).unwrap()).await.unwrap();
    assert_eq!((fake.ranges(), Arc::strong_count(&memory)), (2, 1));
    reader.post_read(vec![read(empty.region(), 0, &target(0))], soon()).unwrap().done(soon()).await.unwrap();
}

#[tokio::test]
async fn a_port_that_was_taken_is_tried_again_and_a_refusal_is_an_error() {
    let fake = Fake::new();
    fake.refuse_starts(2);
    drop(open(&fake, Protocol::Tcp).unwrap());
    assert_eq!(fake.destroyed.load(Ordering::SeqCst), 1);
    fake.refuse_starts(3);
    let error = open(&fake, Protocol::Tcp).unwrap_err();
    assert!(error.message().contains("MC_FORCE_TCP"), "{error}");
    let error = open(&fake, Protocol::Efa).unwrap_err();
    assert!(error.message().contains("no transport efa"), "{error}");
    assert_eq!(fake.destroyed.load(Ordering::SeqCst), 2, "a half-started engine is left");
}

/// A device that counts how often it was made current.
#[derive(Debug)]
struct Npu {
    host: HostDevice,
    kind: &'static str,
    current: AtomicU64,
}

impl DeviceBackend for Npu {
    fn kind(&self) -> &'static str {
        self.kind
    }
    fn info(&self) -> &DeviceInfo {
        self.host.info()
    }
    fn free_memory_bytes(&self) -> Result<u64> {
        self.host.free_memory_bytes()
    }
    fn stream(&self, label: &'static str) -> Result<Arc<dyn Stream>> {
        self.host.stream(label)
    }
    fn allocate_ring(&self, len_bytes: u64) -> Result<Arc<dyn Ring>> {
        self.host.allocate_ring(len_bytes)
    }
    fn pin(&self, memory: Arc<dyn Buffer>) -> Result<Arc<dyn Buffer>> {
        self.host.pin(memory)
    }
    fn with_current(&self, call: &mut dyn FnMut()) -> Result<()> {
        self.current.fetch_add(1, Ordering::SeqCst);
        call();
        Ok(())
    }
    fn flush_remote_writes(&self) -> Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn an_ascend_build_starts_with_its_npu_current_and_with_no_other_device() {
    let folder = tempfile::tempdir().unwrap();
    let config = DeviceConfig { rank: 0, local_rank: 0, runtime_dir: folder.path().join("run") };
    let mut device =
        Npu { host: HostDevice::open(&config).unwrap(), kind: "ascend", current: AtomicU64::new(0) };
    let fake = Fake::new();
    let begin = |device: &Npu| {
        crate::start(fake.clone(), Ipv4Addr::LOCALHOST.into(), choice(Protocol::Ascend), device)
    };
    drop(begin(&device).unwrap());
    assert_eq!(device.current.load(Ordering::SeqCst), 1);
    device.kind = "host";
    let error = begin(&device).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    assert!(
        error.message().contains("--device ascend") && error.message().contains("MC_FORCE_TCP"),
        "{error}"
    );
    assert_eq!(device.current.load(Ordering::SeqCst), 1, "nothing was started");
}

#[test]
fn a_missing_library_is_named_with_the_way_to_get_it() {
    let chosen = Some("/nonexistent/libtransfer_engine.so".into());
    let provider = MooncakeProvider::new(MooncakeConfig { library: chosen, ..MooncakeConfig::default() });
    let Probe::Unavailable(why) = provider.probe() else { panic!("found a library that does not exist") };
    assert!(why.contains("tried /nonexistent/libtransfer_engine.so"), "{why}");
    assert!(why.contains("CKPT_MOONCAKE_LIBRARY"), "{why}");
}

#[test]
fn a_library_without_the_c_interface_is_refused() {
    // libc is a library that surely opens and surely is not Mooncake.
    let chosen = Some("libc.so.6".into());
    let provider = MooncakeProvider::new(MooncakeConfig { library: chosen, ..MooncakeConfig::default() });
    let Probe::Unavailable(why) = provider.probe() else { panic!("took libc for Mooncake") };
    assert!(why.contains("createTransferEngine"), "{why}");
}
