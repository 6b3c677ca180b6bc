//! The `tcp` transport: the ranks are processes, on one host or several.
//!
//! Each transport has one listener. To form a group, members meet at the root, which tells everybody where the others
//! listen; each pair then has `connections` lanes for bytes and one control connection, on which a death or an abort is
//! seen at once. Both sides of every connection prove that they know the group's secret and the job's (HMAC-SHA256 over
//! both sides' nonces). Where the job has TLS, all of it goes inside ([`crate::tls`]); else the bytes are not encrypted.

mod broadcast;
mod join;
mod link;
mod mesh;
mod messages;
mod node;
mod one_sided;
mod socket;
#[cfg(test)]
mod tests;
pub(crate) mod wire;
mod write;

use std::{net::SocketAddr, sync::Arc, time::Instant};

use async_trait::async_trait;
use bytes::Bytes;
use tokio_util::sync::DropGuard;

pub use self::messages::{Heard, Messenger, Talk};
use self::{node::Node, wire::Token};
use super::{
    Capability, Collective, Communicator, GroupSpec, OneSided, Probe, Transport, TransportConfig,
    TransportProvider, group::check_spec,
};
use crate::error::{Error, ErrorKind, Result};

/// Opens `tcp` transports.
#[derive(Clone, Copy, Debug, Default)]
pub struct TcpProvider;

impl TransportProvider for TcpProvider {
    fn name(&self) -> &'static str {
        "tcp"
    }

    fn probe(&self) -> Probe {
        Probe::Available("TCP sockets".to_owned())
    }

    /// Must be called in a tokio runtime, on which the listener is then served.
    fn open(&self, config: &TransportConfig) -> Result<Arc<dyn Transport>> {
        if config.bind.is_unspecified() {
            return Err(Error::new(
                ErrorKind::ConfigInvalid,
                "open the transport tcp",
                format!("peers cannot reach {}; bind the address of one interface", config.bind),
            ));
        }
        let node = Node::start(config)?;
        let stop = node.stop.clone().drop_guard();
        Ok(Arc::new(TcpTransport { node, _stop: stop }))
    }
}

struct TcpTransport {
    node: Arc<Node>,
    _stop: DropGuard,
}

impl std::fmt::Debug for TcpTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TcpTransport").field("listens", &self.node.listens).finish_non_exhaustive()
    }
}

impl Transport for TcpTransport {
    fn name(&self) -> &'static str {
        "tcp"
    }

    fn capability(&self) -> Capability {
        Capability {
            collective: true,
            one_sided: true,
            one_sided_write: true,
            across_processes: true,
            across_hosts: !self.node.listens.ip().is_loopback(),
            encrypts: self.node.tls.is_some(),
            devices: &["host"],
        }
    }

    fn collective(&self) -> Option<&dyn Collective> {
        Some(self)
    }

    fn one_sided(&self) -> Option<&dyn OneSided> {
        Some(self)
    }
}

#[async_trait]
impl Collective for TcpTransport {
    async fn create_token(&self) -> Result<Bytes> {
        let listens: SocketAddr = self.node.listens;
        let token = Token::new(listens)?;
        self.node.expect(&token);
        token.encode()
    }

    async fn join(&self, group: GroupSpec, deadline: Instant) -> Result<Communicator> {
        check_spec(&group)?;
        Ok(join::join(&self.node, &group, &[], deadline).await?.communicator())
    }
}
