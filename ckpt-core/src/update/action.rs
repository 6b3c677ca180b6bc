//! The machine's vocabulary: what it asks for and what it is told.

use std::time::Duration;

use crate::{
    control::{CommunicatorChoice, Member},
    error::Error,
    types::Epoch,
};

/// What the driver must do. Actions of different buckets overlap; completions come back as [`Event`]s.
#[derive(Clone, Debug)]
pub enum Action {
    /// Build plan and ring, join or reuse the communicator. Answered by [`Event::Prepared`].
    Prepare {
        /// The attempt.
        epoch: Epoch,
        /// All members.
        members: Vec<Member>,
        /// Which communicator.
        communicator: CommunicatorChoice,
    },
    /// Tell the hub that this rank is ready.
    SendReady {
        /// The attempt.
        epoch: Epoch,
        /// Digest of the plan.
        plan_digest: u64,
    },
    /// Send the engine's request, beside everything else. Answered by [`Event::EngineDone`].
    StartEngine,
    /// Hand the ring to the worker. Answered by [`Event::SinkOpened`].
    OpenSink,
    /// Tell the hub that the worker has mapped the ring (or that there is none).
    SendOpened {
        /// The attempt.
        epoch: Epoch,
    },
    /// Start H2D of this rank's own segments of the bucket; asked for only where it has some, and not always in plan
    /// order. No answer: the exchange follows on the device.
    Load {
        /// Index in the plan.
        bucket: u32,
    },
    /// Enqueue the bucket's group of broadcasts behind its loads. Answered by [`Event::Exchanged`] once the bytes are in
    /// this rank's ring and the communicator was seen healthy after that.
    Exchange {
        /// Index in the plan.
        bucket: u32,
    },
    /// Hand the bucket to the worker. Answered by [`Event::Acked`].
    Publish {
        /// Index in the plan.
        bucket: u32,
    },
    /// The bucket's ring bytes are free. No answer.
    Free {
        /// Index in the plan.
        bucket: u32,
    },
    /// Tell the hub that the worker has everything.
    SendLoaded {
        /// The attempt.
        epoch: Epoch,
    },
    /// Committed: have the worker drop the ring. Answered by [`Event::Released`].
    ReleaseSink,
    /// Free the ring; then run the worker's post hook. Answered by [`Event::PostHookDone`].
    RunPostHook,
    /// Tell the hub that this rank is through.
    SendFinished {
        /// The attempt.
        epoch: Epoch,
        /// What failed after the commit.
        failure: Option<Error>,
    },
    /// Tell the hub that this rank cannot go on.
    SendFailed {
        /// The attempt, if begun.
        epoch: Option<Epoch>,
        /// Why.
        cause: Error,
    },
    /// Poison the epoch, abort the communicator, make the worker raise. Answered by [`Event::AbortDone`].
    AbortLocal {
        /// The first cause.
        cause: Error,
    },
    /// The machine has ended.
    End(Outcome),
}

/// How an update ended on this rank.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Decided and in use here. `failure`: some rank's post hook failed after the decision.
    Committed {
        /// The first failure after the commit on any rank.
        failure: Option<Error>,
    },
    /// Nothing was decided; the worker was told to raise.
    Failed {
        /// The first cause.
        cause: Error,
    },
    /// This rank had loaded everything and lost the hub before it heard a decision.
    InDoubt {
        /// What happened to the hub.
        cause: Error,
    },
}

/// What the driver tells the machine.
#[derive(Clone, Debug)]
pub enum Event {
    /// From the hub.
    Begun {
        /// The attempt.
        epoch: Epoch,
        /// All members.
        members: Vec<Member>,
        /// Which communicator.
        communicator: CommunicatorChoice,
    },
    /// Answer to [`Action::Prepare`].
    Prepared {
        /// Digest of the plan.
        plan_digest: u64,
        /// `waits_for` of each bucket, in plan order.
        waits_for: Vec<Option<u32>>,
        /// The buckets that this rank brings bytes to: [`crate::plan::UpdatePlan::loads`].
        loads: Vec<u32>,
    },
    /// From the hub.
    Go {
        /// The attempt.
        epoch: Epoch,
    },
    /// The worker has mapped the ring.
    SinkOpened,
    /// From the hub: every member's worker has mapped its ring. Before that no worker is given a bucket.
    AllOpened {
        /// The attempt.
        epoch: Epoch,
    },
    /// The bucket is in this rank's ring, and nobody reads it out of this ring any more (a root whose bytes are pulled
    /// reports this only after the last puller).
    Exchanged {
        /// Index in the plan.
        bucket: u32,
    },
    /// The worker has taken the bucket.
    Acked {
        /// Index in the plan.
        bucket: u32,
    },
    /// From the hub.
    Committed {
        /// The attempt.
        epoch: Epoch,
    },
    /// The worker has dropped the ring.
    Released,
    /// The worker's post hook has run.
    PostHookDone,
    /// The engine's request ended well.
    EngineDone,
    /// From the hub.
    Closed {
        /// The attempt.
        epoch: Epoch,
        /// The first failure after the commit.
        failure: Option<Error>,
    },
    /// Some action of this rank failed (worker, engine, device, transport). A communicator that breaks after its last
    /// bucket was exchanged is not this update's failure: keep it for the next one.
    Failed {
        /// Why.
        cause: Error,
    },
    /// The hub aborted the attempt.
    HubAborted {
        /// The attempt, if begun.
        epoch: Option<Epoch>,
        /// The first cause.
        cause: Error,
    },
    /// The hub is gone.
    HubLost {
        /// Why.
        cause: Error,
    },
    /// The hub answered a heartbeat: the lease is renewed.
    LeaseRenewed {
        /// When the answered heartbeat was *sent*, on the machine's clock. The hub's own clock for this rank started
        /// later than that, so a lease counted from here ends before the hub gives the rank up.
        asked: Duration,
    },
    /// [`Action::AbortLocal`] is complete.
    AbortDone,
}
