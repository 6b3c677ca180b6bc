//! The event of a batch that went to the devices at once. Nothing runs for it but the devices and who waits for it, until
//! something fails: then a task takes it over.

use std::{
    any::Any,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use ckpt_core::{Result, device::EventState, transport::Way};

use crate::{
    batch::Batch,
    connection::{Connection, Reliance},
    ending::{Completion, Ended},
    mover,
    node::Node,
};

/// Who waits for a batch of at most so many bytes polls the device itself for a while: being woken takes longer.
const POLLED_BYTES: u64 = 64 << 10;
const POLLED_TIME: Duration = Duration::from_micros(200);

/// Whoever waits for a batch that went to the devices at once.
pub(crate) struct Flight {
    node: Arc<Node>,
    pub(crate) connection: Arc<Connection>,
    small: bool,
    deadline: Instant,
    /// Of a batch that is not small.
    _reliance: Option<Reliance>,
    /// For the task that takes it over.
    batch: Weak<Batch<Self>>,
    /// Such a task is there.
    attended: AtomicBool,
    /// What that task tells. Made when it is needed.
    completion: OnceLock<Arc<Completion>>,
}

/// A batch of so many parts and bytes that is about to go to the devices.
pub(crate) fn batch(
    node: &Arc<Node>,
    connection: Arc<Connection>,
    way: Way,
    parts: usize,
    bytes: u64,
    deadline: Instant,
) -> Arc<Batch<Flight>> {
    let small = bytes <= POLLED_BYTES;
    Arc::new_cyclic(|batch| {
        let waiter = Flight {
            node: node.clone(),
            small,
            deadline,
            _reliance: (!small).then(|| connection.rely()),
            connection,
            batch: batch.clone(),
            attended: AtomicBool::new(false),
            completion: OnceLock::new(),
        };
        Batch::new(way, parts, waiter)
    })
}

impl Batch<Flight> {
    /// Hands the batch to a task, which tries again what failed and keeps the deadline. Answers what the task tells.
    fn attend(&self) -> &Completion {
        let Flight { node, connection, deadline, .. } = &self.waiter;
        let completion =
            self.waiter.completion.get_or_init(|| Arc::new(Completion::new(self.way.operation())));
        // It is there: whoever calls this holds it.
        if !self.waiter.attended.swap(true, Ordering::SeqCst)
            && let Some(batch) = self.waiter.batch.upgrade()
        {
            let ended = Ended(completion.clone());
            let (node, connection, deadline) = (node.clone(), connection.clone(), *deadline);
            self.waiter.node.runtime.spawn(async move {
                let outcome = mover::go_on(&node, connection, batch, deadline).await;
                ended.0.complete(outcome);
            });
        }
        completion
    }

    /// Polls for a short while; whether all has arrived.
    fn arrives_soon(&self) -> bool {
        /// Looks for each look at the clock, which may cost more than they do.
        const LOOKS: u32 = 16;
        let mut until = None;
        loop {
            for _ in 0..LOOKS {
                self.waiter.connection.help();
                match self.arrived() {
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
        if let Some(outcome) = self.waiter.completion.get().and_then(|completion| completion.outcome.get()) {
            return outcome.clone().map(|()| true);
        }
        self.waiter.connection.look();
        match self.arrived() {
            Ok(true) => return Ok(true),
            Ok(false) if Instant::now() < self.waiter.deadline && !self.waiter.connection.lost.is_told() => {}
            _ => {
                self.attend();
            }
        }
        Ok(false)
    }
}

/// Hands the batch to a task when whoever waits stops before it has arrived, also when it is dropped: somebody must keep
/// the batch's deadline and see that its owner is gone.
struct Leaving<'a>(Option<&'a Batch<Flight>>);

impl Leaving<'_> {
    /// All has arrived.
    fn in_peace(mut self) {
        self.0 = None;
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if let Some(batch) = self.0 {
            batch.attend();
        }
    }
}

#[async_trait]
impl EventState for Batch<Flight> {
    fn is_complete(&self) -> Result<bool> {
        self.look()
    }

    fn done_now(&self) -> Option<Result<()>> {
        (self.waiter.small && self.arrives_soon()).then_some(Ok(()))
    }

    async fn done(&self, deadline: Instant) -> Result<()> {
        if self.look()? {
            return Ok(());
        }
        let _reliance = self.waiter.small.then(|| self.waiter.connection.rely());
        let leaving = Leaving(Some(self));
        let waited = async {
            tokio::select! {
                biased;
                arrived = self.decided() => arrived,
                () = self.waiter.connection.lost.told() => false,
            }
        };
        if let Ok(true) = tokio::time::timeout_at(self.waiter.deadline.min(deadline).into(), waited).await {
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
