//! `ckpt bench transport` on this machine: every operation, every byte compared.

use integration_tests::ckpt;
use serde_json::{Value, json};

async fn bench(transport: &str, op: &str, ranks: u32, sizes: &str) -> Value {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let program = ckpt!("bench", "transport", "--device", "host", "--transport", transport, "--op", op)
        .args(["--sizes", sizes, "--ranks", &ranks.to_string()])
        .args(["--warmup", "1", "--iters", "11", "--depth", "4", "--check", "--json"])
        .env("CKPT_RUNTIME_DIR", folder.path().join("run"));
    program.finish().await.expect_code(0).json()
}

fn check(report: &Value, op: &str, transport: &str, ranks: u32, sizes: &[u64]) {
    assert_eq!(report["op"], json!(op));
    assert_eq!((&report["transport"], &report["ranks"]), (&json!(transport), &json!(ranks)));
    let lines = report["results"].as_array().expect("results are a list");
    let found: Vec<u64> = lines.iter().filter_map(|line| line["size_bytes"].as_u64()).collect();
    assert_eq!(found, sizes);
    let number = |line: &Value, key: &str| line[key].as_f64().unwrap_or_else(|| panic!("no {key} in {line}"));
    for line in lines {
        assert_eq!(line["wrong_bytes"], json!(0), "{line}");
        let time = number(line, "time_us");
        assert!(time > 0.0);
        if ["read", "write"].contains(&op) {
            assert!((number(line, "msg_rate_mpps") * time - 1.0).abs() < 1e-6, "{line}");
            assert!(number(line, "p50_us") <= number(line, "p99_us"), "{line}");
            assert!(number(line, "avg_gb_per_s") <= number(line, "peak_gb_per_s"), "{line}");
        } else {
            let share = if op == "allgather" { f64::from(ranks - 1) / f64::from(ranks) } else { 1.0 };
            let expected = number(line, "algbw_gb_per_s") * share;
            assert!((number(line, "busbw_gb_per_s") - expected).abs() < 1e-9, "{line}");
        }
    }
}

#[tokio::test]
async fn local_ranks_are_tasks() {
    for op in ["broadcast", "allgather", "read", "write"] {
        // 100001 is no multiple of 3: the parts of the allgather differ.
        check(&bench("local", op, 3, "1,100001,1MiB").await, op, "local", 3, &[1, 100_001, 1 << 20]);
    }
}

#[tokio::test]
async fn tcp_ranks_are_processes() {
    for op in ["broadcast", "allgather", "read", "write"] {
        check(&bench("tcp", op, 2, "4KiB,1MB").await, op, "tcp", 2, &[4096, 1_000_000]);
    }
}

#[tokio::test]
async fn a_rank_alone_works_on_its_own_memory() {
    for op in ["read", "write"] {
        check(&bench("tcp", op, 1, "64KiB").await, op, "tcp", 1, &[65_536]);
    }
}

#[tokio::test]
async fn mistakes_are_told() {
    let bad = ckpt!("bench", "transport", "--sizes", "1MiB,many").finish().await.expect_code(2);
    assert!(bad.error_line().contains("many"), "{}", bad.stderr);
    let unknown = ckpt!("bench", "transport", "--transport", "pigeon", "--ranks", "1", "--json");
    let unknown = unknown.finish().await.expect_code(2);
    assert_eq!(unknown.json()["error"]["kind"], json!("ConfigInvalid"));
}
