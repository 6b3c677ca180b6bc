//! What each link carries, and how long an exchange keeps the slowest of them busy.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Placement, Scenario, cluster::Slot, rooted_bytes};
use crate::{
    error::{Error, ErrorKind, Result},
    plan::Bucket,
    predict::Exchange,
};

/// A kind of link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkKind {
    /// Host memory to a device.
    H2d,
    /// From other devices of the node into a device.
    DeviceIn,
    /// Out of a NIC.
    NicOut,
    /// Into a NIC.
    NicIn,
}

/// What one link carries in the whole update.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LinkLoad {
    /// Which kind.
    pub kind: LinkKind,
    /// Node.
    pub node: u32,
    /// Device or NIC of the node.
    pub index: u32,
    /// Bytes.
    pub bytes: u64,
    /// Its rate.
    pub gb_per_s: f64,
    /// How long the bytes alone take.
    pub busy_s: f64,
}

/// The cluster's members, by node.
pub(super) struct Network<'a> {
    pub(super) scenario: Scenario<'a>,
    pub(super) members: Vec<Slot>,
    pub(super) owners: Vec<Slot>,
    /// Members of each node that has some.
    pub(super) by_node: BTreeMap<u32, Vec<Slot>>,
}

fn slots(scenario: &Scenario<'_>, numbers: &[u32]) -> Result<Vec<Slot>> {
    let find = |number: &u32| {
        scenario.cluster.slot(*number).ok_or_else(|| {
            let message = format!(
                "device {number} is asked for, the cluster has {}; use a larger cluster file or fewer ranks",
                scenario.cluster.devices()
            );
            Error::new(ErrorKind::ConfigInvalid, "predict an update", message)
        })
    };
    numbers.iter().map(find).collect()
}

impl<'a> Network<'a> {
    pub(super) fn new(scenario: Scenario<'a>) -> Result<Self> {
        let Placement { owners, members } = scenario.placement;
        let (owners, all) = (slots(&scenario, owners)?, slots(&scenario, members)?);
        let mut by_node: BTreeMap<u32, Vec<Slot>> = BTreeMap::new();
        for rank in &scenario.plan.members {
            let Some(slot) = all.get(*rank as usize) else {
                let message = format!("the plan has a member {rank}, only {} are placed", all.len());
                return Err(Error::new(ErrorKind::ConfigInvalid, "predict an update", message));
            };
            by_node.entry(slot.node).or_default().push(*slot);
        }
        for segment in scenario.plan.buckets.iter().flat_map(|b| &b.segments) {
            if segment.owner as usize >= owners.len() || segment.root as usize >= all.len() {
                let message = format!("rank {} of the plan has no place", segment.owner.max(segment.root));
                return Err(Error::new(ErrorKind::ConfigInvalid, "predict an update", message));
            }
        }
        Ok(Self { scenario, members: all, owners, by_node })
    }

