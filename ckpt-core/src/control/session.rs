//! A rank's side of the control plane: one connection to the hub, kept alive by one task.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    address::HubAddress,
    codec::{FRAME_BYTES, PROTOCOL_VERSION, encode},
    connect::{self, Way},
    message::{Hello, ToHub, ToRank},
    server::Hub,
    session_task,
    token::{Token, TokenSource},
    weights::Weights,
};
use crate::{
    deadlines::Deadlines,
    error::{Error, ErrorKind, Key, Result},
    types::Rank,
};

/// Messages that may wait for the connection.
const OUTGOING_MESSAGES: usize = 256;
/// Messages that may wait for the update driver.
const INCOMING_MESSAGES: usize = 1024;
/// How long [`Session::close`] waits for the hub to take leave.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// What a rank needs to join its job.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// Where the hub listens.
    pub address: HubAddress,
    /// The job.
    pub job: String,
    /// Where the job's secret is.
    pub token: TokenSource,
    /// This rank.
    pub rank: Rank,
    /// Ranks of the job.
    pub world_size: u32,
    /// This host's name, for messages.
    pub host: String,
    /// This process, for messages.
    pub pid: u32,
    /// Random: tells a restarted rank from a live duplicate.
    pub incarnation: u64,
    /// `join` bounds the connecting; the hub's own heartbeat interval and silence limit replace those here.
    pub deadlines: Deadlines,
    /// Whether the connection is encrypted ([`crate::tls`]), which hub and ranks must agree on.
    pub tls: bool,
}

impl SessionConfig {
    /// Fills in host, pid and a random incarnation; without TLS.
    pub fn new(
        address: HubAddress,
        job: impl Into<String>,
        token: impl Into<TokenSource>,
        rank: Rank,
        world_size: u32,
        deadlines: Deadlines,
    ) -> Result<Self> {
        let mut incarnation = [0_u8; 8];
        getrandom::fill(&mut incarnation).map_err(|e| {
            Error::new(ErrorKind::Backend, "join the job", "the system has no randomness to give")
                .caused_by(e.to_string())
        })?;
        Ok(Self {
            address,
            job: job.into(),
            token: token.into(),
            rank,
            world_size,
            host: host_name(),
            pid: std::process::id(),
            incarnation: u64::from_ne_bytes(incarnation),
            deadlines,
            tls: false,
        })
    }

    pub(super) fn hello(&self, token: Token) -> Hello {
        Hello {
            protocol: PROTOCOL_VERSION,
            job: self.job.clone(),
            token: token.reveal().clone(),
            rank: self.rank,
            world_size: self.world_size,
            incarnation: self.incarnation,
            host: self.host.clone(),
            pid: self.pid,
        }
    }
}

/// This host's name, as the kernel knows it.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// What the update driver hears from the hub.
#[derive(Clone, Debug)]
pub enum SessionEvent {
    /// A message about an update, in the order sent: anything but greetings, heartbeats and gathers. The hub may still
    /// abort an attempt that this rank has already given up: compare epochs.
    Message(ToRank),
    /// The hub answered a heartbeat.
    LeaseRenewed {
        /// When that heartbeat was *sent*: the lease counts from here. A process that slept meanwhile finds an old
        /// answer in its socket and must not take it for a new lease.
        sent_at: Instant,
    },
    /// The session has ended. Given once, after all messages that came before; nothing comes after it.
    HubLost {
        /// Why.
        cause: Error,
    },
}

/// A rank's connection to the hub. Cheap to clone; the connection ends when the last clone is dropped.
///
/// A lost session stays lost until [`Session::rejoin`].
#[derive(Clone, Debug)]
pub struct Session {
    live: Arc<Mutex<Live>>,
}

/// The connection in use, of all clones.
#[derive(Debug)]
struct Live {
    shared: Arc<Shared>,
    _ends_when_replaced: DropGuard,
}

impl Session {
    /// Joins the job. Rank 0 may start its hub later: connecting is tried until the join deadline.
    pub async fn connect(config: SessionConfig) -> Result<Session> {
        let connected = connect::connect(&config, Way::Tcp).await?;
        Ok(Self { live: Arc::new(Mutex::new(Live::start(config, connected))) })
    }

