//! A job of `ckpt serve` under `ckpt launch`, with one reference engine for each rank.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test file uses a part, and ends where its set-up fails"
)]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use ckpt_core::checkpoint::{CheckpointSource, DigestAlgorithm, generate, save_checkpoint};
use integration_tests::{LONG, Process, Reply, ckpt, http_get};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

/// The secret of all jobs here: who joins must have that of the owners.
pub const TOKEN: &str = "a-secret-of-this-test";

/// One request over a UNIX socket.
pub async fn request(socket: &Path, method: &str, path: &str, body: Option<Value>) -> Reply {
    raw(socket, method, path, "application/json", &body.map(|b| b.to_string()).unwrap_or_default()).await
}

pub async fn raw(socket: &Path, method: &str, path: &str, kind: &str, body: &str) -> Reply {
    let exchange = async {
        let mut stream = UnixStream::connect(socket).await.unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: ps\r\nconnection: close\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + body).as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        Reply { status: head.split(' ').nth(1).unwrap().parse().unwrap(), body: body.to_owned() }
    };
    tokio::time::timeout(LONG, exchange).await.unwrap_or_else(|_| panic!("{method} {path} had no answer"))
}

/// A running job of parameter servers with one engine for each rank, and a checkpoint in several files.
pub struct Cluster {
    pub folder: TempDir,
    pub ranks: u32,
    pub servers: Option<Process>,
    pub ending: bool,
    pub engines: Vec<Process>,
    pub files: Vec<PathBuf>,
}

impl Cluster {
    pub async fn start(ranks: u32, engine_options: &[&str], server_options: &[&str]) -> Self {
        Self::launch(ranks, engine_options, &[], server_options).await
    }

    /// The same, with options for `ckpt launch` too.
    pub async fn launch(
        ranks: u32,
        engine_options: &[&str],
        launch_options: &[&str],
        server_options: &[&str],
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut cluster =
            Self { folder, ranks, servers: None, ending: false, engines: Vec::new(), files: Vec::new() };
        cluster.use_checkpoint("model", 5);
        let run = cluster.path("run");
        for rank in 0..ranks {
            let program = ckpt!("worker", "--exit-with-parent", "--uds", cluster.engine(rank), "--rank")
                .arg(rank.to_string())
                .args(engine_options)
                .env("CKPT_RUNTIME_DIR", &run);
            cluster.engines.push(program.spawn());
        }
        let program = ckpt!("launch", "--nproc-per-node", ranks.to_string())
            .args(launch_options)
            .arg("--")
            .arg(env!("CARGO_BIN_EXE_ckpt-under-test"))
            .args(["serve", "--device", "host", "--transport", "tcp", "--worker-protocol", "native"])
            .args(["--uds".into(), cluster.path("ps-{rank}.sock")])
            .args(server_options)
            .env("CKPT_RUNTIME_DIR", &run)
            .env("CKPT_TOKEN", TOKEN);
        let mut servers = program.spawn();
        for rank in 0..ranks {
            servers.stdout_line(&format!("rank {rank} listens")).await;
        }
        for engine in &mut cluster.engines {
            engine.stdout_line("listens on").await;
        }
        cluster.servers = Some(servers);
        cluster
    }

    /// Writes another checkpoint of the same model; what is registered next.
    pub fn use_checkpoint(&mut self, name: &str, seed: u64) {
        let source = CheckpointSource::generated(generate::qwen_shaped(6 << 20), seed);
        save_checkpoint(&source, self.path(name), 1 << 20).unwrap();
        let source = CheckpointSource::open(self.path(name)).unwrap();
        self.files = source.paths().map(Path::to_owned).collect();
        assert!(self.files.len() >= self.ranks as usize, "{:?}", self.files);
    }

