//! One thread a peer: opens the peer's segment, submits transfers, polls them, and checks the owner's ledger: behind a
//! batch, and before writes as well.
//!
//! A peer that does not answer blocks only its own thread; whoever waits is freed by the deadline.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel},
    },
    time::{Duration, Instant},
};

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{BufferSlice, host::HostBuffer},
    transport::{Transfer, Way},
};

use crate::{
    MooncakeError,
    api::{READ, Request, WRITE},
    batch::Posted,
    engine::{Batch, Engine},
    keeper::Command,
    ledger::{Check, RECORD_BYTES},
};

/// Requests that one batch of Mooncake's holds.
const WINDOW: usize = 128;
/// One request asks for at most this much.
const REQUEST_BYTES: u64 = 1 << 30;
const SHORTEST_PAUSE: Duration = Duration::from_micros(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);
/// For batches that nobody waits for.
const LATE_PAUSE: Duration = Duration::from_millis(50);

/// One peer's part of a batch.
pub(crate) struct Job {
    pub(crate) way: Way,
    pub(crate) transfers: Vec<Transfer>,
    pub(crate) posted: Arc<Posted>,
}

/// Starts the peer's thread. It ends when the sender is dropped and its last batch has ended.
pub(crate) fn start(engine: Arc<Engine>, peer: &str, keeper: Sender<Command>) -> Result<Sender<Job>> {
    let (jobs, receiver) = channel();
    let lane =
        Lane { engine, peer: peer.to_owned(), keeper, segment: None, stale: false, scratch: Vec::new() };
    std::thread::Builder::new().name("mooncake-read".to_owned()).spawn(move || lane.run(&receiver)).map_err(
        |e| {
            Error::new(ErrorKind::ResourceExhausted, "read remote memory", "the system has no more threads")
                .caused_by(e)
        },
    )?;
    Ok(jobs)
}

struct Lane {
    engine: Arc<Engine>,
    peer: String,
    keeper: Sender<Command>,
    segment: Option<i32>,
    /// What is known of the segment did not work: ask the peer again.
    stale: bool,
    /// Registered memory for records.
    scratch: Vec<Arc<HostBuffer>>,
}

impl Lane {
    fn run(mut self, jobs: &Receiver<Job>) {
        let mut active: Vec<Active> = Vec::new();
        let mut open = true;
        while open || !active.is_empty() {
            let pause = active.iter().map(Active::pause).min();
            let next = match pause {
                None => jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(pause) if open => jobs.recv_timeout(pause),
                Some(pause) => {
                    std::thread::sleep(pause);
                    Err(RecvTimeoutError::Timeout)
                }
            };
            match next {
                Ok(job) => active.push(Active::new(job)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => open = false,
            }
            while open {
                match jobs.try_recv() {
                    Ok(job) => active.push(Active::new(job)),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => open = false,
                }
            }
            active.retain_mut(|read| match read.step(&mut self) {
                None => true,
                Some(outcome) => {
                    read.retire(&mut self, outcome);
                    false
                }
            });
        }
    }

    fn segment(&mut self) -> Result<i32> {
        if let Some(segment) = self.segment.filter(|_| !self.stale) {
            return Ok(segment);
        }
        let segment = self.engine.segment(&self.peer, self.stale)?;
        (self.segment, self.stale) = (Some(segment), false);
        Ok(segment)
    }

    /// Where the protocol asks for it, registers this side's memory.
    fn prepare(&self, memory: &[BufferSlice], deadline: Instant) -> Result<()> {
        if !self.engine.choice.protocol.registers_destinations() {
            return Ok(());
        }
        for (index, slice) in memory.iter().enumerate() {
            if memory[..index].iter().any(|other| Arc::ptr_eq(other.buffer(), slice.buffer())) {
                continue;
            }
            let (reply, answer) = channel();
            let command = Command::Destination { buffer: slice.buffer().clone(), reply };
            let left = deadline.saturating_duration_since(Instant::now());
            let failed = |kind, what| Error::new(kind, "register memory", what);
            self.keeper.send(command).map_err(|_| failed(ErrorKind::Aborted, "the transport is closing"))?;
            answer.recv_timeout(left).map_err(|_| {
                failed(ErrorKind::Timeout, "the memory was not registered by the read's deadline")
            })??;
        }
        Ok(())
    }

    fn scratch(&mut self) -> Result<Arc<HostBuffer>> {
        match self.scratch.pop() {
            Some(buffer) => Ok(buffer),
            None => HostBuffer::allocate(WINDOW as u64 * RECORD_BYTES),
        }
    }
}

/// What is under way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The ledger, before a write: memory that was released must not be written.
    Before,
    Data,
    /// The ledger: did all of it count?
    After,
}

