//! `ckpt demo`, the README's first command, as a process.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::path::Path;

use ckpt_core::checkpoint::{CheckpointSource, generate, save_checkpoint};
use integration_tests::{Finished, assert_dump, ckpt};
use serde_json::Value;

const MIB: u64 = 1 << 20;

async fn demo(folder: &Path, options: &[&str]) -> Finished {
    ckpt!("demo", "--json").args(options).env("CKPT_RUNTIME_DIR", folder.join("run")).finish().await
}

#[tokio::test]
async fn the_demo_verifies_every_tensor_and_says_what_it_did() {
    let folder = tempfile::tempdir().unwrap();
    let told = demo(folder.path(), &["--size-mib", "16"]).await.expect_code(0).json();
    assert_eq!(told["verified"], true, "{told}");
    assert_eq!((&told["ranks"], &told["workers"]), (&Value::from(2), &Value::from(2)));
    assert_eq!((&told["transport"], &told["device"]), (&Value::from("tcp"), &Value::from("host")));
    let number = |name: &str| told[name].as_u64().unwrap_or_else(|| panic!("{name} in {told}"));
    assert_eq!(number("verified_tensors"), 2 * number("tensors"));
    assert!(number("tensor_bytes").abs_diff(16 * MIB) < MIB / 2, "{told}");
    assert!(number("buckets") > 0 && number("bucket_bytes") > 0, "{told}");
    assert!(number("ring_bytes") <= number("tensor_bytes") + MIB, "{told}");
    for seconds in ["load_s", "gather_metas_s", "verify_s", "gib_per_s"] {
        assert!(told[seconds].as_f64().unwrap_or_else(|| panic!("{seconds} in {told}")) > 0.0, "{told}");
    }
    assert_eq!(told["update_s"].as_array().unwrap().len(), 1);
    let joined = &told["joined"];
    assert_eq!((&joined["p2p_transport"], &joined["sender_ranks"]), (&Value::from("tcp"), &Value::from(2)));
    assert_eq!(joined["verified_tensors"], told["tensors"], "{told}");
    assert!(
        joined["update_s"].as_f64().unwrap() > 0.0 && joined["gib_per_s"].as_f64().unwrap() > 0.0,
        "{told}"
    );
    assert!(told["checkpoint"].as_str().unwrap().contains("generated"), "{told}");
}

#[tokio::test]
async fn three_ranks_update_three_times_and_all_dumps_equal_the_files() {
    let folder = tempfile::tempdir().unwrap();
    let (checkpoint, dump) = (folder.path().join("checkpoint"), folder.path().join("dump"));
    let generated = CheckpointSource::generated(generate::qwen_shaped(6 * MIB), 99);
    save_checkpoint(&generated, &checkpoint, 2 * MIB).unwrap();
    let options = ["--ranks", "3", "--repeat", "3", "--checkpoint-path", checkpoint.to_str().unwrap()];
    let options = [&options[..], &["--dump", dump.to_str().unwrap()]].concat();
    let told = demo(folder.path(), &options).await.expect_code(0).json();
    assert_eq!(told["verified"], true, "{told}");
    assert_eq!(told["update_s"].as_array().unwrap().len(), 3);
    assert_eq!(told["tensors"].as_u64().unwrap(), generated.tensors().len() as u64);
    let dumps: Vec<_> = std::fs::read_dir(&dump).unwrap().map(|entry| entry.unwrap().path()).collect();
    // Those of the ranks, and the folder of the instance that joined.
    assert_eq!(dumps.len(), 4, "{dumps:?}");
    assert!(dumps.iter().any(|dump| dump.ends_with("joined") && dump.is_dir()), "{dumps:?}");
    for dump in dumps {
        assert_dump(&generated, &dump);
    }
}

#[tokio::test]
async fn a_checkpoint_that_cannot_be_used_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let failed = demo(folder.path(), &["--checkpoint-path", "/nowhere/model"]).await.expect_code(2);
    assert!(failed.error_line().contains("/nowhere/model"), "{}", failed.stderr);

    let damaged = folder.path().join("model.safetensors");
    std::fs::write(&damaged, [0xff; 64]).unwrap();
    let failed = demo(folder.path(), &["--checkpoint-path", damaged.to_str().unwrap()]).await.expect_code(6);
    assert!(failed.error_line().contains("model.safetensors"), "{}", failed.stderr);
}
