//! Digests of tensors: proof that the bytes which arrived are the bytes that were sent.

use std::{fmt, hash::Hasher as _};

use serde::{Deserialize, Serialize};
use twox_hash::xxhash3_64::Hasher;

/// How a digest was made. New ones are appended; old data keeps its meaning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum DigestAlgorithm {
    /// XXH3, 64 bits, seed 0, over the tensor's bytes. Finds accidents, not attacks.
    #[default]
    Xxh3_64,
}

impl DigestAlgorithm {
    /// The name in JSON and messages.
    pub const fn name(self) -> &'static str {
        match self {
            DigestAlgorithm::Xxh3_64 => "xxh3-64",
        }
    }

    /// From [`Self::name`].
    pub fn from_name(name: &str) -> Option<Self> {
        (name == "xxh3-64").then_some(DigestAlgorithm::Xxh3_64)
    }

    /// The digest of one tensor.
    pub fn digest(self, bytes: &[u8]) -> u64 {
        match self {
            DigestAlgorithm::Xxh3_64 => Hasher::oneshot(bytes),
        }
    }
}

impl fmt::Display for DigestAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One digest per tensor of a share, in the share's memory order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digests {
    /// How they were made.
    pub algorithm: DigestAlgorithm,
    /// Tensor by tensor.
    pub values: Vec<u64>,
}

/// A digest made piece by piece.
pub(crate) struct Running(Hasher);

impl Running {
    pub fn new(algorithm: DigestAlgorithm) -> Self {
        match algorithm {
            DigestAlgorithm::Xxh3_64 => Self(Hasher::new()),
        }
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }

    pub fn finish(&self) -> u64 {
        self.0.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_and_whole_agree_with_the_published_values() {
        let algorithm = DigestAlgorithm::Xxh3_64;
        // The reference implementation's value for no bytes, seed 0.
        assert_eq!(algorithm.digest(b""), 0x2d06_8005_38d3_94c2);
        let bytes: Vec<u8> = (0..100_000_u32).map(|i| (i % 251) as u8).collect();
        for piece in [1, 63, 1000, 65_536] {
            let mut running = Running::new(algorithm);
            bytes.chunks(piece).for_each(|c| running.update(c));
            assert_eq!(running.finish(), algorithm.digest(&bytes));
        }
        assert_eq!(DigestAlgorithm::from_name(algorithm.name()), Some(algorithm));
        assert_eq!(DigestAlgorithm::from_name("md5"), None);
    }
}
