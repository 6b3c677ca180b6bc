//! A rank that a launcher has started.

use std::net::{IpAddr, Ipv4Addr};

use ckpt_core::{
    control::{Job, JobOptions},
    deadlines::Deadlines,
    device::{DeviceConfig, runtime_dir},
    transport::TransportConfig,
};

use super::{Measured, TransportArgs, measure::Bench};
use crate::{job::address_towards, registry_in};

/// Joins the job of the environment and measures; the answer is on rank 0.
pub(super) async fn run(args: &TransportArgs) -> anyhow::Result<Option<Measured>> {
    let env = |name: &str| std::env::var(name).ok();
    let deadlines = Deadlines { join: args.limit(), ..Deadlines::default() };
    let runtime_dir = runtime_dir()?;
    let mut options = JobOptions::detect(&env, args.token_file.as_deref(), runtime_dir.clone(), deadlines)?;
    options.tls |= args.tls;
    let (cluster, tls) = (options.cluster.clone(), options.tls);
    let registry = registry_in(&args.env(cluster.rank));
    let config =
        DeviceConfig { rank: cluster.rank, local_rank: cluster.local_rank, runtime_dir: runtime_dir.clone() };
    let device = registry.open_device(&args.device, &config)?;
    let job = Job::join(options).await?;
    let one_host = cluster.is_single_host();
    let bind = match one_host {
        true => IpAddr::V4(Ipv4Addr::LOCALHOST),
        false => address_towards(&cluster.hub.host, cluster.hub.port)?,
    };
    let config = TransportConfig {
        bind,
        runtime_dir,
        tls,
        secret: job.session.secret()?.reveal().to_vec(),
        connections: usize::from(args.connections),
        device: device.clone(),
    };
    let required = args.requirement(cluster.world_size, !one_host);
    let transport = registry.open_transport(&args.transport, &config, required)?;
    let (name, kind) = (transport.name(), device.kind());
    let measured = Bench::new(args.clone(), job.session.clone(), device, transport)?.run().await;
    job.leave().await;
    let samples = measured?;
    let ranks = cluster.world_size;
    Ok(samples.map(|samples| Measured { transport: name, device: kind, ranks, samples }))
}