/// A range of the peer's memory and this side's.
struct Piece {
    there: u64,
    memory: BufferSlice,
}

struct Active {
    job: Job,
    pieces: Vec<Piece>,
    checks: Vec<Check>,
    stage: Stage,
    /// Pieces or checks of this stage that were submitted.
    submitted: usize,
    /// Where the last window of this stage starts.
    window: usize,
    running: Option<Batch>,
    scratch: Option<Arc<HostBuffer>>,
    retried: bool,
    /// Why the data did not come, while the ledger is asked for a better reason.
    failure: Option<MooncakeError>,
    /// When the running batch was submitted.
    since: Instant,
    invalid: Option<Error>,
}

impl Active {
    fn new(job: Job) -> Self {
        let mut active = Self {
            job,
            pieces: Vec::new(),
            checks: Vec::new(),
            stage: Stage::Data,
            submitted: 0,
            window: 0,
            running: None,
            scratch: None,
            retried: false,
            failure: None,
            since: Instant::now(),
            invalid: None,
        };
        active.invalid = active.plan().err();
        active.begin();
        active
    }

    /// At the first stage again.
    fn begin(&mut self) {
        self.stage = if self.job.way == Way::Write { Stage::Before } else { Stage::Data };
        self.submitted = 0;
    }

    /// Fewer and larger requests, and each region's record once.
    fn plan(&mut self) -> Result<()> {
        for op in &self.job.transfers {
            if let Some(check) = Check::of(self.job.way, &op.region)?
                && !self.checks.contains(&check)
            {
                self.checks.push(check);
            }
            let (there, len) = (op.region.address + op.offset, op.memory.len_bytes());
            if let Some(last) = self.pieces.last_mut()
                && last.there + last.memory.len_bytes() == there
                && Arc::ptr_eq(last.memory.buffer(), op.memory.buffer())
                && last.memory.offset() + last.memory.len_bytes() == op.memory.offset()
                && last.memory.len_bytes() + len <= REQUEST_BYTES
            {
                let range = last.memory.offset()..op.memory.offset() + len;
                last.memory = BufferSlice::new(op.memory.buffer().clone(), range)?;
                continue;
            }
            let mut start = 0;
            while start < len {
                let end = len.min(start + REQUEST_BYTES);
                self.pieces.push(Piece { there: there + start, memory: op.memory.slice(start..end)? });
                start = end;
            }
        }
        Ok(())
    }

    fn pause(&self) -> Duration {
        if self.job.posted.is_over() {
            return LATE_PAUSE;
        }
        // A few percent of the time that it takes anyway.
        (self.since.elapsed() / 32).clamp(SHORTEST_PAUSE, LONGEST_PAUSE)
    }

    /// `None` while Mooncake works on it; never returns while it has the memory.
    fn step(&mut self, lane: &mut Lane) -> Option<Result<()>> {
        loop {
            if let Some(batch) = &mut self.running {
                match batch.poll() {
                    None => {
                        self.job.posted.expire();
                        return None;
                    }
                    Some(outcome) => {
                        self.running = None;
                        let next = match outcome {
                            Ok(()) => self.window_ended(),
                            Err(failure) => self.failed(lane, failure),
                        };
                        if let Err(error) = next {
                            return Some(Err(error));
                        }
                    }
                }
            }
            self.job.posted.expire();
            if let Some(error) = self.invalid.take() {
                return Some(Err(error));
            }
            if self.job.posted.is_over() {
                // The outcome is set already; this one is not seen.
                return Some(Ok(()));
            }
            match self.submit(lane) {
                Ok(true) => {}
                Ok(false) => return Some(self.finish()),
                Err(error) => return Some(Err(error)),
            }
        }
    }

