//! What the planner refuses, and that the checker finds every broken law.

mod plan_common;

use ckpt_core::{
    DType, Error, ErrorKind, Key, Rank,
    manifest::{Arena, Manifest, Tensor},
    plan::{
        Bucket, Method, PlanError, PlanInput, PlanLimits, UpdatePlan, bucket_message, check, check_coverage,
        check_interleaving, plan,
    },
    types::TensorMeta,
};
use plan_common::{GIB, KIB, MIB, arena, bytes_meta, manifest, plan_broadcast, plan_p2p};

#[test]
fn members_and_receivers_must_make_sense() {
    let manifest = plan_common::uniform(2, 1, 10);
    assert_eq!(plan_broadcast(&manifest, &[]), Err(PlanError::NoMembers));
    assert_eq!(plan_broadcast(&manifest, &[1, 0]), Err(PlanError::MembersNotAscending { rank: 0 }));
    assert_eq!(plan_broadcast(&manifest, &[0, 0]), Err(PlanError::MembersNotAscending { rank: 0 }));
    assert_eq!(plan_p2p(&manifest, &[4], &[]), Err(PlanError::NoReceivers));
    assert_eq!(plan_p2p(&manifest, &[4], &[5]), Err(PlanError::ReceiverNotMember { rank: 5 }));
    let error = plan_broadcast(&manifest, &[0, 2]).unwrap_err();
    assert_eq!(error, PlanError::OwnerNotMember { rank: 1, tensor: "layers.0.of.1".into() });
    assert!(plan_p2p(&manifest, &[2], &[2]).is_ok());
}

#[test]
fn limits_are_checked() {
    let manifest = Manifest::default();
    let good = PlanLimits::default();
    for (limits, name) in [
        (PlanLimits { mem_permille: 0, ..good.clone() }, "mem_permille"),
        (PlanLimits { mem_permille: 1001, ..good.clone() }, "mem_permille"),
        (PlanLimits { max_bucket_bytes: 255, ..good.clone() }, "max_bucket_bytes"),
        (PlanLimits { target_bucket_bytes: 0, ..good.clone() }, "target_bucket_bytes"),
        (PlanLimits { window: Some(0), ..good.clone() }, "window"),
    ] {
        let input = PlanInput {
            manifest: &manifest,
            members: &[0],
            free_bytes: GIB,
            limits,
            method: Method::Broadcast,
        };
        let error = Error::from(plan(&input).unwrap_err());
        assert!(error.kind() == ErrorKind::ConfigInvalid && error.message().contains(name), "{error}");
    }
}

#[test]
fn a_name_must_mean_one_tensor() {
    let twice =
        manifest([(2, vec![arena([bytes_meta("a", 4)]), arena([bytes_meta("b", 1), bytes_meta("a", 4)])])]);
    let error = plan_broadcast(&twice, &[2]).unwrap_err();
    assert_eq!(error, PlanError::DuplicateTensor { rank: 2, tensor: "a".into() });

    let other = TensorMeta::new("a", DType::BF16, [2]).unwrap();
    let differ = manifest([(2, vec![arena([bytes_meta("a", 4)])]), (7, vec![arena([other])])]);
    let error = Error::from(plan_broadcast(&differ, &[2, 7]).unwrap_err());
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    assert_eq!(
        (error.get(Key::Rank), error.get(Key::Peer), error.get(Key::Tensor)),
        (Some("2"), Some("7"), Some("a"))
    );
    assert_eq!(
        error.message(),
        "rank 2 holds it as torch.uint8 [4] and rank 7 as torch.bfloat16 [2]; give all ranks the same checkpoint"
    );
}

#[test]
fn a_replica_is_sent_once_by_the_least_loaded_holder() {
    let shared = || arena([bytes_meta("shared", 5 * MIB)]);
    let own = |name: &str, len| arena([bytes_meta(name, len)]);
    let shares = [
        (0, vec![own("a", 9 * MIB), shared()]),
        (1, vec![own("b", MIB), shared()]),
        (2, vec![shared(), own("c", 2 * MIB)]),
    ];
    let manifest = manifest(shares);
    let senders = |made: &UpdatePlan| -> Vec<Rank> {
        check(made, &manifest).unwrap();
        let segments = made.buckets.iter().flat_map(|b| &b.segments);
        let of_shared = |s: &&ckpt_core::plan::Segment| {
            let arena = &manifest.shares[&s.owner].arenas[s.arena as usize];
            arena.tensors[s.tensors.start as usize].meta.name.as_ref() == "shared"
        };
        segments.filter(of_shared).map(|s| s.owner).collect()
    };
    assert_eq!(senders(&plan_broadcast(&manifest, &[0, 1, 2]).unwrap()), [1]);
    assert_eq!(senders(&plan_p2p(&manifest, &[9], &[9]).unwrap()), [1]);
}

