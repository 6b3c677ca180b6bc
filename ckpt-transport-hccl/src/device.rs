//! The Ascend device: looking for it.

use std::sync::Arc;

use ckpt_core::{
    Result,
    device::{DeviceBackend, DeviceConfig, DeviceProvider},
    transport::{Probe, library::unavailable},
};

use crate::{config::HcclConfig, library};

/// Finds Ascend devices.
#[derive(Clone, Debug)]
pub struct AscendProvider {
    config: HcclConfig,
}

impl AscendProvider {
    /// A provider that looks where `config` says.
    pub fn new(config: HcclConfig) -> Self {
        Self { config }
    }

    fn reason(&self) -> String {
        let devices = HcclConfig::devices();
        match library::find_acl(&self.config) {
            Ok(found) => format!(
                "found {found} and {} device node(s), but this version of ckpt does not drive them; use --device host",
                devices.len()
            ),
            Err(error) if devices.is_empty() => format!("no /dev/davinci* device; {}", error.message()),
            Err(error) => format!("{} device node(s), but {}", devices.len(), error.message()),
        }
    }
}

impl DeviceProvider for AscendProvider {
    fn kind(&self) -> &'static str {
        "ascend"
    }

    fn probe(&self) -> Probe {
        Probe::Unavailable(self.reason())
    }

    fn open(&self, _config: &DeviceConfig) -> Result<Arc<dyn DeviceBackend>> {
        Err(unavailable("ascend", self.reason()))
    }
}
