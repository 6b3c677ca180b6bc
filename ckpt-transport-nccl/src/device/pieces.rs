//! Thousands of small copies by one kernel: a call of the driver for each costs microseconds, a block of a kernel none.

use std::{ffi::CStr, sync::Arc, time::Instant};

use ckpt_core::{
    Error, ErrorKind, Result,
    device::{Buffer, BufferSlice, DeviceBackend, Stream, host::HostBuffer},
};

use super::{CudaDevice, CudaStream, driver::Context};
use crate::table::Handle;

/// The kernel's source, zero-terminated as the driver wants it; the driver compiles it for the device.
const SOURCE: &str = concat!(include_str!("copy_pieces.ptx"), "\0");
const NAME: &CStr = c"ckpt_copy_pieces";
/// A block copies at most this much.
const PIECE: u64 = 64 << 10;
const THREADS: u32 = 256;
/// Source, destination and bytes, as the kernel reads them.
const ENTRY: u64 = 24;

/// The loaded kernel and the memory in which it finds its list.
#[derive(Debug)]
pub struct PieceCopier {
    device: Arc<CudaDevice>,
    module: Module,
    /// Pinned host memory and device memory for the list.
    lists: Option<(BufferSlice, BufferSlice)>,
    entries: Vec<[u64; 3]>,
}

#[derive(Debug)]
struct Module {
    context: Arc<Context>,
    module: Handle,
    function: Handle,
}

impl Module {
    fn load(context: &Arc<Context>) -> Result<Self> {
        let operation = "load the copy kernel";
        let f = &context.driver.functions;
        let (Some(load), Some(unload), Some(find)) = (f.module_load, f.module_unload, f.module_function)
        else {
            return Err(Error::new(ErrorKind::Unsupported, operation, "the driver cannot load kernels"));
        };
        let (mut module, mut function) = (0, 0);
        // SAFETY: the source ends with a zero byte; writes one handle.
        context.run(operation, |_| unsafe { load(&mut module, SOURCE.as_ptr().cast()) })?;
        // SAFETY: the module was just loaded; the name ends with a zero byte; writes one handle.
        let found = context.run(operation, |_| unsafe { find(&mut function, module, NAME.as_ptr()) });
        if let Err(error) = found {
            // SAFETY: loaded above, and nothing of it is in use. The error that counts is the one above.
            let _ = context.run(operation, |_| unsafe { unload(module) });
            return Err(error);
        }
        Ok(Self { context: context.clone(), module, function })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if let Some(unload) = self.context.driver.functions.module_unload {
            // SAFETY: loaded by `load`, unloaded once. The driver waits for kernels that run.
            let _ = self.context.run("unload the copy kernel", |_| unsafe { unload(self.module) });
        }
    }
}

impl PieceCopier {
    /// Loads the kernel; an error where driver or device cannot: then copies go one by one.
    pub fn load(device: Arc<CudaDevice>) -> Result<Self> {
        let module = Module::load(&device.context)?;
        Ok(Self { device, module, lists: None, entries: Vec::new() })
    }

    /// Adds a copy between device memory at `from` and `to`. Destinations must not overlap.
    ///
    /// The caller keeps both ranges until [`Self::run`]'s stream has passed: `run` takes what holds them.
    pub(super) fn push(&mut self, mut from: u64, mut to: u64, mut bytes: u64) {
        while bytes > 0 {
            let piece = bytes.min(PIECE);
            self.entries.push([from, to, piece]);
            (from, to, bytes) = (from + piece, to + piece, bytes - piece);
        }
    }

    /// Enqueues all copies on `stream`, which keeps `memory` until they are done. The list's memory is used again by the
    /// next call: the caller waits first, or calls [`Self::forget`] if it cannot.
    pub(super) fn run(&mut self, stream: &CudaStream, mut memory: Vec<BufferSlice>) -> Result<()> {
        let operation = "copy pieces on the device";
        if self.entries.is_empty() {
            return Ok(());
        }
        let count = u32::try_from(self.entries.len()).ok().filter(|count| *count <= i32::MAX as u32);
        let Some(count) = count else {
            self.entries.clear();
            return Err(Error::new(ErrorKind::Unsupported, operation, "more than 2^31 pieces"));
        };
        let bytes = u64::from(count) * ENTRY;
        let (host, list) = self.lists(bytes)?;
        let (host, list) = (host.slice(0..bytes)?, list.slice(0..bytes)?);
        // SAFETY: only this value uses the memory, and by the contract above no copy of it is under way.
        let out = unsafe { host.as_mut_slice() }?;
        for (entry, out) in self.entries.iter().flatten().zip(out.chunks_exact_mut(8)) {
            out.copy_from_slice(&entry.to_le_bytes());
        }
        self.entries.clear();
        stream.copy(host, list.clone())?;
        let address = list.address();
        memory.push(list);
        stream.launch(self.module.function, count, THREADS, (address, count), memory)
    }

    /// Lets go of the list's memory, which a copy that did not end may still read.
    pub(super) fn forget(&mut self) {
        self.entries.clear();
        self.lists = None;
    }

    /// Memory for a list of `bytes`.
    fn lists(&mut self, bytes: u64) -> Result<(BufferSlice, BufferSlice)> {
        if let Some((host, list)) = &self.lists
            && host.len_bytes() >= bytes
        {
            return Ok((host.clone(), list.clone()));
        }
        let bytes = bytes.next_power_of_two().max(1 << 20);
        let host: Arc<dyn Buffer> = self.device.pin(HostBuffer::allocate(bytes)?)?;
        let lists = (BufferSlice::whole(host), BufferSlice::whole(self.device.allocate(bytes)?));
        Ok(self.lists.insert(lists).clone())
    }
}

/// Whether the kernel is worth its launch: many copies, and small ones.
pub(super) fn worth_it(copies: usize, bytes: u64) -> bool {
    copies > 64 && bytes / (copies as u64) < 1 << 20
}

/// How long the host takes to hand `copies` copies of `bytes` each to the device, with and without waiting for them.
#[derive(Clone, Copy, Debug)]
pub struct HostTime {
    /// Until the call had returned.
    pub enqueue: std::time::Duration,
    /// Until the copies were done.
    pub done: std::time::Duration,
}

impl PieceCopier {
    /// Copies each pair of equally long slices of device memory and waits, at most until `deadline`.
    pub fn copy(
        &mut self,
        stream: &CudaStream,
        pairs: &[(BufferSlice, BufferSlice)],
        deadline: Instant,
    ) -> Result<HostTime> {
        let began = Instant::now();
        let mut memory = Vec::with_capacity(2 * pairs.len());
        for (from, to) in pairs {
            if from.len_bytes() != to.len_bytes() {
                self.entries.clear();
                let message = format!("{} bytes cannot go to {}", from.len_bytes(), to.len_bytes());
                return Err(Error::new(ErrorKind::Internal, "copy pieces on the device", message));
            }
            self.push(from.address(), to.address(), from.len_bytes());
            memory.extend([from.clone(), to.clone()]);
        }
        self.run(stream, memory)?;
        let enqueue = began.elapsed();
        let waited = stream.record_cuda()?.wait(deadline);
        if waited.is_err() {
            self.forget();
        }
        waited.map(|()| HostTime { enqueue, done: began.elapsed() })
    }
}
