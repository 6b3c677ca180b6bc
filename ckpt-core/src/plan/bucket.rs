//! Packing: which owner sends how much, and when.
//!
//! Owners take turns. A tensor is due when the same part of every owner's bytes is in the plan as of its own owner's up
//! to the tensor's end; the next turn goes to the owner whose tensor is due first. So all owners end at about the same
//! time, whatever they hold, and a large tensor comes when its owner has had the time to load it. (If other links cannot
//! be kept busy that long, a large tensor is due earlier.) A turn takes whole tensors, about as many bytes as keep the
//! owner in step. A bucket is a run of turns of different owners.

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
/// When the last tensor of an owner is due.
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
    /// Bytes of the ring.
    pub ring_bytes: u64,
    /// Different owners in a bucket.
    pub window: u32,
    /// A P2P update: receivers pull from all owners' memory at once. So no owner may take more than
    /// ceil(window / owners) + 1 of any `window` turns while others have bytes, and a large tensor is like any other:
    /// the receivers pull it together.
    pub pulled: bool,
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
    fn next_bytes(&self, items: &[Item]) -> u64 {
        items[self.next_item..self.end].first().map_or(0, |item| item.len_bytes)
    }
}

/// A part of a whole, in 2^-32.
fn part(bytes: u64, whole: u64) -> u64 {
    match bytes.checked_mul(COMPLETE) {
        // The usual case, spared a division of 128 bits.
        Some(scaled) => scaled / whole.max(1),
        None => (u128::from(bytes) * u128::from(COMPLETE) / u128::from(whole.max(1))) as u64,
    }
}

impl Packing {
    /// How many other owners' links can be kept busy by the rest of the ring while a tensor of `len_bytes` is loaded.
    pub fn links_beside(&self, len_bytes: u64) -> u64 {
        (self.ring_bytes.saturating_sub(len_bytes) / self.bucket_bytes).clamp(1, u64::from(self.window))
    }
}

