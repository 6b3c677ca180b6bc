//! The seams on real GPUs: a pipelined broadcast between processes with every byte checked, an abort with a dead peer,
//! and a ring opened by another process.
//!
//! ```text
//! cargo run --release -p ckpt-transport-nccl --example two_gpu_broadcast -- --world 2 --gib 4
//! ```
//!
//! With one GPU `--world 1` runs all but the parts that need a peer. The table comes last; `RUST_LOG=debug` and
//! `NCCL_DEBUG=INFO` show more.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use bytes::Bytes;
use ckpt_core::{
    Epoch, Error, ErrorKind,
    device::{
        Buffer, BufferSlice, DeviceBackend, DeviceProvider, Event, RingExport, Stream as _, host::HostBuffer,
    },
    topology::numa,
    transport::{
        CollectiveOp, Communicator, GroupSpec, Probe, Transport, TransportConfig, TransportProvider,
    },
};
use ckpt_transport_nccl::{
    NcclConfig, NcclProvider,
    device::{CopyBatch, CudaDevice, CudaProvider, DriverCell},
};
use clap::Parser;

const GIB: f64 = (1u64 << 30) as f64;

#[derive(Clone, Debug, Parser)]
struct Options {
    /// Processes, each with a GPU of its own.
    #[arg(long, default_value_t = 2)]
    world: u32,
    /// GiB that each rank holds and sends.
    #[arg(long, default_value_t = 4)]
    gib: u64,
    /// MiB of a bucket; each rank owns an equal part of it.
    #[arg(long, default_value_t = 256)]
    bucket_mib: u64,
    /// Buckets in the ring.
    #[arg(long, default_value_t = 4)]
    slots: u64,
    /// Seconds for each step.
    #[arg(long, default_value_t = 60)]
    deadline: u64,
    /// What this process is; the first one starts the others.
    #[arg(long, hide = true)]
    role: Option<u32>,
    /// Hex of an IPC handle to open, and the ring's bytes.
    #[arg(long, hide = true, num_args = 2)]
    open_ring: Option<Vec<String>>,
}

fn main() -> Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    let options = Options::parse();
    match (&options.open_ring, options.role) {
        (Some(ring), _) => open_ring(ring),
        (None, Some(rank)) => {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build()?;
            let outcome = runtime.block_on(Rank::start(options, rank)?.run());
            // Threads of the libraries may still be at work; nothing is to be waited for.
            runtime.shutdown_background();
            outcome.with_context(|| format!("rank {rank} failed"))
        }
        (None, None) => launch(&options),
    }
}

// --- The launcher: starts the ranks, passes tokens on, prints what they report. ---

