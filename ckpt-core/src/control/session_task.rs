//! The two halves of a session's connection: what goes out with heartbeats in between, and what comes in.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::{io::AsyncWriteExt, sync::mpsc, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::{
    codec::{BoxWrite, FRAME_BYTES, ReceiveError, Receiver, encode},
    connect::Connected,
    message::{ToHub, ToRank},
    session::{Outgoing, Shared, session_dropped},
};
use crate::error::{Error, ErrorKind, Key, Result};

/// For last words: of the hub, when the connection cannot be written any more, and of a session that was dropped.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// When the heartbeats that wait for an answer were sent. The hub answers in order.
type Unanswered = Arc<Mutex<VecDeque<Instant>>>;

/// Runs the connection until it breaks or `cancel` says that nobody needs it.
pub(super) fn spawn(
    shared: Arc<Shared>,
    connected: Connected,
    outgoing: mpsc::Receiver<Outgoing>,
    cancel: CancellationToken,
) {
    let unanswered = Unanswered::default();
    tokio::spawn(async move {
        // The cause is there before the others are dropped: a call that finds the writer gone must find it.
        let lose = |end: Error| {
            tracing::debug!(rank = shared.config.rank, %end, "the session has ended");
            shared.lose(end);
        };
        tokio::select! {
            biased;
            () = async { lose(read(&shared, connected.receiver, &unanswered).await) } => {}
            () = async { lose(write(&shared, connected.writer, outgoing, &unanswered, &cancel).await) } => {}
            // The writer goes by itself, unless the hub takes nothing.
            () = async {
                cancel.cancelled().await;
                tokio::time::sleep(LAST_WORDS).await;
                lose(session_dropped());
            } => {}
        }
    });
}

async fn write(
    shared: &Shared,
    mut io: BoxWrite,
    mut outgoing: mpsc::Receiver<Outgoing>,
    unanswered: &Unanswered,
    cancel: &CancellationToken,
) -> Error {
    let alive = match encode(&ToHub::Alive, FRAME_BYTES) {
        Ok(frame) => frame,
        Err(error) => return error,
    };
    let mut beat = tokio::time::interval(shared.heartbeat);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The hub may have said its last words before it went: `read` takes them first and then finds the end itself.
    let broken = async |e: std::io::Error| {
        tokio::time::sleep(LAST_WORDS).await;
        hub_lost(shared, &format!("the connection broke: {e}"))
    };
    loop {
        let frame: Bytes = tokio::select! {
            biased;
            _ = beat.tick() => {
                // Before the write: the lease must not count from a later moment than the hub's own clock does.
                unanswered.lock().unwrap_or_else(PoisonError::into_inner).push_back(Instant::now());
                alive.clone()
            }
            Some(next) = outgoing.recv() => match next {
                Outgoing::Frame(frame) => frame,
                Outgoing::Last(frame) => {
                    if let Err(e) = async { io.write_all(&frame).await?; io.shutdown().await }.await {
                        return broken(e).await;
                    }
                    // The hub closes its half in answer, which ends `read`.
                    return std::future::pending().await;
                }
            },
            // Comes last: what was queued before the session was dropped, such as a failure, still goes out.
            () = cancel.cancelled() => {
                let _ = io.shutdown().await;
                return session_dropped();
            }
        };
        let written = async {
            io.write_all(&frame).await?;
            io.flush().await
        };
        if let Err(e) = written.await {
            return broken(e).await;
        }
    }
}

async fn read(shared: &Shared, mut receiver: Receiver, unanswered: &Unanswered) -> Error {
    let heard = receiver.heard();
    loop {
        let silent_at = heard.at() + shared.dead_after;
        let message: Result<ToRank, ReceiveError> = tokio::select! {
            // What is in the socket comes first: a process that slept has it there.
            biased;
            message = receiver.next() => message,
            () = tokio::time::sleep_until(silent_at.into()) => {
                if heard.at() + shared.dead_after <= Instant::now() {
                    return hub_lost(shared, &format!("it was silent for {:.1?}", shared.dead_after));
                }
                continue;
            }
        };
        match message {
            Ok(ToRank::Alive) => {
                let sent_at = unanswered.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                match sent_at {
                    Some(sent_at) => shared.renew_lease(sent_at),
                    None => return hub_lost(shared, "it answered a heartbeat that was never sent"),
                }
            }
            Ok(message) => {
                if let Err(error) = shared.deliver(message) {
                    return error;
                }
            }
            Err(ReceiveError::Closed) => {
                return hub_lost(shared, "rank 0 closed the connection; it has ended or was killed");
            }
            Err(error) => return hub_lost(shared, &error.to_string()),
        }
    }
}

fn hub_lost(shared: &Shared, what: &str) -> Error {
    Error::new(ErrorKind::PeerLost, "talk to the hub", format!("the hub on rank 0 is lost: {what}"))
        .with(Key::Peer, &shared.config.address)
}
