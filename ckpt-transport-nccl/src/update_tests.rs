//! Whole updates on the fake driver: broadcast, and P2P into pinned staging with a sub-group behind it.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use ckpt_core::{
    Error, ErrorKind, Result, Version,
    checkpoint::{CheckpointSource, LoadOptions, Pool, generate, load},
    control::{Hub, HubAddress, HubOptions, Session, SessionConfig, Token},
    deadlines::Deadlines,
    device::{
        Buffer, DeviceBackend, DeviceConfig, DeviceProvider, Ring,
        usage::{DeviceUsage, FreeMemory, MemoryWatch},
    },
    plan::PlanLimits,
    server::{ParameterServer, ServerConfig, UpdateReport, UpdateRequest},
    sink::{Afterwards, BucketMessage, WeightSink},
    transport::{TransportProvider, tcp::TcpProvider},
};

use crate::{
    CudaIpcProvider, CudaTransportProvider, NcclConfig,
    device::{CudaProvider, DriverCell},
    fake,
};

const NAME: &str = "weights";

/// Compares what is in the ring: the fake's device memory can be read.
struct Compare {
    expected: Arc<HashMap<Arc<str>, Vec<u8>>>,
    ring: Option<Arc<dyn Buffer>>,
    right: Arc<AtomicUsize>,
}

#[async_trait::async_trait]
impl WeightSink for Compare {
    fn endpoint(&self) -> &str {
        "compare"
    }

    async fn open(&mut self, ring: &dyn Ring, _: Instant) -> Result<()> {
        self.ring = Some(ring.buffer());
        Ok(())
    }

