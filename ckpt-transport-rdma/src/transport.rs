//! The transport `rdma`: the one-sided facet over verbs.

use std::{fmt, sync::Arc, time::Instant};

use async_trait::async_trait;
use bytes::Bytes;
use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{Buffer, Event},
    transport::{
        Capability, Collective, OneSided, ReadOp, Registration, RemoteRegion, Transfer, Transport, Way,
        WriteOp,
    },
};
use smallvec::smallvec;

use crate::{
    ending,
    memory::{Access, Registered, register},
    mover::{self, Job},
    node::{Node, Peer},
    wire::{Descriptor, decode, encode},
};

pub(crate) struct RdmaTransport {
    pub(crate) node: Arc<Node>,
}

impl fmt::Debug for RdmaTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nics: Vec<&str> = self.node.nics.iter().map(|nic| nic.name()).collect();
        f.debug_struct("RdmaTransport").field("listens", &self.node.listens).field("nics", &nics).finish()
    }
}

impl Drop for RdmaTransport {
    fn drop(&mut self) {
        self.node.close();
    }
}

impl Transport for RdmaTransport {
    fn name(&self) -> &'static str {
        "rdma"
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
impl OneSided for RdmaTransport {
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

impl RdmaTransport {
    async fn lend(&self, buffer: Arc<dyn Buffer>, access: Access) -> Result<Arc<dyn Registration>> {
        let node = &self.node;
        let keys = register(&node.nics, &buffer, access).await?;
        let descriptor = Descriptor {
            version: 1,
            id: node.id,
            secret: node.secret,
            nics: node.nics.iter().map(|nic| nic.address.clone()).collect(),
            keys: keys.remote_keys(),
        };
        let region = RemoteRegion {
            peer: node.listens.to_string(),
            address: buffer.address(),
            len_bytes: buffer.len_bytes(),
            generation: node.regions.add(buffer, access),
            descriptor: Bytes::from(encode(&descriptor)?),
        };
        let regions = node.regions.clone();
        Ok(Arc::new(Registered { region, keys: Some(keys), regions }))
    }

    fn post(&self, way: Way, batch: Vec<impl Into<Transfer>>, deadline: Instant) -> Result<Event> {
        way.check_deadline(deadline)?;
        let mut transfers = batch.into_iter().map(Into::<Transfer>::into);
        let Some(mut first) = transfers.next() else {
            return ending::spawn(way.operation(), Vec::<std::future::Ready<Result<()>>>::new());
        };
        if transfers.len() == 0 {
            first.check_on_host(way)?;
            first = match mover::post_one(&self.node, way, first, deadline) {
                Ok(event) => return Ok(event),
                Err(transfer) => transfer,
            };
        }
        let (peer, descriptor) = self.described(way, &first)?;
        let mut job = Job { way, transfers: smallvec![(first, descriptor)] };
        // Few owners a batch, mostly one: a search costs less than a table.
        let mut others: Vec<(Peer, Job)> = Vec::new();
        for transfer in transfers {
            let (owner, descriptor) = self.described(way, &transfer)?;
            let known = others.iter_mut().find(|(known, _)| *known == owner).map(|(_, job)| job);
            match known.or((owner == peer).then_some(&mut job)) {
                Some(job) => job.transfers.push((transfer, descriptor)),
                None => others.push((owner, Job { way, transfers: smallvec![(transfer, descriptor)] })),
            }
        }
        if others.is_empty()
            && let Some(connection) = self.node.connected(peer)
            && let Some(event) = mover::post_now(&self.node, connection, &job, deadline)
        {
            return Ok(event);
        }
        let jobs = std::iter::once((peer, job)).chain(others).map(|(peer, job)| {
            let node = self.node.clone();
            async move { mover::run(&node, peer, job, deadline).await }
        });
        ending::spawn(way.operation(), jobs.collect())
    }

    /// The owner that `transfer` is with, and what it says of its region.
    fn described(&self, way: Way, transfer: &Transfer) -> Result<(Peer, Arc<Descriptor>)> {
        transfer.check_on_host(way)?;
        self.node.described(&transfer.region, |region| owner_of(way.operation(), region))
    }
}

fn owner_of(operation: &'static str, region: &RemoteRegion) -> Result<(Peer, Descriptor)> {
    let error = || {
        let what = "the region was not described by the transport `rdma`";
        Error::new(ErrorKind::ConfigInvalid, operation, what).with(Key::Peer, &region.peer)
    };
    let address = region.peer.parse().map_err(|e: std::net::AddrParseError| error().caused_by(e))?;
    let descriptor: Descriptor = decode(&region.descriptor).map_err(|e| error().caused_by(e))?;
    let keys = if region.len_bytes == 0 { 0 } else { descriptor.nics.len() };
    if descriptor.version != 1 || descriptor.keys.len() != keys {
        return Err(error());
    }
    Ok(((address, descriptor.id), descriptor))
}