struct Schedule<'a> {
    items: &'a [Item],
    packing: Packing,
    senders: Vec<Sender>,
    /// Senders with items left, by when their next tensor is due, then by rank.
    waiting: BinaryHeap<Reverse<(u64, usize)>>,
    all_bytes: u64,
    sent_bytes: u64,
    /// The part of the plan up to the last tensor larger than a bucket, in 2^-32.
    large_until: u64,
    /// Senders with items left, also those that are set aside while a bucket is made.
    active: u64,
    /// All bytes of the active senders, sent or not.
    active_bytes: u64,
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
        let all_bytes = senders.iter().map(|s| s.len_bytes).sum();
        let mut schedule = Self {
            items: &inventory.items,
            packing,
            waiting: BinaryHeap::with_capacity(senders.len()),
            all_bytes,
            sent_bytes: 0,
            large_until: 0,
            active: senders.len() as u64,
            active_bytes: all_bytes,
            recent: VecDeque::new(),
            recent_turns: vec![0; senders.len()],
            senders,
        };
        (0..schedule.senders.len()).for_each(|sender| schedule.wait(sender));
        schedule
    }

    fn next_bucket(&mut self) -> Draft {
        let mut draft = Draft::default();
        draft.segments.reserve(self.packing.window.min(64) as usize);
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
            if draft.len_bytes > self.packing.bucket_bytes {
                self.large_until = part(self.sent_bytes, self.all_bytes);
            }
            if self.senders[sender].next_item < self.senders[sender].end {
                self.wait(sender);
            } else {
                self.active -= 1;
                self.active_bytes -= self.senders[sender].len_bytes;
            }
            let crumb = MIN_TURN_BYTES.min(self.packing.bucket_bytes / 8);
            if draft.len_bytes.saturating_add(crumb) > self.packing.bucket_bytes {
                break;
            }
        }
        for sender in does_not_fit {
            self.wait(sender);
        }
        draft
    }

    fn wait(&mut self, sender: usize) {
        self.waiting.push(Reverse((self.due(sender), sender)));
    }

    /// When the sender's next tensor is due, as a part of the plan in 2^-32.
    fn due(&self, sender: usize) -> u64 {
        let sender = &self.senders[sender];
        let next = sender.next_bytes(self.items);
        let (start, takes) = (part(sender.sent_bytes, sender.len_bytes), part(next, sender.len_bytes));
        if next <= self.packing.bucket_bytes || self.packing.pulled {
            return start + takes;
        }
        // Its owner loads it while no more than this many other links are kept busy, after the last one was loaded.
        let loads = part(next, self.all_bytes).saturating_mul(self.packing.links_beside(next));
        (start + takes.min(loads)).max(self.large_until.saturating_add(loads))
    }

    /// Takes the sender that is due first and allowed out of `waiting`.
    fn choose(&mut self, last: Option<usize>) -> Option<usize> {
        let mut held_back = Vec::new();
        let mut chosen = None;
        while let Some(Reverse((due, sender))) = self.waiting.pop() {
            let due_now = self.due(sender);
            if due_now > due {
                // Another large tensor came in between.
                self.waiting.push(Reverse((due_now, sender)));
                continue;
            }
            if last == Some(sender) || self.allowed(sender) {
                chosen = Some(sender);
                break;
            }
            held_back.push(Reverse((due, sender)));
        }
        self.waiting.extend(held_back);
        chosen
    }

    /// The interleaving law. Among all active senders at least one is allowed: if each had taken more than
    /// window / active of the last `window - 1` turns, there would be more than `window` turns.
    fn allowed(&self, sender: usize) -> bool {
        !self.packing.pulled
            || self.recent_turns[sender] <= u64::from(self.packing.window).div_ceil(self.active.max(1))
    }

    fn remember(&mut self, sender: usize) {
        if !self.packing.pulled {
            return;
        }
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
        let added = draft.place(&self.items[sender.next_item], sender.rank).added_bytes;
        draft.tensors == 0
            || (draft.tensors < MAX_TENSORS_PER_BUCKET
                && draft.len_bytes + added <= self.packing.bucket_bytes)
    }

    /// The bytes of one turn: all active senders together fill whole buckets, each by its part of their bytes.
    fn quota(&self, sender: usize) -> u64 {
        let senders_in_bucket = u64::from(self.packing.window).min(self.active.max(1));
        // The part of a bucket, in 2^-20. A round over all senders takes active / senders_in_bucket buckets.
        let part = (u128::from(self.senders[sender].len_bytes) << 20) * u128::from(self.active)
            / (u128::from(self.active_bytes.max(1)) * u128::from(senders_in_bucket));
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
            let place = draft.place(item, rank);
            let first = next == self.senders[sender].next_item;
            let full = draft.tensors >= MAX_TENSORS_PER_BUCKET
                || (draft.tensors > 0 && draft.len_bytes + place.added_bytes > self.packing.bucket_bytes);
            // Rather half a quota too much than a turn of a few bytes.
            let enough = item.len_bytes > 0 && taken >= quota / 2 && taken + item.len_bytes > quota;
            if !first && (full || enough) {
                break;
            }
            draft.append(item, rank, place);
            taken += item.len_bytes;
            next += 1;
        }
        self.senders[sender].next_item = next;
        self.senders[sender].sent_bytes += taken;
        self.sent_bytes += taken;
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
                // A power of two.
                && (item.offset - last.arena_offset) & u64::from(item.element_bytes - 1) == 0
        })
    }

    /// Where `item` would go.
    fn place(&self, item: &Item, owner: Rank) -> Place {
        match self.segments.last() {
            Some(last) if self.extends_last(item, owner) => {
                let end = last.ring_offset + (item.offset - last.arena_offset) + item.len_bytes;
                Place { added_bytes: align_up(end) - self.len_bytes, extends_last: true }
            }
            _ => Place { added_bytes: align_up(item.len_bytes), extends_last: false },
        }
    }

    fn append(&mut self, item: &Item, owner: Rank, place: Place) {
        match self.segments.last_mut() {
            Some(last) if place.extends_last => {
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
        self.len_bytes += place.added_bytes;
        self.tensors += 1;
    }
}

/// What appending an item does to a draft.
#[derive(Clone, Copy)]
struct Place {
    /// Ring bytes.
    added_bytes: u64,
    /// Whether the last segment grows; otherwise the item begins one.
    extends_last: bool,
}
