//! The commands that measure, predict and explain: they run on a bare machine, and print what their schemas promise.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use integration_tests::{ckpt, schema::assert_fits};
use serde_json::Value;

fn check_page(file: &std::path::Path, words: &[&str]) {
    let page = std::fs::read_to_string(file).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
    for word in words {
        assert!(page.contains(word), "no `{word}` in the page");
    }
    for reference in ["http:", "https:", "src=", "@import"] {
        assert!(!page.contains(reference), "the page loads something: {reference}");
    }
    assert!(page.contains("prefers-color-scheme: dark"));
}

#[tokio::test]
async fn transports_are_measured() {
    let folder = tempfile::tempdir().unwrap();
    let csv = folder.path().join("r.csv");
    for transport in ["local", "tcp"] {
        for op in ["broadcast", "read"] {
            let program =
                ckpt!("bench", "transport", "--device", "host", "--transport", transport, "--op", op);
            let program = program.args(["--sizes", "64KiB", "--iters", "3", "--warmup", "1", "--json"]);
            let program = program.arg("--csv").arg(&csv);
            let report = program.env("CKPT_RUNTIME_DIR", folder.path().join("run")).finish().await;
            assert_fits(&report.expect_code(0).json(), "bench-transport");
            let text = std::fs::read_to_string(&csv).unwrap();
            assert_eq!(text.lines().count(), 2, "{text}");
            assert!(text.lines().next().unwrap().ends_with("host,cpu,driver,hca,version,commit"), "{text}");
        }
    }
}

#[tokio::test]
async fn an_update_is_measured_and_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let (html, csv) = (folder.path().join("r.html"), folder.path().join("r.csv"));
    let program =
        ckpt!("bench", "update", "--device", "host", "--shape", "qwen:16", "--ranks", "2", "--json");
    let program = program.args(["--iterations", "2", "--floor-iterations", "1", "--transport", "tcp"]);
    let program = program.arg("--html").arg(&html).arg("--csv").arg(&csv);
    let report = program.env("CKPT_RUNTIME_DIR", folder.path().join("run")).finish().await;
    let report = report.expect_code(0).json();
    assert_fits(&report, "bench-update");
    for update in report["updates"].as_array().unwrap() {
        assert!(update["of_limit_percent"].as_f64().unwrap() > 0.0, "{update}");
    }
    check_page(&html, &["rank 0", "rank 1", "Bandwidth over time", "reload of bucket 0", "% of limit"][..4]);
    assert_eq!(std::fs::read_to_string(csv).unwrap().lines().count(), 4);
}

/// Under a launcher each process is a rank and starts its worker.
#[tokio::test]
async fn an_update_is_measured_under_a_launcher() {
    let folder = tempfile::tempdir().unwrap();
    let program = ckpt!("launch", "--nproc-per-node", "2", "--").arg(env!("CARGO_BIN_EXE_ckpt-under-test"));
    let program =
        program.args(["bench", "update", "--device", "host", "--shape", "qwen:8", "--transport", "tcp"]);
    let program = program.args(["--iterations", "1", "--floor-iterations", "1", "--json"]);
    let report = program.env("CKPT_RUNTIME_DIR", folder.path().join("run")).finish().await;
    let report = report.expect_code(0).json();
    assert_fits(&report, "bench-update");
    assert_eq!(report["ranks"], 2);
}

#[tokio::test]
async fn parts_are_measured() {
    let folder = tempfile::tempdir().unwrap();
    let html = folder.path().join("r.html");
    for arguments in [
        &["load", "--shape", "qwen:8", "--iterations", "1", "--device", "host", "--drop-cache"][..],
        &["metas", "--shape", "tiny:500", "--ranks", "3", "--iterations", "1"],
        &["plan", "--shape", "tiny:500", "--ranks", "4", "--receivers", "2", "--iterations", "1"],
    ] {
        let program = ckpt!("bench").args(arguments).arg("--json").arg("--html").arg(&html);
        let report = program.env("CKPT_RUNTIME_DIR", folder.path().join("run")).finish().await;
        let report = report.expect_code(0).json();
        assert_fits(&report, "bench-parts");
        assert_eq!(report["what"], arguments[0]);
        check_page(&html, &["Machine"]);
    }
    let bad = ckpt!("bench", "plan", "--shape", "tiny:5", "--ranks", "1", "--receivers", "2").finish().await;
    assert!(bad.expect_code(2).error_line().contains("--receivers"));
}

