//! One port of one device: its protection domain, its completion queue, and the thread that polls it.

use std::{
    collections::{BTreeMap, HashSet},
    io::{Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    topology::{Hca, HcaPort, LinkLayer},
};
use serde::{Deserialize, Serialize};

use crate::{
    config::RdmaConfig,
    lane::Lane,
    library::Api,
    numa,
    room::Room,
    sys,
    verbs::{Context, Cq, Pd, Qp},
};

/// Completions of all lanes of one NIC: enough for hundreds that have the usual depth.
const CQ_ENTRIES: i32 = 1 << 15;
/// Completions that are taken at once.
const POLLED: usize = 32;
/// Empty polls while requests fly, before the thread sleeps on the channel.
const SPINS: u32 = 2000;
/// The thread looks around at least this often.
const TICK_MILLIS: i32 = 1000;
/// The same while those who wait poll for themselves.
const HELPED_MILLIS: i32 = 2;
/// A device flushes a queue pair at once; this long it may take when the transport is closed.
const QUIET: Duration = Duration::from_secs(2);

/// Where a NIC is found.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct NicAddress {
    pub(crate) hca: String,
    pub(crate) ethernet: bool,
    pub(crate) gid: [u8; 16],
    pub(crate) lid: u16,
}

/// An opened port.
#[derive(Debug)]
pub(crate) struct Nic {
    /// Its place among the transport's NICs.
    pub(crate) index: usize,
    pub(crate) address: NicAddress,
    pub(crate) port: u8,
    pub(crate) gid_index: u8,
    /// `ibv_mtu` of the port.
    pub(crate) mtu: u32,
    /// Reads that it can have in flight for each queue pair, and that it answers at once.
    pub(crate) reads_out: u8,
    pub(crate) reads_in: u8,
    pub(crate) depth: u32,
    pub(crate) pd: Arc<Pd>,
    cq: Arc<Cq>,
    /// The entries of `cq` that no lane has.
    pub(crate) room: Arc<Room>,
    context: Arc<Context>,
    /// By the number of the queue pair.
    lanes: Mutex<BTreeMap<u32, Arc<Lane>>>,
    /// Every key that peers were given: none is given twice, so a request that succeeds proves which region it met.
    keys: Mutex<HashSet<u32>>,
    /// What was polled, for who polls: completions are handled in their order, so polling and handling are one step.
    polled: Mutex<[sys::Wc; POLLED]>,
    /// Somebody who waits has polled since the thread last looked, and goes on with it.
    helped: AtomicBool,
    /// How many rely on the thread.
    relied_on: AtomicUsize,
    /// The thread sleeps without having asked for an event.
    resting: AtomicBool,
    down: AtomicBool,
    stopping: AtomicBool,
    wake: UnixStream,
}

impl Nic {
    /// Opens `chosen` and starts its thread.
    pub(crate) fn open(
        api: &Arc<Api>,
        config: &RdmaConfig,
        hcas: &[Hca],
        chosen: &HcaPort,
        index: usize,
    ) -> Result<Arc<Self>> {
        let named = |error: Error| error.with(Key::Hca, &chosen.device).with(Key::Port, chosen.port);
        let failed = |kind, message: String| named(Error::new(kind, "open an RDMA device", message));
        let info = hcas
            .iter()
            .find(|hca| hca.name == chosen.device)
            .and_then(|hca| hca.ports.iter().find(|port| port.number == chosen.port))
            .ok_or_else(|| failed(ErrorKind::Unavailable, "the device is gone".to_owned()))?;
        let gid = info.best_gid(config.gid_index);
        let ethernet = info.link_layer == LinkLayer::Ethernet;
        if ethernet && gid.is_none() {
            let why = match config.gid_index {
                Some(index) => format!("the port has no GID {index}; unset or correct NCCL_IB_GID_INDEX"),
                None => "the port has no GID: give its network interface an address".to_owned(),
            };
            return Err(failed(ErrorKind::ConfigInvalid, why));
        }
        let port = u8::try_from(chosen.port)
            .map_err(|_| failed(ErrorKind::ConfigInvalid, "no such port".to_owned()))?;
        let context = Context::open(api, &chosen.device).map_err(named)?;
        let limits = context.query_device()?;
        let attr = context.query_port(port)?;
        if attr.state != sys::PORT_ACTIVE {
            return Err(failed(ErrorKind::Unavailable, format!("the port's state is {}", attr.state)));
        }
        let pd = Pd::new(&context).map_err(named)?;
        let entries = CQ_ENTRIES.min(limits.max_cqe);
        let cq = Cq::new(&context, entries).map_err(named)?;
        let io = |e: std::io::Error| failed(ErrorKind::Backend, "no socket pair".to_owned()).caused_by(e);
        let (wake, woken) = UnixStream::pair().map_err(io)?;
        wake.set_nonblocking(true).and_then(|()| woken.set_nonblocking(true)).map_err(io)?;
        let reads = |limit: i32| limit.clamp(1, 16) as u8;
        let nic = Arc::new(Self {
            index,
            address: NicAddress {
                hca: chosen.device.clone(),
                ethernet,
                gid: gid.map(|gid| gid.address.octets()).unwrap_or_default(),
                lid: attr.lid,
            },
            port,
            gid_index: gid.map_or(0, |gid| gid.index.min(255) as u8),
            mtu: attr.active_mtu,
            reads_out: reads(limits.max_qp_init_rd_atom),
            reads_in: reads(limits.max_qp_rd_atom),
            depth: config.depth.min(limits.max_qp_wr.max(2) as u32),
            pd,
            cq,
            room: Room::new(entries.max(0) as u32),
            context,
            lanes: Mutex::default(),
            keys: Mutex::default(),
            polled: Mutex::default(),
            helped: AtomicBool::new(false),
            relied_on: AtomicUsize::new(0),
            resting: AtomicBool::new(false),
            down: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            wake,
        });
        let (polled, sysfs) = (nic.clone(), config.sysfs.clone());
        std::thread::Builder::new()
            .name(format!("ckpt-{}", chosen.device))
            .spawn(move || {
                let cores = numa::pin_near(&sysfs, polled.name());
                tracing::debug!(hca = polled.name(), ?cores, "polls completions");
                poll(&polled, woken);
            })
            .map_err(io)?;
        Ok(nic)
    }

