//! CUDA devices behind the device seam.
//!
//! The driver API is used through a table of this crate's own, loaded at run time. The usual bindings turn result
//! codes into Rust enums, where an unknown code of a newer driver is undefined behaviour, and panic when the library
//! or a symbol is missing.

mod batch;
mod driver;
mod event;
pub(crate) mod loans;
pub(crate) mod memory;
pub(crate) mod nvml;
mod pieces;
mod ring;
mod stream;
pub mod worker;

use std::{
    ffi::{CStr, c_char},
    path::Path,
    sync::Arc,
};

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{
        Buffer, DeviceBackend, DeviceConfig, DeviceInfo, DeviceProvider, MemoryKind, Ring, RingExport, Stream,
    },
    topology::numa,
    transport::Probe,
};

pub use batch::CopyBatch;
pub(crate) use driver::Context;
pub use driver::{Driver, DriverCell};
#[cfg(test)]
pub(crate) use driver::{Functions, IpcHandle};
pub use event::{CudaEvent, RawEvent};
pub(crate) use memory::DeviceMemory;
pub use pieces::{HostTime, PieceCopier};
pub use ring::CudaRing;
pub use stream::CudaStream;

/// Finds and opens CUDA devices.
#[derive(Clone, Debug, Default)]
pub struct CudaProvider {
    driver: DriverCell,
    /// In place of the installed one.
    nvml: Option<&'static nvml::Functions>,
}

impl CudaProvider {
    /// A provider that uses `driver`.
    pub fn new(driver: DriverCell) -> Self {
        Self { driver, nvml: None }
    }

    #[cfg(test)]
    pub(crate) fn with_nvml(self, nvml: &'static nvml::Functions) -> Self {
        Self { nvml: Some(nvml), ..self }
    }

    fn ordinal(&self, driver: &Driver, local_rank: u32) -> Result<u32> {
        let restricted = std::env::var("CUDA_VISIBLE_DEVICES").ok();
        choose_device(local_rank, driver.device_count()?, restricted.as_deref())
    }

    /// Opens the device of `local_rank`, with the methods that the seam does not have.
    pub fn open_cuda(&self, local_rank: u32) -> Result<CudaDevice> {
        let driver = self.driver.driver()?;
        let ordinal = self.ordinal(&driver, local_rank)?;
        CudaDevice::open(driver, ordinal)
    }
}

/// Which device a local rank uses. Under Ray and Kubernetes each process sees one device only: then it is that one.
fn choose_device(local_rank: u32, count: u32, restricted: Option<&str>) -> Result<u32> {
    let visible = restricted.map_or(String::new(), |list| format!(" (CUDA_VISIBLE_DEVICES={list})"));
    let refuse = |kind, message: String| Err(Error::new(kind, "choose a CUDA device", message));
    match count {
        0 => refuse(ErrorKind::Unavailable, format!("no CUDA device is visible{visible}")),
        1 if restricted.is_some() => Ok(0),
        _ if local_rank < count => Ok(local_rank),
        _ => refuse(
            ErrorKind::ConfigInvalid,
            format!(
                "local rank {local_rank} has no device of its own: {count} visible{visible}; start at most {count} \
                 ranks on this host, or set CUDA_VISIBLE_DEVICES for each rank"
            ),
        ),
    }
}

impl DeviceProvider for CudaProvider {
    fn kind(&self) -> &'static str {
        "cuda"
    }

    fn probe(&self) -> Probe {
        let look = || -> Result<String> {
            let driver = self.driver.driver()?;
            let count = driver.device_count()?;
            choose_device(0, count, std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref())?;
            let names: Vec<String> =
                (0..count).map(|i| Ok(describe(&driver, i)?.0.name)).collect::<Result<_>>()?;
            Ok(format!("CUDA {} driver, {count} device(s): {}", driver.version_text(), names.join(", ")))
        };
        match look() {
            Ok(found) => Probe::Available(found),
            Err(error) => Probe::Unavailable(error.to_string()),
        }
    }

    fn free_memory_bytes(&self, config: &DeviceConfig) -> Option<u64> {
        let driver = self.driver.driver().ok()?;
        let ordinal = self.ordinal(&driver, config.local_rank).ok()?;
        let (info, _) = describe(&driver, ordinal).ok()?;
        self.nvml.or_else(nvml::installed)?.free_bytes(&info.uuid)
    }

    fn open(&self, config: &DeviceConfig) -> Result<Arc<dyn DeviceBackend>> {
        Ok(Arc::new(self.open_cuda(config.local_rank).map_err(|e| e.with(Key::Rank, config.rank))?))
    }
}

/// What device number `ordinal` is, and its `CUdevice`.
fn describe(driver: &Driver, ordinal: u32) -> Result<(DeviceInfo, i32)> {
    let f = &driver.functions;
    let mut device = 0;
    // SAFETY: writes one i32.
    driver.check("open a CUDA device", unsafe { (f.device_get)(&mut device, ordinal as i32) })?;
    let mut uuid = [0u8; 16];
    // SAFETY: writes 16 bytes.
    driver.check("read a device's UUID", unsafe { (f.device_uuid)(&mut uuid, device) })?;
    let mut text = [0 as c_char; 256];
    // SAFETY: writes at most 256 bytes, zero-terminated.
    driver.check("read a device's name", unsafe { (f.device_name)(text.as_mut_ptr(), 256, device) })?;
    // SAFETY: the driver has just written a zero-terminated string into `text`.
    let name = unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned();
    // SAFETY: as for the name.
    let code = unsafe { (f.device_pci)(text.as_mut_ptr(), 256, device) };
    let pci_address = driver.check("read a device's PCI address", code).ok().and_then(|()| {
        // SAFETY: as for the name.
        normalize_pci(&unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy())
    });
    let numa_node = pci_address.as_deref().and_then(|address| numa::node_of(Path::new(numa::SYSFS), address));
    Ok((DeviceInfo { uuid: format_uuid(&uuid), name, pci_address, numa_node }, device))
}

