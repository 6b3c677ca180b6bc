//! The checkpoints that are measured: shapes of models, with made-up bytes.

use std::{str::FromStr, sync::Arc};

use ckpt_core::{checkpoint::generate, types::TensorMeta};

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
}

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
            Some(("qwen", mib)) => Ok(Self::Qwen(number(mib, 1 << 20)?)),
            Some(("tiny", count)) => Ok(Self::Tiny(number(count, 10_000_000)?)),
            _ => Err("write qwen3-8b, qwen:MIB, tiny:COUNT or kimi-small".to_owned()),
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
        }
    }
}

impl Shape {
    /// Its tensors.
    pub(super) fn tensors(self) -> Vec<TensorMeta> {
        match self {
            Self::Qwen3Of8B => generate::qwen3_8b_shapes().collect(),
            Self::Qwen(mib) => generate::qwen_shaped(mib << 20).collect(),
            Self::Tiny(count) => generate::tiny(count).collect(),
            Self::KimiSmall => generate::kimi_k2_shapes().map(|meta| eighth(&meta)).collect(),
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
        for text in ["qwen3-8b", "qwen:64", "tiny:1000", "kimi-small"] {
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
    }
}
