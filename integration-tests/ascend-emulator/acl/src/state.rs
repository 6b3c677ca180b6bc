//! What the emulated runtime of this process holds.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use crate::{
    memory::{Block, HostBlock, Key},
    stream::{Event, Stream},
};

/// Where device addresses begin: no address of the CPU, so that touching one is a fault.
const DEVICE_BASE: u64 = 0x00A5_0000_0000_0000;

pub(crate) struct State {
    pub(crate) initialised: bool,
    /// By device address.
    pub(crate) blocks: BTreeMap<u64, Block>,
    /// By host address.
    pub(crate) host: BTreeMap<u64, HostBlock>,
    /// Open keys of own blocks.
    pub(crate) exports: HashMap<Key, u64>,
    /// Open keys of others' blocks.
    pub(crate) imports: HashMap<Key, u64>,
    pub(crate) streams: HashMap<usize, Arc<Stream>>,
    pub(crate) events: HashMap<usize, Arc<Event>>,
    next_address: u64,
    next_handle: usize,
}

pub(crate) fn state() -> MutexGuard<'static, State> {
    static STATE: OnceLock<Mutex<State>> = OnceLock::new();
    let new = || {
        Mutex::new(State {
            initialised: false,
            blocks: BTreeMap::new(),
            host: BTreeMap::new(),
            exports: HashMap::new(),
            imports: HashMap::new(),
            streams: HashMap::new(),
            events: HashMap::new(),
            next_address: DEVICE_BASE,
            next_handle: 0xE0_0000,
        })
    };
    STATE.get_or_init(new).lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// Addresses that were never used before: a pointer to freed memory stays wrong.
    pub(crate) fn new_address(&mut self, len: usize) -> u64 {
        let address = self.next_address;
        self.next_address += (len as u64).next_multiple_of(2 << 20) + (2 << 20);
        address
    }

    pub(crate) fn new_handle(&mut self) -> usize {
        self.next_handle += 16;
        self.next_handle
    }

    /// The block that holds all of this range.
    pub(crate) fn block(&self, address: u64, len: u64) -> Option<(&Block, u64)> {
        let (base, block) = self.blocks.range(..=address).next_back()?;
        let offset = address - base;
        (offset.checked_add(len)? <= block.len as u64).then_some((block, offset))
    }

    /// Bytes of device memory in use.
    pub(crate) fn used(&self, device: i32) -> u64 {
        self.blocks.values().filter(|b| b.device == device && !b.imported).map(|b| b.len as u64).sum()
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

pub(crate) fn devices() -> u32 {
    number("ASCEND_EMULATOR_DEVICES", 8) as u32
}

pub(crate) fn hbm_bytes() -> u64 {
    number("ASCEND_EMULATOR_HBM_MIB", 4096) << 20
}