/// `GPU-` and the UUID in the usual groups: the key under which workers look their endpoint up.
fn format_uuid(uuid: &[u8; 16]) -> String {
    let mut text = String::from("GPU");
    for (i, byte) in uuid.iter().enumerate() {
        if [0, 4, 6, 8, 10].contains(&i) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// sysfs writes the domain with four digits and everything in small letters; the driver may write eight and capitals.
fn normalize_pci(text: &str) -> Option<String> {
    let (domain, rest) = text.trim().split_once(':')?;
    let domain = u32::from_str_radix(domain, 16).ok()?;
    Some(format!("{domain:04x}:{}", rest.to_ascii_lowercase()))
}

/// One opened CUDA device.
#[derive(Debug)]
pub struct CudaDevice {
    context: Arc<Context>,
    poller: Arc<event::Poller>,
    info: DeviceInfo,
    device: i32,
}

impl CudaDevice {
    /// Opens visible device number `ordinal`.
    pub fn open(driver: Arc<Driver>, ordinal: u32) -> Result<Self> {
        let (info, device) = describe(&driver, ordinal)?;
        let context = Context::retain(driver, device).map_err(|e| e.with(Key::Device, &info.uuid))?;
        let poller = event::start_poller(context.clone())?;
        Ok(Self { context, poller, info, device })
    }

    /// Device memory that is not exported, such as a worker's own.
    pub fn allocate(&self, len_bytes: u64) -> Result<Arc<dyn Buffer>> {
        Ok(Arc::new(self.on_this_device(memory::DeviceMemory::allocate(&self.context, len_bytes))?))
    }

    /// Maps `len_bytes` of a ring that another process exported.
    pub fn open_ring(&self, export: &RingExport, len_bytes: u64) -> Result<Arc<dyn Buffer>> {
        let RingExport::Cuda { handle, offset_bytes } = export else {
            return Err(Error::new(
                ErrorKind::ConfigInvalid,
                "open a ring of device memory",
                "the ring is not in CUDA memory; give the worker the same --device as its parameter server",
            ));
        };
        let mapping = memory::IpcMapping::open(&self.context, handle, *offset_bytes, len_bytes);
        Ok(Arc::new(self.on_this_device(mapping)?))
    }

    /// [`DeviceBackend::stream`] with its own type.
    pub fn cuda_stream(&self, label: &'static str) -> Result<CudaStream> {
        self.on_this_device(CudaStream::create(self.context.clone(), self.poller.clone(), label))
    }

    /// [`DeviceBackend::allocate_ring`] with its own type.
    pub fn cuda_ring(&self, len_bytes: u64) -> Result<CudaRing> {
        self.on_this_device(CudaRing::allocate(&self.context, len_bytes))
    }

    fn on_this_device<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| error.with(Key::Device, &self.info.uuid))
    }

    fn attribute(&self, attribute: i32) -> Result<i32> {
        let mut value = 0;
        // SAFETY: writes one i32.
        let code =
            unsafe { (self.context.driver.functions.device_attribute)(&mut value, attribute, self.device) };
        self.context.driver.check("read a device's attribute", code)?;
        Ok(value)
    }
}

impl DeviceBackend for CudaDevice {
    fn kind(&self) -> &'static str {
        "cuda"
    }

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_memory_bytes(&self) -> Result<u64> {
        self.on_this_device(memory::free_memory(&self.context))
    }

    fn stream(&self, label: &'static str) -> Result<Arc<dyn Stream>> {
        Ok(Arc::new(self.cuda_stream(label)?))
    }

    fn allocate_ring(&self, len_bytes: u64) -> Result<Arc<dyn Ring>> {
        Ok(Arc::new(self.cuda_ring(len_bytes)?))
    }

    fn pin(&self, memory: Arc<dyn Buffer>) -> Result<Arc<dyn Buffer>> {
        match memory.memory() {
            MemoryKind::HostPinned => Ok(memory),
            _ => Ok(Arc::new(self.on_this_device(memory::PinnedMemory::register(&self.context, memory))?)),
        }
    }

    fn with_current(&self, call: &mut dyn FnMut()) -> Result<()> {
        let _bound = self.on_this_device(self.context.bind())?;
        call();
        Ok(())
    }

    fn flush_remote_writes(&self) -> Result<()> {
        const RDMA_SUPPORTED: i32 = 116;
        const FLUSH_OPTIONS: i32 = 117;
        const WRITES_ORDERING: i32 = 118;
        const ORDERED_FOR_OWNER: i32 = 100;
        const FLUSH_FROM_HOST: i32 = 1;
        const THIS_CONTEXT: i32 = 0;
        if self.attribute(RDMA_SUPPORTED)? == 0 || self.attribute(WRITES_ORDERING)? >= ORDERED_FOR_OWNER {
            return Ok(());
        }
        match self.context.driver.functions.flush_writes {
            Some(flush) if self.attribute(FLUSH_OPTIONS)? & FLUSH_FROM_HOST != 0 => {
                // SAFETY: takes no pointers; the context is current.
                let flushed = self
                    .context
                    .run("flush RDMA writes", |_| unsafe { flush(THIS_CONTEXT, ORDERED_FOR_OWNER) });
                self.on_this_device(flushed)
            }
            _ => self.on_this_device(Err(Error::new(
                ErrorKind::Unsupported,
                "flush RDMA writes",
                "this device can flush remote writes only from a kernel; receive into host memory instead",
            ))),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
mod worker_tests;
