//! A native worker on a CUDA device: opens the ring once, copies each bucket out in one batch.
//!
//! ```no_run
//! use std::{sync::Arc, time::{Duration, Instant}};
//! use ckpt_core::{Result, device::DeviceBackend, worker::NativeWorker};
//! use ckpt_transport_nccl::device::{CudaProvider, worker::{CudaMapper, DeviceParameters}};
//!
//! # fn main() -> Result<()> {
//! let device = Arc::new(CudaProvider::default().open_cuda(0)?);
//! let mapper = CudaMapper::new(device.clone());
//! let mut worker = NativeWorker::new(device.info().uuid.clone()).with_mapper(mapper); // keep it between updates
//! let mut parameters = DeviceParameters::allocating(device)?;
//! let deadline = Instant::now() + Duration::from_secs(300);
//! worker.update("ckpt+unix:///run/user/1000/ckpt/native-1.sock", &mut parameters, deadline)?;
//! # Ok(()) }
//! ```

use std::{
    collections::HashMap,
    hash::Hasher,
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{Buffer, BufferSlice, DeviceBackend, MemoryKind, RingExport, Stream, host::HostBuffer},
    types::TensorMeta,
    worker::{Apply, RingMapper, TensorView},
};
use twox_hash::XxHash3_64;

use super::{
    CopyBatch, CudaDevice, CudaStream,
    pieces::{PieceCopier, worth_it},
};

/// Opens rings of CUDA memory. The worker that it is given to keeps the mapping while the ring lives.
#[derive(Debug)]
pub struct CudaMapper {
    device: Arc<CudaDevice>,
}

impl CudaMapper {
    /// The bit of CUDA memory in a worker's capabilities.
    const CUDA: u64 = 2;

    /// A mapper for `device`.
    pub fn new(device: Arc<CudaDevice>) -> Self {
        Self { device }
    }
}

impl RingMapper for CudaMapper {
    fn capabilities(&self) -> u64 {
        Self::CUDA
    }

    fn map(&mut self, export: &RingExport, len_bytes: u64) -> Result<Arc<dyn Buffer>> {
        self.device.open_ring(export, len_bytes)
    }
}

/// A model's parameters in device memory, by name.
#[derive(Debug)]
pub struct DeviceParameters {
    device: Arc<CudaDevice>,
    stream: CudaStream,
    by_name: HashMap<Arc<str>, BufferSlice>,
    /// Of `layout`, and by the index in it: made again only when either changes, since looking up 100,000 names takes
    /// tens of milliseconds.
    by_index: Vec<Option<BufferSlice>>,
    layout: Option<Arc<[TensorMeta]>>,
    allocates: bool,
    copy_limit: Duration,
    staging: Option<BufferSlice>,
    /// For buckets of many small tensors; `None` where the device cannot.
    copier: Option<PieceCopier>,
}

impl DeviceParameters {
    /// Each parameter begins at a multiple of this, as the devices' own allocators do it.
    const ALIGNMENT: u64 = 256;
    /// Memory for unknown parameters is taken in blocks of at least this.
    const BLOCK: u64 = 256 << 20;
    /// Pinned memory through which parameters are read back.
    const STAGING: u64 = 16 << 20;

    /// Parameters that an engine owns: [`Self::insert`] names them. Others in an update are an error.
    pub fn new(device: Arc<CudaDevice>) -> Result<Self> {
        let stream = device.cuda_stream("copy out")?;
        let copy_limit = Duration::from_secs(30);
        let copier = PieceCopier::load(device.clone());
        if let Err(error) = &copier {
            tracing::info!(%error, "small tensors are copied one by one");
        }
        Ok(Self {
            device,
            stream,
            by_name: HashMap::new(),
            by_index: Vec::new(),
            layout: None,
            allocates: false,
            copy_limit,
            staging: None,
            copier: copier.ok(),
        })
    }

    /// Parameters of a worker without an engine: memory is taken for each name when it first comes.
    pub fn allocating(device: Arc<CudaDevice>) -> Result<Self> {
        Ok(Self { allocates: true, ..Self::new(device)? })
    }

    /// How long the copies of one bucket may take; 30 s if not said.
    pub fn with_copy_limit(mut self, limit: Duration) -> Self {
        self.copy_limit = limit;
        self
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
        self.forget_layout();
        Ok(())
    }

    fn forget_layout(&mut self) {
        self.layout = None;
        self.by_index.clear();
    }

    /// Where the parameter called `name` lies.
    pub fn find(&self, name: &str) -> Option<&BufferSlice> {
        self.by_name.get(name)
    }

