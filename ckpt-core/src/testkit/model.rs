//! The physical world of one update: rings, links and workers, without time. It checks the laws as things happen.

mod links;

use std::{
    collections::BTreeSet,
    hash::{Hash, Hasher},
    ops::Range,
    sync::Arc,
};

use super::{Law, Skip, Violation};
use crate::{
    control::{ToHub, ToRank},
    error::Error,
    plan::UpdatePlan,
    types::Rank,
    update::{Action, Outcome},
};

/// How bytes get from a root's ring into the others'.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TransportModel {
    /// Two-sided; a root is done once its bytes have left.
    Eager,
    /// Two-sided; a root is done once all others have offered their ranges.
    Rendezvous,
    /// One-sided: the others read out of the root's ring.
    Pull,
}

/// The plan's ring ranges, cut into pieces that no bucket or segment divides further.
#[derive(Debug)]
struct Cells {
    count: usize,
    buckets: Vec<Range<usize>>,
    segments: Vec<Vec<(Rank, Range<usize>)>>,
    /// Pieces of each bucket that no segment covers.
    padding: Vec<Vec<usize>>,
}

impl Cells {
    fn new(plan: &UpdatePlan) -> Self {
        let mut cuts: Vec<u64> = plan
            .buckets
            .iter()
            .flat_map(|b| {
                let ends = [b.ring_offset, b.ring_offset + b.len_bytes];
                ends.into_iter()
                    .chain(b.segments.iter().flat_map(|s| [s.ring_offset, s.ring_offset + s.len_bytes]))
            })
            .collect();
        cuts.sort_unstable();
        cuts.dedup();
        let range = |from: u64, len: u64| {
            cuts.partition_point(|c| *c < from)..cuts.partition_point(|c| *c < from + len)
        };
        let buckets: Vec<Range<usize>> =
            plan.buckets.iter().map(|b| range(b.ring_offset, b.len_bytes)).collect();
        let segments: Vec<Vec<(Rank, Range<usize>)>> = plan
            .buckets
            .iter()
            .map(|b| b.segments.iter().map(|s| (s.root, range(s.ring_offset, s.len_bytes))).collect())
            .collect();
        let padding = buckets
            .iter()
            .zip(&segments)
            .map(|(b, parts)| b.clone().filter(|c| !parts.iter().any(|(_, part)| part.contains(c))).collect())
            .collect();
        Self { count: cuts.len(), buckets, segments, padding }
    }
}

/// Who may touch a piece of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Owner {
    Free,
    /// Offered to the device for this bucket; the bytes may change at any moment.
    Writing(u32),
    /// The bucket is there and its reader has not let go of it.
    Holds(u32),
    /// Its reader is through.
    Released(u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Cell {
    owner: Owner,
    /// The bucket whose right bytes these are; `None`: poison.
    bytes: Option<u32>,
}

/// One rank's part of the world.
#[derive(Clone, Debug, Hash)]
pub(crate) struct RankModel {
    pub has_worker: bool,
    pub starts_engine: bool,
    cells: Vec<Cell>,
    /// Buckets whose load and whose exchange were enqueued.
    loaded: BTreeSet<u32>,
    pub enqueued: u32,
    /// Buckets whose bytes have landed here, and whose events completed.
    pub received: u32,
    pub exchanged: u32,
    /// Whether what left this root for each bucket were the right bytes.
    sent_well: Vec<bool>,
    pub preparing: bool,
    pub opening: bool,
    pub opened: bool,
    pub publishing: Option<u32>,
    pub acked: u32,
    pub releasing: bool,
    pub released: bool,
    pub hook_running: bool,
    pub hook_done: bool,
    pub engine_running: bool,
    pub engine_done: bool,
    pub aborting: bool,
    /// AbortLocal was performed.
    pub aborted: bool,
    /// The link is broken: completions mean nothing any more.
    pub link_broken: bool,
    pub dead: bool,
    pub reported: bool,
    ready: Option<u64>,
    /// What the hub told this rank: the cause of an abort.
    pub abort_heard: Option<String>,
    pub commit_heard: bool,
    pub end: Option<End>,
    pub cause: Option<String>,
    actions: u32,
}

/// How a rank ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum End {
    Committed { well: bool },
    Failed,
    InDoubt,
}

/// The world of one update.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub plan: Arc<UpdatePlan>,
    cells: Arc<Cells>,
    pub transport: TransportModel,
    skip: Option<Skip>,
    pub ranks: Vec<RankModel>,
    /// The hub decided.
    pub committed: bool,
    pub went: bool,
    /// An engine said "done" long before it could be.
    pub engine_lied: bool,
    /// The hub heard of a failure before it decided.
    failure_heard: bool,
    /// Some worker's post hook or release failed after the commit.
    pub hook_failed: bool,
}

