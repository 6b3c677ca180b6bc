//! Events. A poller thread notices their completion.

use std::sync::Arc;

use ckpt_core::{
    Result,
    device::{
        BufferSlice,
        poll::{self, Polled, PolledEvent},
    },
};

use super::{acl::Npu, stream::RawStream};
use crate::table::Handle;

/// An `aclrtEvent` without timing.
pub struct RawEvent {
    npu: Arc<Npu>,
    pub(crate) raw: Handle,
}

/// An event on an Ascend stream.
pub type AscendEvent = PolledEvent<RawEvent>;

/// The thread that watches a device's events.
pub(crate) type Poller = poll::Poller<RawEvent>;

/// What enqueued work uses: memory, events that it waits for, and the stream itself, since ACL allows neither an event nor
/// a stream to be destroyed while work uses it.
#[expect(dead_code, reason = "held until the work is done")]
pub struct Kept {
    pub(crate) memory: Vec<BufferSlice>,
    pub(crate) events: Vec<Arc<RawEvent>>,
    pub(crate) stream: Arc<RawStream>,
}

/// Starts the poller, with the device current on it.
pub(crate) fn start_poller(npu: Arc<Npu>) -> Result<Arc<Poller>> {
    Poller::start("ascend-events", move |run| {
        let bound = npu.bind();
        if let Err(error) = &bound {
            tracing::error!(%error, "the NPU's event thread has no device; waits will fail");
        }
        run();
    })
}

impl RawEvent {
    /// `ACL_EVENT_SYNC`: other streams may wait for it.
    const SYNC: u32 = 1;
    /// `ACL_EVENT_RECORDED_STATUS_COMPLETE`.
    const COMPLETE: i32 = 1;

    /// A new event, recorded on `stream`.
    pub(crate) fn record(npu: &Arc<Npu>, stream: Handle) -> Result<Arc<Self>> {
        let mut raw = 0;
        npu.run("create an event", "aclrtCreateEventExWithFlag", |f| {
            let create = f.event_create_ex.unwrap_or(f.event_create);
            // SAFETY: writes one handle.
            unsafe { create(&mut raw, Self::SYNC) }
        })?;
        let event = Arc::new(Self { npu: npu.clone(), raw });
        npu.run("record an event", "aclrtRecordEvent", |f| {
            // SAFETY: both handles are live, and of one device.
            unsafe { (f.event_record)(raw, stream) }
        })?;
        Ok(event)
    }
}

impl Polled for RawEvent {
    type Keep = Kept;

    fn query(&self) -> Result<bool> {
        let _bound = self.npu.bind()?;
        self.query_on_poller()
    }

    fn query_on_poller(&self) -> Result<bool> {
        let mut status = 0;
        // SAFETY: the event lives as long as `self`; writes one integer.
        let code = unsafe { (self.npu.acl.functions.event_query)(self.raw, &mut status) };
        self.npu.acl.check("finish work on an NPU's stream", "aclrtQueryEventStatus", code)?;
        Ok(status == Self::COMPLETE)
    }
}

impl Drop for RawEvent {
    fn drop(&mut self) {
        let destroyed = self.npu.run("destroy an event", "aclrtDestroyEvent", |f| {
            // SAFETY: created by `record`, destroyed once. Streams that wait for it hold it until they have passed it.
            unsafe { (f.event_destroy)(self.raw) }
        });
        if let Err(error) = destroyed {
            tracing::debug!(%error, "an event was not destroyed");
        }
    }
}
