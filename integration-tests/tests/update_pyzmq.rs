//! Whole updates of `ckpt update` into workers written in Python with pyzmq, behind one HTTP engine, over rings in shared
//! memory. `CKPT_TEST_PYTHON` names a Python that has pyzmq.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::collections::BTreeMap;

use integration_tests::{Job, LONG, Process, Program};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_ckpt-under-test");

/// Starts the engine of `python/ce_engine.py`; its process and address.
async fn engine(options: &[&str]) -> (Process, String) {
    let python = std::env::var("CKPT_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python/ce_engine.py");
    let mut process = Program::new(python).arg(script).args(options).spawn();
    let line = process.stdout_line("engine listens on").await;
    let address = line.rsplit(' ').next().unwrap().to_owned();
    (process, address)
}

/// By name: torch's dtype, shape and SHA-256, as the engine prints them.
fn expected(job: &Job) -> BTreeMap<String, Value> {
    let each = job.source().tensors().iter().enumerate().map(|(index, tensor)| {
        let meta = &tensor.meta;
        let digest = sha256(&job.source().read(index).unwrap());
        (meta.name.to_string(), serde_json::json!([meta.dtype.torch_name(), &*meta.shape, digest]))
    });
    each.collect()
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
#[ignore = "needs pyzmq: pip install pyzmq; cargo test -p integration-tests --test update_pyzmq -- --ignored"]
async fn pyzmq_workers_take_a_whole_update() {
    for (protocol, version) in [("ce-0.4", "0.4"), ("ce-0.3", "0.3")] {
        let job = Job::new(PROGRAM, 2, 8);
        let (engine, address) = engine(&["--version", version]).await;
        let options = ["--worker-protocol", protocol, "--engine", "vllm", "--endpoint", &address];
        let options = [&options[..], &["--inference-parallel-size", "2"]].concat();
        for (rank, finished) in job.update(&options).finish(LONG).await {
            let finished = finished.expect_code(0);
            if rank == 0 {
                let told = finished.json();
                assert_eq!(told["tensors"], job.source().tensors().len() as u64, "{told}");
                assert!(told["buckets"].as_u64().unwrap() > 4, "{told}");
            }
        }
        let seen = engine.finish(LONG).await.expect_code(0).json();
        assert_eq!(seen["errors"], serde_json::json!([]));
        let held: BTreeMap<String, BTreeMap<String, Value>> =
            serde_json::from_value(seen["held"].clone()).unwrap();
        let expected = expected(&job);
        assert_eq!(held.len(), 2, "{:?}", held.keys());
        for (uuid, held) in &held {
            assert_eq!(seen["events"][uuid], serde_json::json!(["release", "hook"]));
            assert_eq!(held, &expected, "{uuid}");
        }
    }
}

#[tokio::test]
#[ignore = "needs pyzmq: pip install pyzmq; cargo test -p integration-tests --test update_pyzmq -- --ignored"]
async fn a_pyzmq_worker_that_raises_ends_all_with_its_own_text() {
    let job = Job::new(PROGRAM, 2, 8);
    let (engine, address) = engine(&["--fail-at-bucket", "2"]).await;
    let options = ["--worker-protocol", "ce-0.4", "--engine", "vllm", "--endpoint", &address];
    let options = [&options[..], &["--inference-parallel-size", "2"]].concat();
    for (rank, finished) in job.update(&options).finish(LONG).await {
        let line = finished.expect_code(1).error_line().to_owned();
        assert!(line.contains("ValueError: there is no parameter called lm_head"), "rank {rank}: {line}");
    }
    let seen = engine.finish(LONG).await.expect_code(0).json();
    assert_eq!(seen["errors"].as_array().unwrap().len(), 2, "{seen}");
}
