//! The hub's one task: feeds the [`HubMachine`] and sends what it says.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::{
    io::AsyncWriteExt,
    sync::{mpsc, oneshot},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    codec::{BoxWrite, FRAME_BYTES, Receiver, encode},
    hub_machine::{HubConfig, HubMachine},
    journal::Journal,
    message::{Hello, ToHub, ToRank},
    server::{HubOptions, HubStatus},
    server_gate::refuse,
};
use crate::{
    error::{Error, ErrorKind, Key, Recovery, Result},
    types::Rank,
};

/// Messages that may wait for one rank. A rank that leaves more unread is stuck and is given up: the hub never waits.
const QUEUED_MESSAGES: usize = 512;
/// For the last messages of a connection that is being closed.
const LINGER: Duration = Duration::from_secs(1);

/// What the hub's task is told.
pub(super) enum Input {
    /// A connection passed the gate.
    Arrived { hello: Hello, receiver: Receiver, write: BoxWrite },
    /// A rank said something.
    Message { connection: u64, rank: Rank, message: ToHub },
    /// A rank's connection ended.
    Ended { connection: u64, rank: Rank, cause: Error },
    /// Somebody in this process asks.
    Status(oneshot::Sender<HubStatus>),
}

/// A rank's live connection.
struct Connection {
    id: u64,
    outgoing: mpsc::Sender<Bytes>,
    /// Ends the reader at once and the writer after [`LINGER`].
    ended: CancellationToken,
    /// It said goodbye.
    left: bool,
}

/// The last gather's answer, encoded once for all ranks.
struct EncodedGather {
    name: String,
    parts: Vec<Bytes>,
    frame: Bytes,
}

pub(super) struct Core {
    options: HubOptions,
    machine: HubMachine,
    journal: Journal,
    connections: BTreeMap<Rank, Connection>,
    next_connection: u64,
    encoded_gather: Option<EncodedGather>,
    start: Instant,
    inputs: mpsc::Sender<Input>,
    tasks: TaskTracker,
}

impl Core {
    pub(super) fn new(
        options: HubOptions,
        inputs: mpsc::Sender<Input>,
        tasks: TaskTracker,
        journal: Journal,
    ) -> Self {
        let machine = HubMachine::new(HubConfig::new(options.world_size, options.deadlines))
            .going_on(Journal::first_epoch(), journal.decisions());
        Self {
            options,
            machine,
            journal,
            connections: BTreeMap::new(),
            next_connection: 0,
            encoded_gather: None,
            start: Instant::now(),
            inputs,
            tasks,
        }
    }

    pub(super) async fn run(mut self, mut queue: mpsc::Receiver<Input>, cancel: CancellationToken) {
        loop {
            // At least once a heartbeat, so that the machine can tell a hub that was stopped from ranks that are silent.
            let tick = Instant::now() + self.options.deadlines.heartbeat;
            let wake = self.machine.poll_timeout().map_or(tick, |at| tick.min(self.start + at));
            let input = tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                input = queue.recv() => input,
                () = tokio::time::sleep_until(wake.into()) => None,
            };
            match input {
                Some(input) => self.handle(input),
                None => {
                    let late = Instant::now().saturating_duration_since(wake);
                    if late > self.options.deadlines.dead_after / 2 {
                        tracing::warn!(?late, "the hub's process did not run for a while");
                    }
                    let now = self.now();
                    self.machine.handle_timeout(now);
                }
            }
            self.send_all();
        }
        let cause =
            // In order: nobody need wait for another rank 0.
            Error::new(ErrorKind::PeerLost, "talk to the hub", "the hub was shut down: rank 0 has ended")
                .recovery_is(Recovery::Fatal);
        for rank in self.connections.keys().copied().collect::<Vec<_>>() {
            self.close(rank, Some(cause.clone()));
        }
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn handle(&mut self, input: Input) {
        let now = self.now();
        match input {
            Input::Arrived { hello, receiver, write } => self.arrive(hello, receiver, write),
            Input::Message { connection, rank, message } => {
                let Some(live) = self.connections.get_mut(&rank).filter(|live| live.id == connection) else {
                    return;
                };
                live.left |= matches!(message, ToHub::Bye);
                if matches!(message, ToHub::Hello(_)) {
                    let cause =
                        Error::new(ErrorKind::Corrupt, "talk to a rank", "it greeted twice in one session");
                    self.drop_rank(rank, cause.with(Key::Rank, rank));
                } else {
                    self.machine.handle(rank, message, now);
                }
            }
            Input::Ended { connection, rank, cause } => {
                if self.connections.get(&rank).is_some_and(|live| live.id == connection) {
                    self.close(rank, None);
                    self.machine.disconnected(rank, cause, now);
                }
            }
            Input::Status(reply) => {
                let status = HubStatus {
                    job: self.options.job.clone(),
                    world_size: self.options.world_size,
                    ranks: self.machine.members(),
                    attempts: self.machine.attempts(),
                };
                // Who asked may have gone.
                let _ = reply.send(status);
            }
        }
    }

    fn arrive(&mut self, hello: Hello, receiver: Receiver, write: BoxWrite) {
        let (rank, host, pid) = (hello.rank, hello.host.clone(), hello.pid);
        if let Err(cause) = self.machine.connected(rank, hello, self.now()) {
            tracing::warn!(rank, host, pid, %cause, "refused a rank");
            let live = self.connections.contains_key(&rank);
            // The live one may be a predecessor whose death has not been noticed yet.
            let cause = if live { cause.recovery_is(Recovery::Retry) } else { cause };
            self.tasks.spawn(refuse(write, cause));
            return;
        }
        tracing::debug!(rank, host, pid, "a rank has joined the job");
        let id = self.next_connection;
        self.next_connection += 1;
        let (outgoing, frames) = mpsc::channel(QUEUED_MESSAGES);
        let ended = CancellationToken::new();
        self.tasks.spawn(write_frames(write, frames, ended.clone()));
        let inputs = self.inputs.clone();
        let reader = read_messages(receiver, inputs, Peer { connection: id, rank, host, pid });
        self.tasks.spawn(ended.clone().run_until_cancelled_owned(reader));
        self.connections.insert(rank, Connection { id, outgoing, ended, left: false });
    }

