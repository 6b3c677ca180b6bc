//! A native worker on an Ascend NPU: opens the ring once and copies each bucket out.

use std::{
    collections::HashMap,
    hash::Hasher,
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{Buffer, BufferSlice, DeviceBackend, MemoryKind, RingExport, Stream},
    types::TensorMeta,
    worker::{Apply, RingMapper, TensorView},
};
use twox_hash::XxHash3_64;

use super::{AscendDevice, AscendStream};

/// Opens rings of NPU memory. The worker that it is given to keeps the mapping while the ring lives.
#[derive(Debug)]
pub struct AscendMapper {
    device: Arc<AscendDevice>,
}

impl AscendMapper {
    /// The bit of Ascend memory in a worker's capabilities.
    const ASCEND: u64 = 4;

    /// A mapper for `device`.
    pub fn new(device: Arc<AscendDevice>) -> Self {
        Self { device }
    }
}

impl RingMapper for AscendMapper {
    fn capabilities(&self) -> u64 {
        Self::ASCEND
    }

    fn map(&mut self, export: &RingExport, len_bytes: u64) -> Result<Arc<dyn Buffer>> {
        self.device.open_ring(export, len_bytes)
    }
}

/// A model's parameters in device memory, by name.
#[derive(Debug)]
pub struct DeviceParameters {
    device: Arc<AscendDevice>,
    stream: AscendStream,
    by_name: HashMap<Arc<str>, BufferSlice>,
    allocates: bool,
    copy_limit: Duration,
    staging: Option<BufferSlice>,
}

impl DeviceParameters {
    /// Each parameter begins at a multiple of this, as torch_npu's allocator does it.
    const ALIGNMENT: u64 = 512;
    /// Memory for unknown parameters is taken in blocks of at least this.
    const BLOCK: u64 = 256 << 20;
    /// Pinned memory through which parameters are read back.
    const STAGING: u64 = 16 << 20;

    /// Parameters that an engine owns: [`Self::insert`] names them. Others in an update are an error.
    pub fn new(device: Arc<AscendDevice>) -> Result<Self> {
        let stream = device.ascend_stream("copy out")?;
        let copy_limit = Duration::from_secs(30);
        let by_name = HashMap::new();
        Ok(Self { device, stream, by_name, allocates: false, copy_limit, staging: None })
    }

    /// Parameters of a worker without an engine: memory is taken for each name when it first comes.
    pub fn allocating(device: Arc<AscendDevice>) -> Result<Self> {
        Ok(Self { allocates: true, ..Self::new(device)? })
    }

    /// New weights called `name` go to `memory`, which must be device memory of exactly their size.
    pub fn insert(&mut self, name: impl Into<Arc<str>>, memory: BufferSlice) -> Result<()> {
        let name = name.into();
        if memory.memory() != MemoryKind::Device {
            let message = "the parameter is not in device memory";
            return Err(
                Error::new(ErrorKind::ConfigInvalid, "name a parameter", message).with(Key::Tensor, name)
            );
        }
        self.by_name.insert(name, memory);
        Ok(())
    }

    /// The bytes of the parameter called `name`, handed to `take` piece by piece.
    pub fn read(&mut self, name: &str, take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let memory = self.by_name.get(name).cloned().ok_or_else(|| unknown(name, self.by_name.len()))?;
        self.read_slice(&memory, take).map_err(|error| error.with(Key::Tensor, name))
    }

    fn read_slice(&mut self, memory: &BufferSlice, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let staging = match &self.staging {
            Some(staging) => staging.clone(),
            None => {
                let own = self.device.own_host_memory(Self::STAGING)?.ok_or_else(|| {
                    Error::new(ErrorKind::Internal, "read a parameter", "the device has no host memory")
                })?;
                self.staging.insert(BufferSlice::whole(own)).clone()
            }
        };
        let mut at = 0;
        while at < memory.len_bytes() {
            let len = Self::STAGING.min(memory.len_bytes() - at);
            let into = staging.slice(0..len)?;
            self.stream.copy(memory.slice(at..at + len)?, into.clone())?;
            self.finish()?;
            // SAFETY: the copy into the staging memory is done, and `&mut self` keeps another one from starting.
            take(unsafe { into.as_slice() }?)?;
            at += len;
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        self.stream.record_ascend()?.wait(Instant::now() + self.copy_limit)
    }

    /// Takes memory for those of `tensors` that have none.
    fn allocate<'a>(&mut self, tensors: impl Iterator<Item = &'a TensorMeta>) -> Result<()> {
        let aligned = |meta: &TensorMeta| meta.len_bytes().next_multiple_of(Self::ALIGNMENT);
        let missing: Vec<&TensorMeta> =
            tensors.filter(|meta| !self.by_name.contains_key(&meta.name)).collect();
        let mut left: u64 = missing.iter().map(|meta| aligned(meta)).sum();
        let mut block: Option<(Arc<dyn Buffer>, u64)> = None;
        for meta in missing {
            let len = aligned(meta);
            let (memory, used) = match block.take() {
                Some((memory, used)) if used + len <= memory.len_bytes() => (memory, used),
                _ => (self.device.allocate(len.max(left.min(Self::BLOCK)))?, 0),
            };
            let slice = BufferSlice::new(memory.clone(), used..used + meta.len_bytes())?;
            self.by_name.insert(meta.name.clone(), slice);
            block = Some((memory, used + len));
            left -= len;
        }
        Ok(())
    }

    /// Where `tensor` goes.
    fn target(&self, tensor: &TensorView<'_>) -> Result<BufferSlice> {
        let meta = tensor.meta();
        let target = self.by_name.get(&meta.name).ok_or_else(|| unknown(&meta.name, self.by_name.len()))?;
        if target.len_bytes() == meta.len_bytes() {
            return Ok(target.clone());
        }
        let message = format!(
            "the parameter has {} bytes and its new weights {}; is this the checkpoint of this model?",
            target.len_bytes(),
            meta.len_bytes()
        );
        Err(Error::new(ErrorKind::ConfigInvalid, "apply a bucket", message).with(Key::Tensor, &meta.name))
    }

    fn verify(&mut self, tensor: &TensorView<'_>) -> Result<()> {
        let Some(expected) = tensor.digest() else { return Ok(()) };
        let target = self.target(tensor)?;
        let mut hasher = XxHash3_64::with_seed(0);
        self.read_slice(&target, |bytes| {
            hasher.write(bytes);
            Ok(())
        })?;
        let found = hasher.finish();
        if found == expected {
            return Ok(());
        }
        let message = format!(
            "the bytes have the xxh3 digest {found:016x}, their source {expected:016x}; update again"
        );
        Err(Error::new(ErrorKind::Corrupt, "verify a tensor", message).with(Key::Tensor, &tensor.meta().name))
    }
}

fn unknown(name: &str, known: usize) -> Error {
    let message = format!("no parameter has this name ({known} are known)");
    Error::new(ErrorKind::ConfigInvalid, "apply a bucket", message).with(Key::Tensor, name)
}

impl Apply for DeviceParameters {
    fn bucket(&mut self, _bucket: u32, tensors: &[TensorView<'_>]) -> Result<()> {
        if self.allocates {
            self.allocate(tensors.iter().map(TensorView::meta))?;
        }
        let enqueued: Result<()> =
            tensors.iter().try_for_each(|tensor| self.stream.copy(tensor.slice()?, self.target(tensor)?));
        // The ack that follows lets the ring's bytes be written again. Also after a failure: part of it may run.
        let done = self.finish();
        enqueued.and(done)?;
        tensors.iter().try_for_each(|tensor| self.verify(tensor))
    }
}
