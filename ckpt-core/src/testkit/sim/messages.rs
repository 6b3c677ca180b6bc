//! Sessions, calls and messages between the ranks and the hub.

use std::time::Duration;

use bytes::Bytes;

use super::{SimCluster, What};
use crate::{
    control::{Hello, HubMachine, Joining, ToHub, ToRank},
    testkit::{Fault, Law, Skip, Violation, wire},
    types::{Rank, Version},
    update::{Event, MachineConfig, UpdateMachine},
};

impl SimCluster {
    pub(super) fn connect(&mut self, rank: Rank) -> Result<(), Violation> {
        let Some(hub) = &mut self.hub else { return Ok(()) };
        let incarnation = self.processes.get(rank as usize).map_or(0, |p| p.incarnation);
        let hello = Hello {
            protocol: 1,
            job: "sim".into(),
            token: Bytes::new(),
            rank,
            world_size: self.config.ranks.len() as u32 + 1,
            incarnation,
            host: format!("host-{rank}"),
            pid: 1000 + rank,
        };
        if let Err(error) = hub.connected(rank, hello, self.now) {
            return Err(Violation::new(Law::Progress, format!("rank {rank} was not let in: {error}")));
        }
        let now = self.now;
        if let Some(process) = self.processes.get_mut(rank as usize) {
            process.session = true;
            process.asked.clear();
            process.hub_heard = now;
            if process.incarnation == 0 {
                process.incarnation = 1;
                self.schedule(now, What::Heartbeat(rank));
            }
        }
        self.drain_hub()
    }

    pub(super) fn send_hub(&mut self, rank: Rank, message: ToHub) {
        let delay = self.jitter(self.config.costs.message);
        let process = &mut self.processes[rank as usize];
        if process.session && !process.partitioned {
            let at = (self.now + delay).max(process.last_to_hub + Duration::from_nanos(1));
            process.last_to_hub = at;
            self.schedule(at, What::ToHub(rank, message));
        }
    }

    pub(super) fn send_rank(&mut self, rank: Rank, what: impl FnOnce(Rank) -> What) {
        let delay = self.jitter(self.config.costs.message);
        let process = &mut self.processes[rank as usize];
        let at = (self.now + delay).max(process.last_to_rank + Duration::from_nanos(1));
        process.last_to_rank = at;
        self.schedule(at, what(rank));
    }

    pub(super) fn drain_hub(&mut self) -> Result<(), Violation> {
        loop {
            let Some(hub) = &mut self.hub else { return Ok(()) };
            let Some((rank, message)) = hub.poll_message() else { break };
            self.hub_sends(rank, message)?;
        }
        while let Some(rank) = self.hub.as_mut().and_then(HubMachine::poll_close) {
            if self.processes.get(rank as usize).is_some_and(|p| !p.dead && !p.partitioned) {
                self.send_rank(rank, What::RankSees);
            }
        }
        let due = self.hub.as_ref().and_then(HubMachine::poll_timeout);
        if let Some(at) = due.filter(|at| self.hub_timer_at.is_none_or(|t| *at < t)) {
            self.hub_timer_at = Some(at);
            self.schedule(at, What::HubTimer);
        }
        Ok(())
    }

    pub(super) fn hub_sends(&mut self, rank: Rank, message: ToRank) -> Result<(), Violation> {
        if rank >= self.count() {
            if let ToRank::Abort { epoch: None, .. } = message {
                self.second_call = self.second_call.map(|_| true);
            }
            return Ok(());
        }
        let round = match &message {
            ToRank::Begin { epoch, .. } => {
                let round = self.processes[rank as usize].round;
                Some(*self.epoch_rounds.entry(*epoch).or_insert(round))
            }
            ToRank::Go { epoch } | ToRank::Committed { epoch } | ToRank::Closed { epoch, .. } => {
                self.epoch_rounds.get(epoch).copied()
            }
            _ => None,
        };
        if let Some(round) = round {
            self.rounds[round].hub_says(&message)?;
        }
        let process = &mut self.processes[rank as usize];
        if !matches!(message, ToRank::Alive | ToRank::Welcome { .. }) {
            process.heard_count += 1;
            let lost = Fault::MessageLost { rank, nth: process.heard_count };
            if self.config.fault.is_some_and(|f| f.fault == lost) {
                self.struck_at.get_or_insert(self.now);
                return Ok(());
            }
        }
        if !process.partitioned {
            self.send_rank(rank, |rank| What::ToRank(rank, message));
        }
        Ok(())
    }

    pub(super) fn call(&mut self, rank: Rank) -> Result<(), Violation> {
        let fault = self.config.fault.map(|f| f.fault).filter(|_| self.processes[rank as usize].round == 0);
        if fault == Some(Fault::NeverCalls { rank }) {
            self.struck_at.get_or_insert(self.now);
            return Ok(());
        }
        let mut version = Version(1);
        if fault == Some(Fault::OtherVersion { rank }) {
            self.struck_at.get_or_insert(self.now);
            version = Version(2);
        }
        let mut machine = MachineConfig::new(rank, self.config.deadlines, self.now);
        machine.has_worker = self.config.ranks[rank as usize].has_worker;
        machine.starts_engine = self.leads(rank);
        machine.skip = self.config.skip.and_then(Skip::rule);
        let buckets = self.config.plan.buckets.len();
        let process = &mut self.processes[rank as usize];
        process.machine = Some(UpdateMachine::new(machine));
        process.load_done = vec![Duration::ZERO; buckets];
        (process.receiving, process.completing, process.cut_off) = (false, false, false);
        let joining = self.joining((0..self.count()).collect(), version);
        self.send_hub(rank, ToHub::Join(joining));
        self.drain(rank)
    }

    pub(super) fn joining(&self, ranks: Vec<Rank>, version: Version) -> Joining {
        Joining {
            checkpoint: "sim".into(),
            version,
            ranks,
            device_uuid: String::new(),
            endpoint: None,
            free_bytes: 0,
            communicator: None,
            token: Some(Bytes::from_static(b"token")),
        }
    }

    pub(super) fn rank_reads(&mut self, rank: Rank, message: ToRank) -> Result<(), Violation> {
        if matches!(message, ToRank::Alive) {
            let asked = self.processes[rank as usize].asked.pop_front();
            return match asked {
                Some(asked) => self.feed(rank, Event::LeaseRenewed { asked }),
                None => Ok(()),
            };
        }
        let round = self.processes[rank as usize].round;
        let is_ours = match &message {
            ToRank::Begin { epoch, .. }
            | ToRank::Go { epoch }
            | ToRank::Committed { epoch }
            | ToRank::Closed { epoch, .. }
            | ToRank::Abort { epoch: Some(epoch), .. } => self.epoch_rounds.get(epoch) == Some(&round),
            _ => true,
        };
        if is_ours {
            self.rounds[round].rank_hears(rank, &message);
        }
        match wire::to_event(message) {
            Some(event) => self.feed(rank, event),
            None => Ok(()),
        }
    }
}
