//! Whoever does not belong to the job, by mistake or on purpose.

use std::time::Duration;

use ckpt_core::{
    Error, ErrorKind,
    control::{Hello, Hub, HubAddress, HubOptions, Session, SessionConfig, ToHub, ToRank, Token},
    deadlines::Deadlines,
};
use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};
use tokio::{io::AsyncWriteExt, net::TcpListener, net::TcpSocket};

use crate::support::*;

async fn refused(hub: &Hub, change: impl FnOnce(&mut SessionConfig)) -> Error {
    let mut config = config(hub.address().unwrap(), 1, 2, nervous());
    change(&mut config);
    let error = Session::connect(config).await.unwrap_err();
    assert!(!error.to_string().contains('\n'));
    error
}

#[tokio::test]
async fn wrong_greetings_are_refused_in_one_line_that_says_why() {
    let hub = hub(2, nervous()).await;
    let first = session(&hub, 0, 2, nervous()).await;
    let error = refused(&hub, |c| c.job = "other\njob".into()).await;
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    assert!(error.message().contains(JOB) && error.message().contains("other\\njob"), "{error}");
    assert!(error.message().contains("MASTER_PORT"), "{error}");

    let error = refused(&hub, |c| c.token = Token::new("guess").unwrap().into()).await;
    assert!(error.message().contains("rank 1") && error.message().contains("CKPT_TOKEN"), "{error}");
    assert!(!error.message().contains("guess") && !error.message().contains("secret"), "{error}");

    let error = refused(&hub, |c| c.world_size = 3).await;
    assert!(error.message().contains("WORLD_SIZE") && error.message().contains('3'), "{error}");
    let error = refused(&hub, |c| c.rank = 2).await;
    assert!(error.message().contains("RANK"), "{error}");

    assert_healthy(&[first, session(&hub, 1, 2, nervous()).await], "after").await;
}

#[tokio::test]
async fn another_version_is_told_so() {
    let hub = hub(1, patient()).await;
    let mut raw = Raw::connect(&hub).await;
    raw.say(&frame(&ToHub::Hello(Hello { protocol: 9, ..hello(0, 1) }))).await;
    let cause = raw.refusal().await;
    assert!(cause.message().contains("version 9") && cause.message().contains("same ckpt"), "{cause}");
    // A version whose messages look different: only the frame's header can be understood.
    let mut raw = Raw::connect(&hub).await;
    raw.say(&[0, 0, 0, 5, 0xCB, 200, 1, 2, 3]).await;
    let cause = raw.refusal().await;
    assert!(cause.message().contains("version 200"), "{cause}");

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = config(listener.local_addr().unwrap(), 0, 1, patient());
    let answer = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&[0, 0, 0, 5, 0xCB, 77, 1, 2, 3]).await.unwrap();
        stream
    };
    let (_stream, error) = tokio::join!(answer, Session::connect(config));
    let error = error.unwrap_err();
    assert!(error.message().contains("version 77") && error.message().contains("same ckpt"), "{error}");
}

#[tokio::test]
async fn a_duplicate_of_a_live_rank_is_refused_and_the_live_one_named() {
    let hub = hub(2, nervous()).await;
    let all = sessions(&hub, 2, nervous()).await;
    let error = refused(&hub, |c| c.pid = 77).await;
    let text = error.to_string();
    assert!(text.contains("rank 1 is already here"), "{text}");
    assert!(text.contains(&format!("pid {}", std::process::id())), "{text}");
    assert_healthy(&all, "after").await;
}

#[tokio::test]
async fn hostile_bytes_leave_the_hub_healthy() {
    let hub = hub(2, patient()).await;
    let all = sessions(&hub, 2, patient()).await;
    let greeting = frame(&ToHub::Hello(hello(1, 2)));
    let mut attacks: Vec<Vec<u8>> = vec![
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        b"SSH-2.0-OpenSSH_9.6\r\n".to_vec(),
        // The longest possible length, and one just over the limit for strangers.
        vec![0xFF; 4096],
        [&65_537_u32.to_be_bytes()[..], &[0xCB, 1]].concat(),
        vec![0, 0, 0, 0],
        frame(&ToHub::Alive),
        frame(&ToHub::Bye),
        // A gather in place of the greeting, with a length inside that lies.
        vec![0, 0, 0, 9, 0xCB, 1, 2, 1, b'g', 0xFF, 0xFF, 0xFF, 0x7F],
    ];
    attacks.extend((0..greeting.len()).step_by(7).map(|cut| greeting[..cut].to_vec()));
    for at in (4..greeting.len()).step_by(5) {
        let mut flipped = greeting.clone();
        flipped[at] ^= 0x55;
        attacks.push(flipped);
    }
    let mut runner = TestRunner::deterministic();
    let random = proptest::collection::vec(any::<u8>(), 0..2000);
    for _ in 0..50 {
        attacks.push(random.new_tree(&mut runner).unwrap().current());
    }
    for (number, attack) in attacks.iter().enumerate() {
        let mut raw = Raw::connect(&hub).await;
        raw.say(attack).await;
        // The end of what it has to say: the hub must not wait for more.
        let _ = raw.0.shutdown().await;
        while let Some(answer) = raw.hear().await {
            assert!(matches!(answer, ToRank::Refused { .. }), "attack {number}: {answer:?}");
        }
    }
    assert_healthy(&all, "after").await;
}

