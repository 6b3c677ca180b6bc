//! CUDA devices and the transports between NVIDIA GPUs: `cuda-ipc` copies inside a host, `nccl` broadcasts everywhere, and
//! `cuda` copies inside hosts and broadcasts between them.
//!
//! Both libraries, the CUDA driver and NCCL, are opened at run time. Without them everything compiles and runs, and the
//! probes say what is missing.

mod communicator;
mod config;
mod cuda;
pub mod device;
mod error;
mod ipc;
mod library;
mod table;
mod transport;
mod warm_up;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod transport_tests;
#[cfg(test)]
mod update_tests;

use ckpt_core::transport::Registry;

pub use config::NcclConfig;
pub use cuda::{CudaTransport, CudaTransportProvider};
pub use ipc::{CudaIpcProvider, CudaIpcTransport};
pub use transport::{NcclProvider, NcclTransport};

/// Adds the device `cuda` and the transports `cuda`, `cuda-ipc` and `nccl`.
pub fn register(registry: &mut Registry) {
    let driver = device::DriverCell::default();
    registry.add_device(device::CudaProvider::new(driver.clone()));
    registry.add_transport(CudaTransportProvider::new(driver.clone()));
    registry.add_transport(CudaIpcProvider::new(driver.clone()));
    registry.add_transport(NcclProvider::new(driver));
}
