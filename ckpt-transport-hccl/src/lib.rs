//! Huawei Ascend: NPUs as devices, and the transport `hccl`: broadcasts between them.
//!
//! CANN's libraries, the ACL runtime and HCCL, are opened at run time. Without them everything compiles and runs, and the
//! probes say what is missing. Nothing here has run on an NPU: the tests run on an emulator of the two libraries
//! (`integration-tests/ascend-emulator`). `docs/ascend.md` says what that shows and what it does not.

pub mod check;
mod communicator;
mod config;
pub mod device;
mod error;
mod library;
mod table;
mod transport;
mod warm_up;

use ckpt_core::transport::Registry;

pub use communicator::HcclGroup;
pub use config::HcclConfig;
pub use error::{AclError, HcclError};
pub use transport::{HcclProvider, HcclTransport};

/// Adds the device `ascend` and the transport `hccl`, which look where `env` says.
pub fn register(registry: &mut Registry, env: &dyn Fn(&str) -> Option<String>) {
    let (config, acl) = (HcclConfig::from_env(env), device::AclCell::default());
    registry.add_device(device::AscendProvider::new(config.clone(), acl.clone()));
    registry.add_transport(HcclProvider::new(config, acl));
}

#[cfg(test)]
mod tests {
    use ckpt_core::transport::Probe;

    use super::*;

    #[test]
    fn missing_libraries_are_named_with_the_way_to_get_them() {
        let mut registry = Registry::default();
        let nowhere = |name: &str| (name == "CKPT_ASCEND_LIBRARY_DIR").then(|| "/nonexistent".to_owned());
        register(&mut registry, &nowhere);
        let probes = [
            registry.devices().map(|d| d.probe()).collect::<Vec<_>>(),
            registry.transports().map(|t| t.probe()).collect(),
        ];
        for probe in probes.into_iter().flatten() {
            let Probe::Unavailable(why) = probe else { panic!("found nothing's library") };
            assert!(why.contains("libascendcl.so") && why.contains("CKPT_ASCEND_LIBRARY_DIR"), "{why}");
        }
    }
}
