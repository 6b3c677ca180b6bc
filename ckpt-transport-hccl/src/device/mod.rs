//! Ascend NPUs behind the device seam.

mod acl;
mod event;
mod memory;
mod npu_smi;
mod ring;
mod stream;
pub mod worker;

use std::sync::Arc;

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{
        Buffer, DeviceBackend, DeviceConfig, DeviceInfo, DeviceProvider, MemoryKind, Ring, RingExport, Stream,
    },
    transport::Probe,
};

pub use acl::AclCell;
pub(crate) use acl::{Acl, Npu};
pub use event::{AscendEvent, Kept, RawEvent};
pub(crate) use memory::{DeviceMemory, HostMemory};
pub use ring::AscendRing;
pub use stream::AscendStream;

use crate::config::HcclConfig;

/// Finds and opens Ascend devices.
#[derive(Clone, Debug)]
pub struct AscendProvider {
    config: Result<HcclConfig>,
    acl: AclCell,
}

impl AscendProvider {
    /// A provider that looks where `config` says, on the runtime that the transport uses.
    pub fn new(config: Result<HcclConfig>, acl: AclCell) -> Self {
        Self { config, acl }
    }

    fn acl(&self) -> Result<Arc<Acl>> {
        self.acl.acl(self.config.as_ref().map_err(Clone::clone)?)
    }

    /// Opens the device of `local_rank`, with the methods that the seam does not have.
    pub fn open_ascend(&self, local_rank: u32) -> Result<AscendDevice> {
        let acl = self.acl()?;
        let count = acl.device_count()?;
        let restricted = std::env::var("ASCEND_RT_VISIBLE_DEVICES").ok();
        AscendDevice::open(acl, choose_device(local_rank, count, restricted.as_deref())?)
    }
}

/// Which device a local rank uses. Under Ray and Kubernetes each process sees one device only: then it is that one.
fn choose_device(local_rank: u32, count: u32, restricted: Option<&str>) -> Result<u32> {
    let visible = restricted.map_or(String::new(), |list| format!(" (ASCEND_RT_VISIBLE_DEVICES={list})"));
    let refuse = |kind, message: String| Err(Error::new(kind, "choose an NPU", message));
    match count {
        0 => refuse(ErrorKind::Unavailable, format!("no NPU is visible{visible}")),
        1 if restricted.is_some() => Ok(0),
        _ if local_rank < count => Ok(local_rank),
        _ => refuse(
            ErrorKind::ConfigInvalid,
            format!(
                "local rank {local_rank} has no NPU of its own: {count} visible{visible}; start at most {count} \
                 ranks on this host, or set ASCEND_RT_VISIBLE_DEVICES for each rank"
            ),
        ),
    }
}

impl DeviceProvider for AscendProvider {
    fn kind(&self) -> &'static str {
        "ascend"
    }

    fn probe(&self) -> Probe {
        let nodes = HcclConfig::devices().len();
        let acl = match self.acl() {
            Ok(acl) => acl,
            Err(error) if nodes == 0 => {
                return Probe::Unavailable(format!("no /dev/davinci* device; {}", error.message()));
            }
            Err(error) => {
                return Probe::Unavailable(format!("{nodes} device node(s), but {}", error.message()));
            }
        };
        let look = || -> Result<String> {
            let count = acl.device_count()?;
            choose_device(0, count, std::env::var("ASCEND_RT_VISIBLE_DEVICES").ok().as_deref())?;
            Ok(format!("{}, {count} device(s): {}", acl.describe(), acl.soc_name()))
        };
        match look() {
            Ok(found) => Probe::Available(found),
            Err(error) => Probe::Unavailable(format!("{}, but {error}", acl.describe())),
        }
    }

    fn open(&self, config: &DeviceConfig) -> Result<Arc<dyn DeviceBackend>> {
        Ok(Arc::new(self.open_ascend(config.local_rank).map_err(|e| e.with(Key::Rank, config.rank))?))
    }
}

/// One opened NPU.
#[derive(Debug)]
pub struct AscendDevice {
    npu: Arc<Npu>,
    poller: Arc<event::Poller>,
    info: DeviceInfo,
}

