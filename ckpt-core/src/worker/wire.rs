//! The frames of the native worker protocol, as `docs/worker-protocol.md` gives them byte by byte.
//!
//! Used by both sides: [`crate::sink::NativeSink`] and [`super::NativeWorker`]. All numbers are little endian.

use std::{path::PathBuf, sync::Arc};

use twox_hash::XxHash3_128;

use crate::{
    device::RingExport,
    types::{DType, TensorMeta},
};

/// First bytes of both directions.
pub(crate) const MAGIC: [u8; 8] = *b"CKPTWRKR";
/// Oldest version that this build speaks.
pub(crate) const VERSION_MIN: u16 = 1;
/// Newest version that this build speaks.
pub(crate) const VERSION_MAX: u16 = 1;
/// Bytes of the preamble.
pub(crate) const PREAMBLE_LEN: usize = 16;
/// Bytes of a frame's header.
pub(crate) const HEADER_LEN: usize = 8;
/// Largest body that a worker accepts.
pub(crate) const MAX_TO_WORKER: u32 = 256 << 20;
/// Largest body that a parameter server accepts.
pub(crate) const MAX_FROM_WORKER: u32 = 1 << 20;
/// Longest error text on the wire; longer ones lose their middle.
pub(crate) const MAX_TEXT: usize = 64 << 10;

/// The worker maps host shared memory.
pub(crate) const CAN_HOST: u64 = 1;
/// The worker opens CUDA IPC handles.
pub(crate) const CAN_CUDA: u64 = 2;
/// The worker opens Ascend IPC keys.
pub(crate) const CAN_ASCEND: u64 = 4;

/// What is wrong with received bytes.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum WireError {
    #[error("the peer does not speak the native worker protocol (its first bytes are {0:02x?})")]
    Magic([u8; 8]),
    #[error(
        "the peer speaks versions {peer_min} to {peer_max}, this build {VERSION_MIN} to {VERSION_MAX}: update the older"
    )]
    Version { peer_min: u16, peer_max: u16 },
    #[error("a frame of {len} bytes is over the limit of {limit}")]
    TooLarge { len: u32, limit: u32 },
    #[error("the frame ends inside `{0}`")]
    Short(&'static str),
    #[error("the frame has {0} bytes too many")]
    Long(usize),
    #[error("`{0}` is not UTF-8")]
    Utf8(&'static str),
    #[error("unknown {what} {value}")]
    Unknown { what: &'static str, value: u64 },
    #[error("tensor `{0}` has an impossible size")]
    Size(String),
}

type Result<T> = std::result::Result<T, WireError>;

/// Which ring: a mapping may be kept only while this is the same. All zero: never kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RingId {
    /// Random, one a parameter-server process.
    pub(crate) process: u64,
    /// The owner's number of the ring in that process.
    pub(crate) number: u64,
}

/// The worker presents itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) pid: u32,
    /// `CAN_*` bits; unknown bits are ignored.
    pub(crate) capabilities: u64,
    /// Buckets that may be under way at once.
    pub(crate) window: u32,
    /// Digest of the layout that it still has; 0 for none.
    pub(crate) layout: u128,
    /// Device UUID.
    pub(crate) uuid: String,
    /// Name and version, for logs.
    pub(crate) software: String,
}

/// How to map the ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Open {
    pub(crate) ring: RingId,
    pub(crate) ring_bytes: u64,
    pub(crate) export: RingExport,
    /// Digest of the layout that buckets refer to; 0 for none.
    pub(crate) layout: u128,
    /// Its number of tensors.
    pub(crate) layout_len: u32,
}

/// How a bucket names a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TensorRef {
    /// By its index in the layout.
    Index(u32),
    /// In full.
    Inline(TensorMeta),
}

/// One tensor of a bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) tensor: TensorRef,
    pub(crate) offset: u64,
    /// xxh3-64 of its bytes, seed 0.
    pub(crate) digest: Option<u64>,
}

/// Parameter server to worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Down {
    Open(Open),
    Layout { first: u32, tensors: Vec<TensorMeta> },
    Bucket { bucket: u32, entries: Vec<Entry> },
    Release { keep: bool },
    Finish,
    Fail { text: String },
}

/// Worker to parameter server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Up {
    Hello(Hello),
    Opened { kept: bool },
    Ack { bucket: u32 },
    Released,
    Finished,
    Error { text: String },
    Dropped,
}

/// The first 16 bytes of each direction.
pub(crate) fn preamble() -> [u8; PREAMBLE_LEN] {
    let mut bytes = [0; PREAMBLE_LEN];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&VERSION_MIN.to_le_bytes());
    bytes[10..12].copy_from_slice(&VERSION_MAX.to_le_bytes());
    bytes
}