#[test]
fn only_members_broadcast_replicas() {
    let shares = [
        (0, vec![arena([bytes_meta("a", 900), bytes_meta("shared", 50)])]),
        (1, vec![arena([bytes_meta("shared", 50)])]),
    ];
    let manifest = manifest(shares);
    let made = plan_broadcast(&manifest, &[0]).unwrap();
    check(&made, &manifest).unwrap();
    assert!(made.buckets.iter().flat_map(|b| &b.segments).all(|s| s.owner == 0));
}

#[test]
fn full_replicas_are_shared_out_in_long_runs() {
    let metas = || arena((0..4000).map(|i| bytes_meta(format!("layer.{i}"), MIB / 2)));
    let manifest = manifest((0..8).map(|rank| (rank, vec![metas()])));
    let made = plan_broadcast(&manifest, &[0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
    check(&made, &manifest).unwrap();
    let segments: Vec<_> = made.buckets.iter().flat_map(|b| &b.segments).collect();
    let mut loads = [0; 8];
    segments.iter().for_each(|s| loads[s.owner as usize] += s.len_bytes);
    assert!(loads.iter().max().unwrap() - loads.iter().min().unwrap() <= 16 * MIB, "{loads:?}");
    assert!(segments.len() <= 2000 / 16 * 3, "{} segments for 2000 MiB", segments.len());
}

#[test]
fn damaged_layouts_are_refused() {
    let one = |meta: TensorMeta, offset, len_bytes| {
        manifest([(0, vec![Arena { len_bytes, tensors: vec![Tensor { meta, offset }] }])])
    };
    let huge = (0..3).map(|i| bytes_meta(format!("{i}"), u64::MAX / 8));
    let overflowing =
        TensorMeta { name: "t".into(), dtype: DType::F64, shape: [u64::MAX, 2].as_slice().into() };
    for (manifest, expected) in [
        (one(overflowing, 0, 10), "more bytes than can be addressed"),
        (one(bytes_meta("t", 10), 1, 10), "do not lie in an arena of 10"),
        (one(bytes_meta("t", 10), u64::MAX - 5, u64::MAX), "do not lie in an arena"),
        (manifest([(0, vec![arena(huge)])]), "more bytes than a plan can number"),
    ] {
        let error = Error::from(plan_broadcast(&manifest, &[0]).unwrap_err());
        assert!(error.message().contains(expected), "{error}");
    }
    let mut overlap = arena([bytes_meta("a", 10), bytes_meta("b", 10)]);
    overlap.tensors[1].offset = 9;
    let error = Error::from(plan_broadcast(&manifest([(4, vec![overlap])]), &[4]).unwrap_err());
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(
        error.message().contains("before the end of tensor \"a\"") && error.get(Key::Tensor) == Some("b")
    );
}

#[test]
fn the_message_lists_whole_tensors_and_refuses_a_foreign_manifest() {
    let manifest = plan_common::uniform(2, 3, 1000);
    let made = plan_broadcast(&manifest, &[0, 1]).unwrap();
    let message = bucket_message(&made, 0, &manifest).unwrap();
    let listed: Vec<(&str, u64)> = message.tensors.iter().map(|t| (&*t.meta.name, t.offset)).collect();
    assert_eq!(listed[..2], [("layers.0.of.0", 0), ("layers.1.of.0", 1024)]);
    assert_eq!(bucket_message(&made, 99, &manifest).unwrap_err().kind(), ErrorKind::Internal);
    assert!(bucket_message(&made, 0, &Manifest::default()).is_err());
}

/// A change that breaks one law of a plan.
type Damage = fn(&mut UpdatePlan);

#[test]
fn the_checker_finds_every_broken_law() {
    let manifest = plan_common::uniform(4, 60, 5 * MIB);
    let p2p = plan_p2p(&manifest, &[4, 5, 6], &[4, 6]).unwrap();
    check(&p2p, &manifest).unwrap();
    assert!(p2p.buckets.len() > 10 && p2p.buckets[9].waits_for.is_some());
    let damages: &[(&str, Damage)] = &[
        ("is never delivered", |p| p.buckets[2].segments.retain(|s| s.owner != 3)),
        ("is never delivered", |p| drop(p.buckets.pop())),
        ("sent before", |p| {
            p.buckets.push(Bucket { waits_for: Some(p.buckets.len() as u32 - 1), ..p.buckets[0].clone() })
        }),
        ("sent before", |p| p.buckets[1].segments[0].arena_offset -= 256),
        ("delivered before", |p| p.buckets[1].segments[0].tensors.start -= 1),
        ("does not wait", |p| p.buckets[9].waits_for = None),
        ("does not wait", |p| p.buckets[9].waits_for = p.buckets[9].waits_for.and_then(|w| w.checked_sub(1))),
        ("waits for itself", |p| p.buckets[9].waits_for = Some(9)),
        ("outside the ring", |p| p.ring_bytes -= p.ring_bytes / 4),
        ("outside its bucket", |p| p.buckets[1].len_bytes -= 256),
        ("overlaps", |p| p.buckets[1].segments[1].ring_offset -= 256),
        ("starts at", |p| p.buckets[1].segments[1].ring_offset += 8),
        ("is no member", |p| p.buckets[0].segments[0].root = 0),
        ("no arena", |p| p.buckets[0].segments[0].arena = 9),
        ("outside its arena", |p| p.buckets[0].segments[0].arena_offset = 1 << 40),
        ("more than", |p| p.bucket_bytes = MIB),
        ("owners", |p| p.window = 1),
        ("does not list", |p| p.buckets[0].segments[0].tensors.end -= 1),
        ("members", |p| p.members.reverse()),
        ("digest", |p| p.digest ^= 1),
        ("has no segments", |p| p.buckets[3].segments.clear()),
    ];
    for (expected, damage) in damages {
        let mut broken = p2p.clone();
        damage(&mut broken);
        let violation = check(&broken, &manifest).unwrap_err().to_string();
        assert!(violation.contains(expected), "expected {expected:?}, found {violation:?}");
    }
}

#[test]
fn the_checker_finds_a_tensor_that_is_not_whole() {
    let manifest = manifest([(0, vec![arena([bytes_meta("large", 64 * MIB)])])]);
    let made = plan_p2p(&manifest, &[1, 2], &[1, 2]).unwrap();
    check(&made, &manifest).unwrap();
    assert!(made.buckets[0].segments.len() > 1, "a large tensor is cut between receivers");
    let mut broken = made.clone();
    broken.buckets[0].segments.pop();
    assert!(check(&broken, &manifest).unwrap_err().to_string().contains("is not whole"));
    let mut broken = made;
    let second = broken.buckets[0].segments[1].clone();
    broken.buckets[0].segments.insert(1, second);
    assert!(check(&broken, &manifest).is_err());
}

#[test]
fn owner_by_owner_breaks_the_interleaving_law() {
    let manifest = plan_common::uniform(4, 30, 16 * MIB);
    let mut made = plan_p2p(&manifest, &[9], &[9]).unwrap();
    check_interleaving(&made).unwrap();
    made.buckets.iter_mut().for_each(|b| b.segments.sort_by_key(|s| s.owner));
    let mut segments: Vec<_> = made.buckets.iter().flat_map(|b| b.segments.clone()).collect();
    segments.sort_by_key(|s| s.owner);
    let one_each = segments.into_iter().map(|s| Bucket { segments: vec![s], ..made.buckets[0].clone() });
    made.buckets = one_each.collect();
    assert!(check_interleaving(&made).unwrap_err().to_string().contains("owner 0 has"));
}

/// A tensor too few and one too many, with and without replicas, which are looked up by name.
#[test]
fn coverage_is_checked_before_the_first_byte() {
    let names = |rank: Rank| (0..40).map(move |n| format!("layer.{rank}.{n}"));
    for shared in [0, 3] {
        let shares = (0..3).map(|rank| {
            let common = (0..shared).map(|n| format!("shared.{n}"));
            (rank, vec![arena(names(rank).chain(common).map(|name| bytes_meta(name, 64 * KIB)))])
        });
        let manifest = manifest(shares);
        let plan = plan_broadcast(&manifest, &[0, 1, 2]).unwrap();
        check_coverage(&plan, &manifest).unwrap();
        let (mut fewer, mut twice) = (plan.clone(), plan.clone());
        fewer.buckets[0].segments[0].tensors.end -= 1;
        let said = check_coverage(&fewer, &manifest).unwrap_err().to_string();
        assert!(said.contains("is never delivered"), "{said}");
        let again = twice.buckets[0].segments[0].clone();
        twice.buckets[0].segments.push(again);
        let said = check_coverage(&twice, &manifest).unwrap_err().to_string();
        assert!(said.contains("is delivered twice"), "{said}");
        let mut unknown = plan;
        unknown.buckets[0].segments[0].arena = 7;
        assert!(check_coverage(&unknown, &manifest).is_err());
    }
}
