//! What is left of a job of `ckpt serve` when something dies, and that the next update works without restarting the rest.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

mod serve_support;

use std::time::{Duration, Instant};

use integration_tests::{LONG, ckpt};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use serve_support::{Cluster, request};

const STEP: &str = "/v1/checkpoints/step-1";
/// A rank that is killed closes its connections, so nobody waits for silence.
const SOON: Duration = Duration::from_secs(10);

async fn gather_and_update(cluster: &Cluster) {
    let path = |rest: &str| format!("{STEP}{rest}");
    cluster.expect_empty_200(&cluster.all("POST", &path("/gather-metas"), |_| None).await);
    let updated = cluster.all("POST", &path("/update"), |rank| Some(cluster.update_body(rank))).await;
    cluster.expect_empty_200(&updated);
    cluster.assert_engines_hold_the_files().await;
}

/// Asks until the answer fits.
async fn until(cluster: &Cluster, rank: u32, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
    let end = Instant::now() + LONG;
    loop {
        let status = cluster.status(rank).await;
        if fits(&status) {
            return status;
        }
        assert!(Instant::now() < end, "rank {rank} never {what}: {status}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Kills a rank's parameter server and waits until the launcher has started another.
async fn kill_server(cluster: &mut Cluster, rank: u32) {
    let pid = cluster.status(rank).await["pid"].as_i64().unwrap();
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
    let servers = cluster.servers.as_mut().unwrap();
    servers.stdout_line(&format!("rank {rank} listens")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_that_are_killed_come_back_and_the_others_keep_their_memory() {
    let mut cluster = Cluster::launch(3, &[], &["--max-restarts", "2"], &[]).await;
    cluster.expect_empty_200(&cluster.register("step-1").await);
    gather_and_update(&cluster).await;
    let before = [cluster.status(1).await, cluster.status(2).await];

    // Rank 0, with the hub.
    kill_server(&mut cluster, 0).await;
    for (rank, before) in (1..).zip(&before) {
        let alive = |status: &Value| status["session"]["lost"].is_null() && status["metas"].is_null();
        let status = until(&cluster, rank, "joined again", alive).await;
        assert_eq!(status["pid"], before["pid"]);
        assert_eq!(status["checkpoints"], before["checkpoints"], "its memory stayed");
        assert_eq!(status["pool"]["allocations"], before["pool"]["allocations"]);
        assert_eq!(status["weights"]["committed"]["version"], 1);
    }
    assert_eq!(cluster.register_on(0, "step-1").await.status, 200);
    gather_and_update(&cluster).await;

    // Another rank: the hub lives, and tells the new process what the worker has.
    kill_server(&mut cluster, 2).await;
    let status = until(&cluster, 2, "heard of its worker", |s| !s["weights"]["committed"].is_null()).await;
    assert_eq!(status["checkpoints"], json!({}));
    let known = cluster.status(0).await["hub"]["ranks"][2].clone();
    assert_eq!(known["weights"]["committed"], status["weights"]["committed"]);
    assert_eq!(cluster.register_on(2, "step-1").await.status, 200);
    gather_and_update(&cluster).await;

    // Each update found its engine paused, and left it serving.
    for rank in 0..3 {
        let state = cluster.engine_state(rank).await;
        assert_eq!(
            (&state["updates"], &state["begun_paused"], &state["paused"]),
            (&json!(3), &json!(3), &json!(false))
        );
    }
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_update_leaves_marks_and_paused_engines_until_the_next_one() {
    let mut cluster =
        Cluster::start(2, &["--fail-at-bucket", "2", "--fault-once"], &["--bucket-mib", "1"]).await;
    cluster.expect_empty_200(&cluster.register("step-1").await);
    let path = |rest: &str| format!("{STEP}{rest}");
    cluster.expect_empty_200(&cluster.all("POST", &path("/gather-metas"), |_| None).await);
    for reply in cluster.all("POST", &path("/update"), |rank| Some(cluster.update_body(rank))).await {
        assert_eq!(reply.status, 500);
    }
    for rank in 0..2 {
        let mark = cluster.status(rank).await["weights"]["mark"].clone();
        assert_eq!((&mark["kind"], &mark["version"]), (&json!("mixed"), &json!(1)), "{mark}");
        assert_eq!(cluster.engine_state(rank).await["paused"], true, "engine {rank} serves mixed weights");
    }
    gather_and_update(&cluster).await;
    for rank in 0..2 {
        let status = cluster.status(rank).await;
        assert!(status["weights"]["mark"].is_null(), "{status}");
        assert_eq!(cluster.engine_state(rank).await["paused"], false);
    }

    // The engines can be compared with the files, and with each other.
    let engines = [0, 1].map(|rank| format!("unix:{}", cluster.engine(rank).display()));
    let verify = |options: &[&str]| ckpt!("verify", "--json").args(options).args(&engines);
    let model = cluster.path("model");
    let model = model.to_str().unwrap();
    let checked = verify(&["--checkpoint-path", model]).finish().await.expect_code(0).json();
    assert_eq!((&checked["engines"], &checked["differences"]), (&json!(2), &json!([])));
    verify(&["--algorithm", "sum-64"]).finish().await.expect_code(0);
    cluster.use_checkpoint("other", 6);
    let other = cluster.path("other");
    let finished = verify(&["--checkpoint-path", other.to_str().unwrap()]).finish().await;
    assert!(!finished.status.success());
    assert!(finished.error_line().contains("has other bytes"), "{}", finished.stderr);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_update_goes_back_to_the_last_version() {
    let engine = ["--fail-at-bucket", "2", "--fault-in", "1"];
    let server = ["--on-failure", "rollback", "--bucket-mib", "1", "--verify", "all"];
    let mut cluster = Cluster::start(3, &engine, &server).await;
    cluster.expect_empty_200(&cluster.register("step-1").await);
    gather_and_update(&cluster).await;
    let first = cluster.files.clone();
    // As at each step of a training: the old checkpoint goes before the new one comes.
    cluster.expect_empty_200(&cluster.all("DELETE", STEP, |_| None).await);
    cluster.use_checkpoint("next", 8);
    cluster.expect_empty_200(&cluster.register("step-1").await);
    let path = |rest: &str| format!("{STEP}{rest}");
    cluster.expect_empty_200(&cluster.all("POST", &path("/gather-metas"), |_| None).await);
    for reply in cluster.all("POST", &path("/update"), |rank| Some(cluster.update_body(rank))).await {
        assert_eq!(reply.status, 500);
        let text = reply.json();
        let text = text.as_str().unwrap();
        assert!(text.contains("bucket 2 fails") && text.contains("put back to version 1"), "{text}");
    }
    let next = std::mem::replace(&mut cluster.files, first);
    cluster.assert_engines_hold_the_files().await;
    for rank in 0..3 {
        let (status, engine) = (cluster.status(rank).await, cluster.engine_state(rank).await);
        assert_eq!(status["weights"]["committed"]["version"], 1, "{status}");
        assert!(status["weights"]["mark"].is_null() && status["kept"] == 1, "{status}");
        assert_eq!((&engine["paused"], &engine["mixed"]), (&json!(false), &json!(false)));
    }
    // Forwards again.
    cluster.files = next;
    gather_and_update(&cluster).await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_that_leaves_in_order_is_not_waited_for() {
    let mut cluster = Cluster::start(3, &[], &[]).await;
    cluster.expect_empty_200(&cluster.register("step-1").await);
    gather_and_update(&cluster).await;
    let pid = cluster.status(2).await["pid"].as_i64().unwrap();
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::TERM).unwrap();
    until(&cluster, 0, "saw rank 2 leave", |s| s["hub"]["ranks"][2]["left"] == true).await;
    // The others have no use for its share: they load everything and go on, at once.
    let started = Instant::now();
    cluster.ranks = 2;
    cluster.expect_empty_200(&cluster.all("DELETE", STEP, |_| None).await);
    cluster.expect_empty_200(&cluster.register("step-1").await);
    gather_and_update(&cluster).await;
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
    // Who is asked for it by name is told.
    let body = json!({ "ranks": [0, 2], "timeout": 20.0 });
    let reply = request(&cluster.server(0), "POST", &format!("{STEP}/update"), Some(body)).await;
    assert!(reply.status == 500 && reply.body.contains("it left the job"), "{}", reply.body);
    cluster.end().await;
}
