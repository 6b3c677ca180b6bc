//! Memory that this process lets others read: the owner's half of the host transports' one-sided facet.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;

use super::{Registration, RemoteRegion};
use crate::{
    device::{Buffer, BufferSlice, MemoryKind},
    error::{Error, ErrorKind, Result},
};

/// All live registrations of one transport, by generation.
#[derive(Debug, Default)]
pub(super) struct Regions {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The last generation given out: one counter, so it also rises when the same memory is registered again.
    last: u64,
    live: HashMap<u64, Arc<dyn Buffer>>,
}

impl Regions {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under this lock is one call: it is whole even after a panic elsewhere.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes `buffer` readable until the answer is dropped.
    pub(super) fn register(
        self: &Arc<Self>,
        buffer: Arc<dyn Buffer>,
        peer: String,
        descriptor: Bytes,
    ) -> Result<Arc<dyn Registration>> {
        if buffer.memory() == MemoryKind::Device {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "register memory",
                "this transport serves host memory only",
            ));
        }
        let (address, len_bytes) = (buffer.address(), buffer.len_bytes());
        let generation = {
            let mut state = self.lock();
            state.last += 1;
            let generation = state.last;
            state.live.insert(generation, buffer);
            generation
        };
        let region = RemoteRegion { peer, address, len_bytes, generation, descriptor };
        Ok(Arc::new(Registered { region, regions: self.clone() }))
    }

    /// The bytes that a reader asks for, kept alive by the answer.
    pub(super) fn find(
        &self,
        generation: u64,
        address: u64,
        offset: u64,
        len_bytes: u64,
    ) -> Result<BufferSlice> {
        let error = |kind, message: String| Err(Error::new(kind, "read remote memory", message));
        let buffer = {
            let state = self.lock();
            match state.live.get(&generation) {
                Some(buffer) => buffer.clone(),
                None if generation == 0 || generation > state.last => {
                    return error(
                        ErrorKind::ConfigInvalid,
                        format!("the owner never gave out region {generation}; get its metas again"),
                    );
                }
                None => return Err(stale(generation)),
            }
        };
        if buffer.address() != address {
            return error(
                ErrorKind::ConfigInvalid,
                format!("region {generation} of the owner is other memory; get its metas again"),
            );
        }
        match offset.checked_add(len_bytes) {
            Some(end) if end <= buffer.len_bytes() => BufferSlice::new(buffer, offset..end),
            _ => error(
                ErrorKind::ConfigInvalid,
                format!("{len_bytes} bytes at {offset} are outside the region's {}", buffer.len_bytes()),
            ),
        }
    }

    /// Whether the region is still registered: asked again after the bytes were read.
    pub(super) fn is_live(&self, generation: u64) -> bool {
        self.lock().live.contains_key(&generation)
    }
}

/// The owner has unregistered the memory, or registered it anew.
pub(super) fn stale(generation: u64) -> Error {
    Error::new(
        ErrorKind::Aborted,
        "read remote memory",
        format!("the owner has released region {generation} since it was described; get its metas again"),
    )
}

/// A read must lie in its region and land in host memory.
pub(super) fn check_read(op: &super::ReadOp) -> Result<()> {
    op.into.host_ptr()?;
    match op.offset.checked_add(op.into.len_bytes()) {
        Some(end) if end <= op.region.len_bytes => Ok(()),
        _ => Err(Error::new(
            ErrorKind::ConfigInvalid,
            "read remote memory",
            format!(
                "{} bytes at {} are outside the region's {}",
                op.into.len_bytes(),
                op.offset,
                op.region.len_bytes
            ),
        )),
    }
}

#[derive(Debug)]
struct Registered {
    region: RemoteRegion,
    regions: Arc<Regions>,
}

impl Registration for Registered {
    fn region(&self) -> &RemoteRegion {
        &self.region
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // The memory itself lives on while a read holds it.
        let buffer = self.regions.lock().live.remove(&self.region.generation);
        drop(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::host::HostBuffer;

    #[test]
    fn unknown_stale_and_outside_are_told_apart() {
        let regions = Arc::new(Regions::default());
        let memory = HostBuffer::allocate(100).unwrap();
        let address = memory.address();
        let first = regions.register(memory.clone(), "me".into(), Bytes::new()).unwrap();
        let generation = first.region().generation;
        let kind = |g, a, o, l| regions.find(g, a, o, l).map_err(|e| e.kind());
        assert_eq!(kind(generation, address, 10, 90).unwrap().len_bytes(), 90);
        assert_eq!(kind(generation, address, 11, 90).unwrap_err(), ErrorKind::ConfigInvalid);
        assert_eq!(kind(generation, address, u64::MAX, 2).unwrap_err(), ErrorKind::ConfigInvalid);
        assert_eq!(kind(generation, address + 1, 0, 1).unwrap_err(), ErrorKind::ConfigInvalid);
        assert_eq!(kind(generation + 1, address, 0, 1).unwrap_err(), ErrorKind::ConfigInvalid);
        drop(first);
        let second = regions.register(memory, "me".into(), Bytes::new()).unwrap();
        assert!(second.region().generation > generation);
        assert_eq!(kind(generation, address, 0, 1).unwrap_err(), ErrorKind::Aborted);
        assert!(!regions.is_live(generation) && regions.is_live(second.region().generation));
    }
}
