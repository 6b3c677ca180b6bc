//! Control connections and worker links through a relay that drops, delays, doubles, cuts, slows down and corrupts:
//! everything ends in time, and what ends well is right.
#![allow(clippy::unwrap_used, reason = "a test that fails may panic")]

mod sink_support;

use std::{
    collections::HashSet,
    mem::discriminant,
    time::{Duration, Instant},
};

use bytes::Bytes;
use ckpt_core::{
    Error, ErrorKind, Result,
    control::{Hub, HubAddress, HubOptions, Session, SessionConfig, Token},
    deadlines::Deadlines,
    sink::{NativeSink, NativeSinkConfig, WeightSink},
    testkit::{LinkFault, Relay, RelayConfig},
    worker::{ENDPOINT_SCHEME, NativeWorker},
};
use sink_support::*;

const UUID: &str = "HOST-test-0";
/// What a call that waits for a dead link may take, and then everything that follows it.
const PATIENCE: Duration = Duration::from_millis(600);
const ALL: Duration = Duration::from_secs(20);

async fn deliver_all(sink: &mut NativeSink, ring: &FileRing) -> Result<()> {
    let soon = || Instant::now() + PATIENCE;
    sink.open(ring, soon()).await?;
    for (number, tensors) in checkpoint().iter().enumerate() {
        let bucket = message(number as u32, tensors);
        fill(ring, &bucket, tensors);
        sink.deliver(&bucket, soon()).await?;
    }
    sink.release(soon()).await?;
    sink.finish(soon()).await
}

/// One update through a relay. The faults that struck, and whether it ended well.
async fn update(seed: u64) -> (Vec<LinkFault>, bool) {
    let dir = runtime_dir();
    let ring = FileRing::new(dir.path(), "ring", RING_LEN);
    let mut sink = NativeSink::bind(dir.path(), UUID, NativeSinkConfig::default()).unwrap();
    let real = sink.endpoint().strip_prefix(ENDPOINT_SCHEME).unwrap().into();
    let front = dir.path().join("relay.sock");
    let relay = Relay::unix(&front, real, RelayConfig { seed, one_in: 2, corrupts: true }).unwrap();
    let endpoint = format!("{ENDPOINT_SCHEME}{}", front.display());
    let worker = tokio::task::spawn_blocking(move || {
        let mut store = Store::default();
        let ended = NativeWorker::new(UUID).update(&endpoint, &mut store, Instant::now() + 4 * PATIENCE);
        (store, ended)
    });
    let delivered = deliver_all(&mut sink, &ring).await;
    if let Err(cause) = &delivered {
        // Whatever comes of it: it ends.
        let _ = sink.fail(cause, Instant::now() + PATIENCE).await;
    }
    drop(sink);
    let (store, ended) = worker.await.unwrap();
    let struck = relay.struck();
    // A UNIX socket does not turn bits: digests are for that, and there were none.
    let honest =
        !struck.iter().any(|f| matches!(f, LinkFault::Corrupt | LinkFault::Duplicate | LinkFault::Drop));
    if delivered.is_ok() && honest {
        assert_holds_checkpoint(&store);
        assert_eq!(store.post_hooks, 1, "seed {seed}: {struck:?}");
    }
    if ended.is_ok() && honest {
        assert_holds_checkpoint(&store);
    }
    if struck.is_empty() {
        delivered.unwrap();
        ended.unwrap();
        return (struck, true);
    }
    (struck, delivered.is_ok())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_worker_link_ends_in_time_whatever_its_bytes_go_through() {
    let mut running = tokio::task::JoinSet::new();
    for seed in 0..96 {
        running.spawn(async move {
            let ended = tokio::time::timeout(ALL, update(seed)).await;
            ended.unwrap_or_else(|_| panic!("seed {seed} hangs"))
        });
    }
    let ended = running.join_all().await;
    let kinds: HashSet<_> = ended.iter().flat_map(|(struck, _)| struck).map(discriminant).collect();
    assert_eq!(kinds.len(), 7, "the seeds must reach every fault");
    let well = ended.iter().filter(|(_, well)| *well).count();
    println!("{well} of {} updates ended well", ended.len());
    assert!((20..80).contains(&well), "{well}");
}

/// Three ranks whose ways to the hub are relays gather twice. Whether they did.
async fn gather(seed: u64) -> (Vec<LinkFault>, bool) {
    const RANKS: u32 = 3;
    let deadlines = Deadlines {
        join: Duration::from_secs(3),
        heartbeat: Duration::from_millis(100),
        dead_after: PATIENCE,
        ..Deadlines::default()
    };
    let token = Token::new("secret").unwrap();
    let hub = Hub::bind(HubOptions {
        address: HubAddress::new("127.0.0.1", 0),
        job: "job".into(),
        token: token.clone(),
        world_size: RANKS,
        deadlines,
        tls: false,
    });
    let hub = hub.await.unwrap();
    let mut calls = Vec::new();
    let mut relays = Vec::new();
    for rank in 0..RANKS {
        let config = RelayConfig { seed: seed * 8 + u64::from(rank), one_in: 4, corrupts: false };
        let (relay, address) = Relay::tcp(hub.address().unwrap(), config).await.unwrap();
        relays.push(relay);
        let config =
            SessionConfig::new(address.into(), "job", token.clone(), rank, RANKS, deadlines).unwrap();
        calls.push(async move {
            let session = Session::connect(config).await?;
            for round in 0..2 {
                let part = Bytes::from(format!("{rank} {round}"));
                let deadline = Instant::now() + Duration::from_secs(4);
                let parts = session.gather(&format!("round {round}"), part, deadline).await?;
                let expected: Vec<_> = (0..RANKS).map(|r| Bytes::from(format!("{r} {round}"))).collect();
                assert_eq!(parts, expected, "seed {seed}: wrong parts");
            }
            session.close().await;
            Ok::<_, Error>(())
        });
    }
    let results = futures_util::future::join_all(calls).await;
    hub.shutdown().await;
    let struck: Vec<_> = relays.iter().flat_map(Relay::struck).collect();
    for error in results.iter().filter_map(|result| result.as_ref().err()) {
        assert_ne!(error.kind(), ErrorKind::Internal, "seed {seed}, {struck:?}: {error}");
    }
    let well = results.iter().all(Result::is_ok);
    assert!(well || !struck.is_empty(), "seed {seed} failed without a fault: {results:?}");
    (struck, well)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn control_sessions_end_in_time_and_never_gather_wrong_parts() {
    let mut running = tokio::task::JoinSet::new();
    for seed in 0..48 {
        running.spawn(async move {
            let ended = tokio::time::timeout(ALL, gather(seed)).await;
            ended.unwrap_or_else(|_| panic!("seed {seed} hangs"))
        });
    }
    let ended = running.join_all().await;
    let kinds: HashSet<_> = ended.iter().flat_map(|(struck, _)| struck).map(discriminant).collect();
    assert_eq!(kinds.len(), 6, "the seeds must reach every fault");
    let well = ended.iter().filter(|(_, well)| *well).count();
    println!("{well} of {} gathers ended well", ended.len());
    assert!(well > 5, "{well}");
}