struct Process {
    child: Child,
    input: ChildStdin,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Process {
    fn start(options: &Options, rank: u32) -> Result<Self> {
        let numbers = [
            ("--world", u64::from(options.world)),
            ("--gib", options.gib),
            ("--bucket-mib", options.bucket_mib),
            ("--slots", options.slots),
            ("--deadline", options.deadline),
            ("--role", u64::from(rank)),
        ];
        let mut command = Command::new(std::env::current_exe()?);
        for (name, value) in numbers {
            command.arg(name).arg(value.to_string());
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = child.stdin.take().context("no stdin")?;
        let output = BufReader::new(child.stdout.take().context("no stdout")?);
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Ok(Self { child, input, lines })
    }

    /// The rest of the next line that begins with `word`; what comes before is for the table.
    fn expect(&mut self, word: &str, table: &mut Vec<String>) -> Result<String> {
        loop {
            let line = self.lines.recv_timeout(Duration::from_secs(240)).map_err(|_| {
                anyhow!("no `{word}` came from process {}; its log is above", self.child.id())
            })?;
            match line.split_once(' ') {
                Some((first, rest)) if first == word => return Ok(rest.to_owned()),
                Some(("row", rest)) => table.push(rest.to_owned()),
                _ => eprintln!("{line}"),
            }
        }
    }
}

fn launch(options: &Options) -> Result<()> {
    let driver = DriverCell::default();
    let (cuda, nccl) = (CudaProvider::new(driver.clone()).probe(), NcclProvider::new(driver).probe());
    eprintln!("cuda: {cuda}\nnccl: {nccl}");
    ensure!(matches!((&cuda, &nccl), (Probe::Available(_), Probe::Available(_))), "CUDA or NCCL is missing");
    let mut table = Vec::new();
    let mut ranks =
        (0..options.world).map(|rank| Process::start(options, rank)).collect::<Result<Vec<_>>>()?;
    let outcome = coordinate(options, &mut ranks, &mut table);
    for rank in &mut ranks {
        // Ranks that are through have ended or end now; others must not outlive this process.
        if outcome.is_err() {
            let _ = rank.child.kill();
        }
        let _ = rank.child.wait();
    }
    println!("\n{:<34} {:>5} {:>12}  note", "what", "rank", "value");
    table.iter().for_each(|row| println!("{row}"));
    match &outcome {
        Ok(()) => println!("verdict: PASS"),
        Err(error) => println!("verdict: FAIL: {error:#}"),
    }
    outcome
}

fn coordinate(options: &Options, ranks: &mut [Process], table: &mut Vec<String>) -> Result<()> {
    // Two groups: one for the transfer, one in which rank 1 dies.
    for round in 0..2 {
        if round == 1 && options.world == 1 {
            break;
        }
        let token = ranks[0].expect("token", table)?;
        for rank in ranks.iter_mut().skip(1) {
            writeln!(rank.input, "{token}")?;
        }
    }
    // The others die on purpose; rank 0 tells how it ended.
    for rank in ranks.iter_mut().skip(1) {
        rank.expect("dying", table)?;
    }
    ranks[0].expect("through", table)?;
    Ok(())
}

// --- A rank. ---

struct Rank {
    options: Options,
    rank: u32,
    device: Arc<CudaDevice>,
    transport: Arc<dyn Transport>,
}

/// A row of the table, by way of the launcher.
fn row(rank: u32, what: &str, value: String, note: impl AsRef<str>) {
    println!("row {what:<34} {rank:>5} {value:>12}  {}", note.as_ref());
}

fn gib_per_second(bytes: u64, elapsed: Duration) -> String {
    format!("{:.1} GiB/s", bytes as f64 / GIB / elapsed.as_secs_f64())
}

fn ms(elapsed: Duration) -> String {
    format!("{:.1} ms", elapsed.as_secs_f64() * 1e3)
}

/// What the 8 bytes number `index` of the memory of `owner` hold.
fn pattern(owner: u32, index: u64) -> u64 {
    let mixed = (index ^ (u64::from(owner) << 48)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 29)
}

/// Runs `work(start, words)` on pieces of `words`, on all cores.
fn in_parallel(words: &mut [u64], work: impl Fn(u64, &mut [u64]) -> Result<()> + Sync) -> Result<()> {
    let threads = std::thread::available_parallelism().map_or(4, |n| n.get()).min(16);
    let piece = words.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let work = &work;
        let pieces = words.chunks_mut(piece).enumerate();
        let running: Vec<_> =
            pieces.map(|(i, words)| scope.spawn(move || work((i * piece) as u64, words))).collect();
        running.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
    })
}

#[allow(clippy::mut_from_ref, reason = "shared memory; see below for who excludes others")]
fn words(memory: &BufferSlice) -> Result<&mut [u64]> {
    // SAFETY: callers use memory that no copy is using; mappings are page aligned and a multiple of 8 long.
    let bytes = unsafe { memory.as_mut_slice() }?;
    // SAFETY: as above; any bits are a u64.
    Ok(unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), bytes.len() / 8) })
}

fn part(memory: &Arc<dyn Buffer>, offset: u64, len: u64) -> Result<BufferSlice> {
    Ok(BufferSlice::new(memory.clone(), offset..offset + len)?)
}