    /// Joins the job again after the session was lost, for all clones: rank 0 may come back within `wait`. Whoever waits
    /// for the lost one has heard of the loss already. Nothing is done if the session is not lost.
    pub async fn rejoin(&self, wait: Duration) -> Result<()> {
        if self.lost().is_none() {
            return Ok(());
        }
        let mut config = self.shared().config.clone();
        let join = std::mem::replace(&mut config.deadlines.join, wait);
        let connected = connect::connect(&config, Way::Tcp).await?;
        config.deadlines.join = join;
        *lock(&self.live) = Live::start(config, connected);
        Ok(())
    }

    /// Joins a hub of this process without a socket; `config.address` is only used in messages.
    pub async fn in_process(hub: &Hub, config: SessionConfig) -> Result<Session> {
        let connected = connect::connect(&config, Way::InProcess(hub)).await?;
        Ok(Self { live: Arc::new(Mutex::new(Live::start(config, connected))) })
    }

    fn shared(&self) -> Arc<Shared> {
        lock(&self.live).shared.clone()
    }

    /// This rank.
    pub fn rank(&self) -> Rank {
        self.shared().config.rank
    }

    /// Ranks of the job.
    pub fn world_size(&self) -> u32 {
        self.shared().config.world_size
    }

    /// The job's secret, for transports whose listeners ask for one.
    pub fn secret(&self) -> Result<Token> {
        self.shared().config.token.read()
    }

    /// The hub's silence limit: a lease is valid this long.
    pub fn dead_after(&self) -> Duration {
        self.shared().dead_after
    }

    /// Queues a message and does not wait. An error if the session is lost or the hub takes nothing.
    pub fn send(&self, message: &ToHub) -> Result<()> {
        self.shared().send(message)
    }

    /// Sends this rank's part of the gather `name` and returns every rank's, in rank order. All ranks of the job must
    /// call it with the same name, which may be used again when all have the answer. Ranks that left the job have empty
    /// parts.
    pub async fn gather(&self, name: &str, part: Bytes, deadline: Instant) -> Result<Vec<Bytes>> {
        let (reply, answer) = oneshot::channel();
        let shared = self.shared();
        let waiting = WaitingGather::new(&shared, name, reply)?;
        tracing::debug!(rank = shared.config.rank, name, "gathering");
        shared.send(&ToHub::Gather { name: name.to_owned(), part })?;
        let mut lost = shared.lost.subscribe();
        let result = tokio::select! {
            biased;
            answer = answer => answer.ok(),
            _ = lost.wait_for(Option::is_some) => None,
            () = tokio::time::sleep_until(deadline.into()) => Some(Err(Error::new(
                ErrorKind::Timeout,
                "gather from all ranks",
                format!("{name:?} is not complete; some rank never called it"),
            )
            .with(Key::Rank, self.rank()))),
        };
        drop(waiting);
        result.unwrap_or_else(|| Err(shared.lost_cause()))
    }

    /// Waits until every rank of the job has called it with the same name.
    pub async fn barrier(&self, name: &str, deadline: Instant) -> Result<()> {
        self.gather(name, Bytes::new(), deadline).await.map(drop)
    }

    /// From now on, delivers what the hub says about updates. There is one subscriber at a time: an earlier one hears
    /// nothing more. Without one, messages about updates are dropped.
    pub fn updates(&self) -> Updates {
        let (sender, messages) = mpsc::channel(INCOMING_MESSAGES);
        let shared = self.shared();
        *lock(&shared.subscriber) = Some(sender);
        Updates { messages, lease: shared.lease.subscribe(), lost: shared.lost.subscribe(), loss_told: false }
    }

    /// When the last answered heartbeat was sent.
    pub fn lease(&self) -> Instant {
        *self.shared().lease.borrow()
    }

    /// Whether the hub still counts this rank among the living, as far as this rank can know.
    pub fn lease_is_valid(&self) -> bool {
        let shared = self.shared();
        let lease = *shared.lease.borrow();
        shared.lost.borrow().is_none() && lease.elapsed() < shared.dead_after
    }

