//! P2P updates inside one job: some ranks pull what others hold, and these go on undisturbed.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod p2p_support;

use ckpt_core::{
    Error, ErrorKind, Key, Version, device::BufferSlice, server::UpdateRequest, sink::stream,
    update::trace::Stage,
};
use p2p_support::{Job, NAME, Shape, assert_same, checkpoint};

const MIB: u64 = 1 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn ranks_4_to_7_pull_while_0_to_3_only_serve() {
    let source = checkpoint(8 * MIB, 1);
    let mut job = Job::start(Shape::new(8)).await;
    job.register(&source, 4);
    job.gather().await;
    let members = [4, 5, 6, 7];
    let reports = job.update(1, &members, &members, &source).await;

    // Four hosts own and four hosts receive: all of them pull, evenly.
    let share = source.len_bytes() / 4;
    for report in &reports {
        assert!(report.p2p && report.buckets > 8, "{} buckets", report.buckets);
        let difference = report.rooted_bytes.abs_diff(share);
        assert!(difference < share / 5, "{} of a fair {share}", report.rooted_bytes);
    }
    // A later bucket was being pulled before an earlier one was broadcast.
    let overlapped = reports.iter().any(|report| {
        let of = |stage| report.spans.iter().filter(move |s| s.stage == stage);
        of(Stage::Exchange).any(|e| of(Stage::Pull).any(|p| p.bucket > e.bucket && p.start < e.end))
    });
    assert!(overlapped);

    // The owners can still broadcast to everybody.
    let all: Vec<u32> = (0..8).collect();
    let reports = job.update(2, &all, &[], &source).await;
    assert!(reports.iter().all(|r| !r.p2p));
}

