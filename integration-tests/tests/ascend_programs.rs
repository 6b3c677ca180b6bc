//! Whole programs on the emulated NPUs, one process a rank, with and without faults.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use integration_tests::{Finished, Program, ascend::Emulator, ckpt};
use serde_json::{Value, json};

struct Npus {
    emulator: Emulator,
    folder: tempfile::TempDir,
}

impl Npus {
    fn new() -> Self {
        Self { emulator: Emulator::new(), folder: tempfile::tempdir().unwrap() }
    }

    fn on(&self, program: Program) -> Program {
        self.emulator.serve(program).env("CKPT_RUNTIME_DIR", self.folder.path().join("run"))
    }

    async fn demo(&self, ranks: u32, fault: &str) -> Finished {
        let program = ckpt!("demo", "--json", "--device", "ascend", "--size-mib", "24").args([
            "--ranks",
            &ranks.to_string(),
            "--repeat",
            "2",
            "--timeout",
            "100",
        ]);
        self.on(program).env("ASCEND_EMULATOR_FAULT", fault).finish().await
    }
}

#[tokio::test]
async fn the_demo_verifies_every_tensor_on_four_npus() {
    let told = Npus::new().demo(4, "").await.expect_code(0).json();
    assert_eq!(told["verified"], true, "{told}");
    assert_eq!((&told["transport"], &told["device"]), (&json!("hccl"), &json!("ascend")));
    let number = |name: &str| told[name].as_u64().unwrap_or_else(|| panic!("{name} in {told}"));
    assert_eq!(number("verified_tensors"), 4 * number("tensors"));
    assert_eq!(told["update_s"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn the_transport_benchmark_compares_every_byte() {
    let npus = Npus::new();
    for op in ["broadcast", "allgather"] {
        let program = ckpt!("bench", "transport", "--transport", "hccl", "--device", "ascend", "--op", op)
            .args(["--sizes", "1,100001,3MiB", "--ranks", "3", "--warmup", "1", "--iters", "5"])
            .args(["--check", "--json"]);
        let told = npus.on(program).finish().await.expect_code(0).json();
        assert_eq!((&told["transport"], &told["ranks"]), (&json!("hccl"), &json!(3)), "{told}");
        let results = told["results"].as_array().unwrap();
        assert_eq!(results.len(), 3, "{told}");
        assert!(results.iter().all(|line| line["wrong_bytes"] == json!(0)), "{told}");
    }
}

#[tokio::test]
async fn injected_codes_reach_the_user_with_their_names() {
    // Rank 1 alone has the fault; what the demo prints is every rank's own line.
    for (fault, name) in [
        ("1:HcclCommInitRootInfoConfig=19", "HCCL_E_NETWORK"),
        ("1:HcclBroadcast=14@6", "HCCL_E_ROCE_TRANSFER"),
        ("1:async=21@2", "HCCL_E_REMOTE"),
        ("1:aclrtIpcMemGetExportKey=507899", "ACL_ERROR_RT_DRV_INTERNAL_ERROR"),
    ] {
        let failed = Npus::new().demo(2, fault).await;
        assert_ne!(failed.status.code(), Some(0), "{fault}: {}", failed.stdout);
        assert!(failed.error_line().contains(name), "{fault}: {}", failed.stderr);
    }
}

#[tokio::test]
async fn the_doctor_finds_the_libraries_and_what_is_missing_around_them() {
    let npus = Npus::new();
    let program = npus.on(ckpt!("doctor", "--json"));
    let told = program.env("HCCL_IF_BASE_PORT", "99999").finish().await.expect_code(0).json();
    let find = |list: &str, name: &str| -> Value {
        let list = told[list].as_array().unwrap();
        list.iter().find(|entry| entry["name"] == name).unwrap_or_else(|| panic!("{name} in {told}")).clone()
    };
    integration_tests::schema::assert_fits(&told, "doctor");
    let device = find("devices", "ascend");
    assert_eq!(device["available"], true, "{device}");
    assert!(device["detail"].as_str().unwrap().contains("ACL 1.15.0"), "{device}");
    assert_eq!(find("transports", "hccl")["available"], true);
    let port = find("findings", "HCCL_IF_BASE_PORT");
    assert_eq!(port["verdict"], "warning");
    assert!(port["detail"].as_str().unwrap().contains("99999"), "{port}");
    assert!(find("findings", "RANK_TABLE_FILE")["detail"].as_str().unwrap().contains("16666"));
    // Without any sign of an NPU the doctor does not speak of them.
    let told = ckpt!("doctor", "--json").finish().await.expect_code(0).json();
    assert!(!told["findings"].to_string().contains("RANK_TABLE_FILE"), "{told}");
}

/// The second of two chips of NPU 1, as its `npu-smi` says of whoever asks.
const NPU_SMI: &str = r#"#!/bin/sh
printf '\tNPU ID                         : %s\n\tChip Count                     : 2\n\n' "$5"
printf '\tProcess id:1                 Process name:init            Process memory(MB):1\n'
printf '\tChip ID                        : 0\n\n'
if [ "$5" = 1 ]; then
  printf '\tProcess id:%s              Process name:ckpt            Process memory(MB):1\n' "$PPID"
fi
printf '\tChip ID                        : 1\n'
"#;

#[tokio::test]
async fn an_engine_is_named_after_the_chip_that_npu_smi_finds_it_on() {
    use std::os::unix::fs::PermissionsExt;
    let npus = Npus::new();
    let script = npus.folder.path().join("npu-smi");
    std::fs::write(&script, NPU_SMI).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", npus.folder.path().display(), std::env::var("PATH").unwrap());
    let program = ckpt!("worker", "--device", "ascend", "--exit-with-parent", "--uds")
        .arg(npus.folder.path().join("engine.sock"))
        .env("PATH", path);
    let mut worker = npus.on(program).spawn();
    let told = worker.stdout_line("engine of").await;
    assert!(told.starts_with("engine of NPU-") && told.contains("-3 listens on"), "{told}");
    worker.close_stdin();
    worker.finish(integration_tests::LONG).await.expect_code(0);
    // Without it the name is the physical id's.
    let program = ckpt!("worker", "--device", "ascend", "--exit-with-parent", "--local-rank", "5", "--uds")
        .arg(npus.folder.path().join("other.sock"));
    let mut worker = npus.on(program).spawn();
    assert!(worker.stdout_line("engine of").await.contains("-5 listens on"));
}

#[tokio::test]
async fn an_update_that_cannot_have_enough_memory_says_so() {
    let npus = Npus::new();
    let failed = npus.on(ckpt!("demo", "--device", "ascend", "--size-mib", "24", "--timeout", "100"));
    let failed = failed.env("ASCEND_EMULATOR_HBM_MIB", "1").finish().await;
    assert_ne!(failed.status.code(), Some(0));
    assert!(failed.error_line().contains("memory"), "{}", failed.stderr);
}
