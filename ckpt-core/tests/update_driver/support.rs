//! Parameter servers as tasks of one process, on watched devices and transports, with workers that check every byte.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use ckpt_core::{
    DType, Error, ErrorKind, Result, Version,
    checkpoint::{CheckpointSource, LoadOptions, NamedTensor, Pool, load},
    control::{Hub, HubAddress, HubOptions, Session, SessionConfig, Token},
    deadlines::Deadlines,
    device::{
        Buffer, BufferSlice, DeviceBackend, DeviceConfig, DeviceInfo, MemoryKind, Ring, RingExport, Stream,
        host::HostDevice,
    },
    plan::PlanLimits,
    server::{ParameterServer, ServerConfig, UpdateReport, UpdateRequest},
    sink::{Afterwards, BucketMessage, WeightSink},
    transport::{
        Capability, Collective, CollectiveOp, Communicator, CommunicatorQueue, GroupSpec, OneSided,
        Transport, TransportConfig, TransportProvider, local::LocalProvider, tcp::TcpProvider,
    },
    types::TensorMeta,
    update::EngineCall,
};
use tokio::{sync::watch, task::JoinSet};

/// Nothing here takes so long unless it hangs.
pub const LONG: Duration = Duration::from_secs(60);
pub const JOB: &str = "driver-tests";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Local,
    Tcp,
}

/// How a cluster is made.
#[derive(Clone, Debug)]
pub struct Setup {
    pub world_size: u32,
    pub kind: Kind,
    pub adversary: Option<u64>,
    pub limits: PlanLimits,
    pub deadlines: Deadlines,
}

impl Setup {
    pub fn new(kind: Kind, adversary: Option<u64>, world_size: u32) -> Self {
        // Many buckets, and a ring that holds a few of them.
        let limits =
            PlanLimits { target_bucket_bytes: 4 << 10, ring_slack_bytes: 12 << 10, ..PlanLimits::default() };
        // Silence is not what these tests are about, and the machine may be busy.
        let deadlines = Deadlines {
            heartbeat: Duration::from_millis(200),
            dead_after: Duration::from_secs(30),
            ..Deadlines::default()
        };
        Self { world_size, kind, adversary, limits, deadlines }
    }

    pub async fn start(self) -> Cluster {
        let folder = tempfile::tempdir().unwrap();
        let runtime_dir = folder.path().join("run");
        let token = Token::new("the job's secret").unwrap();
        let options = HubOptions {
            address: HubAddress::new("127.0.0.1", 0),
            job: JOB.into(),
            token: token.clone(),
            world_size: self.world_size,
            deadlines: self.deadlines,
        };
        let hub = Hub::bind(options).await.unwrap();
        let provider: Box<dyn TransportProvider> = match self.kind {
            Kind::Local => Box::new(LocalProvider::default()),
            Kind::Tcp => Box::new(TcpProvider),
        };
        let mut ranks = Vec::new();
        for rank in 0..self.world_size {
            let address = hub.address().unwrap().into();
            let config =
                SessionConfig::new(address, JOB, token.clone(), rank, self.world_size, self.deadlines)
                    .unwrap();
            let session = Session::connect(config).await.unwrap();
            let config = DeviceConfig { rank, local_rank: rank, runtime_dir: runtime_dir.clone() };
            let device = HostDevice::open(&config).unwrap().with_free_memory(64 << 20);
            let device = match self.adversary {
                Some(seed) => device.adversarial(seed + u64::from(rank)),
                None => device,
            };
            let watch = Arc::new(Watched::default());
            let device = Arc::new(WatchedDevice { device, watch: watch.clone() });
            let transport = provider.open(&TransportConfig {
                bind: Ipv4Addr::LOCALHOST.into(),
                runtime_dir: runtime_dir.clone(),
                secret: b"driver".to_vec(),
                connections: 2,
                device: device.clone(),
            });
            let transport =
                Arc::new(WatchedTransport { transport: transport.unwrap(), watch: watch.clone() });
            let server = ParameterServer::new(ServerConfig {
                session,
                device,
                transport,
                deadlines: self.deadlines,
                limits: self.limits.clone(),
            });
            ranks.push(RankOf { server, watch });
        }
        Cluster { ranks, _hub: hub, _folder: folder }
    }
}

pub struct RankOf {
    pub server: ParameterServer,
    pub watch: Arc<Watched>,
}

pub struct Cluster {
    pub ranks: Vec<RankOf>,
    _hub: Hub,
    _folder: tempfile::TempDir,
}

