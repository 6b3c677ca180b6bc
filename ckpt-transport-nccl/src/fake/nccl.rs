//! NCCL: members meet in a table of groups. Launches happen later, on another thread, as with non-blocking
//! communicators; a member that is missing leaves the others waiting on their streams until they abort.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    ffi::c_char,
    sync::{
        Arc, Condvar, LazyLock, Mutex,
        atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::cuda;
use crate::{
    library::{Functions, RawConfig, UniqueId},
    table::Handle,
};

const INVALID_ARGUMENT: i32 = 4;
const INVALID_USAGE: i32 = 5;
const IN_PROGRESS: i32 = 7;

#[derive(Default)]
struct Meeting {
    joined: usize,
    /// By group number: members that have arrived, and the roots' bytes.
    arrived: HashMap<u64, usize>,
    bytes: HashMap<(u64, usize), Vec<u8>>,
}

#[derive(Default)]
struct Group {
    meeting: Mutex<Meeting>,
    changed: Condvar,
}

struct Communicator {
    group: Arc<Group>,
    rank: i32,
    /// On which it was made.
    device: Option<i32>,
    size: usize,
    /// What an asynchronous launch is about to say.
    state: AtomicI32,
    aborted: AtomicBool,
    next_group: AtomicU64,
    fail_next: AtomicBool,
}

#[derive(Clone, Copy)]
struct Op {
    address: u64,
    len: usize,
    root: i32,
}

static GROUPS: LazyLock<Mutex<HashMap<[u8; 128], Arc<Group>>>> = LazyLock::new(Mutex::default);
static LIVE: LazyLock<Mutex<BTreeMap<Handle, Arc<Communicator>>>> = LazyLock::new(Mutex::default);
static NEXT: AtomicUsize = AtomicUsize::new(1);

struct Open {
    depth: usize,
    ops: Vec<(Handle, Handle, Op)>,
}

thread_local! {
    static OPEN: RefCell<Open> = const { RefCell::new(Open { depth: 0, ops: Vec::new() }) };
}

/// Communicators of the group with this id that were neither destroyed nor aborted.
pub(crate) fn live_communicators(id: &[u8]) -> usize {
    let Some(group) = <[u8; 128]>::try_from(id).ok().and_then(|id| GROUPS.lock().unwrap().get(&id).cloned())
    else {
        return 0;
    };
    LIVE.lock().unwrap().values().filter(|c| Arc::ptr_eq(&c.group, &group)).count()
}

/// The next launch of `rank` in the group with this id ends with an asynchronous error.
pub(crate) fn fail_next_launch(id: &[u8], rank: i32) {
    let group = GROUPS.lock().unwrap()[<&[u8; 128]>::try_from(id).unwrap()].clone();
    for communicator in LIVE.lock().unwrap().values() {
        if Arc::ptr_eq(&communicator.group, &group) && communicator.rank == rank {
            communicator.fail_next.store(true, Ordering::Release);
        }
    }
}

/// Communicators on a device.
pub(super) fn communicators_of(device: i32) -> usize {
    LIVE.lock().unwrap().values().filter(|c| c.device == Some(device)).count()
}

fn find(communicator: Handle) -> Option<Arc<Communicator>> {
    LIVE.lock().unwrap().get(&communicator).cloned()
}

unsafe extern "C" fn version(version: *mut i32) -> i32 {
    // SAFETY: the caller gives room for one value.
    unsafe { *version = 22809 };
    0
}

unsafe extern "C" fn unique_id(id: *mut UniqueId) -> i32 {
    let mut bytes = [0; 128];
    bytes[..8].copy_from_slice(&(NEXT.fetch_add(1, Ordering::Relaxed) as u64).to_le_bytes());
    // SAFETY: the caller gives room for one id.
    unsafe { *id = UniqueId(bytes) };
    0
}

unsafe extern "C" fn init(
    communicator: *mut Handle,
    size: i32,
    id: UniqueId,
    rank: i32,
    _: *mut RawConfig,
) -> i32 {
    let group = GROUPS.lock().unwrap().entry(id.0).or_default().clone();
    group.meeting.lock().unwrap().joined += 1;
    let handle = NEXT.fetch_add(1, Ordering::Relaxed);
    let new = Communicator {
        group,
        rank,
        device: cuda::current_device(),
        size: size as usize,
        state: AtomicI32::new(0),
        aborted: AtomicBool::new(false),
        next_group: AtomicU64::new(0),
        fail_next: AtomicBool::new(false),
    };
    LIVE.lock().unwrap().insert(handle, Arc::new(new));
    // SAFETY: the caller gives room for one handle.
    unsafe { *communicator = handle };
    IN_PROGRESS
}

unsafe extern "C" fn async_error(communicator: Handle, state: *mut i32) -> i32 {
    let Some(communicator) = find(communicator) else { return INVALID_ARGUMENT };
    let all_here = communicator.group.meeting.lock().unwrap().joined >= communicator.size;
    // SAFETY: the caller gives room for one value.
    unsafe { *state = if all_here { communicator.state.load(Ordering::Acquire) } else { IN_PROGRESS } };
    0
}

unsafe extern "C" fn finalize(communicator: Handle) -> i32 {
    if find(communicator).is_some() { IN_PROGRESS } else { INVALID_ARGUMENT }
}

unsafe extern "C" fn destroy(communicator: Handle) -> i32 {
    if LIVE.lock().unwrap().remove(&communicator).is_some() { 0 } else { INVALID_ARGUMENT }
}

unsafe extern "C" fn abort(communicator: Handle) -> i32 {
    let Some(removed) = LIVE.lock().unwrap().remove(&communicator) else { return INVALID_ARGUMENT };
    removed.aborted.store(true, Ordering::Release);
    let _meeting = removed.group.meeting.lock().unwrap();
    removed.group.changed.notify_all();
    0
}

unsafe extern "C" fn error_string(_: i32) -> *const c_char {
    c"an error of the fake".as_ptr()
}

unsafe extern "C" fn last_error(_: Handle) -> *const c_char {
    c"".as_ptr()
}

unsafe extern "C" fn group_start() -> i32 {
    OPEN.with_borrow_mut(|open| open.depth += 1);
    0
}

unsafe extern "C" fn broadcast(
    from: u64,
    to: u64,
    len: usize,
    _: i32,
    root: i32,
    communicator: Handle,
    stream: Handle,
) -> i32 {
    OPEN.with_borrow_mut(|open| {
        if open.depth == 0 || from != to {
            return INVALID_USAGE;
        }
        open.ops.push((communicator, stream, Op { address: to, len, root }));
        0
    })
}

unsafe extern "C" fn group_end() -> i32 {
    let calls = OPEN.with_borrow_mut(|open| {
        open.depth -= 1;
        std::mem::take(&mut open.ops)
    });
    let Some(&(handle, stream, _)) = calls.first() else { return 0 };
    let Some(communicator) = find(handle) else { return INVALID_ARGUMENT };
    if communicator.state.swap(IN_PROGRESS, Ordering::AcqRel) != 0 {
        return INVALID_USAGE;
    }
    let ops: Vec<Op> = calls.into_iter().map(|(_, _, op)| op).collect();
    let mut context = 0;
    // SAFETY: writes one handle; the stream is one of the fake.
    unsafe { (cuda::functions().stream_context)(stream, &mut context) };
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(1));
        if communicator.fail_next.load(Ordering::Acquire) {
            communicator.state.store(6, Ordering::Release);
            return;
        }
        let number = communicator.next_group.fetch_add(1, Ordering::AcqRel);
        let kernel = communicator.clone();
        // SAFETY: pushed and popped on this thread.
        unsafe { (cuda::functions().context_push)(context) };
        let code = cuda::enqueue(stream, move || exchange(&kernel, number, &ops));
        communicator.state.store(if code == 0 { 0 } else { 1 }, Ordering::Release);
    });
    IN_PROGRESS
}

