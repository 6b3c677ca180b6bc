//! Hub and ranks with TLS, and what happens where only one side has it.

use std::time::{Duration, Instant};

use bytes::Bytes;
use ckpt_core::{
    Error, ErrorKind, Result,
    control::{Hub, HubOptions, Session, SessionConfig, Token},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::*;

const SECRET: &str = "the secret of a job with TLS, long enough";

fn secret() -> Token {
    Token::new(SECRET).unwrap()
}

async fn hub(tls: bool) -> Hub {
    Hub::bind(HubOptions { token: secret(), tls, ..options(2, nervous()) }).await.unwrap()
}

async fn join(hub: &Hub, rank: u32, change: impl FnOnce(&mut SessionConfig)) -> Result<Session> {
    let mut config = config(hub.address().unwrap(), rank, 2, nervous());
    (config.token, config.tls) = (secret().into(), true);
    change(&mut config);
    Session::connect(config).await
}

async fn refused(hub: &Hub, change: impl FnOnce(&mut SessionConfig)) -> Error {
    let started = Instant::now();
    let error = join(hub, 1, change).await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(5), "{error}");
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid, "{error}");
    assert!(!error.to_string().contains('\n') && !error.to_string().contains("secret of"), "{error}");
    error
}

#[tokio::test]
async fn ranks_talk_through_tls_and_deaths_are_seen() {
    let hub = hub(true).await;
    let (zero, one) = (join(&hub, 0, |_| {}).await.unwrap(), join(&hub, 1, |_| {}).await.unwrap());
    let deadline = Instant::now() + LONG;
    // More than any buffer on the way.
    let part = |byte| Bytes::from(vec![byte; 9 << 20]);
    let gathered = tokio::join!(zero.gather("g", part(1), deadline), one.gather("g", part(2), deadline));
    let (at_zero, at_one) = (gathered.0.unwrap(), gathered.1.unwrap());
    assert_eq!(at_zero, [part(1), part(2)]);
    assert_eq!(at_one, at_zero);
    drop(one);
    let error = zero.barrier("b", deadline).await.unwrap_err();
    assert!(error.message().contains("rank 1"), "{error}");
    hub.shutdown().await;
    let end = zero.until_lost().await.to_string();
    assert!(end.contains("hub"), "{end}");
}

#[tokio::test]
async fn who_does_not_fit_is_told_in_one_line() {
    let (sealed, open) = (hub(true).await, hub(false).await);
    let error = refused(&sealed, |c| c.token = Token::new(SECRET.replace('a', "b")).unwrap().into()).await;
    assert!(error.message().contains("TLS key was made of another token than rank 1 has"), "{error}");
    let error = refused(&sealed, |c| c.tls = false).await;
    assert!(error.message().contains("the hub wants TLS"), "{error}");
    let error = refused(&open, |_| {}).await;
    assert!(error.message().contains("rank 1 wants TLS and the hub does not"), "{error}");
    let error = refused(&sealed, |c| c.token = Token::new("too short to be a key").unwrap().into()).await;
    assert!(error.message().contains("openssl rand -hex 32"), "{error}");
    let short = HubOptions { tls: true, ..options(2, nervous()) };
    assert!(Hub::bind(short).await.unwrap_err().message().contains("openssl rand -hex 32"));
    join(&sealed, 1, |_| {}).await.unwrap();
    join(&open, 1, |c| c.tls = false).await.unwrap();
}

#[tokio::test]
async fn a_handshake_that_does_not_end_is_cut_off() {
    let hub = hub(true).await;
    // The beginning of a handshake record, and nothing behind it; and silence.
    for words in [&b"\x16\x03\x01\x02\x00"[..], b""] {
        let mut stream = TcpStream::connect(hub.address().unwrap()).await.unwrap();
        stream.write_all(words).await.unwrap();
        let started = Instant::now();
        let ended = tokio::time::timeout(LONG, stream.read_to_end(&mut Vec::new())).await;
        ended.expect("it was not cut off").ok();
        assert!(started.elapsed() > Duration::from_secs(4), "it was cut off for another reason");
    }
    join(&hub, 1, |_| {}).await.unwrap();
}

#[tokio::test]
async fn nonsense_after_a_beginning_like_tls_does_no_harm() {
    let hub = hub(true).await;
    for words in [&[22; 600][..], b"\x16\x03\x01\x00\x05hello", &[22, 3, 3, 0xff, 0xff]] {
        let mut stream = TcpStream::connect(hub.address().unwrap()).await.unwrap();
        stream.write_all(words).await.unwrap();
        let _ = tokio::time::timeout(LONG, stream.read_to_end(&mut Vec::new())).await.unwrap();
    }
    join(&hub, 1, |_| {}).await.unwrap();
}
