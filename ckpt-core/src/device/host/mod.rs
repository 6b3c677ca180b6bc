//! The host device: host memory that plays an accelerator, on any machine.
//!
//! Streams are queues of async jobs, rings are shared-memory files. [`HostDevice::adversarial`] makes it as unkind as
//! the contracts of [`Stream`] and [`Ring`] allow, so that a wait that is missing anywhere fails a test on a CPU:
//! - work runs only when somebody waits for an event behind it (through [`Stream::wait`] too), never earlier;
//! - ring bytes are [`POISON`] when new and when freed;
//! - aborted work "succeeds", and leaves garbage, where [`crate::device::OnAbort`] allows it.

mod adversary;
mod event;
mod memory;
mod ring;
mod runtime_dir;
mod stream;
#[cfg(test)]
mod tests;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::runtime::Handle;

use self::{adversary::Adversary, ring::HostRing, stream::HostQueue};
pub use self::{
    adversary::POISON,
    event::HostEvent,
    memory::HostBuffer,
    runtime_dir::{private_dir, runtime_dir},
};
pub(crate) use self::{
    runtime_dir::check_private_dir,
    stream::{copy_bytes, submit_alone},
};
use crate::{
    device::{Buffer, DeviceBackend, DeviceConfig, DeviceInfo, DeviceProvider, MemoryKind, Ring, Stream},
    error::{Error, ErrorKind, Result},
    transport::Probe,
};

/// Host memory as a device.
#[derive(Debug)]
pub struct HostDevice {
    info: DeviceInfo,
    rank: u32,
    runtime: Handle,
    ring_folders: Vec<PathBuf>,
    free_memory_bytes: Option<u64>,
    ranks_on_host: u64,
    adversary: Option<Arc<Adversary>>,
    pins: AtomicU64,
}

impl HostDevice {
    /// Opens the device of `config`, and removes rings that dead processes left. Streams run on the tokio runtime in
    /// which this is called, which must have a timer.
    pub fn open(config: &DeviceConfig) -> Result<Self> {
        let runtime = Handle::try_current().map_err(|e| {
            Error::new(ErrorKind::Internal, "open the host device", "must be called in a tokio runtime")
                .caused_by(e)
        })?;
        private_dir(&config.runtime_dir)?;
        let ring_folders = ring::ring_folders(&config.runtime_dir);
        for folder in &ring_folders {
            ring::sweep(folder)?;
        }
        let system = rustix::system::uname();
        let hostname = system.nodename().to_string_lossy();
        Ok(Self {
            info: DeviceInfo {
                uuid: format!("HOST-{hostname}-{}", config.rank),
                name: "host memory".to_owned(),
                pci_address: None,
                numa_node: None,
            },
            rank: config.rank,
            runtime,
            ring_folders,
            free_memory_bytes: None,
            ranks_on_host: std::env::var("LOCAL_WORLD_SIZE")
                .ok()
                .and_then(|n| n.parse().ok())
                .unwrap_or(1)
                .max(1),
            adversary: None,
            pins: AtomicU64::new(0),
        })
    }

    /// Makes it adversarial; the same seed makes the same choices.
    #[must_use]
    pub fn adversarial(mut self, seed: u64) -> Self {
        self.adversary = Some(Arc::new(Adversary::new(seed)));
        self
    }

    /// Fixes the answer of [`DeviceBackend::free_memory_bytes`].
    #[must_use]
    pub fn with_free_memory(mut self, bytes: u64) -> Self {
        self.free_memory_bytes = Some(bytes);
        self
    }

    /// How often [`DeviceBackend::pin`] was called: a registration that only changes bytes must not pin again.
    pub fn pin_count(&self) -> u64 {
        self.pins.load(Ordering::Relaxed)
    }
}

impl DeviceBackend for HostDevice {
    fn kind(&self) -> &'static str {
        "host"
    }

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Half of the memory that the machine (or container) could still give, shared equally by `LOCAL_WORLD_SIZE` ranks:
    /// the other half is for the workers' weights, which lie in the same memory. Never more than the ring's file system
    /// has.
    fn free_memory_bytes(&self) -> Result<u64> {
        if let Some(bytes) = self.free_memory_bytes {
            return Ok(bytes);
        }
        let memory = memory::available_bytes()? / 2;
        let room = ring::folder_free_bytes(&self.ring_folders).unwrap_or(memory);
        Ok(memory.min(room) / self.ranks_on_host)
    }

    fn stream(&self, label: &'static str) -> Result<Arc<dyn Stream>> {
        Ok(Arc::new(HostQueue::new(label, self.runtime.clone(), self.adversary.clone())))
    }

    fn allocate_ring(&self, len_bytes: u64) -> Result<Arc<dyn Ring>> {
        let ring = HostRing::create(&self.ring_folders, self.rank, len_bytes, self.adversary.is_some())?;
        Ok(Arc::new(ring))
    }

    fn pin(&self, memory: Arc<dyn Buffer>) -> Result<Arc<dyn Buffer>> {
        if memory.memory() == MemoryKind::Device {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "pin host memory",
                "the bytes are in device memory",
            ));
        }
        self.pins.fetch_add(1, Ordering::Relaxed);
        Ok(memory)
    }

    fn flush_remote_writes(&self) -> Result<()> {
        Ok(())
    }
}

/// Opens [`HostDevice`]s.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostProvider;

impl DeviceProvider for HostProvider {
    fn kind(&self) -> &'static str {
        "host"
    }

    fn probe(&self) -> Probe {
        match memory::available_bytes() {
            Ok(bytes) => {
                let cores = std::thread::available_parallelism().map_or(1, usize::from);
                let gib = bytes as f64 / f64::from(1 << 30);
                Probe::Available(format!("{gib:.1} GiB of free memory, {cores} cores"))
            }
            Err(error) => Probe::Unavailable(error.to_string()),
        }
    }

    fn open(&self, config: &DeviceConfig) -> Result<Arc<dyn DeviceBackend>> {
        Ok(Arc::new(HostDevice::open(config)?))
    }
}
