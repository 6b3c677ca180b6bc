//! The event of a batch that went to the devices at once. Nothing runs for it but the devices and who waits for it, until
//! something fails: then a task takes it over.

use std::{
    any::Any,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use ckpt_core::{
    Result,
    device::{Event, EventState},
};

use crate::{
    connection::Connection,
    ending::{Completion, Ended},
    lane::Batch,
    mover::{self, Flight, Job},
    node::{Node, Peer},
};

/// Who waits for a batch of at most so many bytes polls the device itself for a while: being woken takes longer.
const POLLED_BYTES: u64 = 64 << 10;
const POLLED_TIME: Duration = Duration::from_micros(200);

pub(crate) fn event(node: Arc<Node>, peer: Peer, job: Job, flight: Flight, deadline: Instant) -> Event {
    let bytes: u64 = job.transfers.iter().map(|(transfer, _)| transfer.memory.len_bytes()).sum();
    let Flight { connection, batch } = flight;
    let small = bytes <= POLLED_BYTES;
    if !small {
        connection.attend();
    }
    let (unattended, completion) = (Mutex::new(Some((peer, job))), OnceLock::new());
    Event::new(Flying { node, connection, batch, small, deadline, unattended, completion })
}

struct Flying {
    node: Arc<Node>,
    connection: Arc<Connection>,
    batch: Arc<Batch>,
    small: bool,
    deadline: Instant,
    /// Until a task has it.
    unattended: Mutex<Option<(Peer, Job)>>,
    /// What that task tells. Made when it is needed.
    completion: OnceLock<Arc<Completion>>,
}

impl std::fmt::Debug for Flying {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flying").field("batch", &self.batch).finish_non_exhaustive()
    }
}

impl Flying {
    /// Hands the batch to a task, which tries again what failed and keeps the deadline. Answers what the task tells.
    fn attend(&self) -> &Completion {
        let mut unattended = self.unattended.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((peer, job)) = unattended.take() else {
            // Whoever took it made it, under this lock.
            return self.completion.get_or_init(Arc::default);
        };
        let completion = self.completion.get_or_init(|| Arc::new(Completion::new(job.way.operation())));
        let ended = Ended(completion.clone());
        let flight = Flight { connection: self.connection.clone(), batch: self.batch.clone() };
        let (node, deadline) = (self.node.clone(), self.deadline);
        self.node.runtime.spawn(async move {
            let outcome = mover::drive(&node, peer, job, Some(flight), deadline).await;
            ended.0.complete(outcome);
        });
        completion
    }

    /// Polls for a short while; whether all has arrived.
    fn arrives_soon(&self) -> bool {
        /// Looks for each look at the clock, which may cost more than they do.
        const LOOKS: u32 = 16;
        let mut until = None;
        loop {
            for _ in 0..LOOKS {
                self.connection.help();
                match self.batch.arrived() {
                    Ok(false) => std::hint::spin_loop(),
                    outcome => return outcome.is_ok(),
                }
            }
            let now = Instant::now();
            if now >= *until.get_or_insert(now + POLLED_TIME) {
                return false;
            }
        }
    }

    fn look(&self) -> Result<bool> {
        if let Some(outcome) = self.completion.get().and_then(|completion| completion.outcome.get()) {
            return outcome.clone().map(|()| true);
        }
        self.connection.help();
        match self.batch.arrived() {
            Ok(true) => return Ok(true),
            Ok(false) if Instant::now() < self.deadline && !self.connection.lost.is_cancelled() => {}
            _ => {
                self.attend();
            }
        }
        Ok(false)
    }
}

/// Hands the batch to a task when whoever waits stops before it has arrived, also when it is dropped: somebody must keep
/// the batch's deadline and see that its owner is gone.
struct Leaving<'a>(Option<&'a Flying>);

impl Leaving<'_> {
    /// All has arrived.
    fn in_peace(mut self) {
        self.0 = None;
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if let Some(flying) = self.0 {
            flying.attend();
        }
    }
}

#[async_trait]
impl EventState for Flying {
    fn is_complete(&self) -> Result<bool> {
        self.look()
    }

    fn done_now(&self) -> Option<Result<()>> {
        (self.small && self.arrives_soon()).then_some(Ok(()))
    }

    async fn done(&self, deadline: Instant) -> Result<()> {
        if self.look()? {
            return Ok(());
        }
        self.connection.attend();
        let leaving = Leaving(Some(self));
        let waited = async {
            tokio::select! {
                biased;
                arrived = self.batch.decided() => arrived,
                () = self.connection.lost.cancelled() => false,
            }
        };
        if let Ok(true) = tokio::time::timeout_at(self.deadline.min(deadline).into(), waited).await {
            leaving.in_peace();
            return Ok(());
        }
        drop(leaving);
        self.attend().done(deadline).await
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
