//! A whole job on this machine: a generated checkpoint, reference engines, and parameter servers as processes.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use ckpt_core::checkpoint::{CheckpointSource, DigestAlgorithm, generate, save_checkpoint};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpSocket;

use crate::{Finished, LONG, Process, Program, http_get};

/// A checkpoint and the folders of a job. The program is given by the test, since cargo tells only tests its path.
#[derive(Debug)]
pub struct Job {
    folder: TempDir,
    program: &'static str,
    world_size: u32,
    source: CheckpointSource,
    env: Vec<(String, String)>,
}

impl Job {
    /// A job of `world_size` ranks with a generated checkpoint of about `mib` MiB.
    pub fn new(program: &'static str, world_size: u32, mib: u64) -> Self {
        let folder = tempfile::Builder::new().prefix("ck").tempdir().expect("a folder for the test");
        let generated = CheckpointSource::generated(generate::qwen_shaped(mib << 20), 7);
        let path = folder.path().join("checkpoint");
        save_checkpoint(&generated, &path, 8 << 20).expect("the generated checkpoint is written");
        let source = CheckpointSource::open(&path).expect("the written checkpoint opens");
        Self { folder, program, world_size, source, env: Vec::new() }
    }

    /// A variable of all processes that the job starts from now on.
    pub fn with_env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    /// The checkpoint's files.
    pub fn checkpoint(&self) -> PathBuf {
        self.path("checkpoint")
    }

    /// The checkpoint.
    pub fn source(&self) -> &CheckpointSource {
        &self.source
    }

    /// A path in the job's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The runtime folder of all processes.
    pub fn runtime_dir(&self) -> PathBuf {
        self.path("run")
    }

    /// The address of a rank's engine, for [`http_get`].
    pub fn engine(&self, rank: u32) -> String {
        format!("unix:{}", self.socket(rank).display())
    }

    /// The UNIX socket of a rank's engine.
    pub fn socket(&self, rank: u32) -> PathBuf {
        self.path(&format!("worker-{rank}.sock"))
    }

    /// Starts the reference engine of one rank and waits until it listens.
    pub async fn worker(&self, rank: u32, options: &[&str]) -> Process {
        self.worker_at(rank, &self.socket(rank), options).await
    }

    /// The same on another socket: something stands in front of it.
    pub async fn worker_at(&self, rank: u32, socket: &Path, options: &[&str]) -> Process {
        let program = Program::new(self.program)
            .arg("worker")
            .arg("--uds")
            .arg(socket)
            .args(["--rank", &rank.to_string(), "--exit-with-parent"])
            .args(options)
            .env("LOCAL_RANK", rank.to_string());
        let program = self.env.iter().fold(program, |p, (name, value)| p.env(name, value));
        let mut process = program.env("CKPT_RUNTIME_DIR", self.runtime_dir()).spawn();
        process.stdout_line("listens on").await;
        process
    }

    /// Starts the engines of all ranks.
    pub async fn workers(&self, options: &[&str]) -> Vec<Process> {
        let mut workers = Vec::new();
        for rank in 0..self.world_size {
            workers.push(self.worker(rank, options).await);
        }
        workers
    }

    /// Starts `ckpt update` of this checkpoint on all ranks, each with an engine of its own that speaks the native
    /// protocol; `options` may say otherwise.
    pub fn update(&self, options: &[&str]) -> Ranks {
        self.update_in(&[], options)
    }

    /// The same with environment variables.
    pub fn update_in(&self, env: &[(&str, &str)], options: &[&str]) -> Ranks {
        let mut ranks = self.absent();
        for rank in 0..self.world_size {
            let hub = ranks.hub();
            self.spawn(env, &mut ranks, rank, options, hub);
        }
        ranks
    }

    /// The ranks of a job of which none has come yet.
    pub fn absent(&self) -> Ranks {
        let hub = TcpSocket::new_v4().and_then(|socket| {
            // Bound and never listening: nobody else is given the port, and the hub, which reuses addresses, gets it.
            socket.set_reuseaddr(true)?;
            socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
            Ok(socket)
        });
        Ranks { processes: (0..self.world_size).map(|_| None).collect(), hub: hub.expect("a free port") }
    }

    /// Starts one rank of `ckpt update`, as [`Job::update`] starts all; `options` that begin with a command run that.
    pub fn start(&self, ranks: &mut Ranks, rank: u32, options: &[&str]) {
        let hub = ranks.hub();
        self.spawn(&[], ranks, rank, options, hub);
    }

    /// The same with another way to the hub.
    pub fn start_through(&self, ranks: &mut Ranks, rank: u32, options: &[&str], hub: SocketAddr) {
        self.spawn(&[], ranks, rank, options, hub);
    }

