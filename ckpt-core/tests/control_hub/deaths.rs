//! Ranks and hubs that end or fall silent in the middle of an update.

use std::time::{Duration, Instant};

use ckpt_core::{
    Epoch, Error, ErrorKind, Key,
    control::{Hub, Session, SessionEvent, ToHub, ToRank},
};
use tokio::{io::AsyncWriteExt, net::TcpListener};

use crate::support::*;

#[tokio::test]
async fn a_closed_connection_is_noticed_at_once_and_the_rank_can_come_back() {
    let hub = hub(3, patient()).await;
    let mut all = sessions(&hub, 3, patient()).await;
    let mut callers = Caller::all(&all);
    let epoch = go(&mut callers, 1).await;
    callers.remove(1);
    drop(all.remove(1));
    for caller in &mut callers {
        let cause = caller.aborted().await;
        assert_eq!(cause.kind(), ErrorKind::PeerLost);
        assert_eq!(cause.get(Key::Rank), Some("1"));
        assert!(cause.get(Key::Host).is_some() && cause.get(Key::Pid).is_some(), "{cause}");
    }
    let gone = all[0].barrier("gone", soon()).await.unwrap_err();
    assert_eq!(gone.get(Key::Rank), Some("1"), "{gone}");
    // The same process or a new one: both are a new session.
    all.insert(1, session(&hub, 1, 3, patient()).await);
    let mut callers = Caller::all(&all);
    let next = go(&mut callers, 2).await;
    assert!(next > epoch);
    finish(&mut callers, next).await;
    assert_healthy(&all, "after").await;
}

#[tokio::test]
async fn a_session_can_be_dropped_and_opened_again_at_once() {
    let hub = hub(2, nervous()).await;
    let _other = session(&hub, 0, 2, nervous()).await;
    for _ in 0..20 {
        // The hub may not have seen the end of the last one yet.
        drop(session(&hub, 1, 2, nervous()).await);
    }
    let config = config(hub.address().unwrap(), 1, 2, nervous());
    for _ in 0..5 {
        drop(Session::in_process(&hub, config.clone()).await.unwrap());
    }
}

#[tokio::test]
async fn the_cause_that_a_rank_sent_before_it_went_is_the_one_that_others_hear() {
    let hub = hub(2, patient()).await;
    let mut all = sessions(&hub, 2, patient()).await;
    let mut callers = Caller::all(&all);
    let epoch = go(&mut callers, 1).await;
    let cause = Error::new(ErrorKind::Corrupt, "read a shard", "the file is too short");
    all[1].send(&ToHub::Failed { epoch: Some(epoch), cause }).unwrap();
    callers.truncate(1);
    all.truncate(1);
    let heard = callers[0].aborted().await;
    assert_eq!((heard.kind(), heard.get(Key::Rank)), (ErrorKind::Corrupt, Some("1")), "{heard}");
}

#[tokio::test]
async fn leaving_in_order_is_no_crash() {
    let hub = hub(2, patient()).await;
    let mut all = sessions(&hub, 2, patient()).await;
    let clone = all[1].clone();
    let started = Instant::now();
    all.remove(1).close().await;
    assert!(started.elapsed() < Duration::from_millis(900), "the hub answered the goodbye");
    assert!(clone.lost().is_some());
    assert!(clone.send(&ToHub::Alive).is_err());
    assert!(!hub.status().await.unwrap().ranks[1].connected);
    all.push(session(&hub, 1, 2, patient()).await);
    assert_healthy(&all, "after").await;
}

#[tokio::test]
async fn a_silent_rank_is_dead_after_its_time() {
    let hub = hub(2, nervous()).await;
    let session = session(&hub, 0, 2, nervous()).await;
    let mut silent = Raw::welcomed(&hub, 1, 2).await;
    let started = Instant::now();
    let mut caller = Caller::new(&session);
    caller.join(1);
    let cause = caller.aborted().await;
    assert!(started.elapsed() >= Duration::from_millis(1400), "{:?}", started.elapsed());
    assert_eq!(cause.kind(), ErrorKind::PeerLost);
    assert_eq!(
        (cause.get(Key::Rank), cause.get(Key::Host), cause.get(Key::Pid)),
        (Some("1"), Some("elsewhere"), Some("4242"))
    );
    // It is told why, should it wake up.
    let told = silent.refusal().await;
    assert!(told.message().contains("rank 1") && told.message().contains("holds it dead"), "{told}");
    silent.until_closed().await;
    // The one that kept talking is untouched.
    assert!(session.lease_is_valid());
}

