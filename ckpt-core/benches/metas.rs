//! Metas of Kimi-K2's 138,980 tensors: the compact form and JSON, and the split between ranks.
#![allow(missing_docs, reason = "the criterion macros make undocumented functions")]
#![allow(clippy::unwrap_used, reason = "a benchmark ends at the first surprise")]

use std::{collections::BTreeMap, sync::Arc};

use ckpt_core::{
    checkpoint::{generate, split},
    manifest::{Arena, Share, Tensor},
    metas::{Extension, Metas, Placement, RankMetas},
    types::{TensorMeta, align_up},
};
use criterion::{Criterion, criterion_group, criterion_main};

fn metas(tensors: &[TensorMeta], world_size: u32) -> Metas {
    let parts = split(tensors.iter().map(TensorMeta::len_bytes), world_size).unwrap();
    let rank = |part: &[TensorMeta]| {
        let mut arena = Arena::default();
        for meta in part {
            arena.tensors.push(Tensor { meta: meta.clone(), offset: arena.len_bytes });
            arena.len_bytes += align_up(meta.len_bytes());
        }
        let placement = Placement {
            p2p_store_addr: Some("10.0.0.1:15428".into()),
            rdma_device: "mlx5_0".into(),
            arena_addresses: vec![1 << 40],
            extension: Some(Extension { host: "node".into(), ..Extension::default() }),
        };
        RankMetas::new(Arc::new(Share { arenas: vec![arena] }), placement).unwrap()
    };
    let ranks: BTreeMap<_, _> = (0..).zip(parts.into_iter().map(|p| rank(&tensors[p]))).collect();
    Metas { ranks }
}

fn benchmark(c: &mut Criterion) {
    let tensors: Vec<TensorMeta> = generate::kimi_k2_shapes().collect();
    let mut group = c.benchmark_group("metas");
    group.sample_size(20);
    for world_size in [16, 256] {
        let metas = metas(&tensors, world_size);
        let compact = metas.encode().unwrap();
        let json = metas.to_json().unwrap();
        assert!(compact.len() <= 2_000_000);
        assert_eq!(Metas::decode(&compact).unwrap(), metas);
        println!(
            "{} tensors on {world_size} ranks: {} bytes, JSON {}",
            tensors.len(),
            compact.len(),
            json.len()
        );
        group.bench_function(format!("encode_and_decode/{world_size}"), |b| {
            b.iter(|| Metas::decode(&metas.encode().unwrap()).unwrap())
        });
        group.bench_function(format!("encode/{world_size}"), |b| b.iter(|| metas.encode().unwrap()));
        group.bench_function(format!("decode/{world_size}"), |b| b.iter(|| Metas::decode(&compact).unwrap()));
        group.bench_function(format!("to_json/{world_size}"), |b| b.iter(|| metas.to_json().unwrap()));
        group.bench_function(format!("from_json/{world_size}"), |b| {
            b.iter(|| Metas::from_json(json.as_bytes()).unwrap())
        });
    }
    group.bench_function("split/256", |b| {
        b.iter(|| split(tensors.iter().map(TensorMeta::len_bytes), 256).unwrap())
    });
    group.finish();
}

criterion_group!(benches, benchmark);
criterion_main!(benches);