    fn spawn(&self, env: &[(&str, &str)], ranks: &mut Ranks, rank: u32, options: &[&str], hub: SocketAddr) {
        let (command, options) = match options.split_first() {
            Some((command, options)) if !command.starts_with('-') => (*command, options),
            _ => ("update", options),
        };
        let mut program = Program::new(self.program).args([command, "--json"]);
        if command == "update" {
            program = program.arg("--checkpoint-path").arg(self.checkpoint());
        }
        for (name, value) in [
            ("--device", "host"),
            ("--worker-protocol", "native"),
            ("--inference-parallel-size", "1"),
            ("--bucket-mib", "1"),
        ] {
            if !options.contains(&name) {
                program = program.args([name, value]);
            }
        }
        if !options.contains(&"--endpoint") {
            program = program.arg("--uds").arg(self.path("worker-{rank}.sock"));
        }
        let (rank_text, world_size) = (rank.to_string(), self.world_size.to_string());
        let hub = hub.to_string();
        let variables = [
            ("RANK", rank_text.as_str()),
            ("WORLD_SIZE", &world_size),
            ("LOCAL_RANK", &rank_text),
            ("LOCAL_WORLD_SIZE", &world_size),
            ("CKPT_HUB_ADDRESS", &hub),
        ];
        let program = self.env.iter().fold(program, |p, (name, value)| p.env(name, value));
        let program = variables.iter().chain(env).fold(program, |p, (name, value)| p.env(name, *value));
        let process = program.env("CKPT_RUNTIME_DIR", self.runtime_dir()).args(options).spawn();
        ranks.processes[rank as usize] = Some(process);
    }

    /// Waits until a rank's engine is in the middle of its first update.
    pub async fn in_the_middle(&self, rank: u32) {
        let until = Instant::now() + LONG;
        loop {
            let state = http_get(&self.engine(rank), "/v1/state").await.json();
            if state[0]["mixed"] == true {
                return;
            }
            assert_eq!(state[0]["updates"], 0, "the update of rank {rank} was over before it could be hit");
            assert!(Instant::now() < until, "no update began on rank {rank}: {state}");
        }
    }

    /// Waits until a rank's engine takes part in no update.
    pub async fn until_free(&self, rank: u32) {
        let until = Instant::now() + LONG;
        loop {
            let state = http_get(&self.engine(rank), "/v1/state").await.json();
            if state[0]["updating"] == false {
                return;
            }
            assert!(Instant::now() < until, "rank {rank} never left its update: {state}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Checks that a rank's engine holds exactly this checkpoint, byte for byte.
    pub async fn assert_holds(&self, rank: u32) {
        let held = http_get(&self.engine(rank), "/v1/tensors").await.json();
        let held = held.as_array().expect("a list of tensors").iter();
        let held: BTreeMap<String, Value> = held
            .map(|tensor| (tensor["name"].as_str().unwrap_or_default().to_owned(), tensor.clone()))
            .collect();
        let expected = digests(&self.source);
        assert_eq!(held.len(), expected.len(), "the engine of rank {rank} holds other tensors");
        for (name, tensor) in &expected {
            assert_eq!(held.get(name), Some(tensor), "tensor {name} on the engine of rank {rank}");
        }
    }
}

/// What an engine that holds `source` answers to `GET /v1/tensors`, by name.
pub fn digests(source: &CheckpointSource) -> BTreeMap<String, Value> {
    let each = source.tensors().iter().enumerate().map(|(index, tensor)| {
        let bytes = source.read(index).expect("the test's own checkpoint can be read");
        let (meta, digest) = (&tensor.meta, DigestAlgorithm::Xxh3_64.digest(&bytes));
        let value = json!({
            "name": &*meta.name,
            "dtype": meta.dtype.safetensors_name(),
            "shape": &*meta.shape,
            "digest": format!("{digest:016x}"),
        });
        (meta.name.to_string(), value)
    });
    each.collect()
}

/// The parameter servers of one `ckpt update`.
#[derive(Debug)]
pub struct Ranks {
    processes: Vec<Option<Process>>,
    hub: TcpSocket,
}

impl Ranks {
    /// One rank that is still running and was not taken.
    pub fn get(&mut self, rank: u32) -> &mut Process {
        self.processes[rank as usize].as_mut().expect("the rank was not taken")
    }

    /// Takes one rank out; [`Ranks::finish`] leaves it to the caller.
    pub fn take(&mut self, rank: u32) -> Process {
        self.processes[rank as usize].take().expect("the rank was not taken")
    }

    /// Where rank 0 listens for the others.
    pub fn hub(&self) -> SocketAddr {
        self.hub.local_addr().expect("a bound socket has an address")
    }

    /// The ranks that are running and were not taken.
    pub fn present(&mut self) -> impl Iterator<Item = (u32, &mut Process)> {
        (0..).zip(&mut self.processes).filter_map(|(rank, process)| Some((rank, process.as_mut()?)))
    }

    /// Waits until all ranks that were not taken have ended.
    pub async fn finish(self, within: Duration) -> Vec<(u32, Finished)> {
        let until = Instant::now() + within;
        let mut ended = Vec::new();
        for (rank, process) in (0..).zip(self.processes) {
            if let Some(process) = process {
                let left = until.saturating_duration_since(Instant::now());
                ended.push((rank, process.finish(left).await));
            }
        }
        ended
    }
}

/// Whether an error's line names a rank, or the worker that it feeds, as the culprit.
pub fn names(line: &str, rank: u32) -> bool {
    let mut words = line.split(|c: char| c.is_whitespace() || "[]:,;".contains(c));
    words.any(|word| match word.split_once('=') {
        Some(("rank", culprit)) => culprit == rank.to_string(),
        Some(("worker", uuid)) => uuid.starts_with("HOST-") && uuid.ends_with(&format!("-{rank}")),
        _ => false,
    })
}

/// Whether `folder` holds what `source` holds, as one `.safetensors` file.
pub fn assert_dump(source: &CheckpointSource, dump: &Path) {
    let held = CheckpointSource::open(dump).expect("the dump opens");
    let comparison = ckpt_core::checkpoint::compare(source, &held).expect("both can be read");
    assert!(comparison.is_equal(), "{}: {comparison:?}", dump.display());
}
