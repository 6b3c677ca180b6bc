//! An engine and its batches: who may call what, and when memory is free again.

use std::{
    sync::{Arc, mpsc::Sender},
    time::Duration,
};

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{Buffer, BufferSlice},
};

use crate::{
    MooncakeError,
    api::{Api, Handle, INVALID_BATCH, Request, status},
    error::TRANSFER,
    ledger::Ledger,
    protocol::Choice,
};

/// The free port that Mooncake picks may be taken before it listens there.
const ATTEMPTS: u32 = 3;
/// To see whether a peer is there at all.
const REACH_TIME: Duration = Duration::from_secs(1);

/// A live engine. Dropping it ends it, which takes half a second: never on a thread that others wait for.
pub(crate) struct Engine {
    api: Arc<dyn Api>,
    handle: Handle,
    pub(crate) address: String,
    pub(crate) choice: Choice,
    /// Served until the engine has ended.
    pub(crate) ledger: Arc<Ledger>,
    /// Dropped when the engine is gone: tells who waits for that.
    _gone: Sender<()>,
}

impl Engine {
    pub(crate) fn start(api: Arc<dyn Api>, host: &str, choice: Choice, gone: Sender<()>) -> Result<Self> {
        let ledger = Arc::new(Ledger::new()?);
        let failed = |what: String| Error::new(ErrorKind::Backend, "start Mooncake", what);
        let handle = (0..ATTEMPTS).find_map(|_| api.create(host)).ok_or_else(|| {
            failed(format!(
                "it refused to start at {host} with {choice}; its own log on stderr says why. An Ascend build on a \
                 machine without NPU needs MC_FORCE_TCP=1"
            ))
        })?;
        // From here on the engine is ended on every way out.
        let mut engine = Self { api, handle, address: String::new(), choice, ledger, _gone: gone };
        let matrix = engine.choice.matrix();
        // SAFETY: `handle` is alive until `drop`, which also holds for every other call in this file.
        if !unsafe { engine.api.install(handle, engine.choice.protocol.name(), matrix.as_deref()) } {
            return Err(failed(format!(
                "it has no transport {}, or that does not work here; its own log on stderr says why. MC_FORCE_TCP=1 \
                 makes it use tcp",
                engine.choice
            )));
        }
        // SAFETY: as above.
        engine.address = unsafe { engine.api.address(handle) };
        if !engine.address.contains(':') {
            return Err(failed(format!("it calls its own address `{}`", engine.address)));
        }
        let (address, len) = (engine.ledger.memory().address(), engine.ledger.memory().len_bytes());
        // SAFETY: the ledger's memory lives as long as the engine.
        unsafe { engine.register(address, len, true) }?;
        Ok(engine)
    }

    /// # Safety
    /// The range must stay mapped until it is unregistered or the engine has ended.
    pub(crate) unsafe fn register(&self, address: u64, len_bytes: u64, remote: bool) -> Result<()> {
        // SAFETY: the caller keeps the range mapped.
        match unsafe { self.api.register(self.handle, address, len_bytes, remote) } {
            0 => Ok(()),
            code => Err(MooncakeError { function: "registerLocalMemory", code }.into()),
        }
    }

    pub(crate) fn unregister(&self, address: u64) {
        // SAFETY: `handle` is alive.
        let code = unsafe { self.api.unregister(self.handle, address) };
        if code != 0 {
            let error = MooncakeError { function: "unregisterLocalMemory", code };
            tracing::warn!(%error, address, "memory stays registered");
        }
    }

    /// May block while it connects.
    pub(crate) fn segment(&self, peer: &str, refresh: bool) -> Result<i32> {
        // SAFETY: `handle` is alive.
        let id = unsafe { self.api.open(self.handle, peer, refresh) };
        // 0 is this engine itself.
        if id > 0 || id == 0 && peer == self.address {
            return Ok(id);
        }
        let code = MooncakeError { function: "openSegment", code: id };
        Err(Error::new(ErrorKind::PeerLost, "reach a peer", "no Mooncake engine answers there; see its host")
            .with(Key::Peer, peer)
            .with(Key::Code, id)
            .caused_by(code))
    }

