//! The engine's lane: pauses the engine, tells it, and lets it go on again when that is safe.
//!
//! Workers learn their endpoints from the engine's request only, so an engine that is paused before the request is
//! paused before its first bucket.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    Event,
    driver::EngineCall,
    trace::{Stage, Trace},
};
use crate::{
    deadlines::Deadlines,
    engine::{EngineRequest, PauseMode},
    error::{ErrorKind, Key, Result},
    types::Rank,
};

/// What the end of an attempt means for its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Decided, and all went well.
    Well,
    /// No worker was given a bucket: the old weights are whole.
    Untouched,
    /// Decided, and something failed afterwards, here or elsewhere.
    AfterCommit,
    /// Old and new weights may be mixed.
    Mixed {
        /// The user wants it to serve all the same.
        leave: bool,
    },
}

#[derive(Debug, Default)]
struct State {
    /// It was asked to pause, so it may be paused.
    asked: AtomicBool,
    /// Its request is on the way.
    sent: AtomicBool,
    /// Its request ended well.
    done: AtomicBool,
    /// It was found dead or silent.
    lost: AtomicBool,
}

/// For an engine that was found dead or silent to be resumed: it may only have been cut off, and finding out once more
/// that it is silent would take as long as it did the first time.
const LAST_TRY: Duration = Duration::from_secs(1);

/// For one request that resumes an engine, of which several may be sent until the deadline: resuming twice does no harm.
const RESUME_TRY: Duration = Duration::from_secs(10);

pub(super) struct EngineLane {
    call: EngineCall,
    rank: Rank,
    state: Arc<State>,
    task: JoinHandle<()>,
}

impl EngineLane {
    pub(super) fn spawn(
        call: EngineCall,
        request: EngineRequest,
        pause: Option<PauseMode>,
        deadlines: Deadlines,
        rank: Rank,
        trace: Trace,
        events: mpsc::UnboundedSender<Event>,
    ) -> Self {
        let state = Arc::<State>::default();
        let ready = Instant::now() + deadlines.ready;
        let over = Instant::now() + deadlines.total;
        let (engine, told_of) = (call.engine.clone(), state.clone());
        let task = tokio::spawn(async move {
            let asking = trace.begin(Stage::Engine, None);
            let told = async {
                let pausing = trace.begin(Stage::Pause, None);
                engine.ready(ready).await?;
                let paused = match pause {
                    None => false,
                    Some(mode) => {
                        told_of.asked.store(true, Ordering::Release);
                        engine.pause(mode, ready).await?
                    }
                };
                if !paused {
                    told_of.asked.store(false, Ordering::Release);
                    say_that_it_serves(engine.name(), pause);
                }
                pausing.end();
                told_of.sent.store(true, Ordering::Release);
                engine.update(&request, over).await
            };
            let event = match told.await {
                Ok(()) => {
                    told_of.done.store(true, Ordering::Release);
                    asking.end();
                    Event::EngineDone
                }
                Err(cause) => {
                    told_of.lost.store(cause.kind() == ErrorKind::PeerLost, Ordering::Release);
                    Event::Failed { cause: cause.with(Key::Rank, rank) }
                }
            };
            let _ = events.send(event);
        });
        Self { call, rank, state, task }
    }

    /// Ends the request, and resumes the engine unless its weights may be mixed. The error is that of resuming it.
    pub(super) async fn end(mut self, verdict: Verdict, deadlines: Deadlines) -> Result<()> {
        let busy = self.state.sent.load(Ordering::Acquire) || self.state.asked.load(Ordering::Acquire);
        let patience = if busy { patience(verdict, &deadlines) } else { Duration::ZERO };
        if tokio::time::timeout(patience, &mut self.task).await.is_err() {
            // Its worker was told to raise; its answer says nothing new.
            self.task.abort();
        }
        if !self.state.asked.load(Ordering::Acquire) {
            return Ok(());
        }
        let done = self.state.done.load(Ordering::Acquire);
        let (engine, rank) = (&self.call.engine, self.rank);
        match verdict {
            Verdict::Well | Verdict::Untouched => {}
            Verdict::AfterCommit if done => {}
            Verdict::Mixed { leave: true } => {
                tracing::warn!(
                    rank,
                    engine = engine.name(),
                    "the engine serves again with weights that may be mixed"
                );
            }
            Verdict::AfterCommit | Verdict::Mixed { leave: false } => {
                tracing::warn!(
                    rank,
                    engine = engine.name(),
                    "the engine stays paused: its weights may be mixed; the next update that succeeds resumes it"
                );
                return Ok(());
            }
        }
        let lost = self.state.lost.load(Ordering::Acquire);
        let limit = if lost { LAST_TRY } else { deadlines.release };
        let over = Instant::now() + limit;
        loop {
            let attempt = over.min(Instant::now() + RESUME_TRY);
            match engine.resume(attempt).await {
                // A connection that went dead without a word; another one may be answered.
                Err(error) if error.kind() == ErrorKind::Timeout && attempt < over => {
                    tracing::warn!(%error, rank, "resuming the engine is tried again");
                }
                resumed => return resumed.map_err(|e| e.with(Key::Rank, rank)),
            }
        }
    }
}

/// How long the engine's own answer is worth waiting for. After a failure it says that the engine is free again, which
/// the next update, or going back to the last version, needs.
fn patience(verdict: Verdict, deadlines: &Deadlines) -> Duration {
    if verdict == Verdict::Well { deadlines.release } else { deadlines.abort }
}

/// Once a process is enough.
fn say_that_it_serves(engine: &'static str, pause: Option<PauseMode>) {
    static SAID: AtomicBool = AtomicBool::new(false);
    if SAID.swap(true, Ordering::Relaxed) {
        return;
    }
    let why = if pause.is_some() { "it cannot be paused" } else { "pausing is off" };
    tracing::warn!(engine, why, "the engine serves during updates: answers may come from mixed weights");
}
