//! The hub's side of all updates and gathers, without I/O.
//!
//! The hub only counts agreements: it never sees a byte of weights. One attempt sends each of its callers exactly one
//! last word, `Abort` or `Closed`, so a rank that has heard it can call again without hearing of the old attempt.

mod attempt;
#[cfg(test)]
mod elastic_tests;
mod failure;
mod fingerprint;
mod gather;
#[cfg(test)]
mod tests;
mod weights;

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};

use self::{
    attempt::{Attempt, Stage, name_ranks},
    failure::LEFT,
    gather::Gathers,
};
use super::{Decision, Hello, Joining, Member, ToHub, ToRank, Weights};
use crate::{
    deadlines::Deadlines,
    error::{Error, ErrorKind, Key, Recovery, Result},
    types::{Epoch, Rank, Version},
    update::Rule,
};

/// What a hub must know before it starts.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// Ranks of the job.
    pub world_size: u32,
    /// The time limits.
    pub deadlines: Deadlines,
    /// Tests only: leave this rule out.
    #[doc(hidden)]
    pub skip: Option<Rule>,
}

impl HubConfig {
    /// For a job of `world_size` ranks.
    pub fn new(world_size: u32, deadlines: Deadlines) -> Self {
        Self { world_size, deadlines, skip: None }
    }
}

/// One rank, as the hub sees it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct RankStatus {
    /// Who.
    pub rank: Rank,
    /// It has a session now.
    pub connected: bool,
    /// Its host, once known.
    pub host: Option<String>,
    /// Its process, once known.
    pub pid: Option<u32>,
    /// It has left in order and is not waited for.
    pub left: bool,
    /// What its worker has, as far as the hub was told.
    pub weights: Option<Weights>,
}

/// One update that is being gathered or runs.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct AttemptStatus {
    /// The attempt's number, once begun.
    pub epoch: Option<Epoch>,
    /// What is installed.
    pub checkpoint: String,
    /// Its version.
    pub version: Version,
    /// The ranks that receive, ascending.
    pub ranks: Vec<Rank>,
    /// `joining`, `preparing`, `moving`, `committed`.
    pub stage: &'static str,
}

/// What the hub knows of a rank's session.
#[derive(Clone, Debug)]
struct Session {
    host: String,
    pid: u32,
    heard: Duration,
}

#[derive(Clone, Debug, Default)]
struct RankState {
    session: Option<Session>,
    /// Its last session's end, until it comes back.
    lost: Option<Error>,
    /// Host and process of its last session.
    was: Option<(String, u32)>,
    /// It left in order: nobody waits for it until it comes back.
    left: bool,
    /// What its worker has.
    weights: Option<Weights>,
    /// This session has said what it knows of that.
    reported: bool,
}

/// The hub, as a pure state machine for `world_size` ranks.
#[derive(Clone, Debug)]
pub struct HubMachine {
    config: HubConfig,
    ranks: Vec<RankState>,
    attempts: Vec<Attempt>,
    gathers: Gathers,
    last_epoch: Epoch,
    decisions: VecDeque<Decision>,
    undrained_decisions: bool,
    out: VecDeque<(Rank, ToRank)>,
    close: VecDeque<Rank>,
    /// The time of the last call.
    clock: Duration,
}

impl HubMachine {
    /// A hub that nobody has connected to.
    pub fn new(config: HubConfig) -> Self {
        let ranks = vec![RankState::default(); config.world_size as usize];
        Self {
            config,
            ranks,
            attempts: Vec::new(),
            gathers: Gathers::default(),
            last_epoch: Epoch(0),
            decisions: VecDeque::new(),
            undrained_decisions: false,
            out: VecDeque::new(),
            close: VecDeque::new(),
            clock: Duration::ZERO,
        }
    }