impl AscendDevice {
    fn open(acl: Arc<Acl>, number: u32) -> Result<Self> {
        let npu = Arc::new(Npu { acl, number: number as i32 });
        // From here on this process is one of the device's, which its name depends on.
        drop(npu.bind().map_err(|error| error.with(Key::Device, number))?);
        let uuid = npu_smi::uuid(npu.physical_id(&|name| std::env::var(name).ok()));
        let info = DeviceInfo { uuid, name: npu.acl.soc_name(), pci_address: None, numa_node: None };
        npu.acl.remember(&info.uuid, &npu);
        let poller = event::start_poller(npu.clone())?;
        Ok(Self { npu, poller, info })
    }

    /// Device memory that is not exported, such as a worker's own.
    pub fn allocate(&self, len_bytes: u64) -> Result<Arc<dyn Buffer>> {
        Ok(Arc::new(self.on_this_device(DeviceMemory::allocate(&self.npu, len_bytes))?))
    }

    /// Maps `len_bytes` of a ring that another process exported.
    pub fn open_ring(&self, export: &RingExport, len_bytes: u64) -> Result<Arc<dyn Buffer>> {
        let RingExport::Ascend { key, offset_bytes } = export else {
            return Err(Error::new(
                ErrorKind::ConfigInvalid,
                "open a ring of device memory",
                "the ring is not in an NPU's memory; give the worker the same --device as its parameter server",
            ));
        };
        let mapping = memory::IpcMapping::open(&self.npu, key, *offset_bytes, len_bytes);
        Ok(Arc::new(self.on_this_device(mapping)?))
    }

    /// [`DeviceBackend::stream`] with its own type.
    pub fn ascend_stream(&self, label: &'static str) -> Result<AscendStream> {
        self.on_this_device(AscendStream::create(&self.npu, self.poller.clone(), label))
    }

    fn on_this_device<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| error.with(Key::Device, &self.info.uuid))
    }
}

impl DeviceBackend for AscendDevice {
    fn kind(&self) -> &'static str {
        "ascend"
    }

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_memory_bytes(&self) -> Result<u64> {
        self.on_this_device(memory::free_memory(&self.npu))
    }

    fn stream(&self, label: &'static str) -> Result<Arc<dyn Stream>> {
        Ok(Arc::new(self.ascend_stream(label)?))
    }

    fn allocate_ring(&self, len_bytes: u64) -> Result<Arc<dyn Ring>> {
        Ok(Arc::new(self.on_this_device(AscendRing::allocate(&self.npu, len_bytes))?))
    }

    fn own_host_memory(&self, len_bytes: u64) -> Result<Option<Arc<dyn Buffer>>> {
        Ok(Some(Arc::new(self.on_this_device(HostMemory::allocate(&self.npu, len_bytes))?)))
    }

    fn pin(&self, memory: Arc<dyn Buffer>) -> Result<Arc<dyn Buffer>> {
        match memory.memory() {
            MemoryKind::HostPinned => Ok(memory),
            _ => Ok(Arc::new(self.on_this_device(memory::PinnedCopy::of(&self.npu, memory))?)),
        }
    }

    fn with_current(&self, call: &mut dyn FnMut()) -> Result<()> {
        let _bound = self.on_this_device(self.npu.bind())?;
        call();
        Ok(())
    }

    /// Nothing: no transport here reads into an NPU's memory behind the device's back.
    fn flush_remote_writes(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_rank_gets_the_device_of_its_number_or_the_only_one() {
        assert_eq!(choose_device(3, 8, None).unwrap(), 3);
        assert_eq!(choose_device(3, 1, Some("5")).unwrap(), 0);
        let error = choose_device(2, 2, Some("0,1")).unwrap_err();
        assert!(error.to_string().contains("ASCEND_RT_VISIBLE_DEVICES=0,1"), "{error}");
        assert_eq!(choose_device(0, 0, None).unwrap_err().kind(), ErrorKind::Unavailable);
    }
}
