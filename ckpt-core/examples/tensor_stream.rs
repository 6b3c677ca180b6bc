//! A stream of tensors in one process, with back-pressure: the consumer sets the pace, and memory stays at one small ring.
//!
//! `cargo run -p ckpt-core --example tensor_stream`. This is how a trainer's weights reach code in the same process, such as
//! a Python binding's async generator.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use ckpt_core::{
    DType, Version,
    checkpoint::{CheckpointSource, LoadOptions, NamedTensor, Pool, load},
    cluster::ClusterEnv,
    control::{Job, JobOptions},
    deadlines::Deadlines,
    device::{DeviceBackend, DeviceConfig, host::HostDevice, runtime_dir},
    plan::PlanLimits,
    server::{ParameterServer, ServerConfig, UpdateRequest},
    sink::{self, TensorStream},
    transport::{TransportConfig, TransportProvider, local::LocalProvider},
    types::TensorMeta,
};

const TENSORS: u64 = 64;
const TENSOR_BYTES: u64 = 256 << 10;

/// Sixteen mebibytes through a small ring.
#[tokio::main]
pub async fn main() -> anyhow::Result<()> {
    // A job of one rank, whatever the environment says.
    let (runtime_dir, deadlines) = (runtime_dir()?, Deadlines::default());
    let cluster = ClusterEnv::detect(&|_| None)?;
    let options =
        JobOptions { cluster, token: None, runtime_dir: runtime_dir.clone(), deadlines, tls: false };
    let job = Job::join(options).await?;
    let config = DeviceConfig { rank: 0, local_rank: 0, runtime_dir: runtime_dir.clone() };
    let device: Arc<dyn DeviceBackend> = Arc::new(HostDevice::open(&config)?);
    let transport = LocalProvider::default().open(&TransportConfig {
        bind: std::net::Ipv4Addr::LOCALHOST.into(),
        runtime_dir,
        tls: false,
        secret: Vec::new(),
        connections: 1,
        device: device.clone(),
    })?;

    // The trainer's weights: here every tensor holds its own number. 16 MiB in all, 1 MiB a bucket.
    let tensor = |number: u64| {
        let meta = TensorMeta::new(format!("layer.{number}.weight"), DType::U8, [TENSOR_BYTES])?;
        NamedTensor::from_bytes(meta, vec![number as u8; TENSOR_BYTES as usize])
    };
    let source = CheckpointSource::from_tensors((0..TENSORS).map(tensor).collect::<Result<Vec<_>, _>>()?)?;
    let all = 0..source.tensors().len();
    let loaded = load(&source, all, &Pool::new(device.clone()), &LoadOptions::new("weights"))?;
    let limits =
        PlanLimits { target_bucket_bytes: 1 << 20, ring_slack_bytes: 2 << 20, ..PlanLimits::default() };
    let session = job.session.clone();
    let mut server = ParameterServer::new(ServerConfig { session, device, transport, deadlines, limits });
    server.register("weights", loaded)?;
    server.gather_metas("weights").await?;

    let (sink, stream) = sink::stream("consumer");
    let request = UpdateRequest {
        checkpoint: "weights".to_owned(),
        version: Version(1),
        ranks: Vec::new(),
        sink: Some(Box::new(sink)),
        engine: None,
    };
    let taken = Arc::new(AtomicU64::new(0));
    let (report, consumed) = tokio::join!(server.update(request), consume(stream, taken.clone()));
    let report = report?;
    consumed?;
    anyhow::ensure!(taken.load(Ordering::Relaxed) == TENSORS, "a tensor is missing");
    // What was never in memory twice: the ring is smaller than the checkpoint.
    anyhow::ensure!(report.ring_bytes < TENSORS * TENSOR_BYTES, "the ring is as large as the checkpoint");
    println!("{TENSORS} tensors in {} buckets through a ring of {} bytes", report.buckets, report.ring_bytes);
    job.leave().await;
    Ok(())
}

/// Takes its time. While it holds a bucket nothing overwrites that bucket's bytes, and the update waits where it must.
async fn consume(mut stream: TensorStream, taken: Arc<AtomicU64>) -> anyhow::Result<()> {
    while let Some(bucket) = stream.next_bucket().await? {
        tokio::time::sleep(Duration::from_millis(5)).await;
        for tensor in bucket.tensors() {
            let bytes = tensor.bytes()?;
            let number: u8 = tensor.meta().name.split('.').nth(1).unwrap_or_default().parse()?;
            anyhow::ensure!(
                bytes.iter().all(|byte| *byte == number),
                "{} was overwritten",
                tensor.meta().name
            );
            taken.fetch_add(1, Ordering::Relaxed);
        }
    } // dropping the bucket is the ack
    Ok(())
}
