//! Two "nodes" of one machine with a slow link between them: what `ckpt plan` predicts is what happens.
//!
//! Network namespaces stand for the nodes, a veth pair with a token bucket (`tc tbf`) for their NICs.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::{path::Path, process::Command};

use ckpt_core::control::Token;
use integration_tests::{Finished, Job, LONG, Process, Program, ckpt, schema::assert_fits};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ckpt-under-test");
/// Of each direction, as the token bucket counts it. So slow that a busy machine and a debug build hardly count.
const MBIT_PER_S: u32 = 20;
/// Of 1,514 bytes on the wire 1,448 are payload.
const PAYLOAD: f64 = 1448.0 / 1514.0;
const MIB: u64 = 16;

/// Two namespaces and their link; they go when this is dropped.
struct TwoNodes {
    names: [String; 2],
    addresses: [String; 2],
}

fn sh(line: &str) {
    let output = Command::new("sh").args(["-ec", line]).output().unwrap();
    assert!(output.status.success(), "`{line}`: {}", String::from_utf8_lossy(&output.stderr));
}

impl TwoNodes {
    fn new(number: u32) -> Self {
        let id = std::process::id();
        let names = ["a", "b"].map(|node| format!("ckpt-{id}-{number}-{node}"));
        // Devices live inside their namespaces, so that these names meet nobody else's.
        let link = format!("ck{id}{number}");
        let addresses = ["10.97.0.1", "10.97.0.2"].map(str::to_owned);
        let nodes = Self { names, addresses };
        let [a, b] = &nodes.names;
        sh(&format!("ip netns add {a}; ip netns add {b}"));
        sh(&format!(
            "ip -n {a} link add v0 type veth peer name {link}; ip -n {a} link set {link} netns {b} name v0"
        ));
        for (name, address) in nodes.names.iter().zip(&nodes.addresses) {
            sh(&format!(
                "ip -n {name} addr add {address}/24 dev v0; ip -n {name} link set v0 up; ip -n {name} link set lo up"
            ));
            sh(&format!(
                "tc -n {name} qdisc add dev v0 root tbf rate {MBIT_PER_S}mbit burst 64kb latency 100ms"
            ));
        }
        nodes
    }

    /// `ckpt launch` of two ranks on one node.
    fn launch(&self, node: usize, options: &[&str], command: &[&str], job: &Job, token: &Path) -> Program {
        Program::new("ip")
            .args([
                "netns",
                "exec",
                &self.names[node],
                PROGRAM,
                "launch",
                "--nproc-per-node",
                "2",
                "--token-file",
            ])
            .arg(token)
            .args(options)
            .args(["--", PROGRAM])
            .args(command)
            .arg("--token-file")
            .arg(token)
            .args(["--json", "--device", "host", "--transport", "tcp", "--p2p-transport", "tcp"])
            .args([
                "--worker-protocol",
                "native",
                "--inference-parallel-size",
                "1",
                "--bind",
                &self.addresses[node],
            ])
            .arg("--uds")
            .arg(job.path("worker-{rank}.sock"))
            .env("CKPT_RUNTIME_DIR", job.runtime_dir())
    }
}