/// The version to speak: the highest that both know.
pub(crate) fn agree(peer: &[u8; PREAMBLE_LEN]) -> Result<u16> {
    let mut magic = [0; 8];
    magic.copy_from_slice(&peer[..8]);
    if magic != MAGIC {
        return Err(WireError::Magic(magic));
    }
    let peer_min = u16::from_le_bytes([peer[8], peer[9]]);
    let peer_max = u16::from_le_bytes([peer[10], peer[11]]);
    let version = peer_max.min(VERSION_MAX);
    if version < peer_min.max(VERSION_MIN) {
        return Err(WireError::Version { peer_min, peer_max });
    }
    Ok(version)
}

/// Length and kind of the frame that starts with `header`.
pub(crate) fn header(header: &[u8; HEADER_LEN], limit: u32) -> Result<(usize, u8)> {
    let len = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    if len > limit {
        return Err(WireError::TooLarge { len, limit });
    }
    if header[5..] != [0; 3] {
        return Err(WireError::Unknown { what: "frame flags", value: u64::from(header[5]) });
    }
    Ok((len as usize, header[4]))
}

/// `text` cut to what the wire carries; beginning and end stay, since a traceback's last line says most.
pub(crate) fn clip(text: &str, limit: usize) -> String {
    if text.len() <= limit {
        return text.to_owned();
    }
    let half = limit.saturating_sub(32) / 2;
    let head = (0..=half).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
    let tail = (text.len() - half..text.len()).find(|i| text.is_char_boundary(*i)).unwrap_or(text.len());
    format!("{}\n... ({} bytes left out)\n{}", &text[..head], tail - head, &text[tail..])
}

const DTYPE_CODES: &[(u8, DType)] = &[
    (1, DType::BOOL),
    (2, DType::U8),
    (3, DType::I8),
    (4, DType::U16),
    (5, DType::I16),
    (6, DType::U32),
    (7, DType::I32),
    (8, DType::U64),
    (9, DType::I64),
    (16, DType::F16),
    (17, DType::BF16),
    (18, DType::F32),
    (19, DType::F64),
    (20, DType::C64),
    (32, DType::F8_E4M3),
    (33, DType::F8_E5M2),
    (34, DType::F8_E8M0),
    (35, DType::F8_E4M3FNUZ),
    (36, DType::F8_E5M2FNUZ),
    (48, DType::F6_E2M3),
    (49, DType::F6_E3M2),
    (50, DType::F4),
];

fn dtype_code(dtype: DType) -> u8 {
    // 0 is refused by every reader; a test checks that the table has every type.
    DTYPE_CODES.iter().find(|(_, d)| *d == dtype).map_or(0, |(code, _)| *code)
}

/// Appends one frame.
struct Frame<'a> {
    out: &'a mut Vec<u8>,
    start: usize,
}

impl<'a> Frame<'a> {
    fn new(out: &'a mut Vec<u8>, kind: u8) -> Self {
        let start = out.len();
        out.extend_from_slice(&[0, 0, 0, 0, kind, 0, 0, 0]);
        Self { out, start }
    }
    fn u8(&mut self, value: u8) {
        self.out.push(value);
    }
    fn u16(&mut self, value: u16) {
        self.out.extend_from_slice(&value.to_le_bytes());
    }
    fn u32(&mut self, value: u32) {
        self.out.extend_from_slice(&value.to_le_bytes());
    }
    fn u64(&mut self, value: u64) {
        self.out.extend_from_slice(&value.to_le_bytes());
    }
    fn u128(&mut self, value: u128) {
        self.out.extend_from_slice(&value.to_le_bytes());
    }
    fn bytes(&mut self, value: &[u8]) {
        self.u32(value.len() as u32);
        self.out.extend_from_slice(value);
    }
    fn text(&mut self, value: &str) {
        self.bytes(clip(value, MAX_TEXT).as_bytes());
    }
    fn meta(&mut self, meta: &TensorMeta) {
        self.u8(dtype_code(meta.dtype));
        self.u16(meta.shape.len() as u16);
        for dim in &*meta.shape {
            self.u64(*dim);
        }
        self.bytes(meta.name.as_bytes());
    }
    fn end(self) {
        let len = (self.out.len() - self.start - HEADER_LEN) as u32;
        self.out[self.start..self.start + 4].copy_from_slice(&len.to_le_bytes());
    }
}