    /// Why the session has ended, if it has.
    pub fn lost(&self) -> Option<Error> {
        self.shared().lost.borrow().clone()
    }

    /// The ranks that have come back with a new session since this was last asked.
    pub(crate) fn take_returned(&self) -> BTreeSet<Rank> {
        std::mem::take(&mut lock(&self.shared().returned))
    }

    /// What the hub said last about this rank's worker.
    pub fn told_weights(&self) -> Option<Weights> {
        lock(&self.shared().told).clone()
    }

    /// Waits until the session has ended and says why.
    pub async fn until_lost(&self) -> Error {
        let shared = self.shared();
        let mut lost = shared.lost.subscribe();
        // The sender lives in `shared`, so the wait cannot fail.
        let _ = lost.wait_for(Option::is_some).await;
        shared.lost_cause()
    }

    /// Leaves in order: what was sent before still goes out. Other clones find the session lost.
    pub async fn close(self) {
        if self.send(&ToHub::Bye).is_ok() {
            // A hub that does not answer is not waited for.
            let _ = tokio::time::timeout(CLOSE_WAIT, self.until_lost()).await;
        }
    }
}

impl Live {
    fn start(config: SessionConfig, connected: connect::Connected) -> Self {
        let (outgoing, outgoing_queue) = mpsc::channel(OUTGOING_MESSAGES);
        let cancel = CancellationToken::new();
        let shared = Arc::new(Shared {
            config,
            outgoing,
            gathers: Mutex::default(),
            subscriber: Mutex::default(),
            told: Mutex::default(),
            returned: Mutex::default(),
            lease: watch::Sender::new(connected.greeted_at),
            lost: watch::Sender::new(None),
            heartbeat: connected.heartbeat,
            dead_after: connected.dead_after,
        });
        session_task::spawn(shared.clone(), connected, outgoing_queue, cancel.clone());
        Self { shared, _ends_when_replaced: cancel.drop_guard() }
    }
}

/// What the hub says about updates; from [`Session::updates`].
#[derive(Debug)]
pub struct Updates {
    messages: mpsc::Receiver<ToRank>,
    lease: watch::Receiver<Instant>,
    lost: watch::Receiver<Option<Error>>,
    loss_told: bool,
}

impl Updates {
    /// The next event. Cancel safe. Waits for ever after [`SessionEvent::HubLost`], and in a subscription that a later
    /// one has replaced.
    pub async fn next(&mut self) -> SessionEvent {
        if self.loss_told {
            std::future::pending::<()>().await;
        }
        tokio::select! {
            biased;
            Some(message) = self.messages.recv() => SessionEvent::Message(message),
            lost = self.lost.wait_for(Option::is_some) => {
                let cause = lost.ok().and_then(|cause| cause.clone()).unwrap_or_else(session_dropped);
                // A message may have come in between the first branch and this one.
                if let Ok(message) = self.messages.try_recv() {
                    return SessionEvent::Message(message);
                }
                self.loss_told = true;
                SessionEvent::HubLost { cause }
            }
            Ok(()) = self.lease.changed() => {
                SessionEvent::LeaseRenewed { sent_at: *self.lease.borrow_and_update() }
            }
        }
    }
}

/// The cause of a session that ended because its owner dropped it.
pub(super) fn session_dropped() -> Error {
    Error::new(ErrorKind::Aborted, "talk to the hub", "this rank has closed its session")
}

/// A gather waits for each name at most once.
struct WaitingGather<'a> {
    shared: &'a Shared,
    name: &'a str,
}

impl<'a> WaitingGather<'a> {
    fn new(shared: &'a Shared, name: &'a str, reply: oneshot::Sender<Result<Vec<Bytes>>>) -> Result<Self> {
        let mut gathers = lock(&shared.gathers);
        if gathers.contains_key(name) {
            return Err(Error::new(
                ErrorKind::Internal,
                "gather from all ranks",
                format!("{name:?} is already being gathered; wait for its answer first"),
            ));
        }
        gathers.insert(name.to_owned(), reply);
        Ok(Self { shared, name })
    }
}

