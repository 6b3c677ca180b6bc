//! All that the emulated devices hold. Objects are known by the address that their caller has.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    io::{PipeReader, PipeWriter},
    sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError},
};

use crate::{Answer, Errno, abi, memory::Memory};

/// A device with one port.
pub(crate) struct Device {
    /// The `ibv_device`; it stays for ever.
    pub(crate) address: usize,
    pub(crate) name: String,
    pub(crate) gid: [u8; 16],
    pub(crate) gid_index: u8,
    pub(crate) lid: u16,
    pub(crate) ethernet: bool,
    pub(crate) up: bool,
    pub(crate) settings: Settings,
    pub(crate) misuse: Vec<String>,
    /// Calls that wait because of [`Settings::stall`].
    pub(crate) stalled: u64,
    /// Requests that were posted, and those of them that were signalled.
    pub(crate) requests: u64,
    pub(crate) signalled: u64,
    /// The most that one queue pair had at once.
    pub(crate) most: u64,
    /// Fates of requests that are still to come, by their place among all.
    pub(crate) fates: BTreeMap<u64, Fate>,
    /// Calls that will be refused: the function, how many calls of it before, the error number.
    pub(crate) refusals: Vec<(String, u32, Errno)>,
    pub(crate) next_number: u32,
    pub(crate) next_key: u32,
    /// Keys of regions that are gone, for [`Settings::reuse_keys`].
    pub(crate) old_keys: Vec<u32>,
}

/// What a test may change.
pub(crate) struct Settings {
    pub(crate) max_send_wr: u32,
    pub(crate) max_cqe: u32,
    /// Requests wait until they are released.
    pub(crate) hold: bool,
    /// Requests of queue pairs in the error state are not flushed.
    pub(crate) deaf: bool,
    /// A new region gets the key of the one that was released last.
    pub(crate) reuse_keys: bool,
    pub(crate) dma_buf: bool,
    /// Completions are there but cannot be polled yet.
    pub(crate) mute: bool,
    /// Calls that make queue pairs wait.
    pub(crate) stall: bool,
}

/// How a request ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Regular,
    Fails(u32),
    /// It stays until its queue pair ends.
    Lost,
}

pub(crate) struct Context {
    pub(crate) device: usize,
    pub(crate) events: VecDeque<u32>,
    pub(crate) reader: Arc<PipeReader>,
    pub(crate) writer: PipeWriter,
}

pub(crate) struct Pd {
    pub(crate) context: usize,
}

pub(crate) struct Mr {
    pub(crate) device: usize,
    pub(crate) pd: usize,
    pub(crate) key: u32,
    /// The address by which requests name the first byte.
    pub(crate) start: u64,
    pub(crate) len: u64,
    pub(crate) access: u32,
    pub(crate) memory: Memory,
}

pub(crate) struct Channel {
    pub(crate) context: usize,
    /// Queues with an event, one entry for each.
    pub(crate) events: VecDeque<usize>,
    pub(crate) reader: Arc<PipeReader>,
    pub(crate) writer: PipeWriter,
}

pub(crate) struct Cq {
    pub(crate) device: usize,
    pub(crate) context: usize,
    pub(crate) channel: usize,
    pub(crate) user: usize,
    pub(crate) capacity: usize,
    pub(crate) entries: VecDeque<Entry>,
    pub(crate) armed: bool,
    /// Events that were taken and not acknowledged.
    pub(crate) taken: u32,
}

/// A completion that was not polled yet.
pub(crate) struct Entry {
    pub(crate) qp: usize,
    /// The request's place in its queue pair: slots up to it come free when this is polled.
    pub(crate) place: u64,
    pub(crate) wc: abi::Wc,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Reset,
    Init,
    Rtr,
    Rts,
    Err,
}

