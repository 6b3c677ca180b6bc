//! How many requests fly, which of them are signalled, and completions in any order.

use ckpt_core::{
    device::{Event, host::HostBuffer},
    testkit::Random,
};
use integration_tests::verbs::{Hca, Host, Link, PORT_ACTIVE, PORT_ERR};

use crate::support::{Hosts, PIECE, assert_arrived, blank, bytes, soon};

const DEPTH: u32 = 8;

/// Releases `count` requests of the `nth` queue pair that has some; whether there was one.
fn release(hca: &Hca, nth: u64, count: usize) -> bool {
    let held = hca.held();
    let Some((number, _)) = held.get(nth as usize % held.len().max(1)) else { return false };
    hca.release(*number, count);
    true
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_pair_has_at_most_its_depth_in_flight_and_a_quarter_is_signalled() {
    let pieces = 50;
    let hosts = Hosts::new(1, (pieces * PIECE) as usize, |config| {
        (config.depth, config.queue_pairs) = (DEPTH, 1);
    })
    .await;
    let hca = &hosts.reader_host.hcas[0];
    hca.hold(true);
    let into = blank(pieces * PIECE);
    let event = hosts.start(0, &into, soon());
    hca.wait_for("held", |held| held == u64::from(DEPTH));
    assert_eq!(hca.count("signalled"), 4, "every second one of 8");
    // One retires nothing, as it is unsignalled: nothing takes its slot.
    assert!(release(hca, 0, 1));
    assert_eq!(hca.count("requests"), u64::from(DEPTH));
    // The second retires both.
    assert!(release(hca, 0, 1));
    hca.wait_for("requests", |requests| requests == u64::from(DEPTH) + 2);
    assert!(!event.is_complete().unwrap());
    hca.hold(false);
    event.done(soon()).await.unwrap();
    assert_arrived(&into, 0);
    assert_eq!((hca.count("requests"), hca.count("most")), (pieces, u64::from(DEPTH)));
    assert_eq!(hca.count("signalled"), pieces / 2);
    hosts.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_request_is_signalled_whatever_its_place() {
    let hosts = Hosts::new(1, (7 * PIECE) as usize, |config| {
        (config.depth, config.queue_pairs) = (64, 1);
    })
    .await;
    for pieces in [1, 3, 7] {
        let hca = &hosts.reader_host.hcas[0];
        let before = hca.count("signalled");
        let into = blank(pieces * PIECE);
        hca.hold(true);
        let event = hosts.start(0, &into, soon());
        hca.wait_for("held", |held| held == pieces);
        let signalled = hca.count("signalled") - before;
        // While they are handed over, each may be the last so far.
        assert!((1..=pieces).contains(&signalled), "{signalled} of {pieces}");
        hca.hold(false);
        event.done(soon()).await.unwrap();
        assert_arrived(&into, 0);
    }
    hosts.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_queue_has_room_for_all_that_can_be_flushed() {
    let hosts = [Host::new(Link::Ethernet, 1), Host::new(Link::Ethernet, 1)];
    // Fewer than two queue pairs' depth.
    hosts[1].hcas[0].set("max_cqe", 100);
    let memory = HostBuffer::from_bytes(&bytes(1 << 16)).unwrap();
    let hosts = Hosts::on(hosts, memory, |config| (config.depth, config.queue_pairs) = (64, 2)).await;
    let hca = &hosts.reader_host.hcas[0];
    hca.hold(true);
    let (into, read) = hosts.start_pieces(300, soon());
    hca.wait_for("held", |_| hca.held().len() == 2);
    // All that was posted is flushed before one completion is polled.
    hca.set("mute", 1);
    hca.event(PORT_ERR);
    hca.wait_for("ended", |pairs| pairs == 2);
    assert_eq!(hca.count("held"), 0);
    hca.hold(false);
    hca.event(PORT_ACTIVE);
    hca.set("mute", 0);
    read.done(soon()).await.unwrap();
    assert_arrived(&into, 0);
    hosts.finish().await;
}

/// Reads of several sizes at once, over four queue pairs on each of two devices; completions come as `random` says.
async fn in_any_order(hosts: &Hosts, random: &mut Random) {
    let hcas = &hosts.reader_host.hcas;
    let total = hosts.memory.len_bytes();
    hcas.iter().for_each(|hca| hca.hold(true));
    let mut reads: Vec<(u64, ckpt_core::device::BufferSlice, Event)> = Vec::new();
    for _ in 0..1 + random.below(5) {
        let len = match random.below(3) {
            0 => 1 + random.below(100),
            1 => PIECE,
            _ => 1 + random.below(6 * PIECE),
        };
        let (offset, into) = (random.below(total - len + 1), blank(len));
        let event = hosts.start(offset, &into, soon());
        reads.push((offset, into, event));
    }
    // As whoever connects would post in its own time, all are asked for first.
    let steps = 4 + random.below(30);
    for _ in 0..steps {
        let hca = &hcas[random.below(hcas.len() as u64) as usize];
        release(hca, random.draw() >> 8, 1 + random.below(4) as usize);
        for (offset, into, event) in &reads {
            if event.is_complete().unwrap() {
                assert_arrived(into, *offset);
            }
        }
        tokio::task::yield_now().await;
    }
    // The rest, one device after the other.
    for hca in hcas {
        hca.hold(false);
    }
    for (offset, into, event) in reads {
        event.done(soon()).await.unwrap();
        assert_arrived(&into, offset);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn completions_may_come_in_any_order() {
    let hosts = Hosts::new(2, (8 * PIECE) as usize, |config| {
        (config.depth, config.queue_pairs) = (4, 4);
    })
    .await;
    hosts.read(soon()).await.unwrap();
    for seed in 0..40 {
        println!("seed {seed}");
        in_any_order(&hosts, &mut Random::new(seed)).await;
    }
    for hca in &hosts.reader_host.hcas {
        assert!(hca.count("most") <= 4);
    }
    hosts.finish().await;
}
