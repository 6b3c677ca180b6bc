//! What strangers and broken files do to `ckpt serve`: each gets a clear error, nothing is lost, the server stays well.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use ckpt_core::checkpoint::{CheckpointSource, generate, save_checkpoint};
use integration_tests::{LONG, Process, Reply, ckpt};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const TOKEN: &str = "the-token-of-this-test-and-of-no-log";

/// One parameter server on a TCP port that other hosts could reach, with a checkpoint that must survive.
struct Server {
    folder: TempDir,
    process: Process,
    address: String,
}

impl Server {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (token, models) = (folder.path().join("token"), folder.path().join("models"));
        fs::write(&token, TOKEN).unwrap();
        fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
        let source = CheckpointSource::generated(generate::qwen_shaped(1 << 20), 3);
        save_checkpoint(&source, models.join("good"), 64 << 20).unwrap();
        let program = ckpt!(
            "--log-level",
            "debug",
            "serve",
            "--device",
            "host",
            "--listen",
            "0.0.0.0:0",
            "--allow-path"
        )
        .arg(&models)
        .arg("--token-file")
        .arg(&token)
        .env("CKPT_RUNTIME_DIR", folder.path().join("run"));
        let mut process = program.spawn();
        let line = process.stdout_line("listens on").await;
        let port = line.rsplit_once(':').unwrap().1.to_owned();
        let server = Self { folder, process, address: format!("127.0.0.1:{port}") };
        let file =
            CheckpointSource::open(server.models().join("good")).unwrap().paths().next().unwrap().to_owned();
        let reply = server.register("kept", &file).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        server
    }

    fn models(&self) -> PathBuf {
        self.folder.path().join("models")
    }

    async fn request(&self, method: &str, path: &str, body: &str) -> Reply {
        let headers = format!("authorization: Bearer {TOKEN}\r\ncontent-type: application/json\r\n");
        self.raw(&format!(
            "{method} {path} HTTP/1.1\r\nhost: ps\r\nconnection: close\r\n{headers}content-length: {}\r\n\r\n{body}",
            body.len()
        ))
        .await
    }

    /// Any bytes, and the first answer to them.
    async fn raw(&self, bytes: &str) -> Reply {
        let exchange = async {
            let mut stream = TcpStream::connect(&self.address).await.unwrap();
            // The server may have had enough before the end.
            let _ = stream.write_all(bytes.as_bytes()).await;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            String::from_utf8_lossy(&answer).into_owned()
        };
        let answer = tokio::time::timeout(LONG, exchange).await.expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        Reply { status, body: body.to_owned() }
    }

    async fn register(&self, name: &str, file: &Path) -> Reply {
        let body = json!({ "files": [file] }).to_string();
        self.request("POST", &format!("/v1/checkpoints/{name}/files"), &body).await
    }

    /// It answers, and has what it had.
    async fn assert_well(&self, after: &str) {
        let health = self.raw("GET /v1/healthz HTTP/1.1\r\nhost: ps\r\nconnection: close\r\n\r\n").await;
        assert_eq!(health.status, 200, "after {after}");
        let status: Value = self.request("GET", "/v1/status", "").await.json();
        let names: Vec<&String> = status["checkpoints"].as_object().unwrap().keys().collect();
        assert_eq!(names, ["kept"], "after {after}: {status}");
    }
}

fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 1);
    bytes
}

