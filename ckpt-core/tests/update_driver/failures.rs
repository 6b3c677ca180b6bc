//! Updates in which something goes wrong on one rank: all ranks say what, all workers are told, the next update works.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use ckpt_core::{
    Error, ErrorKind, Key, Result, Version,
    engine::{Engine, EngineRequest},
    server::{UpdateReport, UpdateRequest},
    update::{EngineCall, trace::Stage},
};

use crate::{
    support::{Cluster, Expected, Kind, LONG, Setup, side_by_side, varied},
    worker::{At, Fault, Worker},
};

const KINDS: [Kind; 2] = [Kind::Local, Kind::Tcp];
const RANKS: u32 = 3;
const VICTIM: u32 = 1;

/// A cluster with a registered checkpoint, and the workers of its first update.
async fn prepared(setup: Setup) -> (Cluster, Vec<Worker>, ckpt_core::checkpoint::CheckpointSource) {
    let mut cluster = setup.start().await;
    let source = varied(5);
    cluster.register("model", &source).await;
    let workers = cluster.workers(&Expected::of(&source));
    (cluster, workers, source)
}

fn errors(reports: Vec<Result<UpdateReport>>) -> Vec<Error> {
    reports.into_iter().map(|r| r.map(|_| ()).unwrap_err()).collect()
}

/// Exactly so many rings are left on each rank, soon: a job on a stream may still drop what it was to write.
async fn assert_rings(cluster: &mut Cluster, expected: [usize; 3]) {
    let watches: Vec<_> = cluster.ranks.iter().map(|r| r.watch.clone()).collect();
    let now = || watches.iter().map(|w| w.live_rings.load(Ordering::SeqCst)).collect::<Vec<_>>();
    let until = Instant::now() + LONG;
    while now() != expected {
        assert!(Instant::now() < until, "{:?} instead of {expected:?}", now());
        tokio::task::yield_now().await;
    }
}

