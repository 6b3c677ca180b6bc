//! Many updates by the same processes: they end with the descriptors, threads, shared memory and memory that they had.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::{fs, path::Path, time::Duration};

use integration_tests::{Job, LONG, http_get};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ckpt-under-test");
const RANKS: u32 = 2;
/// Updates before the first look: pools, caches and allocators have their size by then.
const WARM: u64 = 20;
/// What an allocator may keep more than it had, in KiB.
const SLACK_KIB: u64 = 16 << 10;

/// What one process has.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    descriptors: usize,
    threads: usize,
    rss_kib: u64,
    /// Mappings of shared memory.
    shared: usize,
}

impl Held {
    fn of(pid: u32) -> Self {
        let process = format!("/proc/{pid}");
        let count = |what: &str| fs::read_dir(format!("{process}/{what}")).unwrap().count();
        let status = fs::read_to_string(format!("{process}/status")).unwrap();
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let maps = fs::read_to_string(format!("{process}/maps")).unwrap();
        Self {
            descriptors: count("fd"),
            threads: count("task"),
            rss_kib: rss.trim().trim_end_matches(" kB").parse().unwrap(),
            shared: maps.lines().filter(|line| line.contains(" rw-s ")).count(),
        }
    }
}

fn files_in(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| if entry.file_type().unwrap().is_dir() { files_in(&entry.path()) } else { 1 }).sum()
}

#[tokio::test]
async fn processes_hold_no_more_after_many_updates() {
    let updates: u64 = std::env::var("CKPT_SOAK_UPDATES").map_or(120, |text| text.parse().unwrap());
    // Some milliseconds an update; a minute for those that take long on a busy machine.
    let limit = LONG * 2 + Duration::from_millis(500) * u32::try_from(updates).unwrap();
    let job = Job::new(PROGRAM, RANKS, 1);
    let workers = job.workers(&[]).await;
    let mut ranks = job.update(&["--repeat", &updates.to_string(), "--sleep-time", "600"]);
    let pids: Vec<u32> = ranks
        .present()
        .map(|(_, rank)| rank.pid())
        .chain(workers.iter().map(|worker| worker.pid()))
        .collect();
    let look = || -> (Vec<Held>, usize) {
        (pids.iter().map(|pid| Held::of(*pid)).collect(), files_in(&job.runtime_dir()))
    };

    let made = async |at_least: u64| {
        loop {
            let state = http_get(&job.engine(0), "/v1/state").await.json();
            if state[0]["updates"].as_u64().unwrap() >= at_least {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(limit, made(WARM.min(updates / 2))).await.unwrap();
    let first = look();
    // The summary of rank 0 comes after the last one.
    ranks.get(0).stdout_line_within("update_s", limit).await;
    let last = look();

    println!(
        "{updates} updates of 1 MiB; descriptors, threads, shared mappings, RSS in KiB, after {WARM} and at the end:"
    );
    let names = ["rank 0", "rank 1", "worker 0", "worker 1"];
    for ((name, first), last) in names.iter().zip(&first.0).zip(&last.0) {
        println!(
            "{name}: {} -> {}, {} -> {}, {} -> {}, {} -> {}",
            first.descriptors,
            last.descriptors,
            first.threads,
            last.threads,
            first.shared,
            last.shared,
            first.rss_kib,
            last.rss_kib
        );
        // The first look falls into the middle of an update, which has a few of each open.
        assert!(last.descriptors <= first.descriptors + 2, "{name}: {first:?} {last:?}");
        assert!(last.threads <= first.threads + 2, "{name}: {first:?} {last:?}");
        assert!(last.shared <= first.shared, "{name}: {first:?} {last:?}");
        assert!(last.rss_kib <= first.rss_kib + SLACK_KIB, "{name}: {first:?} {last:?}");
    }
    println!("files in the runtime folder: {} -> {}", first.1, last.1);
    assert!(last.1 <= first.1, "files are left behind: {} -> {}", first.1, last.1);
    job.assert_holds(1).await;
}
