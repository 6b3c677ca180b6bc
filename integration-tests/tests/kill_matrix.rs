//! Every kind of process of a job is killed and stopped at every stage of an update: the survivors end soon and name it,
//! and the next update succeeds.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

#[path = "kill_matrix/case.rs"]
mod case;

use std::sync::Arc;

use case::{Case, Row, Stage, Strike, Victim};
use tokio::{sync::Semaphore, task::JoinSet};

/// Runs all, `at_once` at a time, prints the table, and fails if any case did.
async fn run(cases: Vec<Case>, at_once: usize) {
    let (places, count) = (Arc::new(Semaphore::new(at_once)), cases.len());
    let mut running = JoinSet::new();
    for case in cases {
        let places = places.clone();
        running.spawn(async move {
            let _place = places.acquire().await.unwrap();
            // On a task of its own, so that a panic in it becomes a row.
            match tokio::spawn(case.run()).await {
                Ok(row) => row,
                Err(panic) => Row::panicked(case, panic),
            }
        });
    }
    let mut rows = running.join_all().await;
    rows.sort();
    println!("| victim | stage | signal | survivors ended after | they say | next update |");
    println!("|---|---|---|---|---|---|");
    for row in &rows {
        println!("{row}");
    }
    let bad = rows.iter().filter(|row| !row.is_good()).count();
    println!("{} of {count} cases are as promised", count - bad);
    assert_eq!(bad, 0, "see the table");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_choice_of_the_matrix() {
    use {Stage::*, Strike::*, Victim::*};
    let chosen = [
        (Rank0, Gather, Kill),
        (Rank0, PostHook, Stop),
        (OtherRank, Join, Kill),
        (OtherRank, Release, Stop),
        (Worker, MidBucket, Stop),
        (Worker, PostHook, Kill),
        (EngineServer, Before, Kill),
        (EngineServer, MidBucket, Stop),
        (EngineServer, Join, Stop),
        (Worker, Gather, Kill),
        (Source, MidBucket, Stop),
        (Source, Before, Kill),
    ];
    run(chosen.map(|(victim, stage, strike)| Case { victim, stage, strike }).into(), 4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes: cargo test -p integration-tests --test kill_matrix -- --ignored --nocapture"]
async fn the_whole_matrix() {
    run(Case::all().collect(), 3).await;
}