    /// A session said hello; job, token and protocol version were checked by the caller. On `Ok` a
    /// [`ToRank::Welcome`] is queued; on `Err` the caller answers [`ToRank::Refused`] and closes that connection,
    /// and must not report its end with [`HubMachine::disconnected`].
    pub fn connected(&mut self, rank: Rank, hello: Hello, now: Duration) -> Result<()> {
        self.tick(now);
        let refuse = |text: String| {
            Err(Error::new(ErrorKind::ConfigInvalid, "connect to the hub", text)
                .with(Key::Rank, rank)
                .with(Key::Host, &hello.host)
                .with(Key::Pid, hello.pid))
        };
        let world_size = self.config.world_size;
        if hello.world_size != world_size {
            return refuse(format!(
                "this rank was started with {} ranks and the hub with {world_size}; check WORLD_SIZE",
                hello.world_size
            ));
        }
        let Some(state) = self.ranks.get_mut(rank as usize) else {
            return refuse(format!("there is no rank {rank} in a job of {world_size}; check RANK"));
        };
        if let Some(live) = &state.session {
            return refuse(format!(
                "rank {rank} is already here (host {}, pid {}); check that no two processes have the same RANK, and \
                 end the other one if it is left over",
                live.host, live.pid
            ));
        }
        state.lost = None;
        state.left = false;
        state.reported = false;
        let returned = state.was.replace((hello.host.clone(), hello.pid)).is_some();
        state.session = Some(Session { host: hello.host, pid: hello.pid, heard: now });
        self.gathers.owe_nothing_to(rank);
        let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let d = &self.config.deadlines;
        let welcome =
            ToRank::Welcome { heartbeat_ms: millis(d.heartbeat), dead_after_ms: millis(d.dead_after) };
        self.send(rank, welcome);
        if returned {
            self.all_ranks().filter(|r| *r != rank).for_each(|r| self.send(r, ToRank::Returned { rank }));
        }
        Ok(())
    }

    /// The rank's session ended. Harmless for a rank that has none.
    pub fn disconnected(&mut self, rank: Rank, cause: Error, now: Duration) {
        self.tick(now);
        self.lose(rank, "its session ended", Some(cause), now);
    }

    /// A message of a connected rank.
    pub fn handle(&mut self, rank: Rank, message: ToHub, now: Duration) {
        self.tick(now);
        let Some(session) = self.ranks.get_mut(rank as usize).and_then(|r| r.session.as_mut()) else {
            return;
        };
        session.heard = now;
        match message {
            ToHub::Hello(_) => {}
            ToHub::Alive => self.send(rank, ToRank::Alive),
            ToHub::Gather { name, part } => self.gather(rank, name, part, now),
            ToHub::Join(joining) => self.join(rank, joining, now),
            ToHub::Ready { epoch, plan_digest } => self.ready(rank, epoch, plan_digest),
            ToHub::Opened { epoch } => self.opened(rank, epoch),
            ToHub::Loaded { epoch } => self.loaded(rank, epoch, now),
            ToHub::Finished { epoch, failure } => self.finished(rank, epoch, failure),
            ToHub::Failed { epoch, cause } => self.failed(rank, epoch, cause, now),
            ToHub::Weights(weights) => self.reported(rank, weights),
            ToHub::Bye => {
                self.lose(rank, LEFT, None, now);
                self.ranks[rank as usize].left = true;
                self.complete_gathers();
                self.close.push_back(rank);
            }
        }
    }

    /// The next message to send. Call until `None` after every other call.
    pub fn poll_message(&mut self) -> Option<(Rank, ToRank)> {
        self.out.pop_front()
    }

    /// A rank whose session must be closed (silent for too long, or said [`ToHub::Bye`]). It counts as disconnected
    /// already: its end must not be reported again once a new session of that rank was accepted.
    pub fn poll_close(&mut self) -> Option<Rank> {
        self.close.pop_front()
    }

    /// When [`HubMachine::handle_timeout`] must be called next.
    pub fn poll_timeout(&self) -> Option<Duration> {
        let d = &self.config.deadlines;
        let heard = self.ranks.iter().filter_map(|r| r.session.as_ref()).map(|s| s.heard).min();
        let silent = heard.filter(|_| self.keeps(Rule::HubSilentIsDead)).map(|heard| {
            // At least this often, so that a longer gap between two calls means that this process was stopped.
            let often = self.clock.saturating_add(d.heartbeat.min(d.dead_after / 4));
            heard.saturating_add(d.dead_after).min(often)
        });
        let gathers = self.gathers.pending.values().map(|g| g.since.saturating_add(d.join));
        let attempts = self.attempts.iter().map(|a| self.attempt_ends(a));
        gathers.chain(attempts).chain(silent).min()
    }

    /// Ends what is overdue.
    pub fn handle_timeout(&mut self, now: Duration) {
        self.tick(now);
        if self.keeps(Rule::HubSilentIsDead) {
            let limit = self.config.deadlines.dead_after;
            for rank in self.all_ranks() {
                let session = self.ranks[rank as usize].session.as_ref();
                if session.is_some_and(|s| s.heard.saturating_add(limit) <= now) {
                    let what = format!("it was silent for {} s", limit.as_secs_f64());
                    self.lose(rank, &what, None, now);
                    self.close.push_back(rank);
                }
            }
        }
        self.fail_late_gathers(now);
        let mut index = 0;
        while index < self.attempts.len() {
            if self.attempt_ends(&self.attempts[index]) <= now {
                self.end_overdue(index);
            } else {
                index += 1;
            }
        }
    }

