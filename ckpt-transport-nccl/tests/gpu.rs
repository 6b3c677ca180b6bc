//! What only real GPUs can tell. The binary of this test needs nothing but a driver and NCCL where it runs:
//!
//! ```text
//! cargo test -p ckpt-transport-nccl --test gpu -- --ignored --test-threads 1 --nocapture
//! ```

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    os::unix::fs::PermissionsExt,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::{
    DType, Result,
    device::{BufferSlice, DeviceBackend, host::HostBuffer},
    sink::{BucketMessage, Layout, NativeSink, NativeSinkConfig, TensorInRing, WeightSink},
    testkit::conformance::{self, Factory, Report},
    transport::{Transport, TransportConfig, TransportProvider},
    types::TensorMeta,
    worker::NativeWorker,
};
use ckpt_transport_nccl::{
    CudaIpcProvider, NcclProvider,
    device::{
        CudaProvider, Driver, DriverCell,
        worker::{CudaMapper, DeviceParameters},
    },
};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Ranks are tasks of this process, each with a device of its own.
struct Gpus {
    cuda: CudaProvider,
    nccl: NcclProvider,
    count: u32,
}

/// Which check runs, in case one never ends.
fn log() {
    let filter = "info,ckpt_core::testkit=debug,ckpt_transport_nccl=debug";
    // Another test of this process may have done it.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}

impl Gpus {
    fn new() -> Self {
        log();
        let driver = DriverCell::of(Driver::load().unwrap());
        let count = driver.driver().unwrap().device_count().unwrap();
        Self { cuda: CudaProvider::new(driver.clone()), nccl: NcclProvider::new(driver), count }
    }
}

impl Factory for Gpus {
    fn device(&self, rank: u32) -> Result<Arc<dyn DeviceBackend>> {
        Ok(Arc::new(self.cuda.open_cuda(rank)?))
    }

    fn transport(&self, _rank: u32, device: &Arc<dyn DeviceBackend>) -> Result<Arc<dyn Transport>> {
        self.nccl.open(&config(device))
    }

    fn max_members(&self) -> u32 {
        self.count.min(4)
    }

    fn detects_mismatch(&self) -> bool {
        false
    }
}

fn config(device: &Arc<dyn DeviceBackend>) -> TransportConfig {
    TransportConfig {
        bind: Ipv4Addr::LOCALHOST.into(),
        runtime_dir: std::env::temp_dir(),
        tls: false,
        secret: Vec::new(),
        connections: 1,
        device: device.clone(),
    }
}

fn show(report: &Report) {
    report.passed.iter().for_each(|name| println!("passed   {name}"));
    report.skipped.iter().for_each(|(name, why)| println!("skipped  {name}: {why}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "needs an NVIDIA GPU: cargo test -p ckpt-transport-nccl --test gpu -- --ignored"]
async fn cuda_conforms() {
    let report = conformance::device(&Gpus::new()).await.unwrap();
    show(&report);
    assert_eq!((report.passed.len(), report.skipped.len()), (8, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "needs NVIDIA GPUs and NCCL: cargo test -p ckpt-transport-nccl --test gpu -- --ignored"]
async fn nccl_conforms() {
    let gpus = Gpus::new();
    let report = conformance::collective(&gpus).await.unwrap();
    show(&report);
    let members = gpus.max_members() as usize;
    assert_eq!(
        (report.passed.len(), report.skipped.len()),
        (members * 6 + 1 + (members - 1) * 3, members - 1)
    );
}

/// The same GPUs with copies between them. Members of one process need no mapping; scripts/gpu/check.sh has processes.
struct Copies(Gpus, CudaIpcProvider);

impl Factory for Copies {
    fn device(&self, rank: u32) -> Result<Arc<dyn DeviceBackend>> {
        self.0.device(rank)
    }

    fn transport(&self, _rank: u32, device: &Arc<dyn DeviceBackend>) -> Result<Arc<dyn Transport>> {
        self.1.open(&config(device))
    }

    fn max_members(&self) -> u32 {
        self.0.max_members()
    }

    fn detects_mismatch(&self) -> bool {
        true
    }

    fn later_work_waits(&self) -> bool {
        false
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "needs NVIDIA GPUs: cargo test -p ckpt-transport-nccl --test gpu -- --ignored"]
async fn cuda_ipc_conforms() {
    let gpus = Gpus::new();
    let ipc = CudaIpcProvider::new(DriverCell::of(Driver::load().unwrap()));
    let copies = Copies(gpus, ipc);
    let report = conformance::collective(&copies).await.unwrap();
    show(&report);
    let members = copies.max_members() as usize;
    assert_eq!((report.passed.len(), report.skipped.len()), (members * 6 + 1 + (members - 1) * 4, 0));
}

/// Tensors of 4 KiB, each filled with a byte of its own, in a ring that holds all of them.
struct Shape {
    tensors: Vec<TensorInRing>,
    bytes: Vec<u8>,
}

const TENSOR: u64 = 4096;

/// Set for the process that is the worker.
const WORKER: &str = "CKPT_TEST_GPU_WORKER";

fn shape(count: u64) -> Shape {
    let tensors = (0..count)
        .map(|i| TensorInRing {
            meta: TensorMeta::new(format!("model.layers.{i}.weight"), DType::BF16, vec![32, TENSOR / 64])
                .unwrap(),
            offset: i * TENSOR,
        })
        .collect();
    let bytes = (0..count * TENSOR).map(|i| (i / TENSOR * 7 + i % TENSOR) as u8).collect();
    Shape { tensors, bytes }
}

/// Three updates of a worker in another process, as it must be with CUDA IPC; the digests of the first are checked there.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "needs an NVIDIA GPU: cargo test -p ckpt-transport-nccl --test gpu -- --ignored"]
async fn a_native_worker_takes_138_980_tensors() {
    let device = CudaProvider::default().open_cuda(0).unwrap();
    let before = device.free_memory_bytes().unwrap();
    let shape = shape(138_980);
    let ring = device.allocate_ring(shape.bytes.len() as u64).unwrap();
    let stream = device.stream("h2d").unwrap();
    let host = device.pin(HostBuffer::from_bytes(&shape.bytes).unwrap()).unwrap();
    let target = BufferSlice::new(ring.buffer(), 0..shape.bytes.len() as u64).unwrap();
    stream.copy(BufferSlice::whole(host), target).unwrap();
    stream.record().unwrap().done(soon()).await.unwrap();

    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let metas: Vec<TensorMeta> = shape.tensors.iter().map(|t| t.meta.clone()).collect();
    let layout = Arc::new(Layout::new(metas).unwrap());
    let digests = shape.tensors.iter().zip(shape.bytes.chunks(TENSOR as usize)).step_by(97);
    let digests: HashMap<Arc<str>, u64> =
        digests.map(|(t, bytes)| (t.meta.name.clone(), twox_hash::XxHash3_64::oneshot(bytes))).collect();
    let mut worker = None;
    for update in 0..4 {
        let config = NativeSinkConfig {
            kept_ring: Some(1),
            layout: Some(layout.clone()),
            digests: (update == 0).then(|| Arc::new(digests.clone())),
        };
        let mut sink = NativeSink::bind(folder.path(), &device.info().uuid, config).unwrap();
        let child = worker.get_or_insert_with(|| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--ignored", "--exact", "worker_process", "--nocapture"])
                .env(WORKER, "1")
                .stdin(Stdio::piped())
                .spawn()
                .unwrap()
        });
        std::io::Write::write_all(child.stdin.as_mut().unwrap(), format!("{}\n", sink.endpoint()).as_bytes())
            .unwrap();
        let began = Instant::now();
        sink.open(&*ring, soon()).await.unwrap();
        let opened = began.elapsed();
        let mut slowest = Duration::ZERO;
        for (i, tensors) in shape.tensors.chunks(10_000).enumerate() {
            let began = Instant::now();
            let bucket = BucketMessage { bucket: i as u32, tensors: tensors.to_vec() };
            sink.deliver(&bucket, soon()).await.unwrap();
            slowest = slowest.max(began.elapsed());
        }
        let delivered = began.elapsed() - opened;
        sink.release(soon()).await.unwrap();
        sink.finish(soon()).await.unwrap();
        println!(
            "update {update}: open {opened:.1?}, 138,980 tensors delivered in {delivered:.1?} (slowest of 14 buckets \
             {slowest:.1?}), all {:.1?}{}",
            began.elapsed(),
            if update == 0 { ", every 97th tensor's digest checked on the worker" } else { "" }
        );
    }
    let mut worker = worker.unwrap();
    drop(worker.stdin.take());
    assert!(worker.wait().unwrap().success());
    drop(ring);
    let after = device.free_memory_bytes().unwrap();
    println!("free device memory: {before} before, {after} after");
}

/// The worker of the test above: one endpoint a line on stdin.
#[test]
#[ignore = "started by a_native_worker_takes_138_980_tensors with endpoints on its stdin"]
fn worker_process() {
    // Among all ignored tests there is nothing to do for it: the other test judges how it ends.
    if std::env::var_os(WORKER).is_none() {
        return;
    }
    let endpoints = std::io::stdin().lines().map_while(|line| line.ok());
    let device = Arc::new(CudaProvider::default().open_cuda(0).unwrap());
    let mut worker =
        NativeWorker::new(device.info().uuid.clone()).with_mapper(CudaMapper::new(device.clone()));
    let mut parameters = DeviceParameters::allocating(device).unwrap();
    for (update, endpoint) in endpoints.enumerate() {
        let summary = worker.update(&endpoint, &mut parameters, soon()).unwrap();
        println!("worker: update {update}: {summary:?}");
        assert_eq!((summary.tensors, summary.mapping_kept), (138_980, update > 0));
    }
    // What the last update left, read back.
    let shape = shape(138_980);
    for i in (0..138_980usize).step_by(997) {
        let mut held = Vec::new();
        let tensor = &shape.tensors[i];
        let take = |bytes: &[u8]| {
            held.extend_from_slice(bytes);
            Ok(())
        };
        parameters.read(&tensor.meta.name, take).unwrap();
        let range = i * TENSOR as usize..(i + 1) * TENSOR as usize;
        assert_eq!(held, shape.bytes[range], "{}", tensor.meta.name);
    }
}