#[tokio::test]
async fn broken_and_forbidden_files_are_refused_with_their_reason() {
    let server = Server::start().await;
    let t = |offsets: &str| format!(r#"{{"dtype":"F32","shape":[2],"data_offsets":{offsets}}}"#);
    let broken = [
        ("truncated", safetensors(&format!(r#"{{"a":{}}}"#, t("[0,8]")), 4), "incomplete"),
        ("overlap", safetensors(&format!(r#"{{"a":{},"b":{}}}"#, t("[0,8]"), t("[4,12]")), 12), "`b`"),
        ("huge-header", u64::MAX.to_le_bytes().to_vec(), "limit"),
        ("long-header", 90_000_000_u64.to_le_bytes().to_vec(), "only 8"),
        ("duplicate", safetensors(&format!(r#"{{"a":{0},"a":{0}}}"#, t("[0,8]")), 8), "two entries `a`"),
        ("nan", safetensors(r#"{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}"#, 8), "not valid"),
        ("negative", safetensors(&format!(r#"{{"a":{}}}"#, t("[-8,0]")), 8), "not valid"),
        ("deep", safetensors(&"[".repeat(200_000), 0), "not valid"),
    ];
    for (name, bytes, reason) in broken {
        let file = server.models().join(format!("{name}.safetensors"));
        fs::write(&file, bytes).unwrap();
        let reply = server.register("bad", &file).await;
        assert_eq!(reply.status, 500, "{name}: {reply:?}");
        assert!(reply.json().as_str().unwrap().contains(reason), "{name}: {reply:?}");
        server.assert_well(name).await;
    }

    let outside = server.folder.path().join("outside.safetensors");
    fs::write(&outside, safetensors("{}", 0)).unwrap();
    let link = server.models().join("link.safetensors");
    symlink(&outside, &link).unwrap();
    let pipe = server.models().join("pipe.safetensors");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
    for (path, reason) in [
        (outside.clone(), "outside the folders"),
        (link, "outside the folders"),
        (server.models().join("../outside.safetensors"), "outside the folders"),
        ("/proc/self/environ".into(), "outside the folders"),
        ("/dev/zero".into(), "outside the folders"),
        (server.models().join("none.safetensors"), "cannot be found"),
        (server.models().join("zero\0.safetensors"), "cannot be found"),
        (pipe, "not a regular file"),
        (server.models(), "not a regular file"),
    ] {
        let reply = server.register("bad", &path).await;
        assert_eq!(reply.status, 500, "{}: {reply:?}", path.display());
        assert!(reply.json().as_str().unwrap().contains(reason), "{}: {reply:?}", path.display());
        server.assert_well(&path.display().to_string()).await;
    }
}

#[tokio::test]
async fn broken_requests_and_wrong_tokens_are_refused() {
    let server = Server::start().await;
    let rank = |metas: &str| {
        format!(
            r#"{{"0":{{"p2p_store_addr":null,"rdma_device":"","memory_buffer_metas_list":[{{"ptr":4096,"size":256,"metas":[{metas}]}}]}}}}"#
        )
    };
    let meta = |shape: &str, size: &str| {
        format!(r#"{{"name":"a","dtype":"torch.float32","shape":{shape},"aligned_size":{size}}}"#)
    };
    let metas = [
        ("not JSON", "{".to_owned()),
        ("NaN", rank(&meta("[NaN]", "256"))),
        ("infinite", rank(&meta("[1e999]", "256"))),
        ("negative", rank(&meta("[-1]", "256"))),
        ("overflow", rank(&meta("[9223372036854775807, 9223372036854775807]", "256"))),
        ("outside its memory", rank(&meta("[4096]", "16384"))),
        ("twice", rank(&format!("{0},{0}", meta("[32]", "128")))),
        ("deep", "[".repeat(100_000)),
    ];
    for (what, body) in metas {
        let reply = server.request("POST", "/v1/metas", &body).await;
        assert_eq!(reply.status, 422, "{what}: {reply:?}");
        server.assert_well(what).await;
    }

    let ask = |path: &str, headers: &str| {
        format!("GET {path} HTTP/1.1\r\nhost: ps\r\nconnection: close\r\n{headers}\r\n")
    };
    let near = &TOKEN[..TOKEN.len() - 1];
    for (what, headers) in [
        ("no token", String::new()),
        ("another token", "authorization: Bearer another\r\n".into()),
        ("the start of the token", format!("authorization: Bearer {near}\r\n")),
        ("an empty token", "authorization: Bearer \r\n".into()),
        ("another scheme", format!("authorization: Basic {TOKEN}\r\n")),
        ("a token in the query's place", format!("x-token: {TOKEN}\r\n")),
    ] {
        for path in ["/v1/status", "/v1/metas", "/metrics", "/v1/none"] {
            let reply = server.raw(&ask(path, &headers)).await;
            assert_eq!(reply.status, 401, "{what}, {path}: {reply:?}");
        }
        server.assert_well(what).await;
    }

    let long = "x".repeat(1 << 20);
    let auth = format!("authorization: Bearer {TOKEN}\r\n");
    let post = |length: &str| {
        format!(
            "POST /v1/checkpoints/bad/files HTTP/1.1\r\nhost: ps\r\nconnection: close\r\n{auth}content-type: \
             application/json\r\ncontent-length: {length}\r\n\r\n"
        )
    };
    for (what, bytes, statuses) in [
        ("not HTTP", "\u{1}\u{2}nonsense\r\n\r\n".to_owned(), [0, 400]),
        ("a long head", ask("/v1/status", &format!("x: {long}\r\n")), [0, 431]),
        ("a long path", ask(&format!("/v1/{long}"), &auth), [414, 431]),
        ("a length that is none", post("-1"), [400, 0]),
        ("a length that overflows", post("99999999999999999999999"), [400, 0]),
        ("a body over the limit", post("20000000") + &"x".repeat(20_000_000), [413, 0]),
        ("another verb", ask("/v1/status", &auth).replace("GET", "BREW"), [405, 0]),
        ("a name with a control character", post("2").replace("bad", "a%0Ab") + "{}", [422, 0]),
    ] {
        let reply = server.raw(&bytes).await;
        assert!(statuses.contains(&reply.status), "{what}: {reply:?}");
        server.assert_well(what).await;
    }
    let text = server.request("GET", "/metrics", "").await;
    assert!(text.body.contains("ckpt_updates_total{rank=\"0\",result=\"committed\"} 0"), "{text:?}");
    let run = server.folder.path().join("run");
    assert_eq!(fs::metadata(&run).unwrap().mode() & 0o777, 0o700);
    // It logged all that at the level debug, and never the secret.
    server.process.signal(rustix::process::Signal::TERM);
    let ended = server.process.finish(LONG).await.expect_code(0);
    assert!(!ended.stderr.contains(TOKEN) && !ended.stdout.contains(TOKEN), "{}", ended.stderr);
}

#[tokio::test]
async fn connections_that_trickle_are_closed_and_keep_nobody_out() {
    let server = Server::start().await;
    let begun = Instant::now();
    let mut slow = Vec::new();
    for n in 0..64 {
        let mut stream = TcpStream::connect(&server.address).await.unwrap();
        let start = match n % 3 {
            0 => String::new(),
            1 => "GET /v1/status HTTP/1.1\r\nx-slow: ".to_owned(),
            _ => format!(
                "POST /v1/metas HTTP/1.1\r\nhost: ps\r\nauthorization: Bearer {TOKEN}\r\ncontent-type: \
                 application/json\r\ncontent-length: 1000\r\n\r\n{{"
            ),
        };
        stream.write_all(start.as_bytes()).await.unwrap();
        slow.push(stream);
    }
    server.assert_well("the slow ones came").await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let ended = async {
        for stream in &mut slow {
            let mut answer = Vec::new();
            // An answer or a reset: what counts is that it ends.
            let _ = stream.read_to_end(&mut answer).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(40), ended).await.expect("every slow connection is closed");
    server.assert_well("they were closed").await;
}

#[tokio::test]
async fn nothing_listens_to_the_network_without_a_token() {
    let folder = tempfile::tempdir().unwrap();
    for program in [
        ckpt!("serve", "--device", "host", "--listen", "0.0.0.0:0"),
        ckpt!("serve", "--device", "host", "--listen", "[::]:0"),
        ckpt!("worker", "--listen", "0.0.0.0:0"),
    ] {
        let ended = program.env("CKPT_RUNTIME_DIR", folder.path().join("run")).finish().await.expect_code(2);
        assert!(ended.error_line().contains("token"), "{}", ended.stderr);
    }
}
