//! Metas as JSON: checkpoint-engine's own format, with one key of ours, `ckpt`, that its readers ignore.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Extension, Metas, Placement, RankMetas};
use crate::{
    checkpoint::{DigestAlgorithm, Digests},
    error::{Error, ErrorKind, Key, Result},
    manifest::{Arena, Share, Tensor},
    types::{DType, Rank, TensorMeta, Version, align_up},
};

/// Version of what stands under `ckpt`. Keys may be added without raising it.
const FORMAT: u32 = 1;
/// Far above Kimi-K2's 25 MB.
const MAX_JSON_BYTES: usize = 1 << 30;
const READ: &str = "read metas";

#[derive(Serialize, Deserialize)]
struct JsonRank<'a> {
    p2p_store_addr: Option<Cow<'a, str>>,
    rdma_device: Cow<'a, str>,
    #[serde(borrow)]
    memory_buffer_metas_list: Vec<JsonBuffer<'a>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ckpt: Option<JsonExtension<'a>>,
}

#[derive(Serialize, Deserialize)]
struct JsonBuffer<'a> {
    ptr: u64,
    size: u64,
    #[serde(borrow)]
    metas: Vec<JsonTensor<'a>>,
}

#[derive(Serialize, Deserialize)]
struct JsonTensor<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    /// As torch counts it.
    shape: Arc<[u64]>,
    aligned_size: u64,
}

#[derive(Serialize, Deserialize)]
struct JsonExtension<'a> {
    format: u32,
    #[serde(default)]
    host: Cow<'a, str>,
    #[serde(default)]
    version: u64,
    #[serde(default)]
    generation: u64,
    /// Where each arena starts; `ptr` is the address of its first tensor.
    #[serde(default)]
    arenas: Cow<'a, [u64]>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    digests: Option<JsonDigests<'a>>,
    /// Hexadecimal.
    #[serde(default)]
    descriptors: BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize)]
struct JsonDigests<'a> {
    algorithm: Cow<'a, str>,
    /// Hexadecimal, tensor by tensor: 64-bit numbers do not survive every JSON reader.
    values: Vec<String>,
}

impl Metas {
    /// The JSON of `GET /v1/metas` and of metas files.
    pub fn to_json(&self) -> Result<String> {
        let ranks = self
            .ranks
            .iter()
            .map(|(rank, metas)| Ok((*rank, JsonRank::new(metas).map_err(|e| e.with(Key::Rank, rank))?)))
            .collect::<Result<BTreeMap<Rank, JsonRank>>>()?;
        serde_json::to_string(&ranks).map_err(|e| {
            Error::new(ErrorKind::Internal, "write metas", "they cannot be written as JSON").caused_by(e)
        })
    }

    /// Reads [`Self::to_json`]'s output, or what an instance of checkpoint-engine publishes. Unknown keys are ignored;
    /// everything else is checked.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        if json.len() > MAX_JSON_BYTES {
            return Err(corrupt(format!(
                "{} bytes of JSON are over the limit of {MAX_JSON_BYTES}",
                json.len()
            )));
        }
        let ranks: BTreeMap<Rank, JsonRank> = serde_json::from_slice(json)
            .map_err(|e| corrupt(format!("the JSON is not that of metas: {e}")))?;
        let mut metas = Self::default();
        for (rank, json) in ranks {
            metas.ranks.insert(rank, json.read().map_err(|e| e.with(Key::Rank, rank))?);
        }
        Ok(metas)
    }
}

fn corrupt(message: String) -> Error {
    Error::new(ErrorKind::Corrupt, READ, message)
}

impl<'a> JsonRank<'a> {
    fn new(metas: &'a RankMetas) -> Result<Self> {
        let placement = &metas.placement;
        let buffers = (metas.share.arenas.iter().zip(&placement.arena_addresses))
            .map(|(arena, address)| JsonBuffer::new(arena, *address))
            .collect::<Result<_>>()?;
        Ok(Self {
            p2p_store_addr: placement.p2p_store_addr.as_deref().map(Cow::Borrowed),
            rdma_device: Cow::Borrowed(&placement.rdma_device),
            memory_buffer_metas_list: buffers,
            ckpt: placement.extension.as_ref().map(|e| JsonExtension::new(e, &placement.arena_addresses)),
        })
    }

    fn read(self) -> Result<RankMetas> {
        let starts: Option<Vec<u64>> = match &self.ckpt {
            Some(ckpt) if ckpt.format != FORMAT => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    READ,
                    format!(
                        "their format is {}, this version reads {FORMAT}; upgrade this program",
                        ckpt.format
                    ),
                ));
            }
            Some(ckpt) if ckpt.arenas.len() != self.memory_buffer_metas_list.len() => {
                return Err(corrupt("the counts of buffers and of arenas differ".into()));
            }
            Some(ckpt) => Some(ckpt.arenas.to_vec()),
            None => None,
        };
        let mut share = Share::default();
        let mut arena_addresses = Vec::with_capacity(self.memory_buffer_metas_list.len());
        for (number, buffer) in self.memory_buffer_metas_list.into_iter().enumerate() {
            let start = starts.as_ref().map_or(buffer.ptr, |s| s[number]);
            let Some(lead) = buffer.ptr.checked_sub(start) else {
                return Err(corrupt(format!("buffer {number} starts before its arena")));
            };
            arena_addresses.push(start);
            share.arenas.push(buffer.read(lead)?);
        }
        let placement = Placement {
            p2p_store_addr: self.p2p_store_addr.map(Cow::into_owned),
            rdma_device: self.rdma_device.into_owned(),
            arena_addresses,
            extension: self.ckpt.map(JsonExtension::read).transpose()?,
        };
        RankMetas::new(Arc::new(share), placement)
    }
}

