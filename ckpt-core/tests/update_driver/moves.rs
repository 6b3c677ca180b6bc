//! Updates in which nothing goes wrong.

use std::sync::atomic::Ordering;

use ckpt_core::{
    DType, Version,
    checkpoint::{CheckpointSource, NamedTensor, generate},
    plan::PlanLimits,
    server::{UpdateReport, UpdateRequest},
    types::TensorMeta,
    update::trace::{Span, Stage},
};

use crate::support::{Cluster, Expected, Kind, Setup, side_by_side, tensors, varied};

const KINDS: [Kind; 2] = [Kind::Local, Kind::Tcp];

fn rings(cluster: &Cluster) -> Vec<usize> {
    cluster.ranks.iter().map(|r| r.watch.live_rings.load(Ordering::SeqCst)).collect()
}

fn joins(cluster: &Cluster) -> Vec<u64> {
    cluster.ranks.iter().map(|r| r.watch.joins.load(Ordering::SeqCst)).collect()
}

/// Two updates of the same checkpoint through a ring of a few buckets, and one of another.
async fn updates(kind: Kind, adversary: Option<u64>, world_size: u32) {
    let mut cluster = Setup::new(kind, adversary, world_size).start().await;
    let (first, second) = (varied(1), varied(2));
    cluster.register("first", &first).await;
    cluster.register("second", &second).await;
    let mut epochs = Vec::new();
    for (version, (name, source)) in (1..).zip([("first", &first), ("second", &second), ("first", &first)]) {
        for report in cluster.update_well(name, version, source).await {
            assert_eq!(report.version, Version(version));
            assert_eq!(report.tensors, source.tensors().len() as u64);
            assert_eq!(report.tensor_bytes, source.len_bytes());
            assert!(report.buckets > 20, "{} buckets", report.buckets);
            assert!(report.ring_bytes < report.tensor_bytes / 4, "ring of {}", report.ring_bytes);
            epochs.push(report.epoch.0);
        }
    }
    assert!(epochs.chunks(world_size as usize).all(|c| c.iter().all(|e| *e == c[0])), "{epochs:?}");
    assert!(epochs.is_sorted() && epochs.first() < epochs.last(), "{epochs:?}");
    // The group was formed once and kept.
    assert_eq!(joins(&cluster), vec![u64::from(world_size > 1); world_size as usize]);
    assert_eq!(rings(&cluster), vec![0; world_size as usize]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_byte_arrives_on_the_host_device() {
    let each = KINDS.into_iter().flat_map(|kind| (1..=4).map(move |world| updates(kind, None, world)));
    side_by_side(each).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_byte_arrives_on_the_adversarial_device_local() {
    side_by_side((0..12).map(|seed| updates(Kind::Local, Some(seed), 1 + seed as u32 % 4))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_byte_arrives_on_the_adversarial_device_tcp() {
    side_by_side((100..109).map(|seed| updates(Kind::Tcp, Some(seed), 2 + seed as u32 % 3))).await;
}

/// The buckets of several owners at once.
async fn several_owners(kind: Kind, adversary: Option<u64>) {
    let mut setup = Setup::new(kind, adversary, 4);
    setup.limits = PlanLimits {
        target_bucket_bytes: 2 << 20,
        ring_slack_bytes: 5 << 20,
        window: Some(4),
        ..PlanLimits::default()
    };
    let mut cluster = setup.start().await;
    let source = CheckpointSource::generated(generate::qwen_shaped(16 << 20), 5);
    cluster.register("model", &source).await;
    for report in cluster.update_well("model", 1, &source).await {
        assert!(report.buckets >= 8, "{report:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_owners_send_at_once() {
    side_by_side([
        several_owners(Kind::Local, Some(3)),
        several_owners(Kind::Tcp, Some(4)),
        several_owners(Kind::Tcp, None),
    ])
    .await;
}

/// A rank without a worker owns and forwards bytes, and takes part in the decision.
async fn without_a_worker(kind: Kind, adversary: Option<u64>, lonely: u32) {
    let mut cluster = Setup::new(kind, adversary, 3).start().await;
    let source = varied(9);
    cluster.register("model", &source).await;
    let workers = cluster.workers(&Expected::of(&source));
    for version in 1..=2 {
        let sinks = workers.iter().map(|w| (w.rank != lonely).then(|| w.sink())).collect();
        for report in cluster.update("model", version, sinks, None).await {
            report.unwrap();
        }
        assert_eq!(rings(&cluster), [0; 3]);
        if version == 1 {
            workers.iter().filter(|w| w.rank != lonely).for_each(|w| w.assert_complete());
            workers.iter().for_each(|w| w.state.forget());
        }
    }
    assert_eq!(joins(&cluster), [1; 3]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_without_a_worker_serves_the_others() {
    side_by_side((0..6).map(|n| without_a_worker(KINDS[n % 2], (n > 1).then_some(n as u64), n as u32 % 3)))
        .await;
}

/// Fewer tensors than ranks, nothing but empty tensors, a rank with nothing.
async fn little(kind: Kind, adversary: Option<u64>) {
    let mut cluster = Setup::new(kind, adversary, 4).start().await;
    let two = tensors([5, 7000], 1);
    cluster.register("two", &two).await;
    cluster.update_well("two", 1, &two).await;

    let meta = |name: &str| TensorMeta::new(name, DType::BF16, [0, 3]).unwrap();
    let empty = ["a", "b", "c"].map(|name| NamedTensor::from_slice(meta(name), &[]).unwrap());
    let empty = CheckpointSource::from_tensors(empty).unwrap();
    cluster.register("empty", &empty).await;
    let reports = cluster.update_well("empty", 2, &empty).await;
    assert_eq!(reports[0].tensor_bytes, 0);

    let one = tensors([3000, 10, 0], 2);
    cluster.register_shares("on rank 2", &one, vec![0..0, 0..0, 0..3, 3..3]).await;
    cluster.update_well("on rank 2", 3, &one).await;

    // An empty checkpoint has nothing to move, and the update still is one.
    let nothing = CheckpointSource::from_tensors([]).unwrap();
    cluster.register("nothing", &nothing).await;
    let reports = cluster.update_well("nothing", 4, &nothing).await;
    assert_eq!((reports[0].tensors, reports[0].buckets), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_and_empty_checkpoints_are_updates_too() {
    side_by_side([
        little(Kind::Local, None),
        little(Kind::Local, Some(1)),
        little(Kind::Tcp, None),
        little(Kind::Tcp, Some(2)),
    ])
    .await;
}

/// A tensor of two pieces and a few bytes: each piece is sent as soon as it is loaded.
async fn a_large_tensor(kind: Kind, adversary: Option<u64>, world_size: u32) {
    const MIB: u64 = 1 << 20;
    let mut setup = Setup::new(kind, adversary, world_size);
    setup.limits =
        PlanLimits { target_bucket_bytes: MIB, ring_slack_bytes: 2 * MIB, ..PlanLimits::default() };
    let mut cluster = setup.start().await;
    let source = CheckpointSource::generated(
        [(1000, "small"), (33 * MIB + 77, "large"), (5, "last")]
            .map(|(len_bytes, name)| TensorMeta::new(name, DType::U8, [len_bytes]).unwrap()),
        3,
    );
    cluster.register("model", &source).await;
    for version in 1..=2 {
        let buckets = cluster.update_well("model", version, &source).await[0].buckets;
        for rank in &cluster.ranks {
            let groups = if world_size > 1 { version * (buckets + 1) } else { 0 };
            assert_eq!(*rank.watch.enqueued.borrow(), groups, "one group more than buckets");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_tensor_is_sent_in_pieces() {
    for (kind, adversary, world_size) in
        [(Kind::Local, None, 3), (Kind::Tcp, None, 2), (Kind::Local, Some(7), 2), (Kind::Tcp, None, 1)]
    {
        a_large_tensor(kind, adversary, world_size).await;
    }
}

fn span(report: &UpdateReport, stage: Stage, bucket: u32) -> Span {
    let found = report.spans.iter().find(|s| s.stage == stage && s.bucket == Some(bucket));
    *found.unwrap_or_else(|| panic!("no {stage:?} of bucket {bucket}"))
}

/// While a worker has one bucket, later ones are loaded and exchanged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stages_of_different_buckets_overlap() {
    // Each worker takes a bucket only once the exchange of the next one has been enqueued: without the overlap it
    // would wait for ever.
    const CHECKED: u32 = 12;
    for kind in KINDS {
        let mut cluster = Setup::new(kind, None, 2).start().await;
        let source = tensors([4096; 40], 1);
        cluster.register("model", &source).await;
        let mut workers = cluster.workers(&Expected::of(&source));
        workers.iter_mut().for_each(|w| (w.ahead, w.ahead_until) = (2, CHECKED));
        let sinks = workers.iter().map(|w| Some(w.sink())).collect();
        for report in cluster.update("model", 1, sinks, None).await {
            let report = report.unwrap();
            assert_eq!(report.buckets, 40);
            for bucket in 0..CHECKED {
                let (reload, next) =
                    (span(&report, Stage::Reload, bucket), span(&report, Stage::Exchange, bucket + 1));
                assert!(next.start < reload.end, "{kind:?}: {reload:?} {next:?}");
                assert!(span(&report, Stage::Exchange, bucket).end <= reload.start, "{kind:?}: {reload:?}");
            }
            let load = report.spans.iter().filter(|s| s.stage == Stage::Load);
            let later: Vec<_> = load.filter(|s| (1..CHECKED).contains(&s.bucket.unwrap())).copied().collect();
            assert!(!later.is_empty(), "this rank owns some of the first buckets");
            for load in later {
                let earlier = span(&report, Stage::Reload, load.bucket.unwrap() - 1);
                assert!(load.start < earlier.end, "{kind:?}: {load:?} {earlier:?}");
            }
        }
        workers.iter().for_each(|w| w.assert_complete());
    }
}

/// One update of some ranks.
async fn update_part(cluster: &mut Cluster, part: &[u32], version: u64, source: &CheckpointSource) {
    let workers = cluster.workers(&Expected::of(source));
    let members = cluster.ranks.iter_mut().zip(&workers).filter(|(_, w)| part.contains(&w.rank));
    let calls = members.map(|(rank, worker)| {
        rank.server.update(UpdateRequest {
            checkpoint: "model".into(),
            version: Version(version),
            ranks: part.to_vec(),
            sink: Some(Box::new(worker.sink())),
            engine: None,
        })
    });
    for report in futures_util::future::join_all(calls).await {
        report.unwrap();
    }
    workers.iter().filter(|w| part.contains(&w.rank)).for_each(|w| w.assert_complete());
    assert_eq!(rings(cluster), vec![0; workers.len()]);
}

/// Some of the ranks, whichever they are, and all together again.
async fn parts(kind: Kind) {
    let mut cluster = Setup::new(kind, None, 4).start().await;
    let source = varied(3);
    cluster.register("model", &source).await;
    let mut version = 0;
    for part in [&[2, 0][..], &[1, 2], &[0, 1], &[1]] {
        version += 2;
        cluster.update_well("model", version, &source).await;
        update_part(&mut cluster, part, version + 1, &source).await;
    }
    // Rank 1 is in many, rank 0 in none: both must still agree on the group of all.
    for part in [&[1, 2][..], &[1, 3], &[1, 2, 3], &[1, 2]] {
        version += 2;
        update_part(&mut cluster, part, version, &source).await;
    }
    cluster.update_well("model", version + 2, &source).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_of_the_ranks_update_between_updates_of_all() {
    side_by_side(KINDS.map(parts)).await;
}
