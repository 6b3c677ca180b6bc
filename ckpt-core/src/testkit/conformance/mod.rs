//! One suite for every device and transport: what the seams promise, checked by capability.
//!
//! A crate that implements a seam writes a [`Factory`] and calls [`device`], [`collective`] and [`one_sided`] in a test.
//! All bytes go through the device's own streams and rings, so the suite runs on accelerators as on the host. Nothing
//! in it waits longer than [`LIMIT`] for one thing. An error names the check that failed.

mod collective;
mod device;
mod one_sided;
mod write;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    device::{Buffer, BufferSlice, DeviceBackend, MemoryKind, Stream, host::HostBuffer},
    error::{Error, ErrorKind, Result},
    transport::{Collective, Communicator, GroupSpec, OneSided, Transport},
    types::Epoch,
};

pub use self::{collective::collective, device::device, one_sided::one_sided};

/// The suite's patience with any one wait.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Opens what is to be checked.
pub trait Factory: Send + Sync {
    /// A device for `rank`; called anew for each check.
    fn device(&self, rank: u32) -> Result<Arc<dyn DeviceBackend>>;
    /// A transport for `rank`, whose device is `device`.
    fn transport(&self, rank: u32, device: &Arc<dyn DeviceBackend>) -> Result<Arc<dyn Transport>>;
    /// The largest group to try (4 is enough, fewer where each member needs an accelerator).
    fn max_members(&self) -> u32;
    /// Whether members that enqueue different lengths get an error.
    fn detects_mismatch(&self) -> bool;
    /// Whether work that is put on a stream behind a group waits for the group. Else only its event tells.
    fn later_work_waits(&self) -> bool {
        true
    }
}

/// What was checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Checks that passed.
    pub passed: Vec<String>,
    /// Checks that do not apply, and why.
    pub skipped: Vec<(String, &'static str)>,
}

impl Report {
    async fn check(
        &mut self,
        name: impl Into<String>,
        check: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        let name = name.into();
        // A check has several waits; together they get a multiple of one.
        let outcome =
            tokio::time::timeout(LIMIT * 4, check).await.unwrap_or_else(|_| fail("it does not end"));
        match outcome {
            Ok(()) => {
                tracing::debug!(name, "passed");
                self.passed.push(name);
                Ok(())
            }
            Err(error) => {
                Err(Error::new(ErrorKind::Internal, "conformance", format!("`{name}` failed"))
                    .caused_by(error))
            }
        }
    }

    fn skip(&mut self, name: impl Into<String>, why: &'static str) {
        self.skipped.push((name.into(), why));
    }
}

fn fail<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::new(ErrorKind::Internal, "check", message))
}

fn ensure(holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { fail(message()) }
}

fn soon() -> Instant {
    Instant::now() + LIMIT
}

/// Bytes that differ by `seed` and by place.
fn pattern(seed: u64, len: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len as usize + 8);
    while (bytes.len() as u64) < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len as usize);
    bytes
}

/// A device with a stream and the memory that checks need.
struct Bench {
    device: Arc<dyn DeviceBackend>,
    stream: Arc<dyn Stream>,
}

impl Bench {
    fn new(device: Arc<dyn DeviceBackend>) -> Result<Self> {
        let stream = device.stream("conformance")?;
        Ok(Self { device, stream })
    }

    /// Device memory that holds nothing in particular.
    fn memory(&self, len_bytes: u64) -> Result<BufferSlice> {
        BufferSlice::whole(self.device.allocate_ring(len_bytes.max(1))?.buffer()).slice(0..len_bytes)
    }

    fn host(&self, bytes: &[u8]) -> Result<BufferSlice> {
        Ok(BufferSlice::whole(self.device.pin(HostBuffer::from_bytes(bytes)?)?))
    }

