//! Reads and writes of another rank's memory in the same process.

use std::{ops::Range, sync::Arc, time::Instant};

use async_trait::async_trait;
use bytes::Bytes;

use super::{Hub, LocalTransport};
use crate::{
    device::{Buffer, Event, HostJob, OnAbort, host},
    error::{Error, ErrorKind, Key, Result},
    transport::{
        OneSided, ReadOp, Registration, Transfer, Way, WriteOp,
        regions::{Access, stale},
    },
};

/// Copies go in pieces of this size, so that the deadline is seen.
const PIECE_BYTES: u64 = 16 << 20;

impl Hub {
    fn address(&self) -> String {
        format!("local:{:016x}", self.id)
    }
}

#[async_trait]
impl OneSided for LocalTransport {
    async fn register(&self, buffer: Arc<dyn Buffer>) -> Result<Arc<dyn Registration>> {
        self.hub.regions.register(buffer, Access::Read, self.hub.address(), Bytes::new())
    }

    fn post_read(&self, batch: Vec<ReadOp>, deadline: Instant) -> Result<Event> {
        self.post(Way::Read, "read", batch, deadline)
    }

    async fn register_writable(&self, buffer: Arc<dyn Buffer>) -> Result<Arc<dyn Registration>> {
        self.hub.regions.register(buffer, Access::ReadWrite, self.hub.address(), Bytes::new())
    }

    fn post_write(&self, batch: Vec<WriteOp>, deadline: Instant) -> Result<Event> {
        self.post(Way::Write, "write", batch, deadline)
    }
}

impl LocalTransport {
    fn post(
        &self,
        way: Way,
        label: &'static str,
        batch: Vec<impl Into<Transfer>>,
        deadline: Instant,
    ) -> Result<Event> {
        way.check_deadline(deadline)?;
        let batch: Vec<Transfer> = batch.into_iter().map(Into::into).collect();
        for transfer in &batch {
            transfer.check_on_host(way)?;
            if transfer.region.peer != self.hub.address() {
                let what = "the region is not of this process; the transport `local` reaches only ranks of one process";
                let error = Error::new(ErrorKind::ConfigInvalid, way.operation(), what);
                return Err(error.with(Key::Peer, &transfer.region.peer));
            }
        }
        let hub = self.hub.clone();
        let run = Box::pin(async move {
            for transfer in batch {
                match way {
                    Way::Read => read(&hub, transfer, deadline).await?,
                    Way::Write => write(&hub, transfer, deadline).await?,
                }
            }
            Ok(())
        });
        host::submit_alone(&*self.device, HostJob { label, on_abort: OnAbort::Fails, run })
    }
}

async fn read(
    hub: &Hub,
    Transfer { region, offset, memory: into }: Transfer,
    deadline: Instant,
) -> Result<()> {
    let source = hub.regions.find(region.generation, region.address, offset, into.len_bytes())?;
    in_pieces(Way::Read, into.len_bytes(), deadline, |range| {
        let (from, to) = (source.slice(range.clone())?, into.slice(range)?);
        // The closure owns both slices: neither side's memory goes away under the copy.
        Ok(move || host::copy_bytes(&from, &to))
    })
    .await?;
    if hub.regions.is_live(region.generation) { Ok(()) } else { Err(stale(Way::Read, region.generation)) }
}

async fn write(
    hub: &Hub,
    Transfer { region, offset, memory: from }: Transfer,
    deadline: Instant,
) -> Result<()> {
    let target = hub.regions.target(region.generation, region.address, offset, from.len_bytes())?;
    in_pieces(Way::Write, from.len_bytes(), deadline, |range| {
        let (target, start, from) = (target.clone(), range.start, from.slice(range)?);
        // SAFETY: the source belongs to this write until its event has completed; the closure keeps it mapped.
        Ok(move || target.put(start, unsafe { from.as_slice() }?))
    })
    .await?;
    target.check()
}

/// Runs the copy of each piece on a thread that may block, until the deadline.
async fn in_pieces<C: FnOnce() -> Result<()> + Send + 'static>(
    way: Way,
    len_bytes: u64,
    deadline: Instant,
    mut copy: impl FnMut(Range<u64>) -> Result<C>,
) -> Result<()> {
    let mut start = 0;
    while start < len_bytes {
        if Instant::now() >= deadline {
            let what = "the bytes did not arrive by the deadline";
            return Err(Error::new(ErrorKind::Timeout, way.operation(), what));
        }
        let end = len_bytes.min(start + PIECE_BYTES);
        tokio::task::spawn_blocking(copy(start..end)?).await.map_err(|e| {
            Error::new(ErrorKind::Aborted, way.operation(), "the runtime has ended").caused_by(e)
        })??;
        start = end;
    }
    Ok(())
}
