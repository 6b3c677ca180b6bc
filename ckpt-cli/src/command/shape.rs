//! Checkpoints that are measured or planned without files: the shapes of models.

use std::{str::FromStr, sync::Arc};

use ckpt_core::{
    checkpoint::generate,
    types::{DType, TensorMeta},
};

/// What `--shape` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Exactly Qwen3-8B: 16.38 GB.
    Qwen3Of8B,
    /// Qwen-shaped, of about so many MiB.
    Qwen(u64),
    /// So many tensors of 256 bytes.
    Tiny(u64),
    /// The 138,980 names of Kimi-K2 with every dimension an eighth: about 16 GB.
    KimiSmall,
    /// All of Kimi-K2: 1.03 TB. To plan with, hardly to measure.
    KimiK2,
    /// A mixture of experts of about this published size.
    Moe(&'static Moe),
}

/// The sizes that make a mixture of experts. They are proportions to plan with, not the model's exact list of tensors.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Moe {
    name: &'static str,
    layers: u64,
    /// The first layers have no experts.
    dense: u64,
    dense_inner: u64,
    hidden: u64,
    experts: u64,
    inner: u64,
    attention: u64,
    vocabulary: u64,
    dtype: DType,
}

static MODELS: [Moe; 3] = [
    Moe {
        name: "glm-4.5-air",
        layers: 47,
        dense: 1,
        dense_inner: 10_944,
        hidden: 4096,
        experts: 129,
        inner: 1408,
        attention: 12_288,
        vocabulary: 151_552,
        dtype: DType::BF16,
    },
    Moe {
        name: "qwen3-235b",
        layers: 94,
        dense: 0,
        dense_inner: 0,
        hidden: 4096,
        experts: 128,
        inner: 1536,
        attention: 8192,
        vocabulary: 151_936,
        dtype: DType::BF16,
    },
    Moe {
        name: "deepseek-v3.1",
        layers: 62,
        dense: 3,
        dense_inner: 18_432,
        hidden: 7168,
        experts: 257,
        inner: 2048,
        attention: 11_000,
        vocabulary: 129_280,
        dtype: DType::F8_E4M3,
    },
];

impl Moe {
    fn tensors(&self) -> Vec<TensorMeta> {
        let meta = |name: String, dtype, rows: u64, columns: u64| TensorMeta {
            name: name.into(),
            dtype,
            shape: Arc::from([rows, columns]),
        };
        let edge = |name: &str| meta(name.to_owned(), DType::BF16, self.vocabulary, self.hidden);
        let mut all = vec![edge("model.embed_tokens.weight")];
        for layer in 0..self.layers {
            let mut push = |name: String, rows, columns| {
                all.push(meta(format!("model.layers.{layer}.{name}.weight"), self.dtype, rows, columns));
            };
            push("self_attn.q_proj".to_owned(), self.attention, self.hidden);
            push("self_attn.kv_proj".to_owned(), 2048, self.hidden);
            push("self_attn.o_proj".to_owned(), self.hidden, self.attention);
            let (experts, inner) = match layer < self.dense {
                true => (1, self.dense_inner),
                false => (self.experts, self.inner),
            };
            for expert in 0..experts {
                for (part, rows, columns) in
                    [("gate", inner, self.hidden), ("up", inner, self.hidden), ("down", self.hidden, inner)]
                {
                    push(format!("mlp.experts.{expert}.{part}_proj"), rows, columns);
                }
            }
        }
        all.push(edge("lm_head.weight"));
        all
    }
}

/// What `--shape` takes.
const NAMES: &str =
    "qwen3-8b, qwen:MIB, tiny:COUNT, kimi-small, kimi-k2, glm-4.5-air, qwen3-235b or deepseek-v3.1";

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str, most: u64| match text.parse::<u64>() {
            Ok(number) if (1..=most).contains(&number) => Ok(number),
            _ => Err(format!("`{text}` is no number from 1 to {most}")),
        };
        match text.split_once(':') {
            None if text == "qwen3-8b" => Ok(Self::Qwen3Of8B),
            None if text == "kimi-small" => Ok(Self::KimiSmall),
            None if text == "kimi-k2" => Ok(Self::KimiK2),
            Some(("qwen", mib)) => Ok(Self::Qwen(number(mib, 1 << 20)?)),
            Some(("tiny", count)) => Ok(Self::Tiny(number(count, 10_000_000)?)),
            _ => MODELS
                .iter()
                .find(|model| model.name == text)
                .map(Self::Moe)
                .ok_or_else(|| format!("write {NAMES}")),
        }
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Qwen3Of8B => f.write_str("qwen3-8b"),
            Self::Qwen(mib) => write!(f, "qwen:{mib}"),
            Self::Tiny(count) => write!(f, "tiny:{count}"),
            Self::KimiSmall => f.write_str("kimi-small"),
            Self::KimiK2 => f.write_str("kimi-k2"),
            Self::Moe(model) => f.write_str(model.name),
        }
    }
}

impl Shape {
    /// Its tensors.
    pub(crate) fn tensors(self) -> Vec<TensorMeta> {
        match self {
            Self::Qwen3Of8B => generate::qwen3_8b_shapes().collect(),
            Self::Qwen(mib) => generate::qwen_shaped(mib << 20).collect(),
            Self::Tiny(count) => generate::tiny(count).collect(),
            Self::KimiSmall => generate::kimi_k2_shapes().map(|meta| eighth(&meta)).collect(),
            Self::KimiK2 => generate::kimi_k2_shapes().collect(),
            Self::Moe(model) => model.tensors(),
        }
    }
}

fn eighth(meta: &TensorMeta) -> TensorMeta {
    let shape: Vec<u64> = meta.shape.iter().map(|n| n.div_ceil(8)).collect();
    TensorMeta { name: meta.name.clone(), dtype: meta.dtype, shape: Arc::from(shape) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_read_back_and_have_their_sizes() {
        for text in ["qwen3-8b", "qwen:64", "tiny:1000", "kimi-small", "kimi-k2", "glm-4.5-air"] {
            assert_eq!(text.parse::<Shape>().unwrap().to_string(), text);
        }
        for text in ["", "qwen", "qwen:", "qwen:0", "tiny:-1", "llama:3", "kimi-small:1"] {
            assert!(text.parse::<Shape>().is_err(), "{text}");
        }
        let kimi = Shape::KimiSmall.tensors();
        let bytes: u64 = kimi.iter().map(TensorMeta::len_bytes).sum();
        assert_eq!(kimi.len(), 138_980);
        assert!((14_000_000_000..18_000_000_000).contains(&bytes), "{bytes}");
        assert_eq!(Shape::Tiny(7).tensors().len(), 7);
        // The published sizes, within 5%.
        for (name, gb) in [("glm-4.5-air", 221.0), ("qwen3-235b", 470.0), ("deepseek-v3.1", 689.0)] {
            let shape: Shape = name.parse().unwrap();
            let bytes: u64 = shape.tensors().iter().map(TensorMeta::len_bytes).sum();
            let ratio = bytes as f64 / 1e9 / gb;
            assert!((0.95..1.05).contains(&ratio), "{name}: {ratio:.3}");
        }
    }
}
