//! `--trace` and `--trace-dir`: what real updates leave for whoever wants to see where the time went.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

mod serve_support;

use std::path::Path;

use integration_tests::{Finished, Job, LONG, Program};
use rustix::process::Signal;
use serde_json::{Value, json};

use self::serve_support::{Cluster, TOKEN};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ckpt-under-test");

/// The events of one file.
struct Trace(Vec<Value>);

impl Trace {
    #[track_caller]
    fn read(file: &Path) -> Self {
        let bytes = std::fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let trace: Value = serde_json::from_slice(&bytes).unwrap();
        Self(trace["traceEvents"].as_array().unwrap().clone())
    }

    /// Start and end of one stage of one bucket, in microseconds; those that were cut short have no end.
    fn stage(&self, stage: &str, bucket: u64) -> Option<(u64, Option<u64>)> {
        let name = format!("{stage} {bucket}");
        let event = self.0.iter().find(|event| event["name"] == name.as_str())?;
        assert_eq!((&event["ph"], &event["cat"]), (&"X".into(), &stage.into()), "{event}");
        let (start, length) = (event["ts"].as_u64().unwrap(), event["dur"].as_u64().unwrap());
        Some((start, (event["args"]["cut_short"] != true).then_some(start + length)))
    }

    #[track_caller]
    fn whole(&self, stage: &str, bucket: u64) -> (u64, u64) {
        match self.stage(stage, bucket) {
            Some((start, Some(end))) => (start, end),
            other => panic!("{stage} {bucket}: {other:?} of {:?}", self.0),
        }
    }

    fn failures(&self) -> Vec<&Value> {
        self.0.iter().filter(|event| event["cat"] == "failure").collect()
    }

    fn attempts(&self) -> Vec<&Value> {
        self.0.iter().filter(|event| event["cat"] == "update").collect()
    }
}

/// Every bucket went through its stages in order, on all ranks, by clocks that agree.
fn assert_in_order(traces: &[Trace], buckets: u64, source: &str) {
    for bucket in 0..buckets {
        let sources: Vec<(u64, u64)> = traces
            .iter()
            .filter_map(|trace| trace.stage(source, bucket))
            .map(|(start, end)| (start, end.unwrap()))
            .collect();
        let first = sources.iter().map(|at| at.0).min().unwrap();
        for trace in traces {
            let (exchange, reload) = (trace.whole("exchange", bucket), trace.whole("reload", bucket));
            if let Some((start, end)) = trace.stage(source, bucket) {
                assert!(start <= exchange.0 && end.unwrap() <= exchange.1, "{source} {bucket}");
            }
            assert!(first <= exchange.1, "bucket {bucket} arrived before it was sent");
            assert!(
                exchange.1 <= reload.0 && reload.0 <= reload.1,
                "bucket {bucket}: {exchange:?} {reload:?}"
            );
            if bucket > 0 {
                assert!(
                    trace.whole("reload", bucket - 1).1 <= reload.0,
                    "a bucket was published before the last ack"
                );
            }
        }
    }
    for trace in traces {
        assert!(trace.failures().is_empty());
        assert_eq!(trace.0.iter().filter(|event| event["cat"] == "reload").count() as u64, buckets);
        for stage in ["join", "prepare", "go", "open", "commit", "release", "post_hook"] {
            assert!(trace.0.iter().any(|event| event["name"] == stage), "no {stage}");
        }
    }
}

#[tokio::test]
async fn every_rank_writes_every_stage_of_every_bucket_in_order() {
    let job = Job::new(PROGRAM, 2, 8);
    let _workers = job.workers(&[]).await;
    for (method, source) in [("broadcast", "load"), ("p2p", "pull")] {
        let file = job.path("t.json");
        let ended =
            job.update(&["--update-method", method, "--trace", file.to_str().unwrap()]).finish(LONG).await;
        let mut buckets = 0;
        for (rank, finished) in ended {
            let finished = finished.expect_code(0);
            if rank == 0 {
                buckets = finished.json()["buckets"].as_u64().unwrap();
            }
        }
        assert!(buckets > 4, "{buckets}");
        let traces = [0, 1].map(|rank| Trace::read(&job.path(&format!("t-{rank}.json"))));
        // In a P2P update each rank loads what it has and pulls the rest, or one pulls for both.
        let pulled = traces.iter().any(|trace| trace.0.iter().any(|event| event["cat"] == "pull"));
        assert_eq!(pulled, source == "pull");
        if source == "load" {
            assert_in_order(&traces, buckets, source);
        }
        for (rank, trace) in traces.iter().enumerate() {
            assert!(trace.0.iter().all(|event| event["pid"] == rank), "a file is of one rank");
            assert_eq!(trace.attempts().len(), 1);
        }
    }
}

