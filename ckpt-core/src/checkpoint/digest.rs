//! Digests of tensors: proof that the bytes which arrived are the bytes that were sent.

use std::{fmt, hash::Hasher as _};

use serde::{Deserialize, Serialize};
use twox_hash::xxhash3_64::Hasher;

/// How a digest was made. New ones are appended; old data keeps its meaning. They find accidents, not attacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum DigestAlgorithm {
    /// XXH3, 64 bits, seed 0, over the tensor's bytes.
    #[default]
    Xxh3_64,
    /// A sum that torch can compute where the tensor is. The bytes are read as 32-bit little-endian words `w[0]`,
    /// `w[1]`, ..., the last one filled up with zeros; the digest is the sum of `(w[i] + 1) * (2 * i + 1)`, modulo 2^64.
    /// Changing a word, swapping two, or adding one changes it.
    Sum64,
}

impl DigestAlgorithm {
    /// Every algorithm.
    pub const ALL: [DigestAlgorithm; 2] = [DigestAlgorithm::Xxh3_64, DigestAlgorithm::Sum64];

    /// The name in JSON and messages.
    pub const fn name(self) -> &'static str {
        match self {
            DigestAlgorithm::Xxh3_64 => "xxh3-64",
            DigestAlgorithm::Sum64 => "sum-64",
        }
    }

    /// From [`Self::name`].
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == name)
    }

    /// The digest of one tensor.
    pub fn digest(self, bytes: &[u8]) -> u64 {
        match self {
            DigestAlgorithm::Xxh3_64 => Hasher::oneshot(bytes),
            DigestAlgorithm::Sum64 => {
                let mut digest = self.start();
                digest.update(bytes);
                digest.finish()
            }
        }
    }

    /// A digest made piece by piece.
    pub fn start(self) -> RunningDigest {
        RunningDigest(match self {
            DigestAlgorithm::Xxh3_64 => State::Xxh3_64(Box::new(Hasher::new())),
            DigestAlgorithm::Sum64 => State::Sum64(Sum::default()),
        })
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

/// A digest that is being made; from [`DigestAlgorithm::start`].
pub struct RunningDigest(State);

enum State {
    Xxh3_64(Box<Hasher>),
    Sum64(Sum),
}

impl RunningDigest {
    /// The next bytes, of any number.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            State::Xxh3_64(hasher) => hasher.write(bytes),
            State::Sum64(sum) => sum.update(bytes),
        }
    }

    /// The digest of all that came.
    pub fn finish(&self) -> u64 {
        match &self.0 {
            State::Xxh3_64(hasher) => hasher.finish(),
            State::Sum64(sum) => sum.finish(),
        }
    }
}

impl fmt::Debug for RunningDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunningDigest").finish_non_exhaustive()
    }
}

/// See [`DigestAlgorithm::Sum64`].
#[derive(Default)]
struct Sum {
    total: u64,
    /// Whole words so far.
    words: u64,
    /// The beginning of the next word.
    rest: [u8; 4],
    rest_len: usize,
}

impl Sum {
    fn update(&mut self, mut bytes: &[u8]) {
        while self.rest_len > 0 && self.rest_len < 4 {
            let Some((first, more)) = bytes.split_first() else { return };
            self.rest[self.rest_len] = *first;
            self.rest_len += 1;
            bytes = more;
        }
        if self.rest_len == 4 {
            self.word(self.rest);
            self.rest_len = 0;
        }
        let (words, rest) = bytes.as_chunks::<4>();
        let mut factor = 2 * self.words + 1;
        let mut total = self.total;
        for word in words {
            total = total.wrapping_add((u64::from(u32::from_le_bytes(*word)) + 1).wrapping_mul(factor));
            factor = factor.wrapping_add(2);
        }
        self.total = total;
        self.words += words.len() as u64;
        self.rest[..rest.len()].copy_from_slice(rest);
        self.rest_len = rest.len();
    }

    fn word(&mut self, word: [u8; 4]) {
        let factor = 2 * self.words + 1;
        self.total = self.total.wrapping_add((u64::from(u32::from_le_bytes(word)) + 1).wrapping_mul(factor));
        self.words += 1;
    }

    fn finish(&self) -> u64 {
        if self.rest_len == 0 {
            return self.total;
        }
        let mut last = [0; 4];
        last[..self.rest_len].copy_from_slice(&self.rest[..self.rest_len]);
        let factor = 2 * self.words + 1;
        self.total.wrapping_add((u64::from(u32::from_le_bytes(last)) + 1).wrapping_mul(factor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_and_whole_agree_with_the_published_values() {
        // The reference implementation's value for no bytes, seed 0.
        assert_eq!(DigestAlgorithm::Xxh3_64.digest(b""), 0x2d06_8005_38d3_94c2);
        let bytes: Vec<u8> = (0..100_003_u32).map(|i| (i % 251) as u8).collect();
        for algorithm in DigestAlgorithm::ALL {
            for piece in [1, 3, 63, 1000, 65_536] {
                let mut running = algorithm.start();
                bytes.chunks(piece).for_each(|c| running.update(c));
                assert_eq!(running.finish(), algorithm.digest(&bytes), "{algorithm} in pieces of {piece}");
            }
            assert_eq!(DigestAlgorithm::from_name(algorithm.name()), Some(algorithm));
        }
        assert_eq!(DigestAlgorithm::from_name("md5"), None);
    }

    /// The values are those of the definition, computed with Python's unlimited integers.
    #[test]
    fn the_sum_is_what_its_definition_says() {
        let digest = |bytes: &[u8]| DigestAlgorithm::Sum64.digest(bytes);
        assert_eq!(digest(b""), 0);
        assert_eq!(digest(b"abc"), 0x63_6262);
        assert_eq!(digest(b"abcd"), 0x6463_6262);
        let counted: Vec<u8> = (0..5).flat_map(|_| 0..=255).chain(*b"xyz").collect();
        assert_eq!(digest(&counted), 0xd7bb_dbc2_6c79);
        assert_eq!(digest(&[0xff; 4096]), 1 << 52);
        // Two words change places.
        let mut swapped = counted.clone();
        swapped[..8].rotate_left(4);
        assert_ne!(digest(&swapped), digest(&counted));
    }
}
