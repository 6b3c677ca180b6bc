//! The transport `ucx`: the one-sided facet over UCX, whose library is opened at run time.
//!
//! UCX chooses how bytes go: shared memory between processes of a host, RDMA where its build has it, TCP else. A small TCP
//! exchange beside it proves the job's secret and holds memory while a batch may touch it (`link.rs`).

mod link;
mod node;
mod sys;
mod worker;

use std::{collections::HashMap, fmt, net::SocketAddr, sync::Arc, time::Instant};

use async_trait::async_trait;
use bytes::Bytes;
use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{Buffer, Event, MemoryKind},
    transport::{
        Capability, Collective, OneSided, Probe, ReadOp, Registration, RemoteRegion, Transfer, Transport,
        TransportConfig, TransportProvider, Way, WriteOp,
        library::{LibrarySearch, Opened, unavailable},
    },
};

use self::{
    node::{Descriptor, Node, Peer},
    sys::Ucp,
    worker::Command,
};
use crate::{
    config::RdmaConfig,
    ending,
    library::open_with,
    memory::Access,
    wire::{decode, encode},
};

/// Finds UCX.
#[derive(Clone, Debug)]
pub struct UcxProvider {
    config: RdmaConfig,
}

impl UcxProvider {
    /// A provider that looks where `config` says.
    pub fn new(config: RdmaConfig) -> Self {
        Self { config }
    }

    fn find(&self) -> Result<(Ucp, String)> {
        let search = LibrarySearch {
            product: "UCX",
            names: &["libucp.so.0"],
            chosen: self.config.ucx.clone(),
            variable: "CKPT_UCX_LIBRARY",
            folders: self.config.ucx_wheels.clone(),
            remedy: "install UCX (Debian and Ubuntu: apt-get install libucx0; pip: libucx-cu12)",
        };
        let Opened { library, path } = search.open(|name| open_with(name, "ucp_get_version"))?;
        let path = path.display().to_string();
        let ucp = Ucp::new(library).map_err(|symbol| {
            let what = format!("{symbol} is missing in UCX's library; install UCX 1.13 or newer");
            Error::new(ErrorKind::Unavailable, "open a native library", what).with(Key::Path, &path)
        })?;
        Ok((ucp, path))
    }
}

impl TransportProvider for UcxProvider {
    fn name(&self) -> &'static str {
        "ucx"
    }

    fn probe(&self) -> Probe {
        match self.find() {
            Ok((ucp, path)) => Probe::Available(format!("UCX {} ({path}); one-sided only", ucp.version())),
            Err(error) => Probe::Unavailable(error.message().to_owned()),
        }
    }

    /// Must be called in a tokio runtime, on which peers are then served.
    fn open(&self, config: &TransportConfig) -> Result<Arc<dyn Transport>> {
        let (ucp, _) = self.find().map_err(|error| unavailable("ucx", error.message()))?;
        Ok(Arc::new(UcxTransport { node: Node::start(ucp, config)? }))
    }

    fn broadcasts(&self) -> bool {
        false
    }
}

struct UcxTransport {
    node: Arc<Node>,
}

impl fmt::Debug for UcxTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UcxTransport").field("listens", &self.node.listens).finish_non_exhaustive()
    }
}

impl Drop for UcxTransport {
    fn drop(&mut self) {
        self.node.close();
    }
}

impl Transport for UcxTransport {
    fn name(&self) -> &'static str {
        "ucx"
    }

    fn capability(&self) -> Capability {
        Capability {
            collective: false,
            one_sided: true,
            one_sided_write: true,
            across_processes: true,
            across_hosts: !self.node.listens.ip().is_loopback(),
            encrypts: false,
            devices: &["host"],
        }
    }

    fn collective(&self) -> Option<&dyn Collective> {
        None
    }

    fn one_sided(&self) -> Option<&dyn OneSided> {
        Some(self)
    }
}

#[async_trait]
impl OneSided for UcxTransport {
    async fn register(&self, buffer: Arc<dyn Buffer>) -> Result<Arc<dyn Registration>> {
        self.lend(buffer, Access::Read).await
    }

