//! Checkpoints with the shapes of real models.
#![allow(dead_code, reason = "each user uses some of it")]

use std::sync::Arc;

use ckpt_core::{
    DType, Rank,
    manifest::{Arena, Manifest, Share, Tensor},
    types::{TensorMeta, align_up},
};

/// The tensors of a checkpoint of Kimi-K2's size: 138,980 of them, about 1 TB in FP8.
pub fn kimi_k2() -> Vec<TensorMeta> {
    let (layers, experts, hidden) = (61, 384, 7168);
    let mut metas = Vec::new();
    let mut push = |name: String, dtype, rows: u64, columns: u64| {
        let shape: Vec<u64> = [rows, columns].into_iter().filter(|d| *d > 0).collect();
        metas.push(TensorMeta::new(name, dtype, shape).expect("the sizes are small"));
    };
    push("model.embed_tokens.weight".into(), DType::BF16, 163_840, hidden);
    for layer in 0..layers {
        let mut scaled = |name: String, rows: u64, columns: u64| {
            push(format!("{name}.weight"), DType::F8_E4M3, rows, columns);
            push(format!("{name}.weight_scale_inv"), DType::F32, rows.div_ceil(128), columns.div_ceil(128));
        };
        let layer_name = format!("model.layers.{layer}");
        for (name, rows, columns) in [
            ("q_a_proj", 1536, hidden),
            ("q_b_proj", 12_288, 1536),
            ("kv_a_proj_with_mqa", 576, hidden),
            ("kv_b_proj", 16_384, 512),
            ("o_proj", hidden, 8192),
        ] {
            scaled(format!("{layer_name}.self_attn.{name}"), rows, columns);
        }
        let mut mlp = |prefix: String, intermediate: u64| {
            scaled(format!("{prefix}.gate_proj"), intermediate, hidden);
            scaled(format!("{prefix}.up_proj"), intermediate, hidden);
            scaled(format!("{prefix}.down_proj"), hidden, intermediate);
        };
        if layer == 0 {
            mlp(format!("{layer_name}.mlp"), 18_432);
        } else {
            (0..experts).for_each(|expert| mlp(format!("{layer_name}.mlp.experts.{expert}"), 2048));
        }
        push(format!("{layer_name}.input_layernorm.weight"), DType::BF16, hidden, 0);
        push(format!("{layer_name}.post_attention_layernorm.weight"), DType::BF16, hidden, 0);
    }
    push("lm_head.weight".into(), DType::BF16, 163_840, hidden);
    metas
}

/// The 399 tensors of Qwen3-8B, 16.4 GB in bf16.
pub fn qwen3_8b() -> Vec<TensorMeta> {
    let hidden = 4096;
    let mut metas = Vec::new();
    let mut push = |name: String, shape: &[u64]| {
        metas.push(TensorMeta::new(name, DType::BF16, shape).expect("the sizes are small"));
    };
    push("model.embed_tokens.weight".into(), &[151_936, hidden]);
    for layer in 0..36 {
        for (name, shape) in [
            ("self_attn.q_proj", [4096, hidden].as_slice()),
            ("self_attn.k_proj", &[1024, hidden]),
            ("self_attn.v_proj", &[1024, hidden]),
            ("self_attn.o_proj", &[hidden, 4096]),
            ("self_attn.q_norm", &[128]),
            ("self_attn.k_norm", &[128]),
            ("mlp.gate_proj", &[12_288, hidden]),
            ("mlp.up_proj", &[12_288, hidden]),
            ("mlp.down_proj", &[hidden, 12_288]),
            ("input_layernorm", &[hidden]),
            ("post_attention_layernorm", &[hidden]),
        ] {
            push(format!("model.layers.{layer}.{name}.weight"), shape);
        }
    }
    push("model.norm.weight".into(), &[hidden]);
    push("lm_head.weight".into(), &[151_936, hidden]);
    metas
}

/// `count` tensors of 1 MiB.
pub fn many(count: u32) -> Vec<TensorMeta> {
    (0..count)
        .map(|i| {
            let name = format!("model.layers.{}.mlp.experts.{}.up_proj.weight", i / 4096, i % 4096);
            TensorMeta::new(name, DType::BF16, [512, 1024]).expect("small")
        })
        .collect()
}

/// Gives each rank a run of tensors with about the same number of bytes.
pub fn split(metas: Vec<TensorMeta>, world_size: u32) -> Manifest {
    let total: u64 = metas.iter().map(TensorMeta::len_bytes).sum();
    let mut arenas: Vec<Arena> = (0..world_size).map(|_| Arena::default()).collect();
    let mut before = 0;
    for meta in metas {
        let len_bytes = meta.len_bytes();
        let middle = u128::from(before + len_bytes / 2);
        let rank = middle * u128::from(world_size) / u128::from(total);
        let arena = &mut arenas[rank as usize];
        let offset = arena.len_bytes;
        arena.tensors.push(Tensor { meta, offset });
        arena.len_bytes += align_up(len_bytes);
        before += len_bytes;
    }
    let shares =
        arenas.into_iter().zip(0..).map(|(a, rank): (_, Rank)| (rank, Arc::new(Share { arenas: vec![a] })));
    Manifest { shares: shares.collect() }
}
