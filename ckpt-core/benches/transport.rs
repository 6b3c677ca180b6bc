//! `tcp` broadcasts between two members over loopback, beside iperf3 with as many streams in the same run.
//!
//! `cargo bench -p ckpt-core --bench transport`; the table at the end has the ratios. Without iperf3 (`apt-get install
//! iperf3`) only our own rate is printed.

#![allow(clippy::unwrap_used, missing_docs, reason = "a bench fails by panicking")]

use std::{
    net::{Ipv4Addr, TcpListener},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::{
    Epoch,
    device::{BufferSlice, DeviceBackend, DeviceConfig, Stream, host::HostBuffer, host::HostDevice},
    transport::{
        CollectiveOp, Communicator, GroupSpec, Transport, TransportConfig, TransportProvider,
        tcp::TcpProvider,
    },
};
use criterion::{Criterion, Throughput};
use tokio::runtime::Runtime;

const OP_BYTES: u64 = 64 << 20;
const CONNECTIONS: [usize; 3] = [1, 2, 4];
/// Ours and iperf3 in turn, so that both meet the same noise.
const TURNS: usize = 7;
const TURN: Duration = Duration::from_secs(1);

/// One member with a runtime of its own, like a process.
struct Member {
    runtime: Runtime,
    stream: Arc<dyn Stream>,
    buffer: BufferSlice,
    communicator: Communicator,
    _transport: Arc<dyn Transport>,
}

struct Pair {
    members: Vec<Member>,
    _folder: tempfile::TempDir,
}

impl Pair {
    fn new(connections: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let runtime_dir = folder.path().join("run");
        let open = |rank: u32| {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            let inside = runtime.enter();
            let config = DeviceConfig { rank, local_rank: rank, runtime_dir: runtime_dir.clone() };
            let device: Arc<dyn DeviceBackend> = Arc::new(HostDevice::open(&config).unwrap());
            let stream = device.stream("net").unwrap();
            let (bind, secret) = (Ipv4Addr::LOCALHOST.into(), Vec::new());
            let config = TransportConfig {
                bind,
                runtime_dir: runtime_dir.clone(),
                tls: false,
                secret,
                connections,
                device,
            };
            let transport = TcpProvider.open(&config).unwrap();
            drop(inside);
            (runtime, stream, transport)
        };
        let opened = [open(0), open(1)];
        let token = opened[0].0.block_on(opened[0].2.collective().unwrap().create_token()).unwrap();
        let mut joins = Vec::new();
        for (rank, (runtime, _, transport)) in (0..).zip(&opened) {
            let spec = GroupSpec { token: token.clone(), rank, world_size: 2, epoch: Epoch(1) };
            let transport = transport.clone();
            joins.push(runtime.spawn(async move {
                let deadline = Instant::now() + Duration::from_secs(30);
                transport.collective().unwrap().join(spec, deadline).await.unwrap()
            }));
        }
        let members = opened
            .into_iter()
            .zip(joins)
            .map(|((runtime, stream, transport), join)| {
                let communicator = runtime.block_on(join).unwrap();
                let buffer = HostBuffer::from_bytes(&vec![1; OP_BYTES as usize]).unwrap().slice();
                Member { runtime, stream, buffer, communicator, _transport: transport }
            })
            .collect();
        Self { members, _folder: folder }
    }

    /// Broadcasts `groups` times from member 0, enqueued at once as an update does.
    fn broadcast(&mut self, groups: u64) {
        std::thread::scope(|scope| {
            for Member { runtime, stream, buffer, communicator, .. } in &mut self.members {
                scope.spawn(|| {
                    runtime.block_on(async {
                        let mut event = None;
                        for _ in 0..groups {
                            let op = CollectiveOp { root: 0, buffer: buffer.clone() };
                            event = Some(communicator.queue.enqueue(vec![op], stream).await.unwrap());
                        }
                        if let Some(event) = event {
                            event.done(Instant::now() + Duration::from_secs(60)).await.unwrap();
                        }
                    });
                });
            }
        });
    }

    /// Bytes per second over one turn.
    fn rate(&mut self) -> f64 {
        let (began, mut groups) = (Instant::now(), 0);
        while began.elapsed() < TURN {
            self.broadcast(8);
            groups += 8;
        }
        (groups * OP_BYTES) as f64 / began.elapsed().as_secs_f64()
    }
}

/// Bytes per second of iperf3 over one turn; `Err` says why there is none.
fn iperf3(streams: usize) -> Result<f64, String> {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port().to_string();
    let mut server = Command::new("iperf3")
        .args(["--server", "--one-off", "--bind", "127.0.0.1", "--port", &port])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("iperf3 cannot be started ({error}); apt-get install iperf3"))?;
    let (streams, time) = (streams.to_string(), TURN.as_secs().to_string());
    let began = Instant::now();
    let outcome = loop {
        let client = Command::new("iperf3")
            .args([
                "--client",
                "127.0.0.1",
                "--port",
                &port,
                "--parallel",
                &streams,
                "--time",
                &time,
                "--json",
            ])
            .output()
            .map_err(|error| error.to_string())?;
        let report: serde_json::Value = serde_json::from_slice(&client.stdout).unwrap_or_default();
        if let Some(bits) = report["end"]["sum_received"]["bits_per_second"].as_f64() {
            break Ok(bits / 8.0);
        }
        // The server may not listen yet.
        if began.elapsed() > Duration::from_secs(10) {
            break Err(format!("iperf3 failed: {}", report["error"]));
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    if outcome.is_err() {
        let _ = server.kill();
    }
    let _ = server.wait();
    outcome
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

fn table() {
    println!("\nconnections  ckpt GB/s  iperf3 GB/s  ratio (medians of {TURNS} turns of {TURN:?})");
    for connections in CONNECTIONS {
        let mut pair = Pair::new(connections);
        pair.rate();
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        let mut missing = None;
        for _ in 0..TURNS {
            ours.push(pair.rate() / 1e9);
            match iperf3(connections) {
                Ok(rate) => theirs.push(rate / 1e9),
                Err(reason) => missing = Some(reason),
            }
        }
        let ours = median(ours);
        match missing {
            Some(reason) => println!("{connections:>11}  {ours:>9.2}  skipped: {reason}"),
            None => {
                let theirs = median(theirs);
                println!("{connections:>11}  {ours:>9.2}  {theirs:>11.2}  {:>5.2}", ours / theirs);
            }
        }
    }
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    let mut group = criterion.benchmark_group("tcp_broadcast_64MiB");
    group.throughput(Throughput::Bytes(OP_BYTES));
    for connections in CONNECTIONS {
        let mut pair = Pair::new(connections);
        group.bench_function(format!("{connections}_connections"), |bencher| {
            bencher.iter_custom(|iterations| {
                let began = Instant::now();
                pair.broadcast(iterations);
                began.elapsed()
            });
        });
    }
    group.finish();
    criterion.final_summary();
    // `cargo test --benches` only wants to know that it runs.
    if std::env::args().any(|argument| argument == "--bench") {
        table();
    }
}