    fn post_read(&self, batch: Vec<ReadOp>, deadline: Instant) -> Result<Event> {
        self.post(Way::Read, batch, deadline)
    }

    async fn register_writable(&self, buffer: Arc<dyn Buffer>) -> Result<Arc<dyn Registration>> {
        self.lend(buffer, Access::ReadWrite).await
    }

    fn post_write(&self, batch: Vec<WriteOp>, deadline: Instant) -> Result<Event> {
        self.post(Way::Write, batch, deadline)
    }
}

impl UcxTransport {
    async fn lend(&self, buffer: Arc<dyn Buffer>, access: Access) -> Result<Arc<dyn Registration>> {
        let node = &self.node;
        if buffer.memory() == MemoryKind::Device {
            let what =
                "this transport moves host memory only; read into host memory and copy it to the device";
            return Err(Error::new(ErrorKind::Unsupported, "register memory", what));
        }
        let (address, len_bytes) = (buffer.address(), buffer.len_bytes());
        let (number, rkey) = match len_bytes {
            0 => (0, Vec::new()),
            _ => node.worker.ask(|reply| Command::Map(buffer.clone(), reply)).await?,
        };
        let descriptor = Descriptor { version: 1, id: node.id, secret: node.secret, rkey };
        let region = RemoteRegion {
            peer: node.listens.to_string(),
            address,
            len_bytes,
            generation: node.regions.add(buffer, access),
            descriptor: Bytes::from(encode(&descriptor)?),
        };
        Ok(Arc::new(Registered { region, number, node: node.clone() }))
    }

    fn post(&self, way: Way, batch: Vec<impl Into<Transfer>>, deadline: Instant) -> Result<Event> {
        way.check_deadline(deadline)?;
        let mut owners: HashMap<Peer, Vec<(Transfer, Arc<Descriptor>)>> = HashMap::new();
        for op in batch {
            let transfer: Transfer = op.into();
            transfer.check_on_host(way)?;
            let (address, descriptor) = owner_of(way, &transfer.region)?;
            owners.entry((address, descriptor.id)).or_default().push((transfer, Arc::new(descriptor)));
        }
        let jobs = owners.into_iter().map(|(peer, transfers)| {
            let node = self.node.clone();
            async move { node::run(&node, way, peer, transfers, deadline).await }
        });
        ending::spawn(way.operation(), jobs.collect())
    }
}

fn owner_of(way: Way, region: &RemoteRegion) -> Result<(SocketAddr, Descriptor)> {
    let error = || {
        let what = "the region was not described by the transport `ucx`";
        Error::new(ErrorKind::ConfigInvalid, way.operation(), what).with(Key::Peer, &region.peer)
    };
    let address = region.peer.parse().map_err(|e: std::net::AddrParseError| error().caused_by(e))?;
    let descriptor: Descriptor = decode(&region.descriptor).map_err(|e| error().caused_by(e))?;
    if descriptor.version != 1 || descriptor.rkey.is_empty() != (region.len_bytes == 0) {
        return Err(error());
    }
    Ok((address, descriptor))
}

/// Memory that peers can reach until this is dropped.
struct Registered {
    region: RemoteRegion,
    number: u64,
    node: Arc<Node>,
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registered").field("region", &self.region).finish_non_exhaustive()
    }
}

impl Registration for Registered {
    fn region(&self) -> &RemoteRegion {
        &self.region
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // First the answer to peers that ask; batches that run hold the memory.
        self.node.regions.remove(self.region.generation);
        self.node.worker.tell(Command::Unmap(self.number));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_named_with_the_way_to_get_it() {
        let config = RdmaConfig { ucx: Some("/nonexistent/libucp.so.0".into()), ..RdmaConfig::default() };
        let Probe::Unavailable(why) = UcxProvider::new(config).probe() else {
            panic!("found nothing's library")
        };
        assert!(why.contains("tried /nonexistent/libucp.so.0") && why.contains("CKPT_UCX_LIBRARY"), "{why}");
    }
}