pub(crate) struct Qp {
    pub(crate) device: usize,
    pub(crate) pd: usize,
    pub(crate) send_cq: usize,
    pub(crate) recv_cq: usize,
    pub(crate) number: u32,
    pub(crate) state: State,
    pub(crate) max_send_wr: u32,
    pub(crate) max_send_sge: u32,
    pub(crate) signal_all: bool,
    pub(crate) access: u32,
    pub(crate) path: Path,
    /// Requests that were posted and have not run, oldest first.
    pub(crate) queue: VecDeque<Request>,
    pub(crate) posted: u64,
    /// Slots that came free.
    pub(crate) retired: u64,
}

/// The other end, as `ibv_modify_qp` was told.
#[derive(Clone, Copy, Default)]
pub(crate) struct Path {
    pub(crate) device: Option<usize>,
    pub(crate) number: u32,
    pub(crate) mtu: u32,
    pub(crate) rq_psn: u32,
    pub(crate) sq_psn: u32,
    pub(crate) reads_out: u8,
    pub(crate) reads_in: u8,
}

#[derive(Clone, Copy)]
pub(crate) struct Request {
    pub(crate) id: u64,
    pub(crate) place: u64,
    pub(crate) read: bool,
    pub(crate) signalled: bool,
    pub(crate) local: abi::Sge,
    pub(crate) remote_address: u64,
    pub(crate) remote_key: u32,
    pub(crate) fate: Fate,
}

#[derive(Default)]
pub(crate) struct World {
    pub(crate) devices: Vec<Device>,
    /// Lengths of device lists.
    pub(crate) lists: HashMap<usize, usize>,
    pub(crate) contexts: HashMap<usize, Context>,
    pub(crate) pds: HashMap<usize, Pd>,
    pub(crate) mrs: HashMap<usize, Mr>,
    pub(crate) channels: HashMap<usize, Channel>,
    pub(crate) cqs: HashMap<usize, Cq>,
    pub(crate) qps: HashMap<usize, Qp>,
    /// Misuse of what is on no device, as of an object that is gone. It counts for every device.
    pub(crate) misuse: Vec<String>,
}

/// Told when a device no longer stalls.
pub(crate) static GOES_ON: Condvar = Condvar::new();

pub(crate) fn world() -> MutexGuard<'static, World> {
    static WORLD: LazyLock<Mutex<World>> = LazyLock::new(Mutex::default);
    // A panic inside is a failed assertion of a test; the others go on.
    WORLD.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    /// Notes that a caller did what the contract forbids.
    pub(crate) fn misuse(&mut self, device: Option<usize>, what: impl Into<String>) {
        let what = what.into();
        eprintln!("verbs emulator: misuse: {what}");
        match device.and_then(|device| self.devices.get_mut(device)) {
            Some(device) => device.misuse.push(what),
            None => self.misuse.push(what),
        }
    }

    /// As [`Self::misuse`], for calls that then fail.
    pub(crate) fn refuse<T>(
        &mut self,
        device: Option<usize>,
        errno: Errno,
        what: impl Into<String>,
    ) -> Answer<T> {
        self.misuse(device, what);
        Err(errno)
    }

    /// An error if a test has asked for one in this call.
    pub(crate) fn permit(&mut self, device: usize, function: &str) -> Answer {
        let Some(device) = self.devices.get_mut(device) else { return Err(libc::EINVAL) };
        let Some(at) = device.refusals.iter().position(|(name, ..)| name == function) else { return Ok(()) };
        if device.refusals[at].1 > 0 {
            device.refusals[at].1 -= 1;
            return Ok(());
        }
        Err(device.refusals.remove(at).2)
    }

    pub(crate) fn device_named(&mut self, name: &str) -> Option<usize> {
        self.devices.iter().position(|device| device.name == name)
    }

    /// The device of a context that is open.
    pub(crate) fn device_of(&mut self, context: usize) -> Answer<usize> {
        match self.contexts.get(&context) {
            Some(context) => Ok(context.device),
            None => self.refuse(None, libc::EINVAL, "a context that is not open"),
        }
    }
}