    pub(crate) fn name(&self) -> &str {
        &self.address.hca
    }

    /// A queue pair in the state INIT.
    pub(crate) fn queue_pair(&self) -> Result<Qp> {
        let qp = Qp::new(&self.pd, &self.cq, self.depth)?;
        qp.to_init(self.port).map_err(|e| Error::from(e).with(Key::Hca, self.name()))?;
        Ok(qp)
    }

    /// Whether a key for peers is a new one; from now on it is not.
    pub(crate) fn take_key(&self, key: u32) -> bool {
        // One call under this lock.
        self.keys.lock().unwrap_or_else(PoisonError::into_inner).insert(key)
    }

    /// Polls once, for somebody who waits for `lanes`, will go on polling for a short while and would rather not be woken.
    pub(crate) fn help(&self, lanes: &[Arc<Lane>]) {
        self.helped.store(true, Ordering::Relaxed);
        self.look(lanes);
    }

    /// Polls once; what completes is mostly of `lanes`.
    pub(crate) fn look(&self, lanes: &[Arc<Lane>]) {
        // Somebody else polls: that helps as well.
        if let Ok(mut polled) = self.polled.try_lock() {
            // An error is the thread's to find.
            let found = self.cq.poll(&mut *polled).unwrap_or(0);
            for completion in polled.iter().take(found) {
                let awaited =
                    |lane: &&Arc<Lane>| std::ptr::eq(&*lane.nic, self) && lane.number() == completion.qp_num;
                match lanes.iter().find(awaited) {
                    Some(lane) => lane.completed(completion),
                    None => self.dispatch(completion),
                }
            }
        }
    }

    /// Requests fly that the thread must look after, until [`Self::let_go`].
    pub(crate) fn rely(&self) {
        // Before `resting` is asked, as the thread sets that before it looks here: one of the two sees the other.
        self.relied_on.fetch_add(1, Ordering::SeqCst);
        if self.resting.load(Ordering::SeqCst) {
            self.wake();
        }
    }

    /// See [`Self::rely`].
    pub(crate) fn let_go(&self) {
        self.relied_on.fetch_sub(1, Ordering::SeqCst);
    }

    /// Polls and handles what has completed; answers how much that was.
    fn take_completions(&self) -> usize {
        let mut polled = self.polled.lock().unwrap_or_else(PoisonError::into_inner);
        let found = self.cq.poll(&mut *polled).unwrap_or_else(|error| {
            tracing::error!(%error, hca = self.name(), "completions cannot be polled");
            self.down.store(true, Ordering::Relaxed);
            self.stopping.store(true, Ordering::Release);
            0
        });
        polled.iter().take(found).for_each(|completion| self.dispatch(completion));
        found
    }

