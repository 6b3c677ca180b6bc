//! Devices and transports that say what was done with them.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use async_trait::async_trait;
use bytes::Bytes;
use ckpt_core::{
    Error, Result,
    device::{Buffer, DeviceBackend, DeviceInfo, MemoryKind, Ring, RingExport, Stream, host::HostDevice},
    transport::{
        Capability, Collective, CollectiveOp, Communicator, CommunicatorQueue, GroupSpec, OneSided, Transport,
    },
};
use tokio::sync::watch;

/// What a rank did.
#[derive(Default)]
pub struct Watched {
    /// Ring memory that exists.
    pub live_rings: Arc<AtomicUsize>,
    /// Ring memory that ever existed.
    pub made_rings: AtomicUsize,
    /// Rings that may live on in a post hook.
    pub kept_rings: AtomicUsize,
    /// Groups joined.
    pub joins: AtomicU64,
    /// Exchanges enqueued, since the start.
    pub enqueued: Arc<watch::Sender<u64>>,
    /// The next allocation of a ring fails.
    pub no_ring: Mutex<Option<Error>>,
}

#[derive(Debug)]
pub struct WatchedDevice {
    pub device: HostDevice,
    pub watch: Arc<Watched>,
}

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watched")
    }
}

impl DeviceBackend for WatchedDevice {
    fn kind(&self) -> &'static str {
        self.device.kind()
    }
    fn info(&self) -> &DeviceInfo {
        self.device.info()
    }
    fn free_memory_bytes(&self) -> Result<u64> {
        self.device.free_memory_bytes()
    }
    fn stream(&self, label: &'static str) -> Result<Arc<dyn Stream>> {
        self.device.stream(label)
    }
    fn allocate_ring(&self, len_bytes: u64) -> Result<Arc<dyn Ring>> {
        if let Some(error) = self.watch.no_ring.lock().unwrap().take() {
            return Err(error);
        }
        let ring = self.device.allocate_ring(len_bytes)?;
        let live = self.watch.live_rings.clone();
        live.fetch_add(1, Ordering::SeqCst);
        self.watch.made_rings.fetch_add(1, Ordering::SeqCst);
        let memory = Arc::new(WatchedMemory { memory: ring.buffer(), live });
        Ok(Arc::new(WatchedRing { ring, memory }))
    }
    fn pin(&self, memory: Arc<dyn Buffer>) -> Result<Arc<dyn Buffer>> {
        self.device.pin(memory)
    }
    fn flush_remote_writes(&self) -> Result<()> {
        self.device.flush_remote_writes()
    }
}

#[derive(Debug)]
struct WatchedRing {
    ring: Arc<dyn Ring>,
    memory: Arc<WatchedMemory>,
}

impl Ring for WatchedRing {
    fn buffer(&self) -> Arc<dyn Buffer> {
        self.memory.clone()
    }
    fn export(&self) -> RingExport {
        self.ring.export()
    }
    fn freed(&self, range: Range<u64>) {
        self.ring.freed(range);
    }
}

#[derive(Debug)]
struct WatchedMemory {
    memory: Arc<dyn Buffer>,
    live: Arc<AtomicUsize>,
}

impl Drop for WatchedMemory {
    fn drop(&mut self) {
        self.live.fetch_sub(1, Ordering::SeqCst);
    }
}

// SAFETY: it is the buffer that it holds, which keeps the contract.
unsafe impl Buffer for WatchedMemory {
    fn address(&self) -> u64 {
        self.memory.address()
    }
    fn len_bytes(&self) -> u64 {
        self.memory.len_bytes()
    }
    fn memory(&self) -> MemoryKind {
        self.memory.memory()
    }
}

#[derive(Debug)]
pub struct WatchedTransport {
    pub transport: Arc<dyn Transport>,
    pub watch: Arc<Watched>,
}

impl Transport for WatchedTransport {
    fn name(&self) -> &'static str {
        self.transport.name()
    }
    fn capability(&self) -> Capability {
        self.transport.capability()
    }
    fn collective(&self) -> Option<&dyn Collective> {
        Some(self)
    }
    fn one_sided(&self) -> Option<&dyn OneSided> {
        self.transport.one_sided()
    }
}

#[async_trait]
impl Collective for WatchedTransport {
    async fn create_token(&self) -> Result<Bytes> {
        self.transport.collective().unwrap().create_token().await
    }
    async fn join(&self, group: GroupSpec, deadline: Instant) -> Result<Communicator> {
        self.watch.joins.fetch_add(1, Ordering::SeqCst);
        let Communicator { queue, abort } =
            self.transport.collective().unwrap().join(group, deadline).await?;
        let queue = Box::new(WatchedQueue { queue, enqueued: self.watch.enqueued.clone() });
        Ok(Communicator { queue, abort })
    }
}

#[derive(Debug)]
struct WatchedQueue {
    queue: Box<dyn CommunicatorQueue>,
    enqueued: Arc<watch::Sender<u64>>,
}

#[async_trait]
impl CommunicatorQueue for WatchedQueue {
    async fn enqueue(
        &mut self,
        ops: Vec<CollectiveOp>,
        stream: &Arc<dyn Stream>,
    ) -> Result<ckpt_core::device::Event> {
        let event = self.queue.enqueue(ops, stream).await;
        self.enqueued.send_modify(|n| *n += 1);
        event
    }
}
