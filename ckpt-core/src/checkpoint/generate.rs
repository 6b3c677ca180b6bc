//! Checkpoints made up for demos, tests and benchmarks: shapes of real models and bytes that anybody can recompute.

use std::sync::Arc;

use twox_hash::xxhash3_64::Hasher;

use crate::types::{DType, TensorMeta};

/// A meta from parts that are known to be valid.
fn meta(name: String, dtype: DType, shape: &[u64]) -> TensorMeta {
    TensorMeta { name: name.into(), dtype, shape: Arc::from(shape) }
}

/// The sizes that make a dense model of the Qwen3 family.
#[derive(Clone, Copy, Debug)]
struct Dense {
    layers: u64,
    hidden: u64,
    intermediate: u64,
    key_value: u64,
    head: u64,
    vocabulary: u64,
}

fn dense(size: Dense) -> impl Iterator<Item = TensorMeta> {
    let Dense { layers, hidden, intermediate, key_value, head, vocabulary } = size;
    let bf16 = |name: String, shape: &[u64]| meta(name, DType::BF16, shape);
    let layer = move |i: u64| {
        let shapes: [(&str, Vec<u64>); 11] = [
            ("self_attn.q_proj", vec![hidden, hidden]),
            ("self_attn.k_proj", vec![key_value, hidden]),
            ("self_attn.v_proj", vec![key_value, hidden]),
            ("self_attn.o_proj", vec![hidden, hidden]),
            ("mlp.gate_proj", vec![intermediate, hidden]),
            ("mlp.up_proj", vec![intermediate, hidden]),
            ("mlp.down_proj", vec![hidden, intermediate]),
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_norm", vec![head]),
            ("self_attn.k_norm", vec![head]),
        ];
        shapes.map(|(name, shape)| bf16(format!("model.layers.{i}.{name}.weight"), &shape))
    };
    std::iter::once(bf16("model.embed_tokens.weight".to_owned(), &[vocabulary, hidden]))
        .chain((0..layers).flat_map(layer))
        .chain([
            bf16("model.norm.weight".to_owned(), &[hidden]),
            bf16("lm_head.weight".to_owned(), &[vocabulary, hidden]),
        ])
}

/// Exactly the tensors of Qwen3-8B: 399 in bf16, 16.38 GB.
pub fn qwen3_8b_shapes() -> impl Iterator<Item = TensorMeta> {
    dense(Dense {
        layers: 36,
        hidden: 4096,
        intermediate: 12288,
        key_value: 1024,
        head: 128,
        vocabulary: 151_936,
    })
}

/// Tensors named and proportioned like Qwen3's, of about `total_bytes` (within 2% from 1 MiB on).
pub fn qwen_shaped(total_bytes: u64) -> impl Iterator<Item = TensorMeta> {
    // q and o: 2 h^2, k and v: h^2 / 2, three projections: 9 h^2, and the norms; two bytes each.
    let layer_bytes = |hidden: u64| 23 * hidden * hidden + 2 * (2 * hidden + 2 * (hidden / 32));
    // The widest model that still has a dozen layers, with about 15% of the bytes in the two embeddings.
    let layers_of = |hidden: u64| total_bytes / 20 * 17 / layer_bytes(hidden);
    let hidden =
        [8192, 4096, 2048, 1024, 512, 256, 128].into_iter().find(|h| layers_of(*h) >= 12).unwrap_or(64);
    let layers = layers_of(hidden).max(1);
    let rest = total_bytes.saturating_sub(layers * layer_bytes(hidden) + 2 * hidden);
    dense(Dense {
        layers,
        hidden,
        intermediate: 3 * hidden,
        key_value: hidden / 4,
        head: hidden / 32,
        vocabulary: (rest / (4 * hidden)).max(1),
    })
}

/// The tensors of Kimi-K2 in FP8 with block scales: 138,980 of them, 1.03 TB.
pub fn kimi_k2_shapes() -> impl Iterator<Item = TensorMeta> {
    const LAYERS: u64 = 61;
    const EXPERTS: u64 = 384;
    const HIDDEN: u64 = 7168;
    const VOCABULARY: u64 = 163_840;
    let scaled = |name: String, rows: u64, columns: u64| {
        [
            meta(format!("{name}.weight"), DType::F8_E4M3, &[rows, columns]),
            meta(
                format!("{name}.weight_scale_inv"),
                DType::F32,
                &[rows.div_ceil(128), columns.div_ceil(128)],
            ),
        ]
    };
    let attention = [
        ("q_a_proj", 1536, HIDDEN),
        ("q_b_proj", 12288, 1536),
        ("kv_a_proj_with_mqa", 576, HIDDEN),
        ("kv_b_proj", 16384, 512),
        ("o_proj", HIDDEN, 8192),
    ];
    let layer = move |l: u64| {
        let attention = attention
            .into_iter()
            .flat_map(move |(name, r, c)| scaled(format!("model.layers.{l}.self_attn.{name}"), r, c));
        let norms = ["input_layernorm", "post_attention_layernorm"]
            .into_iter()
            .map(move |name| meta(format!("model.layers.{l}.{name}.weight"), DType::BF16, &[HIDDEN]));
        // The first layer is dense.
        let experts = (0..if l == 0 { 1 } else { EXPERTS }).flat_map(move |e| {
            let (prefix, inner) = match l {
                0 => (format!("model.layers.{l}.mlp"), 18432),
                _ => (format!("model.layers.{l}.mlp.experts.{e}"), 2048),
            };
            [("gate_proj", inner, HIDDEN), ("up_proj", inner, HIDDEN), ("down_proj", HIDDEN, inner)]
                .into_iter()
                .flat_map(move |(name, r, c)| scaled(format!("{prefix}.{name}"), r, c))
        });
        attention.chain(norms).chain(experts)
    };
    let edge = |name: &str| std::iter::once(meta(name.to_owned(), DType::BF16, &[VOCABULARY, HIDDEN]));
    edge("model.embed_tokens.weight").chain((0..LAYERS).flat_map(layer)).chain(edge("lm_head.weight"))
}

