//! A share as a few bytes per tensor.
//!
//! Names are front-coded (most share a long prefix with the one before), the few distinct (dtype, shape) pairs are
//! numbered, offsets are only written where they are not what the arena's alignment gives. Then LZ4.

use std::{collections::HashMap, fmt, sync::Arc};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_128;

use crate::{
    error::{Error, ErrorKind, Key, Result},
    manifest::{Arena, Share, Tensor},
    types::{DType, TENSOR_ALIGNMENT, TensorMeta},
};

/// Version of the format; the first byte.
const FORMAT: u8 = 1;
/// Far above Kimi-K2's 2 MiB; a header that claims more is refused before anything is allocated.
const MAX_UNPACKED_BYTES: usize = 512 << 20;
/// All names together, after their common prefixes are filled in.
const MAX_NAME_BYTES: usize = 1 << 30;

/// What identifies a layout: made over its encoded bytes, so equal digests mean equal layouts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LayoutDigest(pub u128);

impl fmt::Display for LayoutDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for LayoutDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LayoutDigest({self})")
    }
}

/// A layout in the form in which it travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedLayout {
    digest: LayoutDigest,
    bytes: Bytes,
}

#[derive(Serialize, Deserialize)]
struct Wire {
    /// Distinct pairs, numbered in the order of their first use.
    kinds: Vec<(DType, Arc<[u64]>)>,
    arenas: Vec<WireArena>,
    /// Number of each tensor's pair.
    kind_of: Vec<u32>,
    /// Per tensor: bytes in common with the name before, bytes that follow, those bytes.
    names: Bytes,
}

#[derive(Serialize, Deserialize)]
struct WireArena {
    len_bytes: u64,
    tensors: u32,
    /// A tensor starts at the next multiple of this after the one before, the first one at 0.
    alignment: u32,
    /// Except these: number in the arena, offset.
    exceptions: Vec<(u32, u64)>,
}

impl EncodedLayout {
    /// Encodes a share.
    pub fn new(share: &Share) -> Result<Self> {
        let mut kinds = Vec::new();
        let mut numbers: HashMap<(DType, &[u64]), u32> = HashMap::new();
        let mut kind_of = Vec::with_capacity(share.arenas.iter().map(|a| a.tensors.len()).sum());
        let mut names = Vec::with_capacity(kind_of.capacity() * 16);
        let mut last = "";
        for Tensor { meta, .. } in share.tensors() {
            let number = *numbers.entry((meta.dtype, &meta.shape)).or_insert_with(|| {
                kinds.push((meta.dtype, meta.shape.clone()));
                (kinds.len() - 1) as u32
            });
            kind_of.push(number);
            let common = last.bytes().zip(meta.name.bytes()).take_while(|(a, b)| a == b).count();
            put_length(&mut names, common);
            put_length(&mut names, meta.name.len() - common);
            names.extend_from_slice(&meta.name.as_bytes()[common..]);
            last = &meta.name;
        }
        let arenas = share.arenas.iter().map(WireArena::new).collect::<Result<_>>()?;
        let wire = Wire { kinds, arenas, kind_of, names: names.into() };
        let plain = postcard::to_allocvec(&wire).map_err(|e| {
            Error::new(ErrorKind::Internal, "encode layout", "the layout cannot be encoded").caused_by(e)
        })?;
        if plain.len() > MAX_UNPACKED_BYTES {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "encode layout",
                format!(
                    "a layout of {} bytes is over the limit; spread the checkpoint over more ranks",
                    plain.len()
                ),
            ));
        }
        let mut bytes = vec![FORMAT];
        bytes.extend(lz4_flex::block::compress_prepend_size(&plain));
        Ok(Self::from_bytes(bytes.into()))
    }

    /// A layout that was received; [`Self::decode`] says whether it is one.
    pub fn from_bytes(bytes: Bytes) -> Self {
        Self { digest: LayoutDigest(XxHash3_128::oneshot(&bytes)), bytes }
    }

    /// Its digest.
    pub fn digest(&self) -> LayoutDigest {
        self.digest
    }

    /// The bytes that travel.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The share.
    pub fn decode(&self) -> Result<Share> {
        decode_layout(&self.bytes)
    }
}

