//! A hub, its ranks, and raw connections that misbehave.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use bytes::Bytes;
use ckpt_core::{
    Epoch, Rank, Version,
    control::{
        Hello, Hub, HubAddress, HubOptions, Joining, PROTOCOL_VERSION, Session, SessionConfig, SessionEvent,
        ToHub, ToRank, Token, Updates,
    },
    deadlines::Deadlines,
};
use serde::Serialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

pub const JOB: &str = "test-job";
/// Nothing in these tests takes longer unless it hangs.
pub const LONG: Duration = Duration::from_secs(20);

/// Deaths are noticed by closed connections only: a test that passes did not wait for silence.
pub fn patient() -> Deadlines {
    Deadlines {
        join: Duration::from_secs(15),
        heartbeat: Duration::from_millis(50),
        dead_after: Duration::from_secs(600),
        ..Deadlines::default()
    }
}

/// Silence is noticed soon.
pub fn nervous() -> Deadlines {
    Deadlines { dead_after: Duration::from_millis(1500), ..patient() }
}

pub fn token() -> Token {
    Token::new("the job's secret").unwrap()
}

pub fn options(world_size: u32, deadlines: Deadlines) -> HubOptions {
    HubOptions {
        address: HubAddress::new("127.0.0.1", 0),
        job: JOB.into(),
        token: token(),
        world_size,
        deadlines,
        tls: false,
    }
}

pub async fn hub(world_size: u32, deadlines: Deadlines) -> Hub {
    Hub::bind(options(world_size, deadlines)).await.unwrap()
}

pub fn config(address: SocketAddr, rank: Rank, world_size: u32, deadlines: Deadlines) -> SessionConfig {
    SessionConfig::new(address.into(), JOB, token(), rank, world_size, deadlines).unwrap()
}

pub async fn session(hub: &Hub, rank: Rank, world_size: u32, deadlines: Deadlines) -> Session {
    Session::connect(config(hub.address().unwrap(), rank, world_size, deadlines)).await.unwrap()
}

pub async fn sessions(hub: &Hub, world_size: u32, deadlines: Deadlines) -> Vec<Session> {
    let mut sessions = Vec::new();
    for rank in 0..world_size {
        sessions.push(session(hub, rank, world_size, deadlines).await);
    }
    sessions
}

pub fn soon() -> Instant {
    Instant::now() + LONG
}

/// The hub still serves all these ranks.
pub async fn assert_healthy(sessions: &[Session], round: &str) {
    let calls = sessions.iter().map(|session| session.barrier(round, soon()));
    for result in futures_util::future::join_all(calls).await {
        result.unwrap();
    }
}

/// One rank's view of updates.
pub struct Caller {
    pub session: Session,
    pub updates: Updates,
}

impl Caller {
    pub fn new(session: &Session) -> Self {
        Self { session: session.clone(), updates: session.updates() }
    }

    pub fn all(sessions: &[Session]) -> Vec<Self> {
        sessions.iter().map(Self::new).collect()
    }

    pub fn join(&self, version: u64) {
        let joining = Joining {
            checkpoint: "weights".into(),
            version: Version(version),
            ranks: Vec::new(),
            device_uuid: format!("HOST-test-{}", self.session.rank()),
            endpoint: None,
            free_bytes: 1 << 30,
            communicator: None,
            token: (self.session.rank() == 0).then(|| Bytes::from_static(b"group")),
        };
        self.session.send(&ToHub::Join(joining)).unwrap();
    }

    /// The next message or loss; leases in between are skipped.
    pub async fn event(&mut self) -> SessionEvent {
        let next = async {
            loop {
                match self.updates.next().await {
                    SessionEvent::LeaseRenewed { .. } => {}
                    event => return event,
                }
            }
        };
        timeout(LONG, next).await.expect("an event in time")
    }

    pub async fn message(&mut self) -> ToRank {
        match self.event().await {
            SessionEvent::Message(message) => message,
            other => panic!("rank {}: {other:?}", self.session.rank()),
        }
    }

