//! After a failure: engines stay paused unless that is safe to end, ranks are marked, the last version can be put back,
//! and a job goes on with a new hub or without a rank.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ckpt_core::{
    ErrorKind, Result, Version,
    checkpoint::CheckpointSource,
    control::MarkKind,
    engine::{Engine, EngineRequest, PauseMode},
    server::{OnFailure, Policy, UpdateReport},
    sink::WeightSink,
    update::EngineCall,
};

use crate::{
    support::{Cluster, Expected, Kind, Setup, varied},
    worker::{At, Fault, State, Worker},
};

const RANKS: u32 = 3;
const VICTIM: u32 = 1;

/// An engine that can be paused; its request ends when its workers are through, or were told to raise.
struct Pausing {
    workers: Vec<Arc<State>>,
    said: Mutex<Vec<&'static str>>,
    buckets_at_pause: AtomicU64,
    unfinished_at_resume: AtomicU64,
}

impl Pausing {
    fn call(workers: &[Worker]) -> (Arc<Self>, EngineCall) {
        let engine = Arc::new(Self {
            workers: workers.iter().map(|w| w.state.clone()).collect(),
            said: Mutex::default(),
            buckets_at_pause: AtomicU64::new(0),
            unfinished_at_resume: AtomicU64::new(0),
        });
        (engine.clone(), EngineCall { engine, ranks: (0..RANKS).collect() })
    }

    fn say(&self, word: &'static str) {
        self.said.lock().unwrap().push(word);
    }

    fn said(&self) -> Vec<&'static str> {
        self.said.lock().unwrap().clone()
    }
}

#[async_trait]
impl Engine for Pausing {
    fn name(&self) -> &'static str {
        "pausing"
    }
    async fn ready(&self, _deadline: Instant) -> Result<()> {
        Ok(())
    }
    async fn update(&self, _request: &EngineRequest, _deadline: Instant) -> Result<()> {
        self.say("update");
        let through =
            |w: &Arc<State>| w.finished.load(Ordering::SeqCst) > 0 || w.told.lock().unwrap().is_some();
        while !self.workers.iter().all(through) {
            tokio::task::yield_now().await;
        }
        Ok(())
    }
    async fn pause(&self, _mode: PauseMode, _deadline: Instant) -> Result<bool> {
        self.say("pause");
        let taken = self.workers.iter().map(|w| w.buckets.load(Ordering::SeqCst)).sum();
        self.buckets_at_pause.store(taken, Ordering::SeqCst);
        Ok(true)
    }
    async fn resume(&self, _deadline: Instant) -> Result<()> {
        self.say("resume");
        let unfinished = self.workers.iter().filter(|w| w.finished.load(Ordering::SeqCst) == 0).count();
        self.unfinished_at_resume.store(unfinished as u64, Ordering::SeqCst);
        Ok(())
    }
}

fn setup(policy: Policy) -> Setup {
    Setup { policy, ..Setup::new(Kind::Tcp, None, RANKS) }
}

fn sinks(workers: &[Worker]) -> Vec<Option<crate::worker::TestSink>> {
    workers.iter().map(|w| Some(w.sink())).collect()
}

async fn with_checkpoint(policy: Policy, source: &CheckpointSource) -> Cluster {
    let mut cluster = setup(policy).start().await;
    cluster.register("model", source).await;
    cluster
}

/// Whatever the ranks have told the hub, it knows.
async fn settle(cluster: &mut Cluster) {
    for met in cluster.each(|_, server| Box::pin(server.barrier("settled"))).await {
        met.unwrap();
    }
}

fn marks(cluster: &mut Cluster) -> Vec<Option<(MarkKind, Version)>> {
    let of = |rank: &mut crate::support::RankOf| {
        rank.server.weights().mark.as_ref().map(|mark| (mark.kind, mark.version))
    };
    cluster.ranks.iter_mut().map(of).collect()
}

