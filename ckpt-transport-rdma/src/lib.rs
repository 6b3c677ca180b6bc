//! One-sided transports: RDMA through verbs (`libibverbs`), and with the cargo feature `ucx` whatever UCX has.
//!
//! The transport `rdma` reads and writes host memory of other processes over reliable-connected queue pairs, striped over queue
//! pairs and NICs; the owner's code takes no part in moving bytes. A small TCP connection beside the queue pairs
//! exchanges their numbers, proves the job's secret, and answers whether a region still lives. `docs/rdma.md` says how
//! devices are chosen; `docs/unsafe.md` how the library is called without its headers.
//!
//! The transport `ucx` does the same through UCX, which chooses between shared memory, RDMA and TCP (`ucx/`).

mod batch;
mod config;
mod connection;
mod ending;
mod error;
mod flying;
mod lane;
mod library;
mod memory;
mod mover;
mod nic;
mod node;
mod numa;
mod owner;
mod pair;
mod queue;
mod room;
mod sys;
mod transport;
#[cfg(feature = "ucx")]
mod ucx;
mod verbs;
mod wire;

use std::sync::Arc;

use ckpt_core::{
    Result,
    topology::Choice,
    transport::{Probe, Transport, TransportConfig, TransportProvider},
};
pub use config::RdmaConfig;
pub use error::VerbsError;
#[cfg(feature = "ucx")]
pub use ucx::UcxProvider;

use crate::{library::Api, node::Node, transport::RdmaTransport, verbs::Context};

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

    /// Opens the library and each device that would be used, and closes them again.
    fn look(&self) -> Result<String> {
        let api = Api::load(&self.config)?;
        let Choice { ports, rule, .. } = self.config.choose(None).1?;
        let mut usable = Vec::new();
        let mut refused = None;
        for port in &ports {
            match Context::open(&api, &port.device) {
                Ok(_) => usable.push(port.to_string()),
                Err(error) => refused = Some(error),
            }
        }
        match refused {
            Some(error) if usable.is_empty() => Err(error),
            _ => Ok(format!("{}, {} ({rule}); one-sided only", api.path, usable.join(", "))),
        }
    }
}

impl TransportProvider for RdmaProvider {
    fn name(&self) -> &'static str {
        "rdma"
    }

    fn probe(&self) -> Probe {
        match self.look() {
            Ok(found) => Probe::Available(found),
            Err(error) => Probe::Unavailable(error.to_string()),
        }
    }

    /// Must be called in a tokio runtime, on which readers are then served.
    fn open(&self, config: &TransportConfig) -> Result<Arc<dyn Transport>> {
        let node = Node::start(&self.config, config)?;
        Ok(Arc::new(RdmaTransport { node }))
    }

    fn broadcasts(&self) -> bool {
        false
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
