//! The layers: transports that keep their promises through them, and faults that are what they are called.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::{
    net::Ipv4Addr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::{
    Epoch, ErrorKind, Result,
    checkpoint::{CheckpointSource, NamedTensor},
    device::{BufferSlice, DeviceBackend, DeviceConfig, Event, Stream, host::HostBuffer, host::HostDevice},
    layer::{Chaos, ChaosConfig, OpKind, Record, Throttle, ThrottleConfig, Timeout, TimeoutConfig},
    testkit::conformance::{self, Factory, Report},
    transport::{
        CollectiveOp, Communicator, GroupSpec, ReadOp, Transport, TransportConfig, TransportProvider,
        local::LocalProvider, tcp::TcpProvider,
    },
    types::TensorMeta,
};
use futures_util::future::try_join_all;

/// All layers that change nothing but time, on top of each other; chaos only delays.
fn layered(inner: Arc<dyn Transport>) -> Arc<dyn Transport> {
    let throttle = ThrottleConfig { bytes_per_sec: 2_000_000_000, latency: Duration::from_micros(200) };
    let delays = ChaosConfig {
        seed: 3,
        delay_ppm: 200_000,
        delay: Duration::from_millis(2),
        ..ChaosConfig::default()
    };
    let limits = TimeoutConfig { join: Duration::from_secs(50), operation: Duration::from_secs(50) };
    Record::wrap(Timeout::wrap(Chaos::wrap(Throttle::wrap(inner, throttle), delays), limits))
}

struct Layered {
    provider: Box<dyn TransportProvider>,
    adversary: Option<u64>,
    folder: tempfile::TempDir,
}

impl Layered {
    fn new(provider: impl TransportProvider + 'static, adversary: Option<u64>) -> Self {
        Self { provider: Box::new(provider), adversary, folder: tempfile::tempdir().unwrap() }
    }

    fn runtime_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }
}

impl Factory for Layered {
    fn device(&self, rank: u32) -> Result<Arc<dyn DeviceBackend>> {
        let config = DeviceConfig { rank, local_rank: rank, runtime_dir: self.runtime_dir() };
        let device = HostDevice::open(&config)?;
        Ok(Arc::new(match self.adversary {
            Some(seed) => device.adversarial(seed + u64::from(rank)),
            None => device,
        }))
    }

    fn transport(&self, _rank: u32, device: &Arc<dyn DeviceBackend>) -> Result<Arc<dyn Transport>> {
        let inner = self.provider.open(&TransportConfig {
            bind: Ipv4Addr::LOCALHOST.into(),
            runtime_dir: self.runtime_dir(),
            tls: false,
            secret: b"layers".to_vec(),
            connections: 2,
            device: device.clone(),
        })?;
        Ok(layered(inner))
    }

    fn max_members(&self) -> u32 {
        3
    }

    fn detects_mismatch(&self) -> bool {
        true
    }
}

