//! Events. A poller thread notices their completion.

use std::sync::Arc;

use ckpt_core::{
    Result,
    device::{
        BufferSlice,
        poll::{self, Polled, PolledEvent},
    },
};

use super::driver::{Context, Functions};
use crate::{error::CUDA_NOT_READY, table::Handle};

/// A `CUevent` without timing.
pub struct RawEvent {
    context: Arc<Context>,
    pub(crate) raw: Handle,
}

/// An event on a CUDA stream.
pub type CudaEvent = PolledEvent<RawEvent>;

/// The thread that watches a device's events.
pub(crate) type Poller = poll::Poller<RawEvent>;

/// Starts it, with the context current on it.
pub(crate) fn start_poller(context: Arc<Context>) -> Result<Arc<Poller>> {
    Poller::start("cuda-events", move |run| {
        let bound = context.bind();
        if let Err(error) = &bound {
            tracing::error!(%error, "the CUDA event thread has no context; waits will fail");
        }
        run();
    })
}

impl RawEvent {
    const DISABLE_TIMING: u32 = 2;

    /// A new event, recorded on `stream`.
    pub(crate) fn record(context: &Arc<Context>, stream: Handle) -> Result<Arc<Self>> {
        let mut raw = 0;
        // SAFETY: writes one handle.
        let create = |f: &Functions| unsafe { (f.event_create)(&mut raw, Self::DISABLE_TIMING) };
        context.run("create a CUDA event", create)?;
        let event = Arc::new(Self { context: context.clone(), raw });
        // SAFETY: both handles are live, and of one context.
        context.run("record a CUDA event", |f| unsafe { (f.event_record)(raw, stream) })?;
        Ok(event)
    }
}

impl Polled for RawEvent {
    type Keep = Vec<BufferSlice>;

    fn query(&self) -> Result<bool> {
        let _bound = self.context.bind()?;
        self.query_on_poller()
    }

    fn query_on_poller(&self) -> Result<bool> {
        // SAFETY: the event lives as long as `self`.
        match unsafe { (self.context.driver.functions.event_query)(self.raw) } {
            CUDA_NOT_READY => Ok(false),
            code => self.context.driver.check("finish work on a CUDA stream", code).map(|()| true),
        }
    }
}

impl Drop for RawEvent {
    fn drop(&mut self) {
        // SAFETY: created by `record`, destroyed once; the driver allows it while the event is pending.
        let _ = self.context.run("destroy a CUDA event", |f| unsafe { (f.event_destroy)(self.raw) });
    }
}