/// The "kernel": meets the other members, and ends normally, without bytes, when its communicator is aborted.
fn exchange(communicator: &Communicator, number: u64, ops: &[Op]) {
    let group = &communicator.group;
    let mut meeting = group.meeting.lock().unwrap();
    for (i, op) in ops.iter().enumerate().filter(|(_, op)| op.root == communicator.rank) {
        // SAFETY: the range is a block of the fake that the stream keeps alive.
        let bytes = unsafe { std::slice::from_raw_parts(op.address as *const u8, op.len) }.to_vec();
        meeting.bytes.insert((number, i), bytes);
    }
    *meeting.arrived.entry(number).or_default() += 1;
    group.changed.notify_all();
    let alive = || !communicator.aborted.load(Ordering::Acquire);
    let meeting = group
        .changed
        .wait_while(meeting, |meeting| alive() && meeting.arrived[&number] < communicator.size)
        .unwrap();
    if !alive() {
        return;
    }
    for (i, op) in ops.iter().enumerate().filter(|(_, op)| op.root != communicator.rank) {
        let bytes = &meeting.bytes[&(number, i)];
        assert_eq!(bytes.len(), op.len, "members gave different lengths");
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), op.address as *mut u8, op.len) };
    }
}

/// The table.
pub(super) fn functions() -> Functions {
    Functions {
        version,
        unique_id,
        init,
        finalize,
        destroy,
        abort,
        async_error,
        error_string,
        last_error,
        group_start,
        group_end,
        broadcast,
    }
}