fn complete(report: Result<Report>, skipped: usize) {
    let report = report.unwrap();
    assert_eq!(report.skipped.len(), skipped, "{report:?}");
    assert!(report.passed.len() >= 9, "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn local_keeps_its_promises_through_the_layers() {
    for adversary in [None, Some(21)] {
        let factory = Layered::new(LocalProvider::default(), adversary);
        complete(conformance::collective(&factory).await, 0);
        complete(conformance::one_sided(&factory).await, 2);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_keeps_its_promises_through_the_layers() {
    let factory = Layered::new(TcpProvider, None);
    complete(conformance::collective(&factory).await, 0);
    complete(conformance::one_sided(&factory).await, 0);
}

/// Members of one group in this process, whose transports a test wraps as it likes.
struct Pair {
    transports: Vec<Arc<dyn Transport>>,
    communicators: Vec<Communicator>,
    streams: Vec<Arc<dyn Stream>>,
    _folder: tempfile::TempDir,
}

impl Pair {
    async fn new(wrap: impl Fn(u32, Arc<dyn Transport>) -> Arc<dyn Transport>) -> Self {
        let factory = Layered::new(LocalProvider::default(), None);
        let (mut transports, mut streams) = (Vec::new(), Vec::new());
        for rank in 0..2 {
            let device = factory.device(rank).unwrap();
            let config = TransportConfig {
                bind: Ipv4Addr::LOCALHOST.into(),
                runtime_dir: factory.runtime_dir(),
                tls: false,
                secret: Vec::new(),
                connections: 1,
                device: device.clone(),
            };
            transports.push(wrap(rank, factory.provider.open(&config).unwrap()));
            streams.push(device.stream("test").unwrap());
        }
        let token = transports[0].collective().unwrap().create_token().await.unwrap();
        let joins = (0..2).zip(&transports).map(|(rank, transport)| {
            let group = GroupSpec { token: token.clone(), rank, world_size: 2, epoch: Epoch(1) };
            transport.collective().unwrap().join(group, soon())
        });
        let communicators = try_join_all(joins).await.unwrap();
        Self { transports, communicators, streams, _folder: factory.folder }
    }

    /// Both enqueue one broadcast from member 0.
    async fn broadcast(&mut self, buffers: &[Arc<HostBuffer>; 2]) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        for ((communicator, stream), buffer) in self.communicators.iter_mut().zip(&self.streams).zip(buffers)
        {
            let op = CollectiveOp { root: 0, buffer: buffer.slice() };
            events.push(communicator.queue.enqueue(vec![op], stream).await?);
        }
        Ok(events)
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn buffers(len: usize) -> [Arc<HostBuffer>; 2] {
    [HostBuffer::from_bytes(&vec![7; len]).unwrap(), HostBuffer::from_bytes(&vec![0; len]).unwrap()]
}

fn bytes(buffer: &Arc<HostBuffer>) -> Vec<u8> {
    let slice: BufferSlice = buffer.slice();
    let meta = TensorMeta::new("bytes", ckpt_core::DType::U8, [slice.len_bytes()]).unwrap();
    let tensor = NamedTensor::from_buffer(meta, slice).unwrap();
    CheckpointSource::from_tensors([tensor]).unwrap().read(0).unwrap()
}

async fn read(pair: &Pair, from: &Arc<HostBuffer>, into: &Arc<HostBuffer>, deadline: Instant) -> Result<()> {
    let registration = pair.transports[0].one_sided().unwrap().register(from.clone()).await?;
    let region = Arc::new(registration.region().clone());
    let op = ReadOp { region, offset: 0, into: into.slice() };
    pair.transports[1].one_sided().unwrap().post_read(vec![op], deadline)?.done(soon()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_throttled_link_takes_its_time_and_both_directions_are_counted() {
    // 4 MB at 20 MB/s: 0.2 s each.
    let config = ThrottleConfig { bytes_per_sec: 20_000_000, latency: Duration::from_millis(10) };
    let mut pair = Pair::new(|_, inner| Throttle::wrap(inner, config)).await;
    let buffers = buffers(4_000_000);
    let began = Instant::now();
    for event in pair.broadcast(&buffers).await.unwrap() {
        event.done(soon()).await.unwrap();
    }
    assert!(began.elapsed() >= Duration::from_millis(209), "{:?}", began.elapsed());
    assert_eq!(bytes(&buffers[1]), bytes(&buffers[0]));
    let began = Instant::now();
    read(&pair, &buffers[0], &buffers[1], soon()).await.unwrap();
    assert!(began.elapsed() >= Duration::from_millis(209), "{:?}", began.elapsed());
    // A read that the link cannot bring in time ends in time.
    let soonish = Instant::now() + Duration::from_millis(50);
    let error = read(&pair, &buffers[0], &buffers[1], soonish).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
}

/// Everything meets this fate on member 1; member 0 is left alone.
async fn fated(config: ChaosConfig) -> (Pair, Arc<Chaos>) {
    let chaos = std::sync::Mutex::new(None);
    let pair = Pair::new(|rank, inner| match rank {
        0 => inner,
        _ => chaos.lock().unwrap().insert(Chaos::wrap(inner, config)).clone(),
    })
    .await;
    (pair, chaos.into_inner().unwrap().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_operation_never_ends_until_the_group_is_aborted() {
    let (mut pair, chaos) = fated(ChaosConfig { drop_ppm: 1_000_000, ..ChaosConfig::default() }).await;
    let buffers = buffers(1000);
    let events = pair.broadcast(&buffers).await.unwrap();
    for event in &events {
        let waited = event.done(Instant::now() + Duration::from_millis(100)).await;
        assert_eq!(waited.unwrap_err().kind(), ErrorKind::Timeout);
    }
    let cause = ckpt_core::Error::new(ErrorKind::PeerLost, "test", "enough");
    pair.communicators[0].abort.abort(cause);
    for event in &events {
        assert_eq!(event.done(soon()).await.unwrap_err().message(), "enough");
    }
    assert_eq!(bytes(&buffers[1]), vec![0; 1000]);
    let soonish = Instant::now() + Duration::from_millis(50);
    let error = read(&pair, &buffers[0], &buffers[1], soonish).await.unwrap_err();
    assert_eq!((error.kind(), chaos.counters().dropped), (ErrorKind::Timeout, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn corrupted_bytes_arrive_as_if_all_were_well() {
    let config = ChaosConfig { seed: 5, corrupt_ppm: 1_000_000, spare: 1, ..ChaosConfig::default() };
    let (mut pair, chaos) = fated(config).await;
    let buffers = buffers(1000);
    for expected_wrong in [false, true] {
        for event in pair.broadcast(&buffers).await.unwrap() {
            event.done(soon()).await.unwrap();
        }
        let found = bytes(&buffers[1]);
        assert_eq!(found != bytes(&buffers[0]), expected_wrong);
        // The damage is small: what looks only at the end does not see it.
        assert_eq!(found[16..], bytes(&buffers[0])[16..]);
    }
    read(&pair, &buffers[0], &buffers[1], soon()).await.unwrap();
    assert_ne!(bytes(&buffers[1]), bytes(&buffers[0]));
    let counters = chaos.counters();
    assert_eq!((counters.operations, counters.corrupted), (3, 2));
    // The owner's bytes are untouched.
    assert_eq!(bytes(&buffers[0]), vec![7; 1000]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_link_is_a_lost_peer_for_all() {
    let (mut pair, chaos) = fated(ChaosConfig { cut_ppm: 1_000_000, ..ChaosConfig::default() }).await;
    let buffers = buffers(1000);
    let error = pair.broadcast(&buffers).await.unwrap_err();
    assert_eq!((error.kind(), error.get(ckpt_core::Key::Rank)), (ErrorKind::PeerLost, Some("1")));
    assert!(pair.communicators.iter().all(|c| c.abort.poisoned().is_some()));
    let error = read(&pair, &buffers[0], &buffers[1], soon()).await.unwrap_err();
    assert_eq!((error.kind(), chaos.counters().cut), (ErrorKind::PeerLost, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_timeout_layer_ends_what_its_caller_would_wait_for() {
    let drops = ChaosConfig { drop_ppm: 1_000_000, ..ChaosConfig::default() };
    let limits = TimeoutConfig { join: Duration::from_secs(30), operation: Duration::from_millis(100) };
    let mut pair = Pair::new(|rank, inner| match rank {
        0 => inner,
        _ => Timeout::wrap(Chaos::wrap(inner, drops), limits),
    })
    .await;
    let buffers = buffers(1000);
    // Both are freed, though the callers are patient.
    for event in pair.broadcast(&buffers).await.unwrap() {
        assert_eq!(event.done(soon()).await.unwrap_err().kind(), ErrorKind::Timeout);
    }
    let error = read(&pair, &buffers[0], &buffers[1], soon()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    let began = Instant::now();
    let alone = pair.transports[1].collective().unwrap();
    let token = alone.create_token().await.unwrap();
    let group = GroupSpec { token, rank: 0, world_size: 2, epoch: Epoch(9) };
    let absent = alone.join(group, Instant::now() + Duration::from_millis(50)).await;
    assert_eq!(absent.unwrap_err().kind(), ErrorKind::Timeout);
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_operation_is_recorded_with_its_bytes() {
    let record = std::sync::Mutex::new(None);
    let mut pair = Pair::new(|rank, inner| match rank {
        0 => inner,
        _ => record.lock().unwrap().insert(Record::wrap(inner)).clone(),
    })
    .await;
    let record = record.into_inner().unwrap().unwrap();
    let buffers = buffers(3000);
    for event in pair.broadcast(&buffers).await.unwrap() {
        event.done(soon()).await.unwrap();
    }
    read(&pair, &buffers[0], &buffers[1], soon()).await.unwrap();
    let cause = ckpt_core::Error::new(ErrorKind::Aborted, "test", "the end");
    pair.communicators[1].abort.abort(cause);
    // The stream records the end of a broadcast behind its event.
    let all_ended = async {
        while !record.spans().iter().all(|span| span.end.is_some()) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), all_ended).await.unwrap();
    let spans = record.spans();
    let kinds: Vec<_> = spans.iter().map(|span| (span.kind, span.bytes, span.error)).collect();
    let expected = [
        (OpKind::Join, 0, None),
        (OpKind::Broadcast, 3000, None),
        (OpKind::Read, 3000, None),
        (OpKind::Abort, 0, Some(ErrorKind::Aborted)),
    ];
    assert_eq!(kinds, expected);
    assert!(spans.windows(2).all(|pair| pair[0].start <= pair[1].start));
    assert_eq!(record.bytes(OpKind::Read), 3000);
}