async fn a_worker_raises(kind: Kind, adversary: Option<u64>, at: At) {
    let (mut cluster, mut workers, source) = prepared(Setup::new(kind, adversary, RANKS)).await;
    workers[VICTIM as usize].fault = Fault::Raise(at);
    let sinks = workers.iter().map(|w| Some(w.sink())).collect();
    let started = Instant::now();
    let errors = errors(cluster.update("model", 1, sinks, None).await);
    assert!(started.elapsed() < Duration::from_secs(20), "{at:?}: {:?}", started.elapsed());
    for error in &errors {
        assert_eq!(error.kind(), ErrorKind::Backend, "{error}");
        assert!(error.message().contains(&format!("no parameter at {at:?}")), "{error}");
        assert_eq!(error.get(Key::Rank), Some("1"), "{error}");
    }
    for worker in &workers {
        let told = worker.told();
        // After the decision only the failing worker is made to raise: the others have the new version.
        let decided = matches!(at, At::Release | At::Finish);
        if worker.rank == VICTIM || !decided {
            assert!(told.unwrap().contains("no parameter at"), "rank {}", worker.rank);
        } else {
            worker.assert_complete();
        }
    }
    // All workers have let go.
    assert_rings(&mut cluster, [0; 3]).await;
    cluster.update_well("model", 2, &source).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kept_ring_serves_the_next_updates_until_one_fails() {
    let (mut cluster, mut workers, source) = prepared(Setup::new(Kind::Local, Some(3), RANKS)).await;
    for rank in &mut cluster.ranks {
        rank.server.keep_ring(true);
        rank.watch.kept_rings.store(1, Ordering::SeqCst);
    }
    let made = |cluster: &Cluster| -> Vec<usize> {
        cluster.ranks.iter().map(|r| r.watch.made_rings.load(Ordering::SeqCst)).collect()
    };
    for version in 1..4 {
        cluster.update_well("model", version, &source).await;
        assert_eq!(made(&cluster), [1; 3]);
    }
    assert_rings(&mut cluster, [1; 3]).await;
    workers[VICTIM as usize].fault = Fault::Raise(At::Bucket(2));
    let sinks = workers.iter().map(|w| Some(w.sink())).collect();
    errors(cluster.update("model", 4, sinks, None).await);
    assert_rings(&mut cluster, [0; 3]).await;
    cluster.update_well("model", 5, &source).await;
    assert_eq!(made(&cluster), [2; 3]);
    cluster.ranks.iter_mut().for_each(|r| r.server.keep_ring(false));
    assert_rings(&mut cluster, [0; 3]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_raises_fails_the_update_everywhere() {
    let stages = [At::Open, At::Bucket(0), At::Bucket(7), At::Release, At::Finish];
    let each = KINDS.into_iter().flat_map(|kind| stages.map(move |at| a_worker_raises(kind, None, at)));
    side_by_side(each).await;
}

/// What one wants to see after a failure: what each rank was at, and when it knew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_timeline_of_a_failed_update_shows_what_was_cut_short() {
    const BUCKET: u32 = 7;
    for kind in KINDS {
        let (mut cluster, mut workers, source) = prepared(Setup::new(kind, None, RANKS)).await;
        cluster.ranks.iter_mut().for_each(|r| r.server.keep_timelines(2));
        workers[VICTIM as usize].fault = Fault::Raise(At::Bucket(BUCKET));
        let sinks = workers.iter().map(|w| Some(w.sink())).collect();
        let failures = errors(cluster.update("model", 1, sinks, None).await);
        cluster.update_well("model", 2, &source).await;
        for (rank, failure) in (0..).zip(failures) {
            let timelines = cluster.ranks[rank as usize].server.take_timelines();
            let [failed, well] = timelines.as_slice() else { panic!("{timelines:?}") };
            assert_eq!((failed.version, well.version), (Version(1), Version(2)));
            assert!(well.failure.is_none() && well.spans.iter().all(|span| span.complete), "{well:?}");
            let (at, error) = failed.failure.as_ref().unwrap();
            assert_eq!((error.to_string(), *at <= failed.took), (failure.to_string(), true));
            let reload = |bucket| {
                failed.spans.iter().find(move |s| (s.stage, s.bucket) == (Stage::Reload, Some(bucket)))
            };
            if rank == VICTIM {
                assert!(reload(BUCKET - 1).unwrap().complete);
                assert!(!reload(BUCKET).unwrap().complete, "{failed:?}");
                // The others may be ahead of it.
                assert!(reload(BUCKET + 1).is_none(), "{failed:?}");
            }
            // Told the worker, and ended.
            assert!(
                failed.spans.iter().any(|span| span.stage == Stage::Abort && span.start >= *at),
                "{failed:?}"
            );
            assert!(cluster.ranks[rank as usize].server.take_timelines().is_empty());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_raises_on_the_adversarial_device() {
    let stages = [At::Open, At::Bucket(3), At::Bucket(11), At::Finish];
    let each =
        (0..).zip(stages).flat_map(|(seed, at)| KINDS.map(|kind| a_worker_raises(kind, Some(seed), at)));
    side_by_side(each).await;
}

async fn a_worker_hangs(at: At) {
    let mut setup = Setup::new(Kind::Tcp, None, RANKS);
    let short = Duration::from_millis(600);
    match at {
        At::Open => setup.deadlines.ready = short,
        At::Bucket(_) => setup.deadlines.bucket = short,
        At::Release | At::Finish => setup.deadlines.release = short,
    }
    // What a rank waits for the worker, and the hub for the rank.
    setup.deadlines.dead_after = Duration::from_secs(3);
    setup.deadlines.abort = Duration::from_millis(500);
    let (mut cluster, mut workers, source) = prepared(setup).await;
    workers[VICTIM as usize].fault = Fault::Gone(at);
    let sinks = workers.iter().map(|w| Some(w.sink())).collect();
    let started = Instant::now();
    let errors = errors(cluster.update("model", 1, sinks, None).await);
    assert!(started.elapsed() < Duration::from_secs(30), "{at:?}: {:?}", started.elapsed());
    for error in &errors {
        assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
        assert_eq!(error.get(Key::Rank), Some("1"), "{error}");
    }
    // The worker that cannot be told may still read the ring: it is kept until an update of this rank went well.
    let kept = usize::from(at != At::Finish);
    assert_rings(&mut cluster, [0, kept, 0]).await;
    cluster.update_well("model", 2, &source).await;
    assert_rings(&mut cluster, [0, 0, 0]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_hangs_is_named_after_its_deadline() {
    side_by_side([At::Open, At::Bucket(4), At::Release, At::Finish].map(a_worker_hangs)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ring_that_cannot_be_allocated_fails_the_update_everywhere() {
    for kind in KINDS {
        let (mut cluster, workers, source) = prepared(Setup::new(kind, None, RANKS)).await;
        let full = Error::new(ErrorKind::ResourceExhausted, "allocate a ring", "the device is full");
        *cluster.ranks[VICTIM as usize].watch.no_ring.lock().unwrap() = Some(full);
        let sinks = workers.iter().map(|w| Some(w.sink())).collect();
        for error in errors(cluster.update("model", 1, sinks, None).await) {
            assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
            assert_eq!(error.get(Key::Rank), Some("1"), "{error}");
        }
        assert_rings(&mut cluster, [0; 3]).await;
        cluster.update_well("model", 2, &source).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_call_is_named() {
    let mut setup = Setup::new(Kind::Tcp, None, RANKS);
    setup.deadlines.join = Duration::from_millis(800);
    let (mut cluster, workers, source) = prepared(setup).await;
    let calls = cluster
        .ranks
        .iter_mut()
        .zip(&workers)
        .filter(|(_, w)| w.rank != 2)
        .map(|(rank, worker)| rank.server.update(request(1, worker)));
    for error in errors(futures_util::future::join_all(calls).await) {
        assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
        assert!(error.to_string().contains("rank 2") || error.get(Key::Rank) == Some("2"), "{error}");
    }
    cluster.update_well("model", 2, &source).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_that_disagree_are_told_both_wishes_at_once() {
    let (mut cluster, workers, source) = prepared(Setup::new(Kind::Local, None, RANKS)).await;
    let started = Instant::now();
    let calls =
        cluster.ranks.iter_mut().zip(&workers).map(|(rank, worker)| {
            rank.server.update(request(if worker.rank == VICTIM { 8 } else { 7 }, worker))
        });
    for error in errors(futures_util::future::join_all(calls).await) {
        assert_eq!(error.kind(), ErrorKind::ConfigInvalid, "{error}");
        assert!(error.message().contains("version") && error.message().contains('8'), "{error}");
    }
    assert!(started.elapsed() < Duration::from_secs(20));
    cluster.update_well("model", 9, &source).await;
}

fn request(version: u64, worker: &Worker) -> UpdateRequest {
    UpdateRequest {
        checkpoint: "model".into(),
        version: Version(version),
        ranks: Vec::new(),
        sink: Some(Box::new(worker.sink())),
        engine: None,
    }
}

/// A caller that gives up (a timeout around the call, a cancelled task) is told to the others at once: with the ring
/// full by the group that breaks, else by its own word to the hub.
async fn a_call_is_cancelled(kind: Kind, full: bool) {
    let mut setup = Setup::new(kind, None, RANKS);
    if !full {
        setup.limits.ring_slack_bytes = 8 << 20;
    }
    let (mut cluster, mut workers, source) = prepared(setup).await;
    workers[VICTIM as usize].fault = Fault::Hang(At::Bucket(5));
    let mut hanging = workers[VICTIM as usize].state.hanging.subscribe();
    let mut calls: Vec<_> =
        cluster.ranks.iter_mut().zip(&workers).map(|(r, w)| r.server.update(request(1, w))).collect();
    let cancelled = calls.remove(VICTIM as usize);
    let cancel = async {
        // Dropped with the update in the middle.
        tokio::select! {
            report = cancelled => panic!("it should hang: {report:?}"),
            reached = hanging.wait_for(|n| *n > 0) => drop(reached.unwrap()),
        }
    };
    let started = Instant::now();
    let both = async { tokio::join!(futures_util::future::join_all(calls), cancel).0 };
    for error in errors(tokio::time::timeout(LONG, both).await.expect("the others end")) {
        assert_eq!(error.get(Key::Rank), Some("1"), "{error}");
        assert!(full || error.message().contains("cancelled"), "{error}");
    }
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    for rank in [0, 2] {
        assert!(workers[rank].told().unwrap().contains("rank=1"), "{:?}", workers[rank].told());
    }
    cluster.update_well("model", 2, &source).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_that_is_cancelled_on_one_rank_ends_on_all() {
    let each = KINDS.into_iter().flat_map(|kind| [true, false].map(|full| a_call_is_cancelled(kind, full)));
    side_by_side(each).await;
}

/// Transports number the members of a group; the error must name the rank.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_of_a_part_is_named_by_its_rank() {
    for kind in KINDS {
        let (mut cluster, mut workers, source) = prepared(Setup::new(kind, None, RANKS)).await;
        workers[2].fault = Fault::Hang(At::Bucket(5));
        let mut hanging = workers[2].state.hanging.subscribe();
        let part = |worker: &Worker| UpdateRequest { ranks: vec![1, 2], ..request(1, worker) };
        let [_, one, two] = &mut cluster.ranks[..] else { panic!("three ranks") };
        let cancelled = two.server.update(part(&workers[2]));
        let cancel = async {
            tokio::select! {
                report = cancelled => panic!("it should hang: {report:?}"),
                reached = hanging.wait_for(|n| *n > 0) => drop(reached.unwrap()),
            }
        };
        let error = tokio::join!(one.server.update(part(&workers[1])), cancel).0.unwrap_err();
        assert_eq!(error.get(Key::Rank), Some("2"), "{error}");
        cluster.update_well("model", 2, &source).await;
    }
}

struct Scripted(Result<()>);

#[async_trait]
impl Engine for Scripted {
    fn name(&self) -> &'static str {
        "scripted"
    }
    async fn ready(&self, _deadline: Instant) -> Result<()> {
        Ok(())
    }
    async fn update(&self, request: &EngineRequest, _deadline: Instant) -> Result<()> {
        assert_eq!(request.endpoints.len(), RANKS as usize);
        self.0.clone()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_fails_or_answers_early_ends_the_update_at_once() {
    let refused = Error::new(ErrorKind::Backend, "tell the engine", "it answered 500: out of memory");
    for (answer, says) in
        [(Err(refused), "500: out of memory"), (Ok(()), "before its worker had all weights")]
    {
        let (mut cluster, mut workers, source) = prepared(Setup::new(Kind::Tcp, None, RANKS)).await;
        // No worker comes before the engine tells it to.
        workers.iter_mut().for_each(|w| w.fault = Fault::Hang(At::Open));
        let sinks = workers.iter().map(|w| Some(w.sink())).collect();
        let engine = EngineCall { engine: Arc::new(Scripted(answer)), ranks: (0..RANKS).collect() };
        let started = Instant::now();
        for error in errors(cluster.update("model", 1, sinks, Some(engine)).await) {
            assert_eq!(error.get(Key::Rank), Some("0"), "{error}");
            assert!(error.message().contains(says), "{error}");
        }
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
        assert_rings(&mut cluster, [0; 3]).await;
        cluster.update_well("model", 2, &source).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_cannot_be_right_are_refused_without_the_others() {
    let (mut cluster, workers, source) = prepared(Setup::new(Kind::Local, None, 2)).await;
    let server = &mut cluster.ranks[0].server;
    let mut unknown = request(1, &workers[0]);
    unknown.checkpoint = "other".into();
    let error = server.update(unknown).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    assert!(error.message().contains("`other`"), "{error}");
    let mut foreign = request(1, &workers[0]);
    foreign.ranks = vec![1];
    let error = server.update(foreign).await.unwrap_err();
    assert_eq!((error.kind(), error.get(Key::Rank)), (ErrorKind::ConfigInvalid, Some("0")));
    cluster.update_well("model", 1, &source).await;
}

/// Several exchanges of a fast rank may wait for one slow worker, each longer than one bucket may take.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_worker_within_its_limit_is_nobodys_failure() {
    let mut setup = Setup::new(Kind::Tcp, None, RANKS);
    let limit = Duration::from_millis(700);
    setup.deadlines.bucket = limit;
    // Few buckets, each with the worker for 300 ms.
    setup.limits.target_bucket_bytes = 24 << 10;
    setup.limits.ring_slack_bytes = 84 << 10;
    let (mut cluster, mut workers, _) = prepared(setup).await;
    workers[VICTIM as usize].fault = Fault::Slow(Duration::from_millis(300));
    let sinks = workers.iter().map(|w| Some(w.sink())).collect();
    let reports = cluster.update("model", 1, sinks, None).await.into_iter().map(|r| r.unwrap());
    let spans: Vec<_> = reports.flat_map(|r| r.spans).filter(|s| s.stage == Stage::Exchange).collect();
    let longest = spans.iter().map(|s| s.end - s.start).max().unwrap();
    assert!(longest > limit, "no exchange took longer than a bucket's limit: {longest:?}");
    workers.iter().for_each(|w| w.assert_complete());
}
