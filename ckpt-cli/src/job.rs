//! One rank of a job: session, device, transport and parameter server, from the options that all such commands share.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bytes::Bytes;
pub(crate) use ckpt_core::server::{Reading, address_towards};
use ckpt_core::{
    Error, ErrorKind,
    control::{self, JobOptions},
    device::runtime_dir,
    layer::{Chaos, ChaosConfig},
    plan::PlanLimits,
    server::{OpenOptions, Opened, ParameterServer, open},
    topology::numa,
    transport::Registry,
};
use clap::Args;

use crate::deadlines::DeadlineArgs;

/// Options of every command that is a rank of a job
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Job")]
pub(crate) struct JobArgs {
    /// How bytes reach other ranks: a name, or `auto` for the first that works here; one that only reads (rdma, ucx,
    /// mooncake) stands for --p2p-transport, and what broadcasts is then chosen
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
    /// Encrypt what the ranks say to each other, and the weights where the transport is tcp; all ranks, and a token of 32
    /// characters or more; else CKPT_TLS=1
    #[arg(long)]
    tls: bool,
    /// Connections between two ranks, for transports that stripe
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64), value_name = "N")]
    connections: u8,
    /// Faults on the way between the ranks, by seed: for tests
    #[arg(long, hide = true, value_name = "SEED")]
    chaos: Option<u64>,
    /// Keep the device buffer between updates, for engines that have budgeted for it; native workers keep their mapping too
    #[arg(long)]
    keep_ring: bool,
    /// Use all CPUs; else a rank keeps to those of its device's NUMA node, where there are several nodes
    #[arg(long)]
    no_numa: bool,
    /// Aim at buckets of this size
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1 << 20), value_name = "MIB")]
    bucket_mib: Option<u64>,
    #[command(flatten)]
    deadlines: DeadlineArgs,
}

impl JobArgs {
    /// Whether the ring stays between updates.
    pub(crate) fn keeps_ring(&self) -> bool {
        self.keep_ring
    }
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
        let deadlines = args.deadlines.deadlines();
        let mut limits = PlanLimits::from_env(&env).map_err(Error::from)?;
        if let Some(mib) = args.bucket_mib {
            limits.target_bucket_bytes = mib << 20;
        }
        let runtime_dir = runtime_dir()?;
        let mut job = JobOptions::detect(&env, args.token_file.as_deref(), runtime_dir.clone(), deadlines)?;
        job.tls |= args.tls;
        let options = OpenOptions {
            job,
            device: args.device.clone(),
            transport: args.transport.clone(),
            reader: args.p2p_transport.clone(),
            reading,
            bind: args.bind,
            connections: usize::from(args.connections),
            limits,
        };
        let Opened { job, mut server, transport } = open(options, registry).await?;
        server.keep_ring(args.keep_ring);
        if let Some(seed) = args.chaos {
            let seed = seed ^ (u64::from(job.cluster.rank) << 32);
            server = server.with_layer(|inner| Chaos::wrap(inner, ChaosConfig { seed, ..CHAOS }));
        }
        if let Some(node) = server.device().info().numa_node.filter(|_| !args.no_numa) {
            match numa::bind_process(Path::new(numa::SYSFS), node) {
                Ok(Some(cpus)) => tracing::info!(node, cpus, "keeps to the NUMA node of its device"),
                Ok(None) => {}
                // Only speed is lost.
                Err(error) => tracing::warn!(%error, node, "cannot keep to the NUMA node of its device"),
            }
        }
        Ok(Self {
            job,
            server,
            transport,
            runtime_dir,
            join: deadlines.join,
            total: deadlines.total,
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