impl Rank {
    fn start(options: Options, rank: u32) -> Result<Self> {
        let driver = DriverCell::default();
        let device = Arc::new(CudaProvider::new(driver.clone()).open_cuda(rank)?);
        let info = device.info().clone();
        let bound = match info.numa_node {
            Some(node) => numa::bind_process(Path::new(numa::SYSFS), node)?.is_some(),
            None => false,
        };
        eprintln!(
            "rank {rank}: {info:?}, threads bound to the node: {bound}, {} B free",
            device.free_memory_bytes()?
        );
        let config = TransportConfig {
            bind: std::net::Ipv4Addr::LOCALHOST.into(),
            runtime_dir: std::env::temp_dir(),
            tls: false,
            secret: Vec::new(),
            connections: 1,
            device: device.clone(),
        };
        let transport = NcclProvider::with_config(driver, NcclConfig::from_env()?).open(&config)?;
        Ok(Self { options, rank, device, transport })
    }

    fn deadline(&self) -> Instant {
        Instant::now() + Duration::from_secs(self.options.deadline)
    }

    fn report(&self, what: &str, value: String, note: impl AsRef<str>) {
        row(self.rank, what, value, note);
    }

    /// Rank 0 makes the token and tells the launcher; the others are told.
    async fn token(&self) -> Result<Bytes> {
        if self.rank == 0 {
            let token = self.collective()?.create_token().await?;
            let hex: String = token.iter().map(|byte| format!("{byte:02x}")).collect();
            println!("token {hex}");
            return Ok(token);
        }
        let line = tokio::task::spawn_blocking(|| {
            let mut line = String::new();
            std::io::stdin().read_line(&mut line).map(|_| line)
        })
        .await??;
        unhex(line.trim()).map(Bytes::from)
    }

    fn collective(&self) -> Result<&dyn ckpt_core::transport::Collective> {
        self.transport.collective().context("no collective facet")
    }

    async fn join(
        &self,
        token: Bytes,
        world_size: u32,
        epoch: u64,
        deadline: Instant,
    ) -> Result<Communicator> {
        let began = Instant::now();
        let group = GroupSpec { token, rank: self.rank, world_size, epoch: Epoch(epoch) };
        let communicator = self.collective()?.join(group, deadline).await?;
        self.report("join and warm up", ms(began.elapsed()), format!("{world_size} rank(s), epoch {epoch}"));
        Ok(communicator)
    }

    async fn run(self) -> Result<()> {
        let bytes = self.options.gib << 30;
        let began = Instant::now();
        let host = HostBuffer::allocate(bytes)?.slice();
        in_parallel(words(&host)?, |start, words| {
            words.iter_mut().zip(start..).for_each(|(word, i)| *word = pattern(self.rank, i));
            Ok(())
        })?;
        self.report("touch and fill host memory", gib_per_second(bytes, began.elapsed()), "");
        let began = Instant::now();
        let host = self.device.pin(host.buffer().clone())?;
        self.report("pin it", gib_per_second(bytes, began.elapsed()), ms(began.elapsed()));

        let mut communicator = self.join(self.token().await?, self.options.world, 1, self.deadline()).await?;
        let ring = self.device.allocate_ring(self.options.slots * (self.options.bucket_mib << 20))?;
        self.event_latency(&ring.buffer()).await?;
        self.plain_h2d(&host, &ring.buffer()).await?;
        let model = self.device.allocate(u64::from(self.options.world) * bytes)?;
        for run in ["first", "second", "third"] {
            self.transfer(&mut communicator, &host, &ring.buffer(), &model, run).await?;
            self.verify(&model, run).await?;
        }
        drop(communicator);
        if self.rank == 0 {
            self.other_process(&*ring).await?;
            self.many_small_copies(&model).await?;
        }
        if self.options.world > 1 {
            self.dead_peer(&ring.buffer()).await?;
        }
        self.missing_peer(&ring.buffer()).await?;
        println!("through -");
        Ok(())
    }

