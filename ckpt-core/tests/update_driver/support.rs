//! Parameter servers as tasks of one process, on watched devices and transports, with workers that check every byte.

use std::{collections::BTreeMap, net::Ipv4Addr, ops::Range, sync::Arc, time::Duration};

use ckpt_core::{
    DType, Result, Version,
    checkpoint::{CheckpointSource, LoadOptions, NamedTensor, Pool, load},
    control::{Hub, HubAddress, HubOptions, HubStatus, Session, SessionConfig, Token},
    deadlines::Deadlines,
    device::{DeviceConfig, host::HostDevice},
    plan::PlanLimits,
    server::{ParameterServer, Policy, ServerConfig, UpdateReport, UpdateRequest},
    sink::WeightSink,
    transport::{TransportConfig, TransportProvider, local::LocalProvider, tcp::TcpProvider},
    types::TensorMeta,
    update::EngineCall,
};
use tokio::task::JoinSet;

use crate::{
    watch::{Watched, WatchedDevice, WatchedTransport},
    worker::{TestSink, Worker},
};

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
    pub policy: Policy,
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
        Self { world_size, kind, adversary, limits, deadlines, policy: Policy::default() }
    }

    pub async fn start(self) -> Cluster {
        let folder = tempfile::tempdir().unwrap();
        let runtime_dir = folder.path().join("run");
        let token = Token::new("the job's secret").unwrap();
        let mut options = HubOptions {
            address: HubAddress::new("127.0.0.1", 0),
            job: JOB.into(),
            token: token.clone(),
            world_size: self.world_size,
            deadlines: self.deadlines,
            tls: false,
        };
        let hub = Hub::bind(options.clone()).await.unwrap();
        options.address = hub.address().unwrap().into();
        let provider: Box<dyn TransportProvider> = match self.kind {
            Kind::Local => Box::new(LocalProvider::default()),
            Kind::Tcp => Box::new(TcpProvider),
        };
        let mut ranks = Vec::new();
        for rank in 0..self.world_size {
            let address = options.address.clone();
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
                tls: false,
                secret: b"driver".to_vec(),
                connections: 2,
                device: device.clone(),
            });
            let transport =
                Arc::new(WatchedTransport { transport: transport.unwrap(), watch: watch.clone() });
            let server = ParameterServer::new(ServerConfig {
                session: session.clone(),
                device,
                transport,
                deadlines: self.deadlines,
                limits: self.limits.clone(),
            });
            ranks.push(RankOf { server: server.with_policy(self.policy), session, watch });
        }
        Cluster { ranks, hub: Some(hub), options, _folder: folder }
    }
}

pub struct RankOf {
    pub server: ParameterServer,
    pub session: Session,
    pub watch: Arc<Watched>,
}

pub struct Cluster {
    pub ranks: Vec<RankOf>,
    hub: Option<Hub>,
    options: HubOptions,
    _folder: tempfile::TempDir,
}

impl Cluster {
    pub fn world_size(&self) -> u32 {
        self.ranks.len() as u32
    }

    /// The hub dies without a word, and another takes its place.
    pub async fn restart_hub(&mut self) {
        drop(self.hub.take());
        for rank in &self.ranks {
            rank.session.until_lost().await;
        }
        self.hub = Some(Hub::bind(self.options.clone()).await.unwrap());
    }

    /// What the hub knows.
    pub async fn status(&self) -> HubStatus {
        self.hub.as_ref().unwrap().status().await.unwrap()
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
pub struct Expected(pub BTreeMap<String, (TensorMeta, Vec<u8>)>);

impl Expected {
    pub fn of(source: &CheckpointSource) -> Arc<Self> {
        let each = source.tensors().iter().enumerate();
        let each = each.map(|(i, t)| (t.meta.name.to_string(), (t.meta.clone(), source.read(i).unwrap())));
        Arc::new(Self(each.collect()))
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