    /// Sends all that the machine has to say. Ends: each round after the first has lost a connection.
    fn send_all(&mut self) {
        // Before anybody hears of a commit: a hub that is started after this one died must know of it.
        if let Some(decisions) = self.machine.poll_decisions() {
            self.journal.write(&decisions);
        }
        loop {
            let mut stuck = Vec::new();
            while let Some((rank, message)) = self.machine.poll_message() {
                // Messages to a rank without a connection come from before its end was known.
                let Some(frame) = self.encode(message) else { continue };
                let Some(live) = self.connections.get(&rank) else { continue };
                if let Err(mpsc::error::TrySendError::Full(_)) = live.outgoing.try_send(frame) {
                    stuck.push(rank);
                }
            }
            while let Some(rank) = self.machine.poll_close() {
                let left = self.connections.get(&rank).is_some_and(|live| live.left);
                let silent = || {
                    Error::new(
                        ErrorKind::PeerLost,
                        "talk to the hub",
                        format!(
                            "the hub heard nothing of rank {rank} for {:.1?} and holds it dead",
                            self.options.deadlines.dead_after
                        ),
                    )
                };
                let cause = (!left).then(silent);
                self.close(rank, cause);
            }
            self.encoded_gather = None;
            if stuck.is_empty() {
                return;
            }
            for rank in stuck {
                let message = format!("it left {QUEUED_MESSAGES} messages unread");
                let cause = Error::new(ErrorKind::PeerLost, "talk to a rank", message).with(Key::Rank, rank);
                self.drop_rank(rank, cause);
            }
        }
    }

    /// Gives a rank up.
    fn drop_rank(&mut self, rank: Rank, cause: Error) {
        if self.connections.contains_key(&rank) {
            tracing::warn!(rank, %cause, "gave a rank up");
            self.close(rank, Some(cause.clone()));
            let now = self.now();
            self.machine.disconnected(rank, cause, now);
        }
    }

    /// Closes a rank's connection after what is queued for it, and `farewell`.
    fn close(&mut self, rank: Rank, farewell: Option<Error>) {
        let Some(live) = self.connections.remove(&rank) else { return };
        if let Some(cause) = farewell
            && let Ok(frame) = encode(&ToRank::Refused { cause }, FRAME_BYTES)
        {
            // A full queue belongs to a rank that reads nothing anyway.
            let _ = live.outgoing.try_send(frame);
        }
        live.ended.cancel();
    }

    fn encode(&mut self, message: ToRank) -> Option<Bytes> {
        if let (ToRank::Gathered { name, parts }, Some(last)) = (&message, &self.encoded_gather)
            && *name == last.name
            && same_memory(parts, &last.parts)
        {
            return Some(last.frame.clone());
        }
        let frame = encode(&message, FRAME_BYTES).or_else(|error| match &message {
            ToRank::Gathered { name, .. } => {
                encode(&ToRank::GatherFailed { name: name.clone(), cause: error }, FRAME_BYTES)
            }
            _ => Err(error),
        });
        let frame = match frame {
            Ok(frame) => frame,
            Err(error) => {
                tracing::error!(%error, "a message of the hub cannot be sent");
                return None;
            }
        };
        if let ToRank::Gathered { name, parts } = message {
            self.encoded_gather = Some(EncodedGather { name, parts, frame: frame.clone() });
        }
        Some(frame)
    }
}

/// Whether two lists hold the same bytes in the same places; cheaper than comparing megabytes.
fn same_memory(a: &[Bytes], b: &[Bytes]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.as_ptr() == b.as_ptr() && a.len() == b.len())
}

async fn write_frames(mut io: BoxWrite, mut frames: mpsc::Receiver<Bytes>, ended: CancellationToken) {
    let write = async {
        while let Some(frame) = frames.recv().await {
            io.write_all(&frame).await?;
            io.flush().await?;
        }
        io.shutdown().await
    };
    let give_up = async {
        ended.cancelled().await;
        tokio::time::sleep(LINGER).await;
    };
    tokio::select! {
        // A broken connection is also seen, and reported, by the reader.
        _ = write => {}
        () = give_up => {}
    }
}

struct Peer {
    connection: u64,
    rank: Rank,
    host: String,
    pid: u32,
}

async fn read_messages(mut receiver: Receiver, inputs: mpsc::Sender<Input>, peer: Peer) {
    let Peer { connection, rank, host, pid } = peer;
    let end: Result<(), Error> = loop {
        match receiver.next::<ToHub>().await {
            Ok(message) => {
                if inputs.send(Input::Message { connection, rank, message }).await.is_err() {
                    break Ok(());
                }
            }
            Err(error) => {
                let message = format!("rank {rank} is lost: {error}");
                break Err(Error::new(ErrorKind::PeerLost, "talk to a rank", message)
                    .with(Key::Rank, rank)
                    .with(Key::Host, host)
                    .with(Key::Pid, pid));
            }
        }
    };
    if let Err(cause) = end {
        // If the hub's task is gone, nobody needs to know.
        let _ = inputs.send(Input::Ended { connection, rank, cause }).await;
    }
}