    pub async fn begun(&mut self) -> Epoch {
        match self.message().await {
            ToRank::Begin { epoch, .. } => epoch,
            other => panic!("rank {}: {other:?}", self.session.rank()),
        }
    }

    pub async fn aborted(&mut self) -> ckpt_core::Error {
        match self.message().await {
            ToRank::Abort { cause, .. } => cause,
            other => panic!("rank {}: {other:?}", self.session.rank()),
        }
    }
}

/// Join, Begin, Ready, Go on all ranks.
pub async fn go(callers: &mut [Caller], version: u64) -> Epoch {
    callers.iter().for_each(|caller| caller.join(version));
    let mut last = None;
    for caller in callers.iter_mut() {
        let epoch = caller.begun().await;
        assert!(last.is_none_or(|last| last == epoch));
        last = Some(epoch);
        caller.session.send(&ToHub::Ready { epoch, plan_digest: 7 }).unwrap();
    }
    let epoch = last.unwrap();
    for caller in callers.iter_mut() {
        assert!(matches!(caller.message().await, ToRank::Go { epoch: e } if e == epoch));
    }
    epoch
}

/// From Go to Closed on all ranks.
pub async fn finish(callers: &mut [Caller], epoch: Epoch) {
    for caller in callers.iter() {
        caller.session.send(&ToHub::Loaded { epoch }).unwrap();
    }
    for caller in callers.iter_mut() {
        assert!(matches!(caller.message().await, ToRank::Committed { epoch: e } if e == epoch));
        caller.session.send(&ToHub::Finished { epoch, failure: None }).unwrap();
    }
    for caller in callers.iter_mut() {
        assert!(matches!(caller.message().await, ToRank::Closed { epoch: e, failure: None } if e == epoch));
    }
}

pub fn hello(rank: Rank, world_size: u32) -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        job: JOB.into(),
        token: token().reveal().clone(),
        rank,
        world_size,
        incarnation: 1,
        host: "elsewhere".into(),
        pid: 4242,
    }
}

/// A frame as the documentation of the codec says.
pub fn frame(message: &impl Serialize) -> Vec<u8> {
    let body = postcard::to_allocvec(message).unwrap();
    let mut frame = u32::try_from(body.len() + 2).unwrap().to_be_bytes().to_vec();
    frame.extend_from_slice(&[0xCB, u8::try_from(PROTOCOL_VERSION).unwrap()]);
    frame.extend_from_slice(&body);
    frame
}

/// A connection without a session behind it.
pub struct Raw(pub TcpStream);

impl Raw {
    pub async fn connect(hub: &Hub) -> Self {
        Self(TcpStream::connect(hub.address().unwrap()).await.unwrap())
    }

    /// Greets as `rank` and reads the welcome.
    pub async fn welcomed(hub: &Hub, rank: Rank, world_size: u32) -> Self {
        let mut raw = Self::connect(hub).await;
        raw.say(&frame(&ToHub::Hello(hello(rank, world_size)))).await;
        assert!(matches!(raw.hear().await, Some(ToRank::Welcome { .. })));
        raw
    }

    pub async fn say(&mut self, bytes: &[u8]) {
        // The hub may have closed already, which is what some tests are about.
        let _ = self.0.write_all(bytes).await;
    }

    /// The next message; `None` when the hub has closed.
    pub async fn hear(&mut self) -> Option<ToRank> {
        let read = async {
            let mut length = [0; 4];
            self.0.read_exact(&mut length).await.ok()?;
            let mut body = vec![0; u32::from_be_bytes(length) as usize];
            self.0.read_exact(&mut body).await.ok()?;
            postcard::from_bytes(&body[2..]).ok()
        };
        timeout(LONG, read).await.expect("an answer or an end in time")
    }

    /// Skips to the refusal that ends the connection.
    pub async fn refusal(&mut self) -> ckpt_core::Error {
        loop {
            match self.hear().await {
                Some(ToRank::Refused { cause }) => return cause,
                Some(_) => {}
                None => panic!("closed without a word"),
            }
        }
    }

    /// Waits until the hub has closed.
    pub async fn until_closed(&mut self) {
        while self.hear().await.is_some() {}
    }
}
