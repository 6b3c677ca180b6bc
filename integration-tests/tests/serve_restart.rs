//! One rank of a running `ckpt serve` job dies and is started again, as real processes.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::path::{Path, PathBuf};

use ckpt_core::{
    checkpoint::{CheckpointSource, generate, save_checkpoint},
    topology,
};
use integration_tests::{LONG, Process, ckpt};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, UnixStream},
};

const RANKS: u32 = 2;
/// Two usable devices: each of two ranks gets one of them.
const TREE: &str = include_str!("../../ckpt-core/src/topology/fixtures/two_sockets.txt");

struct Servers {
    folder: tempfile::TempDir,
    hub: TcpSocket,
    files: Vec<PathBuf>,
}

impl Servers {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let generated = CheckpointSource::generated(generate::qwen_shaped(2 << 20), 11);
        save_checkpoint(&generated, folder.path().join("model"), 1 << 20).unwrap();
        let source = CheckpointSource::open(folder.path().join("model")).unwrap();
        topology::unpack(TREE, &folder.path().join("sys")).unwrap();
        // Bound and never listening: the port stays ours until the hub reuses it.
        let hub = TcpSocket::new_v4().unwrap();
        hub.set_reuseaddr(true).unwrap();
        hub.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let files = source.paths().map(Path::to_owned).collect();
        Self { folder, hub, files }
    }

    fn socket(&self, rank: u32) -> PathBuf {
        self.folder.path().join(format!("ps-{rank}.sock"))
    }

    fn spawn(&self, rank: u32) -> Process {
        let (rank_text, ranks) = (rank.to_string(), RANKS.to_string());
        ckpt!("serve", "--device", "host", "--transport", "tcp", "--uds", self.socket(rank))
            .args(["--join-timeout", "20"])
            .env("RANK", &rank_text)
            .env("LOCAL_RANK", &rank_text)
            .env("WORLD_SIZE", &ranks)
            .env("LOCAL_WORLD_SIZE", &ranks)
            .env("CKPT_HUB_ADDRESS", self.hub.local_addr().unwrap().to_string())
            .env("CKPT_RUNTIME_DIR", self.folder.path().join("run"))
            .env("CKPT_SYSFS", self.folder.path().join("sys"))
            .spawn()
    }

    async fn request(&self, rank: u32, method: &str, path: &str, body: Value) -> (String, String) {
        let exchange = async {
            let mut stream = UnixStream::connect(self.socket(rank)).await.unwrap();
            let body = body.to_string();
            let head = format!(
                "{method} {path} HTTP/1.1\r\nhost: ps\r\nconnection: close\r\ncontent-type: application/json\r\n\
                 content-length: {}\r\n\r\n",
                body.len()
            );
            stream.write_all((head + &body).as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            (head.split(' ').nth(1).unwrap().to_owned(), body.to_owned())
        };
        tokio::time::timeout(LONG, exchange).await.unwrap_or_else(|_| panic!("{path} had no answer"))
    }

    async fn register(&self, rank: u32) {
        let mine: Vec<_> = self.files.iter().skip(rank as usize).step_by(RANKS as usize).collect();
        let (status, body) =
            self.request(rank, "POST", "/v1/checkpoints/w/files", json!({ "files": mine })).await;
        assert_eq!(status, "200", "rank {rank}: {body}");
    }

    /// Posted to all ranks at once; each one's answer.
    async fn gather(&self) -> Vec<(String, String)> {
        let post = |rank| self.request(rank, "POST", "/v1/checkpoints/w/gather-metas", json!({}));
        let (first, second) = tokio::join!(post(0), post(1));
        vec![first, second]
    }

    async fn metas(&self, rank: u32) -> Value {
        serde_json::from_str(&self.request(rank, "GET", "/v1/metas", Value::Null).await.1).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_that_was_started_again_gathers_with_the_others() {
    let servers = Servers::new();
    let (mut hub, mut other) = (servers.spawn(0), servers.spawn(1));
    for process in [&mut hub, &mut other] {
        process.stdout_line("listens").await;
    }
    for rank in 0..RANKS {
        servers.register(rank).await;
    }
    // More often than the newcomer will have.
    for _ in 0..3 {
        for (status, body) in servers.gather().await {
            assert_eq!(status, "200", "{body}");
        }
    }
    let before = servers.metas(0).await;
    // Each rank says which devices are its own, by the rule for two ranks and two devices.
    assert_eq!(
        (&before["0"]["rdma_device"], &before["1"]["rdma_device"]),
        (&json!("mlx5_2"), &json!("mlx5_10"))
    );

    other.signal(Signal::KILL);
    other.finish(LONG).await;
    // Nobody waits for it.
    let (status, body) = servers.request(0, "POST", "/v1/checkpoints/w/gather-metas", json!({})).await;
    assert!(status == "500" && body.contains("rank 1"), "{status} {body}");

    let mut again = servers.spawn(1);
    again.stdout_line("listens").await;
    servers.register(1).await;
    for (status, body) in servers.gather().await {
        assert_eq!(status, "200", "{body}");
    }
    let after = servers.metas(0).await;
    assert_eq!(after, servers.metas(1).await);
    let place = |metas: &Value| metas["0"]["memory_buffer_metas_list"][0]["ptr"].as_u64();
    assert!(place(&after).is_some() && place(&after) == place(&before), "its memory is where it was");
    assert_eq!(after["1"]["rdma_device"], json!("mlx5_10"));
    for process in [&hub, &again] {
        process.signal(Signal::TERM);
    }
}
