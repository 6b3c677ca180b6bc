//! Parameter servers that stay while workers come and go.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::{
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::{
    Error, ErrorKind, Key, Result, Version,
    checkpoint::{LoadOptions, Pool, load},
    cluster::{ClusterEnv, Launcher},
    control::{HubAddress, Job as Joined, JobOptions, Token},
    deadlines::Deadlines,
    device::{DeviceBackend, DeviceConfig, host::HostDevice},
    engine::{EngineConfig, create},
    plan::PlanLimits,
    server::{ParameterServer, ServerConfig, UpdateReport, UpdateRequest},
    sink::{Layout, NativeSink, NativeSinkConfig},
    transport::{TransportConfig, TransportProvider, tcp::TcpProvider},
    update::EngineCall,
};
use integration_tests::{Job, LONG, names};
use rustix::process::Signal;
use tokio::task::JoinSet;

const PROGRAM: &str = env!("CARGO_BIN_EXE_ckpt-under-test");
const RANKS: u32 = 4;
const VICTIM: u32 = 2;
const NAME: &str = "model";

struct Rank {
    server: ParameterServer,
    layout: Arc<Layout>,
    job: Joined,
}

/// Joins as rank `rank`; rank 0 is given port 0 and says where it listens.
async fn join(job: &Job, rank: u32, hub: HubAddress) -> Rank {
    let deadlines = Deadlines::default();
    let cluster = ClusterEnv {
        launcher: Launcher::Torchrun,
        rank,
        world_size: RANKS,
        local_rank: rank,
        local_world_size: Some(RANKS),
        hub,
        job: "same-servers".into(),
    };
    let token = Some(Token::new("the job's secret").unwrap());
    let runtime_dir = job.runtime_dir();
    let joined =
        Joined::join(JobOptions { cluster, token, runtime_dir: runtime_dir.clone(), deadlines, tls: false })
            .await
            .unwrap();
    let config = DeviceConfig { rank, local_rank: rank, runtime_dir: runtime_dir.clone() };
    let device: Arc<dyn DeviceBackend> = Arc::new(HostDevice::open(&config).unwrap());
    let transport = TcpProvider.open(&TransportConfig {
        bind: Ipv4Addr::LOCALHOST.into(),
        runtime_dir,
        tls: false,
        secret: joined.session.secret().unwrap().reveal().to_vec(),
        connections: 2,
        device: device.clone(),
    });
    // A ring of a few buckets: the transfer waits for the workers.
    let limits =
        PlanLimits { target_bucket_bytes: 512 << 10, ring_slack_bytes: 2 << 20, ..PlanLimits::default() };
    let mut server = ParameterServer::new(ServerConfig {
        session: joined.session.clone(),
        device: device.clone(),
        transport: transport.unwrap(),
        deadlines,
        limits,
    });
    let share = job.source().split(RANKS).unwrap().swap_remove(rank as usize);
    let registered = load(job.source(), share, &Pool::new(device), &LoadOptions::new(NAME)).unwrap();
    server.register(NAME, registered).unwrap();
    let tensors: Vec<_> = job.source().tensors().iter().map(|t| t.meta.clone()).collect();
    Rank { server, layout: Arc::new(Layout::new(tensors).unwrap()), job: joined }
}

/// One update on every rank, each with its own engine.
async fn update(job: &Job, ranks: &mut Vec<Rank>, version: u64) -> Vec<Result<UpdateReport>> {
    let mut running = JoinSet::new();
    for mut rank in ranks.drain(..) {
        let number = rank.server.rank();
        let uuid = rank.server.device().info().uuid.clone();
        let config = NativeSinkConfig { layout: Some(rank.layout.clone()), ..NativeSinkConfig::default() };
        let sink = NativeSink::bind(&job.runtime_dir(), &uuid, config).unwrap();
        let engine = create(EngineConfig {
            kind: "vllm".into(),
            endpoint: "http://localhost".into(),
            uds: Some(job.socket(number)),
            ca: None,
            template: None,
        });
        let request = UpdateRequest {
            checkpoint: NAME.into(),
            version: Version(version),
            ranks: Vec::new(),
            sink: Some(Box::new(sink)),
            engine: Some(EngineCall { engine: engine.unwrap(), ranks: vec![number] }),
        };
        running.spawn(async move {
            let report = rank.server.update(request).await;
            (rank, report)
        });
    }
    let mut ended = running.join_all().await;
    ended.sort_by_key(|(rank, _)| rank.server.rank());
    let (back, reports): (Vec<_>, Vec<_>) = ended.into_iter().unzip();
    *ranks = back;
    reports
}

/// Every rank learns what all hold.
async fn gather(ranks: &mut Vec<Rank>) {
    let mut running = JoinSet::new();
    for mut rank in ranks.drain(..) {
        running.spawn(async move {
            rank.server.gather_metas(NAME).await.unwrap();
            rank
        });
    }
    *ranks = running.join_all().await;
    ranks.sort_by_key(|rank| rank.server.rank());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_servers_update_again_after_a_worker_was_killed() {
    let job = Job::new(PROGRAM, RANKS, 12);
    let first = join(&job, 0, HubAddress::new("127.0.0.1", 0)).await;
    let hub = first.job.hub().unwrap().address().unwrap();
    let mut ranks = vec![first];
    for rank in 1..RANKS {
        ranks.push(join(&job, rank, hub.into()).await);
    }
    gather(&mut ranks).await;
    let mut workers = job.workers(&[]).await;
    for report in update(&job, &mut ranks, 1).await {
        let report = report.unwrap();
        assert!(report.buckets > 10, "{report:?}");
    }
    for rank in 0..RANKS {
        job.assert_holds(rank).await;
    }

    // The victim is slow enough to be hit in the middle.
    workers[VICTIM as usize].signal(Signal::KILL);
    workers[VICTIM as usize] = job.worker(VICTIM, &["--slow-ms", "300"]).await;
    let killer = async {
        job.in_the_middle(VICTIM).await;
        workers[VICTIM as usize].signal(Signal::KILL);
        Instant::now()
    };
    let (reports, killed) = tokio::join!(update(&job, &mut ranks, 2), killer);
    assert!(killed.elapsed() < Duration::from_secs(10), "{:?}", killed.elapsed());
    for error in reports.into_iter().map(|r| r.map(|_| ()).unwrap_err()) {
        let error: Error = error;
        assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
        assert_eq!(error.get(Key::Rank), Some("2"), "{error}");
        assert!(names(&error.to_string(), VICTIM), "{error}");
    }

    workers[VICTIM as usize] = job.worker(VICTIM, &[]).await;
    for report in update(&job, &mut ranks, 3).await {
        report.unwrap();
    }
    for rank in 0..RANKS {
        job.assert_holds(rank).await;
    }
    // Rank 0 last: its hub ends the job.
    for rank in ranks.into_iter().rev() {
        tokio::time::timeout(LONG, rank.job.leave()).await.unwrap();
    }
}
