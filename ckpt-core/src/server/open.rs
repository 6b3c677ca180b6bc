//! A rank from names: joins its job, opens its device and its transports, and makes the parameter server.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket},
    sync::Arc,
};

use super::{ParameterServer, ServerConfig};
use crate::{
    control::{Job, JobOptions, Token, host_name},
    device::DeviceConfig,
    error::{Error, ErrorKind, Key, Result},
    plan::PlanLimits,
    topology::{Accelerators, devices_of_rank},
    transport::{AUTO, Capability, Registry, Requirement, Transport, TransportConfig},
};

/// What a rank needs for reading other ranks' memory.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// It is an error if nothing here can.
    pub needed: bool,
    /// The owners' secret, if they belong to a job with another one.
    pub secret: Option<Token>,
}

/// What [`open`] makes a rank of.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The job. Its deadlines are also the server's.
    pub job: JobOptions,
    /// A kind of device, or [`AUTO`].
    pub device: String,
    /// How bytes reach other ranks: a name, or [`AUTO`].
    pub transport: String,
    /// How other ranks' memory is read: a name, or [`AUTO`] for the same transport if it can and else the first that works.
    pub reader: String,
    /// What must be readable.
    pub reading: Reading,
    /// This host's address for other hosts; `None`: that on the way to the hub, and loopback if all ranks are here.
    pub bind: Option<IpAddr>,
    /// Connections between two ranks, for transports that stripe.
    pub connections: usize,
    /// The memory limits.
    pub limits: PlanLimits,
}

/// A rank that has joined its job.
pub struct Opened {
    /// The job; on rank 0 the hub lives in it.
    pub job: Job,
    /// The parameter server.
    pub server: ParameterServer,
    /// The transport's name.
    pub transport: &'static str,
}

/// Where another sysfs than `/sys` is, for tests.
const SYSFS_VARIABLE: &str = "CKPT_SYSFS";

/// Joins the job and opens what the options name. Needs a tokio runtime.
///
/// Where the rank is in the network follows from `PS_P2P_STORE_RDMA_DEVICES`, `NCCL_IB_HCA` and the PCI tree, as
/// [`crate::topology::choose`] says.
pub async fn open(options: OpenOptions, registry: &Registry) -> Result<Opened> {
    let OpenOptions { job, device, transport, reader, reading, bind, connections, limits } = options;
    let (cluster, deadlines, runtime_dir) = (job.cluster.clone(), job.deadlines, job.runtime_dir.clone());
    let tls = job.tls;
    let device_config =
        DeviceConfig { rank: cluster.rank, local_rank: cluster.local_rank, runtime_dir: runtime_dir.clone() };
    let device = registry.open_device(&device, &device_config)?;
    let job = Job::join(job).await?;
    // A parameter server that died may have left this device's worker waiting for it.
    let uuid = device.info().uuid.clone();
    let freeing = crate::sink::release_in_background(runtime_dir.clone(), Some(uuid));
    tracing::trace!(?freeing, "looking for stranded workers");
    let bind = match bind {
        Some(address) => address,
        None if cluster.is_single_host() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        None => address_towards(&cluster.hub.host, cluster.hub.port)?,
    };
    let secret = job.session.secret()?.reveal().to_vec();
    let config = TransportConfig { bind, runtime_dir, secret, tls, connections, device: device.clone() };
    let required = Requirement {
        collective: cluster.world_size > 1,
        one_sided: false,
        across_processes: cluster.world_size > 1,
        across_hosts: !cluster.is_single_host(),
    };
    let (transport, reader) = names(&transport, &reader, registry)?;
    let transport = registry.open_transport(transport, &config, required)?;
    let name = transport.name();
    let reader =
        open_reader(reader, reading, transport.clone(), config, !cluster.is_single_host(), registry)?;
    if tls {
        for transport in clear_text([&transport, &reader].map(|it| (it.name(), it.capability()))) {
            tracing::warn!(
                transport,
                "weights cross the network in clear text: this transport has no TLS; tcp has"
            );
        }
    }
    tracing::info!(rank = cluster.rank, transport = name, device = device.kind(), "joined the job");
    let numbering = cluster.local_world_size.map(|ranks| Accelerators {
        local_rank: cluster.local_rank,
        visible: ranks,
        local_world_size: Some(ranks),
    });
    let env = |name: &str| std::env::var(name).ok();
    let sysfs = env(SYSFS_VARIABLE).unwrap_or_else(|| "/sys".to_owned());
    let pci_address = device.info().pci_address.as_deref();
    let hca = devices_of_rank(sysfs.as_ref(), pci_address, numbering, &env);
    let session = job.session.clone();
    let server = ParameterServer::new(ServerConfig { session, device, transport, deadlines, limits })
        .with_reader(reader)
        .with_location(host_name(), hca);
    Ok(Opened { job, server, transport: name })
}

