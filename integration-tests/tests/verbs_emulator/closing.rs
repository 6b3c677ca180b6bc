//! Transports that are closed while requests fly.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::{
    ErrorKind, Key,
    device::{BufferSlice, host::HostBuffer},
    transport::WriteOp,
};

use crate::support::{Hosts, PIECE, assert_clean, blank, bytes, freed, soon};

/// Much less than a deadline.
const PROMPT: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_that_leaves_ends_the_reads_that_fly() {
    for len in [100, 6 * PIECE] {
        let hosts = Hosts::new(2, 6 * PIECE as usize, |_| ()).await;
        hosts.read(soon()).await.unwrap();
        let peer = hosts.region().peer;
        hosts.reader_host.hcas.iter().for_each(|hca| hca.hold(true));
        let into = blank(len);
        let memory = Arc::downgrade(into.buffer());
        let event = hosts.start(0, &into, soon());
        drop(into);
        let Hosts { owner_host, reader_host, owner, reader, memory: lent, registration } = hosts;
        let began = Instant::now();
        drop((registration, owner, lent));
        let error = event.done(soon()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
        assert_eq!(error.get(Key::Peer), Some(peer.as_str()));
        assert!(began.elapsed() < PROMPT, "{:?}", began.elapsed());
        drop(event);
        freed(&memory).await;
        drop(reader);
        assert_clean([owner_host, reader_host]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_is_closed_ends_its_reads() {
    for len in [100, 6 * PIECE] {
        let hosts = Hosts::new(2, 6 * PIECE as usize, |_| ()).await;
        hosts.read(soon()).await.unwrap();
        hosts.reader_host.hcas.iter().for_each(|hca| hca.hold(true));
        let into = blank(len);
        let memory = Arc::downgrade(into.buffer());
        let event = hosts.start(0, &into, soon());
        drop(into);
        let Hosts { owner_host, reader_host, owner, reader, memory: lent, registration } = hosts;
        let began = Instant::now();
        drop(reader);
        let error = event.done(soon()).await.unwrap_err();
        println!("{error}");
        assert!(began.elapsed() < PROMPT, "{:?}", began.elapsed());
        drop(event);
        freed(&memory).await;
        drop((registration, owner, lent));
        assert_clean([owner_host, reader_host]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_is_released_while_it_is_read_is_not_read_later() {
    let hosts = Hosts::new(1, 3 * PIECE as usize, |config| config.queue_pairs = 1).await;
    hosts.read(soon()).await.unwrap();
    let hca = &hosts.reader_host.hcas[0];
    hca.hold(true);
    let into = blank(3 * PIECE);
    let event = hosts.start(0, &into, soon());
    hca.wait_for("held", |held| held == 3);
    // The first piece arrives, the others come too late.
    hca.release(hca.held()[0].0, 1);
    let Hosts { owner_host, reader_host, owner, reader, memory, registration } = hosts;
    let lent = Arc::downgrade(&memory);
    drop((registration, memory));
    assert_eq!(lent.strong_count(), 0, "nothing holds released memory");
    reader_host.hcas[0].hold(false);
    let error = event.done(soon()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Aborted, "{error}");
    drop((event, reader, owner));
    assert_clean([owner_host, reader_host]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_owns_its_source_and_ends_when_the_owner_has_the_bytes() {
    let hosts = Hosts::new(2, 8 * PIECE as usize, |config| config.queue_pairs = 2).await;
    hosts.read(soon()).await.unwrap();
    hosts.reader_host.hcas.iter().for_each(|hca| hca.hold(true));
    let written: Vec<u8> = bytes(8 * PIECE as usize).into_iter().rev().collect();
    let from = BufferSlice::whole(HostBuffer::from_bytes(&written).unwrap());
    let source = Arc::downgrade(from.buffer());
    let op = WriteOp { region: Arc::new(hosts.region()), offset: 0, from };
    let event = hosts.reader.one_sided().unwrap().post_write(vec![op], soon()).unwrap();
    for hca in &hosts.reader_host.hcas {
        hca.wait_for("held", |held| held == 4);
    }
    assert!(source.strong_count() > 0);
    let [first, second] = &hosts.reader_host.hcas[..] else { panic!("two devices") };
    first.hold(false);
    assert!(!event.is_complete().unwrap());
    second.hold(false);
    event.done(soon()).await.unwrap();
    let there = BufferSlice::whole(hosts.memory.clone());
    // SAFETY: the write is done, and nobody else writes.
    assert!(unsafe { there.as_slice() }.unwrap() == written, "other bytes are there");
    drop((event, there));
    freed(&source).await;
    hosts.finish().await;
}
