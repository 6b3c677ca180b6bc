//! When each stage is overdue, and what is said then.
//!
//! A rank's own limits come first; the hub's are longer by `dead_after`, and a rank waits for the hub longer still.
//! So whoever is nearest to the trouble names it.

use std::time::Duration;

use super::{OPERATION, Sink, Stage, UpdateMachine};
use crate::{
    deadlines::Deadlines,
    error::{Error, ErrorKind, Key},
    update::Rule,
};

/// How long a committed update may take until the hub closes it with or without the missing: release, post hook, and
/// the engine's answer, which waits for the slowest worker's two.
pub(crate) fn close_after(deadlines: &Deadlines) -> Duration {
    deadlines
        .release
        .saturating_mul(4)
        .saturating_add(deadlines.abort)
        .saturating_add(deadlines.dead_after.saturating_mul(2))
}

/// What is overdue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Overdue {
    Lease,
    Doubt,
    Join,
    Prepare,
    Go,
    Open,
    Exchange(u32),
    Ack(u32),
    Total,
    Decision,
    Release,
    PostHook,
    Engine,
    Settle,
    Close,
    Failing,
}

impl UpdateMachine {
    /// When [`UpdateMachine::handle_timeout`] must be called next; `None` once ended.
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.next_overdue().map(|(at, _)| at)
    }

    /// Ends what is overdue.
    pub fn handle_timeout(&mut self, now: Duration) {
        // Each overdue thing changes the stage or a clock; the bound only guards against a mistake in that.
        for _ in 0..8 {
            match self.next_overdue() {
                // A process that was stopped says so, and not that some bucket was slow.
                Some((at, _)) if at <= now && self.lease_is_over(now) => self.overdue(Overdue::Lease, now),
                Some((at, what)) if at <= now => self.overdue(what, now),
                _ => return,
            }
        }
    }

    pub(super) fn lease_end(&self) -> Duration {
        self.lease.saturating_add(self.config.deadlines.dead_after)
    }

    fn lease_is_over(&self, now: Duration) -> bool {
        self.stage < Stage::Loaded && self.keeps(Rule::Lease) && self.lease_end() <= now
    }

    fn next_overdue(&self) -> Option<(Duration, Overdue)> {
        let d = &self.config.deadlines;
        let after = |limit: Duration| self.since.saturating_add(limit);
        let total = self.begun.saturating_add(d.total);
        let slack = d.dead_after;
        let mut all: [Option<(Duration, Overdue)>; 5] = [None; 5];
        if self.stage < Stage::Loaded && self.keeps(Rule::Lease) {
            all[0] = Some((self.lease_end(), Overdue::Lease));
        }
        if self.stage < Stage::Loaded && self.stage != Stage::Joining {
            all[1] = Some((total, Overdue::Total));
        }
        match self.stage {
            Stage::Joining => {
                all[2] = self
                    .keeps(Rule::JoinDeadline)
                    .then(|| (after(d.join.saturating_add(slack)), Overdue::Join));
            }
            Stage::Preparing => {
                all[2] = self.keeps(Rule::ReadyDeadline).then(|| (after(d.ready), Overdue::Prepare));
            }
            Stage::Ready => {
                let at = self.begun.saturating_add(d.ready).saturating_add(slack.saturating_mul(2));
                all[2] = Some((at, Overdue::Go));
            }
            Stage::Moving => {
                // The engine has `ready` to answer; if it does not, its own message is the better one.
                if self.sink == Sink::Opening && self.keeps(Rule::ReadyDeadline) {
                    all[2] = Some((after(d.ready.saturating_add(slack)), Overdue::Open));
                }
                if self.keeps(Rule::BucketDeadline) {
                    all[3] = self.exchange_overdue();
                    all[4] = (self.published > self.acked)
                        .then(|| (self.published_at.saturating_add(d.bucket), Overdue::Ack(self.acked)));
                }
            }
            Stage::Loaded => {
                let lease = self.doubt_at.unwrap_or_else(|| self.lease_end());
                all[0] = self.keeps(Rule::Lease).then_some((lease, Overdue::Doubt));
                let decision = match self.reported {
                    Some(reported) => reported.saturating_add(slack),
                    None => total.saturating_add(slack),
                };
                all[2] = Some((decision, Overdue::Decision));
            }
            Stage::Releasing => {
                all[2] = self.keeps(Rule::ReleaseDeadline).then(|| (after(d.release), Overdue::Release));
            }
            Stage::PostHook => {
                all[2] = self.keeps(Rule::ReleaseDeadline).then(|| (after(d.release), Overdue::PostHook));
            }
            Stage::Engine => {
                let limit = d.release.saturating_mul(2);
                all[2] = self.keeps(Rule::ReleaseDeadline).then(|| (after(limit), Overdue::Engine));
            }
            Stage::Settling => all[2] = Some((after(d.abort.saturating_add(slack)), Overdue::Settle)),
            Stage::Finished => {
                let committed = self.committed.unwrap_or(self.since);
                let limit = close_after(d).saturating_add(slack.saturating_mul(2));
                all[2] = Some((committed.saturating_add(limit), Overdue::Close));
                all[0] = self.keeps(Rule::Lease).then(|| (self.lease_end(), Overdue::Close));
            }
            Stage::Failing => all[2] = Some((after(d.abort.saturating_add(slack)), Overdue::Failing)),
            Stage::Ended => {}
        }
        all.into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// The oldest bucket that is enqueued and not here yet. From the first bucket on that waits for an earlier one, any
    /// rank's worker can hold it up: its clock runs once all workers are there, and twice as long, so that the rank
    /// with the slow worker speaks first.
    fn exchange_overdue(&self) -> Option<(Duration, Overdue)> {
        let limit = self.config.deadlines.bucket;
        let bucket = (self.exchanged_count..self.written).find(|b| !self.exchanged[*b as usize])?;
        let since = self.written_at[bucket as usize].max(self.last_exchanged);
        let held = self.waits_for.iter().take(bucket as usize + 1).any(Option::is_some);
        let at = if held {
            since.max(self.all_opened?).saturating_add(limit.saturating_mul(2))
        } else {
            since.saturating_add(limit)
        };
        Some((at, Overdue::Exchange(bucket)))
    }

    fn overdue(&mut self, what: Overdue, now: Duration) {
        let d = self.config.deadlines;
        let within = |limit: Duration| format!("within {} s", limit.as_secs_f64());
        let rank = self.config.rank;
        let timeout =
            move |text: String| Error::new(ErrorKind::Timeout, OPERATION, text).with(Key::Rank, rank);
        let cause = match what {
            Overdue::Lease => {
                // Do not wait for its word either. Before Begin it must be awaited: it names no epoch, and the next
                // call could take it for its own.
                self.hub_settled |= self.epoch.is_some();
                timeout(format!(
                    "the hub on rank 0 has not answered {}; this rank stops, since the others may have gone on without it",
                    within(d.dead_after)
                ))
            }
            Overdue::Join => timeout(format!("not all ranks called update {}", within(d.join))),
            Overdue::Prepare => timeout(format!(
                "the engine, the ring and the communicator were not ready {}",
                within(d.ready)
            )),
            Overdue::Go => timeout(format!("not all ranks were ready {}", within(d.ready))),
            Overdue::Open => timeout(format!(
                "the worker did not map the ring {}; check that the engine was told this rank's endpoint",
                within(d.ready)
            )),
            Overdue::Exchange(b) => {
                timeout(format!("a bucket was not exchanged {}", within(d.bucket))).with(Key::Bucket, b)
            }
            Overdue::Ack(b) => {
                timeout(format!("the worker did not acknowledge a bucket {}", within(d.bucket)))
                    .with(Key::Bucket, b)
            }
            Overdue::Total => {
                let text = format!(
                    "the update was not loaded {} ({} of {} buckets were): {}",
                    within(d.total),
                    self.freed,
                    self.waits_for.len(),
                    self.pending()
                );
                timeout(text).with(Key::Bucket, self.freed)
            }
            Overdue::Doubt => {
                // A process that was stopped may have the decision in its socket: give it a moment to read.
                if self.doubt_at.is_none() {
                    self.doubt_at = Some(now.saturating_add(d.heartbeat));
                    return;
                }
                let cause = timeout("the hub on rank 0 went silent before it told its decision".into());
                return self.doubt(cause, now);
            }
            Overdue::Decision => {
                let cause = timeout("the hub on rank 0 did not tell its decision".into());
                return self.doubt(cause, now);
            }
            Overdue::Release => timeout(format!("the worker did not drop the ring {}", within(d.release))),
            Overdue::PostHook => timeout(format!("the worker's post hook did not end {}", within(d.release))),
            Overdue::Engine => timeout(format!(
                "the engine's update request did not end {} after its worker was through",
                within(d.release.saturating_mul(2))
            )),
            Overdue::Settle => return self.finish(now),
            Overdue::Close => {
                let cause =
                    timeout("the hub on rank 0 did not say that all ranks are through; this rank is".into());
                return self.end_committed(Some(cause), now);
            }
            Overdue::Failing => return self.end_failed(now),
        };
        self.fail(cause, now);
    }

    /// What an update that takes too long waits for.
    fn pending(&self) -> &'static str {
        match self.stage {
            Stage::Preparing => "this rank is not ready",
            Stage::Ready => "other ranks are not ready",
            _ if self.sink == Sink::Opening => {
                "the worker has not mapped the ring; check that the engine was told this rank's endpoint"
            }
            _ if self.all_opened.is_none() => "the worker of another rank has not mapped its ring",
            _ if self.published > self.acked => "the worker has the next bucket",
            _ => "the next bucket is not here",
        }
    }
}
