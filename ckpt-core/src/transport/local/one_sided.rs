//! Reads of another rank's memory in the same process.

use std::{sync::Arc, time::Instant};

use async_trait::async_trait;
use bytes::Bytes;

use super::{Hub, LocalTransport};
use crate::{
    device::{Buffer, Event, HostJob, OnAbort, host},
    error::{Error, ErrorKind, Key, Result},
    transport::{
        OneSided, ReadOp, Registration,
        regions::{check_read, stale},
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
        self.hub.regions.register(buffer, self.hub.address(), Bytes::new())
    }

    fn post_read(&self, batch: Vec<ReadOp>, deadline: Instant) -> Result<Event> {
        let here = self.hub.address();
        for op in &batch {
            check_read(op)?;
            if op.region.peer != here {
                return Err(Error::new(
                    ErrorKind::ConfigInvalid,
                    "read remote memory",
                    "the region is not of this process; the transport `local` reaches only ranks of one process",
                )
                .with(Key::Peer, &op.region.peer));
            }
        }
        let hub = self.hub.clone();
        let run = Box::pin(async move { read(&hub, batch, deadline).await });
        host::submit_alone(&*self.device, HostJob { label: "read", on_abort: OnAbort::Fails, run })
    }
}

async fn read(hub: &Hub, batch: Vec<ReadOp>, deadline: Instant) -> Result<()> {
    for ReadOp { region, offset, into } in batch {
        let len_bytes = into.len_bytes();
        let source = hub.regions.find(region.generation, region.address, offset, len_bytes)?;
        let mut start = 0;
        while start < len_bytes {
            if Instant::now() >= deadline {
                return Err(Error::new(
                    ErrorKind::Timeout,
                    "read remote memory",
                    "the bytes did not arrive by the deadline",
                ));
            }
            let end = len_bytes.min(start + PIECE_BYTES);
            let (from, to) = (source.slice(start..end)?, into.slice(start..end)?);
            // The closure owns both slices: neither side's memory goes away under the copy.
            tokio::task::spawn_blocking(move || host::copy_bytes(&from, &to)).await.map_err(|e| {
                Error::new(ErrorKind::Aborted, "read remote memory", "the runtime has ended").caused_by(e)
            })??;
            start = end;
        }
        if !hub.regions.is_live(region.generation) {
            return Err(stale(region.generation));
        }
    }
    Ok(())
}