impl Drop for WaitingGather<'_> {
    fn drop(&mut self) {
        lock(&self.shared.gathers).remove(self.name);
    }
}

/// What handles and the session's task share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: SessionConfig,
    outgoing: mpsc::Sender<Outgoing>,
    gathers: Mutex<HashMap<String, oneshot::Sender<Result<Vec<Bytes>>>>>,
    subscriber: Mutex<Option<mpsc::Sender<ToRank>>>,
    told: Mutex<Option<Weights>>,
    returned: Mutex<BTreeSet<Rank>>,
    lease: watch::Sender<Instant>,
    lost: watch::Sender<Option<Error>>,
    pub(super) heartbeat: Duration,
    pub(super) dead_after: Duration,
}

/// What the writer takes from its queue.
#[derive(Debug)]
pub(super) enum Outgoing {
    /// A frame.
    Frame(Bytes),
    /// The last frame.
    Last(Bytes),
}

impl Shared {
    fn send(&self, message: &ToHub) -> Result<()> {
        if self.lost.borrow().is_some() {
            return Err(self.lost_cause());
        }
        let frame = encode(message, FRAME_BYTES)?;
        let frame =
            if matches!(message, ToHub::Bye) { Outgoing::Last(frame) } else { Outgoing::Frame(frame) };
        self.outgoing.try_send(frame).map_err(|error| match error {
            mpsc::error::TrySendError::Closed(_) => self.lost_cause(),
            mpsc::error::TrySendError::Full(_) => Error::new(
                ErrorKind::ResourceExhausted,
                "talk to the hub",
                format!("{OUTGOING_MESSAGES} messages wait already; rank 0 takes none"),
            )
            .with(Key::Peer, &self.config.address),
        })
    }

    pub(super) fn lost_cause(&self) -> Error {
        self.lost.borrow().clone().unwrap_or_else(session_dropped)
    }

    /// Ends the session; the first cause stays.
    pub(super) fn lose(&self, cause: Error) {
        self.lost.send_if_modified(|lost| {
            let first = lost.is_none();
            lost.get_or_insert(cause);
            first
        });
    }

    pub(super) fn renew_lease(&self, sent_at: Instant) {
        self.lease.send_replace(sent_at);
    }

    /// Hands a message to whoever waits for it; an error if this rank's own driver is stuck.
    pub(super) fn deliver(&self, message: ToRank) -> Result<()> {
        match message {
            ToRank::Gathered { name, parts } => self.answer_gather(&name, Ok(parts)),
            ToRank::GatherFailed { name, cause } => self.answer_gather(&name, Err(cause)),
            ToRank::Refused { cause } => return Err(cause),
            ToRank::Welcome { .. } | ToRank::Alive => {}
            ToRank::Weights(weights) => *lock(&self.told) = Some(weights),
            ToRank::Returned { rank } => drop(lock(&self.returned).insert(rank)),
            ToRank::Begin { .. }
            | ToRank::Go { .. }
            | ToRank::AllOpened { .. }
            | ToRank::Committed { .. }
            | ToRank::Closed { .. }
            | ToRank::Abort { .. } => {
                let subscriber = lock(&self.subscriber);
                let Some(sender) = subscriber.as_ref() else { return Ok(()) };
                match sender.try_reserve() {
                    Ok(place) => place.send(message),
                    // The update is over for this rank's driver.
                    Err(mpsc::error::TrySendError::Closed(())) => {}
                    Err(mpsc::error::TrySendError::Full(())) => {
                        return Err(Error::new(
                            ErrorKind::Internal,
                            "hear from the hub",
                            format!("this rank has left {INCOMING_MESSAGES} messages unread"),
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    fn answer_gather(&self, name: &str, answer: Result<Vec<Bytes>>) {
        if let Some(reply) = lock(&self.gathers).remove(name) {
            // The caller may have given up at this moment.
            let _ = reply.send(answer);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Maps and options stay whole whatever happened to the last holder.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
