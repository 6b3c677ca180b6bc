//! One rank of the benchmark.

use std::{collections::VecDeque, ops::Range, sync::Arc, time::Instant};

use bytes::Bytes;
use ckpt_core::{
    DType, Epoch, Error, ErrorKind, Result,
    checkpoint::{CheckpointSource, NamedTensor},
    control::Session,
    device::{BufferSlice, DeviceBackend, Event, Stream, host::HostBuffer},
    transport::{AbortHandle, CollectiveOp, Communicator, GroupSpec, Transport},
    types::TensorMeta,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{Op, TransportArgs};

const OPERATION: &str = "measure a transport";
/// Groups that are on the stream at a time: enough to keep a link busy, few enough to end soon.
const IN_FLIGHT: usize = 8;

/// What one size gave, over all ranks.
#[derive(Clone, Debug, Default)]
pub(super) struct Sample {
    pub(super) size_bytes: u64,
    /// Of one operation, on the slowest rank.
    pub(super) seconds: f64,
    /// The same in the fastest stretch, on the fastest rank; not for collectives.
    pub(super) fastest: Option<f64>,
    /// Of each single read or write, in ascending order; empty for collectives.
    pub(super) latencies: Vec<f64>,
    /// Bytes that arrived wrong, if they were compared.
    pub(super) wrong_bytes: Option<u64>,
}

/// What a rank tells the others after a size.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct Part {
    pub(super) seconds: f64,
    pub(super) fastest: Option<f64>,
    pub(super) latencies: Vec<f64>,
    pub(super) wrong_bytes: Option<u64>,
}

pub(super) struct Bench {
    pub(super) args: TransportArgs,
    session: Session,
    pub(super) device: Arc<dyn DeviceBackend>,
    pub(super) transport: Arc<dyn Transport>,
    stream: Arc<dyn Stream>,
    gathers: u64,
}

impl Bench {
    pub(super) fn new(
        args: TransportArgs,
        session: Session,
        device: Arc<dyn DeviceBackend>,
        transport: Arc<dyn Transport>,
    ) -> Result<Self> {
        let stream = device.stream("bench")?;
        Ok(Self { args, session, device, transport, stream, gathers: 0 })
    }

    pub(super) fn rank(&self) -> u32 {
        self.session.rank()
    }

