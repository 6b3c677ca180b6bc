//! CUDA streams: enqueue copies, keep their memory, record and wait for events.

use std::{
    ffi::c_void,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use ckpt_core::{
    Error, ErrorKind, Result,
    device::{BufferSlice, Event, HostStream, MemoryKind, RawStream, Stream},
};

use super::{
    batch::CopyBatch,
    driver::{Context, Functions},
    event::{CudaEvent, Poller, RawEvent},
};
use crate::table::Handle;

/// Numbers streams for the poller: the driver may give a new stream the handle of a destroyed one.
static NEXT_STREAM: AtomicU64 = AtomicU64::new(0);

/// A stream that does not synchronize with the legacy default stream.
pub struct CudaStream {
    label: &'static str,
    context: Arc<Context>,
    poller: Arc<Poller>,
    raw: Handle,
    number: u64,
    /// Memory of work after the last recorded event. Enqueuing happens under this lock, so that an event recorded by
    /// another thread never takes a slice whose work comes after it.
    keep: Mutex<Vec<BufferSlice>>,
}

impl fmt::Debug for CudaStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaStream")
            .field("label", &self.label)
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

impl CudaStream {
    const NON_BLOCKING: u32 = 1;

    pub(crate) fn create(context: Arc<Context>, poller: Arc<Poller>, label: &'static str) -> Result<Self> {
        let mut raw = 0;
        // SAFETY: writes one handle.
        let create = |f: &Functions| unsafe { (f.stream_create)(&mut raw, Self::NON_BLOCKING) };
        context.run("create a CUDA stream", create)?;
        let number = NEXT_STREAM.fetch_add(1, Ordering::Relaxed);
        Ok(Self { label, context, poller, raw, number, keep: Mutex::default() })
    }

    fn kept(&self) -> MutexGuard<'_, Vec<BufferSlice>> {
        self.keep.lock().expect("nothing panics while the list is locked")
    }

    /// Enqueues all copies of `batch`; they run in any order among themselves, and after the work before them.
    pub fn copy_batch(&self, batch: CopyBatch) -> Result<()> {
        let mut keep = self.kept();
        let enqueued = batch.enqueue(&self.context, self.raw);
        // Also after a failure: some may have been enqueued.
        keep.extend(batch.into_memory());
        enqueued
    }

    /// Enqueues a kernel with a pointer and a count as its arguments, in blocks along one dimension. `memory` is all that
    /// it touches.
    pub(crate) fn launch(
        &self,
        function: Handle,
        blocks: u32,
        threads: u32,
        (mut pointer, mut count): (u64, u32),
        memory: Vec<BufferSlice>,
    ) -> Result<()> {
        let Some(launch) = self.context.driver.functions.launch else {
            let message = "the driver cannot launch kernels";
            return Err(Error::new(ErrorKind::Unsupported, "launch a kernel", message));
        };
        let mut arguments: [*mut c_void; 2] =
            [std::ptr::from_mut(&mut pointer).cast(), std::ptr::from_mut(&mut count).cast()];
        let mut keep = self.kept();
        keep.extend(memory);
        // SAFETY: the function takes a pointer and a u32, which the driver copies before it returns; `keep` holds the
        // memory until an event after the kernel has completed.
        self.context.run("launch a kernel", |_| unsafe {
            let arguments = arguments.as_mut_ptr();
            launch(function, blocks, 1, 1, threads, 1, 1, 0, self.raw, arguments, std::ptr::null_mut())
        })
    }

    /// [`Stream::record`] with its own type.
    pub fn record_cuda(&self) -> Result<CudaEvent> {
        let mut keep = self.kept();
        let event = RawEvent::record(&self.context, self.raw)?;
        Ok(self.poller.watch(self.number, event, std::mem::take(&mut *keep)))
    }
}

impl Stream for CudaStream {
    fn raw(&self) -> RawStream {
        RawStream::Cuda(self.raw)
    }

    fn host(&self) -> Option<&dyn HostStream> {
        None
    }

    fn copy(&self, src: BufferSlice, dst: BufferSlice) -> Result<()> {
        if src.len_bytes() != dst.len_bytes() {
            return Err(Error::new(
                ErrorKind::Internal,
                "copy on a CUDA stream",
                format!("the source has {} bytes, the destination {}", src.len_bytes(), dst.len_bytes()),
            ));
        }
        let (from, to, bytes) = (src.address(), dst.address(), src.len_bytes() as usize);
        let kinds = (src.memory(), dst.memory());
        if bytes > 0 && (kinds.0 == MemoryKind::Host || kinds.1 == MemoryKind::Host) {
            // The driver would wait for the whole stream first, and a stream may wait for a peer.
            return Err(Error::new(
                ErrorKind::Unsupported,
                "copy on a CUDA stream",
                "the host memory is not pinned; pin it first (DeviceBackend::pin)",
            ));
        }
        let mut keep = self.kept();
        keep.extend([src, dst]);
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: both ranges lie in buffers that `keep` holds until an event recorded after this copy has completed.
        self.context.run("copy on a CUDA stream", |f| unsafe {
            match kinds {
                (MemoryKind::Device, MemoryKind::Device) => (f.copy_on_device)(to, from, bytes, self.raw),
                (_, MemoryKind::Device) => (f.copy_to_device)(to, from, bytes, self.raw),
                (MemoryKind::Device, _) => (f.copy_to_host)(to, from, bytes, self.raw),
                _ => (f.copy_any)(to, from, bytes, self.raw),
            }
        })
    }

    fn keep_alive(&self, slices: Vec<BufferSlice>) -> Result<()> {
        self.kept().extend(slices);
        Ok(())
    }

    fn record(&self) -> Result<Event> {
        self.record_cuda().map(Event::new)
    }

    fn wait(&self, event: &Event) -> Result<()> {
        let Some(event) = event.downcast::<CudaEvent>() else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "wait on a CUDA stream",
                "the event is not one of a CUDA stream; wait for it on the host first",
            ));
        };
        // SAFETY: both handles are live; the driver keeps what it needs of the event.
        self.context
            .run("wait on a CUDA stream", |f| unsafe { (f.stream_wait)(self.raw, event.native().raw, 0) })
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        if !self.kept().is_empty() {
            // Work after the last event still uses this memory: a last event keeps it. Where no event can be recorded
            // the context is gone, and with it the work.
            let _ = self.record_cuda();
        }
        // SAFETY: created in `create`, destroyed once; the driver lets enqueued work end first, without waiting here.
        let _ = self.context.run("destroy a CUDA stream", |f| unsafe { (f.stream_destroy)(self.raw) });
    }
}