fn committed(cluster: &mut Cluster) -> Vec<Option<Version>> {
    let of = |rank: &mut crate::support::RankOf| {
        rank.server.weights().committed.as_ref().map(|installed| installed.version)
    };
    cluster.ranks.iter_mut().map(of).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_is_paused_before_its_first_bucket_and_resumed_after_the_commit() {
    let source = varied(5);
    let mut cluster = with_checkpoint(Policy::default(), &source).await;
    let workers = cluster.workers(&Expected::of(&source));
    let (engine, call) = Pausing::call(&workers);
    for report in cluster.update("model", 4, sinks(&workers), Some(call)).await {
        report.unwrap();
    }
    assert_eq!(engine.said(), ["pause", "update", "resume"]);
    assert_eq!(engine.buckets_at_pause.load(Ordering::SeqCst), 0);
    assert_eq!(
        engine.unfinished_at_resume.load(Ordering::SeqCst),
        0,
        "resumed before all post hooks had run"
    );
    assert_eq!(committed(&mut cluster), [Some(Version(4)); 3]);
    settle(&mut cluster).await;
    let known = cluster.status().await;
    let version = |rank: usize| known.ranks[rank].weights.clone().unwrap().committed.unwrap().version;
    assert_eq!([version(0), version(1), version(2)], [Version(4); 3]);

    let off = Policy { pause: None, ..Policy::default() };
    let mut cluster = with_checkpoint(off, &source).await;
    let workers = cluster.workers(&Expected::of(&source));
    let (engine, call) = Pausing::call(&workers);
    cluster.update("model", 5, sinks(&workers), Some(call)).await;
    assert_eq!(engine.said(), ["update"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_whose_weights_are_whole_is_resumed_and_others_stay_paused() {
    let leave = Policy { on_failure: OnFailure::Leave, ..Policy::default() };
    let mixed = Some((MarkKind::Mixed, Version(1)));
    for (policy, at, said, marked) in [
        // No worker of any rank was given a bucket, since one had no ring.
        (Policy::default(), At::Open, &["pause", "update", "resume"][..], [None; 3]),
        (Policy::default(), At::Bucket(4), &["pause", "update"], [mixed; 3]),
        (leave, At::Bucket(4), &["pause", "update", "resume"], [mixed; 3]),
    ] {
        let source = varied(5);
        let mut cluster = with_checkpoint(policy, &source).await;
        let mut workers = cluster.workers(&Expected::of(&source));
        workers[VICTIM as usize].fault = Fault::Raise(at);
        let (engine, call) = Pausing::call(&workers);
        for report in cluster.update("model", 1, sinks(&workers), Some(call)).await {
            assert!(report.unwrap_err().message().contains("no parameter at"));
        }
        assert_eq!(engine.said(), said, "{at:?}");
        assert_eq!(marks(&mut cluster), marked, "{at:?}");
        settle(&mut cluster).await;
        let known = cluster.status().await;
        let told =
            known.ranks.iter().filter(|r| r.weights.as_ref().is_some_and(|w| w.mark.is_some())).count();
        assert_eq!(told, marked.iter().flatten().count(), "{at:?}");
        // The next update pauses a paused engine, resumes it, and takes the marks away.
        let workers = cluster.workers(&Expected::of(&source));
        let (engine, call) = Pausing::call(&workers);
        for report in cluster.update("model", 2, sinks(&workers), Some(call)).await {
            report.unwrap();
        }
        assert_eq!(engine.said(), ["pause", "update", "resume"]);
        assert_eq!(
            (marks(&mut cluster), committed(&mut cluster)),
            (vec![None; 3], vec![Some(Version(2)); 3])
        );
    }
}

/// All ranks go back to what was committed last.
async fn roll_back(cluster: &mut Cluster, workers: &[Worker]) -> Vec<Result<UpdateReport>> {
    let mut sinks = sinks(workers).into_iter();
    cluster
        .each(|_, server| {
            let sink = sinks.next().flatten().map(|sink| Box::new(sink) as Box<dyn WeightSink>);
            Box::pin(server.rollback(Vec::new(), sink, None))
        })
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_version_is_kept_and_can_be_sent_again() {
    let (first, second) = (varied(5), varied(9));
    let keep = Policy { keep_previous: true, ..Policy::default() };
    let mut cluster = with_checkpoint(keep, &first).await;
    let workers = cluster.workers(&Expected::of(&first));
    for error in roll_back(&mut cluster, &workers).await {
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Unavailable, "nothing was committed yet");
    }
    cluster.update_well("model", 1, &first).await;
    // As a trainer does at each step: the old one goes, the new one comes.
    for rank in &mut cluster.ranks {
        assert!(rank.server.unregister("model"));
        assert_eq!(rank.server.kept_version(), Some(Version(1)));
    }
    cluster.register("model", &second).await;
    let mut workers = cluster.workers(&Expected::of(&second));
    workers[VICTIM as usize].fault = Fault::Raise(At::Bucket(5));
    for report in cluster.update("model", 2, sinks(&workers), None).await {
        report.unwrap_err();
    }
    assert!(cluster.ranks.iter().all(|r| r.server.may_be_mixed()));
    assert_eq!(marks(&mut cluster), [Some((MarkKind::Mixed, Version(2))); 3]);

    let workers = cluster.workers(&Expected::of(&first));
    for report in roll_back(&mut cluster, &workers).await {
        assert_eq!(report.unwrap().version, Version(1));
    }
    workers.iter().for_each(Worker::assert_complete);
    assert_eq!((marks(&mut cluster), committed(&mut cluster)), (vec![None; 3], vec![Some(Version(1)); 3]));
    // And forwards again, after which that one is kept.
    cluster.update_well("model", 3, &second).await;
    assert!(cluster.ranks.iter().all(|r| r.server.kept_version() == Some(Version(3))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_join_a_restarted_hub_again_and_keep_their_memory() {
    let source = varied(5);
    let mut cluster = with_checkpoint(Policy::default(), &source).await;
    let epoch = cluster.update_well("model", 1, &source).await[0].epoch;
    cluster.restart_hub().await;
    let wait = Duration::from_secs(20);
    for rejoined in cluster.each(|_, server| Box::pin(server.rejoin(wait))).await {
        rejoined.unwrap();
    }
    // The new hub learns what workers have.
    settle(&mut cluster).await;
    let known = cluster.status().await;
    assert!(
        known.ranks.iter().all(|r| r.weights.as_ref().is_some_and(|w| w.committed.is_some())),
        "{known:?}"
    );
    // Nothing is registered anew.
    for gathered in cluster.each(|_, server| Box::pin(server.gather_metas("model"))).await {
        gathered.unwrap();
    }
    let again = cluster.update_well("model", 2, &source).await[0].epoch;
    assert!(again > epoch, "{again} after {epoch}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_that_leaves_is_not_waited_for_and_may_come_back() {
    let source = varied(5);
    let mut cluster = with_checkpoint(Policy::default(), &source).await;
    cluster.update_well("model", 1, &source).await;
    let gone = cluster.ranks.remove(2);
    gone.session.clone().close().await;
    for rank in &mut cluster.ranks {
        rank.server.unregister("model");
    }
    // Two ranks hold everything now; their gathers and updates need nobody else.
    cluster.register("model", &source).await;
    cluster.update_well("model", 2, &source).await;
    assert!(cluster.status().await.ranks[2].left);

    let mut back = gone;
    back.server.rejoin(Duration::from_secs(20)).await.unwrap();
    cluster.ranks.push(back);
    for rank in &mut cluster.ranks {
        rank.server.unregister("model");
    }
    cluster.register("model", &source).await;
    cluster.update_well("model", 3, &source).await;
    assert_eq!(committed(&mut cluster), [Some(Version(3)); 3]);
}
