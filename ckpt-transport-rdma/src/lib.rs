//! RDMA through verbs (`libibverbs`), and through UCX with the cargo feature `ucx`.
//!
//! This version looks for the libraries and the devices and says what it found; it moves no bytes through them.
//! `probe` never says "available" for something that `open` cannot do.

mod config;
mod device;
mod error;
mod library;
#[cfg(feature = "ucx")]
mod ucx;

use std::sync::Arc;

use ckpt_core::{
    Result,
    transport::{Probe, Transport, TransportConfig, TransportProvider, library::unavailable},
};
pub use config::RdmaConfig;
pub use device::{Port, ports};
pub use error::VerbsError;
#[cfg(feature = "ucx")]
pub use ucx::UcxProvider;

/// Finds verbs and HCAs.
#[derive(Clone, Debug)]
pub struct RdmaProvider {
    config: RdmaConfig,
}

impl RdmaProvider {
    /// A provider that looks where `config` says.
    pub fn new(config: RdmaConfig) -> Self {
        Self { config }
    }

    fn reason(&self) -> String {
        let ports: Vec<String> = device::ports().iter().map(ToString::to_string).collect();
        let devices = match ports.len() {
            0 => "no RDMA device under /sys/class/infiniband".to_owned(),
            _ => ports.join(", "),
        };
        match library::find_verbs(&self.config) {
            Ok(found) => format!(
                "found {} and {devices}, but this version of ckpt does not drive them; use --transport tcp",
                found.path.display()
            ),
            Err(error) => format!("{devices}; {}", error.message()),
        }
    }
}

impl TransportProvider for RdmaProvider {
    fn name(&self) -> &'static str {
        "rdma"
    }

    fn probe(&self) -> Probe {
        Probe::Unavailable(self.reason())
    }

    fn open(&self, _config: &TransportConfig) -> Result<Arc<dyn Transport>> {
        Err(unavailable("rdma", self.reason()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_named_with_the_way_to_get_it() {
        let config =
            RdmaConfig { verbs: Some("/nonexistent/libibverbs.so.1".into()), ..RdmaConfig::default() };
        let Probe::Unavailable(why) = RdmaProvider::new(config).probe() else {
            panic!("found nothing's library")
        };
        assert!(why.contains("tried /nonexistent/libibverbs.so.1"), "{why}");
        assert!(why.contains("CKPT_VERBS_LIBRARY"), "{why}");
    }
}
