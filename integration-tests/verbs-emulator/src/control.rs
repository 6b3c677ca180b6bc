//! What the tests call: devices, faults, and what is there. `integration_tests::verbs` wraps it.

use std::ffi::{CStr, c_char};

use crate::{
    abi, device, expose,
    world::{Device, Fate, GOES_ON, Qp, Settings, State, World, world},
};

/// # Safety
/// `text` must be a zero-terminated string.
unsafe fn text(text: *const c_char) -> String {
    // SAFETY: by this function's contract.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Acts on a device; 0, or -1 if there is none of that name or the action refuses.
unsafe fn on(name: *const c_char, act: impl FnOnce(&mut World, usize) -> Option<()>) -> i32 {
    // SAFETY: the caller's string.
    let name = unsafe { text(name) };
    let world = &mut *world();
    match world.device_named(&name).and_then(|device| act(world, device)) {
        Some(()) => 0,
        None => -1,
    }
}

/// Adds a device with an active port. Its GID is at `gid_index` of the port's table.
#[unsafe(no_mangle)]
unsafe extern "C" fn verbs_emulator_add(
    name: *const c_char,
    gid: *const [u8; 16],
    gid_index: u8,
    lid: u16,
    ethernet: bool,
) -> i32 {
    // SAFETY: the caller's string and array.
    let (name, gid) = unsafe { (text(name), *gid) };
    let mut world = world();
    if name.len() >= 64 || world.device_named(&name).is_some() {
        return -1;
    }
    let mut in_place = [0; 64];
    in_place.iter_mut().zip(name.bytes()).for_each(|(place, byte)| *place = byte as c_char);
    let raw = abi::Device {
        _ops: [std::ptr::null(); 2],
        _kinds: [0; 2],
        name: in_place,
        _dev_name: [0; 64],
        _paths: [[0; 256]; 2],
    };
    let index = world.devices.len() as u32;
    world.devices.push(Device {
        address: expose(raw) as usize,
        name,
        gid,
        gid_index,
        lid,
        ethernet,
        up: true,
        settings: Settings {
            max_send_wr: 16384,
            max_cqe: 1 << 20,
            hold: false,
            deaf: false,
            reuse_keys: false,
            dma_buf: true,
            mute: false,
            stall: false,
        },
        misuse: Vec::new(),
        stalled: 0,
        requests: 0,
        signalled: 0,
        most: 0,
        fates: std::collections::BTreeMap::new(),
        refusals: Vec::new(),
        // The same numbers on each device, as on real ones; keys differ, so that one of another device is found out.
        next_number: 0x100,
        next_key: index << 16,
        old_keys: Vec::new(),
    });
    0
}

/// Changes a setting. Requests that waited for it go on.
#[unsafe(no_mangle)]
unsafe extern "C" fn verbs_emulator_set(name: *const c_char, setting: *const c_char, value: u32) -> i32 {
    // SAFETY: the caller's strings.
    let setting = unsafe { text(setting) };
    let change = |world: &mut World, device: usize| {
        let settings = &mut world.devices[device].settings;
        match setting.as_str() {
            "max_send_wr" => settings.max_send_wr = value,
            "max_cqe" => settings.max_cqe = value,
            "hold" => settings.hold = value != 0,
            "deaf" => settings.deaf = value != 0,
            "reuse_keys" => settings.reuse_keys = value != 0,
            "dma_buf" => settings.dma_buf = value != 0,
            "mute" => {
                settings.mute = value != 0;
                let queues: Vec<usize> = world.cqs.keys().copied().collect();
                queues.into_iter().for_each(|queue| world.tell(queue));
            }
            "stall" => settings.stall = value != 0,
            "dooms" if value == 0 => world.devices[device].fates.clear(),
            _ => return None,
        }
        GOES_ON.notify_all();
        let hold = world.devices[device].settings.hold;
        let pairs: Vec<usize> = world.pairs_of(device).collect();
        for pair in pairs {
            world.flush(pair);
            if !hold {
                world.run(pair, usize::MAX);
            }
        }
        Some(())
    };
    // SAFETY: the caller's string.
    unsafe { on(name, change) }
}

/// Runs at most `count` requests of the queue pair `number`.
#[unsafe(no_mangle)]
unsafe extern "C" fn verbs_emulator_release(name: *const c_char, number: u32, count: usize) -> i32 {
    let release = |world: &mut World, device: usize| {
        let pair = world.pairs_of(device).find(|pair| world.qps[pair].number == number)?;
        world.run(pair, count);
        Some(())
    };
    // SAFETY: the caller's string.
    unsafe { on(name, release) }
}

/// Has the `nth` request from now, counted from 0 on all queue pairs of the device, end with `status`; with 0 never.
#[unsafe(no_mangle)]
unsafe extern "C" fn verbs_emulator_doom(name: *const c_char, nth: u64, status: u32) -> i32 {
    let doom = |world: &mut World, device: usize| {
        let device = &mut world.devices[device];
        let fate = if status == 0 { Fate::Lost } else { Fate::Fails(status) };
        device.fates.insert(device.requests + nth, fate);
        Some(())
    };
    // SAFETY: the caller's string.
    unsafe { on(name, doom) }
}

/// Has the `nth` call of `function` from now, counted from 0, fail with `errno`.
#[unsafe(no_mangle)]
unsafe extern "C" fn verbs_emulator_refuse(
    name: *const c_char,
    function: *const c_char,
    errno: i32,
    nth: u32,
) -> i32 {
    // SAFETY: the caller's string.
    let function = unsafe { text(function) };
    let refuse = |world: &mut World, device: usize| {
        world.devices[device].refusals.push((function, nth, errno));
        Some(())
    };
    // SAFETY: the caller's string.
    unsafe { on(name, refuse) }
}

/// Sends an asynchronous event to every context of the device; those of ports change the port's state.
#[unsafe(no_mangle)]
unsafe extern "C" fn verbs_emulator_event(name: *const c_char, event: u32) -> i32 {
    let send = |world: &mut World, device: usize| {
        device::announce(world, device, event);
        Some(())
    };
    // SAFETY: the caller's string.
    unsafe { on(name, send) }
}

/// How much of `what` the device has; `u64::MAX` if there is no such thing.
#[unsafe(no_mangle)]
unsafe extern "C" fn verbs_emulator_count(name: *const c_char, what: *const c_char) -> u64 {
    // SAFETY: the caller's string.
    let what = unsafe { text(what) };
    let mut answer = u64::MAX;
    let count = |world: &mut World, device: usize| {
        let of =
            |context: &usize| world.contexts.get(context).is_some_and(|context| context.device == device);
        let known = &world.devices[device];
        let number = match what.as_str() {
            "contexts" => world.contexts.keys().filter(|context| of(context)).count(),
            "pds" => world.pds.values().filter(|pd| of(&pd.context)).count(),
            "mrs" => world.mrs.values().filter(|mr| mr.device == device).count(),
            "channels" => world.channels.values().filter(|channel| of(&channel.context)).count(),
            "cqs" => world.cqs.values().filter(|cq| cq.device == device).count(),
            "qps" => world.qps.values().filter(|qp| qp.device == device).count(),
            "ended" => {
                let ended = |qp: &&Qp| qp.device == device && qp.state == State::Err;
                world.qps.values().filter(ended).count()
            }
            "held" => world.pairs_of(device).map(|pair| world.qps[&pair].queue.len()).sum(),
            "stalled" => known.stalled as usize,
            "misuse" => known.misuse.len() + world.misuse.len(),
            "requests" => known.requests as usize,
            "signalled" => known.signalled as usize,
            "most" => known.most as usize,
            "refusals" => known.refusals.len(),
            "dooms" => known.fates.len(),
            _ => return None,
        };
        answer = number as u64;
        Some(())
    };
    // SAFETY: the caller's string.
    unsafe { on(name, count) };
    answer
}

/// Numbers of the device's queue pairs with requests that wait, and how many: pairs of numbers, at most `len` of them.
/// Answers how many there are.
#[unsafe(no_mangle)]
unsafe extern "C" fn verbs_emulator_held(name: *const c_char, into: *mut [u32; 2], len: usize) -> usize {
    let mut found: Vec<[u32; 2]> = Vec::new();
    let look = |world: &mut World, device: usize| {
        let held = world.pairs_of(device).map(|pair| &world.qps[&pair]).filter(|qp| !qp.queue.is_empty());
        found = held.map(|qp| [qp.number, qp.queue.len() as u32]).collect();
        Some(())
    };
    // SAFETY: the caller's string.
    unsafe { on(name, look) };
    found.sort_unstable();
    for (at, pair) in found.iter().enumerate().take(len) {
        // SAFETY: the caller's array has `len` places.
        unsafe { into.add(at).write(*pair) };
    }
    found.len()
}

impl World {
    fn pairs_of(&self, device: usize) -> impl Iterator<Item = usize> + '_ {
        self.qps.iter().filter(move |(_, qp)| qp.device == device).map(|(address, _)| *address)
    }
}
