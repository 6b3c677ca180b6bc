//! Faults by seed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::FutureExt;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{LOOK, collective, facets_of_inner, later, one_sided, sleep_unless_aborted};
use crate::{
    device::{Buffer, BufferSlice, Event, HostJob, OnAbort, Stream, host, host::HostBuffer},
    error::{Error, ErrorKind, Key, Result},
    transport::{
        AbortHandle, Collective, CollectiveOp, Communicator, CommunicatorQueue, GroupSpec, OneSided, ReadOp,
        Registration, Transport, WriteOp,
    },
};

/// Bytes that a corrupted operation gets at its start.
const GARBAGE_BYTES: u64 = 16;

/// Which faults, and how often. Probabilities are parts of 1,000,000 of all operations; their sum is at most that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChaosConfig {
    /// Decides everything: the same seed gives the n-th operation of a member the same fate.
    pub seed: u64,
    /// The operation never happens: others wait for it until they give up.
    pub drop_ppm: u32,
    /// The operation begins late.
    pub delay_ppm: u32,
    /// The longest delay.
    pub delay: Duration,
    /// The bytes that arrive are wrong. Only host memory is corrupted; a member that only sends is left alone.
    pub corrupt_ppm: u32,
    /// The link breaks: the operation fails, and a communicator is aborted.
    pub cut_ppm: u32,
    /// So many operations pass untouched first.
    pub spare: u64,
}

/// What was done to whom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChaosCounters {
    /// All operations.
    pub operations: u64,
    /// Those that never happened.
    pub dropped: u64,
    /// Those that were late.
    pub delayed: u64,
    /// Those whose bytes were damaged.
    pub corrupted: u64,
    /// Those that broke the link.
    pub cut: u64,
}

/// A transport on a bad day.
#[derive(Debug)]
pub struct Chaos {
    inner: Arc<dyn Transport>,
    fates: Arc<Fates>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Pass,
    Drop,
    Delay(Duration),
    Corrupt([u8; GARBAGE_BYTES as usize]),
    Cut,
}

#[derive(Debug, Default)]
struct Fates {
    config: ChaosConfig,
    operations: AtomicU64,
    dropped: AtomicU64,
    delayed: AtomicU64,
    corrupted: AtomicU64,
    cut: AtomicU64,
}

impl Fates {
    /// What happens to the next operation.
    fn next(&self) -> Fate {
        let number = self.operations.fetch_add(1, Ordering::Relaxed);
        let fate = self.of(number);
        let counter = match fate {
            Fate::Pass => return fate,
            Fate::Drop => &self.dropped,
            Fate::Delay(_) => &self.delayed,
            Fate::Corrupt(_) => &self.corrupted,
            Fate::Cut => &self.cut,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        fate
    }

    fn of(&self, number: u64) -> Fate {
        let ChaosConfig { seed, drop_ppm, delay_ppm, delay, corrupt_ppm, cut_ppm, spare } = self.config;
        if number < spare {
            return Fate::Pass;
        }
        let mut state = seed ^ number.wrapping_mul(0xD6E8_FEB8_6659_FD93);
        let draw = (mix(&mut state) % 1_000_000) as u32;
        let mut below = 0_u32;
        let mut hits = |ppm: u32| {
            let hit = (below..below.saturating_add(ppm)).contains(&draw);
            below = below.saturating_add(ppm);
            hit
        };
        if hits(drop_ppm) {
            Fate::Drop
        } else if hits(delay_ppm) {
            Fate::Delay(delay.mul_f64((mix(&mut state) >> 11) as f64 / (1_u64 << 53) as f64))
        } else if hits(corrupt_ppm) {
            let mut garbage = [0; GARBAGE_BYTES as usize];
            garbage[..8].copy_from_slice(&mix(&mut state).to_le_bytes());
            garbage[8..].copy_from_slice(&mix(&mut state).to_le_bytes());
            Fate::Corrupt(garbage)
        } else if hits(cut_ppm) {
            Fate::Cut
        } else {
            Fate::Pass
        }
    }
}

/// The next of a sequence of well-mixed numbers (SplitMix64).
fn mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Chaos {
    /// `inner` with faults.
    pub fn wrap(inner: Arc<dyn Transport>, config: ChaosConfig) -> Arc<Self> {
        Arc::new(Self { inner, fates: Arc::new(Fates { config, ..Fates::default() }) })
    }

    /// What happened so far.
    pub fn counters(&self) -> ChaosCounters {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let fates = &self.fates;
        ChaosCounters {
            operations: load(&fates.operations),
            dropped: load(&fates.dropped),
            delayed: load(&fates.delayed),
            corrupted: load(&fates.corrupted),
            cut: load(&fates.cut),
        }
    }
}

fn cut(operation: &'static str) -> Error {
    Error::new(ErrorKind::PeerLost, operation, "the link broke (a fault that the chaos layer made)")
}

#[deny(clippy::missing_trait_methods)]
impl Transport for Chaos {
    facets_of_inner!();
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl Collective for Chaos {
    async fn create_token(&self) -> Result<Bytes> {
        collective(&*self.inner)?.create_token().await
    }

    async fn join(&self, group: GroupSpec, deadline: Instant) -> Result<Communicator> {
        let rank = group.rank;
        let Communicator { queue, abort } = collective(&*self.inner)?.join(group, deadline).await?;
        let gone = CancellationToken::new();
        let queue = Queue {
            inner: queue,
            abort: abort.clone(),
            fates: self.fates.clone(),
            rank,
            gone: gone.clone(),
            _gone_on_drop: gone.drop_guard(),
        };
        Ok(Communicator { queue: Box::new(queue), abort })
    }
}

#[derive(Debug)]
struct Queue {
    inner: Box<dyn CommunicatorQueue>,
    abort: Arc<dyn AbortHandle>,
    fates: Arc<Fates>,
    rank: u32,
    /// Ends dropped operations that nobody aborts.
    gone: CancellationToken,
    _gone_on_drop: DropGuard,
}

impl Queue {
    fn cut(&self) -> Error {
        let cause = cut("broadcast").with(Key::Rank, self.rank);
        self.abort.abort(cause.clone());
        cause
    }