#[tokio::test]
async fn a_join_writes_its_pulls() {
    let job = Job::new(PROGRAM, 1, 4).with_env("CKPT_TOKEN", TOKEN);
    let _worker = job.worker(0, &[]).await;
    let metas = job.path("metas.json");
    let sender = ["--save-metas-file", metas.to_str().unwrap(), "--sleep-time", "60", "--trace", "/dev/null"];
    let mut ranks = job.update(&sender);
    // The file is there only when all of it is.
    let until = std::time::Instant::now() + LONG;
    while !metas.exists() {
        assert!(ranks.get(0).is_alive() && std::time::Instant::now() < until);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    job.until_free(0).await;
    let file = job.path("join.json");
    let mut joining = job.absent();
    let options = ["join", "--metas", metas.to_str().unwrap(), "--trace", file.to_str().unwrap()];
    job.start(&mut joining, 0, &options);
    for (_, finished) in joining.finish(LONG).await {
        let buckets = finished.expect_code(0).json()["buckets"].as_u64().unwrap();
        let trace = Trace::read(&file);
        for bucket in 0..buckets {
            assert!(trace.whole("pull", bucket).1 <= trace.whole("reload", bucket).0);
        }
    }
}

#[track_caller]
fn assert_failed_at(finished: Finished, trace: &Trace, rank: u32, victim: u32) {
    let told = finished.json();
    let [failure] = trace.failures()[..] else { panic!("{:?}", trace.failures()) };
    assert_eq!(failure["args"]["kind"], told["error"]["kind"]);
    assert_eq!(failure["args"]["context"]["rank"], victim.to_string(), "{failure}");
    let [attempt] = trace.attempts()[..] else { panic!("{:?}", trace.attempts()) };
    let (began, took) = (attempt["ts"].as_u64().unwrap(), attempt["dur"].as_u64().unwrap());
    let at = failure["ts"].as_u64().unwrap();
    assert!((began..=began + took).contains(&at), "{failure} {attempt}");
    assert_eq!(attempt["args"]["failed"], true);
    if rank == victim {
        assert!(trace.whole("reload", 2).1 <= at);
        assert_eq!(trace.stage("reload", 3).unwrap().1, None, "it was in the middle of it");
        assert_eq!(trace.stage("reload", 4), None);
    }
}

#[tokio::test]
async fn a_failed_update_leaves_its_error_and_what_it_cut_short() {
    const VICTIM: u32 = 1;
    let job = Job::new(PROGRAM, 2, 8);
    let _workers =
        [job.worker(0, &[]).await, job.worker(VICTIM, &["--fail-at-bucket", "3", "--fault-once"]).await];
    let file = job.path("t.json");
    for (rank, finished) in job.update(&["--trace", file.to_str().unwrap()]).finish(LONG).await {
        let trace = Trace::read(&job.path(&format!("t-{rank}.json")));
        let finished = finished.expect_code(1);
        assert!(trace.failures()[0]["args"]["message"].as_str().unwrap().contains("bucket 3 fails because"));
        assert_failed_at(finished, &trace, rank, VICTIM);
    }
}

/// A launcher signals the ranks that are left as soon as one has ended: they write first.
#[tokio::test]
async fn under_a_launcher_all_ranks_leave_the_trace_of_a_failure() {
    let job = Job::new(PROGRAM, 3, 8);
    let _workers =
        [job.worker(0, &[]).await, job.worker(1, &["--fail-at-bucket", "3"]).await, job.worker(2, &[]).await];
    let program = Program::new(PROGRAM).args(["launch", "--nproc-per-node", "3", "--", PROGRAM, "update"]);
    let program = program.args(["--device", "host", "--worker-protocol", "native", "--bucket-mib", "1"]);
    let program = program.args(["--inference-parallel-size", "1", "--checkpoint-path"]).arg(job.checkpoint());
    let program = program.arg("--uds").arg(job.path("worker-{rank}.sock"));
    let program = program.arg("--trace").arg(job.path("of-{rank}.json"));
    program.env("CKPT_RUNTIME_DIR", job.runtime_dir()).finish().await.expect_code(1);
    for rank in 0..3 {
        let trace = Trace::read(&job.path(&format!("of-{rank}.json")));
        assert_eq!(trace.failures().len(), 1, "rank {rank}");
        assert_eq!(trace.failures()[0]["args"]["context"]["rank"], "1", "rank {rank}");
    }
}

/// What hangs is ended by hand, and that is when somebody wants to see where it hung.
#[tokio::test]
async fn an_update_that_is_interrupted_leaves_its_trace() {
    for (signal, name) in [(Signal::INT, "ended by SIGINT"), (Signal::TERM, "ended by SIGTERM")] {
        let job = Job::new(PROGRAM, 1, 8);
        let _worker = job.worker(0, &["--slow-ms", "4000"]).await;
        let file = job.path("t.json");
        let mut ranks = job.update(&["--trace", file.to_str().unwrap()]);
        job.in_the_middle(0).await;
        ranks.get(0).signal(signal);
        for (_, finished) in ranks.finish(LONG).await {
            let finished = finished.expect_code(4);
            assert!(finished.error_line().contains(name), "{}", finished.stderr);
        }
        let trace = Trace::read(&file);
        assert_eq!(trace.failures().len(), 1);
        assert!(trace.stage("reload", 0).unwrap().1.is_some());
        assert_eq!(trace.stage("reload", 1).unwrap().1, None, "{:?}", trace.0);
    }
}

#[tokio::test]
async fn a_path_that_cannot_be_written_is_refused_before_anything_happens() {
    let job = Job::new(PROGRAM, 1, 2);
    let _worker = job.worker(0, &[]).await;
    for path in ["/no/such/folder/t.json", "/proc/t.json", "."] {
        for (_, finished) in job.update(&["--trace", path]).finish(LONG).await {
            let finished = finished.expect_code(2);
            assert!(
                finished.error_line().contains("choose another path for the trace"),
                "{}",
                finished.stderr
            );
            assert_eq!(finished.json()["error"]["context"]["path"], path);
        }
    }
    let state = integration_tests::http_get(&job.engine(0), "/v1/state").await.json();
    assert_eq!(state[0]["updates"], 0, "{state}");
}

#[tokio::test]
async fn a_full_disk_is_one_warning_and_the_update_is_done() {
    let job = Job::new(PROGRAM, 1, 2);
    let _worker = job.worker(0, &[]).await;
    for (_, finished) in job.update(&["--trace", "/dev/full"]).finish(LONG).await {
        let finished = finished.expect_code(0);
        let warnings: Vec<&str> = finished.stderr.lines().filter(|line| line.contains("WARN")).collect();
        let about: Vec<_> =
            warnings.iter().filter(|line| line.contains("the trace was not written")).collect();
        assert_eq!(about.len(), 1, "{}", finished.stderr);
        assert!(about[0].contains("/dev/full"), "{about:?}");
    }
    job.assert_holds(0).await;
}

#[tokio::test]
async fn a_failure_before_any_update_is_in_the_trace() {
    let job = Job::new(PROGRAM, 1, 2);
    std::fs::remove_dir_all(job.checkpoint()).unwrap();
    let file = job.path("t.json");
    for (_, finished) in job.update(&["--trace", file.to_str().unwrap()]).finish(LONG).await {
        assert!(!finished.status.success());
        let trace = Trace::read(&file);
        assert!(trace.attempts().is_empty());
        assert_eq!(trace.failures()[0]["args"]["kind"], finished.json()["error"]["kind"]);
    }
}

#[tokio::test]
async fn a_server_writes_a_file_for_each_update() {
    let traces = tempfile::tempdir().unwrap();
    let folder = traces.path().to_str().unwrap();
    let options = ["--trace-dir", folder, "--bucket-mib", "1"];
    let cluster = Cluster::start(2, &["--fail-at-bucket", "2", "--fault-once"], &options).await;
    cluster.expect_empty_200(&cluster.register("model").await);
    let gathered = cluster.all("POST", "/v1/checkpoints/model/gather-metas", |_| Some(json!({}))).await;
    cluster.expect_empty_200(&gathered);
    for (number, well) in [(1, false), (2, true)] {
        let replies =
            cluster.all("POST", "/v1/checkpoints/model/update", |rank| Some(cluster.update_body(rank))).await;
        assert!(replies.iter().all(|reply| (reply.status == 200) == well), "{replies:?}");
        let mut files: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        // Answered means written.
        assert_eq!(files.len(), 2 * number, "{files:?}");
        for rank in 0..2 {
            let end = format!("-rank-{rank}.json");
            let last = files.iter().rfind(|file| file.to_str().unwrap().ends_with(&end)).unwrap();
            let trace = Trace::read(last);
            assert_eq!((trace.attempts().len(), trace.failures().is_empty()), (1, well), "{last:?}");
            // One engine may fail before the other has its second bucket.
            assert!(!well || trace.stage("reload", 1).is_some_and(|(_, end)| end.is_some()));
        }
    }
}

#[tokio::test]
async fn a_server_refuses_a_folder_that_it_cannot_write() {
    let program =
        Program::new(PROGRAM).args(["serve", "--uds", "s", "--trace-dir", "/no/such/folder", "--json"]);
    let finished = program.env("CKPT_TOKEN", TOKEN).finish().await.expect_code(2);
    assert!(finished.error_line().contains("choose another --trace-dir"), "{}", finished.stderr);
}
