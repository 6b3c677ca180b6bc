//! One update from the worker's point of view.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Canceller, HostMapper, RingMapper, TensorView,
    link::Link,
    wire::{self, Down, Entry, Hello, Open, RingId, TensorRef, Up},
};
use crate::{
    device::{Buffer, MemoryKind},
    error::{Error, ErrorKind, Key, Result},
    types::TensorMeta,
};

/// What an engine does with new weights. An error of any method reaches every rank with its text.
pub trait Apply {
    /// All tensors that may come, in the order of [`TensorView::layout_index`]. Called before the first bucket of
    /// every update whose parameter server knows them in advance: a place to look parameters up once.
    fn layout(&mut self, tensors: &Arc<[TensorMeta]>) -> Result<()> {
        let _ = tensors;
        Ok(())
    }

    /// Copies the tensors out of the ring. When it returns, their bytes may be overwritten, so a device must have
    /// finished its copies.
    fn bucket(&mut self, bucket: u32, tensors: &[TensorView<'_>]) -> Result<()>;

    /// All buckets are in and the ring is about to be unmapped; nothing may refer to it any more.
    fn release(&mut self) -> Result<()> {
        Ok(())
    }

    /// All buckets are in and the ring is gone: makes the new weights ready for use.
    fn post_hook(&mut self) -> Result<()> {
        Ok(())
    }

    /// The update failed somewhere: new and old weights may be mixed. [`NativeWorker::update`] returns `cause` next.
    fn failed(&mut self, cause: &Error) {
        let _ = cause;
    }
}

/// What an update did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UpdateSummary {
    /// Buckets taken.
    pub buckets: u64,
    /// Tensors taken.
    pub tensors: u64,
    /// Their bytes.
    pub tensor_bytes: u64,
    /// Whether the mapping of an earlier update was used again.
    pub mapping_kept: bool,
    /// From the connection to the answer to the post hook.
    pub elapsed: Duration,
}

/// A worker of one device. Keep the value between updates: mapping and layout are used again when they are the same.
pub struct NativeWorker {
    uuid: String,
    software: String,
    window: u32,
    mapper: Box<dyn RingMapper>,
    canceller: Canceller,
    kept: Option<(RingId, Arc<dyn Buffer>)>,
    layout: Option<(u128, Arc<[TensorMeta]>)>,
}

impl std::fmt::Debug for NativeWorker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NativeWorker").field("uuid", &self.uuid).finish_non_exhaustive()
    }
}

impl NativeWorker {
    /// A worker of the device `uuid` that maps host memory.
    pub fn new(uuid: impl Into<String>) -> Self {
        Self {
            uuid: uuid.into(),
            software: concat!("ckpt/", env!("CARGO_PKG_VERSION")).to_owned(),
            window: 1,
            mapper: Box::new(HostMapper),
            canceller: Canceller::default(),
            kept: None,
            layout: None,
        }
    }

    /// Maps rings with `mapper` instead.
    pub fn with_mapper(mut self, mapper: impl RingMapper + 'static) -> Self {
        self.mapper = Box::new(mapper);
        self
    }

    /// Lets the parameter server have `window` buckets under way (at least 1, the default).
    pub fn with_window(mut self, window: u32) -> Self {
        self.window = window.max(1);
        self
    }

    /// The device.
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// Ends this worker's updates from another thread.
    pub fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    /// Unmaps a ring that was kept for the next update.
    pub fn forget(&mut self) {
        self.kept = None;
    }

    /// Takes one update from the parameter server at `endpoint`. Blocks until it is over, at most until `deadline`
    /// (and as long as a call of `apply` takes). The error is this worker's own, or what the parameter server says.
    pub fn update(
        &mut self,
        endpoint: &str,
        apply: &mut dyn Apply,
        deadline: Instant,
    ) -> Result<UpdateSummary> {
        let result = self.run(endpoint, apply, deadline).map_err(|e| e.with(Key::Worker, &self.uuid));
        if let Err(error) = &result {
            self.kept = None;
            apply.failed(error);
        }
        result
    }

