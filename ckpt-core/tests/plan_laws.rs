//! The laws of a plan, on random manifests.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod plan_common;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use ckpt_core::{
    DType, Rank,
    manifest::{Arena, Manifest, Share, Tensor},
    plan::{
        Method, PlanError, PlanInput, PlanLimits, UpdatePlan, bucket_message, check, check_interleaving, plan,
    },
    types::{TensorMeta, align_up},
};
use plan_common::{GIB, KIB, MIB};
use proptest::prelude::*;

/// How a random tensor is laid out after the one before it.
#[derive(Clone, Copy, Debug)]
enum Padding {
    Aligned,
    Natural,
    Gap(u64),
}

/// dtype, elements, padding, and whether the name is shared between ranks.
type RandomTensor = (DType, u64, Padding, bool);

fn tensor(largest: u64) -> impl Strategy<Value = RandomTensor> {
    let dtype = prop::sample::select(vec![DType::BF16, DType::F32, DType::F8_E4M3, DType::I64, DType::BOOL]);
    let elements = prop_oneof![
        1 => Just(0_u64),
        2 => 1_u64..300,
        4 => 1..largest / 64,
        2 => 1..largest,
    ];
    let padding = prop_oneof![
        6 => Just(Padding::Aligned),
        2 => Just(Padding::Natural),
        1 => (0_u64..20 * KIB).prop_map(Padding::Gap),
    ];
    (dtype, elements, padding, prop::bool::weighted(0.2))
}

/// Up to 7 ranks, some without a share. Shared names have the same dtype and shape everywhere.
fn manifests(largest: u64) -> impl Strategy<Value = Manifest> {
    let arena = prop::collection::vec(tensor(largest), 0..14);
    let share = prop::option::weighted(0.8, prop::collection::vec(arena, 0..3));
    prop::collection::vec(share, 1..8).prop_map(|ranks| {
        let mut shared: Vec<TensorMeta> = Vec::new();
        let mut shares = BTreeMap::new();
        for (rank, arenas) in ranks.into_iter().enumerate() {
            let Some(arenas) = arenas else { continue };
            let (mut share, mut replicas) = (Share::default(), 0);
            for (number, tensors) in arenas.into_iter().enumerate() {
                let mut arena = Arena::default();
                for (index, (dtype, elements, padding, is_shared)) in tensors.into_iter().enumerate() {
                    let meta = if is_shared {
                        if shared.len() == replicas {
                            let name = format!("shared.{replicas}");
                            shared.push(TensorMeta::new(name, dtype, [elements]).unwrap());
                        }
                        replicas += 1;
                        shared[replicas - 1].clone()
                    } else {
                        TensorMeta::new(format!("{rank}.{number}.{index}"), dtype, [elements]).unwrap()
                    };
                    let end = arena.len_bytes;
                    let offset = match padding {
                        Padding::Aligned => align_up(end),
                        Padding::Natural => end.next_multiple_of(u64::from(meta.dtype.bits() / 8)),
                        Padding::Gap(gap) => end + gap,
                    };
                    arena.len_bytes = offset + meta.len_bytes();
                    arena.tensors.push(Tensor { meta, offset });
                }
                share.arenas.push(arena);
            }
            shares.insert(rank as Rank, Arc::new(share));
        }
        Manifest { shares }
    })
}

fn limits(target: impl Strategy<Value = u64>) -> impl Strategy<Value = PlanLimits> {
    let window = prop::option::of(1_u32..10);
    (target, 0..600 * MIB, 1..200 * MIB, window, 100_u32..=1000).prop_map(
        |(target_bucket_bytes, ring_slack_bytes, max_bucket_bytes, window, mem_permille)| PlanLimits {
            mem_permille,
            max_bucket_bytes: max_bucket_bytes.max(256),
            target_bucket_bytes,
            ring_slack_bytes,
            window,
        },
    )
}