impl WireArena {
    fn new(arena: &Arena) -> Result<Self> {
        let mut end = 0;
        for tensor in &arena.tensors {
            let next = tensor.offset.checked_add(tensor.meta.len_bytes());
            match next {
                Some(next) if tensor.offset >= end && next <= arena.len_bytes => end = next,
                _ => {
                    return Err(Error::new(
                        ErrorKind::Internal,
                        "encode layout",
                        "the tensor overlaps the one before it or its arena's end",
                    )
                    .with(Key::Tensor, &tensor.meta.name));
                }
            }
        }
        let with = |alignment: u32| {
            let mut expected = 0;
            let mut exceptions = Vec::new();
            for (number, tensor) in arena.tensors.iter().enumerate() {
                if tensor.offset != expected {
                    exceptions.push((number as u32, tensor.offset));
                }
                expected = following(tensor.offset + tensor.meta.len_bytes(), alignment);
            }
            Self { len_bytes: arena.len_bytes, tensors: arena.tensors.len() as u32, alignment, exceptions }
        };
        let (aligned, packed) = (with(TENSOR_ALIGNMENT as u32), with(1));
        Ok(if aligned.exceptions.len() <= packed.exceptions.len() { aligned } else { packed })
    }
}

/// The next multiple of `alignment`, which is not 0; saturates.
fn following(end: u64, alignment: u32) -> u64 {
    end.checked_next_multiple_of(u64::from(alignment)).unwrap_or(u64::MAX)
}

/// Decodes what [`EncodedLayout`] carries. Checks everything: the bytes may come from a stranger.
pub fn decode_layout(bytes: &[u8]) -> Result<Share> {
    let corrupt = |message: &str| Error::new(ErrorKind::Corrupt, "decode layout", message);
    let Some((&format, packed)) = bytes.split_first() else { return Err(corrupt("it is empty")) };
    if format != FORMAT {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "decode layout",
            format!("its format is {format}, this version reads {FORMAT}; run the same version everywhere"),
        ));
    }
    let Some((size, _)) = packed.split_first_chunk::<4>() else { return Err(corrupt("it is cut off")) };
    let size = u32::from_le_bytes(*size) as usize;
    // LZ4 expands at most 255 times.
    if size > MAX_UNPACKED_BYTES || size > packed.len().saturating_mul(255) {
        return Err(corrupt("it claims an impossible size"));
    }
    let plain = lz4_flex::block::decompress_size_prepended(packed)
        .map_err(|e| corrupt("it cannot be decompressed").caused_by(e))?;
    let (wire, rest): (Wire, &[u8]) =
        postcard::take_from_bytes(&plain).map_err(|e| corrupt("it cannot be parsed").caused_by(e))?;
    if !rest.is_empty() {
        return Err(corrupt("it has a tail"));
    }
    let total: u64 = wire.arenas.iter().map(|a| u64::from(a.tensors)).sum();
    if total != wire.kind_of.len() as u64 {
        return Err(corrupt("its counts of tensors differ"));
    }
    // Every pair is checked once, not once per tensor.
    let empty: Arc<str> = "".into();
    let kinds = (wire.kinds.into_iter())
        .map(|(dtype, shape)| TensorMeta::new(empty.clone(), dtype, shape))
        .collect::<Result<Vec<_>>>()?;
    let mut names = Names { rest: &wire.names, last: Vec::new(), total: 0 };
    let mut kind_of = wire.kind_of.into_iter();
    let mut arenas = Vec::with_capacity(wire.arenas.len());
    for arena in wire.arenas {
        if arena.alignment == 0 {
            return Err(corrupt("an alignment is 0"));
        }
        let mut exceptions = arena.exceptions.into_iter().peekable();
        let mut tensors = Vec::with_capacity(arena.tensors as usize);
        let (mut end, mut expected) = (0, 0);
        for (number, kind) in (0..arena.tensors).zip(kind_of.by_ref()) {
            let kind = kinds.get(kind as usize).ok_or_else(|| corrupt("a tensor has no type"))?;
            let name = names.next().ok_or_else(|| corrupt("a name is malformed"))?;
            let offset = exceptions.next_if(|(n, _)| *n == number).map_or(expected, |(_, offset)| offset);
            match offset.checked_add(kind.len_bytes()) {
                Some(next) if offset >= end && next <= arena.len_bytes => end = next,
                _ => {
                    return Err(
                        corrupt("a tensor overlaps another or its arena's end").with(Key::Tensor, name)
                    );
                }
            }
            expected = following(end, arena.alignment);
            let meta = TensorMeta { name, dtype: kind.dtype, shape: kind.shape.clone() };
            tensors.push(Tensor { meta, offset });
        }
        if exceptions.next().is_some() {
            return Err(corrupt("an offset belongs to no tensor"));
        }
        arenas.push(Arena { len_bytes: arena.len_bytes, tensors });
    }
    if !names.rest.is_empty() {
        return Err(corrupt("a name belongs to no tensor"));
    }
    Ok(Share { arenas })
}

