//! Mooncake's transfer engine as a transport.
//!
//! This version looks for the library and says what it found; it moves no bytes through it. `probe` never says
//! "available" for something that `open` cannot do.

mod config;
mod error;
mod library;

use std::sync::Arc;

use ckpt_core::{
    Result,
    transport::{Probe, Transport, TransportConfig, TransportProvider, library::unavailable},
};
pub use config::MooncakeConfig;
pub use error::MooncakeError;

/// Finds Mooncake.
#[derive(Clone, Debug)]
pub struct MooncakeProvider {
    config: MooncakeConfig,
}

impl MooncakeProvider {
    /// A provider that looks where `config` says.
    pub fn new(config: MooncakeConfig) -> Self {
        Self { config }
    }

    fn reason(&self) -> String {
        match library::find(&self.config) {
            Ok(found) => {
                format!("found {found}, but this version of ckpt does not drive it; use another transport")
            }
            Err(error) => error.message().to_owned(),
        }
    }
}

impl TransportProvider for MooncakeProvider {
    fn name(&self) -> &'static str {
        "mooncake"
    }

    fn probe(&self) -> Probe {
        Probe::Unavailable(self.reason())
    }

    fn open(&self, _config: &TransportConfig) -> Result<Arc<dyn Transport>> {
        Err(unavailable("mooncake", self.reason()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_named_with_the_way_to_get_it() {
        let chosen = Some("/nonexistent/libtransfer_engine.so".into());
        let provider = MooncakeProvider::new(MooncakeConfig { library: chosen, ..MooncakeConfig::default() });
        let Probe::Unavailable(why) = provider.probe() else { panic!("found a library that does not exist") };
        assert!(why.contains("tried /nonexistent/libtransfer_engine.so"), "{why}");
        assert!(why.contains("CKPT_MOONCAKE_LIBRARY"), "{why}");
    }

    #[test]
    fn a_library_without_the_c_interface_is_refused() {
        // libc is a library that surely opens and surely is not Mooncake.
        let chosen = Some("libc.so.6".into());
        let provider = MooncakeProvider::new(MooncakeConfig { library: chosen, ..MooncakeConfig::default() });
        let Probe::Unavailable(why) = provider.probe() else { panic!("took libc for Mooncake") };
        assert!(why.contains("createTransferEngine"), "{why}");
    }
}
