//! Another job joins: it has the owners' metas from a file, pulls from their memory, and updates its own workers.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod p2p_support;

use std::time::{Duration, Instant};

use ckpt_core::{ErrorKind, Key, Version, metas::Metas, server::UpdateRequest, sink::stream};
use futures_util::future::join_all;
use p2p_support::{Job, NAME, Shape, checkpoint, take};

const MIB: u64 = 1 << 20;

/// What `--save-metas-file` writes.
fn saved(job: &Job) -> Vec<u8> {
    job.servers[0].metas().unwrap().to_json().unwrap().into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_job_joins_from_a_metas_file() {
    let source = checkpoint(4 * MIB, 21);
    let mut sender = Job::start(Shape::new(3)).await;
    sender.register(&source, 3);
    sender.gather().await;
    let file = saved(&sender);

    let mut joining = Job::start(Shape::new(2)).await;
    for server in &mut joining.servers {
        server.load_metas(Metas::from_json(&file).unwrap()).unwrap();
    }
    // Empty ranks: all of the job, pulling, since the owners are others.
    let reports = joining.update(1, &[0, 1], &[], &source).await;
    assert!(reports.iter().all(|r| r.p2p));
    joining.update(2, &[1], &[1], &source).await;

    // One rank has the file, the others get it from there.
    let mut third = Job::start(Shape::new(4)).await;
    let metas = Metas::from_json(&file).unwrap();
    let shares = third.servers.iter_mut().map(|s| {
        let brings = (s.rank() == 1).then_some(&metas);
        async move { s.share_metas(brings).await }
    });
    for shared in join_all(shares).await {
        assert_eq!(*shared.unwrap(), metas);
    }
    let reports = third.update(1, &[0, 1, 2, 3], &[], &source).await;
    let pulled: Vec<bool> = reports.iter().map(|r| r.rooted_bytes > 0).collect();
    assert_eq!(pulled, [true, true, true, false], "as many hosts pull as own");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_with_another_secret_reads_nothing() {
    let source = checkpoint(MIB, 22);
    let mut sender = Job::start(Shape::new(1)).await;
    sender.register(&source, 1);
    sender.gather().await;
    let mut stranger = Job::start(Shape { secret: "another secret", ..Shape::new(1) }).await;
    stranger.servers[0].load_metas(Metas::from_json(&saved(&sender)).unwrap()).unwrap();
    let error = stranger.try_update(1, &[0], &[], &source).await.remove(0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid, "{error}");
    assert!(error.to_string().contains("same token"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_that_ends_in_the_middle_is_named_at_once_and_the_next_join_works() {
    let source = checkpoint(8 * MIB, 23);
    let mut sender = Job::start(Shape::new(2)).await;
    sender.register(&source, 2);
    sender.gather().await;
    let mut joining = Job::start(Shape { own_hosts: false, ..Shape::new(2) }).await;
    let metas = Metas::from_json(&saved(&sender)).unwrap();
    for server in &mut joining.servers {
        server.load_metas(metas.clone()).unwrap();
    }

    // The workers stop after the first bucket until the owners are gone: most bytes are not pulled yet.
    let (in_the_middle, mut reached) = tokio::sync::mpsc::channel(2);
    let (gone, _) = tokio::sync::broadcast::channel::<()>(1);
    let calls = joining.servers.iter_mut().map(|server| {
        let (sink, mut stream) = stream("worker");
        let (in_the_middle, mut gone) = (in_the_middle.clone(), gone.subscribe());
        tokio::spawn(async move {
            let first = stream.next_bucket().await.unwrap().unwrap();
            in_the_middle.send(()).await.unwrap();
            gone.recv().await.unwrap();
            drop(first);
            take(stream).await
        });
        let request = UpdateRequest {
            checkpoint: NAME.into(),
            version: Version(1),
            ranks: Vec::new(),
            sink: Some(Box::new(sink)),
            engine: None,
        };
        server.update(request)
    });
    let calls = join_all(calls);
    let end = async {
        reached.recv().await.unwrap();
        reached.recv().await.unwrap();
        drop(sender);
        let ended = Instant::now();
        gone.send(()).unwrap();
        ended
    };
    let (outcomes, ended) = tokio::join!(calls, end);
    assert!(ended.elapsed() < Duration::from_secs(10), "{:?}", ended.elapsed());
    for outcome in outcomes {
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
        assert!(error.message().contains("the sender's rank "), "{error}");
        assert!(error.get(Key::Host).is_some_and(|host| host.starts_with("host-")), "{error}");
    }

    // A new sender, the same joiners.
    let mut sender = Job::start(Shape::new(1)).await;
    sender.register(&source, 1);
    sender.gather().await;
    for server in &mut joining.servers {
        server.load_metas(Metas::from_json(&saved(&sender)).unwrap()).unwrap();
    }
    joining.update(2, &[0, 1], &[], &source).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metas_that_name_no_memory_are_refused_where_they_are_used() {
    let source = checkpoint(MIB, 24);
    let mut sender = Job::start(Shape::new(1)).await;
    sender.register(&source, 1);
    sender.gather().await;
    let mut joining = Job::start(Shape::new(1)).await;
    let error = joining.servers[0].load_metas(Metas::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);

    let mut metas = Metas::from_json(&saved(&sender)).unwrap();
    let placement = &mut metas.ranks.get_mut(&0).unwrap().placement;
    let descriptors = &mut placement.extension.as_mut().unwrap().descriptors;
    let tcp = descriptors.remove("tcp").unwrap();
    descriptors.insert("rdma".into(), tcp.clone());
    joining.servers[0].load_metas(metas.clone()).unwrap();
    let error = joining.try_update(1, &[0], &[], &source).await.remove(0).unwrap_err();
    assert_eq!((error.kind(), error.get(Key::Peer)), (ErrorKind::Unsupported, Some("0")), "{error}");
    assert!(error.message().contains("it serves rdma"), "{error}");

    // A description that was cut off is damage, not a crash.
    for len in 0..tcp.len() {
        let descriptors =
            &mut metas.ranks.get_mut(&0).unwrap().placement.extension.as_mut().unwrap().descriptors;
        descriptors.insert("tcp".into(), tcp.slice(..len));
        if len % 16 == 0 {
            joining.servers[0].load_metas(metas.clone()).unwrap();
            let error = joining.try_update(2, &[0], &[], &source).await.remove(0).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        }
    }
}