/// LEB128, as postcard writes it.
fn put_length(out: &mut Vec<u8>, mut value: usize) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

struct Names<'a> {
    rest: &'a [u8],
    last: Vec<u8>,
    total: usize,
}

impl Names<'_> {
    fn next(&mut self) -> Option<Arc<str>> {
        let common = self.length()?;
        let more = self.length()?;
        if common > self.last.len() || more > self.rest.len() {
            return None;
        }
        self.total += common + more;
        if self.total > MAX_NAME_BYTES {
            return None;
        }
        let (suffix, rest) = self.rest.split_at(more);
        self.rest = rest;
        self.last.truncate(common);
        self.last.extend_from_slice(suffix);
        std::str::from_utf8(&self.last).ok().map(Arc::from)
    }

    fn length(&mut self) -> Option<usize> {
        let mut value = 0_usize;
        for shift in (0..28).step_by(7) {
            let (byte, rest) = self.rest.split_first()?;
            self.rest = rest;
            value |= usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::checkpoint::generate;

    /// A share of one arena, aligned as a pool does it or packed as a file does it.
    pub(crate) fn share(metas: impl Iterator<Item = TensorMeta>, alignment: u32) -> Share {
        let mut arena = Arena::default();
        for meta in metas {
            let offset = arena.len_bytes;
            arena.len_bytes = following(offset + meta.len_bytes(), alignment);
            arena.tensors.push(Tensor { meta, offset });
        }
        Share { arenas: vec![arena] }
    }

    fn round_trip(share: &Share) -> EncodedLayout {
        let encoded = EncodedLayout::new(share).unwrap();
        assert_eq!(encoded.decode().unwrap(), *share);
        assert_eq!(EncodedLayout::from_bytes(encoded.bytes().clone()), encoded);
        encoded
    }

    #[test]
    fn a_large_model_is_small() {
        let encoded = round_trip(&share(generate::kimi_k2_shapes(), 256));
        assert!(encoded.bytes().len() < 1_000_000, "{}", encoded.bytes().len());
        round_trip(&share(generate::kimi_k2_shapes(), 1));
        round_trip(&Share::default());
    }

    #[test]
    fn golden_bytes() {
        let golden: Vec<u8> = GOLDEN
            .as_bytes()
            .chunks(2)
            .map(|p| u8::from_str_radix(str::from_utf8(p).unwrap(), 16).unwrap())
            .collect();
        let share = share(generate::qwen_shaped(1).take(3), 256);
        assert_eq!(decode_layout(&golden).unwrap(), share, "old bytes must stay readable, or raise FORMAT");
        // LZ4 may choose other matches in another version; what is inside may not change.
        let plain = |bytes: &[u8]| lz4_flex::block::decompress_size_prepended(&bytes[1..]).unwrap();
        assert_eq!(
            plain(round_trip(&share).bytes()),
            plain(&golden),
            "the wire format changed: raise FORMAT"
        );
    }

    const GOLDEN: &str = "0165000000f340030e0201400e0240400e02104001805203800200030001024c00196d6f64656c2e656d6265645f\
        746f6b656e732e77656967687406206c61796572732e302e73656c665f6174746e2e715f70726f6a2200f000190d6b5f70726f6a2e776569\
        676874";

    fn any_share() -> impl Strategy<Value = Share> {
        let tensor =
            ("[a-c.é]{0,12}", 0..DType::ALL.len(), proptest::collection::vec(0_u64..5, 0..4), 0_u64..2000);
        let arena = (proptest::collection::vec(tensor, 0..12), 0_u64..300).prop_map(|(tensors, tail)| {
            let mut arena = Arena::default();
            for (name, dtype, mut shape, gap) in tensors {
                shape.push(8);
                let meta = TensorMeta::new(name, DType::ALL[dtype], shape).unwrap();
                // Mostly as a pool places them.
                let offset = if gap < 1500 { following(arena.len_bytes, 256) } else { arena.len_bytes + gap };
                arena.len_bytes = offset + meta.len_bytes();
                arena.tensors.push(Tensor { meta, offset });
            }
            arena.len_bytes += tail;
            arena
        });
        proptest::collection::vec(arena, 0..4).prop_map(|arenas| Share { arenas })
    }

    proptest! {
        #[test]
        fn any_share_survives(share in any_share()) {
            round_trip(&share);
        }

        #[test]
        fn any_damage_is_an_error_or_another_valid_share(share in any_share(), at: prop::sample::Index, flip in 1_u8..) {
            let mut bytes = EncodedLayout::new(&share).unwrap().bytes().to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            if let Ok(other) = decode_layout(&bytes) {
                round_trip(&other);
            }
            let _ = decode_layout(&bytes[..at]);
        }

        #[test]
        fn noise_is_an_error(noise in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut plain = vec![FORMAT];
            plain.extend(lz4_flex::block::compress_prepend_size(&noise));
            let _ = decode_layout(&plain);
            let _ = decode_layout(&noise);
        }
    }

    #[test]
    fn bombs_are_refused_before_they_go_off() {
        let refuse = |bytes: &[u8]| decode_layout(bytes).unwrap_err().to_string();
        let mut claim = vec![FORMAT];
        claim.extend(u32::MAX.to_le_bytes());
        assert!(refuse(&claim).contains("impossible size"));
        assert!(refuse(&[]).contains("empty"));
        assert!(refuse(&[FORMAT]).contains("cut off"));
        assert!(refuse(&[9, 0, 0, 0, 0]).contains("format is 9"));
        // A long name, repeated by reference.
        let mut names = Vec::new();
        put_length(&mut names, 0);
        put_length(&mut names, 1 << 20);
        names.resize(names.len() + (1 << 20), b'n');
        for _ in 0..2000 {
            put_length(&mut names, 1 << 20);
            put_length(&mut names, 0);
        }
        let arena = WireArena { len_bytes: 0, tensors: 2001, alignment: 1, exceptions: vec![] };
        let wire = Wire {
            kinds: vec![(DType::U8, Arc::from([0]))],
            arenas: vec![arena],
            kind_of: vec![0; 2001],
            names: names.into(),
        };
        let mut bytes = vec![FORMAT];
        bytes.extend(lz4_flex::block::compress_prepend_size(&postcard::to_allocvec(&wire).unwrap()));
        assert!(refuse(&bytes).contains("name"));
    }
}