    pub(super) fn group(&self, slot: Slot) -> &'a super::NodeGroup {
        &self.scenario.cluster.nodes[slot.group]
    }

    fn group_of_node(&self, node: u32) -> &'a super::NodeGroup {
        self.group(self.by_node[&node][0])
    }

    /// Whether bytes between nodes take the NIC of their root's number.
    fn has_rails(&self) -> bool {
        let mut counts = self.by_node.values().map(Vec::len);
        let first = counts.next().unwrap_or(0);
        self.scenario.cluster.exchange == Exchange::Rails
            && self.by_node.len() > 1
            && first > 1
            && counts.all(|count| count == first)
    }

    /// Whether kernels that wait for other ranks run beside the workers.
    pub(super) fn has_kernels(&self) -> bool {
        match self.scenario.cluster.exchange {
            Exchange::Tree => self.member_count() > 1,
            Exchange::Rails => self.by_node.len() > 1 && !self.has_rails(),
            Exchange::Copy | Exchange::Star => false,
        }
    }

    /// What each NIC of a node sends and receives of bytes that are rooted like this, where there are rails.
    fn over_rails(&self, node: u32, rooted: impl Fn(&Slot) -> u64) -> BTreeMap<u32, (u64, u64)> {
        let mut over: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
        for (index, slot) in self.by_node[&node].iter().enumerate() {
            let own = rooted(slot);
            let all: u64 = self.by_node.values().map(|members| rooted(&members[index])).sum();
            let (out, into) = over.entry(slot.nic.unwrap_or(0)).or_default();
            *out += own;
            *into += all - own;
        }
        over
    }

    pub(super) fn member_count(&self) -> u64 {
        self.scenario.plan.members.len() as u64
    }

    /// Seconds that the exchange of `bucket` keeps its busiest link.
    pub(super) fn exchange_seconds(&self, bucket: &Bucket) -> f64 {
        if self.member_count() < 2 || bucket.len_bytes == 0 {
            return 0.0;
        }
        // Bytes by root device and by its node.
        let mut roots: BTreeMap<(u32, u32), (Slot, u64)> = BTreeMap::new();
        let mut of_node: BTreeMap<u32, u64> = BTreeMap::new();
        for segment in &bucket.segments {
            let slot = self.members[segment.root as usize];
            roots.entry((slot.node, slot.local)).or_insert((slot, 0)).1 += segment.len_bytes;
            *of_node.entry(slot.node).or_default() += segment.len_bytes;
        }
        let total: u64 = of_node.values().sum();
        let (several, rails) = (self.by_node.len() > 1, self.has_rails());
        let mut worst = 0.0_f64;
        // A node without roots stands for all such nodes of its group.
        let mut seen = vec![false; self.scenario.cluster.nodes.len()];
        for (node, members) in &self.by_node {
            let rooted = of_node.get(node).copied().unwrap_or(0);
            if rooted == 0 && std::mem::replace(&mut seen[members[0].group], true) {
                continue;
            }
            let group = self.group_of_node(*node);
            let count = members.len() as u64;
            let own = |slot: &Slot| roots.get(&(slot.node, slot.local)).map_or(0, |(_, bytes)| *bytes);
            let least_own = members.iter().map(own).min().unwrap_or(0);
            let most_own = members.iter().map(own).max().unwrap_or(0);
            let (into_device, among) = match self.scenario.cluster.exchange {
                Exchange::Tree | Exchange::Copy | Exchange::Rails => {
                    (total - least_own, count * total - rooted)
                }
                Exchange::Star => ((rooted - least_own).max(most_own * (count - 1)), rooted * (count - 1)),
            };
            if count > 1 {
                worst = worst.max(into_device as f64 / group.link()).max(among as f64 / group.link_node());
            }
            if several {
                worst = worst.max(match self.scenario.cluster.exchange {
                    Exchange::Rails if rails => {
                        let over = self.over_rails(*node, own).into_values();
                        over.map(|(out, into)| out.max(into)).max().unwrap_or(0) as f64 / group.nic_rate()
                    }
                    Exchange::Tree | Exchange::Copy | Exchange::Rails => {
                        rooted.max(total - rooted) as f64 / (group.nic_rate() * f64::from(group.nics))
                    }
                    Exchange::Star => {
                        let mut out = vec![0_u64; group.nics as usize];
                        let mut users = vec![0_u64; group.nics as usize];
                        for slot in members {
                            let nic = slot.nic.unwrap_or(0) as usize;
                            out[nic] += own(slot) * (self.member_count() - count);
                            users[nic] += 1;
                        }
                        let into = (total - rooted) * users.iter().max().copied().unwrap_or(0);
                        out.iter().max().copied().unwrap_or(0).max(into) as f64 / group.nic_rate()
                    }
                });
            }
        }
        worst
    }

    /// What the exchanges and loads of the whole plan put on each link; `pulled` as the pulls of a P2P update found.
    pub(super) fn loads(&self, pulled: &BTreeMap<(LinkKind, u32, u32), u64>) -> Vec<LinkLoad> {
        let rooted = rooted_bytes(self.scenario.plan);
        let total: u64 = rooted.values().sum();
        let mut own: BTreeMap<(u32, u32), u64> = BTreeMap::new();
        let mut of_node: BTreeMap<u32, u64> = BTreeMap::new();
        for (rank, bytes) in &rooted {
            let slot = self.members[*rank as usize];
            *own.entry((slot.node, slot.local)).or_default() += bytes;
            *of_node.entry(slot.node).or_default() += bytes;
        }
        let mut bytes: BTreeMap<(LinkKind, u32, u32), u64> = pulled.clone();
        let mut add = |kind, node, index, more: u64| {
            if more > 0 {
                *bytes.entry((kind, node, index)).or_default() += more;
            }
        };
        let (several, rails) = (self.by_node.len() > 1, self.has_rails());
        for (node, members) in &self.by_node {
            let group = self.group_of_node(*node);
            let of_node = of_node.get(node).copied().unwrap_or(0);
            let others = self.member_count() - members.len() as u64;
            let of_slot = |slot: &Slot| own.get(&(slot.node, slot.local)).copied().unwrap_or(0);
            for slot in members {
                let own = of_slot(slot);
                add(LinkKind::H2d, *node, slot.local, own);
                let nic = slot.nic.unwrap_or(0);
                match self.scenario.cluster.exchange {
                    Exchange::Tree | Exchange::Copy | Exchange::Rails => {
                        let more = if self.member_count() > 1 { total - own } else { 0 };
                        add(LinkKind::DeviceIn, *node, slot.local, more);
                    }
                    Exchange::Star => {
                        add(LinkKind::DeviceIn, *node, slot.local, of_node - own);
                        if several {
                            add(LinkKind::NicOut, *node, nic, own * others);
                            add(LinkKind::NicIn, *node, nic, total - of_node);
                        }
                    }
                }
            }
            if rails {
                for (nic, (out, into)) in self.over_rails(*node, of_slot) {
                    add(LinkKind::NicOut, *node, nic, out);
                    add(LinkKind::NicIn, *node, nic, into);
                }
            } else if several && self.scenario.cluster.exchange != Exchange::Star {
                for nic in 0..group.nics {
                    add(LinkKind::NicOut, *node, nic, of_node / u64::from(group.nics));
                    add(LinkKind::NicIn, *node, nic, (total - of_node) / u64::from(group.nics));
                }
            }
        }
        let mut loading: BTreeMap<u32, u32> = BTreeMap::new();
        own.keys().for_each(|(node, _)| *loading.entry(*node).or_default() += 1);
        let rate = |kind, node: u32| {
            let all = self.members.iter().chain(&self.owners);
            let group = all.into_iter().find(|slot| slot.node == node).map(|slot| self.group(*slot));
            group.map_or(f64::INFINITY, |group| match kind {
                LinkKind::H2d => group.h2d(loading.get(&node).copied().unwrap_or(1)),
                LinkKind::DeviceIn => group.link(),
                LinkKind::NicIn | LinkKind::NicOut => group.nic_rate(),
            })
        };
        let mut rates: BTreeMap<(LinkKind, u32), f64> = BTreeMap::new();
        let load = |((kind, node, index), bytes)| {
            let rate = *rates.entry((kind, node)).or_insert_with(|| rate(kind, node));
            LinkLoad { kind, node, index, bytes, gb_per_s: rate / 1e9, busy_s: bytes as f64 / rate }
        };
        bytes.into_iter().map(load).collect()
    }
}