impl Cluster {
    pub fn world_size(&self) -> u32 {
        self.ranks.len() as u32
    }

    /// Splits `source` over all ranks and tells each what the others hold.
    pub async fn register(&mut self, name: &str, source: &CheckpointSource) {
        let shares = source.split(self.world_size()).unwrap();
        self.register_shares(name, source, shares).await;
    }

    /// The same with given shares.
    pub async fn register_shares(
        &mut self,
        name: &str,
        source: &CheckpointSource,
        shares: Vec<Range<usize>>,
    ) {
        for (rank, share) in self.ranks.iter_mut().zip(shares) {
            let pool = Pool::new(rank.server.device().clone());
            let registered = load(source, share, &pool, &LoadOptions::new(name)).unwrap();
            rank.server.register(name, registered).unwrap();
        }
        for result in self.each(|_, server| Box::pin(server.gather_metas(name))).await {
            result.unwrap();
        }
    }

    /// One call on every server, at the same time.
    pub async fn each<'a, T: 'a>(
        &'a mut self,
        mut call: impl FnMut(u32, &'a mut ParameterServer) -> Called<'a, T>,
    ) -> Vec<T> {
        let calls = (0..).zip(&mut self.ranks).map(|(rank, r)| call(rank, &mut r.server));
        tokio::time::timeout(LONG, futures_util::future::join_all(calls)).await.expect("all calls end")
    }

    /// One update of all ranks with these workers; the engine's request is on rank 0.
    pub async fn update(
        &mut self,
        name: &str,
        version: u64,
        workers: Vec<Option<TestSink>>,
        engine: Option<EngineCall>,
    ) -> Vec<Result<UpdateReport>> {
        let mut workers = workers.into_iter();
        let mut engine = engine;
        self.each(|_, server| {
            let sink = workers.next().flatten().map(|sink| Box::new(sink) as Box<dyn WeightSink>);
            Box::pin(server.update(UpdateRequest {
                checkpoint: name.into(),
                version: Version(version),
                ranks: Vec::new(),
                sink,
                engine: engine.take(),
            }))
        })
        .await
    }

    /// An update in which nothing goes wrong: every worker has every byte of `source`, exactly once.
    pub async fn update_well(
        &mut self,
        name: &str,
        version: u64,
        source: &CheckpointSource,
    ) -> Vec<UpdateReport> {
        let expected = Expected::of(source);
        let workers: Vec<Worker> = self.workers(&expected);
        let sinks = workers.iter().map(|w| Some(w.sink())).collect();
        let reports = self.update(name, version, sinks, None).await;
        let reports: Vec<UpdateReport> = reports.into_iter().map(|r| r.unwrap()).collect();
        for worker in &workers {
            worker.assert_complete();
        }
        reports
    }

    /// A worker that behaves on each rank.
    pub fn workers(&self, expected: &Arc<Expected>) -> Vec<Worker> {
        (0..).zip(&self.ranks).map(|(rank, r)| Worker::new(rank, expected, &r.watch)).collect()
    }
}

pub type Called<'a, T> = std::pin::Pin<Box<dyn Future<Output = T> + Send + 'a>>;

// ---- checkpoints ----

/// Tensors of `sizes` bytes with recognisable contents.
pub fn tensors(sizes: impl IntoIterator<Item = u64>, salt: u8) -> CheckpointSource {
    let each = (0..).zip(sizes).map(|(number, size)| {
        let meta = TensorMeta::new(format!("layer.{number}.weight"), DType::U8, [size]).unwrap();
        named(meta, salt)
    });
    CheckpointSource::from_tensors(each).unwrap()
}

/// Every shape that is easily forgotten, between tensors of ordinary sizes.
pub fn varied(salt: u8) -> CheckpointSource {
    let ordinary = (0..60_u64).map(|i| (format!("layer.{i}"), DType::BF16, vec![1 + i * 37 % 2900]));
    let odd = [
        ("a scalar", DType::F64, vec![]),
        ("empty", DType::F16, vec![0, 4]),
        ("empty at the end", DType::BF16, vec![7, 0]),
        ("one byte", DType::BOOL, vec![1]),
        ("fp4", DType::F4, vec![3, 2]),
        ("larger than a bucket", DType::F32, vec![40, 100]),
        ("h\u{e9}", DType::I64, vec![1, 2, 1, 3]),
    ];
    let odd = odd.map(|(name, dtype, shape)| (name.to_owned(), dtype, shape));
    let mut all: Vec<_> = ordinary.chain(odd).collect();
    // Odd ones between the ordinary ones.
    all.sort_by_key(|(name, _, shape)| (shape.iter().sum::<u64>() % 13, name.clone()));
    let each =
        all.into_iter().map(|(name, dtype, shape)| named(TensorMeta::new(name, dtype, shape).unwrap(), salt));
    CheckpointSource::from_tensors(each).unwrap()
}

fn named(meta: TensorMeta, salt: u8) -> NamedTensor {
    let seed = meta.name.bytes().fold(salt, |a, b| a.wrapping_mul(31).wrapping_add(b));
    let bytes: Vec<u8> =
        (0..meta.len_bytes()).map(|i| (i as u8).wrapping_mul(7) ^ (i >> 8) as u8 ^ seed).collect();
    NamedTensor::from_slice(meta, &bytes).unwrap()
}

/// What a worker must hold in the end.
pub struct Expected(BTreeMap<String, (TensorMeta, Vec<u8>)>);

impl Expected {
    pub fn of(source: &CheckpointSource) -> Arc<Self> {
        let each = source.tensors().iter().enumerate();
        let each = each.map(|(i, t)| (t.meta.name.to_string(), (t.meta.clone(), source.read(i).unwrap())));
        Arc::new(Self(each.collect()))
    }
}

// ---- devices and transports ----

/// What a rank did.
#[derive(Default)]
pub struct Watched {
    /// Ring memory that exists.
    pub live_rings: Arc<AtomicUsize>,
    /// Groups joined.
    pub joins: AtomicU64,
    /// Exchanges enqueued, since the start.
    pub enqueued: Arc<watch::Sender<u64>>,
    /// The next allocation of a ring fails.
    pub no_ring: Mutex<Option<Error>>,
}

#[derive(Debug)]
struct WatchedDevice {
    device: HostDevice,
    watch: Arc<Watched>,
}

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watched")
    }
}

