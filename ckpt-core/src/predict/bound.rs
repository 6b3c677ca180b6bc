//! What no plan can be faster than.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{links::Network, rooted_bytes};

/// Seconds that single links need for bytes that must cross them in any case. Nothing overlaps better than fully, so the
/// largest of these is a lower bound of the transfer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Bound {
    /// Each device loads what it brings to the group.
    pub h2d_s: f64,
    /// Each device takes in all bytes that it does not load itself.
    pub link_s: f64,
    /// Each node takes in all bytes that it does not hold, over all its NICs.
    pub nic_s: f64,
    /// Each worker copies all bytes.
    pub copy_s: f64,
    /// The largest.
    pub seconds: f64,
}

impl Bound {
    pub(super) fn new(network: &Network<'_>) -> Self {
        let plan = network.scenario.plan;
        let rooted = rooted_bytes(plan);
        let total: u64 = rooted.values().sum();
        let mut bound = Self::default();
        for (rank, bytes) in &rooted {
            let group = network.group(network.members[*rank as usize]);
            bound.h2d_s = bound.h2d_s.max(*bytes as f64 / group.h2d(1));
        }
        // Owners may be elsewhere than the members that bring their bytes.
        let mut held: BTreeMap<u32, u64> = BTreeMap::new();
        for segment in plan.buckets.iter().flat_map(|b| &b.segments) {
            *held.entry(network.owners[segment.owner as usize].node).or_default() += segment.len_bytes;
        }
        let mut own: BTreeMap<(u32, u32), u64> = BTreeMap::new();
        for (rank, bytes) in &rooted {
            let slot = network.members[*rank as usize];
            *own.entry((slot.node, slot.local)).or_default() += bytes;
        }
        for (node, members) in &network.by_node {
            let group = network.group(members[0]);
            let own = members.iter().map(|slot| own.get(&(*node, slot.local)).copied().unwrap_or(0));
            let of_node: u64 = own.clone().sum();
            bound.h2d_s = bound.h2d_s.max(of_node as f64 / group.h2d_node());
            if network.member_count() > 1 {
                let most = total - own.min().unwrap_or(0);
                bound.link_s = bound.link_s.max(most as f64 / group.link());
            }
            let missing = total - held.get(node).copied().unwrap_or(0);
            let into_node = group.nic_rate() * f64::from(group.nics);
            if missing > 0 && into_node > 0.0 {
                bound.nic_s = bound.nic_s.max(missing as f64 / into_node);
            }
            if network.scenario.worker.is_some() {
                bound.copy_s = bound.copy_s.max(total as f64 / group.copy());
            }
        }
        bound.seconds = bound.h2d_s.max(bound.link_s).max(bound.nic_s).max(bound.copy_s);
        bound
    }
}
