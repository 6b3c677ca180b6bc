//! Packing: which owner sends how much, and when.
//!
//! Owners take turns. The next turn goes to the owner that is furthest behind, measured by the part of its own bytes
//! that is already in the plan, so all owners end at about the same time, whatever they hold. A turn takes whole tensors, about
//! as many bytes as keep the owner in step. A bucket is a run of turns of different owners.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
};

use super::{
    Segment,
    inventory::{Inventory, Item},
};
use crate::types::{Rank, align_up};

/// Copies between host and device reach their full rate at this size.
const MIN_TURN_BYTES: u64 = 4 << 20;
/// A hole in an arena up to this size is sent along, so that a segment stays one copy.
const MAX_GAP_BYTES: u64 = 4096;
/// A worker spends about 20 us on each tensor, however small; this bounds the time until it acks.
const MAX_TENSORS_PER_BUCKET: usize = 16_384;
/// The progress of an owner that has sent everything.
const COMPLETE: u64 = 1 << 32;

/// A bucket before it has a place in the ring: the ring offsets of its segments count from the bucket's start.
#[derive(Debug, Default)]
pub(super) struct Draft {
    pub segments: Vec<Segment>,
    pub len_bytes: u64,
    tensors: usize,
    turns: u32,
}

/// How buckets are to be packed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packing {
    /// A bucket is larger only if it is one tensor.
    pub bucket_bytes: u64,
    /// Different owners in a bucket.
    pub window: u32,
    /// Whether no owner may take more than ceil(window / owners) + 1 of any `window` turns while others have bytes.
    pub interleave: bool,
}

/// Distributes every item over buckets.
pub(super) fn pack(inventory: &Inventory, packing: Packing) -> Vec<Draft> {
    let mut schedule = Schedule::new(inventory, packing);
    let mut drafts = Vec::new();
    while !schedule.waiting.is_empty() {
        drafts.push(schedule.next_bucket());
    }
    drafts
}

struct Sender {
    rank: Rank,
    next_item: usize,
    end: usize,
    sent_bytes: u64,
    len_bytes: u64,
}

impl Sender {
    /// The part of its bytes that is in the plan, in 2^-32.
    fn progress(&self) -> u64 {
        match self.len_bytes {
            0 => 0,
            all => (u128::from(self.sent_bytes) * u128::from(COMPLETE) / u128::from(all)) as u64,
        }
    }
}

struct Schedule<'a> {
    items: &'a [Item],
    packing: Packing,
    senders: Vec<Sender>,
    /// Senders with items left, by progress, then rank.
    waiting: BinaryHeap<Reverse<(u64, usize)>>,
    /// Senders with items left, also those that are set aside while a bucket is made.
    active: u64,
    remaining_bytes: u64,
    /// The senders of the last `window - 1` turns, and how often each is among them.
    recent: VecDeque<usize>,
    recent_turns: Vec<u64>,
}

impl<'a> Schedule<'a> {
    fn new(inventory: &'a Inventory, packing: Packing) -> Self {
        let senders: Vec<Sender> = inventory
            .owners
            .iter()
            .map(|o| Sender {
                rank: o.rank,
                next_item: o.items.start,
                end: o.items.end,
                sent_bytes: 0,
                len_bytes: o.len_bytes,
            })
            .collect();
        Self {
            items: &inventory.items,
            packing,
            waiting: (0..senders.len()).map(|s| Reverse((0, s))).collect(),
            active: senders.len() as u64,
            remaining_bytes: senders.iter().map(|s| s.len_bytes).sum(),
            recent: VecDeque::new(),
            recent_turns: vec![0; senders.len()],
            senders,
        }
    }

    fn next_bucket(&mut self) -> Draft {
        let mut draft = Draft::default();
        let mut last = None;
        let mut does_not_fit = Vec::new();
        // An empty bucket takes anything, and some sender is always allowed (see `allowed`): every bucket gets a turn.
        while draft.turns <= self.packing.window && does_not_fit.len() < self.packing.window as usize {
            let Some(sender) = self.choose(last) else { break };
            if last != Some(sender) && draft.turns == self.packing.window {
                does_not_fit.push(sender);
                break;
            }
            if !self.fits(&draft, sender) {
                does_not_fit.push(sender);
                continue;
            }
            if last != Some(sender) {
                draft.turns += 1;
                self.remember(sender);
                last = Some(sender);
            }
            self.take_turn(&mut draft, sender);
            if self.senders[sender].next_item < self.senders[sender].end {
                self.waiting.push(Reverse((self.senders[sender].progress(), sender)));
            } else {
                self.active -= 1;
            }
            let crumb = MIN_TURN_BYTES.min(self.packing.bucket_bytes / 8);
            if draft.len_bytes.saturating_add(crumb) > self.packing.bucket_bytes {
                break;
            }
        }
        for sender in does_not_fit {
            self.waiting.push(Reverse((self.senders[sender].progress(), sender)));
        }
        draft
    }