    /// An operation that does not happen, until the communicator is aborted or left.
    async fn never(gone: CancellationToken, abort: Arc<dyn AbortHandle>) -> Result<()> {
        loop {
            if let Some(cause) = abort.poisoned() {
                return Err(cause);
            }
            if tokio::time::timeout(LOOK, gone.cancelled()).await.is_ok() {
                return Err(cut("broadcast"));
            }
        }
    }
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl CommunicatorQueue for Queue {
    async fn enqueue(&mut self, ops: Vec<CollectiveOp>, stream: &Arc<dyn Stream>) -> Result<Event> {
        if let Some(cause) = self.abort.poisoned() {
            return Err(cause);
        }
        let fate = self.fates.next();
        match (fate, stream.host()) {
            (Fate::Pass, _) => {}
            (Fate::Cut, _) => return Err(self.cut()),
            (Fate::Drop, None) => Self::never(self.gone.clone(), self.abort.clone()).await?,
            (Fate::Delay(by), None) => sleep_unless_aborted(Instant::now() + by, &self.abort).await?,
            (Fate::Drop, Some(host)) => {
                let (gone, abort) = (self.gone.clone(), self.abort.clone());
                let writes = ops.into_iter().filter(|op| op.root != self.rank).map(|op| op.buffer).collect();
                host.submit(HostJob {
                    label: "chaos",
                    on_abort: OnAbort::MaySucceed(writes),
                    run: Self::never(gone, abort).boxed(),
                })?;
                return stream.record();
            }
            (Fate::Delay(by), Some(host)) => {
                let abort = self.abort.clone();
                let run = async move { sleep_unless_aborted(Instant::now() + by, &abort).await };
                let on_abort = OnAbort::MaySucceed(Vec::new());
                host.submit(HostJob { label: "chaos", on_abort, run: run.boxed() })?;
            }
            (Fate::Corrupt(garbage), host) => {
                let victim = ops.iter().find(|op| op.root != self.rank && op.buffer.len_bytes() > 0);
                if let (Some(victim), Some(_)) = (victim, host) {
                    let (garbage, place) = damage(&garbage, &victim.buffer)?;
                    self.inner.enqueue(ops, stream).await?;
                    stream.copy(garbage, place)?;
                    return stream.record();
                }
            }
        }
        self.inner.enqueue(ops, stream).await
    }
}

/// What to write, and where.
fn damage(garbage: &[u8], victim: &BufferSlice) -> Result<(BufferSlice, BufferSlice)> {
    let len = victim.len_bytes().min(GARBAGE_BYTES);
    Ok((HostBuffer::from_bytes(garbage)?.slice().slice(0..len)?, victim.slice(0..len)?))
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl OneSided for Chaos {
    async fn register(&self, buffer: Arc<dyn Buffer>) -> Result<Arc<dyn Registration>> {
        one_sided(&*self.inner)?.register(buffer).await
    }

    fn post_read(&self, batch: Vec<ReadOp>, deadline: Instant) -> Result<Event> {
        const OPERATION: &str = "read remote memory";
        let post = |facet: &dyn OneSided, batch, deadline| facet.post_read(batch, deadline);
        let corrupt = |facet: &dyn OneSided, batch: Vec<ReadOp>, deadline, garbage: &[u8]| {
            let victim = batch.iter().map(|op| &op.into).find(|into| into.len_bytes() > 0).cloned();
            let event = facet.post_read(batch, deadline)?;
            let Some(victim) = victim else { return Ok(event) };
            let (garbage, place) = damage(garbage, &victim)?;
            later::spawn(OPERATION, async move {
                event.done(deadline).await?;
                host::copy_bytes(&garbage, &place)
            })
        };
        self.post(OPERATION, batch, deadline, post, corrupt)
    }

    async fn register_writable(&self, buffer: Arc<dyn Buffer>) -> Result<Arc<dyn Registration>> {
        one_sided(&*self.inner)?.register_writable(buffer).await
    }

    fn post_write(&self, batch: Vec<WriteOp>, deadline: Instant) -> Result<Event> {
        let post = |facet: &dyn OneSided, batch, deadline| facet.post_write(batch, deadline);
        let corrupt = |facet: &dyn OneSided, mut batch: Vec<WriteOp>, deadline, garbage: &[u8]| {
            // The caller's own memory stays as it is: the first bytes of one write come from elsewhere.
            if let Some(victim) = batch.iter_mut().find(|op| op.from.len_bytes() > 0) {
                let (garbage, place) = damage(garbage, &victim.from)?;
                let mut damaged = victim.clone();
                victim.offset += place.len_bytes();
                victim.from = victim.from.slice(place.len_bytes()..victim.from.len_bytes())?;
                damaged.from = garbage;
                batch.push(damaged);
            }
            facet.post_write(batch, deadline)
        };
        self.post("write remote memory", batch, deadline, post, corrupt)
    }
}

impl Chaos {
    /// Posts a batch as fate will have it; only how bytes are damaged depends on the way that they go.
    fn post<T: Send + 'static>(
        &self,
        operation: &'static str,
        batch: Vec<T>,
        deadline: Instant,
        post: fn(&dyn OneSided, Vec<T>, Instant) -> Result<Event>,
        corrupt: impl FnOnce(&dyn OneSided, Vec<T>, Instant, &[u8]) -> Result<Event>,
    ) -> Result<Event> {
        let inner = self.inner.clone();
        match self.fates.next() {
            Fate::Pass => post(one_sided(&*inner)?, batch, deadline),
            Fate::Cut => later::spawn(operation, async move { Err(cut(operation)) }),
            Fate::Drop => later::spawn(operation, async move {
                // The memory is owned until the batch is retired, as by a transport that waits.
                let _batch = batch;
                tokio::time::sleep_until(deadline.into()).await;
                Err(Error::new(ErrorKind::Timeout, operation, "the bytes did not arrive by the deadline"))
            }),
            Fate::Delay(by) => later::spawn(operation, async move {
                tokio::time::sleep_until((Instant::now() + by).min(deadline).into()).await;
                let event = post(one_sided(&*inner)?, batch, deadline)?;
                event.done(deadline).await
            }),
            Fate::Corrupt(garbage) => corrupt(one_sided(&*inner)?, batch, deadline, &garbage),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fates(config: ChaosConfig, count: u64) -> Vec<Fate> {
        let fates = Fates { config, ..Fates::default() };
        (0..count).map(|_| fates.next()).collect()
    }

    #[test]
    fn fates_follow_the_seed_and_the_probabilities() {
        let config = ChaosConfig {
            seed: 7,
            drop_ppm: 100_000,
            delay_ppm: 200_000,
            delay: Duration::from_millis(10),
            corrupt_ppm: 50_000,
            cut_ppm: 10_000,
            spare: 3,
        };
        let all = fates(config, 100_000);
        assert_eq!(all, fates(config, 100_000));
        assert_ne!(all, fates(ChaosConfig { seed: 8, ..config }, 100_000));
        assert!(all[..3].iter().all(|fate| *fate == Fate::Pass));
        let share = |hit: fn(&Fate) -> bool| all.iter().filter(|fate| hit(fate)).count() as f64 / 1e5;
        let close =
            |found: f64, expected: f64| assert!((found - expected).abs() < 0.01, "{found} {expected}");
        close(share(|f| *f == Fate::Drop), 0.1);
        close(share(|f| matches!(f, Fate::Delay(by) if *by <= Duration::from_millis(10))), 0.2);
        close(share(|f| matches!(f, Fate::Corrupt(_))), 0.05);
        close(share(|f| *f == Fate::Cut), 0.01);
        assert!(fates(ChaosConfig::default(), 1000).iter().all(|fate| *fate == Fate::Pass));
    }
}
