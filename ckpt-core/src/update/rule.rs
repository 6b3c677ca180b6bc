//! The rules that keep an update right, by name, so that a test can take each one away and see a law break.

/// One wait or check of the update machine or of the hub. `docs/mutation.md` says which law breaks without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    /// No byte moves before all members are ready with equal plans.
    MoveAfterGo,
    /// A ring range is written only after the local worker acked what was there.
    WriteAfterAck,
    /// The same on a rank without a worker: only after its own exchange of what was there.
    WriteAfterExchange,
    /// A bucket is published only after its bytes are in the ring.
    PublishAfterExchange,
    /// A bucket is published only after the previous one was acked.
    PublishAfterAck,
    /// The first bucket is published only after all members' workers mapped their rings: until then no worker is touched.
    PublishAfterAllOpened,
    /// Nothing is published from a poisoned epoch.
    PublishHealthy,
    /// A rank whose lease is over fences itself.
    Lease,
    /// Timeouts are handled before actions.
    TimeoutsFirst,
    /// Ring bytes are freed only after their worker acked them.
    FreeAfterAck,
    /// Loaded is said only after all acks.
    LoadedAfterAcks,
    /// The ring is withdrawn from the worker only after the commit.
    ReleaseAfterCommit,
    /// The post hook runs only after the ring is released.
    HookAfterRelease,
    /// Finished is said only after the post hook.
    FinishAfterHook,
    /// Finished is said only after the engine's request has ended.
    FinishAfterEngine,
    /// An engine that answers before its worker has been told to finish is an error.
    EngineEarly,
    /// The update ends only when the hub closed it.
    EndAfterClosed,
    /// The first cause of all ranks is reported, not this rank's own.
    FirstCause,
    /// An epoch is aborted once.
    AbortOnce,
    /// After Loaded this rank alone may not abort: the decision may have been taken.
    HoldAfterLoaded,
    /// After Loaded the loss of the hub is doubt, not failure.
    DoubtWithoutHub,
    /// Messages of another epoch change nothing.
    ForeignEpoch,
    /// The join deadline.
    JoinDeadline,
    /// The ready deadline.
    ReadyDeadline,
    /// The bucket deadline.
    BucketDeadline,
    /// The release deadline.
    ReleaseDeadline,
    /// Hub: Go only when all are ready.
    HubGoAfterAllReady,
    /// Hub: plans are compared before Go.
    HubComparesPlans,
    /// Hub: Committed only when all have loaded.
    HubCommitAfterAllLoaded,
    /// Hub: Closed only when all have finished.
    HubCloseAfterAllFinished,
    /// Hub: a rank that is silent for too long is dead.
    HubSilentIsDead,
    /// Hub: a symptom ("my link to a peer broke") waits a moment for its cause.
    HubSymptomsWait,
    /// Hub: a rank that has reported a failure cannot be committed while its failure is weighed.
    HubSuspectBlocksCommit,
    /// Hub: a rank is in one update at a time.
    HubOneUpdateAtATime,
}

impl Rule {
    /// Every rule.
    pub const ALL: &'static [Rule] = &[
        Rule::MoveAfterGo,
        Rule::WriteAfterAck,
        Rule::WriteAfterExchange,
        Rule::PublishAfterExchange,
        Rule::PublishAfterAck,
        Rule::PublishAfterAllOpened,
        Rule::PublishHealthy,
        Rule::Lease,
        Rule::TimeoutsFirst,
        Rule::FreeAfterAck,
        Rule::LoadedAfterAcks,
        Rule::ReleaseAfterCommit,
        Rule::HookAfterRelease,
        Rule::FinishAfterHook,
        Rule::FinishAfterEngine,
        Rule::EngineEarly,
        Rule::EndAfterClosed,
        Rule::FirstCause,
        Rule::AbortOnce,
        Rule::HoldAfterLoaded,
        Rule::DoubtWithoutHub,
        Rule::ForeignEpoch,
        Rule::JoinDeadline,
        Rule::ReadyDeadline,
        Rule::BucketDeadline,
        Rule::ReleaseDeadline,
        Rule::HubGoAfterAllReady,
        Rule::HubComparesPlans,
        Rule::HubCommitAfterAllLoaded,
        Rule::HubCloseAfterAllFinished,
        Rule::HubSilentIsDead,
        Rule::HubSymptomsWait,
        Rule::HubSuspectBlocksCommit,
        Rule::HubOneUpdateAtATime,
    ];
}