    /// Takes the sender that is furthest behind and allowed out of `waiting`.
    fn choose(&mut self, last: Option<usize>) -> Option<usize> {
        let mut held_back = Vec::new();
        let mut chosen = None;
        while let Some(Reverse((progress, sender))) = self.waiting.pop() {
            if last == Some(sender) || self.allowed(sender) {
                chosen = Some(sender);
                break;
            }
            held_back.push(Reverse((progress, sender)));
        }
        self.waiting.extend(held_back);
        chosen
    }

    /// The interleaving law. Among all active senders at least one is allowed: if each had taken more than
    /// window / active of the last `window - 1` turns, there would be more than `window` turns.
    fn allowed(&self, sender: usize) -> bool {
        !self.packing.interleave
            || self.recent_turns[sender] <= u64::from(self.packing.window).div_ceil(self.active.max(1))
    }

    fn remember(&mut self, sender: usize) {
        self.recent.push_back(sender);
        self.recent_turns[sender] += 1;
        if self.recent.len() as u64 >= u64::from(self.packing.window)
            && let Some(oldest) = self.recent.pop_front()
        {
            self.recent_turns[oldest] -= 1;
        }
    }

    fn fits(&self, draft: &Draft, sender: usize) -> bool {
        let sender = &self.senders[sender];
        let added = draft.added_bytes(&self.items[sender.next_item], sender.rank);
        draft.tensors == 0
            || (draft.tensors < MAX_TENSORS_PER_BUCKET
                && draft.len_bytes + added <= self.packing.bucket_bytes)
    }

    /// Bytes that the sender should send now so that it stays in step with the others.
    fn quota(&self, sender: usize) -> u64 {
        let sender = &self.senders[sender];
        let senders_in_bucket = u64::from(self.packing.window).min(self.active.max(1));
        let left = u128::from(sender.len_bytes - sender.sent_bytes);
        // Its part of all bytes, times the number of buckets that a round over all senders takes, in 2^-20.
        let part = (left << 20) * u128::from(self.active)
            / (u128::from(self.remaining_bytes.max(1)) * u128::from(senders_in_bucket));
        let bytes = (u128::from(self.packing.bucket_bytes) * part.min(1 << 20)) >> 20;
        (bytes as u64).max(MIN_TURN_BYTES.min(self.packing.bucket_bytes / senders_in_bucket))
    }

    /// Moves at least one item into the bucket; the caller has seen that it fits.
    fn take_turn(&mut self, draft: &mut Draft, sender: usize) {
        let quota = self.quota(sender);
        let rank = self.senders[sender].rank;
        let mut taken = 0;
        let mut next = self.senders[sender].next_item;
        while next < self.senders[sender].end {
            let item = &self.items[next];
            let added = draft.added_bytes(item, rank);
            let first = next == self.senders[sender].next_item;
            let full = draft.tensors >= MAX_TENSORS_PER_BUCKET
                || (draft.tensors > 0 && draft.len_bytes + added > self.packing.bucket_bytes);
            if !first && (full || (item.len_bytes > 0 && taken + item.len_bytes > quota)) {
                break;
            }
            draft.append(item, rank);
            taken += item.len_bytes;
            next += 1;
        }
        self.senders[sender].next_item = next;
        self.senders[sender].sent_bytes += taken;
        self.remaining_bytes -= taken;
    }
}

impl Draft {
    /// Whether `item` goes on where the last segment ends, so that one copy brings both.
    fn extends_last(&self, item: &Item, owner: Rank) -> bool {
        self.segments.last().is_some_and(|last| {
            let end = last.arena_offset + last.len_bytes;
            last.owner == owner
                && last.arena == item.arena
                && last.tensors.end == item.index
                && item.offset - end <= MAX_GAP_BYTES
                && (item.offset - last.arena_offset).is_multiple_of(u64::from(item.element_bytes))
        })
    }

    /// Ring bytes that `item` would add.
    fn added_bytes(&self, item: &Item, owner: Rank) -> u64 {
        match self.segments.last() {
            Some(last) if self.extends_last(item, owner) => {
                align_up(last.ring_offset + (item.offset - last.arena_offset) + item.len_bytes)
                    - self.len_bytes
            }
            _ => align_up(item.len_bytes),
        }
    }

    fn append(&mut self, item: &Item, owner: Rank) {
        let added = self.added_bytes(item, owner);
        let extends = self.extends_last(item, owner);
        match self.segments.last_mut() {
            Some(last) if extends => {
                last.len_bytes = item.offset - last.arena_offset + item.len_bytes;
                last.tensors.end = item.index + 1;
            }
            _ => self.segments.push(Segment {
                owner,
                root: owner,
                arena: item.arena,
                arena_offset: item.offset,
                len_bytes: item.len_bytes,
                ring_offset: self.len_bytes,
                tensors: item.index..item.index + 1,
            }),
        }
        self.len_bytes += added;
        self.tensors += 1;
    }
}