impl DeviceBackend for WatchedDevice {
    fn kind(&self) -> &'static str {
        self.device.kind()
    }
    fn info(&self) -> &DeviceInfo {
        self.device.info()
    }
    fn free_memory_bytes(&self) -> Result<u64> {
        self.device.free_memory_bytes()
    }
    fn stream(&self, label: &'static str) -> Result<Arc<dyn Stream>> {
        self.device.stream(label)
    }
    fn allocate_ring(&self, len_bytes: u64) -> Result<Arc<dyn Ring>> {
        if let Some(error) = self.watch.no_ring.lock().unwrap().take() {
            return Err(error);
        }
        let ring = self.device.allocate_ring(len_bytes)?;
        let live = self.watch.live_rings.clone();
        live.fetch_add(1, Ordering::SeqCst);
        let memory = Arc::new(WatchedMemory { memory: ring.buffer(), live });
        Ok(Arc::new(WatchedRing { ring, memory }))
    }
    fn pin(&self, memory: Arc<dyn Buffer>) -> Result<Arc<dyn Buffer>> {
        self.device.pin(memory)
    }
    fn flush_remote_writes(&self) -> Result<()> {
        self.device.flush_remote_writes()
    }
}

#[derive(Debug)]
struct WatchedRing {
    ring: Arc<dyn Ring>,
    memory: Arc<WatchedMemory>,
}

impl Ring for WatchedRing {
    fn buffer(&self) -> Arc<dyn Buffer> {
        self.memory.clone()
    }
    fn export(&self) -> RingExport {
        self.ring.export()
    }
    fn freed(&self, range: Range<u64>) {
        self.ring.freed(range);
    }
}

#[derive(Debug)]
struct WatchedMemory {
    memory: Arc<dyn Buffer>,
    live: Arc<AtomicUsize>,
}

impl Drop for WatchedMemory {
    fn drop(&mut self) {
        self.live.fetch_sub(1, Ordering::SeqCst);
    }
}

// SAFETY: it is the buffer that it holds, which keeps the contract.
unsafe impl Buffer for WatchedMemory {
    fn address(&self) -> u64 {
        self.memory.address()
    }
    fn len_bytes(&self) -> u64 {
        self.memory.len_bytes()
    }
    fn memory(&self) -> MemoryKind {
        self.memory.memory()
    }
}

#[derive(Debug)]
struct WatchedTransport {
    transport: Arc<dyn Transport>,
    watch: Arc<Watched>,
}

impl Transport for WatchedTransport {
    fn name(&self) -> &'static str {
        self.transport.name()
    }
    fn capability(&self) -> Capability {
        self.transport.capability()
    }
    fn collective(&self) -> Option<&dyn Collective> {
        Some(self)
    }
    fn one_sided(&self) -> Option<&dyn OneSided> {
        self.transport.one_sided()
    }
}

