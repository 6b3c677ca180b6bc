//! Mooncake's transfer engine as a one-sided transport.
//!
//! The engine is opened at run time through its C interface and works in peer-to-peer mode, without a metadata server.
//! A region's peer is the engine's `host:port` and its address a virtual address, as in checkpoint-engine's metas: our
//! receivers read from its instances, and its receivers from ours.
//!
//! Mooncake has no deadlines and cannot cancel. So each peer has a thread of its own, a batch keeps its memory until
//! Mooncake has let go, and whoever waits is freed by the deadline. Between our own processes every read also checks
//! the registration's generation (`ledger.rs`). `docs/mooncake.md` says what has run where.

mod api;
mod batch;
mod config;
mod engine;
mod error;
#[cfg(test)]
mod fake;
mod keeper;
mod lane;
mod ledger;
mod library;
mod native;
mod protocol;
#[cfg(test)]
mod tests;
mod transport;

use std::{net::IpAddr, sync::Arc};

use ckpt_core::{
    Error, ErrorKind, Result,
    device::{DeviceBackend, while_current},
    transport::{Probe, Transport, TransportConfig, TransportProvider, library::unavailable},
};
pub use config::MooncakeConfig;
pub use error::MooncakeError;

use crate::{
    api::Api,
    library::Found,
    protocol::{Choice, Protocol},
    transport::MooncakeTransport,
};

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

    fn find(&self, pci_address: Option<&str>) -> Result<(Found, Choice)> {
        let found = library::find(&self.config)?;
        let choice = protocol::choose(&self.config.settings, found.ascend_build, pci_address)?;
        Ok((found, choice))
    }
}

/// Starts an engine beside a rank's device: Mooncake's Ascend transport takes the NPU that is current on the thread.
fn start(
    api: Arc<dyn Api>,
    host: IpAddr,
    choice: Choice,
    device: &dyn DeviceBackend,
) -> Result<MooncakeTransport> {
    if choice.protocol == Protocol::Ascend && device.kind() != "ascend" {
        let message = format!(
            "this Mooncake is an Ascend build, and this rank's device is `{}`: use --device ascend, or set \
             MC_FORCE_TCP=1 to use tcp",
            device.kind()
        );
        return Err(Error::new(ErrorKind::ConfigInvalid, "open the transport mooncake", message));
    }
    while_current(device, || MooncakeTransport::start(api, host, choice))
}

impl TransportProvider for MooncakeProvider {
    fn name(&self) -> &'static str {
        "mooncake"
    }

    fn probe(&self) -> Probe {
        match self.find(None) {
            Ok((found, choice)) => Probe::Available(format!("{found}; uses {choice}")),
            Err(error) => Probe::Unavailable(error.message().to_owned()),
        }
    }

    fn open(&self, config: &TransportConfig) -> Result<Arc<dyn Transport>> {
        if config.bind.is_unspecified() {
            return Err(Error::new(
                ErrorKind::ConfigInvalid,
                "open the transport mooncake",
                format!("peers cannot reach {}; bind the address of one interface", config.bind),
            ));
        }
        let accelerator = config.device.info().pci_address.clone();
        let (found, choice) = self.find(accelerator.as_deref()).map_err(|error| match error.kind() {
            ErrorKind::Unavailable => unavailable("mooncake", error.message()),
            _ => error,
        })?;
        Ok(Arc::new(start(Arc::new(found.native), config.bind, choice, &*config.device)?))
    }

    fn broadcasts(&self) -> bool {
        false
    }
}
