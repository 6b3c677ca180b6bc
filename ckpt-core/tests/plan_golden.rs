//! Small plans as they were reviewed once. `CKPT_REGENERATE_GOLDEN=1` writes them anew; read the difference before it
//! is committed, for ranks of different versions must not make different plans.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod plan_common;

use std::{fs, path::Path};

use ckpt_core::{
    DType, Rank,
    manifest::{Arena, Manifest, Tensor},
    plan::{Method, PlanInput, PlanLimits, UpdatePlan, check, plan},
    types::TensorMeta,
};
use plan_common::{GIB, KIB, MIB, arena, bytes_meta, manifest};

fn compare(name: &str, manifest: &Manifest, made: &UpdatePlan) {
    check(made, manifest).unwrap();
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/plan").join(name).with_extension("json");
    if std::env::var_os("CKPT_REGENERATE_GOLDEN").is_some() {
        let mut text = serde_json::to_string_pretty(made).unwrap();
        text.push('\n');
        fs::write(&path, text).unwrap();
    }
    let golden: UpdatePlan = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    assert_eq!(made, &golden, "{name} has changed");
}

fn make(manifest: &Manifest, members: &[Rank], limits: PlanLimits, method: Method) -> UpdatePlan {
    plan(&PlanInput { manifest, members, free_bytes: GIB, limits, method }).unwrap()
}

fn small_buckets() -> PlanLimits {
    PlanLimits { target_bucket_bytes: 4 * MIB, ring_slack_bytes: 12 * MIB, ..PlanLimits::default() }
}

#[test]
fn empty() {
    let manifest = Manifest::default();
    compare("empty", &manifest, &make(&manifest, &[0, 1], PlanLimits::default(), Method::Broadcast));
}

#[test]
fn one_rank_with_scalars_and_empty_tensors() {
    let metas = [
        TensorMeta::new("scalar", DType::F32, []).unwrap(),
        TensorMeta::new("empty", DType::BF16, [0, 7]).unwrap(),
        TensorMeta::new("matrix", DType::BF16, [3, 5]).unwrap(),
        TensorMeta::new("last.empty", DType::I64, [0]).unwrap(),
    ];
    let manifest = manifest([(3, vec![arena(metas), Arena::default()])]);
    compare("scalars", &manifest, &make(&manifest, &[3, 4], PlanLimits::default(), Method::Broadcast));
}

#[test]
fn four_owners_round_the_ring() {
    let manifest = manifest((0..4).map(|rank| {
        let sizes = [3 * MIB, 700 * KIB, 0, MIB + 100, 2 * MIB, 9 * MIB * u64::from(rank == 2), 500_000, 17];
        let metas = (0..).zip(sizes).map(|(i, len): (u32, u64)| bytes_meta(format!("{rank}.{i}"), len));
        (rank, vec![arena(metas)])
    }));
    compare("four_owners", &manifest, &make(&manifest, &[0, 1, 2, 3], small_buckets(), Method::Broadcast));
    let method = Method::P2p { receivers: vec![4, 6] };
    compare("four_owners_p2p", &manifest, &make(&manifest, &[4, 5, 6, 7], small_buckets(), method));
}

#[test]
fn replicas_and_files_in_place() {
    // Rank 0 has its file in place: natural alignment, and a hole.
    let in_place = Arena {
        len_bytes: 40 * KIB,
        tensors: [
            (8, DType::BF16, 7),
            (24, DType::F32, 3),
            (36, DType::BF16, 1),
            (38, DType::F32, 1),
            (20_000, DType::I64, 9),
        ]
        .iter()
        .enumerate()
        .map(|(i, (offset, dtype, elements))| Tensor {
            meta: TensorMeta::new(format!("in_place.{i}"), *dtype, [*elements]).unwrap(),
            offset: if i == 3 { 38 } else { *offset },
        })
        .collect(),
    };
    let shared = || (0..6).map(|i| bytes_meta(format!("shared.{i}"), 100 * KIB));
    let manifest = manifest([
        (0, vec![in_place, arena(shared())]),
        (1, vec![arena(shared())]),
        (5, vec![arena(shared())]),
    ]);
    compare("replicas", &manifest, &make(&manifest, &[0, 1, 5], small_buckets(), Method::Broadcast));
}
