//! Huawei Ascend: the device and its collectives (HCCL).
//!
//! This version looks for CANN's libraries and the devices and says what it found; it drives neither. `probe` never
//! says "available" for something that `open` cannot do.

mod config;
mod device;
mod error;
mod library;

use std::sync::Arc;

use ckpt_core::{
    Result,
    transport::{Probe, Transport, TransportConfig, TransportProvider, library::unavailable},
};
pub use config::HcclConfig;
pub use device::AscendProvider;
pub use error::{AclError, HcclError};

/// Finds HCCL.
#[derive(Clone, Debug)]
pub struct HcclProvider {
    config: HcclConfig,
}

impl HcclProvider {
    /// A provider that looks where `config` says.
    pub fn new(config: HcclConfig) -> Self {
        Self { config }
    }

    fn reason(&self) -> String {
        match library::find_hccl(&self.config) {
            Ok(found) => {
                format!("found {found}, but this version of ckpt does not drive it; use --transport tcp")
            }
            Err(error) => error.message().to_owned(),
        }
    }
}

impl TransportProvider for HcclProvider {
    fn name(&self) -> &'static str {
        "hccl"
    }

    fn probe(&self) -> Probe {
        Probe::Unavailable(self.reason())
    }

    fn open(&self, _config: &TransportConfig) -> Result<Arc<dyn Transport>> {
        Err(unavailable("hccl", self.reason()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_libraries_are_named_with_the_way_to_get_them() {
        let config = HcclConfig { folder: Some("/nonexistent".into()), ..HcclConfig::default() };
        let Probe::Unavailable(why) = HcclProvider::new(config).probe() else {
            panic!("found nothing's library")
        };
        assert!(why.contains("libascendcl.so") && why.contains("CKPT_ASCEND_LIBRARY_DIR"), "{why}");
    }

    #[test]
    fn variables_are_read_in_their_order() {
        let both = |name: &str| match name {
            "HCCL_SO_PATH" => Some("/opt/hccl/libhccl.so".to_owned()),
            "ASCEND_HOME_PATH" => Some("/opt/cann".to_owned()),
            _ => None,
        };
        let config = HcclConfig::from_env(&both);
        assert_eq!(config.hccl, Some("/opt/hccl/libhccl.so".into()));
        assert_eq!(config.folder, None);
        assert_eq!(config.folders.first(), Some(&"/opt/cann/lib64".into()));
    }
}
