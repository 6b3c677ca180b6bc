//! Requests that do not complete, and callers who do not wait for them.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::{ErrorKind, Key};

use crate::support::{Hosts, PIECE, assert_arrived, blank, freed, soon};

const SHORT: Duration = Duration::from_millis(300);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_never_completes_is_an_error_by_the_deadline() {
    // Of one piece, which is posted at once over a connection that is there, and of several.
    for (len, connected) in [(100, false), (100, true), (3 * PIECE, false), (3 * PIECE, true)] {
        let hosts = Hosts::new(1, 3 * PIECE as usize, |_| ()).await;
        let hca = &hosts.reader_host.hcas[0];
        if connected {
            hosts.read(soon()).await.unwrap();
        }
        hca.lose(0);
        let into = blank(len);
        let memory = Arc::downgrade(into.buffer());
        let began = Instant::now();
        let event = hosts.start(0, &into, began + SHORT);
        drop(into);
        hca.wait_for("held", |held| held > 0);
        assert!(memory.strong_count() > 0, "a device may still write there");
        let error = event.done(soon()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
        assert_eq!(error.get(Key::Peer), Some(hosts.region().peer.as_str()));
        assert_eq!(error.get(Key::Hca), Some(hca.name.as_str()), "{error}");
        assert!(began.elapsed() >= SHORT, "{:?}", began.elapsed());
        assert_eq!(hca.count("held"), 0, "the queue pair was ended first");
        drop(event);
        freed(&memory).await;
        hosts.read(soon()).await.unwrap();
        hosts.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_stays_with_a_device_that_does_not_let_go_of_it() {
    let hosts = Hosts::new(1, PIECE as usize, |_| ()).await;
    let hca = &hosts.reader_host.hcas[0];
    hca.set("deaf", 1);
    hca.lose(0);
    let into = blank(PIECE);
    let memory = Arc::downgrade(into.buffer());
    let event = hosts.start(0, &into, Instant::now() + SHORT);
    drop(into);
    let error = event.done(soon()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    drop(event);
    // Over new queue pairs.
    hosts.read(soon()).await.unwrap();
    assert_eq!(hca.count("held"), 1);
    assert!(memory.strong_count() > 0, "the device still has it");
    hca.set("deaf", 0);
    freed(&memory).await;
    hosts.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_a_device_never_lets_go_of_is_kept_for_ever() {
    let hosts = Hosts::new(1, PIECE as usize, |config| config.queue_pairs = 1).await;
    let Hosts { owner_host, reader_host, owner, reader, registration, .. } = hosts;
    let hca = &reader_host.hcas[0];
    hca.set("deaf", 1);
    hca.lose(0);
    let into = blank(PIECE);
    let memory = Arc::downgrade(into.buffer());
    let region = Arc::new(registration.region().clone());
    let op = ckpt_core::transport::ReadOp { region, offset: 0, into };
    // Until then a task holds the connection.
    let deadline = Instant::now() + SHORT;
    let event = reader.one_sided().unwrap().post_read(vec![op], deadline).unwrap();
    hca.wait_for("held", |held| held > 0);
    drop((event, reader, registration, owner));
    // The queue pair goes, and with it the request. Memory and registration stay, as nobody can tell when they are unused.
    hca.wait_for("qps", |left| left == 0);
    assert!(memory.strong_count() > 0);
    assert_eq!((hca.count("mrs"), hca.count("misuse")), (1, 0));
    tokio::task::spawn_blocking(move || owner_host.assert_clean()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_event_leaves_the_memory_to_the_device() {
    for (len, connected) in [(100, false), (100, true), (3 * PIECE, false), (3 * PIECE, true)] {
        let hosts = Hosts::new(1, 3 * PIECE as usize, |_| ()).await;
        let hca = &hosts.reader_host.hcas[0];
        if connected {
            hosts.read(soon()).await.unwrap();
        }
        hca.hold(true);
        let into = blank(len);
        let memory = Arc::downgrade(into.buffer());
        let event = hosts.start(0, &into, soon());
        drop((event, into));
        // A batch that was handed to a task goes on, too.
        hca.wait_for("held", |held| held == len.div_ceil(PIECE));
        assert!(memory.strong_count() > 0);
        hca.hold(false);
        freed(&memory).await;
        hosts.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_stops_to_wait_may_wait_again_or_leave() {
    for len in [100, 3 * PIECE] {
        let hosts = Hosts::new(1, 3 * PIECE as usize, |_| ()).await;
        hosts.read(soon()).await.unwrap();
        let hca = &hosts.reader_host.hcas[0];
        hca.hold(true);
        let (into, other) = (blank(len), blank(len));
        let memory = Arc::downgrade(other.buffer());
        let (event, left) = (hosts.start(0, &into, soon()), hosts.start(0, &other, soon()));
        drop(other);
        for event in [&event, &left] {
            // Dropped while it waits.
            tokio::time::timeout(Duration::from_millis(20), event.done(soon())).await.unwrap_err();
        }
        // Waited for in vain, with a deadline of the waiter's own.
        let error = event.done(Instant::now() + Duration::from_millis(20)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        drop(left);
        assert!(memory.strong_count() > 0 && !event.is_complete().unwrap());
        hca.hold(false);
        event.done(soon()).await.unwrap();
        assert_arrived(&into, 0);
        freed(&memory).await;
        drop(event);
        hosts.finish().await;
    }
}