    /// Submits the next window; `false` if nothing is left.
    fn submit(&mut self, lane: &mut Lane) -> Result<bool> {
        if self.stage == Stage::Before && self.submitted == self.checks.len() {
            (self.stage, self.submitted) = (Stage::Data, 0);
        }
        if self.stage == Stage::Data && self.submitted == self.pieces.len() {
            (self.stage, self.submitted) = (Stage::After, 0);
        }
        if self.stage == Stage::After && self.submitted == self.checks.len() {
            return Ok(false);
        }
        let peer = lane.peer.clone();
        let named = |error: Error| error.with(Key::Peer, &peer);
        let segment = lane.segment()?;
        self.window = self.submitted;
        let (mut requests, memory) = match self.stage {
            Stage::Data => {
                let end = self.pieces.len().min(self.window + WINDOW);
                let pieces = &self.pieces[self.window..end];
                let way = self.job.way;
                let request = |piece: &Piece| request(way, segment, piece.there, &piece.memory);
                (pieces.iter().map(request).collect(), pieces.iter().map(|p| p.memory.clone()).collect())
            }
            Stage::Before | Stage::After => {
                let end = self.checks.len().min(self.window + WINDOW);
                let scratch = match &self.scratch {
                    Some(scratch) => scratch.slice(),
                    None => self.scratch.insert(lane.scratch()?).slice(),
                };
                let mut requests = Vec::new();
                for (place, check) in (0..).zip(&self.checks[self.window..end]) {
                    let into = scratch.slice(place * RECORD_BYTES..(place + 1) * RECORD_BYTES)?;
                    requests.push(request(Way::Read, segment, check.record, &into));
                }
                (requests, vec![scratch])
            }
        };
        let requests: &mut Vec<Request> = &mut requests;
        lane.prepare(&memory, self.job.posted.deadline).map_err(named)?;
        self.submitted += requests.len();
        self.since = Instant::now();
        self.running = Some(Batch::submit(&lane.engine, requests, memory).map_err(named)?);
        Ok(true)
    }

    fn window_ended(&mut self) -> Result<()> {
        let (Stage::Before | Stage::After, Some(scratch)) = (self.stage, &self.scratch) else {
            return Ok(());
        };
        let records = scratch.slice();
        // SAFETY: the batch that wrote the scratch has ended, and only this job has it.
        let records = unsafe { records.as_slice() }?;
        let peer = self.peer();
        self.checks[self.window..self.submitted]
            .iter()
            .zip(records.chunks_exact(RECORD_BYTES as usize))
            .try_for_each(|(check, record)| check.verify(record))
            .map_err(|error| error.with(Key::Peer, peer))
    }

    /// Mooncake says only "failed": finds out what to do, or why.
    fn failed(&mut self, lane: &mut Lane, failure: MooncakeError) -> Result<()> {
        tracing::debug!(peer = lane.peer, %failure, retried = self.retried, "a transfer failed");
        lane.stale = true;
        lane.engine.reach(self.job.way.operation(), &lane.peer)?;
        match self.stage {
            // Its keys may be those of an earlier registration.
            Stage::Data if !self.retried => {
                self.retried = true;
                self.begin();
            }
            Stage::Data => {
                self.failure = Some(failure);
                // Straight to the ledger.
                self.submitted = self.pieces.len();
            }
            Stage::Before | Stage::After if !self.retried => (self.retried, self.submitted) = (true, 0),
            Stage::Before | Stage::After => {
                let what = "the owner does not serve its ledger: it has restarted; get its metas again";
                return Err(Error::new(ErrorKind::Aborted, self.job.way.operation(), what)
                    .with(Key::Peer, &lane.peer)
                    .caused_by(failure));
            }
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        let Some(failure) = self.failure else { return Ok(()) };
        let wanted = self.pieces.iter().map(|p| p.there).min().unwrap_or_default()
            ..self.pieces.iter().map(|p| p.there + p.memory.len_bytes()).max().unwrap_or_default();
        Err(Error::new(
            ErrorKind::Backend,
            self.job.way.operation(),
            format!(
                "the peer is there but refuses addresses {:#x}..{:#x}: not registered there, or too long; get its metas again",
                wanted.start, wanted.end
            ),
        )
        .with(Key::Peer, self.peer())
        .with(Key::Code, failure.code)
        .caused_by(failure))
    }

    fn peer(&self) -> &str {
        self.job.transfers.first().map_or("", |op| &op.region.peer)
    }

    fn retire(&mut self, lane: &mut Lane, outcome: Result<()>) {
        lane.scratch.extend(self.scratch.take());
        self.pieces.clear();
        self.job.transfers.clear();
        self.job.posted.part_ended(outcome);
    }
}

fn request(way: Way, target: i32, there: u64, memory: &BufferSlice) -> Request {
    let (source, length) = (memory.address(), memory.len_bytes());
    let opcode = if way == Way::Read { READ } else { WRITE };
    Request { opcode, source, target, target_offset: there, length }
}