impl<'a> JsonBuffer<'a> {
    fn new(arena: &'a Arena, address: u64) -> Result<Self> {
        let lead = arena.tensors.first().map_or(0, |t| t.offset);
        let mut metas = Vec::with_capacity(arena.tensors.len());
        for (number, tensor) in arena.tensors.iter().enumerate() {
            let len = tensor.meta.len_bytes();
            // The reader adds these up to find the offsets.
            let room = match arena.tensors.get(number + 1) {
                Some(next) => next.offset.checked_sub(tensor.offset),
                None => arena.len_bytes.checked_sub(tensor.offset).map(|rest| rest.min(align_up(len))),
            };
            let Some(aligned_size) = room.filter(|room| *room >= len) else {
                return Err(Error::new(
                    ErrorKind::Internal,
                    "write metas",
                    "the tensor overlaps another or its arena's end",
                )
                .with(Key::Tensor, &tensor.meta.name));
            };
            let Some(shape) = tensor.meta.torch_shape() else {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "write metas",
                    "torch has no 4-bit tensors with an odd last dimension, so metas in JSON cannot name this one",
                )
                .with(Key::Tensor, &tensor.meta.name));
            };
            metas.push(JsonTensor {
                name: Cow::Borrowed(&tensor.meta.name),
                dtype: Cow::Owned(tensor.meta.dtype.to_string()),
                shape,
                aligned_size,
            });
        }
        Ok(Self { ptr: address.saturating_add(lead), size: arena.len_bytes.saturating_sub(lead), metas })
    }

    /// `lead` bytes of the arena come before the first tensor.
    fn read(self, lead: u64) -> Result<Arena> {
        let Some(len_bytes) =
            lead.checked_add(self.size).filter(|_| self.ptr.checked_add(self.size).is_some())
        else {
            return Err(corrupt(format!("{} bytes at address {} do not exist", self.size, self.ptr)));
        };
        let mut offset = lead;
        let mut tensors = Vec::with_capacity(self.metas.len());
        for json in self.metas {
            let fail = |message: String| Err(corrupt(message).with(Key::Tensor, &json.name));
            let Some(dtype) = DType::from_torch(&json.dtype) else {
                return fail(format!("the element type {:?} is not known", json.dtype));
            };
            let meta = TensorMeta::from_torch(&*json.name, dtype, &json.shape)?;
            if json.aligned_size < meta.len_bytes() {
                return fail(format!(
                    "aligned_size {} is less than the tensor's {} bytes",
                    json.aligned_size,
                    meta.len_bytes()
                ));
            }
            let Some(end) = offset.checked_add(json.aligned_size).filter(|end| *end <= len_bytes) else {
                return fail(format!("the tensor does not fit into its buffer of {} bytes", self.size));
            };
            tensors.push(Tensor { meta, offset });
            offset = end;
        }
        Ok(Arena { len_bytes, tensors })
    }
}

impl<'a> JsonExtension<'a> {
    fn new(extension: &'a Extension, arenas: &'a [u64]) -> Self {
        Self {
            format: FORMAT,
            host: Cow::Borrowed(&extension.host),
            version: extension.version.0,
            generation: extension.generation,
            arenas: Cow::Borrowed(arenas),
            digests: extension.digests.as_ref().map(|digests| JsonDigests {
                algorithm: Cow::Borrowed(digests.algorithm.name()),
                values: digests.values.iter().map(|v| format!("{v:016x}")).collect(),
            }),
            descriptors: extension
                .descriptors
                .iter()
                .map(|(name, bytes)| (name.clone(), to_hex(bytes)))
                .collect(),
        }
    }

    fn read(self) -> Result<Extension> {
        let digests = match self.digests {
            Some(json) => match DigestAlgorithm::from_name(&json.algorithm) {
                Some(algorithm) => Some(Digests { algorithm, values: read_digests(&json.values)? }),
                None => {
                    tracing::warn!(algorithm = %json.algorithm, "digests of an unknown kind are not checked");
                    None
                }
            },
            None => None,
        };
        let mut descriptors = BTreeMap::new();
        for (name, hex) in self.descriptors {
            let Some(bytes) = from_hex(&hex) else {
                return Err(corrupt(format!("the descriptor of {name:?} is not hexadecimal")));
            };
            descriptors.insert(name, bytes);
        }
        Ok(Extension {
            host: self.host.into_owned(),
            version: Version(self.version),
            generation: self.generation,
            digests,
            descriptors,
        })
    }
}

fn read_digests(values: &[String]) -> Result<Vec<u64>> {
    let read = |v: &String| {
        let digits = v.len() == 16 && v.bytes().all(|b| b.is_ascii_hexdigit());
        u64::from_str_radix(v, 16).ok().filter(|_| digits)
    };
    let digests = values.iter().map(|v| read(v).ok_or(v)).collect::<std::result::Result<_, _>>();
    digests.map_err(|v| corrupt(format!("{v:?} is not a digest of 16 hexadecimal digits")))
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().flat_map(|b| [b >> 4, b & 15]).filter_map(|n| char::from_digit(u32::from(n), 16)).collect()
}

fn from_hex(hex: &str) -> Option<Bytes> {
    let digits: Vec<u8> = hex.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect::<Option<_>>()?;
    let pairs = digits.chunks_exact(2);
    pairs.remainder().is_empty().then(|| pairs.map(|p| p[0] << 4 | p[1]).collect())
}
