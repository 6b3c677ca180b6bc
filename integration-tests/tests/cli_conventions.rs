//! What every command promises: exit codes, one-line errors, one JSON object as the last line of stdout.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use integration_tests::ckpt;

#[tokio::test]
async fn doctor_reports_every_backend_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let report = ckpt!("doctor", "--json").env("CKPT_RUNTIME_DIR", folder.path().join("run")).finish().await;
    let report = report.expect_code(0).json();
    for list in ["devices", "transports"] {
        for backend in report[list].as_array().unwrap() {
            assert!(!backend["detail"].as_str().unwrap().is_empty(), "{backend}");
        }
    }
    let host = report["devices"].as_array().unwrap().iter().find(|device| device["name"] == "host").unwrap();
    assert_eq!(host["available"], true);
    assert_eq!(report["healthy"], true);
}

#[tokio::test]
async fn doctor_fails_where_the_runtime_folder_cannot_be_used() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a-file");
    std::fs::write(&file, b"").unwrap();
    let report =
        ckpt!("doctor", "--json").env("CKPT_RUNTIME_DIR", &file).finish().await.expect_code(1).json();
    assert_eq!(report["healthy"], false);
    let failed =
        report["findings"].as_array().unwrap().iter().find(|check| check["verdict"] == "error").unwrap();
    assert!(failed["detail"].as_str().unwrap().contains("CKPT_RUNTIME_DIR"), "{failed}");
}

#[tokio::test]
async fn a_native_library_that_is_set_and_missing_is_named() {
    let report = ckpt!("doctor", "--json").env("CKPT_MOONCAKE_LIBRARY", "/nowhere/x.so").finish().await;
    let report = report.expect_code(0).json();
    let mooncake = report["transports"].as_array().unwrap().iter().find(|t| t["name"] == "mooncake").unwrap();
    assert_eq!(mooncake["available"], false);
    assert!(mooncake["detail"].as_str().unwrap().contains("/nowhere/x.so"), "{mooncake}");
}

#[tokio::test]
async fn bad_command_lines_are_one_line_and_code_2() {
    for arguments in [
        &["--jsn", "doctor"][..],
        &["docter"],
        &["worker", "--listen", "nowhere"],
        &["worker", "--uds", "/tmp/x", "--listen", "127.0.0.1:0"],
        &["worker", "--inference-parallel-size", "0"],
        &["worker", "--uuid", "A", "--uuid", "A"],
        &["worker", "--listen", "203.0.113.1:1"],
        &["doctor", "--log-level", "=loud=="],
    ] {
        let finished = ckpt!().args(arguments).finish().await.expect_code(2);
        assert_eq!(finished.stderr.lines().count(), 1, "{arguments:?}: {}", finished.stderr);
        assert!(finished.error_line().len() > "error: ".len());
        assert!(finished.stdout.is_empty(), "{arguments:?}: {}", finished.stdout);
        // The same for programs.
        let error = ckpt!().args(arguments).arg("--json").finish().await.expect_code(2).json();
        assert_eq!(error["error"]["kind"], "ConfigInvalid", "{arguments:?}");
        assert!(error["error"]["message"].is_string());
    }
}

#[tokio::test]
async fn help_and_version_go_to_stdout_and_succeed() {
    for arguments in [&["--help"][..], &["help"], &["--version"], &["worker", "--help"], &["help", "doctor"]]
    {
        let finished = ckpt!().args(arguments).finish().await.expect_code(0);
        assert!(!finished.stdout.is_empty() && finished.stderr.is_empty(), "{arguments:?}");
    }
    // The faults for tests are nobody else's business.
    let help = ckpt!("worker", "--help").finish().await.stdout;
    assert!(!help.contains("fail-at-bucket"), "{help}");
}