#[tokio::test(flavor = "multi_thread")]
async fn p2p_over_all_ranks_leaves_the_same_bytes_as_a_broadcast() {
    let source = checkpoint(3 * MIB, 2);
    let mut job = Job::start(Shape::new(3)).await;
    job.register(&source, 3);
    job.gather().await;
    // Both compare with the source, byte for byte.
    let broadcast = job.update(1, &[0, 1, 2], &[], &source).await;
    let p2p = job.update(2, &[0, 1, 2], &[0, 1, 2], &source).await;
    assert!(broadcast.iter().all(|r| !r.p2p) && p2p.iter().all(|r| r.p2p));
    // What some ranks did in between costs the others nothing: rank 0 still has its communicator.
    job.update(3, &[1, 2], &[1, 2], &source).await;
    job.update(4, &[0, 1, 2], &[], &source).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_wait_is_there_on_the_adversarial_device() {
    let source = checkpoint(3 * MIB, 3);
    for seed in [7, 11] {
        let mut job = Job::start(Shape { adversary: Some(seed), ..Shape::new(5) }).await;
        job.register(&source, 2);
        job.gather().await;
        job.update(1, &[2, 3, 4], &[2, 3, 4], &source).await;
        // One rank alone has nobody to broadcast to.
        job.update(2, &[4], &[4], &source).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_halves_update_at_the_same_time() {
    let source = checkpoint(2 * MIB, 4);
    let mut job = Job::start(Shape { own_hosts: false, ..Shape::new(4) }).await;
    job.register(&source, 4);
    job.gather().await;
    let (low, high) = job.servers.split_at_mut(2);
    let call = |server, ranks: &[u32]| p2p_support::update(server, 1, ranks.to_vec(), source.clone());
    let [a, b] = low else { panic!("two") };
    let [c, d] = high else { panic!("two") };
    let outcomes = tokio::join!(call(a, &[0, 1]), call(b, &[0, 1]), call(c, &[2, 3]), call(d, &[2, 3]));
    let reports = [outcomes.0.unwrap(), outcomes.1.unwrap(), outcomes.2.unwrap(), outcomes.3.unwrap()];
    // All say that they are on one host, so one rank of each half pulls everything.
    let roots: Vec<bool> = reports.iter().map(|r| r.rooted_bytes > 0).collect();
    assert_eq!(roots, [true, false, true, false]);
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_with_other_bytes_are_refused_and_both_ranks_are_named() {
    let (source, other) = (checkpoint(MIB, 5), checkpoint(MIB, 6));
    let mut job = Job::start(Shape::new(2)).await;
    let all = 0..source.tensors().len();
    job.register_range(0, &source, all.clone());
    job.register_range(1, &other, all.clone());
    let [a, b] = &mut job.servers[..] else { panic!("two") };
    let (a_says, b_says) = tokio::join!(a.gather_metas(p2p_support::NAME), b.gather_metas(p2p_support::NAME));
    for error in [a_says.unwrap_err(), b_says.unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
        assert_eq!((error.get(Key::Rank), error.get(Key::Peer)), (Some("0"), Some("1")));
        assert!(error.get(Key::Tensor).is_some());
    }
    // Equal replicas are sent once.
    job.servers[1].unregister(p2p_support::NAME);
    job.register_range(1, &source, all);
    job.gather().await;
    job.update(1, &[0, 1], &[], &source).await;
    job.update(2, &[1], &[1], &source).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_was_released_is_never_read() {
    let source = checkpoint(MIB, 7);
    let mut job = Job::start(Shape::new(2)).await;
    job.register(&source, 1);
    job.gather().await;
    job.update(1, &[1], &[1], &source).await;

    // The owner replaces the checkpoint; rank 1 still has the old metas.
    assert!(job.servers[0].unregister(p2p_support::NAME));
    let next = checkpoint(MIB, 8);
    job.register(&next, 1);
    let error = job.try_update(2, &[1], &[1], &source).await.remove(0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.message().contains("rank 0") && error.message().contains("re-registered"), "{error}");

    job.gather().await;
    job.update(3, &[1], &[1], &next).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_dies_in_the_middle_is_replaced_by_another_holder() {
    let source = checkpoint(8 * MIB, 9);
    let mut job = Job::start(Shape::new(3)).await;
    let all = 0..source.tensors().len();
    job.register_range(0, &source, all.clone());
    job.register_range(1, &source, all);
    job.gather().await;
    let [dies, _, receiver] = &mut job.servers[..] else { panic!("three") };
    let (sink, mut stream) = stream("worker");
    let request = UpdateRequest {
        checkpoint: NAME.into(),
        version: Version(1),
        ranks: vec![2],
        sink: Some(Box::new(sink)),
        engine: None,
    };
    let worker = async {
        let mut held = std::collections::HashMap::new();
        while let Some(bucket) = stream.next_bucket().await? {
            // Its memory is gone while later buckets are still to be pulled.
            dies.unregister(NAME);
            for tensor in bucket.tensors() {
                held.insert(tensor.meta().name.to_string(), tensor.bytes()?.to_vec());
            }
        }
        Ok::<_, Error>(held)
    };
    let (report, held) = tokio::join!(receiver.update(request), worker);
    assert!(report.unwrap().buckets > 8);
    assert_same(&held.unwrap(), &source);
}

/// Changes one byte in the middle of each tensor that `rank` has registered.
fn damage(job: &Job, rank: usize) {
    let held = job.servers[rank].checkpoint(NAME).unwrap();
    for (arena, buffer) in held.share.arenas.iter().zip(&held.arenas) {
        for tensor in arena.tensors.iter().filter(|t| t.meta.len_bytes() > 0) {
            let middle = tensor.offset + tensor.meta.len_bytes() / 2;
            let byte = BufferSlice::new(buffer.clone(), middle..middle + 1).unwrap();
            // SAFETY: no update runs, so nobody reads or writes the checkpoint's memory.
            unsafe { byte.as_mut_slice() }.unwrap()[0] ^= 0x40;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_not_those_that_were_registered_are_never_published() {
    let source = checkpoint(2 * MIB, 10);
    let mut job = Job::start(Shape::new(3)).await;
    let all = 0..source.tensors().len();
    job.register_range(0, &source, all.clone());
    job.gather().await;
    damage(&job, 0);
    let error = job.try_update(1, &[2], &[2], &source).await.remove(0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.get(Key::Tensor).is_some() && error.message().contains("rank 0"), "{error}");
    // Somebody else has the right ones.
    job.register_range(1, &source, all);
    job.gather().await;
    let reports = job.update(2, &[2], &[2], &source).await;
    assert!(reports[0].spans.iter().any(|s| s.stage == Stage::Check));
}