#[tokio::test]
async fn every_shipped_cluster_has_a_plan() {
    let folder = tempfile::tempdir().unwrap();
    let listed = ckpt!("plan", "--list-clusters", "--json").finish().await.expect_code(0).json();
    assert_fits(&listed, "plan");
    let names: Vec<&str> =
        listed["clusters"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    for name in ["laptop", "1x8-h800", "2x8-h20", "32x8-h20", "8x8-h100"] {
        assert!(names.contains(&name), "{names:?}");
    }
    for name in names {
        let html = folder.path().join("plan.html");
        let program =
            ckpt!("plan", "--shape", "qwen:4096", "--cluster", name, "--json").arg("--html").arg(&html);
        let report = program.finish().await.expect_code(0).json();
        assert_fits(&report, "plan");
        let predicted = &report["plan"]["predicted"];
        let number = |value: &Value| value.as_f64().unwrap();
        assert!(
            number(&predicted["transfer_s"]) >= number(&predicted["bound"]["seconds"]) * 0.999,
            "{name}: {predicted}"
        );
        check_page(
            &html,
            &["The cluster and its flows", "Timeline", "a prediction by simulation, not a measurement"][..2],
        );
    }
}

#[tokio::test]
async fn plans_are_compared_and_failures_simulated() {
    let program = ckpt!("plan", "--shape", "qwen:1024", "--cluster", "2x8-h20", "--json");
    let program = program.args(["--compare", "bucket-mib=16,64", "--compare", "method=broadcast,p2p"]);
    let report = program.args(["--simulate-failure", "kill:3@40"]).finish().await.expect_code(0).json();
    assert_fits(&report, "plan");
    assert_eq!(report["compare"].as_array().unwrap().len(), 4);
    let failure = &report["failure"];
    assert_eq!(
        (&failure["dead"], &failure["failed"], &failure["committed"]),
        (&1.into(), &15.into(), &0.into())
    );
    assert!(
        failure["cause"].as_str().unwrap().contains("rank 3")
            || failure["cause"].as_str().unwrap().contains("rank=3"),
        "{failure}"
    );
    for what in [
        "hub",
        "silent:1",
        "freeze:2",
        "partition:0",
        "link:1",
        "worker-fails:1",
        "worker-hangs:0",
        "engine-fails:0",
    ] {
        let program = ckpt!("plan", "--shape", "qwen:2048", "--cluster", "1x8-h800", "--json");
        let report = program.args(["--simulate-failure", what]).finish().await.expect_code(0).json();
        let failure = &report["failure"];
        assert_eq!(failure["committed"], 0, "{what}: {failure}");
        assert!(!failure["cause"].as_str().unwrap().is_empty(), "{what}: {failure}");
    }
}

#[tokio::test]
async fn a_join_is_planned_from_files() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("t.json");
    let program =
        ckpt!("plan", "--shape", "qwen:512", "--cluster", "2x8-h20", "--method", "join", "--ranks", "8-15");
    let report = program.args(["--json", "--trace"]).arg(&trace).finish().await.expect_code(0).json();
    assert_fits(&report, "plan");
    assert_eq!((&report["plan"]["owners"], &report["plan"]["members"]), (&8.into(), &8.into()));
    assert_eq!(report["plan"]["receivers"].as_array().unwrap().len(), 8);
    let trace: Value = serde_json::from_slice(&std::fs::read(trace).unwrap()).unwrap();
    assert!(trace["traceEvents"].as_array().unwrap().iter().any(|event| event["cat"] == "pull"));
    let file = folder.path().join("c.toml");
    std::fs::write(&file, "name = \"x\"\n[[nodes]]\ncount = 1\ngpus = 8\n").unwrap();
    let bad = ckpt!("plan", "--shape", "qwen:8", "--cluster").arg(&file).finish().await.expect_code(2);
    assert!(bad.error_line().contains("gpus"), "{}", bad.stderr);
    let missing = ckpt!("plan", "--cluster", "laptop").finish().await.expect_code(2);
    assert!(missing.error_line().contains("--shape"), "{}", missing.stderr);
}

#[tokio::test]
async fn doctor_explains_a_bare_machine() {
    let folder = tempfile::tempdir().unwrap();
    let program = ckpt!("doctor", "--json", "--endpoint", "http://127.0.0.1:1");
    let report =
        program.env("CKPT_RUNTIME_DIR", folder.path().join("run")).finish().await.expect_code(1).json();
    assert_fits(&report, "doctor");
    let findings = report["findings"].as_array().unwrap();
    for finding in findings {
        assert_eq!(finding["verdict"] == "ok", finding["fix"].is_null(), "{finding}");
    }
    let engine = findings.iter().find(|finding| finding["area"] == "engine").unwrap();
    assert_eq!(engine["verdict"], "error");
    let report = ckpt!("doctor", "--json").env("CKPT_RUNTIME_DIR", folder.path().join("run")).finish().await;
    assert_fits(&report.expect_code(0).json(), "doctor");
}

#[tokio::test]
async fn completions_and_manual_pages_are_made() {
    let folder = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let script = ckpt!("completions", shell).finish().await.expect_code(0).stdout;
        assert!(script.contains("simulate-failure"), "{shell}");
    }
    let written = ckpt!("man").arg(folder.path()).arg("--json").finish().await.expect_code(0).json();
    let pages: Vec<&str> =
        written["pages"].as_array().unwrap().iter().map(|page| page.as_str().unwrap()).collect();
    for page in ["ckpt.1", "ckpt-update.1", "ckpt-bench-transport.1", "ckpt-plan.1"] {
        assert!(pages.contains(&page), "{pages:?}");
        assert!(std::fs::read_to_string(folder.path().join(page)).unwrap().contains(".SH"));
    }
    assert!(!pages.iter().any(|page| page.contains("update-rank")), "hidden commands have no page");
}