impl Drop for TwoNodes {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

/// Seconds that `ckpt plan` predicts for two nodes with two ranks each and this link.
async fn predicted(job: &Job, checkpoint: &[&str], options: &[&str]) -> f64 {
    let file = job.path("cluster.toml");
    let rate = f64::from(MBIT_PER_S) / 8.0 / 1000.0 * PAYLOAD;
    let text = format!(
        "name = \"two namespaces\"\nexchange = \"star\"\n[[nodes]]\ncount = 2\ndevices = 2\nmemory_gib = 4\n\
         h2d_gb_per_s = 2\nlink_gb_per_s = 1\ncopy_gb_per_s = 2\nnics = 1\nnic_gb_per_s = {rate}\n\
         [latency]\nmessage_us = 1000\nexchange_us = 1000\nread_us = 1000\nprepare_ms = 10\ncommunicator_ms = 50\n\
         [worker]\nopen_ms = 10\nper_bucket_us = 1000\nper_tensor_us = 5\nbeside_collective_us = 0\nend_ms = 10\n"
    );
    std::fs::write(&file, text).unwrap();
    let program = ckpt!("plan", "--json", "--cluster").arg(&file).args(checkpoint);
    let report = program.args(options).finish().await.expect_code(0).json();
    assert_fits(&report, "plan");
    report["plan"]["predicted"]["total_s"].as_f64().unwrap()
}

/// The quickest update of what a rank 0 printed; the first also forms connections.
fn measured(line: &str) -> f64 {
    let summary: serde_json::Value = serde_json::from_str(line.trim_start_matches("[0] ")).unwrap();
    let seconds = summary["update_s"].as_array().unwrap();
    seconds.iter().map(|s| s.as_f64().unwrap()).fold(f64::INFINITY, f64::min)
}

fn summary(finished: &Finished) -> &str {
    finished.stdout.lines().find(|line| line.contains("update_s")).expect("rank 0 prints a summary")
}

fn assert_near(what: &str, measured: f64, predicted: f64) {
    let ratio = measured / predicted;
    println!("{what}: measured {measured:.3} s, predicted {predicted:.3} s, ratio {ratio:.3}");
    assert!((0.85..=1.15).contains(&ratio), "{what}: measured {measured:.3} s, predicted {predicted:.3} s");
}

#[tokio::test]
#[ignore = "needs root, ip and tc: cargo test -p integration-tests --test netns -- --ignored --nocapture"]
async fn a_slow_link_takes_as_long_as_predicted() {
    let nodes = TwoNodes::new(0);
    let job = Job::new(PROGRAM, 4, MIB);
    let token = job.path("token");
    Token::random().unwrap().write_to(&token).unwrap();
    let checkpoint = job.checkpoint();
    let checkpoint = checkpoint.to_str().unwrap();

    // Two ranks on each node, all of which update their engines.
    let _workers = job.workers(&[]).await;
    let update = ["update", "--checkpoint-path", checkpoint, "--repeat", "3"];
    let started: Vec<Process> = (0..2)
        .map(|node| {
            let number = node.to_string();
            let options = [
                "--nnodes",
                "2",
                "--node-rank",
                &number,
                "--master-addr",
                &nodes.addresses[0],
                "--master-port",
                "29500",
            ];
            nodes.launch(node, &options, &update, &job, &token).spawn()
        })
        .collect();
    let mut finished = Vec::new();
    for launcher in started {
        finished.push(launcher.finish(LONG).await.expect_code(0));
    }
    for rank in 0..4 {
        job.assert_holds(rank).await;
    }
    assert_near(
        "2x2 update",
        measured(summary(&finished[0])),
        predicted(&job, &["--checkpoint-path", checkpoint], &[]).await,
    );

    // The first node serves its memory, the second one joins from it.
    let (senders, joining) = (Job::new(PROGRAM, 2, MIB), Job::new(PROGRAM, 2, MIB));
    let metas = job.path("metas.json");
    let metas = metas.to_str().unwrap();
    let _sender_workers = senders.workers(&[]).await;
    let _joining_workers = joining.workers(&[]).await;
    let serve =
        ["update", "--checkpoint-path", checkpoint, "--save-metas-file", metas, "--sleep-time", "600"];
    let mut serving = nodes.launch(0, &[], &serve, &senders, &token).spawn();
    serving.stdout_line("update_s").await;
    let join = ["join", "--metas", metas, "--repeat", "2"];
    let joined = nodes.launch(1, &[], &join, &joining, &token).finish().await.expect_code(0);
    for rank in 0..2 {
        joining.assert_holds(rank).await;
    }
    let expected = predicted(&job, &["--metas", metas], &["--method", "join", "--ranks", "2-3"]).await;
    assert_near("join", measured(summary(&joined)), expected);
}
