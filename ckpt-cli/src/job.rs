//! One rank of a job: session, device, transport and parameter server, from the options that all such commands share.

use std::{
    net::{IpAddr, Ipv4Addr, ToSocketAddrs, UdpSocket},
    path::PathBuf,
    time::{Duration, Instant},
};

use bytes::Bytes;
use ckpt_core::{
    Error, ErrorKind, Key,
    control::{self, JobOptions, Token},
    deadlines::Deadlines,
    device::{DeviceConfig, runtime_dir},
    layer::{Chaos, ChaosConfig},
    plan::PlanLimits,
    server::{ParameterServer, ServerConfig},
    transport::{AUTO, Registry, Requirement, TransportConfig},
};
use clap::Args;

/// Options of every command that is a rank of a job
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Job")]
pub(crate) struct JobArgs {
    /// How bytes reach other ranks: a name, or `auto` for the first that works here
    #[arg(long, default_value = "auto", value_name = "NAME")]
    pub(crate) transport: String,
    /// How P2P updates read other ranks' memory: a name, or `auto` for the same transport if it can and else the first
    /// that works here
    #[arg(long, default_value = "auto", value_name = "NAME")]
    p2p_transport: String,
    /// This host's address for other hosts; without it that on the way to the hub, and loopback if all ranks are here
    #[arg(long, value_name = "ADDRESS")]
    bind: Option<IpAddr>,
    /// Where the weights go: a kind, or `auto` for the first that works here
    #[arg(long, default_value = "auto", value_name = "KIND")]
    pub(crate) device: String,
    /// File with the job's secret; else CKPT_TOKEN, and ranks on one host need none
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Connections between two ranks, for transports that stripe
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64), value_name = "N")]
    connections: u8,
    /// Time for all ranks to come
    #[arg(long, default_value = "60", value_parser = seconds, value_name = "SECONDS")]
    join_timeout: Duration,
    /// Time for the engine, its worker and the way to the other ranks to be ready; the whole update's, if that is less
    #[arg(long, default_value = "300", value_parser = seconds, value_name = "SECONDS")]
    ready_timeout: Duration,
    /// Time for one bucket
    #[arg(long, default_value = "30", value_parser = seconds, value_name = "SECONDS")]
    bucket_timeout: Duration,
    /// Time for a whole update
    #[arg(long, default_value = "300", value_parser = seconds, value_name = "SECONDS")]
    timeout: Duration,
    /// Faults on the way between the ranks, by seed: for tests
    #[arg(long, hide = true, value_name = "SEED")]
    chaos: Option<u64>,
    /// Aim at buckets of this size
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1 << 20), value_name = "MIB")]
    bucket_mib: Option<u64>,
}

/// Bad enough that most updates of some buckets meet a fault. Wrong bytes are for the digests to find, not for this.
const CHAOS: ChaosConfig = ChaosConfig {
    seed: 0,
    drop_ppm: 40_000,
    delay_ppm: 200_000,
    delay: Duration::from_millis(400),
    corrupt_ppm: 0,
    cut_ppm: 60_000,
    spare: 0,
};

/// A time limit: more than nothing and at most a day.
fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= 86_400.0 => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("write seconds above 0 and at most 86400".to_owned()),
    }
}

/// What a rank needs for reading other ranks' memory.
#[derive(Default)]
pub(crate) struct Reading {
    /// It is an error if nothing here can.
    pub(crate) needed: bool,
    /// The owners' secret, if they belong to a job with another one.
    pub(crate) secret: Option<Token>,
}

/// A rank that has joined its job.
pub(crate) struct Rank {
    pub(crate) job: control::Job,
    pub(crate) server: ParameterServer,
    pub(crate) transport: &'static str,
    pub(crate) runtime_dir: PathBuf,
    join: Duration,
    total: Duration,
    gathers: u64,
}

impl Rank {
    /// Joins the job that the environment describes and opens what the options name.
    pub(crate) async fn start(args: &JobArgs, registry: &Registry) -> anyhow::Result<Self> {
        Self::start_reading(args, registry, Reading::default()).await
    }

