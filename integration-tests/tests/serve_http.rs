//! `ckpt serve` driven by nothing but HTTP over UNIX sockets: the API of checkpoint-engine's own parameter server.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

mod serve_support;

use std::time::Duration;

use integration_tests::{LONG, ckpt, http_get};
use rustix::process::Signal;
use serde_json::{Value, json};
use serve_support::{Cluster, TOKEN, raw, request};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_ranks_register_gather_update_and_unregister() {
    let cluster = Cluster::start(4, &[], &[]).await;
    let of = |rest: &str| format!("/v1/checkpoints/step-1{rest}");

    for reply in cluster.all("GET", "/v1/healthz", |_| None).await {
        assert_eq!(reply.status, 200);
    }
    // Before anything was gathered: no metas, and no update.
    assert_eq!(request(&cluster.server(0), "GET", "/v1/metas", None).await.json(), json!({}));
    let early = request(&cluster.server(0), "POST", &of("/update"), Some(json!({}))).await;
    assert_eq!(early.status, 500);
    assert!(early.json().as_str().unwrap().contains("gather-metas"), "{}", early.body);

    cluster.expect_empty_200(&cluster.register("step-1").await);
    // The same name twice is an error, also while nothing changed.
    for reply in cluster.register("step-1").await {
        assert_eq!(reply.status, 500);
        assert!(reply.json().as_str().unwrap().contains("registered already"), "{}", reply.body);
    }
    cluster.expect_empty_200(&cluster.all("POST", &of("/gather-metas"), |_| None).await);

    // Every rank tells the same metas, in checkpoint-engine's form.
    let metas = cluster.all("GET", "/v1/metas", |_| None).await;
    assert!(metas.iter().all(|reply| reply.status == 200 && reply.body == metas[0].body));
    let metas = metas[0].json();
    let ranks: Vec<&String> = metas.as_object().unwrap().keys().collect();
    assert_eq!(ranks, ["0", "1", "2", "3"]);
    let buffer = &metas["0"]["memory_buffer_metas_list"][0];
    assert!(buffer["ptr"].as_u64().unwrap() > 0 && buffer["size"].as_u64().unwrap() > 0);
    assert!(buffer["metas"][0]["dtype"].as_str().unwrap().starts_with("torch."));

    for round in 1..=2 {
        let updated = cluster.all("POST", &of("/update"), |rank| Some(cluster.update_body(rank))).await;
        cluster.expect_empty_200(&updated);
        cluster.assert_engines_hold_the_files().await;
        let status = cluster.status(0).await;
        assert_eq!((&status["updates"], &status["doing"]["state"]), (&json!(round), &json!("idle")));
        assert_eq!(status["installed"], json!({ "checkpoint": "step-1", "version": 1 }));
        assert_eq!(status["hub"]["ranks"].as_array().unwrap().len(), 4);
    }
    assert_eq!(cluster.status(3).await["hub"], Value::Null);

    let pool = cluster.status(0).await["pool"].clone();
    assert_eq!(pool["user"], json!("step-1"));
    cluster.expect_empty_200(&cluster.all("DELETE", &of(""), |_| None).await);
    // The next checkpoint of the same shapes takes over the memory: nothing is allocated or pinned again.
    cluster.expect_empty_200(&cluster.register("step-2").await);
    let mut taken_over = cluster.status(0).await["pool"].clone();
    assert_eq!(taken_over["user"].take(), json!("step-2"));
    assert_eq!(
        taken_over,
        json!({ "user": null, "maps": 0, "held_bytes": pool["held_bytes"],
        "allocations": pool["allocations"], "pins": pool["pins"] })
    );
    let removed = cluster.all("DELETE", "/v1/checkpoints/step-2", |_| None).await;
    cluster.expect_empty_200(&removed);
    // An unknown name is no error.
    cluster.expect_empty_200(&cluster.all("DELETE", &of(""), |_| None).await);
    // A rank without the checkpoint gathers an empty list and is absent from the metas.
    let files = json!({ "files": cluster.files });
    let registered = request(&cluster.server(2), "POST", &of("/files"), Some(files)).await;
    assert_eq!(registered.status, 200, "{}", registered.body);
    cluster.expect_empty_200(&cluster.all("POST", &of("/gather-metas"), |_| None).await);
    let metas = request(&cluster.server(1), "GET", "/v1/metas", None).await.json();
    assert_eq!(metas.as_object().unwrap().keys().collect::<Vec<_>>(), ["2"]);
    let updated = cluster.all("POST", &of("/update"), |rank| Some(cluster.update_body(rank))).await;
    cluster.expect_empty_200(&updated);
    assert_eq!(cluster.status(1).await["installed"]["version"], json!(2));
    cluster.assert_engines_hold_the_files().await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn some_ranks_pull_and_another_job_joins_with_the_metas_of_this_one() {
    let sender = Cluster::start(4, &[], &[]).await;
    let cluster = &sender;
    cluster.expect_empty_200(&cluster.register("a").await);
    cluster.expect_empty_200(&cluster.all("POST", "/v1/checkpoints/a/gather-metas", |_| None).await);
    // Posted to every rank; those that are not named go on undisturbed.
    let some = async |ranks: &[u32]| {
        let body = |rank| {
            let mut body = cluster.update_body(rank);
            body["ranks"] = json!(ranks);
            body["inference_group_ranks"] = if ranks.contains(&rank) { json!([rank]) } else { json!([]) };
            Some(body)
        };
        cluster.all("POST", "/v1/checkpoints/a/update", body).await
    };
    cluster.expect_empty_200(&some(&[2, 3]).await);
    assert_eq!(cluster.engine_updates().await, [0, 0, 1, 1]);
    cluster.expect_empty_200(&some(&[0, 1]).await);
    cluster.assert_engines_hold_the_files().await;
    assert_eq!(cluster.engine_updates().await, [1, 1, 1, 1]);

    // The same files were generated there, and nothing was registered.
    let joining = Cluster::start(2, &[], &[]).await;
    let metas = request(&cluster.server(3), "GET", "/v1/metas", None).await.json();
    joining.expect_empty_200(&joining.all("POST", "/v1/metas", |_| Some(metas.clone())).await);
    assert_eq!(request(&joining.server(1), "GET", "/v1/metas", None).await.json(), metas);
    let updated =
        joining.all("POST", "/v1/checkpoints/a/update", |rank| Some(joining.update_body(rank))).await;
    joining.expect_empty_200(&updated);
    joining.assert_engines_hold_the_files().await;
    assert_eq!(cluster.engine_updates().await, [1, 1, 1, 1]);
    joining.end().await;
    sender.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_fit_is_422_and_health_answers_during_an_update() {
    // Slow engines, and many buckets.
    let cluster =
        Cluster::start(2, &["--slow-ms", "150"], &["--bucket-mib", "1", "--join-timeout", "10"]).await;
    let server = cluster.server(0);
    for (path, body) in [
        ("/v1/checkpoints/a/files", "{}"),
        ("/v1/checkpoints/a/files", ""),
        ("/v1/checkpoints/a/files", "{\"files\": \"x\"}"),
        ("/v1/checkpoints/a/update", "{\"ranks\": [7]}"),
        ("/v1/checkpoints/a/update", "{\"timeout\": \"soon\"}"),
        ("/v1/metas", "{\"0\": 1}"),
    ] {
        let reply = raw(&server, "POST", path, "application/json", body).await;
        assert_eq!(reply.status, 422, "{path} {body}: {}", reply.body);
        assert!(reply.json().is_string());
    }
    assert_eq!(raw(&server, "POST", "/v1/checkpoints/a/update", "text/plain", "{}").await.status, 422);
    let missing = json!({ "files": ["/no/such/file.safetensors"] });
    let missing = request(&server, "POST", "/v1/checkpoints/a/files", Some(missing)).await;
    assert_eq!(missing.status, 500);
    assert!(missing.body.contains("/no/such/file.safetensors"), "{}", missing.body);
    assert_eq!(request(&server, "GET", "/v1/nothing", None).await.status, 404);
    assert_eq!(request(&server, "GET", "/v1/checkpoints/a/update", None).await.status, 405);

    cluster.expect_empty_200(&cluster.register("a").await);
    cluster.expect_empty_200(&cluster.all("POST", "/v1/checkpoints/a/gather-metas", |_| None).await);
    let update = cluster.all("POST", "/v1/checkpoints/a/update", |rank| Some(cluster.update_body(rank)));
    let beside = async {
        // An event, not a time: the update has begun when the status says so.
        let begun = async {
            while cluster.status(0).await["doing"]["state"] != json!("updating") {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LONG, begun).await.unwrap();
        let second = request(&server, "POST", "/v1/checkpoints/a/update", Some(cluster.update_body(0))).await;
        assert_eq!(second.status, 409, "{}", second.body);
        assert_eq!(request(&server, "GET", "/v1/healthz", None).await.status, 200);
        assert!(request(&server, "GET", "/v1/metas", None).await.json()["0"].is_object());
        assert_eq!(cluster.status(0).await["doing"]["state"], json!("updating"));
    };
    let (updated, ()) = tokio::join!(update, beside);
    cluster.expect_empty_200(&updated);
    cluster.assert_engines_hold_the_files().await;

    // A rank that nobody asked is named.
    let body = json!({ "timeout": 3.0 });
    let alone = request(&server, "POST", "/v1/checkpoints/a/update", Some(body)).await;
    assert_eq!(alone.status, 500);
    assert!(alone.json().as_str().unwrap().contains("rank"), "{}", alone.body);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_in_the_middle_of_an_update_ends_it_with_an_answer() {
    // Six buckets of 20 s each: it never ends by itself.
    let options = ["--bucket-mib", "1", "--grace", "1", "--bucket-timeout", "60"];
    let cluster = Cluster::start(2, &["--slow-ms", "20000"], &options).await;
    cluster.expect_empty_200(&cluster.register("a").await);
    cluster.expect_empty_200(&cluster.all("POST", "/v1/checkpoints/a/gather-metas", |_| None).await);
    let update = cluster.all("POST", "/v1/checkpoints/a/update", |rank| Some(cluster.update_body(rank)));
    let signal = async {
        let begun = async {
            for rank in 0..2 {
                while cluster.status(rank).await["doing"]["state"] != json!("updating") {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        };
        tokio::time::timeout(LONG, begun).await.unwrap();
        cluster.servers.as_ref().unwrap().signal(Signal::TERM);
    };
    let (replies, ()) = tokio::join!(update, signal);
    for reply in replies {
        assert_eq!(reply.status, 500, "{}", reply.body);
    }
    let ended = Cluster { ending: true, ..cluster };
    ended.end().await;
}

#[tokio::test]
async fn a_listener_that_others_reach_needs_a_token() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let refused = ckpt!("serve", "--device", "host", "--listen", "0.0.0.0:0").env("CKPT_RUNTIME_DIR", &run);
    let refused = refused.finish().await.expect_code(2);
    assert!(refused.error_line().contains("CKPT_TOKEN"), "{}", refused.stderr);

    let program = ckpt!("serve", "--device", "host", "--listen", "0.0.0.0:0", "--allow-path", folder.path());
    let port_file = folder.path().join("port-{rank}");
    let program = program.arg("--port-file").arg(&port_file).env("CKPT_RUNTIME_DIR", &run);
    let mut server = program.env("CKPT_TOKEN", TOKEN).spawn();
    server.stdout_line("rank 0 listens").await;
    let address = std::fs::read_to_string(folder.path().join("port-0")).unwrap();
    let address = address.trim().replace("0.0.0.0", "127.0.0.1");
    assert_eq!(http_get(&address, "/v1/healthz").await.status, 200);
    assert_eq!(http_get(&address, "/v1/status").await.status, 401);
    let head = "/v1/status HTTP/1.1\r\nauthorization: Bearer ";
    let reply = http_get(&address, &format!("{head}wrong\r\nx:")).await;
    assert_eq!(reply.status, 401);
    let reply = http_get(&address, &format!("{head}{TOKEN}\r\nx:")).await;
    assert_eq!((reply.status, &reply.json()["rank"]), (200, &json!(0)));
    server.signal(Signal::TERM);
    server.finish(LONG).await.expect_code(0);
}
