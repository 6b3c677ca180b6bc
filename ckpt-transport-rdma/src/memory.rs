//! Registered memory: what this process lets others read, and where it reads to.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use ckpt_core::{
    Error, ErrorKind, Result,
    device::{Buffer, BufferSlice, MemoryKind},
    transport::{Registration, RemoteRegion},
};
use serde::{Deserialize, Serialize};

use crate::{nic::Nic, sys, verbs::Mr};

/// One buffer, registered with every NIC of the transport.
#[derive(Debug)]
pub(crate) struct MrSet(Vec<Mr>);

impl MrSet {
    /// Blocks: pages are pinned.
    pub(crate) fn register(nics: &[Arc<Nic>], buffer: &dyn Buffer, remote: bool) -> Result<Self> {
        if buffer.memory() == MemoryKind::Device {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "register memory",
                "this transport moves host memory only; read into host memory and copy it to the device",
            ));
        }
        let access = if remote { sys::ACCESS_REMOTE_READ } else { sys::ACCESS_LOCAL_WRITE };
        // Verbs refuse regions of no bytes.
        let nics = if buffer.len_bytes() == 0 { &[] } else { nics };
        nics.iter().map(|nic| Mr::register(&nic.pd, buffer, access)).collect::<Result<_>>().map(Self)
    }

    pub(crate) fn local_key(&self, nic: usize) -> u32 {
        self.0.get(nic).map_or(0, Mr::local_key)
    }

    pub(crate) fn remote_keys(&self) -> Vec<u32> {
        self.0.iter().map(Mr::remote_key).collect()
    }
}

/// Registrations that are kept for the next read into the same buffer, until the buffer is gone.
#[derive(Debug, Default)]
pub(crate) struct MrCache(Mutex<Vec<Kept>>);

type Kept = (Weak<dyn Buffer>, Arc<MrSet>);

impl MrCache {
    fn lock(&self) -> MutexGuard<'_, Vec<Kept>> {
        // Each change under this lock is one call.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, buffer: &Arc<dyn Buffer>) -> Option<Arc<MrSet>> {
        // The same place and size as well as the same object: two buffers without bytes may share an address.
        let same = |kept: &Weak<dyn Buffer>| std::ptr::addr_eq(kept.as_ptr(), Arc::as_ptr(buffer));
        self.lock().iter().find(|(kept, _)| same(kept)).map(|(_, set)| set.clone())
    }

    /// The registration of `buffer` for reads into it.
    pub(crate) async fn get(&self, nics: &[Arc<Nic>], buffer: &Arc<dyn Buffer>) -> Result<Arc<MrSet>> {
        self.prune();
        if let Some(set) = self.find(buffer) {
            return Ok(set);
        }
        let set = Arc::new(register(nics, buffer, false).await?);
        // Two reads that came at once both registered it; one of the two is kept.
        self.lock().push((Arc::downgrade(buffer), set.clone()));
        Ok(set)
    }

    /// Forgets buffers that are gone, so that their pages are unpinned.
    pub(crate) fn prune(&self) {
        let mut gone = Vec::new();
        self.lock().retain_mut(|(buffer, set)| {
            let keep = buffer.strong_count() > 0;
            if !keep {
                gone.push(set.clone());
            }
            keep
        });
        drop(gone);
    }
}

/// Registers without blocking the runtime. A cancelled caller leaves no registration behind.
pub(crate) async fn register(nics: &[Arc<Nic>], buffer: &Arc<dyn Buffer>, remote: bool) -> Result<MrSet> {
    let (nics, buffer) = (nics.to_vec(), buffer.clone());
    tokio::task::spawn_blocking(move || MrSet::register(&nics, &*buffer, remote)).await.unwrap_or_else(|e| {
        Err(Error::new(ErrorKind::Internal, "register memory", "the task ended").caused_by(e))
    })
}

/// What a reader believes about a region, and how much of it it wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claim {
    pub(crate) generation: u64,
    pub(crate) address: u64,
    /// Bytes from the region's start to the end of the last read.
    pub(crate) end: u64,
}

/// All live regions of one transport.
#[derive(Debug, Default)]
pub(crate) struct Regions(Mutex<RegionsState>);

#[derive(Debug, Default)]
struct RegionsState {
    /// One counter, so it also rises when the same memory is registered again.
    last: u64,
    /// By generation.
    live: HashMap<u64, Arc<dyn Buffer>>,
}