    /// Whether the port was last heard to be up.
    pub(crate) fn is_up(&self) -> bool {
        !self.down.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Arc<Lane>>> {
        // Each change under this lock is one call.
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Completions of the queue pair `number` go to `lane` until it is closed and idle.
    pub(crate) fn add_lane(&self, number: u32, lane: &Arc<Lane>) {
        if self.stopping.load(Ordering::Acquire) {
            // The thread may have ended: nobody would poll for it.
            return lane.close();
        }
        let before = self.lock().insert(number, lane.clone());
        drop(before);
    }

    /// Lets the thread look at closed lanes.
    pub(crate) fn wake(&self) {
        // Full means that it will wake up anyway.
        let _ = (&self.wake).write(&[1]);
    }

    /// Ends all lanes and the thread, which then releases the device.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.wake();
    }

    fn close_lanes(&self) {
        let lanes: Vec<Arc<Lane>> = self.lock().values().cloned().collect();
        lanes.iter().for_each(|lane| lane.close());
    }

    /// Lets go of lanes that have ended; answers whether any has requests in flight.
    fn sweep(&self) -> bool {
        let mut busy = false;
        let mut ended = Vec::new();
        self.lock().retain(|_, lane| {
            let flies = lane.tend();
            busy |= flies;
            let keep = flies || lane.is_open();
            if !keep {
                ended.push(lane.clone());
            }
            keep
        });
        // Queue pairs are destroyed without the lock.
        drop(ended);
        busy
    }

    fn dispatch(&self, completion: &sys::Wc) {
        let lane = self.lock().get(&completion.qp_num).cloned();
        match lane {
            Some(lane) => lane.completed(completion),
            None => tracing::debug!(hca = self.name(), "a completion of a queue pair that has ended"),
        }
    }

    fn asynchronous(&self) {
        match self.context.async_event() {
            Some(sys::EVENT_PORT_ERR | sys::EVENT_DEVICE_FATAL) => {
                tracing::warn!(hca = self.name(), "the link is down");
                self.down.store(true, Ordering::Relaxed);
                self.close_lanes();
            }
            Some(sys::EVENT_PORT_ACTIVE) => {
                tracing::info!(hca = self.name(), "the link is up");
                self.down.store(false, Ordering::Relaxed);
            }
            Some(event) => tracing::debug!(hca = self.name(), event, "an asynchronous event"),
            None => {}
        }
    }
}

/// The thread: polls while requests fly, else sleeps on the completion channel; or rests while others poll.
fn poll(nic: &Arc<Nic>, mut woken: UnixStream) {
    let (mut spins, mut armed) = (0, false);
    let mut stopped_at = None;
    loop {
        // Whoever polls handles all completions: the thread would only fight with them for locks, and an event for each
        // completion would only cost.
        let helped = nic.helped.swap(false, Ordering::Relaxed) && nic.relied_on.load(Ordering::SeqCst) == 0;
        let found = if helped { 0 } else { nic.take_completions() };
        if found > 0 {
            spins = 0;
            continue;
        }
        let busy = nic.sweep();
        if nic.stopping.load(Ordering::Acquire) {
            let since = *stopped_at.get_or_insert_with(Instant::now);
            nic.close_lanes();
            if !busy || since.elapsed() > QUIET {
                let lanes = std::mem::take(&mut *nic.lock());
                // What is in flight holds its connection, and that its lanes.
                lanes.values().for_each(|lane| lane.abandon());
                return drop(lanes);
            }
        }
        if busy && spins < SPINS && !helped {
            spins += 1;
            std::thread::yield_now();
            continue;
        }
        if !armed && !helped {
            // What came before this is found by the next poll, what comes after makes an event.
            armed = nic.cq.arm().is_ok();
            if armed {
                continue;
            }
        }
        let fds = [nic.cq.channel_fd(), woken.as_raw_fd(), nic.context.async_fd()];
        if !armed {
            nic.resting.store(true, Ordering::SeqCst);
            if nic.relied_on.load(Ordering::SeqCst) > 0 {
                nic.resting.store(false, Ordering::SeqCst);
                continue;
            }
        }
        let timeout = match stopped_at {
            Some(_) => 1,
            None if armed && !helped => TICK_MILLIS,
            None => HELPED_MILLIS,
        };
        let [event, _, asynchronous] = wait(fds, timeout);
        nic.resting.store(false, Ordering::SeqCst);
        if event {
            nic.cq.take_event();
            armed = false;
        }
        let mut bytes = [0; 64];
        // Only the waking counts.
        let _ = woken.read(&mut bytes);
        if asynchronous {
            nic.asynchronous();
        }
        spins = 0;
    }
}

/// Which of `fds` can be read, after at most `timeout_millis`.
fn wait(fds: [i32; 3], timeout_millis: i32) -> [bool; 3] {
    let mut polled = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    // SAFETY: the array and its length belong together; the descriptors belong to objects that the caller holds.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), 3, timeout_millis) };
    polled.map(|fd| ready > 0 && fd.revents & libc::POLLIN != 0)
}