    /// Device memory that holds `bytes`.
    async fn upload(&self, bytes: &[u8]) -> Result<BufferSlice> {
        let memory = self.memory(bytes.len() as u64)?;
        self.stream.copy(self.host(bytes)?, memory.clone())?;
        self.stream.record()?.done(soon()).await?;
        Ok(memory)
    }

    /// What device memory holds.
    async fn download(&self, memory: &BufferSlice) -> Result<Vec<u8>> {
        let host = self.host(&vec![0x55; memory.len_bytes() as usize])?;
        self.stream.copy(memory.clone(), host.clone())?;
        self.stream.record()?.done(soon()).await?;
        // SAFETY: the copy is done, and nobody else has this memory.
        Ok(unsafe { host.as_slice() }?.to_vec())
    }

    async fn expect(&self, memory: &BufferSlice, bytes: &[u8], what: impl FnOnce() -> String) -> Result<()> {
        let found = self.download(memory).await?;
        if found == bytes {
            return Ok(());
        }
        match found.iter().zip(bytes).position(|(a, b)| a != b) {
            Some(place) => fail(format!(
                "{}: byte {place} of {} is {:#04x} and not {:#04x}",
                what(),
                bytes.len(),
                found[place],
                bytes[place]
            )),
            None => fail(format!("{}: the length is {}", what(), found.len())),
        }
    }
}

/// Host memory that says when it is gone.
#[derive(Debug)]
struct Tracked {
    memory: Arc<HostBuffer>,
    gone: Arc<AtomicBool>,
}

impl Tracked {
    fn buffer(bytes: &[u8]) -> Result<(Arc<dyn Buffer>, Arc<AtomicBool>)> {
        let gone = Arc::new(AtomicBool::new(false));
        Ok((Arc::new(Self { memory: HostBuffer::from_bytes(bytes)?, gone: gone.clone() }), gone))
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::SeqCst);
    }
}

// SAFETY: `memory` keeps the promise, and lives as long as this value.
unsafe impl Buffer for Tracked {
    fn address(&self) -> u64 {
        self.memory.address()
    }

    fn len_bytes(&self) -> u64 {
        self.memory.len_bytes()
    }

    fn memory(&self) -> MemoryKind {
        self.memory.memory()
    }
}

/// One rank's device and transport.
struct Node {
    rank: u32,
    bench: Bench,
    transport: Arc<dyn Transport>,
}

impl Node {
    fn open_all(factory: &dyn Factory, members: u32) -> Result<Vec<Self>> {
        let open = |rank| {
            let device = factory.device(rank)?;
            let transport = factory.transport(rank, &device)?;
            Ok(Self { rank, bench: Bench::new(device)?, transport })
        };
        (0..members).map(open).collect()
    }

    fn collective(&self) -> Result<&dyn Collective> {
        self.transport.collective().map_or_else(|| fail("the transport has no collective facet"), Ok)
    }

    fn one_sided(&self) -> Result<&dyn OneSided> {
        self.transport.one_sided().map_or_else(|| fail("the transport has no one-sided facet"), Ok)
    }

    async fn join(
        &self,
        token: &bytes::Bytes,
        members: u32,
        epoch: u64,
        deadline: Instant,
    ) -> Result<Communicator> {
        let (rank, world_size) = (self.rank, members);
        let spec = GroupSpec { token: token.clone(), rank, world_size, epoch: Epoch(epoch) };
        self.collective()?.join(spec, deadline).await
    }
}

/// Forms one group of all `nodes`.
async fn form(nodes: &[Node], epoch: u64) -> Result<Vec<Communicator>> {
    let Some(root) = nodes.first() else { return Ok(Vec::new()) };
    let token = root.collective()?.create_token().await?;
    let members = nodes.len() as u32;
    let joins = nodes.iter().map(|node| node.join(&token, members, epoch, soon()));
    futures_util::future::try_join_all(joins).await
}

/// Polls until `holds`, which some other task brings about.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    let deadline = soon();
    while !holds() {
        if Instant::now() >= deadline {
            return fail(format!("{what} does not happen"));
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}
