//! Two hosts, an owner's and a reader's, and reads between them.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use ckpt_core::{
    Result,
    device::{
        Buffer, BufferSlice, DeviceBackend, DeviceConfig, Event,
        host::{HostBuffer, HostDevice},
    },
    transport::{ReadOp, Registration, RemoteRegion, Transport, TransportConfig, TransportProvider as _},
};
use ckpt_transport_rdma::{RdmaConfig, RdmaProvider};
use integration_tests::{
    LONG,
    verbs::{Host, Link, library},
};

/// What one request carries at most.
pub const PIECE: u64 = 1 << 20;

pub fn soon() -> Instant {
    Instant::now() + LONG
}

pub fn bytes(len: usize) -> Vec<u8> {
    tiled(len, |i| (i * 31 + i / 251) as u8)
}

/// Copied from a first part: builds for tests take long for each byte that they compute. No two pieces of 1 MiB are alike.
fn tiled(len: usize, byte: impl Fn(usize) -> u8) -> Vec<u8> {
    const TILE: usize = 251 * 256;
    let mut tiles = (0..TILE).map(byte).collect::<Vec<u8>>().repeat(len.div_ceil(TILE));
    tiles.truncate(len);
    tiles
}

/// The settings of a transport on `host`.
pub fn config(host: &Host) -> RdmaConfig {
    RdmaConfig { verbs: Some(library()), sysfs: host.sysfs().to_owned(), ..RdmaConfig::default() }
}

fn run(sysfs: &Path) -> PathBuf {
    sysfs.join("run")
}

pub fn open_on(config: RdmaConfig, device: Arc<dyn DeviceBackend>) -> Result<Arc<dyn Transport>> {
    // The first of the process stays.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_test_writer()
        .try_init();
    let runtime_dir = run(&config.sysfs);
    RdmaProvider::new(config).open(&TransportConfig {
        bind: Ipv4Addr::LOCALHOST.into(),
        runtime_dir,
        tls: false,
        secret: b"emulated".to_vec(),
        connections: 2,
        device,
    })
}

pub fn host_device(host: &Host, rank: u32) -> Result<Arc<dyn DeviceBackend>> {
    let runtime_dir = run(host.sysfs());
    Ok(Arc::new(HostDevice::open(&DeviceConfig { rank, local_rank: rank, runtime_dir })?))
}

/// An owner with registered memory, and a reader.
pub struct Hosts {
    pub owner_host: Host,
    pub reader_host: Host,
    pub owner: Arc<dyn Transport>,
    pub reader: Arc<dyn Transport>,
    pub memory: Arc<dyn Buffer>,
    pub registration: Arc<dyn Registration>,
}

impl Hosts {
    /// `devices` on each side, and `len` bytes of the owner's that may be written. `change` is for the reader's settings.
    pub async fn new(devices: u8, len: usize, change: impl FnOnce(&mut RdmaConfig)) -> Self {
        let hosts = [Host::new(Link::Ethernet, devices), Host::new(Link::Ethernet, devices)];
        Self::on(hosts, HostBuffer::from_bytes(&bytes(len)).unwrap(), change).await
    }

    pub async fn on(
        [owner_host, reader_host]: [Host; 2],
        memory: Arc<dyn Buffer>,
        change: impl FnOnce(&mut RdmaConfig),
    ) -> Self {
        let owner = open_on(config(&owner_host), host_device(&owner_host, 0).unwrap()).unwrap();
        let mut settings = config(&reader_host);
        change(&mut settings);
        let reader = open_on(settings, host_device(&reader_host, 1).unwrap()).unwrap();
        let registration = owner.one_sided().unwrap().register_writable(memory.clone()).await.unwrap();
        Self { owner_host, reader_host, owner, reader, memory, registration }
    }

    pub fn region(&self) -> RemoteRegion {
        self.registration.region().clone()
    }

    /// Requests that read `into` from `offset` on, each at most `piece` bytes.
    pub fn ops(&self, offset: u64, into: &BufferSlice, piece: u64) -> Vec<ReadOp> {
        let region = Arc::new(self.region());
        let starts = (0..into.len_bytes()).step_by(piece as usize);
        let op = |start: u64| ReadOp {
            region: region.clone(),
            offset: offset + start,
            into: into.slice(start..into.len_bytes().min(start + piece)).unwrap(),
        };
        starts.map(op).collect()
    }

    pub fn post(&self, batch: Vec<ReadOp>, deadline: Instant) -> Result<Event> {
        self.reader.one_sided().unwrap().post_read(batch, deadline)
    }

    /// Starts to read `into.len_bytes()` from `offset`.
    pub fn start(&self, offset: u64, into: &BufferSlice, deadline: Instant) -> Event {
        self.post(self.ops(offset, into, u64::MAX >> 1), deadline).unwrap()
    }

    /// Starts to read the first `count` pieces of 64 bytes, each by a request of its own.
    pub fn start_pieces(&self, count: u64, deadline: Instant) -> (BufferSlice, Event) {
        let into = blank(count * 64);
        let event = self.post(self.ops(0, &into, 64), deadline).unwrap();
        (into, event)
    }

    /// Reads all into new memory, and compares.
    pub async fn read(&self, deadline: Instant) -> Result<()> {
        let into = blank(self.memory.len_bytes());
        self.start(0, &into, deadline).done(deadline + Duration::from_secs(5)).await?;
        assert_arrived(&into, 0);
        Ok(())
    }

    /// Ends both transports, and sees that they have left nothing behind.
    pub async fn finish(self) {
        let Self { owner_host, reader_host, owner, reader, memory, registration } = self;
        drop((reader, registration, owner, memory));
        assert_clean([owner_host, reader_host]).await;
    }
}

/// See [`Host::assert_clean`].
pub async fn assert_clean(hosts: [Host; 2]) {
    // On a thread of its own: tasks of the transports must be able to end.
    let clean = move || hosts.iter().for_each(|host| host.assert_clean());
    tokio::task::spawn_blocking(clean).await.unwrap();
}

/// Waits until nobody has `memory` any more.
pub async fn freed(memory: &Weak<dyn Buffer>) {
    let until = soon();
    while memory.strong_count() > 0 {
        assert!(Instant::now() < until, "the memory is still owned");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Memory to read into, which holds nothing of what will come.
pub fn blank(len: u64) -> BufferSlice {
    let filled = tiled(len as usize, |i| !((i * 31 + i / 251) as u8));
    BufferSlice::whole(HostBuffer::from_bytes(&filled).unwrap())
}

/// `into` holds what the owner has from `offset`.
pub fn assert_arrived(into: &BufferSlice, offset: u64) {
    // SAFETY: the read into it is done.
    let arrived = unsafe { into.as_slice() }.unwrap();
    let all = bytes((offset + into.len_bytes()) as usize);
    assert!(arrived == &all[offset as usize..], "other bytes arrived");
}
