//! Reads of rank 0's memory by every other rank, or writes into it.
//!
//! Rank 0's memory has a slot for each message in flight (or one for all, if so asked); for writes each rank has slots of its own, so that no two
//! write the same bytes.

use std::{collections::VecDeque, ops::Range, sync::Arc, time::Instant};

use ckpt_core::{
    Result,
    device::{BufferSlice, Event, host::HostBuffer},
    transport::{OneSided, ReadOp, RemoteRegion, Way, WriteOp},
};

use super::measure::{Bench, Part, bug, no_facet, patterns};

/// Slots take at most this much memory, if there are enough for one message each.
const MEMORY: u64 = 256 << 20;

/// Where one rank's messages go and come from.
struct Slots<'a> {
    facet: &'a dyn OneSided,
    way: Way,
    region: Arc<RemoteRegion>,
    /// Of this rank's first slot in the region.
    start: u64,
    memory: BufferSlice,
    size: u64,
    count: u64,
    /// Messages in flight.
    depth: u64,
}

/// Messages that are ready to be posted.
enum Batch {
    Read(Vec<ReadOp>),
    Write(Vec<WriteOp>),
}

impl Slots<'_> {
    /// A message on each of these slots.
    fn batch(&self, slots: Range<u64>) -> Result<Batch> {
        let places = slots.map(|slot| self.place(slot));
        let region = || self.region.clone();
        Ok(match self.way {
            Way::Read => {
                let op = |(offset, into)| ReadOp { region: region(), offset, into };
                Batch::Read(places.map(|place| place.map(op)).collect::<Result<_>>()?)
            }
            Way::Write => {
                let op = |(offset, from)| WriteOp { region: region(), offset, from };
                Batch::Write(places.map(|place| place.map(op)).collect::<Result<_>>()?)
            }
        })
    }

    fn post(&self, batch: Batch, deadline: Instant) -> Result<Event> {
        match batch {
            Batch::Read(ops) => self.facet.post_read(ops, deadline),
            Batch::Write(ops) => self.facet.post_write(ops, deadline),
        }
    }

    /// Where a slot is in the region, and its memory here.
    fn place(&self, slot: u64) -> Result<(u64, BufferSlice)> {
        let at = slot % self.count * self.size;
        Ok((self.start + at, self.memory.slice(at..at + self.size)?))
    }

    /// Seconds for each message, and in the fastest part. Two stretches of half the depth are in flight at a time.
    async fn stream(&self, messages: u64, deadline: Instant) -> Result<(f64, f64)> {
        let stretch = (self.depth / 2).max(1);
        let mut flying: VecDeque<(Event, Instant, u64)> = VecDeque::new();
        let (mut posted, mut ended) = (0, Vec::new());
        let began = Instant::now();
        while posted < messages || !flying.is_empty() {
            while posted < messages && flying.len() < self.depth.min(2) as usize {
                let count = stretch.min(messages - posted);
                let now = Instant::now();
                let event = self.post(self.batch(posted..posted + count)?, deadline)?;
                flying.push_back((event, now, count));
                posted += count;
            }
            let Some((event, since, count)) = flying.pop_front() else { break };
            event.done(deadline).await?;
            ended.push(Stretch { since, until: Instant::now(), count });
        }
        let each = began.elapsed().as_secs_f64() / messages.max(1) as f64;
        Ok((each, fastest(&ended).min(each)))
    }
}

/// Messages that were posted and waited for together.
struct Stretch {
    since: Instant,
    until: Instant,
    count: u64,
}

/// Seconds for each message in the best run of stretches, from the posting of the first to the end of the last, as
/// perftest's peak: stretches that end together do not look like one that took no time.
fn fastest(stretches: &[Stretch]) -> f64 {
    /// Longer runs are no better than the average.
    const RUN: usize = 64;
    let mut best = f64::INFINITY;
    for (first, start) in stretches.iter().enumerate() {
        let mut messages = 0;
        for stretch in &stretches[first..stretches.len().min(first + RUN)] {
            messages += stretch.count;
            best = best.min((stretch.until - start.since).as_secs_f64() / messages as f64);
        }
    }
    best
}

