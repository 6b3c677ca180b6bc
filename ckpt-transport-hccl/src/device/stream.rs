//! Streams: enqueue copies, keep what they use, record and wait for events.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use ckpt_core::{
    Error, ErrorKind, Result,
    device::{self, BufferSlice, Event, HostStream, MemoryKind, Stream},
};

use super::{
    acl::Npu,
    event::{AscendEvent, Kept, Poller, RawEvent},
};
use crate::table::Handle;

/// Numbers streams for the poller: the library may give a new stream the handle of a destroyed one.
static NEXT_STREAM: AtomicU64 = AtomicU64::new(0);

/// An `aclrtStream`; destroyed when its last work is done.
#[derive(Debug)]
pub(crate) struct RawStream {
    npu: Arc<Npu>,
    raw: Handle,
}

impl Drop for RawStream {
    fn drop(&mut self) {
        let destroyed = self.npu.run("destroy a stream", "aclrtDestroyStream", |f| {
            // SAFETY: created in `AscendStream::create`, destroyed once: all work on it held this value.
            unsafe { (f.stream_destroy)(self.raw) }
        });
        if let Err(error) = destroyed {
            tracing::debug!(%error, "a stream was not destroyed");
        }
    }
}

#[derive(Default)]
struct Pending {
    memory: Vec<BufferSlice>,
    events: Vec<Arc<RawEvent>>,
}

/// A stream.
pub struct AscendStream {
    label: &'static str,
    npu: Arc<Npu>,
    poller: Arc<Poller>,
    stream: Arc<RawStream>,
    number: u64,
    /// What work after the last recorded event uses. Enqueuing happens under this lock, so that an event recorded by
    /// another thread never takes a slice whose work comes after it.
    pending: Mutex<Pending>,
}

impl fmt::Debug for AscendStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AscendStream")
            .field("label", &self.label)
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

/// `aclrtMemcpyKind`.
fn copy_kind(from: MemoryKind, to: MemoryKind) -> i32 {
    match (from == MemoryKind::Device, to == MemoryKind::Device) {
        (false, false) => 0,
        (false, true) => 1,
        (true, false) => 2,
        (true, true) => 3,
    }
}

impl AscendStream {
    pub(crate) fn create(npu: &Arc<Npu>, poller: Arc<Poller>, label: &'static str) -> Result<Self> {
        let mut raw = 0;
        npu.run("create a stream", "aclrtCreateStream", |f| {
            // SAFETY: writes one handle.
            unsafe { (f.stream_create)(&mut raw) }
        })?;
        let stream = Arc::new(RawStream { npu: npu.clone(), raw });
        let number = NEXT_STREAM.fetch_add(1, Ordering::Relaxed);
        Ok(Self { label, npu: npu.clone(), poller, stream, number, pending: Mutex::default() })
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().expect("nothing panics while the lists are locked")
    }

    /// [`Stream::record`] with its own type.
    pub fn record_ascend(&self) -> Result<AscendEvent> {
        let mut pending = self.pending();
        let event = RawEvent::record(&self.npu, self.stream.raw)?;
        let Pending { memory, events } = std::mem::take(&mut *pending);
        let kept = Kept { memory, events, stream: self.stream.clone() };
        Ok(self.poller.watch(self.number, event, kept))
    }
}

impl Stream for AscendStream {
    fn raw(&self) -> device::RawStream {
        device::RawStream::Ascend(self.stream.raw)
    }

    fn host(&self) -> Option<&dyn HostStream> {
        None
    }

    fn copy(&self, src: BufferSlice, dst: BufferSlice) -> Result<()> {
        const OPERATION: &str = "copy on an NPU's stream";
        let (from, to, bytes) = (src.address(), dst.address(), src.len_bytes() as usize);
        if src.len_bytes() != dst.len_bytes() {
            let message = format!("the source has {bytes} bytes, the destination {}", dst.len_bytes());
            return Err(Error::new(ErrorKind::Internal, OPERATION, message));
        }
        let kinds = (src.memory(), dst.memory());
        if bytes > 0 && (kinds.0 == MemoryKind::Host || kinds.1 == MemoryKind::Host) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                OPERATION,
                "the host memory is not the NPU's own; pin it first (DeviceBackend::pin)",
            ));
        }
        let mut pending = self.pending();
        pending.memory.extend([src, dst]);
        if bytes == 0 {
            return Ok(());
        }
        // The kind is always given: with the default one the library would have to find out, which it cannot for memory
        // of other processes.
        self.npu.run(OPERATION, "aclrtMemcpyAsync", |f| {
            // SAFETY: both ranges lie in buffers that `pending` holds until an event recorded after this copy completed.
            unsafe { (f.copy)(to, bytes, from, bytes, copy_kind(kinds.0, kinds.1), self.stream.raw) }
        })
    }

    fn keep_alive(&self, slices: Vec<BufferSlice>) -> Result<()> {
        self.pending().memory.extend(slices);
        Ok(())
    }

    fn record(&self) -> Result<Event> {
        self.record_ascend().map(Event::new)
    }

    fn wait(&self, event: &Event) -> Result<()> {
        let Some(event) = event.downcast::<AscendEvent>() else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "wait on an NPU's stream",
                "the event is not one of an NPU's stream; wait for it on the host first",
            ));
        };
        let mut pending = self.pending();
        pending.events.push(event.native().clone());
        self.npu.run("wait on an NPU's stream", "aclrtStreamWaitEvent", |f| {
            // SAFETY: both handles are live; `pending` keeps the event until this stream has passed it.
            unsafe { (f.stream_wait)(self.stream.raw, event.native().raw) }
        })
    }
}

impl Drop for AscendStream {
    fn drop(&mut self) {
        let pending = self.pending();
        let unfinished = !pending.memory.is_empty() || !pending.events.is_empty();
        drop(pending);
        // A last event keeps what that work uses. Where no event can be recorded the device is gone, and with it the work.
        if unfinished && let Err(error) = self.record_ascend() {
            tracing::debug!(%error, "a stream's last work is not watched");
        }
    }
}
