//! What needs the inside of the hub: a rank that is stuck.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    Hub, HubAddress, HubOptions, Session, SessionConfig, ToHub, Token,
    codec::{FRAME_BYTES, encode},
};
use crate::deadlines::Deadlines;

#[tokio::test]
async fn a_rank_that_reads_nothing_is_given_up_and_holds_nobody_up() {
    let deadlines = Deadlines { dead_after: Duration::from_secs(600), ..Deadlines::default() };
    let token = Token::random().unwrap();
    let address = HubAddress::new("127.0.0.1", 0);
    let hub = Hub::in_process(HubOptions {
        address: address.clone(),
        job: "job".into(),
        token: token.clone(),
        world_size: 2,
        deadlines,
        tls: false,
    });
    let config =
        |rank| SessionConfig::new(address.clone(), "job", token.clone(), rank, 2, deadlines).unwrap();
    let session = Session::in_process(&hub, config(0)).await.unwrap();

    // Rank 1 asks and asks, and never reads an answer.
    let mut stuck = hub.attach();
    let hello = encode(&ToHub::Hello(config(1).hello(token.clone())), FRAME_BYTES).unwrap();
    stuck.write_all(&hello).await.unwrap();
    let alive = encode(&ToHub::Alive, FRAME_BYTES).unwrap().repeat(1000);
    let ask = async { while stuck.write_all(&alive).await.is_ok() {} };
    let started = Instant::now();
    let deadline = started + Duration::from_secs(30);
    let (error, ()) = tokio::join!(session.barrier("both", deadline), ask);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("rank 1") && error.contains("unread"), "{error}");
    assert!(session.lease_is_valid());
    // What was queued before is not what the hub waits for.
    let _ = tokio::time::timeout(Duration::from_secs(5), stuck.read_to_end(&mut Vec::new())).await.unwrap();
    assert!(!hub.status().await.unwrap().ranks[1].connected);
}
