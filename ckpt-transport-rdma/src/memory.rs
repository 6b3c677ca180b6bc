//! Registered memory: what this process lets others read or write, and where its own bytes go and come from.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use ckpt_core::{
    Error, ErrorKind, Result,
    device::{Buffer, BufferSlice, MemoryKind},
    transport::{Registration, RemoteRegion, Transfer, Way},
};
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use crate::{nic::Nic, sys, verbs::Mr};

/// Who may do what with registered memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Only this process's own transfers.
    Local,
    /// Peers read it.
    Read,
    /// Peers read and write it.
    ReadWrite,
}

impl Access {
    const fn flags(self) -> i32 {
        match self {
            Access::Local => sys::ACCESS_LOCAL_WRITE,
            Access::Read => sys::ACCESS_REMOTE_READ,
            // Verbs want local writing wherever there is remote writing.
            Access::ReadWrite => sys::ACCESS_LOCAL_WRITE | sys::ACCESS_REMOTE_WRITE | sys::ACCESS_REMOTE_READ,
        }
    }
}

/// One buffer, registered with every NIC of the transport.
#[derive(Debug)]
pub(crate) struct MrSet(Vec<Mr>);

impl MrSet {
    /// Blocks: pages are pinned.
    pub(crate) fn register(nics: &[Arc<Nic>], buffer: &dyn Buffer, access: Access) -> Result<Self> {
        if buffer.memory() == MemoryKind::Device && buffer.dma_buf().is_none() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "register memory",
                "this device memory cannot be exported (dma-buf); read into host memory and copy it to the device",
            ));
        }
        // Verbs refuse regions of no bytes.
        let nics = if buffer.len_bytes() == 0 { &[] } else { nics };
        nics.iter().map(|nic| register_with(nic, buffer, access)).collect::<Result<_>>().map(Self)
    }

    pub(crate) fn local_key(&self, nic: usize) -> u32 {
        self.0.get(nic).map_or(0, Mr::local_key)
    }

    pub(crate) fn remote_keys(&self) -> Vec<u32> {
        self.0.iter().map(Mr::remote_key).collect()
    }
}

/// Memory for peers gets a key that no memory had before: whoever holds an old one must not reach new memory. Devices
/// use keys again only after many others.
fn register_with(nic: &Nic, buffer: &dyn Buffer, access: Access) -> Result<Mr> {
    let mut used = Vec::new();
    for _ in 0..NEW_KEY_ATTEMPTS {
        let region = Mr::register(&nic.pd, buffer, access.flags())?;
        if access == Access::Local || nic.take_key(region.remote_key()) {
            return Ok(region);
        }
        // Kept until there is another, or the device would give the same again.
        used.push(region);
    }
    let what = "the device gives the same keys again and again; restart this process";
    Err(Error::new(ErrorKind::ResourceExhausted, "register memory", what))
}

const NEW_KEY_ATTEMPTS: usize = 64;

/// Registrations that are kept for the next transfer with the same buffer, until the buffer is gone.
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

    /// The registration of `buffer`, if it is there already.
    pub(crate) fn get_now(&self, buffer: &Arc<dyn Buffer>) -> Option<Arc<MrSet>> {
        self.find(buffer)
    }

    /// The registration of `buffer` for transfers with it.
    pub(crate) async fn get(&self, nics: &[Arc<Nic>], buffer: &Arc<dyn Buffer>) -> Result<Arc<MrSet>> {
        self.prune();
        if let Some(set) = self.find(buffer) {
            return Ok(set);
        }
        let set = Arc::new(register(nics, buffer, Access::Local).await?);
        // Two transfers that came at once both registered it; one of the two is kept.
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
pub(crate) async fn register(nics: &[Arc<Nic>], buffer: &Arc<dyn Buffer>, access: Access) -> Result<MrSet> {
    let (nics, buffer) = (nics.to_vec(), buffer.clone());
    tokio::task::spawn_blocking(move || MrSet::register(&nics, &*buffer, access)).await.unwrap_or_else(|e| {
        Err(Error::new(ErrorKind::Internal, "register memory", "the task ended").caused_by(e))
    })
}

/// What a reader believes about a region, and how much of it it wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claim {
    pub(crate) generation: u64,
    pub(crate) address: u64,
    /// Bytes from the region's start to the end of the last transfer.
    pub(crate) end: u64,
    /// It wants to write.
    pub(crate) write: bool,
}