    /// What waiting for an event costs, beyond the work.
    async fn event_latency(&self, ring: &Arc<dyn Buffer>) -> Result<()> {
        let stream = self.device.stream("latency")?;
        let mut times = Vec::new();
        let mut spinning = Vec::new();
        for i in 0..2000 {
            let began = Instant::now();
            stream.copy(part(ring, 0, 4096)?, part(ring, 8192, 4096)?)?;
            let event = stream.record()?;
            if i % 2 == 0 {
                event.done(self.deadline()).await?;
                times.push(began.elapsed());
            } else {
                while !event.is_complete()? {}
                spinning.push(began.elapsed());
            }
        }
        let median = |times: &mut Vec<Duration>, of: usize| {
            times.sort();
            format!("{:.1} us", times[times.len() * of / 100].as_secs_f64() * 1e6)
        };
        let tail = format!("p99 {}; spinning {}", median(&mut times, 99), median(&mut spinning, 50));
        self.report("4 KiB copy + record + done()", median(&mut times, 50), tail);
        Ok(())
    }

    async fn plain_h2d(&self, host: &Arc<dyn Buffer>, ring: &Arc<dyn Buffer>) -> Result<()> {
        let stream = self.device.stream("h2d")?;
        let piece = (64 << 20).min(ring.len_bytes());
        let bytes = host.len_bytes() / piece * piece;
        for run in ["cold", "warm"] {
            let began = Instant::now();
            for offset in (0..bytes).step_by(piece as usize) {
                stream.copy(
                    part(host, offset, piece)?,
                    part(ring, offset % (ring.len_bytes() / piece * piece), piece)?,
                )?;
            }
            stream.record()?.done(self.deadline()).await?;
            self.report("plain H2D", gib_per_second(bytes, began.elapsed()), run);
        }
        Ok(())
    }

    /// The life of a bucket: own part H2D, one group of broadcasts, copied out, its ring bytes free again.
    async fn transfer(
        &self,
        communicator: &mut Communicator,
        host: &Arc<dyn Buffer>,
        ring: &Arc<dyn Buffer>,
        model: &Arc<dyn Buffer>,
        run: &str,
    ) -> Result<()> {
        let world = u64::from(self.options.world);
        let segment = (self.options.bucket_mib << 20) / world / 256 * 256;
        let buckets = host.len_bytes().div_ceil(segment);
        let streams = ["h2d", "net", "out"].map(|label| self.device.stream(label));
        let [h2d, net, out] = streams.map(|stream| stream.map_err(anyhow::Error::from));
        let (h2d, net, out) = (h2d?, net?, out?);
        let mut free: Vec<Option<Event>> = vec![None; self.options.slots as usize];
        let began = Instant::now();
        for bucket in 0..buckets {
            let len = segment.min(host.len_bytes() - bucket * segment);
            let slot = (bucket % self.options.slots) as usize;
            let at = slot as u64 * (self.options.bucket_mib << 20);
            // What an update's driver waits for here is the worker's ack.
            if let Some(event) = free[slot].take() {
                event.done(self.deadline()).await?;
            }
            let own = at + u64::from(self.rank) * segment;
            h2d.copy(part(host, bucket * segment, len)?, part(ring, own, len)?)?;
            net.wait(&h2d.record()?)?;
            let ops = (0..self.options.world)
                .map(|root| {
                    Ok(CollectiveOp { root, buffer: part(ring, at + u64::from(root) * segment, len)? })
                })
                .collect::<Result<Vec<_>>>()?;
            out.wait(&communicator.queue.enqueue(ops, &net).await?)?;
            for owner in 0..world {
                let target = owner * host.len_bytes() + bucket * segment;
                out.copy(part(ring, at + owner * segment, len)?, part(model, target, len)?)?;
            }
            free[slot] = Some(out.record()?);
        }
        for event in free.into_iter().flatten() {
            event.done(self.deadline()).await?;
        }
        let elapsed = began.elapsed();
        if let Some(error) = communicator.abort.poisoned() {
            return Err(error.into());
        }
        let sent = gib_per_second(host.len_bytes(), elapsed);
        let all = gib_per_second(world * host.len_bytes(), elapsed);
        self.report(
            "pipelined broadcast, own bytes",
            sent,
            format!("{run}; received in all {all}, {}", ms(elapsed)),
        );
        Ok(())
    }

