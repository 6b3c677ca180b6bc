//! Jobs of real processes in which something dies, stops or raises: every rank ends soon and names it.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::time::{Duration, Instant};

use integration_tests::{FakeEngine, Finished, Job, LONG, Script, names};
use rustix::process::Signal;

const PROGRAM: &str = env!("CARGO_BIN_EXE_ckpt-under-test");
/// What the project promises.
const SOON: Duration = Duration::from_secs(10);

/// All ended in time, none well, each with one line that names `culprit`.
#[track_caller]
fn assert_all_name(ended: &[(u32, Finished)], culprit: u32) {
    for (rank, finished) in ended {
        assert!(!finished.status.success(), "rank {rank}: {}", finished.stdout);
        let line = finished.error_line();
        assert!(names(line, culprit), "rank {rank} does not name {culprit}: {line}");
        let told = finished.json();
        assert!(line.contains(told["error"]["operation"].as_str().unwrap()), "rank {rank}: {told}");
    }
}

#[tokio::test]
async fn eight_ranks_name_the_worker_that_was_killed_and_the_next_update_succeeds() {
    const VICTIM: u32 = 5;
    let job = Job::new(PROGRAM, 8, 16);
    let mut workers = job.workers(&["--slow-ms", "250", "--fault-once"]).await;
    let ranks = job.update(&[]);
    job.in_the_middle(VICTIM).await;
    let killed = Instant::now();
    workers[VICTIM as usize].signal(Signal::KILL);
    let ended = ranks.finish(LONG).await;
    let took = killed.elapsed();
    println!("all 8 ranks had ended {took:?} after the kill");
    assert!(took < SOON, "{took:?}");
    assert_eq!(ended.len(), 8);
    assert_all_name(&ended, VICTIM);
    // Engines of the other ranks were made to raise, and know whose fault it was.
    for (rank, worker) in (0..).zip(&mut workers) {
        if rank != VICTIM {
            let line = worker.stderr_line("the update failed").await;
            assert!(names(&line, VICTIM), "worker {rank}: {line}");
        }
    }

    workers[VICTIM as usize] = job.worker(VICTIM, &[]).await;
    let ended = job.update(&[]).finish(LONG).await;
    for (_, finished) in ended {
        finished.expect_code(0);
    }
    for rank in 0..8 {
        job.assert_holds(rank).await;
    }
}

/// Another worker's death ends the update first: nobody waits for the answer of one that cannot give any.
#[tokio::test]
async fn a_stopped_worker_is_not_waited_for_when_another_one_dies() {
    let job = Job::new(PROGRAM, 2, 1);
    let mut workers = job.workers(&["--hold-at", "open", "--hold-ms", "60000", "--fault-once"]).await;
    let ranks = job.update(&[]);
    for worker in &mut workers {
        worker.stderr_line("held at open").await;
    }
    workers[1].signal(Signal::STOP);
    workers[0].kill().await;
    let ended = ranks.finish(LONG).await;
    assert_all_name(&ended, 0);
    let log = &ended[1].1.stderr;
    assert!(!log.contains("could not be told"), "{log}");
}

#[tokio::test]
async fn a_parameter_server_that_is_killed_is_named_by_the_others() {
    const VICTIM: u32 = 2;
    let job = Job::new(PROGRAM, 3, 8);
    let mut workers = job.workers(&["--slow-ms", "500", "--fault-once"]).await;
    let mut ranks = job.update(&[]);
    job.in_the_middle(VICTIM).await;
    let victim = ranks.take(VICTIM);
    let killed = Instant::now();
    victim.signal(Signal::KILL);
    let ended = ranks.finish(LONG).await;
    assert!(killed.elapsed() < SOON, "{:?}", killed.elapsed());
    assert_all_name(&ended, VICTIM);
    // Its worker saw the link break and serves the next update.
    workers[VICTIM as usize].stderr_line("the update failed").await;
    for (_, finished) in job.update(&[]).finish(LONG).await {
        finished.expect_code(0);
    }
    job.assert_holds(VICTIM).await;
}

