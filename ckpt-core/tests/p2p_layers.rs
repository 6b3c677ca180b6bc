//! P2P updates over slow and faulty links.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod p2p_support;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::{
    ErrorKind,
    layer::{Chaos, ChaosConfig, Throttle, ThrottleConfig},
    metas::Metas,
    transport::Transport,
};
use p2p_support::{Job, Shape, checkpoint};

const MIB: u64 = 1 << 20;

/// 200 MB/s, 0.3 ms, and every fourth operation late by up to 10 ms more.
fn slow(inner: Arc<dyn Transport>) -> Arc<dyn Transport> {
    let link = ThrottleConfig { bytes_per_sec: 200_000_000, latency: Duration::from_micros(300) };
    let late = ChaosConfig {
        seed: 11,
        delay_ppm: 250_000,
        delay: Duration::from_millis(10),
        ..ChaosConfig::default()
    };
    Chaos::wrap(Throttle::wrap(inner, link), late)
}

/// The third operation of each rank and all later ones break the link.
fn breaking(inner: Arc<dyn Transport>) -> Arc<dyn Transport> {
    Chaos::wrap(inner, ChaosConfig { cut_ppm: 1_000_000, spare: 2, ..ChaosConfig::default() })
}

#[tokio::test(flavor = "multi_thread")]
async fn four_of_eight_ranks_pull_over_slow_links_and_the_others_are_not_asked() {
    let source = checkpoint(6 * MIB, 31);
    let mut job = Job::start(Shape { wrap: slow, ..Shape::new(8) }).await;
    job.register(&source, 8);
    job.gather().await;
    let reports = job.update(1, &[4, 5, 6, 7], &[4, 5, 6, 7], &source).await;
    assert!(reports.iter().all(|report| report.p2p));
    // A broadcast to all over the same links leaves the same bytes.
    job.update(2, &(0..8).collect::<Vec<_>>(), &[], &source).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_breaks_ends_every_member_soon_and_the_next_join_works() {
    let source = checkpoint(6 * MIB, 32);
    let mut sender = Job::start(Shape { wrap: slow, ..Shape::new(2) }).await;
    sender.register(&source, 2);
    sender.gather().await;
    let metas = sender.servers[0].metas().unwrap().to_json().unwrap();
    let metas = Metas::from_json(metas.as_bytes()).unwrap();

    let mut unlucky = Job::start(Shape { wrap: breaking, ..Shape::new(2) }).await;
    for server in &mut unlucky.servers {
        server.load_metas(metas.clone()).unwrap();
    }
    let began = Instant::now();
    for outcome in unlucky.try_update(1, &[0, 1], &[], &source).await {
        let error = outcome.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::PeerLost | ErrorKind::Aborted), "{error}");
        assert!(error.to_string().contains("the link broke"), "{error}");
    }
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());

    let mut next = Job::start(Shape { wrap: slow, ..Shape::new(2) }).await;
    for server in &mut next.servers {
        server.load_metas(metas.clone()).unwrap();
    }
    next.update(1, &[0, 1], &[], &source).await;
}
