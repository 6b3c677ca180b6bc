//! A parameter server inside a program of one's own: loads a checkpoint and puts it into whatever takes the stream.
//!
//! `cargo run -p ckpt-core --example embed_update`, alone or under torchrun, srun, mpirun or `ckpt launch`. A program that
//! lets its users choose devices and transports opens them through a [`ckpt_core::transport::Registry`].

use std::{net::Ipv4Addr, sync::Arc};

use ckpt_core::{
    Version,
    checkpoint::{CheckpointSource, LoadOptions, Pool, generate, load},
    control::{Job, JobOptions},
    deadlines::Deadlines,
    device::{DeviceBackend, DeviceConfig, host::HostDevice, runtime_dir},
    plan::PlanLimits,
    server::{ParameterServer, ServerConfig, UpdateRequest},
    sink,
    transport::{TransportConfig, TransportProvider, tcp::TcpProvider},
};

/// One update, from the files to the consumer.
#[tokio::main]
pub async fn main() -> anyhow::Result<()> {
    // Which rank this is, the session with the others, the device, and the way to the others' devices.
    let (runtime_dir, deadlines) = (runtime_dir()?, Deadlines::default());
    let env = |name: &str| std::env::var(name).ok();
    let job = Job::join(JobOptions::detect(&env, None, runtime_dir.clone(), deadlines)?).await?;
    let (rank, local_rank, session) = (job.cluster.rank, job.cluster.local_rank, job.session.clone());
    let device = HostDevice::open(&DeviceConfig { rank, local_rank, runtime_dir: runtime_dir.clone() })?;
    let device: Arc<dyn DeviceBackend> = Arc::new(device);
    let (bind, secret) = (Ipv4Addr::LOCALHOST.into(), session.secret()?.reveal().to_vec());
    let config =
        TransportConfig { bind, runtime_dir, tls: false, secret, connections: 2, device: device.clone() };
    let transport = TcpProvider.open(&config)?;

    // This rank's share of a checkpoint, in pinned memory. `CheckpointSource::open` takes a file or a folder.
    let source = CheckpointSource::generated(generate::qwen_shaped(8 << 20), 1);
    let share = source.split(job.cluster.world_size)?.swap_remove(rank as usize);
    let loaded = load(&source, share, &Pool::new(device.clone()), &LoadOptions::new("step-1"))?;
    let limits = PlanLimits::default();
    let mut server = ParameterServer::new(ServerConfig { session, device, transport, deadlines, limits });
    server.register("step-1", loaded)?;
    let manifest = server.gather_metas("step-1").await?;

    // The update, and who takes it: here a stream in this process. `NativeSink` and `CheckpointEngineSink` are workers.
    let (sink, mut stream) = sink::stream("example");
    let request = UpdateRequest {
        checkpoint: "step-1".to_owned(),
        version: Version(1),
        ranks: Vec::new(),
        sink: Some(Box::new(sink)),
        engine: None,
    };
    let take = async {
        let mut tensors = 0;
        while let Some(bucket) = stream.next_bucket().await? {
            tensors += bucket.tensors().len();
        }
        anyhow::Ok(tensors)
    };
    let (report, tensors) = tokio::join!(server.update(request), take);
    println!("rank {rank}: {:?}", report?.stages);
    anyhow::ensure!(tensors? == manifest.tensors().count(), "a tensor is missing");
    job.session.barrier("end", std::time::Instant::now() + deadlines.join).await?;
    job.leave().await;
    Ok(())
}
