//! Jobs of several ranks in this process, over real sockets, whose workers are streams that compare every byte.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test file uses a part, and ends at the first surprise"
)]

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::{
    Rank, Result, Version,
    checkpoint::{CheckpointSource, LoadOptions, Pool, generate, load},
    control::{Hub, HubAddress, HubOptions, Session, SessionConfig, Token},
    deadlines::Deadlines,
    device::{DeviceBackend, DeviceConfig, host::HostDevice},
    plan::PlanLimits,
    server::{ParameterServer, ServerConfig, UpdateReport, UpdateRequest},
    sink::{TensorStream, stream},
    transport::{Transport, TransportConfig, TransportProvider, tcp::TcpProvider},
};
use futures_util::future::join_all;

pub const NAME: &str = "weights";
/// Many buckets, a few in the ring at once.
const BUCKET_BYTES: u64 = 256 << 10;
const RING_SLACK_BYTES: u64 = 1 << 20;

pub fn checkpoint(bytes: u64, seed: u64) -> Arc<CheckpointSource> {
    Arc::new(CheckpointSource::generated(generate::qwen_shaped(bytes), seed))
}

/// What differs between jobs.
pub struct Shape<'a> {
    pub world_size: u32,
    pub secret: &'a str,
    /// Seed of an adversarial device.
    pub adversary: Option<u64>,
    /// Each rank says that it is on a host of its own, so that several receive.
    pub own_hosts: bool,
    /// Layers over each rank's transport.
    pub wrap: fn(Arc<dyn Transport>) -> Arc<dyn Transport>,
}

impl Shape<'_> {
    pub fn new(world_size: u32) -> Self {
        Shape { world_size, secret: "secret of both", adversary: None, own_hosts: true, wrap: |t| t }
    }
}

/// A job: its hub and its ranks' servers.
pub struct Job {
    pub servers: Vec<ParameterServer>,
    devices: Vec<Arc<dyn DeviceBackend>>,
    _hub: Hub,
    _folder: tempfile::TempDir,
}

impl Job {
    pub async fn start(shape: Shape<'_>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let deadlines = Deadlines {
            join: Duration::from_secs(30),
            bucket: Duration::from_secs(20),
            // Deaths show as closed connections; a slow machine is not a dead one.
            dead_after: Duration::from_secs(60),
            ..Deadlines::default()
        };
        let token = Token::new(shape.secret.to_owned()).unwrap();
        let address = HubAddress::new("127.0.0.1", 0);
        let hub = Hub::in_process(HubOptions {
            address: address.clone(),
            job: "job".into(),
            token: token.clone(),
            world_size: shape.world_size,
            deadlines,
            tls: false,
        });
        let (mut servers, mut devices) = (Vec::new(), Vec::new());
        for rank in 0..shape.world_size {
            let config =
                SessionConfig::new(address.clone(), "job", token.clone(), rank, shape.world_size, deadlines);
            let session = Session::in_process(&hub, config.unwrap()).await.unwrap();
            let runtime_dir = folder.path().join("run");
            let device_config = DeviceConfig { rank, local_rank: rank, runtime_dir: runtime_dir.clone() };
            let mut device = HostDevice::open(&device_config).unwrap().with_free_memory(1 << 30);
            if let Some(seed) = shape.adversary {
                device = device.adversarial(seed + u64::from(rank));
            }
            let device: Arc<dyn DeviceBackend> = Arc::new(device);
            let transport: Arc<dyn Transport> = TcpProvider
                .open(&TransportConfig {
                    bind: Ipv4Addr::LOCALHOST.into(),
                    runtime_dir,
                    tls: false,
                    secret: shape.secret.into(),
                    connections: 2,
                    device: device.clone(),
                })
                .unwrap();
            let limits = PlanLimits {
                target_bucket_bytes: BUCKET_BYTES,
                ring_slack_bytes: RING_SLACK_BYTES,
                ..PlanLimits::default()
            };
            let mut server = ParameterServer::new(ServerConfig {
                session,
                device: device.clone(),
                transport: (shape.wrap)(transport),
                deadlines,
                limits,
            });
            if shape.own_hosts {
                server = server.with_location(format!("host-{rank}"), "");
            }
            servers.push(server);
            devices.push(device);
        }
        Self { servers, devices, _hub: hub, _folder: folder }
    }

    /// The first `owners` ranks register a share each.
    pub fn register(&mut self, source: &Arc<CheckpointSource>, owners: u32) {
        for (rank, range) in source.split(owners).unwrap().into_iter().enumerate() {
            self.register_range(rank, source, range);
        }
    }

    pub fn register_range(
        &mut self,
        rank: usize,
        source: &Arc<CheckpointSource>,
        range: std::ops::Range<usize>,
    ) {
        let pool = Pool::with_block_bytes(self.devices[rank].clone(), 1 << 20);
        let registered = load(source, range, &pool, &LoadOptions::new(NAME)).unwrap();
        self.servers[rank].register(NAME, registered).unwrap();
    }

    pub async fn gather(&mut self) {
        let gathers = self.servers.iter_mut().map(|server| server.gather_metas(NAME));
        join_all(gathers).await.into_iter().for_each(|manifest| drop(manifest.unwrap()));
    }

    /// `ranks` call update; the others do nothing at all. Every member's worker must hold exactly `source`.
    pub async fn update(
        &mut self,
        version: u64,
        members: &[Rank],
        ranks: &[Rank],
        source: &Arc<CheckpointSource>,
    ) -> Vec<UpdateReport> {
        let outcomes = self.try_update(version, members, ranks, source).await;
        outcomes.into_iter().map(Result::unwrap).collect()
    }

    pub async fn try_update(
        &mut self,
        version: u64,
        members: &[Rank],
        ranks: &[Rank],
        source: &Arc<CheckpointSource>,
    ) -> Vec<Result<UpdateReport>> {
        let calls = self
            .servers
            .iter_mut()
            .filter(|server| members.contains(&server.rank()))
            .map(|server| update(server, version, ranks.to_vec(), source.clone()));
        join_all(calls).await
    }
}

/// One rank's update; its worker compares.
pub async fn update(
    server: &mut ParameterServer,
    version: u64,
    ranks: Vec<Rank>,
    source: Arc<CheckpointSource>,
) -> Result<UpdateReport> {
    let (sink, stream) = stream("worker");
    let worker = tokio::spawn(take(stream));
    let request = UpdateRequest {
        checkpoint: NAME.into(),
        version: Version(version),
        ranks,
        sink: Some(Box::new(sink)),
        engine: None,
    };
    let report = server.update(request).await;
    let held = worker.await.unwrap();
    let report = report?;
    assert_same(&held.unwrap(), &source);
    Ok(report)
}

/// What a worker holds at the end.
pub async fn take(mut stream: TensorStream) -> Result<HashMap<String, Vec<u8>>> {
    let mut held = HashMap::new();
    while let Some(bucket) = stream.next_bucket().await? {
        for tensor in bucket.tensors() {
            let twice = held.insert(tensor.meta().name.to_string(), tensor.bytes()?.to_vec());
            assert!(twice.is_none(), "{} came twice", tensor.meta().name);
        }
    }
    Ok(held)
}

pub fn assert_same(held: &HashMap<String, Vec<u8>>, source: &CheckpointSource) {
    assert_eq!(held.len(), source.tensors().len());
    for (index, tensor) in source.tensors().iter().enumerate() {
        let name = &*tensor.meta.name;
        assert!(held[name] == source.read(index).unwrap(), "the bytes of {name} differ");
    }
}

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}
