//! A new instance takes its weights from one that is running: it needs nothing but the metas that the other publishes.
//!
//! `cargo run -p ckpt-core --example p2p_join`. Both jobs live in this process here; in life they are two, on two hosts, with
//! the same CKPT_TOKEN, and the metas come from `GET /v1/metas` or a file.

use std::{net::Ipv4Addr, sync::Arc};

use ckpt_core::{
    Result, Version,
    checkpoint::{CheckpointSource, LoadOptions, Pool, generate, load},
    cluster::ClusterEnv,
    control::{Job, JobOptions, Token},
    deadlines::Deadlines,
    device::{DeviceBackend, DeviceConfig, host::HostDevice, runtime_dir},
    metas::Metas,
    plan::PlanLimits,
    server::{ParameterServer, ServerConfig, UpdateRequest},
    sink,
    transport::{TransportConfig, TransportProvider, tcp::TcpProvider},
};

/// One job of one rank, whose memory others can read over TCP if they know the token.
async fn instance(token: &Token) -> Result<(Job, ParameterServer, Arc<dyn DeviceBackend>)> {
    let (runtime_dir, deadlines) = (runtime_dir()?, Deadlines::default());
    let cluster = ClusterEnv::detect(&|_| None)?;
    let options = JobOptions {
        cluster,
        token: Some(token.clone()),
        runtime_dir: runtime_dir.clone(),
        deadlines,
        tls: false,
    };
    let job = Job::join(options).await?;
    let config = DeviceConfig { rank: 0, local_rank: 0, runtime_dir: runtime_dir.clone() };
    let device: Arc<dyn DeviceBackend> = Arc::new(HostDevice::open(&config)?);
    let transport = TcpProvider.open(&TransportConfig {
        bind: Ipv4Addr::LOCALHOST.into(),
        runtime_dir,
        tls: false,
        secret: token.reveal().to_vec(),
        connections: 2,
        device: device.clone(),
    })?;
    let server = ParameterServer::new(ServerConfig {
        session: job.session.clone(),
        device: device.clone(),
        transport,
        deadlines,
        limits: PlanLimits::default(),
    });
    Ok((job, server, device))
}

/// An owner, and an instance that joins.
#[tokio::main]
pub async fn main() -> anyhow::Result<()> {
    let token = Token::random()?;

    // The running instance: it registered its share, gathered, and publishes metas.
    let (running, mut owner, device) = instance(&token).await?;
    let source = CheckpointSource::generated(generate::qwen_shaped(8 << 20), 7);
    let all = 0..source.tensors().len();
    owner.register("step-7", load(&source, all, &Pool::new(device), &LoadOptions::new("step-7"))?)?;
    owner.gather_metas("step-7").await?;
    let published = owner.metas().map(|metas| metas.to_json()).transpose()?.unwrap_or_default();

    // The new instance: holds nothing, reads the owner's memory, whose code does not notice.
    let (joining, mut server, _) = instance(&token).await?;
    server.load_metas(Metas::from_json(published.as_bytes())?)?;
    let (sink, mut stream) = sink::stream("new engine");
    let request = UpdateRequest {
        checkpoint: "step-7".to_owned(),
        version: Version(7),
        ranks: Vec::new(),
        sink: Some(Box::new(sink)),
        engine: None,
    };
    let take = async {
        let mut wrong = 0;
        while let Some(bucket) = stream.next_bucket().await? {
            for tensor in bucket.tensors() {
                let index = source.tensors().iter().position(|t| t.meta == *tensor.meta());
                let same = index.is_some_and(|index| {
                    source.read(index).is_ok_and(|b| b == tensor.bytes().unwrap_or(&[]))
                });
                wrong += usize::from(!same);
            }
        }
        anyhow::Ok(wrong)
    };
    let (report, wrong) = tokio::join!(server.update(request), take);
    let report = report?;
    anyhow::ensure!(wrong? == 0, "a tensor differs");
    println!(
        "pulled {} tensors, {} bytes, in {:.3} s",
        report.tensors, report.tensor_bytes, report.stages.total_s
    );
    joining.leave().await;
    running.leave().await;
    Ok(())
}