impl Bench {
    pub(super) async fn one_sided(&mut self, size: u64) -> Result<Part> {
        let transport = self.transport.clone();
        let facet = transport.one_sided().ok_or_else(|| no_facet(&*transport, "one-sided facet"))?;
        let way =
            self.args.op.way().ok_or_else(|| bug("a collective is measured as a one-sided operation"))?;
        if way == Way::Write && !transport.capability().one_sided_write {
            return Err(no_facet(&*transport, "one-sided writes"));
        }
        // Alone, a rank works on its own memory.
        let others = u64::from(self.world_size() - 1).max(1);
        let areas = if way == Way::Write { others } else { 1 };
        let depth = u64::from(self.args.depth);
        let count = if self.args.one_buffer { 1 } else { (MEMORY / (size * areas)).clamp(1, depth) };
        let depth = if self.args.one_buffer { depth } else { count };
        let (expected, opposite) = patterns(size * count).await?;
        let (there, here) = match way {
            Way::Read => (expected.clone(), &opposite),
            Way::Write => (opposite.repeat(areas as usize), &expected),
        };
        let lent = match self.rank() {
            0 => Some(self.device.pin(HostBuffer::from_bytes(&there)?)?),
            _ => None,
        };
        let registration = match &lent {
            Some(buffer) if way == Way::Read => Some(facet.register(buffer.clone()).await?),
            Some(buffer) => Some(facet.register_writable(buffer.clone()).await?),
            None => None,
        };
        let region = registration.as_ref().map(|registration| registration.region().clone());
        let regions: Vec<Option<RemoteRegion>> = self.exchange(&region).await?;
        let region = regions.into_iter().flatten().next().ok_or_else(|| bug("rank 0 told no region"))?;
        let works = self.rank() != 0 || self.world_size() == 1;
        let mut part = Part::default();
        let slots = Slots {
            facet,
            way,
            region: Arc::new(region),
            // Rank 0 has none, unless it is alone.
            start: if areas > 1 { u64::from(self.rank().saturating_sub(1)) * size * count } else { 0 },
            memory: BufferSlice::whole(self.device.pin(HostBuffer::from_bytes(here)?)?),
            size,
            count,
            depth,
        };
        if works {
            let (warmup, iters) = (u64::from(self.args.warmup), u64::from(self.args.iters));
            slots.stream(warmup, self.deadline()).await?;
            let (seconds, fastest) = slots.stream(iters, self.deadline()).await?;
            (part.seconds, part.fastest) = (seconds, Some(fastest));
            let deadline = self.deadline();
            for number in 0..warmup + iters {
                // As perftest does, which prepares its work requests before.
                let batch = slots.batch(0..1)?;
                let started = Instant::now();
                slots.post(batch, deadline)?.done(deadline).await?;
                if number >= warmup {
                    part.latencies.push(started.elapsed().as_secs_f64());
                }
            }
        }
        if self.args.check {
            // Bytes that arrived before do not count.
            match (way, &lent) {
                (Way::Read, _) => {
                    self.copy(HostBuffer::from_bytes(&opposite)?.slice(), slots.memory.clone()).await?;
                }
                (Way::Write, Some(buffer)) => {
                    let fresh = HostBuffer::from_bytes(&there)?.slice();
                    self.copy(fresh, BufferSlice::whole(buffer.clone())).await?;
                }
                (Way::Write, None) => {}
            }
            self.exchange(&()).await?;
            if works {
                let deadline = self.deadline();
                slots.post(slots.batch(0..count)?, deadline)?.done(deadline).await?;
            }
            self.exchange(&()).await?;
            part.wrong_bytes = match (way, lent) {
                (Way::Read, _) if works => Some(self.wrong(&slots.memory, expected).await?),
                (Way::Write, Some(buffer)) => {
                    let expected = expected.repeat(areas as usize);
                    Some(self.wrong(&BufferSlice::whole(buffer), expected).await?)
                }
                _ => None,
            };
        }
        // The memory is lent until all are through.
        self.exchange(&()).await?;
        drop(registration);
        Ok(part)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn stretches_that_end_together_are_not_fast() {
        let now = Instant::now();
        let at = |millis| now + Duration::from_millis(millis);
        let stretch = |since, until| Stretch { since: at(since), until: at(until), count: 10 };
        // Both are posted at 0; the second is seen right behind the first.
        let each = fastest(&[stretch(0, 20), stretch(0, 21)]);
        assert!((each - 0.021 / 20.0).abs() < 1e-9, "{each}");
        // The first fills the pipe; afterwards one ends each 10 ms.
        let each = fastest(&[stretch(0, 50), stretch(0, 60), stretch(50, 70), stretch(60, 80)]);
        // From the posting of the third to the end of the fourth.
        assert!((each - 0.030 / 20.0).abs() < 1e-9, "{each}");
        assert_eq!(fastest(&[]), f64::INFINITY);
    }
}
