//! Requests that complete with an error.

use std::sync::Arc;

use ckpt_core::{
    Error, ErrorKind, Key,
    transport::{ReadOp, RemoteRegion},
};

use crate::support::{Hosts, PIECE, assert_arrived, blank, soon};

const LOC_PROT_ERR: u32 = 4;
const REM_ACCESS_ERR: u32 = 10;
const RETRY_EXC_ERR: u32 = 12;

/// The error says where it happened.
fn assert_named(hosts: &Hosts, error: &Error, status: u32) {
    println!("{error}");
    assert_eq!(error.get(Key::Peer), Some(hosts.region().peer.as_str()));
    assert_eq!(error.get(Key::Hca), Some(hosts.reader_host.hcas[0].name.as_str()));
    assert_eq!(error.get(Key::Port), Some("1"));
    assert_eq!(error.get(Key::Code), Some(status.to_string().as_str()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_request_is_an_error_and_those_behind_it_are_flushed() {
    let hosts = Hosts::new(1, 6 * PIECE as usize, |config| config.queue_pairs = 1).await;
    let hca = &hosts.reader_host.hcas[0];
    hca.hold(true);
    for status in [LOC_PROT_ERR, REM_ACCESS_ERR] {
        hca.fail(2, status);
        let into = blank(6 * PIECE);
        let memory = Arc::downgrade(into.buffer());
        let event = hosts.start(0, &into, soon());
        hca.wait_for("held", |held| held == 6);
        let (number, _) = hca.held()[0];
        // The third fails.
        hca.release(number, 3);
        let error = event.done(soon()).await.unwrap_err();
        assert_named(&hosts, &error, status);
        assert_eq!((error.kind(), hca.count("held")), (ErrorKind::Backend, 0));
        drop((event, into));
        assert_eq!(memory.strong_count(), 0, "an error says that nothing touches the memory");
    }
    hca.hold(false);
    hosts.read(soon()).await.unwrap();
    hosts.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_on_other_queue_pairs_go_on() {
    let hosts = Hosts::new(1, 2 * PIECE as usize, |config| config.queue_pairs = 2).await;
    hosts.read(soon()).await.unwrap();
    let hca = &hosts.reader_host.hcas[0];
    hca.hold(true);
    hca.fail(0, REM_ACCESS_ERR);
    let (bad, good) = (blank(PIECE), blank(PIECE));
    let failing = hosts.start(0, &bad, soon());
    hca.wait_for("held", |held| held == 1);
    let going = hosts.start(PIECE, &good, soon());
    hca.wait_for("held", |held| held == 2);
    let held = hca.held();
    assert_eq!(held.len(), 2, "on two queue pairs");
    hca.release(held[0].0, 1);
    hca.release(held[1].0, 1);
    let error = failing.done(soon()).await.unwrap_err();
    assert_named(&hosts, &error, REM_ACCESS_ERR);
    going.done(soon()).await.unwrap();
    assert_arrived(&good, PIECE);
    hca.hold(false);
    hosts.read(soon()).await.unwrap();
    hosts.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_one_device_does_not_reach_is_read_over_the_other() {
    let hosts = Hosts::new(2, 8 * PIECE as usize, |_| ()).await;
    hosts.read(soon()).await.unwrap();
    let [first, second] = &hosts.reader_host.hcas[..] else { panic!("two devices") };
    for nth in 0..100 {
        first.fail(nth, RETRY_EXC_ERR);
    }
    let before = second.count("requests");
    hosts.read(soon()).await.unwrap();
    assert_eq!(second.count("requests"), before + 8, "its own half, and the other's");
    // The pair that failed is left out for a while.
    let before = first.count("requests");
    hosts.read(soon()).await.unwrap();
    assert_eq!(first.count("requests"), before);
    hosts.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_no_device_reaches_is_an_error_after_some_tries() {
    let hosts = Hosts::new(1, 3 * PIECE as usize, |config| config.queue_pairs = 1).await;
    let hca = &hosts.reader_host.hcas[0];
    // Once is tried again.
    hca.fail(1, RETRY_EXC_ERR);
    hosts.read(soon()).await.unwrap();
    for nth in 0..100 {
        hca.fail(nth, RETRY_EXC_ERR);
    }
    let error = hosts.read(soon()).await.unwrap_err();
    assert_named(&hosts, &error, RETRY_EXC_ERR);
    assert_eq!(error.kind(), ErrorKind::PeerLost);
    assert!(hca.count("dooms") > 0, "it gives up");
    hca.clear();
    hosts.read(soon()).await.unwrap();
    hosts.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_key_fails_its_own_read_only() {
    let hosts = Hosts::new(1, PIECE as usize, |_| ()).await;
    let mut descriptor = hosts.region().descriptor.to_vec();
    // The keys stand last; this changes a bit of the last one.
    *descriptor.last_mut().unwrap() ^= 1;
    let forged = RemoteRegion { descriptor: descriptor.into(), ..hosts.region() };
    let op = ReadOp { region: Arc::new(forged), offset: 0, into: blank(PIECE) };
    let event = hosts.reader.one_sided().unwrap().post_read(vec![op], soon()).unwrap();
    let (bad, good) = tokio::join!(event.done(soon()), hosts.read(soon()));
    let error = bad.unwrap_err();
    assert_named(&hosts, &error, REM_ACCESS_ERR);
    good.unwrap();
    hosts.read(soon()).await.unwrap();
    drop(event);
    hosts.finish().await;
}