    async fn verify(&self, model: &Arc<dyn Buffer>, run: &str) -> Result<()> {
        let piece = 256 << 20;
        let bounce = self.device.pin(HostBuffer::allocate(piece)?)?;
        let stream = self.device.stream("d2h")?;
        let share = self.options.gib << 30;
        for offset in (0..u64::from(self.options.world) * share).step_by(piece as usize) {
            stream.copy(part(model, offset, piece)?, part(&bounce, 0, piece)?)?;
            stream.record()?.done(self.deadline()).await?;
            let (owner, first) = ((offset / share) as u32, offset % share / 8);
            in_parallel(words(&part(&bounce, 0, piece)?)?, |start, words| {
                for (word, i) in words.iter_mut().zip(first + start..) {
                    ensure!(*word == pattern(owner, i), "rank {owner}'s 8 bytes number {i} arrived wrong");
                    // The next piece must not be taken for this one.
                    *word = 0;
                }
                Ok(())
            })?;
        }
        // So that the next run is not judged by the bytes of this one.
        let zero = BufferSlice::whole(self.device.pin(HostBuffer::allocate(piece)?)?);
        for offset in (0..u64::from(self.options.world) * share).step_by(piece as usize) {
            stream.copy(zero.clone(), part(model, offset, piece)?)?;
        }
        stream.record()?.done(self.deadline()).await?;
        self.report("every byte checked", "ok".into(), run);
        Ok(())
    }

    /// A second process opens the ring by its IPC handle and reads it.
    async fn other_process(&self, ring: &dyn ckpt_core::device::Ring) -> Result<()> {
        let RingExport::Cuda { handle, .. } = ring.export() else { bail!("not a CUDA ring") };
        let len = 64 << 20;
        let host = HostBuffer::allocate(len)?.slice();
        words(&host)?.iter_mut().zip(0..).for_each(|(word, i)| *word = pattern(99, i));
        let host = BufferSlice::whole(self.device.pin(host.buffer().clone())?);
        let stream = self.device.stream("h2d")?;
        stream.copy(host, part(&ring.buffer(), 0, len)?)?;
        stream.record()?.done(self.deadline()).await?;
        let hex: String = handle.iter().map(|byte| format!("{byte:02x}")).collect();
        let child = Command::new(std::env::current_exe()?)
            .args(["--open-ring", &hex, &len.to_string(), "--role", &self.rank.to_string()])
            .stderr(Stdio::inherit())
            .output()?;
        let text = String::from_utf8_lossy(&child.stdout).trim().to_owned();
        ensure!(child.status.success(), "the other process failed: {text}");
        self.report("ring opened by another process", text, "time to open; 64 MiB compared there");
        Ok(())
    }

    /// What a worker with thousands of parameters pays.
    async fn many_small_copies(&self, model: &Arc<dyn Buffer>) -> Result<()> {
        let stream = self.device.cuda_stream("batch")?;
        let (copies, step) = (20_000u64, 8192u64);
        for run in ["first", "second"] {
            let began = Instant::now();
            let mut batch = CopyBatch::with_capacity(copies as usize);
            for i in 0..copies {
                batch.push(&part(model, i * step, 4096)?, &part(model, i * step + 4096, 4096)?)?;
            }
            let made = began.elapsed();
            stream.copy_batch(batch)?;
            let enqueued = began.elapsed();
            stream.record()?.done(self.deadline()).await?;
            let note = format!("{run}; 20,000 of 4 KiB: made {}, done {}", ms(made), ms(began.elapsed()));
            self.report("batched copies, host time", ms(enqueued), note);
            let began = Instant::now();
            for i in 0..copies {
                stream.copy(part(model, i * step, 4096)?, part(model, i * step + 4096, 4096)?)?;
            }
            let enqueued = began.elapsed();
            stream.record()?.done(self.deadline()).await?;
            let note = format!("{run}; done {}", ms(began.elapsed()));
            self.report("single copies, host time", ms(enqueued), note);
        }
        Ok(())
    }