#[async_trait]
impl Collective for WatchedTransport {
    async fn create_token(&self) -> Result<Bytes> {
        self.transport.collective().unwrap().create_token().await
    }
    async fn join(&self, group: GroupSpec, deadline: Instant) -> Result<Communicator> {
        self.watch.joins.fetch_add(1, Ordering::SeqCst);
        let Communicator { queue, abort } =
            self.transport.collective().unwrap().join(group, deadline).await?;
        let queue = Box::new(WatchedQueue { queue, enqueued: self.watch.enqueued.clone() });
        Ok(Communicator { queue, abort })
    }
}

#[derive(Debug)]
struct WatchedQueue {
    queue: Box<dyn CommunicatorQueue>,
    enqueued: Arc<watch::Sender<u64>>,
}

#[async_trait]
impl CommunicatorQueue for WatchedQueue {
    async fn enqueue(
        &mut self,
        ops: Vec<CollectiveOp>,
        stream: &Arc<dyn Stream>,
    ) -> Result<ckpt_core::device::Event> {
        let event = self.queue.enqueue(ops, stream).await;
        self.enqueued.send_modify(|n| *n += 1);
        event
    }
}

// ---- workers ----

/// What goes wrong in a worker.
#[derive(Clone, Debug, Default)]
pub enum Fault {
    #[default]
    None,
    /// This call returns an error.
    Raise(At),
    /// This call never returns; it is cut short by its deadline or an abort.
    Hang(At),
    /// The same, and the worker cannot even be told of a failure.
    Gone(At),
    /// Every bucket takes this long.
    Slow(Duration),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    Open,
    Bucket(u32),
    Release,
    Finish,
}

/// The test's side of one worker.
pub struct Worker {
    pub rank: u32,
    pub state: Arc<State>,
    pub fault: Fault,
    /// Buckets before `ahead_until` are taken only once this many exchanges more than the bucket's number were enqueued.
    pub ahead: u64,
    pub ahead_until: u32,
}

/// What a worker has seen.
pub struct State {
    expected: Arc<Expected>,
    watch: Arc<Watched>,
    pub seen: Mutex<BTreeMap<String, u32>>,
    pub buckets: AtomicU64,
    /// How many calls are waiting in [`Fault::Hang`].
    pub hanging: watch::Sender<u64>,
    pub finished: AtomicU64,
    pub told: Mutex<Option<String>>,
}

impl State {
    /// The worker is as new.
    pub fn forget(&self) {
        self.seen.lock().unwrap().clear();
        self.buckets.store(0, Ordering::SeqCst);
        self.finished.store(0, Ordering::SeqCst);
        *self.told.lock().unwrap() = None;
    }
}

impl Worker {
    pub fn new(rank: u32, expected: &Arc<Expected>, watch: &Arc<Watched>) -> Self {
        let state = State {
            expected: expected.clone(),
            watch: watch.clone(),
            seen: Mutex::default(),
            buckets: AtomicU64::new(0),
            hanging: watch::Sender::new(0),
            finished: AtomicU64::new(0),
            told: Mutex::default(),
        };
        Self { rank, state: Arc::new(state), fault: Fault::None, ahead: 0, ahead_until: 0 }
    }

    pub fn sink(&self) -> TestSink {
        let base = *self.state.watch.enqueued.borrow();
        TestSink {
            endpoint: format!("test://{}", self.rank),
            state: self.state.clone(),
            fault: self.fault.clone(),
            target: base + self.ahead,
            ahead_until: self.ahead_until,
            ring: None,
        }
    }

    /// Every tensor came once, and the post hook ran.
    #[track_caller]
    pub fn assert_complete(&self) {
        let seen = self.state.seen.lock().unwrap();
        let expected = &self.state.expected.0;
        assert_eq!(seen.len(), expected.len(), "rank {}: {:?}", self.rank, seen.keys());
        assert!(seen.values().all(|n| *n == 1), "rank {}: a tensor came twice: {seen:?}", self.rank);
        assert_eq!(self.state.finished.load(Ordering::SeqCst), 1, "rank {}", self.rank);
        assert_eq!(*self.state.told.lock().unwrap(), None, "rank {}", self.rank);
    }

    /// What [`WeightSink::fail`] said.
    pub fn told(&self) -> Option<String> {
        self.state.told.lock().unwrap().clone()
    }
}