    fn run(&mut self, endpoint: &str, apply: &mut dyn Apply, deadline: Instant) -> Result<UpdateSummary> {
        let begun = Instant::now();
        let mut link = Link::connect(endpoint, self.canceller.clone(), deadline)?;
        link.send(&Up::Hello(Hello {
            pid: std::process::id(),
            capabilities: self.mapper.capabilities(),
            window: self.window,
            layout: self.layout.as_ref().map_or(0, |(digest, _)| *digest),
            uuid: self.uuid.clone(),
            software: self.software.clone(),
        }))?;
        let mut session = Session { stage: Stage::Start, ring: None, summary: UpdateSummary::default() };
        loop {
            let message = match link.receive() {
                Ok(Down::Fail { text }) => {
                    session.ring = None;
                    self.kept = None;
                    // It only speeds up what the closed link says anyway.
                    let _ = link.send(&Up::Dropped);
                    return Err(link.error(ErrorKind::Aborted, text));
                }
                Ok(message) => message,
                // What follows bytes that make no sense makes none either: say so, if the other side still listens.
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    let _ = link.send(&Up::Error { text: error.to_string() });
                    return Err(error);
                }
                Err(error) => return Err(error),
            };
            match self.step(&mut link, &mut session, apply, message) {
                Ok(Some(answer)) => link.send(&answer)?,
                Ok(None) => {}
                Err(error) => return Err(self.report(&mut link, session, error)),
            }
            if session.stage == Stage::Finished {
                session.summary.elapsed = begun.elapsed();
                return Ok(session.summary);
            }
        }
    }

    /// Sends this worker's error, then waits until the parameter server has told every rank and lets this one go: all
    /// workers of an engine leave an update in the same way. The first error is the one that counts.
    fn report(&mut self, link: &mut Link, session: Session, error: Error) -> Error {
        drop(session);
        self.kept = None;
        if link.send(&Up::Error { text: error.to_string() }).is_err() {
            return error;
        }
        loop {
            match link.receive() {
                Ok(Down::Fail { .. }) => {
                    // See above: the closed link says the same.
                    let _ = link.send(&Up::Dropped);
                    return error;
                }
                // Sent before the parameter server knew.
                Ok(_) => {}
                Err(_) => return error,
            }
        }
    }

    fn step(
        &mut self,
        link: &mut Link,
        session: &mut Session,
        apply: &mut dyn Apply,
        message: Down,
    ) -> Result<Option<Up>> {
        match (session.stage, message) {
            (Stage::Start, Down::Open(open)) => {
                let kept = self.open(link, session, apply, open)?;
                session.stage = Stage::Open;
                session.summary.mapping_kept = kept;
                Ok(Some(Up::Opened { kept }))
            }
            (Stage::Open, Down::Bucket { bucket, entries }) => {
                self.bucket(session, apply, bucket, &entries).map_err(|e| e.with(Key::Bucket, bucket))?;
                Ok(Some(Up::Ack { bucket }))
            }
            (Stage::Open, Down::Release { keep }) => {
                apply.release()?;
                session.stage = Stage::Released;
                session.ring = None;
                if !keep {
                    self.kept = None;
                }
                Ok(Some(Up::Released))
            }
            (Stage::Released, Down::Finish) => {
                apply.post_hook()?;
                session.stage = Stage::Finished;
                Ok(Some(Up::Finished))
            }
            (stage, message) => {
                let name = message.name();
                Err(link
                    .error(ErrorKind::Corrupt, format!("the parameter server sent `{name}` while {stage:?}")))
            }
        }
    }

    /// Maps the ring and takes the layout; whether the mapping was kept.
    fn open(
        &mut self,
        link: &mut Link,
        session: &mut Session,
        apply: &mut dyn Apply,
        open: Open,
    ) -> Result<bool> {
        let known = self.layout.as_ref().is_some_and(|(digest, _)| *digest == open.layout);
        if open.layout == 0 {
            self.layout = None;
        } else if !known {
            self.layout = None;
            self.layout = Some((open.layout, receive_layout(link, &open)?));
        }
        let same = |(id, ring): &(RingId, Arc<dyn Buffer>)| {
            *id == open.ring && *id != RingId::default() && ring.len_bytes() == open.ring_bytes
        };
        let kept = self.kept.take_if(|kept| same(kept));
        // A mapping of another ring must be gone before the new one is made: a device may reuse its handle.
        self.kept = None;
        let was_kept = kept.is_some();
        let ring = match kept {
            Some((_, ring)) => ring,
            None => self.mapper.map(&open.export, open.ring_bytes)?,
        };
        if ring.len_bytes() < open.ring_bytes {
            return Err(link.error(ErrorKind::Internal, "the mapping is smaller than the ring"));
        }
        if open.ring != RingId::default() {
            self.kept = Some((open.ring, ring.clone()));
        }
        session.ring = Some(ring);
        if let Some((_, tensors)) = &self.layout {
            apply.layout(tensors)?;
        }
        Ok(was_kept)
    }

    fn bucket(
        &self,
        session: &mut Session,
        apply: &mut dyn Apply,
        bucket: u32,
        entries: &[Entry],
    ) -> Result<()> {
        let Some(ring) = &session.ring else {
            return Err(Error::new(ErrorKind::Internal, "take a bucket", "the ring is not mapped"));
        };
        let layout: &[TensorMeta] = self.layout.as_ref().map_or(&[], |(_, tensors)| tensors);
        let mut views = Vec::with_capacity(entries.len());
        for entry in entries {
            let (meta, index) = match &entry.tensor {
                TensorRef::Inline(meta) => (meta, None),
                TensorRef::Index(index) => match layout.get(*index as usize) {
                    Some(meta) => (meta, Some(*index)),
                    None => {
                        let what = format!("tensor {index} is not in the layout of {}", layout.len());
                        return Err(Error::new(ErrorKind::Corrupt, "take a bucket", what));
                    }
                },
            };
            let view = TensorView::new(meta, ring, entry.offset, index, entry.digest)?;
            if ring.memory() != MemoryKind::Device {
                view.verify()?;
            }
            session.summary.tensor_bytes += view.len_bytes();
            views.push(view);
        }
        apply.bucket(bucket, &views)?;
        session.summary.buckets += 1;
        session.summary.tensors += views.len() as u64;
        Ok(())
    }
}

struct Session {
    stage: Stage,
    ring: Option<Arc<dyn Buffer>>,
    summary: UpdateSummary,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Start,
    Open,
    Released,
    Finished,
}

fn receive_layout(link: &mut Link, open: &Open) -> Result<Arc<[TensorMeta]>> {
    let mut all = Vec::new();
    while all.len() < open.layout_len as usize {
        match link.receive()? {
            Down::Layout { first, tensors } if first as usize == all.len() && !tensors.is_empty() => {
                all.extend(tensors);
            }
            other => {
                let what =
                    format!("`{}` came where tensor {} of the layout was due", other.name(), all.len());
                return Err(link.error(ErrorKind::Corrupt, what));
            }
        }
    }
    if all.len() != open.layout_len as usize || wire::layout_digest(&all) != open.layout {
        return Err(link.error(ErrorKind::Corrupt, "the layout that came is not the one announced"));
    }
    Ok(all.into())
}