    pub(super) fn world_size(&self) -> u32 {
        self.session.world_size()
    }

    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.args.limit()
    }

    /// Measures all sizes; on rank 0 the answer is what all ranks found.
    pub(super) async fn run(mut self) -> Result<Option<Vec<Sample>>> {
        let mut samples = Vec::new();
        let mut communicator = match self.args.op {
            Op::Broadcast | Op::Allgather => Some(self.join().await?),
            Op::Read | Op::Write => None,
        };
        for size in self.args.sizes.clone() {
            let part = match &mut communicator {
                Some(communicator) => self.collective(communicator, size.0).await?,
                None => self.one_sided(size.0).await?,
            };
            samples.push(self.combine(size.0, part).await?);
        }
        // Nobody ends its transport before all are through.
        self.exchange(&()).await?;
        Ok((self.rank() == 0).then_some(samples))
    }

    async fn join(&mut self) -> Result<Communicator> {
        let transport = self.transport.clone();
        let facet = transport.collective().ok_or_else(|| no_facet(&*transport, "broadcasts"))?;
        let token = match self.rank() {
            0 => Some(facet.create_token().await?),
            _ => None,
        };
        let tokens: Vec<Option<Bytes>> = self.exchange(&token).await?;
        let token = tokens.into_iter().flatten().next().ok_or_else(|| bug("rank 0 told no token"))?;
        let (rank, world_size) = (self.rank(), self.world_size());
        facet.join(GroupSpec { token, rank, world_size, epoch: Epoch(1) }, self.deadline()).await
    }

    async fn collective(&mut self, communicator: &mut Communicator, size: u64) -> Result<Part> {
        let ranks = u64::from(self.world_size());
        // The ring gives the memory its address: it must stay until the end.
        let ring = self.device.allocate_ring(size)?;
        let memory = BufferSlice::whole(ring.buffer()).slice(0..size)?;
        // The parts of an allgather tile the result; the last ones may be shorter, or empty.
        let share = size.div_ceil(ranks);
        let cut = |rank: u64| (rank * share).min(size)..((rank + 1) * share).min(size);
        let parts: Vec<(u32, Range<u64>)> = match self.args.op {
            Op::Allgather => (0..self.world_size()).map(|rank| (rank, cut(rank.into()))).collect(),
            _ => vec![(0, 0..size)],
        };
        let mut ops = Vec::new();
        for (root, range) in &parts {
            ops.push(CollectiveOp { root: *root, buffer: memory.slice(range.clone())? });
        }
        self.repeat(communicator, &ops, self.args.warmup).await?;
        self.exchange(&()).await?;
        let started = Instant::now();
        self.repeat(communicator, &ops, self.args.iters).await?;
        let seconds = started.elapsed().as_secs_f64() / f64::from(self.args.iters);
        let mut wrong_bytes = None;
        if self.args.check {
            let (expected, mut start) = patterns(size).await?;
            // Own parts hold the pattern, the others its opposite.
            for (root, range) in parts {
                if root == self.rank() {
                    let range = range.start as usize..range.end as usize;
                    start[range.clone()].copy_from_slice(&expected[range]);
                }
            }
            self.copy(self.pinned(&start)?, memory.clone()).await?;
            // A receive offers its range, so it is filled before anybody sends.
            self.exchange(&()).await?;
            self.repeat(communicator, &ops, 1).await?;
            wrong_bytes = Some(self.wrong(&memory, expected).await?);
        }
        Ok(Part { seconds, wrong_bytes, ..Part::default() })
    }

    async fn repeat(&self, communicator: &mut Communicator, ops: &[CollectiveOp], times: u32) -> Result<()> {
        let deadline = self.deadline();
        let mut events: VecDeque<Event> = VecDeque::with_capacity(IN_FLIGHT);
        for _ in 0..times {
            if events.len() == IN_FLIGHT
                && let Some(oldest) = events.pop_front()
            {
                settle(&oldest, &communicator.abort, deadline).await?;
            }
            events.push_back(communicator.queue.enqueue(ops.to_vec(), &self.stream).await?);
        }
        match events.back() {
            Some(last) => settle(last, &communicator.abort, deadline).await,
            None => Ok(()),
        }
    }

    /// Bytes of `memory` that are not as expected.
    pub(super) async fn wrong(&self, memory: &BufferSlice, expected: Vec<u8>) -> Result<u64> {
        // Into bytes that are all wrong: a copy that does not happen is seen.
        let (_, opposite) = patterns(expected.len() as u64).await?;
        let found = self.pinned(&opposite)?;
        self.copy(memory.clone(), found.clone()).await?;
        let counted = tokio::task::spawn_blocking(move || {
            let meta = TensorMeta::new("bench", DType::U8, [expected.len() as u64])?;
            let found = CheckpointSource::from_tensors([NamedTensor::from_buffer(meta, found)?])?.read(0)?;
            Ok(found.iter().zip(&expected).filter(|(a, b)| a != b).count() as u64)
        });
        counted.await.unwrap_or_else(|error| Err(bug("the comparing thread died").caused_by(error)))
    }

    /// Host memory with these bytes. Accelerators copy from and to pinned memory only.
    pub(super) fn pinned(&self, bytes: &[u8]) -> Result<BufferSlice> {
        Ok(BufferSlice::whole(self.device.pin(HostBuffer::from_bytes(bytes)?)?))
    }

    pub(super) async fn copy(&self, from: BufferSlice, to: BufferSlice) -> Result<()> {
        self.stream.copy(from, to)?;
        self.stream.record()?.done(self.deadline()).await
    }

    async fn combine(&mut self, size_bytes: u64, part: Part) -> Result<Sample> {
        let parts: Vec<Part> = self.exchange(&part).await?;
        let mut sample = Sample { size_bytes, ..Sample::default() };
        for part in parts {
            sample.seconds = sample.seconds.max(part.seconds);
            if let Some(fastest) = part.fastest {
                sample.fastest = Some(sample.fastest.map_or(fastest, |known| known.min(fastest)));
            }
            sample.latencies.extend(part.latencies);
            if let Some(wrong) = part.wrong_bytes {
                *sample.wrong_bytes.get_or_insert(0) += wrong;
            }
        }
        sample.latencies.sort_by(f64::total_cmp);
        Ok(sample)
    }

    /// Tells every rank and hears every rank.
    pub(super) async fn exchange<T: Serialize + DeserializeOwned>(&mut self, mine: &T) -> Result<Vec<T>> {
        self.gathers += 1;
        let name = format!("bench {}", self.gathers);
        let not_json = |error: serde_json::Error| bug("what a rank tells is not JSON").caused_by(error);
        let text = serde_json::to_vec(mine).map_err(not_json)?;
        let parts = self.session.gather(&name, text.into(), self.deadline()).await?;
        parts.iter().map(|part| serde_json::from_slice(part)).collect::<Result<_, _>>().map_err(not_json)
    }
}

/// Waits for a group, and sees whether it counts.
async fn settle(event: &Event, abort: &Arc<dyn AbortHandle>, deadline: Instant) -> Result<()> {
    let ended = event.done(deadline).await;
    match (abort.poisoned(), ended) {
        (Some(cause), _) => Err(cause),
        (None, Err(error)) => {
            abort.abort(error.clone());
            Err(error)
        }
        (None, Ok(())) => Ok(()),
    }
}

pub(super) fn no_facet(transport: &dyn Transport, what: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        OPERATION,
        format!("transport `{}` has no {what}; choose another --op", transport.name()),
    )
}

pub(super) fn bug(message: &'static str) -> Error {
    Error::new(ErrorKind::Internal, OPERATION, message)
}

/// Bytes that differ by place, without a short period, and the opposite of each. Made on another thread, since large
/// ones take a while.
pub(super) async fn patterns(len: u64) -> Result<(Vec<u8>, Vec<u8>)> {
    let make = move || {
        let words =
            (0..len.div_ceil(8)).map(|place| place.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let mut bytes = Vec::with_capacity(len as usize + 8);
        let mut opposite = Vec::with_capacity(len as usize + 8);
        for word in words {
            bytes.extend_from_slice(&word.to_le_bytes());
            opposite.extend_from_slice(&(!word).to_le_bytes());
        }
        bytes.truncate(len as usize);
        opposite.truncate(len as usize);
        (bytes, opposite)
    };
    let made = tokio::task::spawn_blocking(make).await;
    made.map_err(|error| bug("the thread that makes patterns died").caused_by(error))
}