/// All live regions of one transport.
#[derive(Debug)]
pub(crate) struct Regions {
    state: Mutex<RegionsState>,
    released: broadcast::Sender<u64>,
}

/// Releases that a slow peer has not heard of yet.
const RELEASES: usize = 1024;

impl Default for Regions {
    fn default() -> Self {
        Self { state: Mutex::default(), released: broadcast::channel(RELEASES).0 }
    }
}

#[derive(Debug, Default)]
struct RegionsState {
    /// One counter, so it also rises when the same memory is registered again.
    last: u64,
    /// By generation.
    live: HashMap<u64, (Arc<dyn Buffer>, Access)>,
}

impl Regions {
    fn lock(&self) -> MutexGuard<'_, RegionsState> {
        // Each change under this lock is whole even after a panic elsewhere.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Generations that are released from now on.
    pub(crate) fn releases(&self) -> broadcast::Receiver<u64> {
        self.released.subscribe()
    }

    pub(crate) fn add(&self, buffer: Arc<dyn Buffer>, access: Access) -> u64 {
        let mut state = self.lock();
        state.last += 1;
        let generation = state.last;
        state.live.insert(generation, (buffer, access));
        generation
    }

    pub(crate) fn remove(&self, generation: u64) {
        let buffer = self.lock().live.remove(&generation);
        drop(buffer);
        // Nobody may be listening.
        let _ = self.released.send(generation);
    }

    /// The memory of a region that lives.
    pub(crate) fn buffer(&self, generation: u64) -> Option<Arc<dyn Buffer>> {
        self.lock().live.get(&generation).map(|(buffer, _)| buffer.clone())
    }

    /// Whether all of `claims` hold.
    pub(crate) fn check(&self, claims: &[Claim]) -> Result<()> {
        let state = self.lock();
        claims.iter().try_for_each(|claim| state.find(claim).map(drop))
    }

    /// The memory of `claims`, if all hold: it stays while the answer does.
    #[cfg(feature = "ucx")]
    pub(crate) fn hold(&self, claims: &[Claim]) -> Result<Vec<Arc<dyn Buffer>>> {
        let state = self.lock();
        claims.iter().map(|claim| state.find(claim).cloned()).collect()
    }

    /// Copies `from` to the end of the claimed range of this process's own region. The lock keeps the region alive
    /// meanwhile, so `from` should be short.
    fn put(&self, claim: &Claim, from: &BufferSlice) -> Result<()> {
        let state = self.lock();
        let buffer = state.find(claim)?;
        let start = claim.end - from.len_bytes();
        copy(from, &BufferSlice::new(buffer.clone(), start..claim.end)?)
    }
}

impl RegionsState {
    /// The memory of a claim that holds.
    fn find(&self, claim: &Claim) -> Result<&Arc<dyn Buffer>> {
        let generation = claim.generation;
        let way = if claim.write { Way::Write } else { Way::Read };
        let error = |kind, message: String| Err(Error::new(kind, way.operation(), message));
        match self.live.get(&generation) {
            None if generation == 0 || generation > self.last => {
                let what = format!("the owner never gave out region {generation}; get its metas again");
                error(ErrorKind::ConfigInvalid, what)
            }
            None => {
                let what = format!(
                    "the owner has released region {generation} since it was described; get its metas again"
                );
                error(ErrorKind::Aborted, what)
            }
            Some((buffer, _)) if buffer.address() != claim.address => {
                let what = format!("region {generation} of the owner is other memory; get its metas again");
                error(ErrorKind::ConfigInvalid, what)
            }
            Some((buffer, _)) if claim.end > buffer.len_bytes() => {
                let what = format!("byte {} is outside the region's {}", claim.end, buffer.len_bytes());
                error(ErrorKind::ConfigInvalid, what)
            }
            Some((_, access)) if claim.write && *access != Access::ReadWrite => {
                let what = format!("the owner lets region {generation} be read, and not written");
                error(ErrorKind::ConfigInvalid, what)
            }
            Some((buffer, _)) => Ok(buffer),
        }
    }
}