    /// Rank 1 dies while rank 0 waits for its bytes on the device.
    async fn dead_peer(&self, ring: &Arc<dyn Buffer>) -> Result<()> {
        let mut communicator = self.join(self.token().await?, self.options.world, 2, self.deadline()).await?;
        let net = self.device.stream("net")?;
        let len = 64 << 20;
        let warm = CollectiveOp { root: 0, buffer: part(ring, 0, len)? };
        communicator.queue.enqueue(vec![warm], &net).await?.done(self.deadline()).await?;
        if self.rank > 0 {
            println!("dying -");
            std::io::stdout().flush()?;
            std::process::abort();
        }
        let lost = CollectiveOp { root: 1, buffer: part(ring, 0, len)? };
        let event = communicator.queue.enqueue(vec![lost], &net).await?;
        let waited = event.done(Instant::now() + Duration::from_secs(2)).await;
        let Err(error) = waited else { bail!("the bytes of a dead rank arrived") };
        ensure!(error.kind() == ErrorKind::Timeout, "{error}");
        self.report(
            "dead peer noticed",
            "2 s".into(),
            format!("by the deadline; NCCL says {:?}", communicator.abort.poisoned()),
        );
        let began = Instant::now();
        communicator.abort.abort(Error::new(ErrorKind::PeerLost, "broadcast", "rank 1 died"));
        let call = began.elapsed();
        event
            .done(Instant::now() + Duration::from_secs(10))
            .await
            .context("the abort did not free the stream")?;
        let cause = communicator.abort.poisoned().context("an aborted communicator is not poisoned")?;
        ensure!(cause.message() == "rank 1 died", "the first cause is lost: {cause}");
        self.report(
            "abort frees the stream after",
            ms(began.elapsed()),
            format!("the call took {}", ms(call)),
        );
        let refused = communicator.queue.enqueue(Vec::new(), &net).await;
        ensure!(refused.is_err(), "an aborted communicator takes work");
        Ok(())
    }

    /// A join whose peer never comes ends in time, and a group of one works after it.
    async fn missing_peer(&self, ring: &Arc<dyn Buffer>) -> Result<()> {
        let began = Instant::now();
        let group = GroupSpec {
            token: self.collective()?.create_token().await?,
            rank: 0,
            world_size: 2,
            epoch: Epoch(3),
        };
        let joined = self.collective()?.join(group, Instant::now() + Duration::from_secs(3)).await;
        let Err(error) = joined else { bail!("joined a rank that never came") };
        self.report("join without the peer ends after", ms(began.elapsed()), error.to_string());
        let token = self.collective()?.create_token().await?;
        let began = Instant::now();
        let mut alone = self.join(token, 1, 4, self.deadline()).await?;
        let net = self.device.stream("net")?;
        let op = CollectiveOp { root: 0, buffer: part(ring, 0, 1 << 20)? };
        alone.queue.enqueue(vec![op], &net).await?.done(self.deadline()).await?;
        ensure!(alone.abort.poisoned().is_none(), "a new group is poisoned");
        self.report("new group works after", ms(began.elapsed()), "one rank, same process");
        Ok(())
    }
}

fn unhex(text: &str) -> Result<Vec<u8>> {
    ensure!(text.is_ascii() && text.len().is_multiple_of(2) && !text.is_empty(), "not hex: `{text}`");
    (0..text.len()).step_by(2).map(|i| Ok(u8::from_str_radix(&text[i..i + 2], 16)?)).collect()
}

/// The other process of [`Rank::other_process`].
fn open_ring(arguments: &[String]) -> Result<()> {
    let [handle, len] = arguments else { bail!("two arguments are needed") };
    let (handle, len) = (unhex(handle)?, len.parse::<u64>()?);
    let device = CudaProvider::default().open_cuda(0)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let began = Instant::now();
        let ring = device.open_ring(&RingExport::Cuda { handle, offset_bytes: 0 }, len)?;
        let opened = began.elapsed();
        let into = BufferSlice::whole(device.pin(HostBuffer::allocate(len)?)?);
        let stream = device.stream("d2h")?;
        stream.copy(BufferSlice::whole(ring), into.clone())?;
        stream.record()?.done(Instant::now() + Duration::from_secs(30)).await?;
        let right = words(&into)?.iter().zip(0..).all(|(word, i)| *word == pattern(99, i));
        ensure!(right, "the ring's bytes are not those of its owner");
        println!("{}", ms(opened));
        Ok(())
    })
}