#[tokio::test]
async fn a_rank_that_sends_damaged_messages_is_dropped_and_named() {
    let hub = hub(2, patient()).await;
    let good = session(&hub, 0, 2, patient()).await;
    for damage in [vec![0xFF; 8], vec![0, 0, 0, 3, 0xCB, 1, 0xEE], frame(&ToHub::Hello(hello(1, 2)))] {
        let mut bad = Raw::welcomed(&hub, 1, 2).await;
        let mut caller = Caller::new(&good);
        caller.join(1);
        bad.say(&damage).await;
        let cause = caller.aborted().await;
        assert_eq!(cause.get(ckpt_core::Key::Rank), Some("1"), "{cause}");
        bad.until_closed().await;
    }
    assert_healthy(&[good, session(&hub, 1, 2, patient()).await], "after").await;
}

#[tokio::test]
async fn slow_strangers_run_out_of_time_and_ranks_get_in() {
    let hub = hub(1, Deadlines { join: Duration::from_millis(500), ..patient() }).await;
    // More than the hub lets in at once.
    let mut crowd = Vec::new();
    for number in 0..150 {
        let mut raw = Raw::connect(&hub).await;
        raw.say(&[0, 0, 0][..number % 4]).await;
        crowd.push(raw);
    }
    let session = session(&hub, 0, 1, patient()).await;
    for raw in &mut crowd {
        raw.until_closed().await;
    }
    assert_healthy(&[session], "after").await;
}

#[tokio::test]
async fn a_port_that_is_in_use_is_one_line() {
    let foreign = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address: HubAddress = foreign.local_addr().unwrap().into();
    let error =
        Hub::bind(HubOptions { address: address.clone(), ..options(1, patient()) }).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    let text = error.to_string();
    assert!(text.contains(&address.to_string()) && text.contains("MASTER_PORT"), "{text}");

    let nameless = HubAddress::new("no-such-host.invalid", 1);
    let error = Hub::bind(HubOptions { address: nameless, ..options(1, patient()) }).await.unwrap_err();
    assert!(
        error.message().contains("no-such-host.invalid") && error.message().contains("MASTER_ADDR"),
        "{error}"
    );
}

#[tokio::test]
async fn a_foreign_service_on_the_hubs_port_is_told_from_a_hub() {
    for words in [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], b"SSH-2.0-x\r\n", &[0, 0, 0, 4, 1, 2, 3, 4]] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answer = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(words).await.unwrap();
            stream
        };
        let (_stream, error) = tokio::join!(answer, Session::connect(config(address, 0, 1, patient())));
        let error = error.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
        assert!(error.message().contains(&address.to_string()), "{error}");
        assert!(error.message().contains("MASTER_PORT"), "{error}");
    }
}

#[tokio::test]
async fn ranks_wait_for_a_hub_that_starts_later_but_not_for_ever() {
    // Bound and not listening: nobody else gets the port, and nobody answers there.
    let reserved = TcpSocket::new_v4().unwrap();
    reserved.set_reuseaddr(true).unwrap();
    reserved.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = reserved.local_addr().unwrap();

    let hurried = Deadlines { join: Duration::from_millis(200), ..patient() };
    let error = Session::connect(config(address, 1, 2, hurried)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    let text = error.to_string();
    assert!(
        text.contains(&address.to_string()) && text.contains("MASTER_ADDR") && text.contains("rank 1"),
        "{text}"
    );

    let early = tokio::spawn(Session::connect(config(address, 1, 2, patient())));
    // It has been refused at least once when the first rank's own attempt has failed.
    assert!(Session::connect(config(address, 0, 2, hurried)).await.is_err());
    assert!(!early.is_finished());
    let hub = Hub::bind(HubOptions { address: address.into(), ..options(2, patient()) }).await.unwrap();
    let all = [session(&hub, 0, 2, patient()).await, early.await.unwrap().unwrap()];
    assert_healthy(&all, "after").await;
}