impl Hash for Model {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.ranks.hash(state);
        (self.committed, self.went, self.engine_lied, self.failure_heard, self.hook_failed).hash(state);
    }
}

type Checked<T = ()> = Result<T, Violation>;

fn broken<T>(law: Law, what: String) -> Checked<T> {
    Err(Violation::new(law, what))
}

/// What makes two causes the same.
pub(crate) fn cause_text(cause: &Error) -> String {
    cause.to_string()
}

impl Model {
    /// `kinds`: for each rank, whether it has a worker and whether it starts an engine.
    pub fn new(
        plan: Arc<UpdatePlan>,
        kinds: &[(bool, bool)],
        transport: TransportModel,
        skip: Option<Skip>,
    ) -> Self {
        let cells = Arc::new(Cells::new(&plan));
        let ranks = kinds
            .iter()
            .map(|(has_worker, starts_engine)| RankModel {
                has_worker: *has_worker,
                starts_engine: *starts_engine,
                cells: vec![Cell { owner: Owner::Free, bytes: None }; cells.count],
                loaded: BTreeSet::new(),
                enqueued: 0,
                received: 0,
                exchanged: 0,
                sent_well: vec![true; plan.buckets.len()],
                preparing: false,
                opening: false,
                opened: false,
                publishing: None,
                acked: 0,
                releasing: false,
                released: false,
                hook_running: false,
                hook_done: false,
                engine_running: false,
                engine_done: false,
                aborting: false,
                aborted: false,
                link_broken: false,
                dead: false,
                reported: false,
                ready: None,
                abort_heard: None,
                commit_heard: false,
                end: None,
                cause: None,
                actions: 0,
            })
            .collect();
        Self {
            plan,
            cells,
            transport,
            skip,
            ranks,
            committed: false,
            went: false,
            engine_lied: false,
            failure_heard: false,
            hook_failed: false,
        }
    }

    fn bucket_count(&self) -> u32 {
        self.plan.buckets.len() as u32
    }

    pub fn waits_for(&self) -> Vec<Option<u32>> {
        self.plan.buckets.iter().map(|b| b.waits_for).collect()
    }

    pub fn loads(&self, rank: Rank) -> Vec<u32> {
        self.plan.loads(rank)
    }

    pub fn has_worker_loaded(&self, rank: Rank) -> bool {
        let r = &self.ranks[rank as usize];
        if r.has_worker { r.acked == self.bucket_count() } else { r.exchanged == self.bucket_count() }
    }

    // ---- what a machine asks for ----

    /// Checks that the action is lawful now, and performs its immediate part.
    pub fn act(&mut self, rank: Rank, action: &Action) -> Checked {
        let me = rank as usize;
        self.ranks[me].actions += 1;
        let bound = 4 * self.bucket_count() + 24;
        if self.ranks[me].actions > bound {
            return broken(Law::Ends, format!("rank {rank} asked for more than {bound} actions"));
        }
        if self.ranks[me].end.is_some() {
            return broken(Law::Ends, format!("rank {rank} asked for {action:?} after its end"));
        }
        match action {
            Action::Prepare { .. } => self.ranks[me].preparing = true,
            Action::SendReady { plan_digest, .. } => self.ranks[me].ready = Some(*plan_digest),
            Action::StartEngine => self.ranks[me].engine_running = true,
            Action::OpenSink => self.ranks[me].opening = true,
            Action::SendOpened { .. } => {}
            Action::Load { bucket } => self.load(rank, *bucket)?,
            Action::Exchange { bucket } => self.exchange(rank, *bucket)?,
            Action::Publish { bucket } => self.publish(rank, *bucket)?,
            Action::Free { bucket } => self.free(rank, *bucket)?,
            Action::SendLoaded { .. } => {
                if !self.has_worker_loaded(rank) {
                    return broken(Law::NoEarlyWord, format!("rank {rank} said Loaded before all acks"));
                }
            }
            Action::ReleaseSink => {
                let r = &mut self.ranks[me];
                if !r.commit_heard {
                    return broken(
                        Law::NoEarlyWord,
                        format!("rank {rank} withdrew its ring before the commit"),
                    );
                }
                r.releasing = true;
            }
            Action::RunPostHook => {
                let r = &mut self.ranks[me];
                if !r.released {
                    return broken(
                        Law::NoEarlyWord,
                        format!("rank {rank} ran the post hook with its ring mapped"),
                    );
                }
                r.hook_running = true;
            }
            Action::SendFinished { failure, .. } => {
                let r = &self.ranks[me];
                let through =
                    (!r.has_worker || r.hook_done) && (!r.starts_engine || r.engine_done || self.engine_lied);
                if failure.is_none() && !through {
                    return broken(
                        Law::NoEarlyWord,
                        format!("rank {rank} said Finished before worker and engine"),
                    );
                }
            }
            Action::SendFailed { .. } => {
                if std::mem::replace(&mut self.ranks[me].reported, true) {
                    return broken(Law::AbortOnce, format!("rank {rank} reported two failures"));
                }
            }
            Action::AbortLocal { .. } => {
                let r = &mut self.ranks[me];
                if std::mem::replace(&mut r.aborted, true) {
                    return broken(Law::AbortOnce, format!("rank {rank} aborted twice"));
                }
                r.aborting = true;
                (r.preparing, r.opening, r.publishing) = (false, false, None);
                (r.releasing, r.hook_running) = (false, false);
            }
            Action::End(outcome) => self.end(rank, outcome)?,
        }
        Ok(())
    }