/// Those that carry weights between hosts outside of TLS, which covers only what the ranks say to each other.
fn clear_text(transports: [(&'static str, Capability); 2]) -> Vec<&'static str> {
    let clear = transports.into_iter().filter(|(_, can)| can.across_hosts && !can.encrypts);
    let mut names: Vec<_> = clear.map(|(name, _)| name).collect();
    names.dedup();
    names
}

/// The names of what broadcasts and of what reads.
fn names<'a>(transport: &'a str, reader: &'a str, registry: &Registry) -> Result<(&'a str, &'a str)> {
    if transport == AUTO || registry.transport(transport)?.broadcasts() {
        return Ok((transport, reader));
    }
    if reader == AUTO || reader == transport {
        return Ok((AUTO, transport));
    }
    let what = format!(
        "transport `{transport}` only reads, and --p2p-transport says that `{reader}` does; give one of the two"
    );
    Err(Error::new(ErrorKind::ConfigInvalid, "choose a backend", what))
}

fn open_reader(
    reader: &str,
    reading: Reading,
    transport: Arc<dyn Transport>,
    mut config: TransportConfig,
    across_hosts: bool,
    registry: &Registry,
) -> Result<Arc<dyn Transport>> {
    let can = transport.capability();
    let itself = can.one_sided && can.across_processes && reading.secret.is_none();
    if itself && [AUTO, transport.name()].contains(&reader) {
        return Ok(transport);
    }
    if let Some(secret) = &reading.secret {
        config.secret = secret.reveal().to_vec();
    }
    // Readers may come from another job, so this process is never enough.
    let required =
        Requirement { one_sided: true, across_processes: true, across_hosts, ..Requirement::default() };
    match registry.open_transport(reader, &config, required) {
        Err(error) if !reading.needed && reader == AUTO => {
            tracing::info!(%error, "other ranks cannot read this rank's memory");
            Ok(transport)
        }
        opened => opened,
    }
}

/// This host's address on the way to the hub. Connecting a UDP socket sends nothing.
pub fn address_towards(host: &str, port: u16) -> Result<IpAddr> {
    let find = || {
        let hub = (host, port).to_socket_addrs()?.next().ok_or(std::io::ErrorKind::AddrNotAvailable)?;
        let any: IpAddr = match hub {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(hub)?;
        socket.local_addr()
    };
    find().map(|address| address.ip()).map_err(|error: std::io::Error| {
        Error::new(
            ErrorKind::ConfigInvalid,
            "find this host's address",
            "there is no way to the hub; check MASTER_ADDR",
        )
        .with(Key::Endpoint, format!("{host}:{port}"))
        .caused_by(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transports_that_leave_the_host_outside_of_tls_are_named_once() {
        let can = |across_hosts, encrypts| Capability {
            collective: true,
            one_sided: true,
            one_sided_write: true,
            across_processes: true,
            across_hosts,
            encrypts,
            devices: &["host"],
        };
        let [inside, clear, secure] = [can(false, false), can(true, false), can(true, true)];
        assert_eq!(clear_text([("nccl", clear), ("nccl", clear)]), ["nccl"]);
        assert_eq!(clear_text([("local", inside), ("rdma", clear)]), ["rdma"]);
        assert_eq!(clear_text([("nccl", clear), ("rdma", clear)]), ["nccl", "rdma"]);
        assert!(clear_text([("local", inside), ("tcp", secure)]).is_empty());
    }
}
