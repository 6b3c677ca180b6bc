//! Calls of the verbs library that fail.

use ckpt_core::{Error, ErrorKind, Key, device::host::HostBuffer};
use integration_tests::verbs::{Hca, Host, Link};

use crate::support::{Hosts, PIECE, assert_arrived, blank, config, host_device, open_on, soon};

const EINVAL: i32 = 22;
const ENOMEM: i32 = 12;
const EMFILE: i32 = 24;

/// A read of an unconnected reader, of which a call is refused; the next is not.
async fn refused(owner: bool, function: &str, errno: i32) -> Error {
    let hosts = Hosts::new(1, 3 * PIECE as usize, |config| config.queue_pairs = 2).await;
    let host = if owner { &hosts.owner_host } else { &hosts.reader_host };
    let hca = &host.hcas[0];
    hca.refuse(function, errno, 0);
    let error = hosts.read(soon()).await.unwrap_err();
    println!("{function}: {error}");
    assert_eq!(hca.count("refusals"), 0, "{function} was never called");
    assert_eq!(error.get(Key::Peer), Some(hosts.region().peer.as_str()), "{error}");
    hosts.read(soon()).await.unwrap();
    hosts.finish().await;
    error
}

fn whole_text(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_pair_that_the_reader_cannot_make_is_an_error_that_names_the_call() {
    for (function, errno, told) in [
        ("create_qp", ENOMEM, "ibv_create_qp"),
        ("modify_qp to INIT", EINVAL, "ibv_modify_qp to INIT"),
        ("modify_qp to RTR", EINVAL, "ibv_modify_qp to RTR"),
        ("modify_qp to RTS", EINVAL, "ibv_modify_qp to RTS"),
    ] {
        let error = refused(false, function, errno).await;
        assert!(whole_text(&error).contains(told), "{}", whole_text(&error));
        assert!(error.get(Key::Hca).is_some_and(|hca| hca.starts_with("emulated")), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_pair_that_the_owner_cannot_make_is_an_error_that_names_the_call() {
    for (function, errno, told) in [
        ("create_qp", ENOMEM, "ibv_create_qp"),
        ("modify_qp to INIT", EINVAL, "ibv_modify_qp to INIT"),
        ("modify_qp to RTR", EINVAL, "ibv_modify_qp to RTR"),
    ] {
        let error = refused(true, function, errno).await;
        assert!(whole_text(&error).contains(told), "{}", whole_text(&error));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_of_devices_that_cannot_be_connected_is_left_out() {
    let hosts = Hosts::new(2, 4 * PIECE as usize, |_| ()).await;
    hosts.reader_host.hcas[0].refuse("modify_qp to RTR", 110, 0);
    hosts.read(soon()).await.unwrap();
    let requests = |at: usize| hosts.reader_host.hcas[at].count("requests");
    assert_eq!((requests(0), requests(1)), (0, 4));
    hosts.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_is_not_taken_is_an_error_and_those_before_it_end() {
    for nth in [0, 2, 5] {
        let hosts = Hosts::new(1, 6 * PIECE as usize, |config| config.queue_pairs = 1).await;
        let hca = &hosts.reader_host.hcas[0];
        hca.hold(true);
        hca.refuse("post_send", ENOMEM, nth);
        let into = blank(6 * PIECE);
        let memory = std::sync::Arc::downgrade(into.buffer());
        let event = hosts.start(0, &into, soon());
        let error = event.done(soon()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
        assert_eq!(error.get(Key::Code), Some("12"));
        assert_eq!(error.get(Key::Hca), Some(hca.name.as_str()));
        assert!(whole_text(&error).contains("ibv_post_send"), "{}", whole_text(&error));
        drop((event, into));
        assert_eq!((memory.strong_count(), hca.count("held")), (0, 0));
        hca.hold(false);
        hosts.read(soon()).await.unwrap();
        hosts.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_flies_before_a_request_that_is_not_taken_has_not_arrived_yet() {
    let hosts = Hosts::new(1, 2 * PIECE as usize, |config| config.queue_pairs = 1).await;
    hosts.read(soon()).await.unwrap();
    let hca = &hosts.reader_host.hcas[0];
    hca.hold(true);
    let (into, other) = (blank(PIECE), blank(PIECE));
    let flying = hosts.start(0, &into, soon());
    hca.wait_for("held", |held| held == 1);
    hca.refuse("post_send", ENOMEM, 0);
    let error = hosts.start(PIECE, &other, soon()).done(soon()).await.unwrap_err();
    assert_eq!(error.get(Key::Code), Some("12"), "{error}");
    // It was flushed, and is tried again.
    hca.hold(false);
    flying.done(soon()).await.unwrap();
    assert_arrived(&into, 0);
    drop(flying);
    hosts.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_arrived_untold_before_a_request_that_is_not_taken_is_told() {
    for (nth, again) in [(1, 0), (2, 0), (5, 0), (2, 1), (5, 3)] {
        let hosts = Hosts::new(1, 6 * PIECE as usize, |config| config.queue_pairs = 1).await;
        // Those before it have run and were not signalled, so that no completion of theirs comes.
        let hca = &hosts.reader_host.hcas[0];
        hca.refuse("post_send", ENOMEM, nth);
        for _ in 0..again {
            hca.refuse("post_send", ENOMEM, 0);
        }
        let error = hosts.read(soon()).await.unwrap_err();
        assert_eq!(error.get(Key::Code), Some("12"), "{error}");
        hosts.read(soon()).await.unwrap();
        hosts.finish().await;
    }
}

fn assert_tells_the_limit(error: &Error, hca: &Hca) {
    println!("{error}");
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
    assert_eq!(error.get(Key::Hca), Some(hca.name.as_str()));
    assert!(error.to_string().contains("ulimit -l"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_cannot_be_pinned_names_the_limit() {
    let hosts = Hosts::new(2, PIECE as usize, |_| ()).await;
    // With the second device, so that the first's registration must go.
    let hca = &hosts.reader_host.hcas[1];
    hca.refuse("reg_mr", ENOMEM, 0);
    assert_tells_the_limit(&hosts.read(soon()).await.unwrap_err(), hca);
    assert_eq!(hosts.reader_host.hcas[0].count("mrs"), 0);
    hosts.read(soon()).await.unwrap();
    let hca = &hosts.owner_host.hcas[1];
    hca.refuse("reg_mr", ENOMEM, 0);
    let memory = HostBuffer::allocate(4096).unwrap();
    let owner = hosts.owner.one_sided().unwrap();
    assert_tells_the_limit(&owner.register(memory.clone()).await.unwrap_err(), hca);
    assert_eq!(hosts.owner_host.hcas[0].count("mrs"), 1);
    drop(owner.register(memory).await.unwrap());
    hosts.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_cannot_be_opened_is_an_error_or_left_out() {
    for (function, errno) in [
        ("open_device", EMFILE),
        ("query_device", EINVAL),
        ("query_port", EINVAL),
        ("alloc_pd", ENOMEM),
        ("create_comp_channel", EMFILE),
        ("create_cq", ENOMEM),
    ] {
        let host = Host::new(Link::Ethernet, 1);
        let open = |host: &Host| open_on(config(host), host_device(host, 0).unwrap());
        host.hcas[0].refuse(function, errno, 0);
        let error = open(&host).unwrap_err();
        println!("{function}: {error}");
        assert_eq!(error.get(Key::Hca), Some(host.hcas[0].name.as_str()), "{function}: {error}");
        assert!(whole_text(&error).contains(&format!("ibv_{function}")), "{error}");
        host.assert_clean();
        let two = Host::new(Link::Ethernet, 2);
        two.hcas[0].refuse(function, errno, 0);
        drop((open(&host).unwrap(), open(&two).unwrap()));
        tokio::task::spawn_blocking(move || {
            host.assert_clean();
            two.assert_clean();
        })
        .await
        .unwrap();
    }
}