    /// The names, in no order.
    pub fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.by_name.keys()
    }

    /// The bytes of the parameter called `name`, handed to `take` piece by piece.
    pub fn read(&mut self, name: &str, take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let Some(memory) = self.by_name.get(name).cloned() else {
            return Err(unknown(name, self.by_name.len()));
        };
        self.read_slice(&memory, take).map_err(|error| error.with(Key::Tensor, name))
    }

    fn read_slice(&mut self, memory: &BufferSlice, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let staging = match &self.staging {
            Some(staging) => staging.clone(),
            None => {
                let pinned = self.device.pin(HostBuffer::allocate(Self::STAGING)?)?;
                self.staging.insert(BufferSlice::whole(pinned)).clone()
            }
        };
        let mut at = 0;
        while at < memory.len_bytes() {
            let len = Self::STAGING.min(memory.len_bytes() - at);
            let into = staging.slice(0..len)?;
            self.stream.copy(memory.slice(at..at + len)?, into.clone())?;
            self.stream.record_cuda()?.wait(Instant::now() + self.copy_limit)?;
            // SAFETY: the copy into the staging memory is done, and `&mut self` keeps another one from starting.
            take(unsafe { into.as_slice() }?)?;
            at += len;
        }
        Ok(())
    }

    /// Takes memory for those of `tensors` that have none.
    fn allocate(&mut self, tensors: &mut dyn Iterator<Item = &TensorMeta>) -> Result<()> {
        let aligned = |meta: &TensorMeta| meta.len_bytes().next_multiple_of(Self::ALIGNMENT);
        let missing: Vec<&TensorMeta> =
            tensors.filter(|meta| !self.by_name.contains_key(&meta.name)).collect();
        let mut left: u64 = missing.iter().map(|meta| aligned(meta)).sum();
        let mut block: Option<(Arc<dyn Buffer>, u64)> = None;
        for meta in missing {
            let len = aligned(meta);
            if block.as_ref().is_none_or(|(memory, used)| used + len > memory.len_bytes()) {
                block = Some((self.device.allocate(len.max(left.min(Self::BLOCK)))?, 0));
            }
            if let Some((memory, used)) = &mut block {
                let slice = BufferSlice::new(memory.clone(), *used..*used + meta.len_bytes())?;
                self.by_name.insert(meta.name.clone(), slice);
                *used += len;
                left -= len;
            }
        }
        Ok(())
    }

    /// Where `tensor` goes.
    fn target(&self, tensor: &TensorView<'_>) -> Result<&BufferSlice> {
        let meta = tensor.meta();
        let indexed = tensor.layout_index().and_then(|index| self.by_index.get(index as usize)?.as_ref());
        let Some(target) = indexed.or_else(|| self.by_name.get(&meta.name)) else {
            return Err(unknown(&meta.name, self.by_name.len()));
        };
        if target.len_bytes() != tensor.len_bytes() {
            return Err(Error::new(
                ErrorKind::ConfigInvalid,
                "apply a bucket",
                format!(
                    "the parameter has {} bytes and its new weights {}; is this the checkpoint of this model?",
                    target.len_bytes(),
                    tensor.len_bytes()
                ),
            )
            .with(Key::Tensor, &meta.name));
        }
        Ok(target)
    }

    /// Enqueues the copies of one bucket.
    fn enqueue(&mut self, tensors: &[TensorView<'_>]) -> Result<()> {
        let bytes = tensors.iter().map(TensorView::len_bytes).sum();
        let on_device = tensors.iter().all(|tensor| tensor.memory() == MemoryKind::Device);
        if let Some(mut copier) = self.copier.take_if(|_| on_device && worth_it(tensors.len(), bytes)) {
            let outcome = self.enqueue_pieces(tensors, &mut copier);
            self.copier = Some(copier);
            return outcome;
        }
        let mut batch = CopyBatch::with_capacity(tensors.len());
        for tensor in tensors {
            batch.push(&tensor.slice()?, self.target(tensor)?)?;
        }
        self.stream.copy_batch(batch)
    }

    fn enqueue_pieces(&mut self, tensors: &[TensorView<'_>], copier: &mut PieceCopier) -> Result<()> {
        // All sources are in one ring. Destinations share few blocks: each is kept once in a row.
        let mut memory: Vec<BufferSlice> =
            tensors.first().map(TensorView::slice).transpose()?.into_iter().collect();
        for tensor in tensors {
            let target = match self.target(tensor) {
                Ok(target) => target,
                Err(error) => {
                    copier.forget();
                    return Err(error);
                }
            };
            copier.push(tensor.address(), target.address(), target.len_bytes());
            if !memory.last().is_some_and(|last| Arc::ptr_eq(last.buffer(), target.buffer())) {
                memory.push(target.clone());
            }
        }
        copier.run(&self.stream, memory)
    }

    fn verify(&mut self, tensor: &TensorView<'_>) -> Result<()> {
        let Some(expected) = tensor.digest() else { return Ok(()) };
        let target = self.target(tensor)?.clone();
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
    fn layout(&mut self, tensors: &Arc<[TensorMeta]>) -> Result<()> {
        if self.layout.as_ref().is_some_and(|known| Arc::ptr_eq(known, tensors)) {
            return Ok(());
        }
        if self.allocates {
            self.allocate(&mut tensors.iter())?;
        }
        self.by_index = tensors.iter().map(|meta| self.by_name.get(&meta.name).cloned()).collect();
        self.layout = Some(tensors.clone());
        Ok(())
    }

    fn bucket(&mut self, _bucket: u32, tensors: &[TensorView<'_>]) -> Result<()> {
        // Those of the layout have their memory.
        if self.allocates && tensors.iter().any(|tensor| tensor.layout_index().is_none()) {
            self.allocate(&mut tensors.iter().map(TensorView::meta))?;
        }
        let enqueued = self.enqueue(tensors);
        // The ack that follows lets the ring's bytes be written again.
        let done = enqueued.and_then(|()| self.stream.record_cuda()?.wait(Instant::now() + self.copy_limit));
        if let (Err(_), Some(copier)) = (&done, &mut self.copier) {
            copier.forget();
        }
        done?;
        tensors.iter().try_for_each(|tensor| self.verify(tensor))
    }
}
