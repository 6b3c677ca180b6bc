//! Memory that this process lets others read or write: the owner's half of the host transports' one-sided facet.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use bytes::Bytes;

use super::{Registration, RemoteRegion, Way};
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
    live: HashMap<u64, Arc<Region>>,
}

/// What peers may do with a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    ReadWrite,
}

#[derive(Debug)]
struct Region {
    buffer: Arc<dyn Buffer>,
    access: Access,
    /// False once it is released. Held while a peer's bytes go in, so that none arrives after the release.
    live: RwLock<bool>,
}

/// A range that a peer writes.
#[derive(Clone, Debug)]
pub(super) struct Target {
    region: Arc<Region>,
    generation: u64,
    range: BufferSlice,
}

impl Target {
    /// Puts a part of the peer's bytes at `start` of the range, unless the region was released meanwhile.
    pub(super) fn put(&self, start: u64, bytes: &[u8]) -> Result<()> {
        let part = self.range.slice(start..start + bytes.len() as u64)?;
        // Nothing that can panic runs under this lock.
        let live = self.region.live.read().unwrap_or_else(PoisonError::into_inner);
        if !*live {
            return Err(stale(Way::Write, self.generation));
        }
        // SAFETY: `part` keeps the memory mapped. The owner lets peers write it while the region lives, which the lock
        // keeps true; peers that write the same bytes at once have only themselves to blame for their order.
        unsafe { std::ptr::copy(bytes.as_ptr(), part.host_ptr()?.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Whether all that was put still counts.
    pub(super) fn check(&self) -> Result<()> {
        self.put(0, &[])
    }
}

impl Regions {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under this lock is one call: it is whole even after a panic elsewhere.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes `buffer` readable, or writable as well, until the answer is dropped.
    pub(super) fn register(
        self: &Arc<Self>,
        buffer: Arc<dyn Buffer>,
        access: Access,
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
            state.live.insert(generation, Arc::new(Region { buffer, access, live: RwLock::new(true) }));
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
        self.look_up(Way::Read, generation, address, offset, len_bytes).map(|(_, range)| range)
    }

    /// The range that a peer writes.
    pub(super) fn target(
        &self,
        generation: u64,
        address: u64,
        offset: u64,
        len_bytes: u64,
    ) -> Result<Target> {
        let (region, range) = self.look_up(Way::Write, generation, address, offset, len_bytes)?;
        if region.access == Access::Read {
            let what = format!("the owner lets region {generation} be read, and not written");
            return Err(Error::new(ErrorKind::ConfigInvalid, Way::Write.operation(), what));
        }
        Ok(Target { region, generation, range })
    }

    fn look_up(
        &self,
        way: Way,
        generation: u64,
        address: u64,
        offset: u64,
        len_bytes: u64,
    ) -> Result<(Arc<Region>, BufferSlice)> {
        let error = |message: String| Err(Error::new(ErrorKind::ConfigInvalid, way.operation(), message));
        let region = {
            let state = self.lock();
            match state.live.get(&generation) {
                Some(region) => region.clone(),
                None if generation == 0 || generation > state.last => {
                    return error(format!(
                        "the owner never gave out region {generation}; get its metas again"
                    ));
                }
                None => return Err(stale(way, generation)),
            }
        };
        let buffer = &region.buffer;
        if buffer.address() != address {
            return error(format!("region {generation} of the owner is other memory; get its metas again"));
        }
        match offset.checked_add(len_bytes) {
            Some(end) if end <= buffer.len_bytes() => {
                let range = BufferSlice::new(buffer.clone(), offset..end)?;
                Ok((region, range))
            }
            _ => error(format!(
                "{len_bytes} bytes at {offset} are outside the region's {}",
                buffer.len_bytes()
            )),
        }
    }

    /// Whether the region is still registered: asked again after the bytes were read.
    pub(super) fn is_live(&self, generation: u64) -> bool {
        self.lock().live.contains_key(&generation)
    }
}

/// The owner has unregistered the memory, or registered it anew.
pub(super) fn stale(way: Way, generation: u64) -> Error {
    Error::new(
        ErrorKind::Aborted,
        way.operation(),
        format!("the owner has released region {generation} since it was described; get its metas again"),
    )
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
        let region = self.regions.lock().live.remove(&self.region.generation);
        if let Some(region) = region {
            // Waits for a peer's bytes that are going in: one piece at most.
            *region.live.write().unwrap_or_else(PoisonError::into_inner) = false;
        }
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
        let first = regions.register(memory.clone(), Access::Read, "me".into(), Bytes::new()).unwrap();
        let generation = first.region().generation;
        let kind = |g, a, o, l| regions.find(g, a, o, l).map_err(|e| e.kind());
        assert_eq!(kind(generation, address, 10, 90).unwrap().len_bytes(), 90);
        assert_eq!(kind(generation, address, 11, 90).unwrap_err(), ErrorKind::ConfigInvalid);
        assert_eq!(kind(generation, address, u64::MAX, 2).unwrap_err(), ErrorKind::ConfigInvalid);
        assert_eq!(kind(generation, address + 1, 0, 1).unwrap_err(), ErrorKind::ConfigInvalid);
        assert_eq!(kind(generation + 1, address, 0, 1).unwrap_err(), ErrorKind::ConfigInvalid);
        drop(first);
        let second = regions.register(memory, Access::Read, "me".into(), Bytes::new()).unwrap();
        assert!(second.region().generation > generation);
        assert_eq!(kind(generation, address, 0, 1).unwrap_err(), ErrorKind::Aborted);
        assert!(!regions.is_live(generation) && regions.is_live(second.region().generation));
    }

    #[test]
    fn a_writer_puts_nothing_where_it_may_not_and_nothing_after_the_release() {
        let regions = Arc::new(Regions::default());
        let memory = HostBuffer::from_bytes(&[0; 10]).unwrap();
        let address = memory.address();
        let read_only = regions.register(memory.clone(), Access::Read, "me".into(), Bytes::new()).unwrap();
        let refused = regions.target(read_only.region().generation, address, 0, 1).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConfigInvalid);
        let open = regions.register(memory.clone(), Access::ReadWrite, "me".into(), Bytes::new()).unwrap();
        let target = regions.target(open.region().generation, address, 4, 3).unwrap();
        target.put(1, b"ab").unwrap();
        assert!(target.put(2, b"cd").is_err(), "outside its range");
        target.check().unwrap();
        drop(open);
        assert_eq!(target.put(0, b"x").unwrap_err().kind(), ErrorKind::Aborted);
        assert_eq!(target.check().unwrap_err().kind(), ErrorKind::Aborted);
        let found = memory.slice();
        // SAFETY: nobody writes it now.
        assert_eq!(unsafe { found.as_slice() }.unwrap(), b"\0\0\0\0\0ab\0\0\0");
    }
}
