//! A job that serves its memory, and another one that joins from it, as processes.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::{
    path::Path,
    time::{Duration, Instant},
};

use ckpt_core::control::Token;
use integration_tests::{Job, LONG, Process, Program, http_get};
use rustix::process::Signal;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ckpt-under-test");
/// What the project promises.
const SOON: Duration = Duration::from_secs(10);

/// One process that joins; its engine is that of rank 0.
fn join(job: &Job, metas: &str, token: &Path) -> Process {
    Program::new(PROGRAM)
        .args(["join", "--json", "--device", "host", "--worker-protocol", "native"])
        .args(["--inference-parallel-size", "1", "--bucket-mib", "1", "--p2p-transport", "tcp"])
        .arg("--metas")
        .arg(metas)
        .arg("--token-file")
        .arg(token)
        .arg("--uds")
        .arg(job.path("worker-{rank}.sock"))
        .env("CKPT_RUNTIME_DIR", job.runtime_dir())
        .spawn()
}

/// An engine that holds nothing, in place of rank 0's, which the sender has updated.
async fn fresh_engine(job: &Job, workers: &mut Vec<Process>) {
    let old = workers.remove(0);
    old.signal(Signal::KILL);
    old.finish(LONG).await;
    workers.insert(0, job.worker(0, &[]).await);
}

/// Half of eight ranks pull; the others own half of the bytes, serve them, and their engines are left alone.
#[tokio::test]
async fn four_ranks_pull_from_all_eight() {
    let job = Job::new(PROGRAM, 8, 16);
    let _workers = job.workers(&[]).await;
    let options =
        ["--update-method", "p2p", "--ranks", "4-7", "--p2p-transport", "tcp", "--custom-dist", "gloo"];
    for (rank, ended) in job.update(&options).finish(LONG).await {
        let ended = ended.expect_code(0);
        assert!(ended.stderr.contains("--custom-dist does nothing here"), "rank {rank}: {}", ended.stderr);
    }
    for rank in 4..8 {
        job.assert_holds(rank).await;
    }
    for rank in 0..4 {
        let state = http_get(&job.engine(rank), "/v1/state").await.json();
        assert_eq!((&state[0]["updates"], &state[0]["tensors"]), (&json!(0), &json!(0)), "{state}");
    }
}

#[tokio::test]
async fn a_source_that_is_killed_is_named_and_the_next_join_works() {
    const VICTIM: u32 = 1;
    let job = Job::new(PROGRAM, 3, 4);
    let (metas, token) = (job.path("metas.json"), job.path("token"));
    Token::random().unwrap().write_to(&token).unwrap();
    let (metas_text, token_text) = (metas.to_str().unwrap(), token.to_str().unwrap());
    let options = [
        ["--update-method", "all"],
        ["--ranks", "1-2"],
        ["--save-metas-file", metas_text],
        ["--token-file", token_text],
        ["--sleep-time", "600"],
    ]
    .concat();

    let mut workers = job.workers(&[]).await;
    let mut senders = job.update(&options);
    // The summary comes when all has been updated, by broadcast and by P2P.
    let summary = senders.get(0).stdout_line("update_s_by_method").await;
    let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
    let by_method = &summary["update_s_by_method"];
    assert_eq!(
        (by_method["broadcast"].as_array().map(Vec::len), by_method["p2p"].as_array().map(Vec::len)),
        (Some(1), Some(1)),
        "{summary}"
    );
    for rank in 0..3 {
        job.assert_holds(rank).await;
    }

    // An owner that does not answer keeps the join waiting; then it is killed.
    fresh_engine(&job, &mut workers).await;
    let victim = senders.take(VICTIM);
    victim.signal(Signal::STOP);
    let mut joining = join(&job, metas_text, &token);
    joining.stderr_line("joined the job").await;
    victim.signal(Signal::KILL);
    let killed = Instant::now();
    let ended = joining.finish(LONG).await;
    assert!(killed.elapsed() < SOON, "{:?}", killed.elapsed());
    let line = ended.expect_code(4).error_line().to_owned();
    assert!(line.contains("the sender's rank 1"), "{line}");
    drop(victim);
    drop(senders);

    std::fs::remove_file(&metas).unwrap();
    let mut senders = job.update(&options);
    senders.get(0).stdout_line("update_s_by_method").await;
    fresh_engine(&job, &mut workers).await;
    join(&job, metas_text, &token).finish(LONG).await.expect_code(0);
    job.assert_holds(0).await;
}

#[tokio::test]
async fn a_join_takes_metas_from_a_running_server() {
    let job = Job::new(PROGRAM, 1, 2);
    let (token, socket) = (job.path("token"), job.path("ps.sock"));
    Token::random().unwrap().write_to(&token).unwrap();
    let mut server = Program::new(PROGRAM)
        .args(["serve", "--device", "host", "--uds"])
        .arg(&socket)
        .arg("--token-file")
        .arg(&token)
        .env("CKPT_RUNTIME_DIR", job.runtime_dir())
        .spawn();
    server.stdout_line("listens").await;
    let files: Vec<_> = job.source().paths().collect();
    post(&socket, "/v1/checkpoints/w/files", &serde_json::json!({ "files": files }).to_string()).await;
    post(&socket, "/v1/checkpoints/w/gather-metas", "{}").await;

    let _engine = job.worker(0, &[]).await;
    let url = format!("unix:{}", socket.display());
    join(&job, &url, &token).finish(LONG).await.expect_code(0);
    job.assert_holds(0).await;
}

async fn post(socket: &Path, path: &str, body: &str) {
    let exchange = async {
        let mut stream = UnixStream::connect(socket).await?;
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: ps\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + body).as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let answer = tokio::time::timeout(LONG, exchange).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
}
