//! Shares the entries of a completion queue out among queue pairs. When a queue pair ends, each of its requests may complete
//! before one completion is polled, and what a full queue cannot take is never told of.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

/// Entries that no queue pair has.
#[derive(Debug)]
pub(crate) struct Room(AtomicU32);

/// Entries of one queue pair, until this is dropped: after the queue pair, which takes its completions with it.
#[derive(Debug)]
pub(crate) struct Share {
    room: Arc<Room>,
    pub(crate) entries: u32,
}

/// No queue pair gets a larger part of what is left, so that many get something.
const PART: u32 = 16;

impl Room {
    pub(crate) fn new(entries: u32) -> Arc<Self> {
        Arc::new(Self(AtomicU32::new(entries)))
    }

    /// At most `most` entries, at least one; `None` if none is left.
    pub(crate) fn take(self: &Arc<Self>, most: u32) -> Option<Share> {
        let part = |left: u32| most.min((left / PART).max(1));
        let taken = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| (left > 0).then(|| left - part(left)));
        taken.ok().map(|left| Share { room: self.clone(), entries: part(left) })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.room.0.fetch_add(self.entries, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_never_exceed_the_room_and_come_back() {
        let room = Room::new(1000);
        let mut shares = Vec::new();
        while let Some(share) = room.take(64) {
            assert!((1..=62).contains(&share.entries));
            shares.push(share);
        }
        assert_eq!(shares.iter().map(|share| share.entries).sum::<u32>(), 1000);
        assert!(shares.len() > 50, "{} queue pairs", shares.len());
        drop(shares);
        assert_eq!(room.take(32).map(|share| share.entries), Some(32));
    }
}