    pub(crate) fn reach(&self, operation: &'static str, peer: &str) -> Result<()> {
        self.api.reach(peer, REACH_TIME).map_err(|error| {
            Error::new(ErrorKind::PeerLost, operation, "the peer's engine has ended or is cut off")
                .with(Key::Peer, peer)
                .caused_by(error)
        })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // SAFETY: all calls go through `self`, so this is the last one. Batches hold an `Arc` of the engine: none runs.
        unsafe { self.api.destroy(self.handle) };
    }
}

/// How a task stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Task {
    Running,
    Ended,
}

/// Transfers under way. They cannot be cancelled, so this owns their memory until the last has ended.
pub(crate) struct Batch {
    engine: Arc<Engine>,
    id: u64,
    tasks: Vec<Task>,
    failure: Option<MooncakeError>,
    /// `None` once Mooncake has let go.
    memory: Option<Vec<BufferSlice>>,
}

impl Batch {
    /// Submits `requests`, whose local memory `memory` keeps alive. A refusal is reported by [`Self::poll`], too: some of
    /// the requests may be under way.
    pub(crate) fn submit(
        engine: &Arc<Engine>,
        requests: &mut [Request],
        memory: Vec<BufferSlice>,
    ) -> Result<Self> {
        // SAFETY: `handle` is alive.
        let id = unsafe { engine.api.allocate(engine.handle, requests.len()) };
        if id == INVALID_BATCH {
            return Err(MooncakeError { function: "allocateBatchID", code: 302 }.into());
        }
        let tasks = vec![Task::Running; requests.len()];
        let mut batch = Self { engine: engine.clone(), id, tasks, failure: None, memory: Some(memory) };
        // SAFETY: engine and batch are alive; `memory` stays in `batch` until every task has ended.
        let code = unsafe { engine.api.submit(engine.handle, id, requests) };
        if code != 0 {
            batch.failure = Some(MooncakeError { function: "submitTransfer", code });
        }
        Ok(batch)
    }

    /// `None` while any task runs; then the outcome, and the batch is given back.
    pub(crate) fn poll(&mut self) -> Option<Result<(), MooncakeError>> {
        for (index, task) in self.tasks.iter_mut().enumerate() {
            if *task == Task::Ended {
                continue;
            }
            // SAFETY: engine and batch are alive: the batch is freed below and not asked afterwards.
            let (ended, failure) = match unsafe { self.engine.api.status(self.engine.handle, self.id, index) }
            {
                Ok(status::WAITING | status::PENDING | status::TIMEOUT) => (false, None),
                Ok(status::COMPLETED) => (true, None),
                Ok(code) => (true, Some(MooncakeError { function: TRANSFER, code })),
                // A task that was never made, after a refused submit.
                Err(code) => (true, Some(MooncakeError { function: "getTransferStatus", code })),
            };
            self.failure = self.failure.or(failure);
            if ended {
                *task = Task::Ended;
            }
        }
        if self.memory.is_some() && self.tasks.contains(&Task::Running) {
            return None;
        }
        if self.memory.is_some() {
            // SAFETY: engine and batch are alive; all tasks have ended.
            let code = unsafe { self.engine.api.free(self.engine.handle, self.id) };
            if code != 0 {
                // Mooncake still works on it. The deadline ends whoever waits; the memory stays here.
                self.failure = self.failure.or(Some(MooncakeError { function: "freeBatchID", code }));
                return None;
            }
            self.memory = None;
        }
        Some(self.failure.map_or(Ok(()), Err))
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            // Only a panic comes here. Mooncake may still write this memory: it is never given back, and the engine
            // never ended.
            tracing::error!(peer_of = %self.engine.address, "a batch was abandoned; its memory is lost");
            std::mem::forget(memory);
            std::mem::forget(self.engine.clone());
        }
    }
}
