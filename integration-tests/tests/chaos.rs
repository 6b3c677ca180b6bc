//! Whole jobs of processes with faults by seed: on the control connections, on an engine's HTTP, between the ranks, and
//! in the processes themselves. Every rank ends, no wrong byte is taken, no part of the ranks commits, and the next
//! update succeeds.
//!
//! `CKPT_CHAOS_SEEDS=300` says how many, `CKPT_CHAOS_FROM` where to start.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::{sync::Arc, time::Duration};

use ckpt_core::testkit::{Random, Relay, RelayConfig};
use integration_tests::{Finished, Job, LONG, Process, http_get};
use rustix::process::Signal;
use tokio::{sync::Semaphore, task::JoinSet};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ckpt-under-test");
const RANKS: u32 = 3;
const OPTIONS: &[&str] =
    &["--join-timeout", "6", "--ready-timeout", "8", "--bucket-timeout", "4", "--timeout", "15"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Control,
    EngineHttp,
    BetweenRanks,
    Process,
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// One job; what struck, and how it ended.
async fn run(seed: u64) -> String {
    let mut random = Random::new(seed);
    let places = [Place::Control, Place::EngineHttp, Place::BetweenRanks, Place::Process];
    let place = places[(seed % 4) as usize];
    let victim = random.below(u64::from(RANKS)) as u32;
    let job = Job::new(PROGRAM, RANKS, 3);
    let token = job.path("token");
    ckpt_core::control::Token::random().unwrap().write_to(&token).unwrap();
    let chaos = seed.to_string();
    let mut options = [OPTIONS, &["--token-file", token.to_str().unwrap()]].concat();
    if place == Place::BetweenRanks {
        options.extend(["--chaos", &chaos]);
    }

    let mut workers = Vec::new();
    let mut relays = Vec::new();
    for rank in 0..RANKS {
        let socket = if place == Place::EngineHttp {
            job.path(&format!("behind-{rank}.sock"))
        } else {
            job.socket(rank)
        };
        workers.push(job.worker_at(rank, &socket, &["--slow-ms", "30"]).await);
        if place == Place::EngineHttp {
            let config = RelayConfig { seed: seed * 8 + u64::from(rank), one_in: 4, corrupts: true };
            relays.push(Relay::unix(&job.socket(rank), socket, config).unwrap());
        }
    }
    let mut ranks = job.absent();
    for rank in 0..RANKS {
        let mut hub = ranks.hub();
        if place == Place::Control && rank > 0 {
            let config = RelayConfig { seed: seed * 8 + u64::from(rank), one_in: 3, corrupts: false };
            let (relay, address) = Relay::tcp(hub, config).await.unwrap();
            relays.push(relay);
            hub = address;
        }
        job.start_through(&mut ranks, rank, &options, hub);
    }
    let mut struck = None;
    if place == Place::Process {
        tokio::time::sleep(Duration::from_millis(random.below(1500))).await;
        let signal = if random.one_in(2) { Signal::KILL } else { Signal::STOP };
        if random.one_in(2) {
            match signal {
                Signal::KILL => workers[victim as usize].kill().await,
                _ => workers[victim as usize].signal(signal),
            }
        } else {
            let process = ranks.take(victim);
            process.signal(signal);
            struck = Some(process);
        }
    }
    let ended = ranks.finish(LONG).await;
    let faults: Vec<_> = relays.iter().flat_map(Relay::struck).collect();
    // A worker that was stopped hears what it missed.
    workers[victim as usize].signal_if_alive(Signal::CONT);
    drop((struck, relays));

    let well = ended.iter().filter(|(_, finished)| finished.status.success()).count();
    check(&job, &mut workers, &ended, &faults_text(place, &faults)).await;
    for rank in 0..RANKS {
        let _ = std::fs::remove_file(job.socket(rank));
    }
    workers.clear();
    let _workers = job.workers(&[]).await;
    for (rank, finished) in job.update(&[]).finish(LONG).await {
        assert!(
            finished.status.success(),
            "seed {seed}: the next update failed on rank {rank}: {}",
            finished.stderr
        );
    }
    for rank in 0..RANKS {
        job.assert_holds(rank).await;
    }
    format!("seed {seed}: {}, {well} of {} ranks ended well", faults_text(place, &faults), ended.len())
}

fn faults_text(place: Place, faults: &[impl std::fmt::Debug]) -> String {
    format!("{place:?} {faults:?}")
}

/// No rank says done unless all workers have everything, or had it before they died, and a worker that says so has the right bytes.
async fn check(job: &Job, workers: &mut [Process], ended: &[(u32, Finished)], faults: &str) {
    let done = ended.iter().any(|(_, finished)| finished.status.success());
    for (rank, finished) in ended {
        assert!(finished.status.code().is_some(), "{faults}: rank {rank} was killed: {}", finished.stderr);
        assert_ne!(finished.status.code(), Some(70), "{faults}: a bug on rank {rank}: {}", finished.stderr);
        if !finished.status.success() {
            assert!(finished.error_line().len() > "error: ".len());
        }
    }
    for (rank, worker) in (0..).zip(workers) {
        let state = if worker.is_alive() {
            let socket = job.path(&format!("behind-{rank}.sock"));
            let socket = if socket.exists() { socket } else { job.socket(rank) };
            http_get(&format!("unix:{}", socket.display()), "/v1/state").await.json()
        } else {
            // On a quick machine it may have been killed when all was done.
            assert!(
                !done || worker.stderr_text().contains("new weights are in use"),
                "{faults}: a rank says done and worker {rank} died before it had a whole update"
            );
            continue;
        };
        let complete = state[0]["updates"] == 1;
        assert!(
            complete || !done,
            "{faults}: a rank says done and worker {rank} has no whole update: {state}"
        );
        if complete {
            assert_eq!(state[0]["digest"], digest_of(job), "{faults}: wrong bytes on worker {rank}");
        }
    }
}

/// What an engine that holds the job's checkpoint says of all its bytes.
fn digest_of(job: &Job) -> String {
    let mut lines = String::new();
    for (name, tensor) in integration_tests::digests(job.source()) {
        let shape: Vec<u64> =
            tensor["shape"].as_array().unwrap().iter().map(|d| d.as_u64().unwrap()).collect();
        let (dtype, digest) = (tensor["dtype"].as_str().unwrap(), tensor["digest"].as_str().unwrap());
        lines += &format!("{name} {dtype} {shape:?} {digest}\n");
    }
    format!("{:016x}", ckpt_core::checkpoint::DigestAlgorithm::Xxh3_64.digest(lines.as_bytes()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_survive_every_seed() {
    let (from, count) = (number("CKPT_CHAOS_FROM", 0), number("CKPT_CHAOS_SEEDS", 12));
    let places = Arc::new(Semaphore::new(4));
    let mut running = JoinSet::new();
    for seed in from..from + count {
        let places = places.clone();
        running.spawn(async move {
            let _place = places.acquire().await.unwrap();
            let ended = tokio::time::timeout(4 * LONG, tokio::spawn(run(seed))).await;
            match ended {
                Ok(Ok(line)) => Ok(line),
                Ok(Err(panic)) => Err(format!("seed {seed}: {panic}")),
                Err(_) => Err(format!("seed {seed} hangs")),
            }
        });
    }
    let mut bad = Vec::new();
    for ended in running.join_all().await {
        match ended {
            Ok(line) => println!("{line}"),
            Err(line) => bad.push(line),
        }
    }
    println!("{} of {count} seeds kept every promise", count - bad.len() as u64);
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}
