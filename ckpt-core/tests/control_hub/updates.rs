//! What ranks agree on: gathers, and updates from Join to Closed.

use std::time::{Duration, Instant};

use bytes::Bytes;
use ckpt_core::{
    Error, ErrorKind, Key,
    control::{Hub, Session, SessionEvent, ToHub, ToRank},
    deadlines::Deadlines,
};
use futures_util::future::join_all;

use crate::support::*;

fn part(rank: u32) -> Bytes {
    Bytes::from(vec![u8::try_from(rank).unwrap(); 1000 * rank as usize])
}

async fn gather_on(sessions: &[Session]) {
    let expected: Vec<Bytes> = (0..).take(sessions.len()).map(part).collect();
    for round in 0..3 {
        let name = format!("metas-{round}");
        let calls = sessions.iter().map(|s| s.gather(&name, part(s.rank()), soon()));
        for parts in join_all(calls).await {
            assert_eq!(parts.unwrap(), expected);
        }
    }
}

#[tokio::test]
async fn gathers_bring_every_part_to_every_rank_in_rank_order() {
    for world_size in 1..=8 {
        let hub = hub(world_size, patient()).await;
        gather_on(&sessions(&hub, world_size, patient()).await).await;
    }
}

#[tokio::test]
async fn ranks_of_one_process_need_no_socket() {
    let hub = Hub::in_process(options(3, patient()));
    assert_eq!(hub.address(), None);
    let nowhere = ([127, 0, 0, 1], 0).into();
    let mut sessions = Vec::new();
    for rank in 0..3 {
        sessions.push(Session::in_process(&hub, config(nowhere, rank, 3, patient())).await.unwrap());
    }
    gather_on(&sessions).await;
    let mut callers = Caller::all(&sessions);
    let epoch = go(&mut callers, 1).await;
    finish(&mut callers, epoch).await;
    drop(hub);
    for session in &sessions {
        assert_eq!(session.until_lost().await.kind(), ErrorKind::PeerLost);
    }
}

#[tokio::test]
async fn a_part_of_many_megabytes_arrives_whole() {
    let hub = hub(2, patient()).await;
    let sessions = sessions(&hub, 2, patient()).await;
    let big: Bytes = (0..9_000_000_u32).map(|i| i.to_le_bytes()[1]).collect::<Vec<u8>>().into();
    let calls = sessions.iter().map(|s| s.gather("big", big.clone(), soon()));
    for parts in join_all(calls).await {
        assert!(parts.unwrap().iter().all(|part| *part == big));
    }
}

#[tokio::test]
async fn updates_run_one_after_the_other() {
    let hub = hub(4, patient()).await;
    let sessions = sessions(&hub, 4, patient()).await;
    let mut callers = Caller::all(&sessions);
    let mut last = None;
    for version in 1..=3 {
        let epoch = go(&mut callers, version).await;
        assert!(last.is_none_or(|last| epoch > last));
        last = Some(epoch);
        let status = hub.status().await.unwrap();
        assert_eq!(status.attempts.len(), 1);
        assert_eq!(status.attempts[0].epoch, Some(epoch));
        assert!(status.ranks.iter().all(|rank| rank.connected));
        assert!(serde_json::to_string(&status).unwrap().contains("\"weights\""));
        finish(&mut callers, epoch).await;
    }
    assert!(hub.status().await.unwrap().attempts.is_empty());
}