    /// All ranks of the job, ascending.
    pub fn members(&self) -> Vec<RankStatus> {
        let status = |(rank, state): (Rank, &RankState)| RankStatus {
            rank,
            connected: state.session.is_some(),
            host: state.was.as_ref().map(|(host, _)| host.clone()),
            pid: state.was.as_ref().map(|(_, pid)| *pid),
            left: state.left,
            weights: state.weights.clone(),
        };
        (0..).zip(&self.ranks).map(status).collect()
    }

    /// The updates under way.
    pub fn attempts(&self) -> Vec<AttemptStatus> {
        let status = |a: &Attempt| AttemptStatus {
            epoch: a.epoch,
            checkpoint: a.checkpoint.clone(),
            version: a.version,
            ranks: a.ranks.clone(),
            stage: a.stage.as_str(),
        };
        self.attempts.iter().map(status).collect()
    }

    fn keeps(&self, rule: Rule) -> bool {
        self.config.skip != Some(rule)
    }

    fn all_ranks(&self) -> std::ops::Range<Rank> {
        0..self.config.world_size
    }

    fn is_connected(&self, rank: Rank) -> bool {
        self.ranks.get(rank as usize).is_some_and(|r| r.session.is_some())
    }

    fn send(&mut self, rank: Rank, message: ToRank) {
        if self.is_connected(rank) {
            self.out.push_back((rank, message));
        }
    }

    fn send_members(&mut self, index: usize, message: &ToRank) {
        for rank in self.attempts[index].ranks.clone() {
            self.send(rank, message.clone());
        }
    }

    /// A hub that was stopped itself has heard nobody: that silence is not the ranks'. Being late to call a rank dead
    /// is safe, since a rank fences itself by its own clock.
    fn tick(&mut self, now: Duration) {
        let gap = now.saturating_sub(self.clock);
        if gap > self.config.deadlines.dead_after / 2 {
            for session in self.ranks.iter_mut().filter_map(|r| r.session.as_mut()) {
                session.heard = session.heard.saturating_add(gap).min(now);
            }
        }
        self.clock = self.clock.max(now);
    }

    // ---- joining ----

    fn join(&mut self, rank: Rank, joining: Joining, now: Duration) {
        let ranks = match self.named_ranks(rank, &joining.ranks) {
            Ok(ranks) => ranks,
            Err(cause) => return self.send(rank, ToRank::Abort { epoch: None, cause }),
        };
        let other =
            self.attempts.iter().position(|a| a.overlaps(&ranks) && self.keeps(Rule::HubOneUpdateAtATime));
        let index = match other {
            None => {
                self.attempts.push(Attempt::new(&joining, ranks, now));
                self.attempts.len() - 1
            }
            Some(index) => {
                let there = &self.attempts[index];
                let expected = there.stage == Stage::Joining
                    && there.ranks.contains(&rank)
                    && !there.joined.contains_key(&rank);
                if !expected {
                    let text = format!(
                        "an update is running on {}; call again when it has ended",
                        name_ranks(
                            &there.ranks.iter().copied().filter(|r| ranks.contains(r)).collect::<Vec<_>>()
                        )
                    );
                    let cause = Error::new(ErrorKind::ConfigInvalid, "join update", text)
                        .with(Key::Rank, rank)
                        .recovery_is(Recovery::Retry);
                    return self.send(rank, ToRank::Abort { epoch: None, cause });
                }
                if let Err(cause) = there.agrees_with(rank, &joining, &ranks) {
                    // All callers should hear of it: the last ones are on their way.
                    let until = now.saturating_add(self.patience());
                    self.attempts[index].suspect.get_or_insert((cause, until));
                }
                index
            }
        };
        self.attempts[index].joined.insert(rank, joining);
        let lost = self.attempts[index].ranks.iter().find_map(|r| self.ranks[*r as usize].lost.clone());
        if let Some(cause) = lost {
            return self.abort(index, cause);
        }
        if self.attempts[index].joined.len() == self.attempts[index].ranks.len() {
            match self.attempts[index].suspect.take() {
                None => self.begin(index, now),
                Some((cause, _)) => self.abort(index, cause),
            }
        }
    }

    /// The members that a caller names, ascending; empty means all.
    fn named_ranks(&self, rank: Rank, named: &[Rank]) -> Result<Vec<Rank>> {
        if named.is_empty() {
            return Ok(self.all_ranks().filter(|r| !self.ranks[*r as usize].left).collect());
        }
        let ranks: Vec<Rank> = named.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
        let refuse = |text: String| {
            Err(Error::new(ErrorKind::ConfigInvalid, "join update", text).with(Key::Rank, rank))
        };
        if let Some(foreign) = ranks.iter().find(|r| **r >= self.config.world_size) {
            let world_size = self.config.world_size;
            return refuse(format!(
                "rank {foreign} is named to be updated, but the job has {world_size} ranks"
            ));
        }
        if !ranks.contains(&rank) {
            return refuse(format!(
                "rank {rank} called update for {}, which it is not part of",
                name_ranks(&ranks)
            ));
        }
        Ok(ranks)
    }