    async fn deliver(&mut self, bucket: &BucketMessage, _: Instant) -> Result<()> {
        let ring = self.ring.as_ref().unwrap();
        for tensor in &bucket.tensors {
            let expected = &self.expected[&tensor.meta.name];
            let at = (ring.address() + tensor.offset) as *const u8;
            // SAFETY: the fake's device memory is host memory, and the bucket is ours until it is acked.
            let found = unsafe { std::slice::from_raw_parts(at, expected.len()) };
            if found != expected.as_slice() {
                return Err(Error::new(ErrorKind::Corrupt, "compare", tensor.meta.name.to_string()));
            }
            self.right.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    async fn release(&mut self, _: Instant) -> Result<()> {
        self.ring = None;
        Ok(())
    }

    async fn finish(&mut self, _: Instant) -> Result<()> {
        Ok(())
    }

    async fn fail(&mut self, _: &Error, _: Instant) -> Result<Afterwards> {
        self.ring = None;
        Ok(Afterwards::LetGo)
    }
}

struct Job {
    servers: Vec<ParameterServer>,
    source: Arc<CheckpointSource>,
    _hub: Hub,
}

/// Ranks on these hosts with a GPU each, and a share of a checkpoint of 3 MiB.
async fn job(hosts: &[u64], ipc: bool) -> Job {
    job_on(0, hosts, ipc).await
}

/// The same from a certain GPU on.
async fn job_on(first_device: u32, hosts: &[u64], ipc: bool) -> Job {
    let ranks = hosts.len() as u32;
    let deadlines = Deadlines { dead_after: Duration::from_secs(60), ..Deadlines::default() };
    let (token, address) = (Token::new("a secret").unwrap(), HubAddress::new("127.0.0.1", 0));
    let hub = Hub::in_process(HubOptions {
        address: address.clone(),
        job: "job".into(),
        token: token.clone(),
        world_size: ranks,
        deadlines,
        tls: false,
    });
    let source = Arc::new(CheckpointSource::generated(generate::qwen_shaped(3 << 20), 9));
    let mut servers = Vec::new();
    for (rank, host) in (0..).zip(hosts) {
        let cell = DriverCell::of(if ipc { fake::driver() } else { fake::driver_without_ipc() });
        let device: Arc<dyn DeviceBackend> =
            Arc::new(CudaProvider::new(cell.clone()).open_cuda(first_device + rank).unwrap());
        let config = fake::config(device.clone());
        let ipc = CudaIpcProvider::new(cell).on_host(*host);
        let provider = CudaTransportProvider::of(ipc, fake::provider(NcclConfig::default()));
        let session =
            SessionConfig::new(address.clone(), "job", token.clone(), rank, ranks, deadlines).unwrap();
        let mut server = ParameterServer::new(ServerConfig {
            session: Session::in_process(&hub, session).await.unwrap(),
            device: device.clone(),
            transport: provider.open(&config).unwrap(),
            deadlines,
            limits: PlanLimits {
                target_bucket_bytes: 256 << 10,
                ring_slack_bytes: 1 << 20,
                ..PlanLimits::default()
            },
        })
        .with_reader(TcpProvider.open(&config).unwrap());
        let range = source.split(ranks).unwrap().swap_remove(rank as usize);
        server
            .register(NAME, load(&source, range, &Pool::new(device), &LoadOptions::new(NAME)).unwrap())
            .unwrap();
        servers.push(server);
    }
    let gathered = tokio_all(servers.iter_mut().map(|server| Box::pin(server.gather_metas(NAME)))).await;
    gathered.into_iter().for_each(|metas| drop(metas.unwrap()));
    Job { servers, source, _hub: hub }
}

/// All at once, on this task.
async fn tokio_all<F: Future + Unpin>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut futures: Vec<(F, Option<F::Output>)> = futures.map(|future| (future, None)).collect();
    std::future::poll_fn(|context| {
        for (future, output) in futures.iter_mut().filter(|(_, output)| output.is_none()) {
            if let std::task::Poll::Ready(value) = std::pin::Pin::new(future).poll(context) {
                *output = Some(value);
            }
        }
        match futures.iter().all(|(_, output)| output.is_some()) {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        }
    })
    .await;
    futures.into_iter().filter_map(|(_, output)| output).collect()
}

impl Job {
    /// One update of `ranks` (all, by broadcast, if there are none), every tensor compared on each.
    async fn update(&mut self, version: u64, ranks: &[u32]) -> Vec<UpdateReport> {
        let each = self.source.tensors().iter().enumerate();
        let expected: Arc<HashMap<Arc<str>, Vec<u8>>> = Arc::new(
            each.map(|(i, t)| (t.meta.name.clone(), self.source.read(i).unwrap().to_vec())).collect(),
        );
        let right = Arc::new(AtomicUsize::new(0));
        let members =
            self.servers.iter_mut().zip(0..).filter(|(_, rank)| ranks.is_empty() || ranks.contains(rank));
        let updates: Vec<_> = members
            .map(|(server, _)| {
                let sink = Compare { expected: expected.clone(), ring: None, right: right.clone() };
                Box::pin(server.update(UpdateRequest {
                    checkpoint: NAME.into(),
                    version: Version(version),
                    ranks: ranks.to_vec(),
                    sink: Some(Box::new(sink)),
                    engine: None,
                }))
            })
            .collect();
        let count = updates.len();
        let reports = tokio_all(updates.into_iter()).await;
        let reports: Vec<_> = reports.into_iter().map(|report| report.unwrap()).collect();
        assert_eq!(right.load(Ordering::SeqCst), expected.len() * count);
        reports
    }
}

async fn broadcast_and_p2p(ipc: bool) {
    let mut job = job(&[1; 3], ipc).await;
    let all = job.update(1, &[]).await;
    assert!(all.iter().all(|report| !report.p2p && report.buckets > 4), "{all:?}");
    // Twice, with a broadcast between: the groups of all and of these two are both kept.
    for version in [2, 4] {
        let some = job.update(version, &[1, 2]).await;
        assert!(some.iter().all(|report| report.p2p), "{some:?}");
        // One of the two pulls for both: they are on one host.
        let pulled: Vec<u64> = some.iter().map(|report| report.rooted_bytes).collect();
        assert!(pulled[0] >= job.source.len_bytes() && pulled[1] == 0, "{pulled:?}");
        job.update(version + 1, &[]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_pull_into_pinned_memory_and_copy_to_each_other() {
    broadcast_and_p2p(true).await;
}

/// Five updates over one communicator: the ring is used again and again, and every rank passes bytes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_of_two_hosts_copy_on_what_comes_along_their_rails() {
    let mut job = job(&[1, 2, 2, 1], true).await;
    for version in [1, 2, 4, 5] {
        let all = job.update(version, &[]).await;
        assert!(all.iter().all(|report| !report.p2p && report.buckets > 4), "{all:?}");
        if version == 2 {
            // These two are on one host, and copy.
            let some = job.update(3, &[1, 2]).await;
            assert!(some.iter().all(|report| report.p2p), "{some:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_pull_into_pinned_memory_and_broadcast_over_nccl() {
    broadcast_and_p2p(false).await;
}

/// Known amounts, each told apart: what the first update takes besides its ring is the group's, and what the worker takes
/// meanwhile is nobody's here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ring_group_and_context_are_told_apart() {
    const FIRST: u32 = fake::FIRST_COUNTED as u32;
    const WORKERS: u64 = 8 << 20;
    let provider = fake::seen_provider();
    let config = |rank| DeviceConfig { rank, local_rank: FIRST + rank, runtime_dir: std::env::temp_dir() };
    let free = || [0, 1].map(|rank| provider.free_memory_bytes(&config(rank)).unwrap());
    let before = free();
    let mut job = job_on(FIRST, &[1; 2], false).await;
    let opened = free();
    let mut looked: Vec<FreeMemory> =
        (0..2).map(|i| FreeMemory { opened: Some((before[i], opened[i])), updates: Vec::new() }).collect();
    let mut workers: Vec<Arc<dyn Buffer>> = Vec::new();
    let mut ring_bytes = 0;
    for version in 1..=2 {
        let mut watches = Vec::new();
        let updates: Vec<_> = job
            .servers
            .iter_mut()
            .map(|server| {
                let watch = MemoryWatch::before(server.device().clone()).unwrap();
                let sink = watch.over(Box::new(Holding));
                watches.push(watch);
                Box::pin(server.update(UpdateRequest {
                    checkpoint: NAME.into(),
                    version: Version(version),
                    ranks: Vec::new(),
                    sink: Some(sink),
                    engine: None,
                }))
            })
            .collect();
        let reports = tokio_all(updates.into_iter()).await;
        ring_bytes = reports.iter().map(|report| report.as_ref().unwrap().ring_bytes).max().unwrap();
        // What a worker has taken by the end of its first update.
        if version == 1 {
            for rank in 0..2 {
                let device = provider.open_cuda(FIRST + rank).unwrap();
                workers.push(device.allocate(WORKERS).unwrap());
            }
        }
        for (looked, watch) in looked.iter_mut().zip(watches) {
            looked.updates.push(watch.after().unwrap());
        }
    }
    // A block is a whole number of pages.
    let ring_bytes = ring_bytes.next_multiple_of(2 << 20);
    for looked in looked {
        assert_eq!(
            looked.usage(1, false),
            DeviceUsage {
                ring_bytes,
                ring_measured: true,
                group_bytes: Some(fake::GROUP_BYTES),
                context_bytes: Some(fake::CONTEXT_BYTES),
            },
            "{looked:?}"
        );
        // The other rank may still hold the ring when the update returns.
        let taken = looked.updates[0].before - looked.updates[0].after;
        assert!([0, ring_bytes].contains(&(taken - fake::GROUP_BYTES - WORKERS)), "{looked:?}");
    }
}

/// A worker that takes everything.
struct Holding;

#[async_trait::async_trait]
impl WeightSink for Holding {
    fn endpoint(&self) -> &str {
        "holding"
    }

    async fn open(&mut self, _: &dyn Ring, _: Instant) -> Result<()> {
        Ok(())
    }

    async fn deliver(&mut self, _: &BucketMessage, _: Instant) -> Result<()> {
        Ok(())
    }

    async fn release(&mut self, _: Instant) -> Result<()> {
        Ok(())
    }

    async fn finish(&mut self, _: Instant) -> Result<()> {
        Ok(())
    }

    async fn fail(&mut self, _: &Error, _: Instant) -> Result<Afterwards> {
        Ok(Afterwards::LetGo)
    }
}