/// Takes fields off a body.
struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(WireError::Short(what))?;
        self.0 = tail;
        Ok(head)
    }
    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }
    fn u8(&mut self, what: &'static str) -> Result<u8> {
        Ok(self.array::<1>(what)?[0])
    }
    fn u16(&mut self, what: &'static str) -> Result<u16> {
        self.array(what).map(u16::from_le_bytes)
    }
    fn u32(&mut self, what: &'static str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }
    fn u64(&mut self, what: &'static str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }
    fn u128(&mut self, what: &'static str) -> Result<u128> {
        self.array(what).map(u128::from_le_bytes)
    }
    fn bytes(&mut self, what: &'static str) -> Result<&'a [u8]> {
        let len = self.u32(what)?;
        self.take(len as usize, what)
    }
    fn text(&mut self, what: &'static str) -> Result<&'a str> {
        std::str::from_utf8(self.bytes(what)?).map_err(|_| WireError::Utf8(what))
    }
    fn flag(&mut self, what: &'static str) -> Result<bool> {
        match self.u8(what)? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(WireError::Unknown { what, value: u64::from(value) }),
        }
    }
    fn meta(&mut self) -> Result<TensorMeta> {
        let code = self.u8("dtype")?;
        let dtype = DTYPE_CODES
            .iter()
            .find(|(c, _)| *c == code)
            .map(|(_, d)| *d)
            .ok_or(WireError::Unknown { what: "dtype", value: u64::from(code) })?;
        let dims = usize::from(self.u16("shape")?);
        let shape: Arc<[u64]> = self
            .take(dims * 8, "shape")?
            .chunks_exact(8)
            .map(|d| u64::from_le_bytes([d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]))
            .collect();
        let name = self.text("name")?;
        TensorMeta::new(name, dtype, shape).map_err(|_| WireError::Size(name.to_owned()))
    }
    /// Room for `count` items of at least `min_len` bytes each, without trusting the count.
    fn room<T>(&self, count: u32, min_len: usize) -> Vec<T> {
        Vec::with_capacity((count as usize).min(self.0.len() / min_len))
    }
    fn end(self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(WireError::Long(self.0.len())) }
    }
}

/// Digest of a layout: xxh3-128 over its entries as a layout frame carries them. Never 0, which means "none".
pub(crate) fn layout_digest(tensors: &[TensorMeta]) -> u128 {
    let mut bytes = Vec::with_capacity(tensors.len() * 64);
    let mut frame = Frame::new(&mut bytes, 0);
    for meta in tensors {
        frame.meta(meta);
    }
    XxHash3_128::oneshot(&bytes[HEADER_LEN..]).max(1)
}

const INLINE: u8 = 1;
const DIGEST: u8 = 2;

impl Down {
    /// The word for it in the protocol's description.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Down::Open(_) => "open",
            Down::Layout { .. } => "layout",
            Down::Bucket { .. } => "bucket",
            Down::Release { .. } => "release",
            Down::Finish => "finish",
            Down::Fail { .. } => "fail",
        }
    }

    /// Appends the frame to `out`.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Down::Open(open) => {
                let mut f = Frame::new(out, 1);
                f.u64(open.ring.process);
                f.u64(open.ring.number);
                f.u64(open.ring_bytes);
                f.u128(open.layout);
                f.u32(open.layout_len);
                let (kind, offset, handle) = match &open.export {
                    RingExport::Host { path, offset_bytes } => {
                        (1, offset_bytes, path.as_os_str().as_encoded_bytes())
                    }
                    RingExport::Cuda { handle, offset_bytes } => (2, offset_bytes, &handle[..]),
                    RingExport::Ascend { key, offset_bytes } => (3, offset_bytes, &key[..]),
                };
                f.u8(kind);
                f.u64(*offset);
                f.bytes(handle);
                f.end();
            }
            Down::Layout { first, tensors } => {
                let mut f = Frame::new(out, 2);
                f.u32(*first);
                f.u32(tensors.len() as u32);
                for meta in tensors {
                    f.meta(meta);
                }
                f.end();
            }
            Down::Bucket { bucket, entries } => {
                let mut f = Frame::new(out, 3);
                f.u32(*bucket);
                f.u32(entries.len() as u32);
                for entry in entries {
                    let inline = matches!(entry.tensor, TensorRef::Inline(_));
                    f.u8(if inline { INLINE } else { 0 } | if entry.digest.is_some() { DIGEST } else { 0 });
                    f.u64(entry.offset);
                    match &entry.tensor {
                        TensorRef::Index(index) => f.u32(*index),
                        TensorRef::Inline(meta) => f.meta(meta),
                    }
                    if let Some(digest) = entry.digest {
                        f.u64(digest);
                    }
                }
                f.end();
            }
            Down::Release { keep } => {
                let mut f = Frame::new(out, 4);
                f.u8(u8::from(*keep));
                f.end();
            }
            Down::Finish => Frame::new(out, 5).end(),
            Down::Fail { text } => {
                let mut f = Frame::new(out, 6);
                f.text(text);
                f.end();
            }
        }
    }

    /// Reads a frame's body.
    pub(crate) fn decode(kind: u8, body: &[u8]) -> Result<Self> {
        let mut b = Body(body);
        let message = match kind {
            1 => {
                let ring = RingId { process: b.u64("ring process")?, number: b.u64("ring number")? };
                let ring_bytes = b.u64("ring size")?;
                let layout = b.u128("layout digest")?;
                let layout_len = b.u32("layout length")?;
                let memory = b.u8("memory kind")?;
                let offset_bytes = b.u64("ring offset")?;
                let handle = b.bytes("ring handle")?;
                let export = match memory {
                    1 => {
                        let path = std::str::from_utf8(handle).map_err(|_| WireError::Utf8("ring path"))?;
                        RingExport::Host { path: PathBuf::from(path), offset_bytes }
                    }
                    2 => RingExport::Cuda { handle: handle.to_vec(), offset_bytes },
                    3 => RingExport::Ascend { key: handle.to_vec(), offset_bytes },
                    value => return Err(WireError::Unknown { what: "memory kind", value: u64::from(value) }),
                };
                Down::Open(Open { ring, ring_bytes, export, layout, layout_len })
            }
            2 => {
                let first = b.u32("first index")?;
                let count = b.u32("tensor count")?;
                let mut tensors = b.room(count, 7);
                for _ in 0..count {
                    tensors.push(b.meta()?);
                }
                Down::Layout { first, tensors }
            }
            3 => {
                let bucket = b.u32("bucket")?;
                let count = b.u32("tensor count")?;
                let mut entries = b.room(count, 13);
                for _ in 0..count {
                    let flags = b.u8("entry flags")?;
                    if flags & !(INLINE | DIGEST) != 0 {
                        return Err(WireError::Unknown { what: "entry flags", value: u64::from(flags) });
                    }
                    let offset = b.u64("tensor offset")?;
                    let tensor = if flags & INLINE == 0 {
                        TensorRef::Index(b.u32("tensor index")?)
                    } else {
                        TensorRef::Inline(b.meta()?)
                    };
                    let digest = if flags & DIGEST == 0 { None } else { Some(b.u64("digest")?) };
                    entries.push(Entry { tensor, offset, digest });
                }
                Down::Bucket { bucket, entries }
            }
            4 => Down::Release { keep: b.flag("keep")? },
            5 => Down::Finish,
            6 => Down::Fail { text: b.text("text")?.to_owned() },
            value => return Err(WireError::Unknown { what: "message", value: u64::from(value) }),
        };
        b.end()?;
        Ok(message)
    }
}