    /// The same for a rank that is to read other ranks' memory.
    pub(crate) async fn start_reading(
        args: &JobArgs,
        registry: &Registry,
        reading: Reading,
    ) -> anyhow::Result<Self> {
        let env = |name: &str| std::env::var(name).ok();
        let deadlines = Deadlines {
            join: args.join_timeout,
            bucket: args.bucket_timeout,
            total: args.timeout,
            ready: args.ready_timeout.min(args.timeout),
            ..Deadlines::default()
        };
        let mut limits = PlanLimits::from_env(&env).map_err(Error::from)?;
        if let Some(mib) = args.bucket_mib {
            limits.target_bucket_bytes = mib << 20;
        }
        let runtime_dir = runtime_dir()?;
        let options = JobOptions::detect(&env, args.token_file.as_deref(), runtime_dir.clone(), deadlines)?;
        let cluster = options.cluster.clone();
        let device_config = DeviceConfig {
            rank: cluster.rank,
            local_rank: cluster.local_rank,
            runtime_dir: runtime_dir.clone(),
        };
        let device = registry.open_device(&args.device, &device_config)?;
        let job = control::Job::join(options).await?;
        let bind = match args.bind {
            Some(address) => address,
            None if cluster.is_single_host() => IpAddr::V4(Ipv4Addr::LOCALHOST),
            None => address_towards(&cluster.hub.host, cluster.hub.port)?,
        };
        let mut config = TransportConfig {
            bind,
            runtime_dir: runtime_dir.clone(),
            secret: job.session.secret()?.reveal().to_vec(),
            connections: usize::from(args.connections),
            device: device.clone(),
        };
        let required = Requirement {
            collective: cluster.world_size > 1,
            one_sided: false,
            across_processes: cluster.world_size > 1,
            across_hosts: !cluster.is_single_host(),
        };
        let mut transport = registry.open_transport(&args.transport, &config, required)?;
        if let Some(seed) = args.chaos {
            let seed = seed ^ u64::from(cluster.rank) << 32;
            transport = Chaos::wrap(transport, ChaosConfig { seed, ..CHAOS });
        }
        let name = transport.name();
        let can = transport.capability();
        let itself = can.one_sided && can.across_processes && reading.secret.is_none();
        let reader = if itself && [AUTO, name].contains(&args.p2p_transport.as_str()) {
            Ok(transport.clone())
        } else {
            if let Some(secret) = &reading.secret {
                config.secret = secret.reveal().to_vec();
            }
            // Readers may come from another job, so this process is never enough.
            let required = Requirement {
                one_sided: true,
                across_processes: true,
                across_hosts: !cluster.is_single_host(),
                ..Requirement::default()
            };
            registry.open_transport(&args.p2p_transport, &config, required)
        };
        let reader = match reader {
            Ok(reader) => reader,
            Err(error) if reading.needed || args.p2p_transport != AUTO => return Err(error.into()),
            Err(error) => {
                tracing::info!(%error, "other ranks cannot read this rank's memory");
                transport.clone()
            }
        };
        tracing::info!(rank = cluster.rank, transport = name, device = device.kind(), "joined the job");
        let server = ParameterServer::new(ServerConfig {
            session: job.session.clone(),
            device,
            transport,
            deadlines,
            limits,
        })
        .with_reader(reader);
        Ok(Self {
            job,
            server,
            transport: name,
            runtime_dir,
            join: args.join_timeout,
            total: args.timeout,
            gathers: 0,
        })
    }

    /// This rank's number.
    pub(crate) fn rank(&self) -> u32 {
        self.job.cluster.rank
    }

    /// Ranks of the job.
    pub(crate) fn world_size(&self) -> u32 {
        self.job.cluster.world_size
    }

    /// Collective: every rank's `part`, by rank. Ranks that have nothing to do may come long before the others: they wait
    /// as long as an update may take.
    pub(crate) async fn collect(&mut self, what: &str, part: Bytes) -> anyhow::Result<Vec<Bytes>> {
        self.gathers += 1;
        let end = Instant::now() + self.total + self.join;
        let mut attempt = 0_u32;
        loop {
            // The hub gives up when some ranks do not come in time, and tells the late ones so: then all try again.
            let name = format!("{what} {} {attempt}", self.gathers);
            let deadline = (Instant::now() + self.join * 2).min(end);
            match self.job.session.gather(&name, part.clone(), deadline).await {
                Err(error) if error.kind() == ErrorKind::Timeout && Instant::now() < end => attempt += 1,
                outcome => return Ok(outcome?),
            }
        }
    }

    /// Serves readers for `time`; an error if the job ends before.
    pub(crate) async fn serve(&self, time: Duration) -> anyhow::Result<()> {
        tokio::select! {
            () = tokio::time::sleep(time) => Ok(()),
            cause = self.job.session.until_lost() => Err(cause.into()),
        }
    }

    /// Leaves the job. After a success all ranks leave together, since the hub ends with rank 0.
    pub(crate) async fn end(self, well: bool) {
        if well && let Err(error) = self.job.session.barrier("leave", Instant::now() + self.join).await {
            tracing::debug!(%error, "left without the others");
        }
        self.job.leave().await;
    }
}

/// This host's address on the way to the hub. Connecting a UDP socket sends nothing.
pub(crate) fn address_towards(host: &str, port: u16) -> Result<IpAddr, Error> {
    let find = || {
        let hub = (host, port).to_socket_addrs()?.next().ok_or(std::io::ErrorKind::AddrNotAvailable)?;
        let any: IpAddr = match hub {
            std::net::SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            std::net::SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
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
