//! Mooncake for tests: engines of this process that copy memory, and misbehave when told to.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::api::{Api, Handle, INVALID_BATCH, READ, Request, WRITE, status};

#[derive(Default)]
pub(crate) struct Fake {
    state: Mutex<State>,
    pub(crate) destroyed: AtomicUsize,
    /// `open` calls that reached a peer.
    pub(crate) opened: AtomicUsize,
}

#[derive(Default)]
struct State {
    next: usize,
    engines: HashMap<usize, EngineState>,
    /// Starts that fail before one succeeds.
    refuse_starts: usize,
    /// Peers whose transfers never end, until released.
    stalled: Vec<String>,
    /// Peers to which `submit` answers this code.
    refused: HashMap<String, i32>,
    /// Peers whose next transfer fails once.
    hiccup: Vec<String>,
}

#[derive(Default)]
struct EngineState {
    address: String,
    ranges: HashMap<u64, (u64, bool)>,
    segments: Vec<String>,
    batches: HashMap<u64, Vec<Transfer>>,
}

struct Transfer {
    status: i32,
    request: Request,
    peer: String,
}

impl Fake {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn refuse_starts(&self, count: usize) {
        self.lock().refuse_starts = count;
    }

    pub(crate) fn stall(&self, peer: &str) {
        self.lock().stalled.push(peer.to_owned());
    }

    /// Lets stalled transfers of `peer` end.
    pub(crate) fn release(&self, peer: &str) {
        let mut state = self.lock();
        state.stalled.retain(|p| p != peer);
        state.run_transfers();
    }

    pub(crate) fn refuse(&self, peer: &str, code: i32) {
        self.lock().refused.insert(peer.to_owned(), code);
    }

    pub(crate) fn hiccup(&self, peer: &str) {
        self.lock().hiccup.push(peer.to_owned());
    }

    /// Batches that were allocated and not freed.
    pub(crate) fn open_batches(&self) -> usize {
        self.lock().engines.values().map(|e| e.batches.len()).sum()
    }

    /// Ranges that are registered, of all engines; each has one for its ledger.
    pub(crate) fn ranges(&self) -> usize {
        self.lock().engines.values().map(|e| e.ranges.len()).sum()
    }
}

impl State {
    fn engine(&mut self, engine: Handle) -> &mut EngineState {
        self.engines.get_mut(&engine.0).expect("an engine that was destroyed is used")
    }

    fn serves(&self, peer: &str, from: u64, len: u64) -> bool {
        self.engines.values().filter(|e| e.address == peer).any(|e| {
            e.ranges
                .iter()
                .any(|(start, (range, remote))| *remote && *start <= from && from + len <= start + range)
        })
    }

    fn run_transfers(&mut self) {
        let mut done = Vec::new();
        for (handle, engine) in &self.engines {
            for (batch, transfers) in &engine.batches {
                for (task, transfer) in transfers.iter().enumerate() {
                    done.push((
                        *handle,
                        *batch,
                        task,
                        transfer.request,
                        transfer.peer.clone(),
                        transfer.status,
                    ));
                }
            }
        }
        for (handle, batch, task, request, peer, now) in done {
            if now != status::WAITING || self.stalled.contains(&peer) {
                continue;
            }
            let hiccup = self.hiccup.iter().position(|p| *p == peer);
            let good = hiccup.is_none() && self.serves(&peer, request.target_offset, request.length);
            if let Some(index) = hiccup {
                self.hiccup.remove(index);
            }
            if good {
                let (there, here) = (request.target_offset as *mut u8, request.source as *mut u8);
                let (from, into) = if request.opcode == READ { (there, here) } else { (here, there) };
                // SAFETY: the peer's side is registered, so its owner keeps it mapped until it unregisters, which takes
                // this lock; this side belongs to a batch that is not freed.
                unsafe { std::ptr::copy(from, into, request.length as usize) };
            }
            let transfers = self.engine(Handle(handle)).batches.get_mut(&batch).unwrap();
            transfers[task].status = if good { status::COMPLETED } else { 6 };
        }
    }
}