impl Regions {
    fn lock(&self) -> MutexGuard<'_, RegionsState> {
        // Each change under this lock is whole even after a panic elsewhere.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, buffer: Arc<dyn Buffer>) -> u64 {
        let mut state = self.lock();
        state.last += 1;
        let generation = state.last;
        state.live.insert(generation, buffer);
        generation
    }

    fn remove(&self, generation: u64) {
        let buffer = self.lock().live.remove(&generation);
        drop(buffer);
    }

    /// The memory of a region that lives.
    pub(crate) fn buffer(&self, generation: u64) -> Option<Arc<dyn Buffer>> {
        self.lock().live.get(&generation).cloned()
    }

    /// Whether all of `claims` hold.
    pub(crate) fn check(&self, claims: &[Claim]) -> Result<()> {
        let state = self.lock();
        let error = |kind, message: String| Err(Error::new(kind, "read remote memory", message));
        for claim in claims {
            let generation = claim.generation;
            match state.live.get(&generation) {
                None if generation == 0 || generation > state.last => {
                    let what = format!("the owner never gave out region {generation}; get its metas again");
                    return error(ErrorKind::ConfigInvalid, what);
                }
                None => {
                    let what = format!(
                        "the owner has released region {generation} since it was described; get its metas again"
                    );
                    return error(ErrorKind::Aborted, what);
                }
                Some(buffer) if buffer.address() != claim.address => {
                    let what =
                        format!("region {generation} of the owner is other memory; get its metas again");
                    return error(ErrorKind::ConfigInvalid, what);
                }
                Some(buffer) if claim.end > buffer.len_bytes() => {
                    let what = format!("byte {} is outside the region's {}", claim.end, buffer.len_bytes());
                    return error(ErrorKind::ConfigInvalid, what);
                }
                Some(_) => {}
            }
        }
        Ok(())
    }
}

/// Copies a part of this process's own region; both stay alive. Blocks.
pub(crate) fn copy(from: &BufferSlice, into: &BufferSlice) -> Result<()> {
    let (source, target) = (from.host_ptr()?, into.host_ptr()?);
    if from.len_bytes() != into.len_bytes() {
        return Err(Error::new(ErrorKind::Internal, "read remote memory", "source and destination differ"));
    }
    // SAFETY: both slices keep their memory mapped; the destination is the read's own until its event has completed,
    // and it may overlap the source. An owner that changes registered memory gives up the region first, and then the
    // reader is told.
    unsafe { std::ptr::copy(source.as_ptr(), target.as_ptr(), into.len_bytes() as usize) };
    Ok(())
}

/// Memory that peers can read until this is dropped.
#[derive(Debug)]
pub(crate) struct Registered {
    pub(crate) region: RemoteRegion,
    pub(crate) keys: Option<MrSet>,
    /// Holds the memory until this is dropped.
    pub(crate) regions: Arc<Regions>,
}

impl Registration for Registered {
    fn region(&self) -> &RemoteRegion {
        &self.region
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // First the answer to readers that ask, then the keys, then the memory: a reader whose bytes came from a region
        // that was being released learns of it when it asks afterwards.
        let memory = self.regions.buffer(self.region.generation);
        self.regions.remove(self.region.generation);
        self.keys = None;
        drop(memory);
    }
}

#[cfg(test)]
mod tests {
    use ckpt_core::device::host::HostBuffer;

    use super::*;

    #[test]
    fn unknown_stale_and_outside_are_told_apart() {
        let regions = Regions::default();
        let memory = HostBuffer::allocate(100).unwrap();
        let here = memory.address();
        let generation = regions.add(memory.clone());
        let kind = |generation, address, end| {
            regions.check(&[Claim { generation, address, end }]).map_err(|e| e.kind())
        };
        assert_eq!(kind(generation, here, 100), Ok(()));
        assert_eq!(kind(generation, here, 101), Err(ErrorKind::ConfigInvalid));
        assert_eq!(kind(generation, here + 1, 1), Err(ErrorKind::ConfigInvalid));
        assert_eq!(kind(generation + 1, here, 1), Err(ErrorKind::ConfigInvalid));
        assert_eq!(kind(0, here, 1), Err(ErrorKind::ConfigInvalid));
        regions.remove(generation);
        assert!(regions.buffer(generation).is_none());
        assert!(regions.add(memory) > generation);
        assert_eq!(kind(generation, here, 1), Err(ErrorKind::Aborted));
    }

    #[test]
    fn a_copy_needs_equal_lengths_and_host_memory() {
        let slice = |bytes: &[u8]| BufferSlice::whole(HostBuffer::from_bytes(bytes).unwrap());
        let (from, into) = (slice(b"abcdef"), slice(b"......"));
        copy(&from.slice(1..4).unwrap(), &into.slice(0..3).unwrap()).unwrap();
        // SAFETY: nobody writes it now.
        assert_eq!(unsafe { into.as_slice() }.unwrap(), b"bcd...");
        assert!(copy(&from, &slice(b"...")).is_err());
    }
}