#[tokio::test]
async fn a_failure_reaches_every_rank_with_the_first_cause_and_its_culprit() {
    let hub = hub(4, patient()).await;
    let sessions = sessions(&hub, 4, patient()).await;
    let mut callers = Caller::all(&sessions);
    let epoch = go(&mut callers, 1).await;
    let disk = std::io::Error::other("CUDA out of memory");
    let first = Error::new(ErrorKind::Backend, "load bucket 3", "the worker failed")
        .with(Key::Bucket, 3)
        .caused_by(disk);
    callers[2].session.send(&ToHub::Failed { epoch: Some(epoch), cause: first }).unwrap();
    for caller in &mut callers {
        let cause = caller.aborted().await;
        assert_eq!(cause.kind(), ErrorKind::Backend);
        assert_eq!((cause.get(Key::Rank), cause.get(Key::Bucket)), (Some("2"), Some("3")));
        assert_eq!(cause.get(Key::Pid), Some(std::process::id().to_string().as_str()));
        // The text of the underlying error crosses the wire.
        assert!(cause.to_string().contains("CUDA out of memory"), "{cause}");
    }
    // What is said about a dead attempt changes nothing, and the next one works.
    callers[1].session.send(&ToHub::Loaded { epoch }).unwrap();
    let next = go(&mut callers, 2).await;
    assert!(next > epoch);
    finish(&mut callers, next).await;
}

#[tokio::test]
async fn missing_callers_are_named() {
    let short = Deadlines { join: Duration::from_millis(400), ..patient() };
    let hub = hub(3, short).await;
    let sessions = sessions(&hub, 3, patient()).await;
    let mut callers = Caller::all(&sessions);
    callers[0].join(1);
    let cause = callers[0].aborted().await;
    assert_eq!(cause.kind(), ErrorKind::Timeout);
    assert!(cause.message().contains("ranks 1, 2 never called update"), "{cause}");

    let error = sessions[1].gather("alone", Bytes::new(), soon()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.message().contains('0') && error.message().contains('2'), "{error}");
}

#[tokio::test]
async fn a_gather_ends_by_the_callers_own_deadline_and_can_be_given_up() {
    let hub = hub(2, patient()).await;
    let sessions = sessions(&hub, 2, patient()).await;
    let started = Instant::now();
    let error =
        sessions[0].gather("g", Bytes::new(), started + Duration::from_millis(100)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.message().contains("\"g\""));
    assert!(started.elapsed() < Duration::from_secs(10));
    // The same name at the same time is a mistake of the caller.
    let (first, second) = tokio::join!(
        sessions[0].gather("h", Bytes::new(), Instant::now() + Duration::from_millis(100)),
        sessions[0].gather("h", Bytes::new(), soon()),
    );
    assert_eq!(first.unwrap_err().kind(), ErrorKind::Timeout);
    assert_eq!(second.unwrap_err().kind(), ErrorKind::Internal);
    assert_healthy(&sessions, "after").await;
}

#[tokio::test]
async fn heartbeats_renew_the_lease_from_when_they_were_sent() {
    let hub = hub(1, patient()).await;
    let session = session(&hub, 0, 1, patient()).await;
    let mut updates = session.updates();
    let mut last = session.lease();
    for _ in 0..3 {
        let SessionEvent::LeaseRenewed { sent_at } = updates.next().await else { panic!("no lease") };
        assert!(sent_at >= last && sent_at <= Instant::now());
        assert!(session.lease() >= sent_at);
        last = sent_at;
    }
    assert!(session.lease_is_valid());
    hub.shutdown().await;
    session.until_lost().await;
    assert!(!session.lease_is_valid());
}

#[tokio::test]
async fn a_new_subscription_replaces_the_old_one() {
    let hub = hub(1, patient()).await;
    let session = session(&hub, 0, 1, patient()).await;
    let mut old = session.updates();
    let mut caller = Caller::new(&session);
    caller.join(1);
    let epoch = caller.begun().await;
    let heard = async {
        loop {
            match old.next().await {
                SessionEvent::LeaseRenewed { .. } => {}
                other => return other,
            }
        }
    };
    assert!(tokio::time::timeout(Duration::from_millis(100), heard).await.is_err());
    // Nobody listens: the message is dropped, the session lives on.
    let Caller { updates, .. } = caller;
    drop(updates);
    session.send(&ToHub::Ready { epoch, plan_digest: 1 }).unwrap();
    assert_healthy(std::slice::from_ref(&session), "after").await;
    let mut caller = Caller::new(&session);
    session.send(&ToHub::Loaded { epoch }).unwrap();
    assert!(matches!(caller.message().await, ToRank::Committed { .. }));
}