    /// What a rank's engine says of itself.
    pub async fn engine_state(&self, rank: u32) -> Value {
        http_get(&format!("unix:{}", self.engine(rank).display()), "/v1/state").await.json()[0].clone()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn engine(&self, rank: u32) -> PathBuf {
        self.path(&format!("engine-{rank}.sock"))
    }

    pub fn server(&self, rank: u32) -> PathBuf {
        self.path(&format!("ps-{rank}.sock"))
    }

    /// The same request to every rank at once, as collective ones must be sent.
    pub async fn all(&self, method: &str, path: &str, body: impl Fn(u32) -> Option<Value>) -> Vec<Reply> {
        let mut running = Vec::new();
        for rank in 0..self.ranks {
            let (socket, method, path) = (self.server(rank), method.to_owned(), path.to_owned());
            let body = body(rank);
            running.push(tokio::spawn(async move { request(&socket, &method, &path, body).await }));
        }
        let mut replies = Vec::new();
        for reply in running {
            replies.push(reply.await.unwrap());
        }
        replies
    }

    /// What every rank must answer to what it was asked.
    #[track_caller]
    pub fn expect_empty_200(&self, replies: &[Reply]) {
        for (rank, reply) in replies.iter().enumerate() {
            assert_eq!((reply.status, reply.body.as_str()), (200, ""), "rank {rank}");
        }
    }

    /// Each rank registers its part of the files.
    pub async fn register(&self, name: &str) -> Vec<Reply> {
        self.all("POST", &format!("/v1/checkpoints/{name}/files"), |rank| {
            let mine = self.files.iter().skip(rank as usize).step_by(self.ranks as usize);
            Some(json!({ "files": mine.collect::<Vec<_>>() }))
        })
        .await
    }

    pub fn update_body(&self, rank: u32) -> Value {
        json!({
            "ranks": [],
            "update_url": "http://localhost/collective_rpc",
            "inference_group_ranks": [rank],
            "timeout": 60.0,
            "uds": self.engine(rank),
        })
    }

    /// Every engine holds exactly what the files hold.
    pub async fn assert_engines_hold_the_files(&self) {
        let source = Arc::new(CheckpointSource::open_files(&self.files).unwrap());
        let expected: BTreeMap<String, String> = (0..source.tensors().len())
            .map(|index| {
                let digest = DigestAlgorithm::Xxh3_64.digest(&source.read(index).unwrap());
                (source.tensors()[index].meta.name.to_string(), format!("{digest:016x}"))
            })
            .collect();
        for rank in 0..self.ranks {
            let held = http_get(&format!("unix:{}", self.engine(rank).display()), "/v1/tensors").await.json();
            let held: BTreeMap<String, String> = held
                .as_array()
                .unwrap()
                .iter()
                .map(|t| (t["name"].as_str().unwrap().to_owned(), t["digest"].as_str().unwrap().to_owned()))
                .collect();
            assert_eq!(held, expected, "engine {rank}");
        }
    }

    /// How often each engine was updated.
    pub async fn engine_updates(&self) -> Vec<u64> {
        let mut updates = Vec::new();
        for rank in 0..self.ranks {
            updates.push(self.engine_state(rank).await["updates"].as_u64().unwrap());
        }
        updates
    }

    /// One rank registers its part of the files.
    pub async fn register_on(&self, rank: u32, name: &str) -> Reply {
        let mine = self.files.iter().skip(rank as usize).step_by(self.ranks as usize);
        let body = json!({ "files": mine.collect::<Vec<_>>() });
        request(&self.server(rank), "POST", &format!("/v1/checkpoints/{name}/files"), Some(body)).await
    }

    pub async fn status(&self, rank: u32) -> Value {
        let reply = request(&self.server(rank), "GET", "/v1/status", None).await;
        assert_eq!(reply.status, 200);
        reply.json()
    }

    /// Ends the servers in order; the launcher's exit code is that of its first failure.
    pub async fn end(mut self) {
        let servers = self.servers.take().unwrap();
        // It may have been signalled before; a second one would kill.
        if !self.ending {
            servers.signal(Signal::TERM);
        }
        servers.finish(LONG).await.expect_code(0);
        for rank in 0..self.ranks {
            assert!(!self.server(rank).exists(), "the socket of rank {rank} was left");
        }
    }
}