pub struct TestSink {
    endpoint: String,
    state: Arc<State>,
    fault: Fault,
    target: u64,
    ahead_until: u32,
    ring: Option<Arc<dyn Buffer>>,
}

impl TestSink {
    async fn go_wrong(&self, at: At, deadline: Instant) -> Result<()> {
        match &self.fault {
            Fault::Raise(when) if *when == at => {
                Err(Error::new(ErrorKind::Backend, "load weights", format!("no parameter at {at:?}")))
            }
            Fault::Hang(when) | Fault::Gone(when) if *when == at => {
                self.state.hanging.send_modify(|n| *n += 1);
                tokio::time::sleep_until(deadline.into()).await;
                Err(Error::new(ErrorKind::Timeout, "wait for the worker", format!("no answer at {at:?}")))
            }
            Fault::Slow(time) if matches!(at, At::Bucket(_)) => {
                tokio::time::sleep(*time).await;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// A panic in a sink would only show as a missing answer.
fn ensure(holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::new(ErrorKind::Corrupt, "check the update", message())) }
}

#[async_trait]
impl WeightSink for TestSink {
    fn endpoint(&self) -> &str {
        &self.endpoint
    }

    async fn open(&mut self, ring: &dyn Ring, deadline: Instant) -> Result<()> {
        self.go_wrong(At::Open, deadline).await?;
        self.ring = Some(ring.buffer());
        Ok(())
    }

    async fn deliver(&mut self, bucket: &BucketMessage, deadline: Instant) -> Result<()> {
        if bucket.bucket < self.ahead_until {
            let mut enqueued = self.state.watch.enqueued.subscribe();
            let wanted = self.target + u64::from(bucket.bucket);
            let ahead = enqueued.wait_for(|n| *n >= wanted);
            let waited = tokio::time::timeout_at(deadline.into(), ahead).await;
            ensure(waited.is_ok(), || {
                format!("bucket {}: later exchanges did not start meanwhile", bucket.bucket)
            })?;
        }
        self.go_wrong(At::Bucket(bucket.bucket), deadline).await?;
        let number = self.state.buckets.fetch_add(1, Ordering::SeqCst);
        ensure(number == u64::from(bucket.bucket), || {
            format!("bucket {} came as number {number}", bucket.bucket)
        })?;
        let ring = self.ring.clone().expect("the ring is open");
        for tensor in &bucket.tensors {
            let (meta, bytes) = &self.state.expected.0[&*tensor.meta.name];
            let name = &meta.name;
            ensure(&tensor.meta == meta, || format!("{:?} instead of {meta:?}", tensor.meta))?;
            let slice = BufferSlice::new(ring.clone(), tensor.offset..tensor.offset + meta.len_bytes())?;
            // SAFETY: nothing writes a bucket's bytes before its ack: what these tests check under the adversary.
            let held = unsafe { slice.as_slice() }?;
            ensure(held == bytes.as_slice(), || format!("{name} of bucket {}: wrong bytes", bucket.bucket))?;
            *self.state.seen.lock().unwrap().entry(name.to_string()).or_default() += 1;
        }
        // A worker takes a while; others run meanwhile.
        tokio::task::yield_now().await;
        Ok(())
    }

    async fn release(&mut self, deadline: Instant) -> Result<()> {
        self.go_wrong(At::Release, deadline).await?;
        self.ring = None;
        Ok(())
    }

    async fn finish(&mut self, deadline: Instant) -> Result<()> {
        let live = self.state.watch.live_rings.load(Ordering::SeqCst);
        ensure(live == 0, || format!("{live} rings live on in the post hook"))?;
        self.go_wrong(At::Finish, deadline).await?;
        self.state.finished.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    async fn fail(&mut self, cause: &Error, deadline: Instant) -> Result<Afterwards> {
        if matches!(self.fault, Fault::Gone(_)) {
            tokio::time::sleep_until(deadline.into()).await;
            return Err(Error::new(ErrorKind::Timeout, "tell the worker", "it does not listen"));
        }
        self.ring = None;
        *self.state.told.lock().unwrap() = Some(cause.to_string());
        Ok(Afterwards::LetGo)
    }
}

/// Runs checks side by side, so that a matrix takes no longer than it must.
pub async fn side_by_side(checks: impl IntoIterator<Item = impl Future<Output = ()> + Send + 'static>) {
    let mut running: JoinSet<()> = checks.into_iter().map(Box::pin).collect();
    while let Some(ended) = running.join_next().await {
        if let Err(error) = ended {
            std::panic::resume_unwind(error.into_panic());
        }
    }
}