#[tokio::test]
async fn ranks_notice_a_hub_that_ends_or_is_killed() {
    // In order: it says so.
    let orderly = hub(1, patient()).await;
    let session_0 = session(&orderly, 0, 1, patient()).await;
    let mut caller = Caller::new(&session_0);
    orderly.shutdown().await;
    let SessionEvent::HubLost { cause } = caller.event().await else { panic!("not lost") };
    assert_eq!(cause.kind(), ErrorKind::PeerLost);
    assert!(cause.message().contains("rank 0 has ended"), "{cause}");
    // Told once, then quiet, so that a driver that is cleaning up does not spin.
    assert!(tokio::time::timeout(Duration::from_millis(50), caller.updates.next()).await.is_err());
    // A subscription that starts later hears of it too.
    assert!(matches!(Caller::new(&session_0).event().await, SessionEvent::HubLost { .. }));
    assert!(session_0.gather("g", Default::default(), soon()).await.is_err());

    // Killed: its runtime is gone between two instructions.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let killed = runtime.spawn(Hub::bind(options(1, patient()))).await.unwrap().unwrap();
    let session = session(&killed, 0, 1, patient()).await;
    runtime.shutdown_background();
    let cause = session.until_lost().await;
    assert_eq!(cause.kind(), ErrorKind::PeerLost);
    assert!(cause.message().contains("rank 0"), "{cause}");
    assert_eq!(cause.get(Key::Peer), Some(killed.address().unwrap().to_string().as_str()));
}

/// Accepts one session, welcomes it, says one more thing and stays.
async fn fake_hub(dead_after_ms: u64, then: Vec<u8>) -> Session {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = config(listener.local_addr().unwrap(), 0, 1, patient());
    let serve = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut bytes = frame(&ToRank::Welcome { heartbeat_ms: 50, dead_after_ms });
        bytes.extend(then);
        stream.write_all(&bytes).await.unwrap();
        stream
    };
    let (stream, session) = tokio::join!(serve, Session::connect(config));
    tokio::spawn(async move {
        let _open = stream;
        std::future::pending::<()>().await;
    });
    session.unwrap()
}

#[tokio::test]
async fn a_hub_that_falls_silent_is_lost_after_its_time() {
    let started = Instant::now();
    let session = fake_hub(700, Vec::new()).await;
    let cause = session.until_lost().await;
    assert!(started.elapsed() >= Duration::from_millis(700));
    assert!(cause.message().contains("silent"), "{cause}");
    assert_eq!(cause.kind(), ErrorKind::PeerLost);
}

#[tokio::test]
async fn what_the_hub_said_last_is_heard_before_its_loss() {
    // Committed and the end of the connection arrive together: the decision must not be in doubt. In half of the
    // rounds the hub dies with heartbeats unread, which resets the connection.
    for round in 0..20 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let config = config(listener.local_addr().unwrap(), 0, 1, patient());
        let welcome = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let welcome = frame(&ToRank::Welcome { heartbeat_ms: 1, dead_after_ms: 60_000 });
            stream.write_all(&welcome).await.unwrap();
            stream
        };
        let (mut stream, session) = tokio::join!(welcome, Session::connect(config));
        let session = session.unwrap();
        let mut caller = Caller::new(&session);
        stream.readable().await.unwrap();
        let mut last_words = frame(&ToRank::Go { epoch: Epoch(3) });
        last_words.extend(frame(&ToRank::Committed { epoch: Epoch(3) }));
        stream.write_all(&last_words).await.unwrap();
        if round % 2 == 0 {
            drop(stream);
        } else {
            stream.shutdown().await.unwrap();
        }
        let lost = session.until_lost().await;
        assert!(matches!(caller.message().await, ToRank::Go { .. }));
        assert!(matches!(caller.message().await, ToRank::Committed { .. }));
        let SessionEvent::HubLost { cause } = caller.event().await else { panic!("not lost") };
        assert_eq!(cause.to_string(), lost.to_string());
        assert_eq!(cause.kind(), ErrorKind::PeerLost);
    }
}

#[tokio::test]
async fn a_hub_that_talks_nonsense_is_lost_not_believed() {
    for nonsense in [vec![0, 0, 0, 3, 0xCB, 1, 0xEE], vec![0xFF; 64], frame(&ToRank::Alive).repeat(500)] {
        let session = fake_hub(60_000, nonsense).await;
        let lost = tokio::time::timeout(LONG, session.until_lost()).await.unwrap();
        assert_eq!(lost.kind(), ErrorKind::PeerLost, "{lost}");
    }
}