    fn offer(&mut self, rank: Rank, bucket: u32, cells: Range<usize>) -> Checked {
        for cell in &mut self.ranks[rank as usize].cells[cells] {
            match cell.owner {
                Owner::Free | Owner::Released(_) => {
                    *cell = Cell { owner: Owner::Writing(bucket), bytes: None }
                }
                Owner::Writing(b) if b == bucket => {}
                Owner::Writing(b) | Owner::Holds(b) => {
                    return broken(
                        Law::NoOverwrite,
                        format!("rank {rank} writes bucket {bucket} over bucket {b}, which is not released"),
                    );
                }
            }
        }
        Ok(())
    }

    fn load(&mut self, rank: Rank, bucket: u32) -> Checked {
        if !self.went {
            return broken(
                Law::NoMoveBeforeAgreement,
                format!("rank {rank} loads bucket {bucket} before Go"),
            );
        }
        let cells = self.cells.clone();
        for (root, range) in &cells.segments[bucket as usize] {
            if *root == rank {
                self.offer(rank, bucket, range.clone())?;
                for cell in &mut self.ranks[rank as usize].cells[range.clone()] {
                    cell.bytes = Some(bucket);
                }
            }
        }
        self.ranks[rank as usize].loaded.insert(bucket);
        Ok(())
    }

    fn exchange(&mut self, rank: Rank, bucket: u32) -> Checked {
        if !self.went {
            return broken(
                Law::NoMoveBeforeAgreement,
                format!("rank {rank} offers bucket {bucket} before Go"),
            );
        }
        self.offer(rank, bucket, self.cells.buckets[bucket as usize].clone())?;
        let brings = self.cells.segments[bucket as usize].iter().any(|(root, _)| *root == rank);
        let r = &mut self.ranks[rank as usize];
        // Loads may come in any order, exchanges may not.
        if r.enqueued != bucket || (brings && !r.loaded.contains(&bucket)) {
            return broken(Law::Progress, format!("rank {rank} enqueues bucket {bucket} out of order"));
        }
        r.enqueued += 1;
        Ok(())
    }

    fn publish(&mut self, rank: Rank, bucket: u32) -> Checked {
        let r = &mut self.ranks[rank as usize];
        if r.aborted {
            return broken(
                Law::NoPublishAfterAbort,
                format!("rank {rank} publishes bucket {bucket} after its epoch was aborted"),
            );
        }
        if let Some(pending) = r.publishing {
            return broken(
                Law::Lockstep,
                format!("rank {rank} publishes bucket {bucket} while {pending} is unanswered"),
            );
        }
        if !r.opened || r.released {
            return broken(
                Law::Lockstep,
                format!("rank {rank} publishes bucket {bucket} to a worker without ring"),
            );
        }
        r.publishing = Some(bucket);
        if let Some(other) = self.ranks.iter().position(|r| r.has_worker && !r.opened) {
            let what =
                format!("rank {rank} publishes bucket {bucket} while the worker of {other} has no ring");
            return broken(Law::Together, what);
        }
        self.worker_reads(rank, bucket)
    }

    /// The worker may read at any moment from publish to ack: the bytes must be right at both ends.
    fn worker_reads(&self, rank: Rank, bucket: u32) -> Checked {
        let cells = &self.ranks[rank as usize].cells[self.cells.buckets[bucket as usize].clone()];
        let right = Cell { owner: Owner::Holds(bucket), bytes: Some(bucket) };
        match cells.iter().find(|c| **c != right) {
            None => Ok(()),
            Some(wrong) => {
                broken(Law::NoGarbage, format!("rank {rank}'s worker reads {wrong:?} as bucket {bucket}"))
            }
        }
    }