impl Api for Fake {
    fn create(&self, host: &str) -> Option<Handle> {
        let mut state = self.lock();
        if state.refuse_starts > 0 {
            state.refuse_starts -= 1;
            return None;
        }
        state.next += 1;
        let handle = state.next;
        let address = format!("{host}:{}", 15000 + handle);
        state.engines.insert(handle, EngineState { address, ..EngineState::default() });
        Some(Handle(handle))
    }

    unsafe fn install(&self, _: Handle, protocol: &str, _: Option<&str>) -> bool {
        protocol != "efa"
    }

    unsafe fn address(&self, engine: Handle) -> String {
        self.lock().engine(engine).address.clone()
    }

    unsafe fn register(&self, engine: Handle, address: u64, len_bytes: u64, remote: bool) -> i32 {
        let mut state = self.lock();
        let ranges = &mut state.engine(engine).ranges;
        if len_bytes == 0 {
            return -1;
        }
        if ranges.iter().any(|(start, (len, _))| address < start + len && *start < address + len_bytes) {
            return -7;
        }
        ranges.insert(address, (len_bytes, remote));
        0
    }

    unsafe fn unregister(&self, engine: Handle, address: u64) -> i32 {
        if self.lock().engine(engine).ranges.remove(&address).is_some() { 0 } else { -3 }
    }

    unsafe fn open(&self, engine: Handle, peer: &str, _refresh: bool) -> i32 {
        let mut state = self.lock();
        if let Some(id) = state.engine(engine).segments.iter().position(|name| name == peer) {
            return id as i32 + 1;
        }
        if !state.engines.values().any(|e| e.address == peer) {
            return -1;
        }
        self.opened.fetch_add(1, Ordering::SeqCst);
        let segments = &mut state.engine(engine).segments;
        segments.push(peer.to_owned());
        segments.len() as i32
    }

    unsafe fn allocate(&self, engine: Handle, tasks: usize) -> u64 {
        assert!(tasks > 0, "an empty batch");
        let mut state = self.lock();
        state.next += 1;
        let id = state.next as u64;
        assert_ne!(id, INVALID_BATCH);
        state.engine(engine).batches.insert(id, Vec::new());
        id
    }

    unsafe fn submit(&self, engine: Handle, batch: u64, requests: &mut [Request]) -> i32 {
        let mut state = self.lock();
        for request in requests {
            assert!([READ, WRITE].contains(&request.opcode));
            let peer = state.engine(engine).segments[request.target as usize - 1].clone();
            if let Some(code) = state.refused.get(&peer) {
                return *code;
            }
            let transfer = Transfer { status: status::WAITING, request: *request, peer };
            state
                .engine(engine)
                .batches
                .get_mut(&batch)
                .expect("a batch that was freed is used")
                .push(transfer);
        }
        state.run_transfers();
        0
    }

    unsafe fn status(&self, engine: Handle, batch: u64, task: usize) -> Result<i32, i32> {
        let mut state = self.lock();
        let batch = state.engine(engine).batches.get(&batch).expect("a batch that was freed is polled");
        batch.get(task).map(|t| t.status).ok_or(1)
    }

    unsafe fn free(&self, engine: Handle, batch: u64) -> i32 {
        let mut state = self.lock();
        let batches = &mut state.engine(engine).batches;
        if batches[&batch].iter().any(|t| t.status == status::WAITING) {
            return 4;
        }
        batches.remove(&batch);
        0
    }

    unsafe fn destroy(&self, engine: Handle) {
        let gone = self.lock().engines.remove(&engine.0).expect("an engine was destroyed twice");
        assert!(gone.batches.is_empty(), "an engine was destroyed under a batch");
        self.destroyed.fetch_add(1, Ordering::SeqCst);
    }

    fn reach(&self, peer: &str, _: Duration) -> io::Result<()> {
        let here = self.lock().engines.values().any(|e| e.address == peer);
        if here { Ok(()) } else { Err(io::Error::from(io::ErrorKind::ConnectionRefused)) }
    }
}
