//! Ports that go down and come up.

use std::time::{Duration, Instant};

use ckpt_core::{ErrorKind, Key};
use integration_tests::verbs::{DEVICE_FATAL, PORT_ACTIVE, PORT_ERR};

use crate::support::{Hosts, PIECE, assert_arrived, blank, soon};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pieces_on_a_port_that_goes_down_move_to_another() {
    for event in [PORT_ERR, DEVICE_FATAL] {
        let hosts = Hosts::new(2, 8 * PIECE as usize, |_| ()).await;
        let [first, second] = &hosts.reader_host.hcas[..] else { panic!("two devices") };
        first.hold(true);
        second.hold(true);
        let into = blank(8 * PIECE);
        let read = hosts.start(0, &into, soon());
        for hca in [first, second] {
            hca.wait_for("held", |held| held == 4);
        }
        first.event(event);
        // The loss is noticed while the other half still flies.
        first.wait_for("held", |held| held == 0);
        second.hold(false);
        read.done(soon()).await.unwrap();
        assert_arrived(&into, 0);
        assert_eq!(second.count("requests"), 8);
        let before = first.count("requests");
        hosts.read(soon()).await.unwrap();
        assert_eq!(first.count("requests"), before, "it is still down");
        first.hold(false);
        hosts.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pieces_that_were_carried_out_before_the_port_went_down_are_told() {
    // Neither 5 nor 7 is a whole number of its quarters; those of 64 are shifted by pieces that fly already.
    for (depth, before) in [(5, 0), (7, 0), (64, 4)] {
        let hosts = Hosts::new(2, 1 << 16, |config| {
            (config.depth, config.queue_pairs) = (depth, 1);
        })
        .await;
        hosts.read(soon()).await.unwrap();
        let [first, second] = &hosts.reader_host.hcas[..] else { panic!("two devices") };
        first.hold(true);
        second.hold(true);
        let deadline = Instant::now() + Duration::from_secs(10);
        let earlier = hosts.start_pieces(before, deadline);
        let (into, read) = hosts.start_pieces(300, deadline);
        for hca in [first, second] {
            hca.wait_for("held", |held| held == u64::from(depth));
        }
        // All have run when the queue pair ends, so that none is flushed, and their completions come late.
        first.set("mute", 1);
        first.hold(false);
        first.event(PORT_ERR);
        first.wait_for("ended", |pairs| pairs == 1);
        second.hold(false);
        first.set("mute", 0);
        for (into, read) in [(into, read), earlier] {
            read.done(soon()).await.unwrap();
            assert_arrived(&into, 0);
        }
        hosts.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_owners_port_may_be_the_one_that_is_down() {
    let hosts = Hosts::new(2, 8 * PIECE as usize, |_| ()).await;
    hosts.read(soon()).await.unwrap();
    hosts.owner_host.hcas[0].event(PORT_ERR);
    hosts.read(soon()).await.unwrap();
    let second = &hosts.reader_host.hcas[1];
    let before = second.count("requests");
    hosts.read(soon()).await.unwrap();
    assert_eq!(second.count("requests"), before + 8);
    hosts.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_another_port_it_is_an_error_until_the_port_is_up_again() {
    let hosts = Hosts::new(1, 4 * PIECE as usize, |_| ()).await;
    let hca = &hosts.reader_host.hcas[0];
    hca.hold(true);
    let into = blank(4 * PIECE);
    let read = hosts.start(0, &into, soon());
    hca.wait_for("held", |held| held == 4);
    hca.event(PORT_ERR);
    // What is posted anew is not answered.
    hca.hold(false);
    let error = read.done(soon()).await.unwrap_err();
    println!("{error}");
    assert_eq!(error.kind(), ErrorKind::PeerLost);
    assert_eq!(error.get(Key::Hca), Some(hca.name.as_str()));
    assert_eq!(error.get(Key::Peer), Some(hosts.region().peer.as_str()));
    // The same where retries take longer than there is time.
    hca.hold(true);
    let began = Instant::now();
    let error = hosts.read(began + Duration::from_millis(200)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert!(began.elapsed() < Duration::from_secs(30));
    hca.hold(false);
    hca.event(PORT_ACTIVE);
    hosts.read(soon()).await.unwrap();
    drop(read);
    hosts.finish().await;
}
