//! A CUDA driver and an NCCL made of host memory and threads, behind the same function tables: what the tests of this
//! crate run on. Both are strict: memory that is touched after it was freed or unpinned, a call without a context, a
//! group call while another is in progress are errors, as on a GPU.

mod cuda;
mod nccl;

use std::{net::Ipv4Addr, path::PathBuf, sync::Arc};

use ckpt_core::{device::DeviceBackend, transport::TransportConfig};

pub(crate) use cuda::{CONTEXT_BYTES, FIRST_COUNTED, GROUP_BYTES, is_allocated, is_registered, stack_depth};
pub(crate) use nccl::{fail_next_launch, live_communicators};

use crate::{
    config::NcclConfig,
    device::{CudaDevice, CudaProvider, Driver, DriverCell},
    library::Nccl,
    transport::NcclProvider,
};

/// A driver with eight devices.
pub(crate) fn driver() -> Arc<Driver> {
    Driver::start(cuda::functions()).unwrap()
}

/// The same on a machine where processes cannot map each other's memory.
pub(crate) fn driver_without_ipc() -> Arc<Driver> {
    let mut functions = cuda::functions();
    functions.ipc_open = cuda::ipc_refused;
    Driver::start(functions).unwrap()
}

/// The same with the export of dma-bufs, which a memory file stands for; the driver's refusal if `code` is not 0.
pub(crate) fn device_with_dma_buf(code: i32) -> CudaDevice {
    let mut functions = cuda::functions();
    functions.dma_buf = Some(if code == 0 { cuda::dma_buf } else { cuda::dma_buf_refused });
    CudaProvider::new(DriverCell::of(Driver::start(functions).unwrap())).open_cuda(0).unwrap()
}

/// A device of that driver.
pub(crate) fn device(local_rank: u32) -> CudaDevice {
    CudaProvider::new(DriverCell::of(driver())).open_cuda(local_rank).unwrap()
}

/// A provider of the transport where there is no NCCL.
pub(crate) fn provider_without_nccl() -> NcclProvider {
    let library = Some(PathBuf::from("/nowhere/libnccl.so.2"));
    NcclProvider::with_config(DriverCell::of(driver()), NcclConfig { library, ..NcclConfig::default() })
}

/// A provider of devices whose free memory can be seen without opening them.
pub(crate) fn seen_provider() -> CudaProvider {
    CudaProvider::new(DriverCell::of(driver())).with_nvml(&cuda::NVML)
}

/// What a transport of this crate is opened with, on `device`.
pub(crate) fn config(device: Arc<dyn DeviceBackend>) -> TransportConfig {
    TransportConfig {
        bind: Ipv4Addr::LOCALHOST.into(),
        runtime_dir: std::env::temp_dir(),
        tls: false,
        secret: b"secret".to_vec(),
        connections: 1,
        device,
    }
}

/// A provider of the transport on that driver.
pub(crate) fn provider(config: NcclConfig) -> NcclProvider {
    let nccl = Nccl::start(nccl::functions(), PathBuf::from("fake")).unwrap();
    NcclProvider::with_libraries(DriverCell::of(driver()), nccl, config)
}