const MEMBERS: [Rank; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

fn largest_tensor(manifest: &Manifest) -> u64 {
    manifest.tensors().map(|(_, t)| align_up(t.meta.len_bytes())).max().unwrap_or(0)
}

fn names(manifest: &Manifest) -> BTreeSet<&str> {
    manifest.tensors().map(|(_, t)| &*t.meta.name).collect()
}

/// Runs a plan over real bytes: every tensor as a worker would find it in the ring.
fn execute(plan: &UpdatePlan, manifest: &Manifest) -> BTreeMap<Arc<str>, Vec<u8>> {
    let mut ring = vec![0xEE_u8; plan.ring_bytes as usize];
    let mut tensors = BTreeMap::new();
    let mut hosts = BTreeMap::new();
    for (number, bucket) in plan.buckets.iter().enumerate() {
        ring[bucket.ring_offset as usize..][..bucket.len_bytes as usize].fill(0xEE);
        for segment in &bucket.segments {
            let arena = &manifest.shares[&segment.owner].arenas[segment.arena as usize];
            let bytes = hosts
                .entry((segment.owner, segment.arena))
                .or_insert_with(|| host_bytes(segment.owner, segment.arena, arena));
            let source = &bytes[segment.arena_offset as usize..][..segment.len_bytes as usize];
            ring[segment.ring_offset as usize..][..source.len()].copy_from_slice(source);
        }
        for tensor in bucket_message(plan, number as u32, manifest).unwrap().tensors {
            let bytes = ring[tensor.offset as usize..][..tensor.meta.len_bytes() as usize].to_vec();
            assert!(tensors.insert(tensor.meta.name, bytes).is_none());
        }
    }
    tensors
}

/// Bytes that depend on the name of the tensor that they belong to, so that replicas are equal and all else differs.
fn host_bytes(owner: Rank, number: u32, arena: &Arena) -> Vec<u8> {
    let mut bytes = vec![owner as u8 ^ number as u8; arena.len_bytes as usize];
    for tensor in &arena.tensors {
        let range = tensor.offset as usize..(tensor.offset + tensor.meta.len_bytes()) as usize;
        bytes[range].copy_from_slice(&tensor_bytes(&tensor.meta));
    }
    bytes
}

fn tensor_bytes(meta: &TensorMeta) -> Vec<u8> {
    let seed = meta.name.bytes().fold(7_u32, |h, b| h.wrapping_mul(31).wrapping_add(u32::from(b)));
    (0..meta.len_bytes()).map(|i| (seed.wrapping_mul(i as u32 | 1) >> 13) as u8).collect()
}

fn expected_tensors(manifest: &Manifest) -> BTreeMap<Arc<str>, Vec<u8>> {
    manifest.tensors().map(|(_, t)| (t.meta.name.clone(), tensor_bytes(&t.meta))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_plan_keeps_the_laws(
        manifest in manifests(40 * MIB),
        limits in limits(prop_oneof![256_u64..MIB, MIB..256 * MIB]),
        spare in prop_oneof![Just(u64::MAX / 2), 0..800 * MIB],
        receivers in prop::sample::subsequence(MEMBERS.to_vec(), 0..6),
    ) {
        let largest = largest_tensor(&manifest);
        let free_bytes = (largest.max(256) + 256).div_ceil(u64::from(limits.mem_permille)) * 1000 + spare;
        let method = if receivers.is_empty() { Method::Broadcast } else { Method::P2p { receivers: receivers.clone() } };
        let input = PlanInput { manifest: &manifest, members: &MEMBERS, free_bytes, limits: limits.clone(), method };
        let made = plan(&input).unwrap();
        check(&made, &manifest).unwrap();
        check_waits_are_exact(&made)?;

        let usable = u128::from(free_bytes) * u128::from(limits.mem_permille) / 1000;
        prop_assert!(u128::from(made.ring_bytes) <= usable);
        prop_assert!(made.ring_bytes <= largest.max(256) + limits.ring_slack_bytes);
        prop_assert!(made.bucket_bytes <= limits.max_bucket_bytes.min(limits.target_bucket_bytes).max(256));
        prop_assert_eq!(made.buckets.is_empty(), names(&manifest).is_empty());
        for segment in made.buckets.iter().flat_map(|b| &b.segments) {
            if receivers.is_empty() {
                prop_assert_eq!(segment.root, segment.owner);
            } else {
                prop_assert!(receivers.contains(&segment.root));
            }
        }
        prop_assert_eq!(plan(&input).unwrap(), made, "the same input gives the same plan");
    }

    #[test]
    fn the_order_of_insertion_changes_nothing(manifest in manifests(4 * MIB), keys in prop::collection::vec(any::<u32>(), 8)) {
        let mut shares: Vec<_> = manifest.shares.iter().map(|(rank, share)| (*rank, share.clone())).collect();
        shares.sort_by_key(|(rank, _)| keys[*rank as usize]);
        let mut permuted = Manifest::default();
        for (rank, share) in shares {
            permuted.shares.insert(rank, share);
        }
        let (a, b) = (plan_common::plan_broadcast(&manifest, &MEMBERS), plan_common::plan_broadcast(&permuted, &MEMBERS));
        prop_assert_eq!(a.clone().unwrap().digest, b.clone().unwrap().digest);
        prop_assert_eq!(a, b);
    }

    #[test]
    fn p2p_to_all_leaves_the_bytes_of_a_broadcast(
        manifest in manifests(20 * KIB),
        target in 256_u64..60 * KIB,
        receivers in prop::sample::subsequence(MEMBERS.to_vec(), 1..6),
        slack in 0_u64..90 * KIB,
    ) {
        let limits = PlanLimits { target_bucket_bytes: target, ring_slack_bytes: slack, ..PlanLimits::default() };
        let with = |method| plan(&PlanInput {
            manifest: &manifest, members: &MEMBERS, free_bytes: GIB, limits: limits.clone(), method,
        }).unwrap();
        let (broadcast, p2p) = (with(Method::Broadcast), with(Method::P2p { receivers }));
        check(&broadcast, &manifest).unwrap();
        check(&p2p, &manifest).unwrap();
        let expected = expected_tensors(&manifest);
        prop_assert_eq!(&execute(&broadcast, &manifest), &expected);
        prop_assert_eq!(&execute(&p2p, &manifest), &expected);
    }

    #[test]
    fn receivers_have_equal_loads(
        sizes in prop::collection::vec(prop::collection::vec(1_u64..300 * MIB, 1..40), 1..9),
        count in 2_u32..9,
    ) {
        let manifest = plan_common::manifest((0_u32..).zip(sizes).map(|(rank, sizes)| {
            let metas = (0..).zip(sizes).map(|(i, len): (u32, u64)| plan_common::bytes_meta(format!("{rank}.{i}"), len));
            (rank, vec![plan_common::arena(metas)])
        }));
        let receivers: Vec<Rank> = (100..100 + count).collect();
        let made = plan_common::plan_p2p(&manifest, &receivers, &receivers).unwrap();
        check(&made, &manifest).unwrap();
        let mut loads: BTreeMap<Rank, u64> = receivers.iter().map(|r| (*r, 0)).collect();
        for segment in made.buckets.iter().flat_map(|b| &b.segments) {
            *loads.get_mut(&segment.root).unwrap() += segment.len_bytes;
        }
        let fair = loads.values().sum::<u64>() / u64::from(count);
        let largest_piece = (fair / 50).clamp(64 * KIB, 256 * MIB);
        for segment in made.buckets.iter().flat_map(|b| &b.segments) {
            prop_assert!(segment.len_bytes <= largest_piece + 256, "{} > {largest_piece}", segment.len_bytes);
        }
        prop_assert!(*loads.values().max().unwrap() <= fair + largest_piece + 512);
    }

    #[test]
    fn hostile_manifests_give_errors_or_lawful_plans(
        shares in prop::collection::btree_map(any::<u32>(), prop::collection::vec(
            (any::<u64>(), prop::collection::vec((any::<u64>(), prop::collection::vec(any::<u64>(), 0..4), 0_usize..22, 0_u8..20), 0..6)),
            0..4), 0..4),
        free_bytes in any::<u64>(),
        small in any::<u8>(),
        receivers in 1_u32..4,
        limits in (any::<u32>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<Option<u32>>()),
    ) {
        // The shift lets small values come up as often as huge ones.
        let scale = |n: u64, by: u8| n >> (u32::from(by ^ small) % 64);
        let shares = shares.into_iter().map(|(rank, arenas)| {
            let arenas = arenas.into_iter().map(|(len_bytes, tensors)| Arena {
                len_bytes,
                tensors: tensors.into_iter().map(|(offset, shape, dtype, name)| Tensor {
                    meta: TensorMeta {
                        name: format!("{}", name).into(),
                        dtype: DType::ALL[dtype],
                        shape: shape.iter().map(|d| scale(*d, name.wrapping_mul(13))).collect(),
                    },
                    offset: scale(offset, name),
                }).collect(),
            }).collect();
            (rank, Arc::new(Share { arenas }))
        });
        let manifest = Manifest { shares: shares.collect() };
        let (mem_permille, max_bucket_bytes, target_bucket_bytes, ring_slack_bytes, window) = limits;
        let limits = PlanLimits { mem_permille: mem_permille % 1200, max_bucket_bytes, target_bucket_bytes, ring_slack_bytes, window };
        let members: Vec<Rank> = manifest.shares.keys().copied().chain([u32::MAX]).collect::<BTreeSet<_>>().into_iter().collect();
        let receivers = members.iter().rev().take(receivers as usize).copied().collect();
        for method in [Method::Broadcast, Method::P2p { receivers }] {
            let input = PlanInput { manifest: &manifest, members: &members, free_bytes, limits: limits.clone(), method };
            match plan(&input) {
                Ok(made) => check(&made, &manifest).unwrap(),
                Err(error) => {
                    let text = ckpt_core::Error::from(error).to_string();
                    prop_assert!(!text.contains('\n'), "{text}");
                }
            }
        }
    }
}

/// `waits_for` is the last earlier bucket with overlapping bytes: later would stall, earlier would corrupt.
fn check_waits_are_exact(plan: &UpdatePlan) -> Result<(), TestCaseError> {
    for (j, bucket) in plan.buckets.iter().enumerate() {
        let end = bucket.ring_offset + bucket.len_bytes;
        let last = plan.buckets[..j].iter().rposition(|b| {
            let overlap_start = b.ring_offset.max(bucket.ring_offset);
            overlap_start < end.min(b.ring_offset + b.len_bytes)
        });
        prop_assert_eq!(bucket.waits_for, last.map(|i| i as u32), "bucket {}", j);
    }
    Ok(())
}

#[test]
fn buckets_have_many_owners_and_many_are_in_flight() {
    for (ranks, count, len_bytes) in
        [(2, 200, 16 * MIB), (8, 100, 16 * MIB), (64, 20, 5 * MIB), (8, 2000, 300 * KIB)]
    {
        let manifest = plan_common::uniform(ranks, count, len_bytes);
        let members: Vec<Rank> = (0..ranks).collect();
        let made = plan_common::plan_broadcast(&manifest, &members).unwrap();
        check(&made, &manifest).unwrap();
        check_interleaving(&made).unwrap();
        assert!(made.ring_bytes <= len_bytes + 512 * MIB);
        let full = &made.buckets[..made.buckets.len() - 1];
        let mut shallow = 0;
        for (number, bucket) in full.iter().enumerate() {
            let owners: BTreeSet<Rank> = bucket.segments.iter().map(|s| s.owner).collect();
            assert_eq!(owners.len(), ranks.min(8) as usize, "{ranks} ranks, bucket {number}");
            assert_eq!(bucket.segments.len(), owners.len(), "one copy for each owner");
            let in_flight = bucket.waits_for.map_or(usize::MAX, |w| number - w as usize);
            assert!(in_flight >= 3, "{ranks} ranks, bucket {number}: {in_flight}");
            shallow += usize::from(in_flight < 4);
        }
        assert!(
            shallow * 10 <= full.len(),
            "{shallow} of {} buckets have fewer than 4 in flight",
            full.len()
        );
    }
}

#[test]
fn unequal_owners_end_together() {
    let sizes = [400_u32, 100, 50, 200, 10];
    let manifest = plan_common::manifest((0..).zip(sizes).map(|(rank, count): (u32, u32)| {
        let metas = (0..count).map(|i| plan_common::bytes_meta(format!("{rank}.{i}"), 2 * MIB));
        (rank, vec![plan_common::arena(metas)])
    }));
    let made = plan_common::plan_broadcast(&manifest, &[0, 1, 2, 3, 4]).unwrap();
    check(&made, &manifest).unwrap();
    let half: &[_] = &made.buckets[..made.buckets.len() / 2];
    for (rank, count) in (0_u32..).zip(sizes) {
        let sent: u64 =
            half.iter().flat_map(|b| &b.segments).filter(|s| s.owner == rank).map(|s| s.len_bytes).sum();
        let part = sent as f64 / (u64::from(count) * 2 * MIB) as f64;
        assert!((0.4..=0.6).contains(&part), "rank {rank} has sent {part} of its bytes in half of the plan");
    }
}

#[test]
fn short_memory_makes_small_rings_and_at_last_an_error() {
    let mut arenas =
        vec![plan_common::arena((0..64).map(|i| plan_common::bytes_meta(format!("t{i}"), 3 * MIB)))];
    arenas.push(plan_common::arena([plan_common::bytes_meta("embed", 100 * MIB)]));
    let manifest = plan_common::manifest([(0, arenas)]);
    let with = |free_bytes| {
        let limits = PlanLimits { mem_permille: 1000, ..PlanLimits::default() };
        plan(&PlanInput {
            manifest: &manifest,
            members: &[0, 1],
            free_bytes,
            limits,
            method: Method::Broadcast,
        })
    };
    let mut last = u64::MAX;
    for free in [GIB, 200 * MIB, 120 * MIB, 100 * MIB] {
        let made = with(free).unwrap();
        check(&made, &manifest).unwrap();
        assert!(made.ring_bytes <= free && made.bucket_bytes <= last);
        last = made.bucket_bytes;
    }
    let error = with(100 * MIB - 1).unwrap_err();
    assert!(
        matches!(&error, PlanError::NoMemory { tensor, needed, .. } if tensor == "embed" && *needed == 100 * MIB)
    );
    let error = ckpt_core::Error::from(error);
    assert_eq!(error.kind(), ckpt_core::ErrorKind::ResourceExhausted);
    assert_eq!(error.get(ckpt_core::Key::Tensor), Some("embed"));
    assert!(
        error.to_string().contains("104857600 bytes") && error.to_string().contains("104857599 free"),
        "{error}"
    );
}
