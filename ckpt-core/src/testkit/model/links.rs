//! What the devices and links of the modelled world do.

use super::{Model, Owner};
use crate::{
    testkit::{Skip, TransportModel},
    types::Rank,
};

impl Model {
    fn roots(&self, bucket: u32) -> impl Iterator<Item = Rank> + '_ {
        self.cells.segments[bucket as usize].iter().map(|(root, _)| *root)
    }

    pub fn is_root(&self, rank: Rank, bucket: u32) -> bool {
        self.roots(bucket).any(|r| r == rank)
    }

    /// The root's bytes of this bucket are on their way or can still be had.
    fn gives(&self, root: Rank, bucket: u32) -> bool {
        let r = &self.ranks[root as usize];
        let left = r.exchanged > bucket && self.transport != TransportModel::Pull;
        left || (r.enqueued > bucket && !r.dead && !r.aborted)
    }

    /// The next bucket whose bytes can land in this rank's ring.
    pub fn can_receive(&self, rank: Rank) -> Option<u32> {
        let r = &self.ranks[rank as usize];
        let bucket = r.received;
        if bucket >= r.enqueued || r.dead || r.aborted || r.link_broken {
            return None;
        }
        let given = self.roots(bucket).all(|root| root == rank || self.gives(root, bucket));
        let offered = self.transport != TransportModel::Rendezvous
            || !self.is_root(rank, bucket)
            || self.ranks.iter().all(|o| o.enqueued > bucket);
        (given && offered).then_some(bucket)
    }

    /// The bytes land.
    pub fn receive(&mut self, rank: Rank, bucket: u32) {
        let cells = self.cells.clone();
        let me = rank as usize;
        for (root, range) in &cells.segments[bucket as usize] {
            if *root == rank {
                continue;
            }
            let from = &self.ranks[*root as usize];
            let right = if self.transport != TransportModel::Pull && from.exchanged > bucket {
                from.sent_well[bucket as usize]
            } else {
                from.cells[range.clone()].iter().all(|c| c.bytes == Some(bucket))
            };
            for cell in &mut self.ranks[me].cells[range.clone()] {
                // Adversarial: if the range was given to another bucket meanwhile, that one's bytes are lost.
                cell.bytes = right.then_some(bucket);
            }
        }
        self.ranks[me].received = bucket + 1;
    }

    /// The next bucket whose event completes at this rank, and whether that event means anything.
    pub fn can_complete(&self, rank: Rank) -> Option<(u32, bool)> {
        let r = &self.ranks[rank as usize];
        let bucket = r.exchanged;
        if bucket >= r.enqueued || r.dead {
            return None;
        }
        if r.aborted || r.link_broken {
            // The kernel ended; its event fires over whatever is there. A driver that looks afterwards drops it.
            return (self.skip == Some(Skip::PoisonCheck) && !r.aborted).then_some((bucket, false));
        }
        let pulled = self.transport != TransportModel::Pull
            || !self.is_root(rank, bucket)
            || self.skip == Some(Skip::PullersDone)
            || self.ranks.iter().all(|o| o.received > bucket);
        (r.received > bucket && pulled).then_some((bucket, true))
    }

    /// The driver sees the event.
    pub fn complete(&mut self, rank: Rank, bucket: u32, means_something: bool) {
        let cells = self.cells.clone();
        let me = rank as usize;
        let mine = &mut self.ranks[me];
        for (root, range) in &cells.segments[bucket as usize] {
            for cell in &mut mine.cells[range.clone()] {
                if !means_something && *root != rank {
                    cell.bytes = None;
                }
                if *root == rank && cell.bytes != Some(bucket) {
                    mine.sent_well[bucket as usize] = false;
                }
            }
        }
        let there = if mine.has_worker { Owner::Holds(bucket) } else { Owner::Released(bucket) };
        for cell in &mut mine.cells[cells.buckets[bucket as usize].clone()] {
            if cell.owner == Owner::Writing(bucket) {
                cell.owner = there;
            }
        }
        // Padding between segments: nobody sends it and nobody reads it.
        for padding in &cells.padding[bucket as usize] {
            mine.cells[*padding].bytes = Some(bucket);
        }
        mine.exchanged = bucket + 1;
        mine.received = mine.received.max(bucket + 1);
    }
}