/// A transfer with this process's own region, which was checked; both memories stay alive. Blocks. `late` is asked now
/// and then.
pub(crate) fn transfer_own(
    regions: &Regions,
    way: Way,
    transfer: &Transfer,
    late: impl Fn() -> Result<()>,
) -> Result<()> {
    let (len, piece) = (transfer.memory.len_bytes(), if way == Way::Read { 64 << 20 } else { 1 << 20 });
    // A region that was released since tells in the check afterwards.
    let Some(buffer) = regions.buffer(transfer.region.generation) else { return Ok(()) };
    let mut start = 0;
    while start < len {
        late()?;
        let end = len.min(start + piece);
        let (mine, there) =
            (transfer.memory.slice(start..end)?, transfer.offset + start..transfer.offset + end);
        match way {
            Way::Read => copy(&BufferSlice::new(buffer.clone(), there)?, &mine)?,
            Way::Write => {
                let RemoteRegion { generation, address, .. } = *transfer.region;
                let claim = Claim { generation, address, end: there.end, write: true };
                regions.put(&claim, &mine)?;
            }
        }
        start = end;
    }
    Ok(())
}

/// Copies within this process; both stay alive.
fn copy(from: &BufferSlice, into: &BufferSlice) -> Result<()> {
    let (source, target) = (from.host_ptr()?, into.host_ptr()?);
    if from.len_bytes() != into.len_bytes() {
        return Err(Error::new(ErrorKind::Internal, "copy memory", "source and destination differ"));
    }
    // SAFETY: both slices keep their memory mapped; this side's is the transfer's own until its event has completed, and
    // it may overlap the other. An owner that changes registered memory gives up the region first, and then the peer is
    // told.
    unsafe { std::ptr::copy(source.as_ptr(), target.as_ptr(), into.len_bytes() as usize) };
    Ok(())
}

/// Memory that peers can read, or also write, until this is dropped.
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
        // First the answer to peers that ask, then the keys, then the memory: while the keys hold, so does the memory, and
        // afterwards a peer's request fails.
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
        let generation = regions.add(memory.clone(), Access::Read);
        let kind = |generation, address, end| {
            regions.check(&[Claim { generation, address, end, write: false }]).map_err(|e| e.kind())
        };
        assert_eq!(kind(generation, here, 100), Ok(()));
        assert_eq!(kind(generation, here, 101), Err(ErrorKind::ConfigInvalid));
        assert_eq!(kind(generation, here + 1, 1), Err(ErrorKind::ConfigInvalid));
        assert_eq!(kind(generation + 1, here, 1), Err(ErrorKind::ConfigInvalid));
        assert_eq!(kind(0, here, 1), Err(ErrorKind::ConfigInvalid));
        let write = Claim { generation, address: here, end: 1, write: true };
        assert_eq!(regions.check(&[write]).unwrap_err().kind(), ErrorKind::ConfigInvalid);
        let open = Claim { generation: regions.add(memory.clone(), Access::ReadWrite), ..write };
        regions.check(&[open]).unwrap();
        regions.remove(generation);
        assert!(regions.buffer(generation).is_none());
        assert!(regions.add(memory, Access::Read) > generation);
        assert_eq!(kind(generation, here, 1), Err(ErrorKind::Aborted));
    }

    /// Device memory of a driver without dma-buf.
    #[derive(Debug)]
    struct Foreign;

    // SAFETY: no byte of it is ever touched: it says that it is on a device.
    unsafe impl Buffer for Foreign {
        fn address(&self) -> u64 {
            0x7000_0000
        }

        fn len_bytes(&self) -> u64 {
            4096
        }

        fn memory(&self) -> MemoryKind {
            MemoryKind::Device
        }
    }

    #[test]
    fn device_memory_that_cannot_be_exported_is_refused() {
        let error = MrSet::register(&[], &Foreign, Access::Read).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
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
