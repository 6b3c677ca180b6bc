//! What the sink tests share: a file-backed ring, a checkpoint to deliver, a worker's memory.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    ops::Range,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::{
    DType, Error, ErrorKind, Result,
    device::{Buffer, BufferSlice, MemoryKind, Ring, RingExport},
    sink::{BucketMessage, TensorInRing},
    types::TensorMeta,
    worker::{Apply, TensorView},
};
use memmap2::MmapMut;

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

pub fn within(millis: u64) -> Instant {
    Instant::now() + Duration::from_millis(millis)
}

/// A private folder, as a runtime folder must be.
pub fn runtime_dir() -> tempfile::TempDir {
    let private = std::fs::Permissions::from_mode(0o700);
    tempfile::Builder::new().prefix("ck").permissions(private).tempdir().unwrap()
}

#[derive(Debug)]
struct Mapping(MmapMut);

// SAFETY: the mapping is fixed, writable, and lives as long as the value.
unsafe impl Buffer for Mapping {
    fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }
    fn len_bytes(&self) -> u64 {
        self.0.len() as u64
    }
    fn memory(&self) -> MemoryKind {
        MemoryKind::Host
    }
}

/// A ring in a 0600 file, 512 bytes behind the file's start.
#[derive(Debug)]
pub struct FileRing {
    pub path: PathBuf,
    map: Arc<Mapping>,
}

pub const RING_OFFSET: u64 = 512;

impl FileRing {
    pub fn new(dir: &Path, name: &str, len: u64) -> Self {
        let path = dir.join(name);
        let file =
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path).unwrap();
        file.set_len(RING_OFFSET + len).unwrap();
        // SAFETY: the file is this test's own and keeps its length.
        let map = unsafe { memmap2::MmapOptions::new().offset(RING_OFFSET).len(len as usize).map_mut(&file) }
            .unwrap();
        Self { path, map: Arc::new(Mapping(map)) }
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let slice = BufferSlice::new(self.map.clone(), offset..offset + bytes.len() as u64).unwrap();
        // SAFETY: the test writes only between an ack and the next bucket.
        unsafe { slice.as_mut_slice() }.unwrap().copy_from_slice(bytes);
    }
}

impl Ring for FileRing {
    fn buffer(&self) -> Arc<dyn Buffer> {
        self.map.clone()
    }
    fn export(&self) -> RingExport {
        RingExport::Host { path: self.path.clone(), offset_bytes: RING_OFFSET }
    }
    fn freed(&self, _range: Range<u64>) {}
}

/// Two buckets of tensors with recognisable bytes.
pub fn checkpoint() -> Vec<Vec<(TensorMeta, Vec<u8>)>> {
    let tensor = |name: &str, dtype, shape: &[u64], seed: u8| {
        let meta = TensorMeta::new(name, dtype, shape).unwrap();
        let bytes = (0..meta.len_bytes()).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect();
        (meta, bytes)
    };
    vec![
        vec![
            tensor("embed", DType::BF16, &[7, 16], 1),
            tensor("scalar", DType::F32, &[], 2),
            tensor("nothing", DType::F16, &[0, 4], 3),
        ],
        vec![
            tensor("layer.0.weight", DType::F8_E4M3, &[33], 4),
            tensor("layer.0.bias \u{e9}", DType::I64, &[2, 1], 5),
        ],
    ]
}

pub const RING_LEN: u64 = 4096;

/// The layout of a bucket: aligned, the second bucket in the ring's second half.
pub fn message(bucket: u32, tensors: &[(TensorMeta, Vec<u8>)]) -> BucketMessage {
    let mut offset = u64::from(bucket % 2) * (RING_LEN / 2);
    let tensors = tensors
        .iter()
        .map(|(meta, bytes)| {
            let placed = TensorInRing { meta: meta.clone(), offset };
            offset += ckpt_core::types::align_up(bytes.len() as u64);
            placed
        })
        .collect();
    BucketMessage { bucket, tensors }
}

pub fn fill(ring: &FileRing, message: &BucketMessage, tensors: &[(TensorMeta, Vec<u8>)]) {
    for (placed, (_, bytes)) in message.tensors.iter().zip(tensors) {
        ring.write(placed.offset, bytes);
    }
}

/// What a worker holds after an update.
#[derive(Debug, Default)]
pub struct Store {
    pub tensors: BTreeMap<String, (TensorMeta, Vec<u8>)>,
    pub layout: Option<Vec<TensorMeta>>,
    pub indices: Vec<Option<u32>>,
    pub post_hooks: u32,
    pub fail_at: Option<u32>,
    pub failed: Option<String>,
}

impl Apply for Store {
    fn layout(&mut self, tensors: &Arc<[TensorMeta]>) -> Result<()> {
        self.layout = Some(tensors.to_vec());
        Ok(())
    }
    fn bucket(&mut self, bucket: u32, tensors: &[TensorView<'_>]) -> Result<()> {
        if self.fail_at == Some(bucket) {
            return Err(Error::new(ErrorKind::Backend, "load weights", "no parameter called lm_head"));
        }
        for view in tensors {
            self.indices.push(view.layout_index());
            self.tensors.insert(view.meta().name.to_string(), (view.meta().clone(), view.bytes()?.to_vec()));
        }
        Ok(())
    }
    fn post_hook(&mut self) -> Result<()> {
        self.post_hooks += 1;
        Ok(())
    }
    fn failed(&mut self, cause: &Error) {
        self.failed = Some(cause.to_string());
    }
}

pub fn assert_holds_checkpoint(store: &Store) {
    let expected: BTreeMap<String, _> =
        checkpoint().into_iter().flatten().map(|t| (t.0.name.to_string(), t)).collect();
    assert_eq!(store.tensors, expected);
}
