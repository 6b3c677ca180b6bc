//! The device seam: memory, streams, events, copies and export of one accelerator (or of host memory).

mod buffer;
pub mod host;
pub mod poll;
mod stream;
pub mod usage;

use std::{fmt, ops::Range, path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};

pub use buffer::{Buffer, BufferSlice, MemoryKind};
pub use host::runtime_dir;
pub use stream::{Event, EventState, HostJob, HostStream, OnAbort, RawStream, Stream};

use crate::{
    error::{Error, ErrorKind, Result},
    transport::Probe,
};

/// How another process finds a ring: what the worker link writes into its first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RingExport {
    /// A shared-memory file, mapped by the worker.
    Host {
        /// The file.
        path: PathBuf,
        /// Bytes from the file's start to the ring's.
        offset_bytes: u64,
    },
    /// `cudaIpcMemHandle_t` of a `cuMemAlloc` block.
    Cuda {
        /// The 64 bytes of the handle.
        handle: Vec<u8>,
        /// Bytes from the block's base to the ring's start.
        offset_bytes: u64,
    },
    /// An ACL IPC export key.
    Ascend {
        /// The 65 bytes of the key.
        key: Vec<u8>,
        /// Bytes from the block's base to the ring's start.
        offset_bytes: u64,
    },
}

/// A device buffer that another process can map. It lives as long as this value: the driver keeps it past an
/// abort until the worker has let go (quarantine).
pub trait Ring: Send + Sync + fmt::Debug {
    /// The memory.
    fn buffer(&self) -> Arc<dyn Buffer>;
    /// What to tell the worker.
    fn export(&self) -> RingExport;
    /// These bytes were acked and hold nothing of value. The adversarial host device poisons them, others do nothing.
    fn freed(&self, range: Range<u64>);
    /// The ring's number, if it is kept between updates: workers may then keep their mapping too.
    fn kept(&self) -> Option<u64> {
        None
    }
}

/// What a device is, for logs, endpoints and topology.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// The key under which workers look their endpoint up: `GPU-...`, `NPU-<ip>-<index>`, `HOST-<hostname>-<rank>`.
    pub uuid: String,
    /// Human-readable model name.
    pub name: String,
    /// PCI address `0000:3b:00.0`, where there is one.
    pub pci_address: Option<String>,
    /// NUMA node of the device, where known.
    pub numa_node: Option<u32>,
}

/// One opened device of one kind.
pub trait DeviceBackend: Send + Sync + fmt::Debug {
    /// `host`, `cuda`, `ascend`.
    fn kind(&self) -> &'static str;
    /// What it is.
    fn info(&self) -> &DeviceInfo;
    /// Free device memory, bytes.
    fn free_memory_bytes(&self) -> Result<u64>;
    /// A new FIFO stream; `label` is for traces.
    fn stream(&self, label: &'static str) -> Result<Arc<dyn Stream>>;
    /// An exported buffer of at least `len_bytes`.
    fn allocate_ring(&self, len_bytes: u64) -> Result<Arc<dyn Ring>>;
    /// Host memory that is fast to copy from and to, on devices that can pin only what their library allocated. `None`:
    /// [`Self::pin`] pins the caller's own memory where it is.
    fn own_host_memory(&self, len_bytes: u64) -> Result<Option<Arc<dyn Buffer>>> {
        let _ = len_bytes;
        Ok(None)
    }
    /// Makes host memory fast to copy from. The result keeps `memory` alive and unpins when dropped. It is a copy at another
    /// address on devices that have [`Self::own_host_memory`].
    fn pin(&self, memory: Arc<dyn Buffer>) -> Result<Arc<dyn Buffer>>;
    /// Calls `call` with the device current on this thread, for libraries that ask which one that is. Devices that have no
    /// such notion only call it.
    fn with_current(&self, call: &mut dyn FnMut()) -> Result<()> {
        call();
        Ok(())
    }
    /// Between a finished one-sided READ into device memory and work that reads those bytes.
    fn flush_remote_writes(&self) -> Result<()>;
}

/// [`DeviceBackend::with_current`] for a call with a result.
pub fn while_current<T>(device: &dyn DeviceBackend, call: impl FnOnce() -> Result<T>) -> Result<T> {
    let (mut call, mut outcome) = (Some(call), None);
    device.with_current(&mut || outcome = call.take().map(|call| call()))?;
    outcome.unwrap_or_else(|| {
        Err(Error::new(ErrorKind::Internal, "make a device current", "the device did not make the call"))
    })
}

/// What a device provider needs to open one.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// The rank of this process.
    pub rank: u32,
    /// Which of the visible devices.
    pub local_rank: u32,
    /// Where shared-memory files and sockets go; exists with mode 0700.
    pub runtime_dir: PathBuf,
}

/// A kind of device that can be looked for and opened; registered in [`crate::transport::Registry`].
pub trait DeviceProvider: Send + Sync {
    /// `host`, `cuda`, `ascend`.
    fn kind(&self) -> &'static str;
    /// Looks without changing anything.
    fn probe(&self) -> Probe;
    /// Free memory of the device that [`Self::open`] would open, bytes, without opening it; `None` where that cannot be seen.
    fn free_memory_bytes(&self, config: &DeviceConfig) -> Option<u64> {
        let _ = config;
        None
    }
    /// Opens the device of `config`.
    fn open(&self, config: &DeviceConfig) -> Result<Arc<dyn DeviceBackend>>;
}