/// `count` tensors of 256 bytes.
pub fn tiny(count: u64) -> impl Iterator<Item = TensorMeta> {
    (0..count)
        .map(|i| meta(format!("model.layers.{}.tensors.{}.weight", i / 1000, i % 1000), DType::BF16, &[128]))
}

/// Writes the bytes `at..at + out.len()` of a tensor. They depend on `seed`, name and position only.
///
/// The bytes look random; floats are finite and below 2 in magnitude, booleans are 0 or 1.
pub fn fill(meta: &TensorMeta, seed: u64, at: u64, out: &mut [u8]) {
    let key = Hasher::oneshot_with_seed(seed, meta.name.as_bytes());
    let mask = mask(meta.dtype);
    let word = |index: u64| {
        // SplitMix64, which is good and can start anywhere.
        let z = key.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) & mask).to_le_bytes()
    };
    let skip = (at % 8) as usize;
    let (head, body) = out.split_at_mut(out.len().min((8 - skip) % 8));
    head.copy_from_slice(&word(at / 8)[skip..skip + head.len()]);
    let first = at.div_ceil(8);
    let mut chunks = body.chunks_exact_mut(8);
    let mut index = first;
    for chunk in &mut chunks {
        chunk.copy_from_slice(&word(index));
        index += 1;
    }
    let tail = chunks.into_remainder();
    tail.copy_from_slice(&word(index)[..tail.len()]);
}

/// Clears the top bit of each float's exponent: what is left is neither infinite nor NaN.
const fn mask(dtype: DType) -> u64 {
    match dtype {
        DType::BOOL => 0x0101_0101_0101_0101,
        DType::F8_E5M2 | DType::F8_E4M3 | DType::F8_E4M3FNUZ | DType::F8_E5M2FNUZ => 0xbfbf_bfbf_bfbf_bfbf,
        // An exponent only: its top bit set would be 2^1 and more.
        DType::F8_E8M0 => 0x7f7f_7f7f_7f7f_7f7f,
        DType::F16 | DType::BF16 => 0xbfff_bfff_bfff_bfff,
        DType::F32 | DType::C64 => 0xbfff_ffff_bfff_ffff,
        DType::F64 => 0xbfff_ffff_ffff_ffff,
        _ => u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn total(tensors: impl Iterator<Item = TensorMeta>) -> (usize, u64) {
        tensors.fold((0, 0), |(n, bytes), t| (n + 1, bytes + t.len_bytes()))
    }

    #[test]
    fn models_have_their_published_sizes() {
        assert_eq!(total(qwen3_8b_shapes()), (399, 16_381_470_720));
        let (count, bytes) = total(kimi_k2_shapes());
        assert_eq!(count, 138_980);
        assert!((1.02e12..1.04e12).contains(&(bytes as f64)), "{bytes}");
        assert_eq!(total(tiny(1500)), (1500, 1500 * 256));
        let names: std::collections::HashSet<_> = kimi_k2_shapes().map(|t| t.name).collect();
        assert_eq!(names.len(), 138_980);
    }

    #[test]
    fn a_scaled_model_has_the_size_asked_for() {
        for mib in [1, 3, 16, 64, 512, 4096, 15_622, 100_000] {
            let wanted = mib << 20;
            let (count, bytes) = total(qwen_shaped(wanted));
            assert!(bytes.abs_diff(wanted) * 50 <= wanted, "{bytes} of {wanted}");
            assert!(count >= 14);
        }
        assert!(total(qwen_shaped(0)).1 > 0);
    }

    proptest! {
        #[test]
        fn any_part_is_the_same_as_in_the_whole(at in 0_u64..100, len in 0_usize..100, seed: u64) {
            let tensor = meta("w".to_owned(), DType::U8, &[256]);
            let mut whole = vec![0; 256];
            fill(&tensor, seed, 0, &mut whole);
            let mut part = vec![0; len];
            fill(&tensor, seed, at, &mut part);
            prop_assert_eq!(&part[..], &whole[at as usize..at as usize + len]);
        }
    }

    #[test]
    fn floats_are_finite_and_tensors_differ() {
        let bytes = |name: &str, dtype| {
            let mut out = vec![0; 4096];
            fill(&meta(name.to_owned(), dtype, &[1]), 7, 0, &mut out);
            out
        };
        let a = bytes("a", DType::F32);
        for value in a.chunks(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])) {
            assert!(value.abs() < 2.0, "{value}");
        }
        for value in bytes("a", DType::BF16).chunks(2) {
            let value = f32::from_bits(u32::from(u16::from_le_bytes([value[0], value[1]])) << 16);
            assert!(value.abs() < 2.0, "{value}");
        }
        assert!(bytes("a", DType::BOOL).iter().all(|b| *b < 2));
        assert_ne!(a, bytes("b", DType::F32));
        // Golden: every process and version must make the same bytes.
        let mut golden = [0; 8];
        fill(&meta("a".to_owned(), DType::U8, &[8]), 1, 0, &mut golden);
        assert_eq!(u64::from_le_bytes(golden), GOLDEN);
    }

    const GOLDEN: u64 = 5_074_229_845_462_555_245;
}
