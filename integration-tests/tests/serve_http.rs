//! `ckpt serve` driven by nothing but HTTP over UNIX sockets: the API of checkpoint-engine's own parameter server.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
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
const TOKEN: &str = "a-secret-of-this-test";

/// One request over a UNIX socket.
async fn request(socket: &Path, method: &str, path: &str, body: Option<Value>) -> Reply {
    raw(socket, method, path, "application/json", &body.map(|b| b.to_string()).unwrap_or_default()).await
}

async fn raw(socket: &Path, method: &str, path: &str, kind: &str, body: &str) -> Reply {
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
struct Cluster {
    folder: TempDir,
    ranks: u32,
    servers: Option<Process>,
    ending: bool,
    engines: Vec<Process>,
    files: Vec<PathBuf>,
}

impl Cluster {
    async fn start(ranks: u32, engine_options: &[&str], server_options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let source = CheckpointSource::generated(generate::qwen_shaped(6 << 20), 5);
        save_checkpoint(&source, folder.path().join("model"), 1 << 20).unwrap();
        let source = CheckpointSource::open(folder.path().join("model")).unwrap();
        let files: Vec<_> = source.paths().map(Path::to_owned).collect();
        assert!(files.len() >= ranks as usize, "{files:?}");
        let mut cluster = Self { folder, ranks, servers: None, ending: false, engines: Vec::new(), files };
        let run = cluster.path("run");
        for rank in 0..ranks {
            let program = ckpt!("worker", "--exit-with-parent", "--uds", cluster.engine(rank), "--rank")
                .arg(rank.to_string())
                .args(engine_options)
                .env("CKPT_RUNTIME_DIR", &run);
            cluster.engines.push(program.spawn());
        }
        let program = ckpt!("launch", "--nproc-per-node", ranks.to_string(), "--")
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

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn engine(&self, rank: u32) -> PathBuf {
        self.path(&format!("engine-{rank}.sock"))
    }

    fn server(&self, rank: u32) -> PathBuf {
        self.path(&format!("ps-{rank}.sock"))
    }

    /// The same request to every rank at once, as collective ones must be sent.
    async fn all(&self, method: &str, path: &str, body: impl Fn(u32) -> Option<Value>) -> Vec<Reply> {
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
    fn expect_empty_200(&self, replies: &[Reply]) {
        for (rank, reply) in replies.iter().enumerate() {
            assert_eq!((reply.status, reply.body.as_str()), (200, ""), "rank {rank}");
        }
    }

    /// Each rank registers its part of the files.
    async fn register(&self, name: &str) -> Vec<Reply> {
        self.all("POST", &format!("/v1/checkpoints/{name}/files"), |rank| {
            let mine = self.files.iter().skip(rank as usize).step_by(self.ranks as usize);
            Some(json!({ "files": mine.collect::<Vec<_>>() }))
        })
        .await
    }

    fn update_body(&self, rank: u32) -> Value {
        json!({
            "ranks": [],
            "update_url": "http://localhost/collective_rpc",
            "inference_group_ranks": [rank],
            "timeout": 60.0,
            "uds": self.engine(rank),
        })
    }

    /// Every engine holds exactly what the files hold.
    async fn assert_engines_hold_the_files(&self) {
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
    async fn engine_updates(&self) -> Vec<u64> {
        let mut updates = Vec::new();
        for rank in 0..self.ranks {
            let state = http_get(&format!("unix:{}", self.engine(rank).display()), "/v1/state").await.json();
            updates.push(state[0]["updates"].as_u64().unwrap());
        }
        updates
    }

    async fn status(&self, rank: u32) -> Value {
        let reply = request(&self.server(rank), "GET", "/v1/status", None).await;
        assert_eq!(reply.status, 200);
        reply.json()
    }

    /// Ends the servers in order; the launcher's exit code is that of its first failure.
    async fn end(mut self) {
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_ranks_register_gather_update_and_unregister() {
    let cluster = Cluster::start(4, &[], &[]).await;
    let of = |rest: &str| format!("/v1/checkpoints/step-1{rest}");

    for reply in cluster.all("GET", "/v1/healthz", |_| None).await {
        assert_eq!(reply.status, 200);
    }
    // Before anything was gathered: no metas, and no update.
    assert_eq!(request(&cluster.server(0), "GET", "/v1/metas", None).await.json(), json!({}));
    let early = request(&cluster.server(0), "POST", &of("/update"), Some(json!({}))).await;
    assert_eq!(early.status, 500);
    assert!(early.json().as_str().unwrap().contains("gather-metas"), "{}", early.body);

    cluster.expect_empty_200(&cluster.register("step-1").await);
    // The same name twice is an error, also while nothing changed.
    for reply in cluster.register("step-1").await {
        assert_eq!(reply.status, 500);
        assert!(reply.json().as_str().unwrap().contains("registered already"), "{}", reply.body);
    }
    cluster.expect_empty_200(&cluster.all("POST", &of("/gather-metas"), |_| None).await);

    // Every rank tells the same metas, in checkpoint-engine's form.
    let metas = cluster.all("GET", "/v1/metas", |_| None).await;
    assert!(metas.iter().all(|reply| reply.status == 200 && reply.body == metas[0].body));
    let metas = metas[0].json();
    let ranks: Vec<&String> = metas.as_object().unwrap().keys().collect();
    assert_eq!(ranks, ["0", "1", "2", "3"]);
    let buffer = &metas["0"]["memory_buffer_metas_list"][0];
    assert!(buffer["ptr"].as_u64().unwrap() > 0 && buffer["size"].as_u64().unwrap() > 0);
    assert!(buffer["metas"][0]["dtype"].as_str().unwrap().starts_with("torch."));

    for round in 1..=2 {
        let updated = cluster.all("POST", &of("/update"), |rank| Some(cluster.update_body(rank))).await;
        cluster.expect_empty_200(&updated);
        cluster.assert_engines_hold_the_files().await;
        let status = cluster.status(0).await;
        assert_eq!((&status["updates"], &status["doing"]["state"]), (&json!(round), &json!("idle")));
        assert_eq!(status["installed"], json!({ "checkpoint": "step-1", "version": 1 }));
        assert_eq!(status["hub"]["ranks"].as_array().unwrap().len(), 4);
    }
    assert_eq!(cluster.status(3).await["hub"], Value::Null);

    let pool = cluster.status(0).await["pool"].clone();
    assert_eq!(pool["user"], json!("step-1"));
    cluster.expect_empty_200(&cluster.all("DELETE", &of(""), |_| None).await);
    // The next checkpoint of the same shapes takes over the memory: nothing is allocated or pinned again.
    cluster.expect_empty_200(&cluster.register("step-2").await);
    let mut taken_over = cluster.status(0).await["pool"].clone();
    assert_eq!(taken_over["user"].take(), json!("step-2"));
    assert_eq!(
        taken_over,
        json!({ "user": null, "maps": 0, "held_bytes": pool["held_bytes"],
        "allocations": pool["allocations"], "pins": pool["pins"] })
    );
    let removed = cluster.all("DELETE", "/v1/checkpoints/step-2", |_| None).await;
    cluster.expect_empty_200(&removed);
    // An unknown name is no error.
    cluster.expect_empty_200(&cluster.all("DELETE", &of(""), |_| None).await);
    // A rank without the checkpoint gathers an empty list and is absent from the metas.
    let files = json!({ "files": cluster.files });
    let registered = request(&cluster.server(2), "POST", &of("/files"), Some(files)).await;
    assert_eq!(registered.status, 200, "{}", registered.body);
    cluster.expect_empty_200(&cluster.all("POST", &of("/gather-metas"), |_| None).await);
    let metas = request(&cluster.server(1), "GET", "/v1/metas", None).await.json();
    assert_eq!(metas.as_object().unwrap().keys().collect::<Vec<_>>(), ["2"]);
    let updated = cluster.all("POST", &of("/update"), |rank| Some(cluster.update_body(rank))).await;
    cluster.expect_empty_200(&updated);
    assert_eq!(cluster.status(1).await["installed"]["version"], json!(2));
    cluster.assert_engines_hold_the_files().await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn some_ranks_pull_and_another_job_joins_with_the_metas_of_this_one() {
    let sender = Cluster::start(4, &[], &[]).await;
    let cluster = &sender;
    cluster.expect_empty_200(&cluster.register("a").await);
    cluster.expect_empty_200(&cluster.all("POST", "/v1/checkpoints/a/gather-metas", |_| None).await);
    // Posted to every rank; those that are not named go on undisturbed.
    let some = async |ranks: &[u32]| {
        let body = |rank| {
            let mut body = cluster.update_body(rank);
            body["ranks"] = json!(ranks);
            body["inference_group_ranks"] = if ranks.contains(&rank) { json!([rank]) } else { json!([]) };
            Some(body)
        };
        cluster.all("POST", "/v1/checkpoints/a/update", body).await
    };
    cluster.expect_empty_200(&some(&[2, 3]).await);
    assert_eq!(cluster.engine_updates().await, [0, 0, 1, 1]);
    cluster.expect_empty_200(&some(&[0, 1]).await);
    cluster.assert_engines_hold_the_files().await;
    assert_eq!(cluster.engine_updates().await, [1, 1, 1, 1]);

    // The same files were generated there, and nothing was registered.
    let joining = Cluster::start(2, &[], &[]).await;
    let metas = request(&cluster.server(3), "GET", "/v1/metas", None).await.json();
    joining.expect_empty_200(&joining.all("POST", "/v1/metas", |_| Some(metas.clone())).await);
    assert_eq!(request(&joining.server(1), "GET", "/v1/metas", None).await.json(), metas);
    let updated =
        joining.all("POST", "/v1/checkpoints/a/update", |rank| Some(joining.update_body(rank))).await;
    joining.expect_empty_200(&updated);
    joining.assert_engines_hold_the_files().await;
    assert_eq!(cluster.engine_updates().await, [1, 1, 1, 1]);
    joining.end().await;
    sender.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_fit_is_422_and_health_answers_during_an_update() {
    // Slow engines, and many buckets.
    let cluster =
        Cluster::start(2, &["--slow-ms", "150"], &["--bucket-mib", "1", "--join-timeout", "10"]).await;
    let server = cluster.server(0);
    for (path, body) in [
        ("/v1/checkpoints/a/files", "{}"),
        ("/v1/checkpoints/a/files", ""),
        ("/v1/checkpoints/a/files", "{\"files\": \"x\"}"),
        ("/v1/checkpoints/a/update", "{\"ranks\": [7]}"),
        ("/v1/checkpoints/a/update", "{\"timeout\": \"soon\"}"),
        ("/v1/metas", "{\"0\": 1}"),
    ] {
        let reply = raw(&server, "POST", path, "application/json", body).await;
        assert_eq!(reply.status, 422, "{path} {body}: {}", reply.body);
        assert!(reply.json().is_string());
    }
    assert_eq!(raw(&server, "POST", "/v1/checkpoints/a/update", "text/plain", "{}").await.status, 422);
    let missing = json!({ "files": ["/no/such/file.safetensors"] });
    let missing = request(&server, "POST", "/v1/checkpoints/a/files", Some(missing)).await;
    assert_eq!(missing.status, 500);
    assert!(missing.body.contains("/no/such/file.safetensors"), "{}", missing.body);
    assert_eq!(request(&server, "GET", "/v1/nothing", None).await.status, 404);
    assert_eq!(request(&server, "GET", "/v1/checkpoints/a/update", None).await.status, 405);

    cluster.expect_empty_200(&cluster.register("a").await);
    cluster.expect_empty_200(&cluster.all("POST", "/v1/checkpoints/a/gather-metas", |_| None).await);
    let update = cluster.all("POST", "/v1/checkpoints/a/update", |rank| Some(cluster.update_body(rank)));
    let beside = async {
        // An event, not a time: the update has begun when the status says so.
        let begun = async {
            while cluster.status(0).await["doing"]["state"] != json!("updating") {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LONG, begun).await.unwrap();
        let second = request(&server, "POST", "/v1/checkpoints/a/update", Some(cluster.update_body(0))).await;
        assert_eq!(second.status, 409, "{}", second.body);
        assert_eq!(request(&server, "GET", "/v1/healthz", None).await.status, 200);
        assert!(request(&server, "GET", "/v1/metas", None).await.json()["0"].is_object());
        assert_eq!(cluster.status(0).await["doing"]["state"], json!("updating"));
    };
    let (updated, ()) = tokio::join!(update, beside);
    cluster.expect_empty_200(&updated);
    cluster.assert_engines_hold_the_files().await;

    // A rank that nobody asked is named.
    let body = json!({ "timeout": 3.0 });
    let alone = request(&server, "POST", "/v1/checkpoints/a/update", Some(body)).await;
    assert_eq!(alone.status, 500);
    assert!(alone.json().as_str().unwrap().contains("rank"), "{}", alone.body);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_in_the_middle_of_an_update_ends_it_with_an_answer() {
    // Six buckets of 20 s each: it never ends by itself.
    let options = ["--bucket-mib", "1", "--grace", "1", "--bucket-timeout", "60"];
    let cluster = Cluster::start(2, &["--slow-ms", "20000"], &options).await;
    cluster.expect_empty_200(&cluster.register("a").await);
    cluster.expect_empty_200(&cluster.all("POST", "/v1/checkpoints/a/gather-metas", |_| None).await);
    let update = cluster.all("POST", "/v1/checkpoints/a/update", |rank| Some(cluster.update_body(rank)));
    let signal = async {
        let begun = async {
            for rank in 0..2 {
                while cluster.status(rank).await["doing"]["state"] != json!("updating") {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        };
        tokio::time::timeout(LONG, begun).await.unwrap();
        cluster.servers.as_ref().unwrap().signal(Signal::TERM);
    };
    let (replies, ()) = tokio::join!(update, signal);
    for reply in replies {
        assert_eq!(reply.status, 500, "{}", reply.body);
    }
    let ended = Cluster { ending: true, ..cluster };
    ended.end().await;
}

#[tokio::test]
async fn a_listener_that_others_reach_needs_a_token() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let refused = ckpt!("serve", "--device", "host", "--listen", "0.0.0.0:0").env("CKPT_RUNTIME_DIR", &run);
    let refused = refused.finish().await.expect_code(2);
    assert!(refused.error_line().contains("CKPT_TOKEN"), "{}", refused.stderr);

    let program = ckpt!("serve", "--device", "host", "--listen", "0.0.0.0:0", "--allow-path", folder.path());
    let port_file = folder.path().join("port-{rank}");
    let program = program.arg("--port-file").arg(&port_file).env("CKPT_RUNTIME_DIR", &run);
    let mut server = program.env("CKPT_TOKEN", TOKEN).spawn();
    server.stdout_line("rank 0 listens").await;
    let address = std::fs::read_to_string(folder.path().join("port-0")).unwrap();
    let address = address.trim().replace("0.0.0.0", "127.0.0.1");
    assert_eq!(http_get(&address, "/v1/healthz").await.status, 200);
    assert_eq!(http_get(&address, "/v1/status").await.status, 401);
    let head = "/v1/status HTTP/1.1\r\nauthorization: Bearer ";
    let reply = http_get(&address, &format!("{head}wrong\r\nx:")).await;
    assert_eq!(reply.status, 401);
    let reply = http_get(&address, &format!("{head}{TOKEN}\r\nx:")).await;
    assert_eq!((reply.status, &reply.json()["rank"]), (200, &json!(0)));
    server.signal(Signal::TERM);
    server.finish(LONG).await.expect_code(0);
}