    fn begin(&mut self, index: usize, now: Duration) {
        let communicator = match self.attempts[index].communicator() {
            Ok(choice) => choice,
            Err(cause) => return self.abort(index, cause),
        };
        let epoch = Epoch(self.last_epoch.0 + 1);
        self.last_epoch = epoch;
        let attempt = &mut self.attempts[index];
        attempt.epoch = Some(epoch);
        attempt.stage = Stage::Preparing;
        attempt.since = now;
        let members: Vec<Member> = attempt
            .joined
            .iter()
            .map(|(rank, joining)| {
                let (host, pid) = self.ranks[*rank as usize].was.clone().unwrap_or_default();
                Member {
                    rank: *rank,
                    host,
                    pid,
                    device_uuid: joining.device_uuid.clone(),
                    endpoint: joining.endpoint.clone(),
                    free_bytes: joining.free_bytes,
                }
            })
            .collect();
        self.send_members(index, &ToRank::Begin { epoch, members, communicator });
    }

    // ---- agreements ----

    /// The running attempt of this number that `rank` is a member of.
    fn find(&self, rank: Rank, epoch: Epoch) -> Option<usize> {
        self.attempts.iter().position(|a| a.epoch == Some(epoch) && a.ranks.contains(&rank))
    }

    fn ready(&mut self, rank: Rank, epoch: Epoch, plan_digest: u64) {
        let Some(index) = self.find(rank, epoch) else { return };
        let attempt = &mut self.attempts[index];
        if attempt.stage != Stage::Preparing {
            return;
        }
        attempt.digests.insert(rank, plan_digest);
        let complete = attempt.digests.len() == attempt.ranks.len();
        if !complete && self.keeps(Rule::HubGoAfterAllReady) {
            return;
        }
        if self.keeps(Rule::HubComparesPlans)
            && let Err(cause) = self.attempts[index].compare_plans()
        {
            return self.abort(index, cause);
        }
        self.attempts[index].stage = Stage::Moving;
        self.send_members(index, &ToRank::Go { epoch });
    }

    fn opened(&mut self, rank: Rank, epoch: Epoch) {
        let Some(index) = self.find(rank, epoch) else { return };
        let attempt = &mut self.attempts[index];
        let is_new = attempt.opened.insert(rank);
        // An attempt that will be aborted need not touch anybody's weights.
        if is_new && attempt.all_in(&attempt.opened) && attempt.suspect.is_none() {
            self.send_members(index, &ToRank::AllOpened { epoch });
        }
    }

    fn loaded(&mut self, rank: Rank, epoch: Epoch, now: Duration) {
        let Some(index) = self.find(rank, epoch) else { return };
        let attempt = &mut self.attempts[index];
        if attempt.stage != Stage::Moving {
            return;
        }
        attempt.loaded.insert(rank);
        let complete = attempt.all_in(&attempt.loaded);
        let suspected = attempt.suspect.is_some() && self.keeps(Rule::HubSuspectBlocksCommit);
        if (complete || !self.keeps(Rule::HubCommitAfterAllLoaded)) && !suspected {
            let attempt = &mut self.attempts[index];
            attempt.stage = Stage::Committed;
            attempt.since = now;
            self.decided(epoch, true);
            self.send_members(index, &ToRank::Committed { epoch });
        }
    }

    fn finished(&mut self, rank: Rank, epoch: Epoch, failure: Option<Error>) {
        let Some(index) = self.find(rank, epoch) else { return };
        let failure = failure.map(|f| self.with_culprit(rank, f));
        let attempt = &mut self.attempts[index];
        if attempt.stage != Stage::Committed {
            return;
        }
        attempt.finished.insert(rank);
        attempt.failure = attempt.failure.take().or(failure);
        if attempt.all_in(&attempt.finished) || !self.keeps(Rule::HubCloseAfterAllFinished) {
            self.close_attempt(index);
        }
    }

    fn close_attempt(&mut self, index: usize) {
        let attempt = &self.attempts[index];
        if let Some(epoch) = attempt.epoch {
            let failure = attempt.failure.clone();
            self.send_members(index, &ToRank::Closed { epoch, failure });
        }
        self.attempts.remove(index);
    }
}