impl Up {
    /// Appends the frame to `out`.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Up::Hello(hello) => {
                let mut f = Frame::new(out, 16);
                f.u32(hello.pid);
                f.u64(hello.capabilities);
                f.u32(hello.window);
                f.u128(hello.layout);
                f.text(&hello.uuid);
                f.text(&hello.software);
                f.end();
            }
            Up::Opened { kept } => {
                let mut f = Frame::new(out, 17);
                f.u8(u8::from(*kept));
                f.end();
            }
            Up::Ack { bucket } => {
                let mut f = Frame::new(out, 18);
                f.u32(*bucket);
                f.end();
            }
            Up::Released => Frame::new(out, 19).end(),
            Up::Finished => Frame::new(out, 20).end(),
            Up::Error { text } => {
                let mut f = Frame::new(out, 21);
                f.text(text);
                f.end();
            }
            Up::Dropped => Frame::new(out, 22).end(),
        }
    }

    /// Reads a frame's body.
    pub(crate) fn decode(kind: u8, body: &[u8]) -> Result<Self> {
        let mut b = Body(body);
        let message = match kind {
            16 => Up::Hello(Hello {
                pid: b.u32("pid")?,
                capabilities: b.u64("capabilities")?,
                window: b.u32("window")?,
                layout: b.u128("layout digest")?,
                uuid: b.text("uuid")?.to_owned(),
                software: b.text("software")?.to_owned(),
            }),
            17 => Up::Opened { kept: b.flag("kept")? },
            18 => Up::Ack { bucket: b.u32("bucket")? },
            19 => Up::Released,
            20 => Up::Finished,
            21 => Up::Error { text: b.text("text")?.to_owned() },
            22 => Up::Dropped,
            value => return Err(WireError::Unknown { what: "message", value: u64::from(value) }),
        };
        b.end()?;
        Ok(message)
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
