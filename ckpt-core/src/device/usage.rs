//! Who takes a device's memory during updates: the difference of its free memory between known moments.
//!
//! Free memory is the whole device's. What others take between two moments counts too, so the moments lie where the worker
//! has nothing to do: it is told of a ring only after that was looked at.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::{DeviceBackend, Ring};
use crate::{
    error::{Error, Result},
    sink::{Afterwards, BucketMessage, WeightSink},
};

/// Free bytes around one update.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AroundUpdate {
    /// Before the call.
    pub before: u64,
    /// With ring and group, before the worker hears of them; `None` without a worker.
    pub prepared: Option<u64>,
    /// After the call.
    pub after: u64,
}

/// Free bytes of one device at all moments that were looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreeMemory {
    /// Before this process had a context on the device, and then.
    pub opened: Option<(u64, u64)>,
    /// Every update, the first one first.
    pub updates: Vec<AroundUpdate>,
}

/// What one process has taken of its device, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceUsage {
    /// The ring.
    pub ring_bytes: u64,
    /// It was seen; else it is the plan's.
    pub ring_measured: bool,
    /// The group of the first update, with what the transport's library loads once. `None` if no update was seen.
    pub group_bytes: Option<u64>,
    /// The driver's context. `None` where that cannot be seen from outside.
    pub context_bytes: Option<u64>,
}

impl FreeMemory {
    /// Who took what. `planned_ring_bytes` is the ring of these updates; `kept`: it stays between them.
    pub fn usage(&self, planned_ring_bytes: u64, kept: bool) -> DeviceUsage {
        let taken = |before: u64, after: u64| before.saturating_sub(after);
        // The first update forms the group, so only a later one takes the ring alone. The least: others may take, too.
        let later = self.updates.iter().skip(1).filter(|_| !kept);
        let seen =
            later.filter_map(|at| Some(taken(at.before, at.prepared?))).filter(|bytes| *bytes > 0).min();
        let ring_bytes = seen.unwrap_or(planned_ring_bytes);
        let group = |at: &AroundUpdate| match at.prepared {
            Some(prepared) => taken(at.before, prepared).saturating_sub(ring_bytes),
            // The ring has come and, unless it stays, gone; but memory that others have mapped goes only when they let go of
            // it, which may be after the update has returned: the next ones see it.
            None => {
                let later = self.updates.iter().skip(1).map(|next| next.before);
                let free = later.chain([at.after]).max().unwrap_or(at.after);
                taken(at.before, free).saturating_sub(if kept { ring_bytes } else { 0 })
            }
        };
        DeviceUsage {
            ring_bytes,
            ring_measured: seen.is_some(),
            group_bytes: self.updates.first().map(group),
            context_bytes: self.opened.map(|(before, after)| taken(before, after)),
        }
    }
}

/// Looks at a device's free memory around updates.
#[derive(Debug)]
pub struct MemoryWatch {
    device: Arc<dyn DeviceBackend>,
    before: u64,
    prepared: Arc<Mutex<Option<u64>>>,
}

impl MemoryWatch {
    /// Looks before an update.
    pub fn before(device: Arc<dyn DeviceBackend>) -> Result<Self> {
        let before = device.free_memory_bytes()?;
        Ok(Self { device, before, prepared: Arc::default() })
    }

    /// Looks when the worker of `sink` is about to be told of the ring.
    pub fn over(&self, sink: Box<dyn WeightSink>) -> Box<dyn WeightSink> {
        Box::new(Looking { sink, device: self.device.clone(), prepared: self.prepared.clone() })
    }

    /// Looks after the update.
    pub fn after(self) -> Result<AroundUpdate> {
        let after = self.device.free_memory_bytes()?;
        let prepared = *self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(AroundUpdate { before: self.before, prepared, after })
    }
}

struct Looking {
    sink: Box<dyn WeightSink>,
    device: Arc<dyn DeviceBackend>,
    prepared: Arc<Mutex<Option<u64>>>,
}

#[async_trait]
impl WeightSink for Looking {
    fn endpoint(&self) -> &str {
        self.sink.endpoint()
    }

    async fn open(&mut self, ring: &dyn Ring, deadline: Instant) -> Result<()> {
        let free = self.device.free_memory_bytes()?;
        *self.prepared.lock().unwrap_or_else(PoisonError::into_inner) = Some(free);
        self.sink.open(ring, deadline).await
    }

    async fn deliver(&mut self, bucket: &BucketMessage, deadline: Instant) -> Result<()> {
        self.sink.deliver(bucket, deadline).await
    }

    async fn release(&mut self, deadline: Instant) -> Result<()> {
        self.sink.release(deadline).await
    }

    async fn finish(&mut self, deadline: Instant) -> Result<()> {
        self.sink.finish(deadline).await
    }

    async fn fail(&mut self, cause: &Error, deadline: Instant) -> Result<Afterwards> {
        self.sink.fail(cause, deadline).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RING: u64 = 600;
    const GROUP: u64 = 90;
    const WEIGHTS: u64 = 5000;

    fn around(before: u64, prepared: Option<u64>, after: u64) -> AroundUpdate {
        AroundUpdate { before, prepared, after }
    }

    fn usage(updates: Vec<AroundUpdate>, kept: bool) -> DeviceUsage {
        FreeMemory { opened: Some((9500, 9000)), updates }.usage(RING - 7, kept)
    }

    #[test]
    fn the_workers_own_memory_counts_for_nobody() {
        // The worker takes its weights in the first update, and gives some back in the second.
        let first = around(9000, Some(9000 - GROUP - RING), 9000 - GROUP - WEIGHTS);
        let now = first.after;
        let second = around(now, Some(now - RING), now + 40);
        assert_eq!(
            usage(vec![first, second], false),
            DeviceUsage {
                ring_bytes: RING,
                ring_measured: true,
                group_bytes: Some(GROUP),
                context_bytes: Some(500)
            }
        );
        // With one update the ring is the plan's, and the rest is the group's.
        let alone = usage(vec![first], false);
        assert_eq!(
            (alone.ring_bytes, alone.ring_measured, alone.group_bytes),
            (RING - 7, false, Some(GROUP + 7))
        );
    }

    #[test]
    fn a_ring_that_is_kept_is_not_seen_again() {
        let first = around(9000, Some(9000 - GROUP - (RING - 7)), 9000 - GROUP - RING - WEIGHTS);
        let second = around(first.after, Some(first.after), first.after);
        let kept = usage(vec![first, second], true);
        assert_eq!((kept.ring_bytes, kept.ring_measured, kept.group_bytes), (RING - 7, false, Some(GROUP)));
    }

    #[test]
    fn without_a_worker_only_what_stays_is_seen() {
        for (kept, after) in [(false, 9000 - GROUP), (true, 9000 - GROUP - (RING - 7))] {
            let of = usage(vec![around(9000, None, after), around(after, None, after)], kept);
            assert_eq!(
                (of.ring_bytes, of.ring_measured, of.group_bytes),
                (RING - 7, false, Some(GROUP)),
                "{kept}"
            );
        }
        // The ring was still lent when the first update had returned.
        let late = [around(9000, None, 9000 - GROUP - RING), around(9000 - GROUP, None, 9000 - GROUP - RING)];
        assert_eq!(usage(late.to_vec(), false).group_bytes, Some(GROUP));
        assert_eq!(
            FreeMemory::default().usage(1, false),
            DeviceUsage { ring_bytes: 1, ..DeviceUsage::default() }
        );
    }
}
