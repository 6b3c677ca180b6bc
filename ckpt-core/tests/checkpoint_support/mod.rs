//! A device that only counts what it pins, and small helpers.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test file uses a part, and ends at the first surprise"
)]

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use ckpt_core::{
    DType, Error, ErrorKind, Result,
    checkpoint::{CheckpointSource, RegisteredCheckpoint, write_safetensors},
    device::{Buffer, DeviceBackend, DeviceInfo, MemoryKind, Ring, Stream},
    types::TensorMeta,
};

/// Pins by wrapping, as a real device does.
#[derive(Debug)]
pub struct CountingDevice {
    info: DeviceInfo,
    pub pinned: Arc<AtomicU64>,
    pub refuse: AtomicBool,
}

impl CountingDevice {
    pub fn new() -> Arc<Self> {
        let info =
            DeviceInfo { uuid: "TEST-0".into(), name: "test".into(), pci_address: None, numa_node: None };
        Arc::new(Self { info, pinned: Arc::default(), refuse: AtomicBool::new(false) })
    }

    /// Blocks that are pinned now.
    pub fn pinned_now(&self) -> u64 {
        self.pinned.load(Ordering::SeqCst)
    }
}

#[derive(Debug)]
struct Pinned {
    memory: Arc<dyn Buffer>,
    count: Arc<AtomicU64>,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::SeqCst);
    }
}

// SAFETY: `memory` is held and is itself a valid buffer.
unsafe impl Buffer for Pinned {
    fn address(&self) -> u64 {
        self.memory.address()
    }

    fn len_bytes(&self) -> u64 {
        self.memory.len_bytes()
    }

    fn memory(&self) -> MemoryKind {
        MemoryKind::HostPinned
    }
}

fn unused<T>() -> Result<T> {
    Err(Error::new(ErrorKind::Unsupported, "test", "this device only pins"))
}

impl DeviceBackend for CountingDevice {
    fn kind(&self) -> &'static str {
        "counting"
    }

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_memory_bytes(&self) -> Result<u64> {
        unused()
    }

    fn stream(&self, _: &'static str) -> Result<Arc<dyn Stream>> {
        unused()
    }

    fn allocate_ring(&self, _: u64) -> Result<Arc<dyn Ring>> {
        unused()
    }

    fn pin(&self, memory: Arc<dyn Buffer>) -> Result<Arc<dyn Buffer>> {
        if self.refuse.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::ResourceExhausted, "pin host memory", "refused by the test"));
        }
        self.pinned.fetch_add(1, Ordering::SeqCst);
        Ok(Arc::new(Pinned { memory, count: self.pinned.clone() }))
    }

    fn flush_remote_writes(&self) -> Result<()> {
        unused()
    }
}

pub fn meta(name: &str, dtype: DType, shape: &[u64]) -> TensorMeta {
    TensorMeta::new(name, dtype, shape).unwrap()
}

/// One tensor of eight elements per dtype, a scalar, an empty tensor and some larger ones.
pub fn varied(prefix: &str) -> Vec<TensorMeta> {
    let mut metas: Vec<TensorMeta> =
        DType::ALL.iter().map(|d| meta(&format!("{prefix}.{}", d.safetensors_name()), *d, &[2, 4])).collect();
    metas.push(meta(&format!("{prefix}.scalar"), DType::F32, &[]));
    metas.push(meta(&format!("{prefix}.empty"), DType::BF16, &[3, 0, 5]));
    metas.push(meta(&format!("{prefix}.large"), DType::U8, &[9_000_001]));
    metas.push(meta(&format!("{prefix}.wide"), DType::BF16, &[1000, 1001]));
    metas
}

/// Writes generated tensors to a file.
pub fn write(path: &Path, metas: &[TensorMeta], seed: u64) -> PathBuf {
    let source = CheckpointSource::generated(metas.iter().cloned(), seed);
    let bytes: Vec<Vec<u8>> = (0..metas.len()).map(|i| source.read(i).unwrap()).collect();
    write_safetensors(path, metas.iter().zip(bytes.iter().map(Vec::as_slice))).unwrap();
    path.to_owned()
}

/// Checks every tensor of a registration against the source, and layout, padding and digests.
pub fn check(registered: &RegisteredCheckpoint, source: &CheckpointSource) {
    assert_eq!(registered.share.arenas.len(), registered.arenas.len());
    let by_name: std::collections::HashMap<_, _> =
        source.tensors().iter().enumerate().map(|(i, t)| (t.meta.name.clone(), i)).collect();
    let mut digests = registered.digests.as_ref().map(|d| d.values.iter());
    for (number, arena) in registered.share.arenas.iter().enumerate() {
        assert!(arena.len_bytes <= registered.arenas[number].len_bytes());
        let slice = registered.slice(number as u32, 0..arena.len_bytes).unwrap();
        // SAFETY: nothing writes a registered checkpoint.
        let bytes = unsafe { slice.as_slice() }.unwrap();
        let mut end = None;
        for tensor in &arena.tensors {
            let index = by_name[&tensor.meta.name];
            assert_eq!(tensor.meta, source.tensors()[index].meta);
            if let Some(end) = end {
                assert!(tensor.offset >= end, "tensors do not overlap and are in order");
                if registered.in_place_bytes == 0 {
                    assert!(
                        bytes[end as usize..tensor.offset as usize].iter().all(|b| *b == 0),
                        "zeroed padding"
                    );
                    assert!(tensor.offset.is_multiple_of(256));
                }
            }
            let here = &bytes[tensor.offset as usize..][..tensor.meta.len_bytes() as usize];
            assert!(here == source.read(index).unwrap(), "{} has other bytes", tensor.meta.name);
            if let Some(digests) = &mut digests {
                let algorithm = registered.digests.as_ref().unwrap().algorithm;
                assert_eq!(digests.next(), Some(&algorithm.digest(here)), "{}", tensor.meta.name);
            }
            end = Some(tensor.offset + tensor.meta.len_bytes());
        }
    }
    assert!(digests.is_none_or(|mut d| d.next().is_none()), "one digest a tensor");
}