    fn free(&mut self, rank: Rank, bucket: u32) -> Checked {
        for cell in &mut self.ranks[rank as usize].cells[self.cells.buckets[bucket as usize].clone()] {
            match cell.owner {
                Owner::Released(b) if b == bucket => *cell = Cell { owner: Owner::Free, bytes: None },
                Owner::Writing(b) | Owner::Holds(b) if b == bucket => {
                    return broken(
                        Law::NoEarlyFree,
                        format!("rank {rank} frees bucket {bucket} under its reader"),
                    );
                }
                // A later bucket has it already, lawfully: `offer` checked.
                _ => {}
            }
        }
        Ok(())
    }

    fn end(&mut self, rank: Rank, outcome: &Outcome) -> Checked {
        let committed = self.committed;
        let r = &mut self.ranks[rank as usize];
        let (end, cause) = match outcome {
            Outcome::Committed { failure } => (End::Committed { well: failure.is_none() }, failure.as_ref()),
            Outcome::Failed { cause } => (End::Failed, Some(cause)),
            Outcome::InDoubt { cause } => (End::InDoubt, Some(cause)),
        };
        r.end = Some(end);
        r.cause = cause.map(cause_text);
        let heard = r.abort_heard.clone();
        match end {
            End::Committed { .. } if !committed => {
                broken(Law::Agreement, format!("rank {rank} ended as committed, but the hub did not commit"))
            }
            End::Failed if committed => broken(
                Law::Agreement,
                format!(
                    "rank {rank} ended as failed ({:?}), but the hub committed",
                    self.ranks[rank as usize].cause
                ),
            ),
            End::Failed if heard.is_some() && heard != self.ranks[rank as usize].cause => broken(
                Law::FirstCause,
                format!(
                    "rank {rank} ended with {:?}, but the first cause was {heard:?}",
                    self.ranks[rank as usize].cause
                ),
            ),
            End::Committed { well: true } if self.engine_lied => {
                broken(Law::NoEarlyWord, format!("rank {rank} believed an engine that answered early"))
            }
            End::Committed { well: true } if self.hook_failed => broken(
                Law::SharedResult,
                format!("rank {rank} ended well, but a worker failed after the commit"),
            ),
            _ => Ok(()),
        }
    }

    // ---- what the hub says ----

    /// The hub has sent this; checks that the hub may.
    pub fn hub_says(&mut self, message: &ToRank) -> Checked {
        match message {
            ToRank::Go { .. } if !self.went => {
                self.went = true;
                let first = self.ranks[0].ready;
                if self.ranks.iter().any(|r| r.ready.is_none() || r.ready != first) {
                    return broken(
                        Law::NoMoveBeforeAgreement,
                        "Go without equal plans from all ranks".into(),
                    );
                }
            }
            ToRank::Committed { .. } if !self.committed => {
                self.committed = true;
                let all = (0..self.ranks.len()).all(|r| self.has_worker_loaded(r as Rank));
                if !all {
                    return broken(Law::NoEarlyWord, "Committed before all workers have everything".into());
                }
                if self.failure_heard {
                    return broken(
                        Law::NoEarlyWord,
                        "Committed although a rank had reported a failure".into(),
                    );
                }
                if self.ranks.iter().any(|r| r.end == Some(End::Failed)) {
                    return broken(Law::Agreement, "Committed after a rank ended as failed".into());
                }
            }
            ToRank::Closed { failure: None, .. } => {
                let through = |r: &RankModel| !r.has_worker || r.hook_done || r.dead;
                if !self.ranks.iter().all(through) {
                    return broken(Law::SharedResult, "Closed as a success before all ranks finished".into());
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The hub reads this.
    pub fn hub_hears(&mut self, message: &ToHub) {
        self.failure_heard |= matches!(message, ToHub::Failed { .. }) && !self.committed;
    }

    /// The rank has read this.
    pub fn rank_hears(&mut self, rank: Rank, message: &ToRank) {
        let r = &mut self.ranks[rank as usize];
        match message {
            ToRank::Abort { cause, .. } if r.end.is_none() && !r.commit_heard => {
                r.abort_heard.get_or_insert(cause_text(cause));
            }
            ToRank::Committed { .. } => r.commit_heard = true,
            _ => {}
        }
    }

    // ---- what the worker does ----

    /// The worker acks what was published.
    pub fn ack(&mut self, rank: Rank) -> Checked<Option<u32>> {
        let Some(bucket) = self.ranks[rank as usize].publishing else { return Ok(None) };
        self.worker_reads(rank, bucket)?;
        let r = &mut self.ranks[rank as usize];
        r.publishing = None;
        r.acked = bucket + 1;
        for cell in &mut r.cells[self.cells.buckets[bucket as usize].clone()] {
            cell.owner = Owner::Released(bucket);
        }
        Ok(Some(bucket))
    }
}