#[tokio::test]
async fn without_rank_0_the_others_end_too() {
    let job = Job::new(PROGRAM, 3, 8);
    let _workers = job.workers(&["--slow-ms", "500"]).await;
    let mut ranks = job.update(&[]);
    job.in_the_middle(1).await;
    let killed = Instant::now();
    ranks.take(0).signal(Signal::KILL);
    let ended = ranks.finish(LONG).await;
    assert!(killed.elapsed() < SOON, "{:?}", killed.elapsed());
    for (rank, finished) in &ended {
        assert!(!finished.status.success(), "rank {rank}: {}", finished.stdout);
        let line = finished.error_line();
        assert!(line.contains("rank 0") || names(line, 0), "rank {rank}: {line}");
    }
}

#[tokio::test]
async fn a_stopped_parameter_server_is_given_up_and_fences_itself_when_it_wakes() {
    const VICTIM: u32 = 1;
    let job = Job::new(PROGRAM, 3, 16);
    let mut workers = job.workers(&["--slow-ms", "900"]).await;
    let mut ranks = job.update(&[]);
    job.in_the_middle(VICTIM).await;
    let victim = ranks.take(VICTIM);
    let stopped = Instant::now();
    victim.signal(Signal::STOP);
    let ended = ranks.finish(LONG).await;
    assert!(stopped.elapsed() < SOON, "{:?}", stopped.elapsed());
    assert_all_name(&ended, VICTIM);

    victim.signal(Signal::CONT);
    let woken = victim.finish(SOON).await;
    assert!(!woken.status.success(), "{}", woken.stdout);
    assert!(woken.error_line().len() > "error: ".len());
    // It handed out nothing more: its engine was told of the failure, and has no complete update.
    workers[VICTIM as usize].stderr_line("the update failed").await;
    let state = integration_tests::http_get(&job.engine(VICTIM), "/v1/state").await.json();
    assert_eq!((state[0]["updates"].as_u64(), state[0]["mixed"].as_bool()), (Some(0), Some(true)), "{state}");
}

#[tokio::test]
async fn what_a_worker_raises_reaches_every_rank() {
    const VICTIM: u32 = 1;
    let job = Job::new(PROGRAM, 3, 8);
    let mut workers = Vec::new();
    for rank in 0..3 {
        let faults: &[&str] =
            if rank == VICTIM { &["--fail-at-bucket", "3", "--fault-once"] } else { &["--slow-ms", "200"] };
        workers.push(job.worker(rank, faults).await);
    }
    let ended = job.update(&[]).finish(LONG).await;
    assert_all_name(&ended, VICTIM);
    for (rank, finished) in ended {
        let line = finished.expect_code(1).error_line().to_owned();
        assert!(line.contains("bucket 3 fails because --fail-at-bucket asked for it"), "{rank}: {line}");
    }
    for (rank, worker) in (0..).zip(&mut workers) {
        let line = worker.stderr_line("the update failed").await;
        assert!(line.contains("bucket 3 fails because"), "worker {rank}: {line}");
    }
    for (_, finished) in job.update(&[]).finish(LONG).await {
        finished.expect_code(0);
    }
    job.assert_holds(VICTIM).await;
}

#[tokio::test]
async fn an_engine_that_refuses_ends_the_update_at_once() {
    let job = Job::new(PROGRAM, 2, 4);
    for (script, expected) in [
        // What vLLM without its development mode answers.
        (Script::Answer(404, r#"{"detail":"Not Found"}"#), &["404", "VLLM_SERVER_DEV_MODE=1"][..]),
        (Script::Answer(500, "worker 1 ran out of memory"), &["500", "worker 1 ran out of memory"]),
        (Script::Answer(200, "{}"), &["before its worker had all weights"]),
        (Script::HangUp, &["http://127.0.0.1"]),
    ] {
        let engine = FakeEngine::start(script.clone()).await;
        let options = ["--endpoint", &engine.endpoint(), "--inference-parallel-size", "2"];
        let started = Instant::now();
        let ended = job.update(&options).finish(LONG).await;
        // Workers never came, and nobody waited for them: that limit is 300 s.
        assert!(started.elapsed() < Duration::from_secs(30), "{script:?}: {:?}", started.elapsed());
        assert_all_name(&ended, 0);
        for (rank, finished) in ended {
            for word in expected {
                assert!(finished.error_line().contains(word), "{script:?}, rank {rank}: {}", finished.stderr);
            }
        }
    }
}
