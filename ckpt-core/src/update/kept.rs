//! A ring that is kept between updates.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    device::{Buffer, DeviceBackend, Ring, RingExport},
    error::Result,
};

/// Numbers rings: two of one process must never share one, since workers tell by it whether they know a ring.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// A ring with a number, which tells the worker to keep its mapping too.
#[derive(Debug)]
pub(crate) struct KeptRing {
    ring: Arc<dyn Ring>,
    number: u64,
}

impl KeptRing {
    pub(crate) fn len_bytes(&self) -> u64 {
        self.ring.buffer().len_bytes()
    }

    /// A ring of at least `len_bytes`: `kept` if it is large enough, else a new one in its place.
    pub(super) fn take(
        kept: Option<Arc<Self>>,
        device: &dyn DeviceBackend,
        len_bytes: u64,
    ) -> Result<Arc<Self>> {
        if let Some(kept) = kept.filter(|kept| kept.len_bytes() >= len_bytes) {
            return Ok(kept);
        }
        // The old one is gone by now: there may be no room for both.
        let ring = device.allocate_ring(len_bytes)?;
        Ok(Arc::new(Self { ring, number: NEXT.fetch_add(1, Ordering::Relaxed) }))
    }
}

impl Ring for KeptRing {
    fn buffer(&self) -> Arc<dyn Buffer> {
        self.ring.buffer()
    }

    fn export(&self) -> RingExport {
        self.ring.export()
    }

    fn freed(&self, range: Range<u64>) {
        self.ring.freed(range);
    }

    fn kept(&self) -> Option<u64> {
        Some(self.number)
    }
}
