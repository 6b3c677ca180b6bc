//! The driver: streams are threads, device memory is host memory.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    ffi::{CStr, c_char, c_void},
    sync::{
        Arc, Condvar, LazyLock, Mutex,
        atomic::{AtomicI32, AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use rustix::mm::{self, Advice, MapFlags, MprotectFlags, ProtFlags};

use crate::{
    device::{Functions, IpcHandle, nvml},
    table::Handle,
};

const DEVICES: i32 = 8;
/// Devices from here on have a memory that runs low.
pub(crate) const FIRST_COUNTED: i32 = 6;
/// Of such a device.
pub(crate) const CONTEXT_BYTES: u64 = 48 << 20;
/// Of each communicator on such a device.
pub(crate) const GROUP_BYTES: u64 = 20 << 20;
const INVALID_VALUE: i32 = 1;
const INVALID_CONTEXT: i32 = 201;
const NOT_READY: i32 = 600;
const ILLEGAL_ADDRESS: i32 = 700;
const ALREADY_REGISTERED: i32 = 712;

type Job = Box<dyn FnOnce(&Context) + Send>;

/// Errors are sticky, as on a device.
struct Context {
    error: AtomicI32,
    device: i32,
}

struct Stream {
    context: Arc<Context>,
    jobs: mpsc::Sender<Job>,
}

#[derive(Default)]
struct Event {
    /// Times recorded, times reached.
    counts: Mutex<(u64, u64)>,
    reached: Condvar,
}

#[derive(Default)]
struct World {
    contexts: BTreeMap<Handle, Arc<Context>>,
    streams: BTreeMap<Handle, Arc<Stream>>,
    events: BTreeMap<Handle, Arc<Event>>,
    /// Device blocks: address and length.
    device: BTreeMap<u64, u64>,
    /// On which device each block is.
    owners: BTreeMap<u64, i32>,
    registered: BTreeMap<u64, u64>,
}

static WORLD: LazyLock<Mutex<World>> = LazyLock::new(Mutex::default);
static NEXT: AtomicUsize = AtomicUsize::new(1);

thread_local! {
    static STACK: RefCell<Vec<Handle>> = const { RefCell::new(Vec::new()) };
}

fn world() -> std::sync::MutexGuard<'static, World> {
    WORLD.lock().unwrap()
}

fn next() -> Handle {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn current() -> Option<Arc<Context>> {
    let top = STACK.with_borrow(|stack| stack.last().copied())?;
    world().contexts.get(&top).cloned()
}

/// How many contexts this thread has pushed.
pub(crate) fn stack_depth() -> usize {
    STACK.with_borrow(Vec::len)
}

/// Whether a device block starts at `address`.
pub(crate) fn is_allocated(address: u64) -> bool {
    world().device.contains_key(&address)
}

/// Whether host memory with this byte is registered.
pub(crate) fn is_registered(address: u64) -> bool {
    world().registered.iter().any(|(start, len)| (*start..start + len).contains(&address))
}

/// Whether a copy engine may touch the range.
fn is_valid(address: u64, len: u64) -> bool {
    let world = world();
    let inside = |start: u64, bytes: u64| address >= start && address + len <= start + bytes;
    let block = world.device.range(..=address).next_back().is_some_and(|(start, b)| inside(*start, *b));
    block || world.registered.iter().any(|(start, bytes)| inside(*start, *bytes))
}

/// Runs `job` on the stream after what is there, a little late.
pub(super) fn enqueue(stream: Handle, job: impl FnOnce() + Send + 'static) -> i32 {
    let Some(stream) = world().streams.get(&stream).cloned() else { return INVALID_VALUE };
    if current().is_none_or(|context| !Arc::ptr_eq(&context, &stream.context)) {
        return INVALID_CONTEXT;
    }
    let job: Job = Box::new(move |_| job());
    if stream.jobs.send(job).is_ok() { stream.context.error.load(Ordering::Acquire) } else { INVALID_VALUE }
}

unsafe extern "C" fn init(_: u32) -> i32 {
    0
}

unsafe extern "C" fn driver_version(version: *mut i32) -> i32 {
    // SAFETY: the caller gives room for one value.
    unsafe { *version = 12080 };
    0
}

unsafe extern "C" fn error_text(code: i32, text: *mut *const c_char) -> i32 {
    let words =
        if code == ILLEGAL_ADDRESS { c"CUDA_ERROR_ILLEGAL_ADDRESS" } else { c"CUDA_ERROR_OF_THE_FAKE" };
    // SAFETY: the caller gives room for one pointer.
    unsafe { *text = words.as_ptr() };
    0
}

unsafe extern "C" fn device_count(count: *mut i32) -> i32 {
    // SAFETY: the caller gives room for one value.
    unsafe { *count = DEVICES };
    0
}

unsafe extern "C" fn device_get(device: *mut i32, ordinal: i32) -> i32 {
    // SAFETY: the caller gives room for one value.
    unsafe { *device = ordinal };
    if (0..DEVICES).contains(&ordinal) { 0 } else { INVALID_VALUE }
}

unsafe extern "C" fn device_name(text: *mut c_char, len: i32, _: i32) -> i32 {
    let name = c"Fake GPU".to_bytes_with_nul();
    assert!(name.len() <= len as usize);
    // SAFETY: the caller gives room for `len` bytes.
    unsafe { std::ptr::copy_nonoverlapping(name.as_ptr().cast(), text, name.len()) };
    0
}

unsafe extern "C" fn device_uuid(uuid: *mut [u8; 16], device: i32) -> i32 {
    // SAFETY: the caller gives room for 16 bytes.
    unsafe { *uuid = [device as u8; 16] };
    0
}

unsafe extern "C" fn device_pci(text: *mut c_char, len: i32, _: i32) -> i32 {
    let address = c"00000000:3B:00.0".to_bytes_with_nul();
    assert!(address.len() <= len as usize);
    // SAFETY: the caller gives room for `len` bytes.
    unsafe { std::ptr::copy_nonoverlapping(address.as_ptr().cast(), text, address.len()) };
    0
}

unsafe extern "C" fn device_attribute(value: *mut i32, _: i32, _: i32) -> i32 {
    // SAFETY: the caller gives room for one value.
    unsafe { *value = 0 };
    0
}

unsafe extern "C" fn context_retain(context: *mut Handle, device: i32) -> i32 {
    let handle = next();
    world().contexts.insert(handle, Arc::new(Context { error: AtomicI32::new(0), device }));
    // SAFETY: the caller gives room for one handle.
    unsafe { *context = handle };
    0
}

unsafe extern "C" fn context_release(_: i32) -> i32 {
    0
}

unsafe extern "C" fn context_push(context: Handle) -> i32 {
    STACK.with_borrow_mut(|stack| stack.push(context));
    0
}

unsafe extern "C" fn context_pop(context: *mut Handle) -> i32 {
    match STACK.with_borrow_mut(Vec::pop) {
        Some(popped) => {
            // SAFETY: the caller gives room for one handle.
            unsafe { *context = popped };
            0
        }
        None => INVALID_CONTEXT,
    }
}

unsafe extern "C" fn memory_info(free: *mut usize, total: *mut usize) -> i32 {
    let Some(context) = current() else { return INVALID_CONTEXT };
    // SAFETY: the caller gives room for both.
    unsafe { (*free, *total) = (free_bytes(context.device) as usize, 2 << 30) };
    0
}

/// Of the device: what is left beside its contexts, groups and blocks. Only the last devices count, which no other test
/// uses.
fn free_bytes(device: i32) -> u64 {
    if device < FIRST_COUNTED {
        return 1 << 30;
    }
    let groups = super::nccl::communicators_of(device) as u64;
    let world = world();
    let context = if world.contexts.values().any(|c| c.device == device) { CONTEXT_BYTES } else { 0 };
    let blocks: u64 =
        world.owners.iter().filter(|(_, d)| **d == device).map(|(at, _)| world.device[at]).sum();
    (1 << 30) - context - groups * GROUP_BYTES - blocks
}

/// The device that is current on this thread.
pub(super) fn current_device() -> Option<i32> {
    current().map(|context| context.device)
}

/// The management library, whose handles are device numbers.
pub(super) static NVML: nvml::Functions = nvml::Functions { init: nvml_init, by_uuid, memory: nvml_memory };

unsafe extern "C" fn nvml_init() -> i32 {
    0
}

unsafe extern "C" fn by_uuid(uuid: *const c_char, device: *mut Handle) -> i32 {
    // SAFETY: the caller gives a terminated string.
    let uuid = unsafe { CStr::from_ptr(uuid) }.to_string_lossy();
    let Some(number) = uuid.strip_prefix("GPU-").and_then(|rest| rest.get(..2)?.parse().ok()) else {
        return INVALID_VALUE;
    };
    // SAFETY: the caller gives room for one handle.
    unsafe { *device = number };
    0
}

unsafe extern "C" fn nvml_memory(device: Handle, memory: *mut nvml::RawMemory) -> i32 {
    let (total, free) = (2 << 30, free_bytes(device as i32));
    // SAFETY: the caller gives room for one struct.
    unsafe { *memory = nvml::RawMemory { total, free, used: total - free } };
    0
}

unsafe extern "C" fn memory_alloc(address: *mut u64, len: usize) -> i32 {
    let Some(device) = current_device() else { return INVALID_CONTEXT };
    if len > 1 << 30 {
        return 2;
    }
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping of its own.
    let block =
        unsafe { mm::mmap_anonymous(std::ptr::null_mut(), len, protection, MapFlags::PRIVATE) }.unwrap();
    // Not zero, as fresh device memory; all of it would take too long.
    // SAFETY: the mapping is that long.
    unsafe { std::ptr::write_bytes(block.cast::<u8>(), 0xAB, len.min(64 << 10)) };
    // SAFETY: the caller gives room for one address.
    unsafe { *address = block as u64 };
    let mut world = world();
    world.device.insert(block as u64, len as u64);
    world.owners.insert(block as u64, device);
    0
}

unsafe extern "C" fn memory_free(address: u64) -> i32 {
    let mut world = world();
    let Some(len) = world.device.remove(&address) else { return INVALID_VALUE };
    world.owners.remove(&address);
    drop(world);
    let block = address as *mut std::ffi::c_void;
    // The address is never used again, and whoever still touches it crashes.
    // SAFETY: the mapping is the fake's own.
    unsafe {
        mm::madvise(block, len as usize, Advice::LinuxDontNeed).unwrap();
        mm::mprotect(block, len as usize, MprotectFlags::empty()).unwrap();
    }
    0
}

unsafe extern "C" fn memory_block(base: *mut u64, len: *mut usize, address: u64) -> i32 {
    let world = world();
    match world.device.range(..=address).next_back() {
        Some((start, bytes)) if address < start + bytes => {
            // SAFETY: the caller gives room for both.
            unsafe { (*base, *len) = (*start, *bytes as usize) };
            0
        }
        _ => INVALID_VALUE,
    }
}

unsafe extern "C" fn host_register(address: usize, len: usize, _: u32) -> i32 {
    let mut world = world();
    if world.registered.contains_key(&(address as u64)) {
        return ALREADY_REGISTERED;
    }
    world.registered.insert(address as u64, len as u64);
    0
}

unsafe extern "C" fn host_unregister(address: usize) -> i32 {
    if world().registered.remove(&(address as u64)).is_some() { 0 } else { INVALID_VALUE }
}

unsafe extern "C" fn ipc_export(handle: *mut IpcHandle, address: u64) -> i32 {
    let mut bytes = [0; 64];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    // SAFETY: the caller gives room for one handle.
    unsafe { *handle = IpcHandle(bytes) };
    if is_allocated(address) { 0 } else { INVALID_VALUE }
}

unsafe extern "C" fn ipc_open(address: *mut u64, handle: IpcHandle, _: u32) -> i32 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&handle.0[..8]);
    // SAFETY: the caller gives room for one address.
    unsafe { *address = u64::from_le_bytes(bytes) };
    if is_allocated(u64::from_le_bytes(bytes)) { 0 } else { INVALID_VALUE }
}

/// In place of [`ipc_open`]: `CUDA_ERROR_PEER_ACCESS_UNSUPPORTED`.
pub(super) unsafe extern "C" fn ipc_refused(_: *mut u64, _: IpcHandle, _: u32) -> i32 {
    217
}

unsafe extern "C" fn ipc_close(_: u64) -> i32 {
    0
}

unsafe extern "C" fn copy(to: u64, from: u64, len: usize, stream: Handle) -> i32 {
    let Some(context) = current() else { return INVALID_CONTEXT };
    enqueue(stream, move || {
        if !is_valid(to, len as u64) || !is_valid(from, len as u64) {
            context.error.store(ILLEGAL_ADDRESS, Ordering::Release);
            return;
        }
        // SAFETY: both ranges are live blocks of the fake, or registered host memory.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, len) };
    })
}

/// Into ordinary memory the driver copies before it returns.
unsafe extern "C" fn copy_to_host(to: u64, from: u64, len: usize, stream: Handle) -> i32 {
    if is_valid(to, len as u64) {
        // SAFETY: as for `copy`.
        return unsafe { copy(to, from, len, stream) };
    }
    let (done, wait) = mpsc::channel();
    let code = enqueue(stream, move || {
        // SAFETY: the caller of the driver promises the destination, and waits below.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, len) };
        let _ = done.send(());
    });
    let _ = wait.recv();
    code
}

unsafe extern "C" fn fill(address: u64, byte: u8, len: usize, stream: Handle) -> i32 {
    enqueue(stream, move || {
        assert!(is_valid(address, len as u64));
        // SAFETY: the range is a live block of the fake.
        unsafe { std::ptr::write_bytes(address as *mut u8, byte, len) };
    })
}

unsafe extern "C" fn stream_create(stream: *mut Handle, _: u32) -> i32 {
    let Some(context) = current() else { return INVALID_CONTEXT };
    let (jobs, inbox) = mpsc::channel::<Job>();
    let of_thread = context.clone();
    std::thread::spawn(move || {
        for job in inbox {
            // Late enough that a missing wait is seen.
            std::thread::sleep(Duration::from_micros(200));
            job(&of_thread);
        }
    });
    let handle = next();
    world().streams.insert(handle, Arc::new(Stream { context, jobs }));
    // SAFETY: the caller gives room for one handle.
    unsafe { *stream = handle };
    0
}

unsafe extern "C" fn stream_destroy(stream: Handle) -> i32 {
    if world().streams.remove(&stream).is_some() { 0 } else { INVALID_VALUE }
}

unsafe extern "C" fn stream_wait(stream: Handle, event: Handle, _: u32) -> i32 {
    let Some(event) = world().events.get(&event).cloned() else { return INVALID_VALUE };
    let target = event.counts.lock().unwrap().0;
    enqueue(stream, move || {
        let counts = event.counts.lock().unwrap();
        drop(event.reached.wait_while(counts, |counts| counts.1 < target).unwrap());
    })
}

unsafe extern "C" fn stream_context(stream: Handle, context: *mut Handle) -> i32 {
    let world = world();
    let Some(stream) = world.streams.get(&stream) else { return INVALID_VALUE };
    let found = world.contexts.iter().find(|(_, candidate)| Arc::ptr_eq(candidate, &stream.context));
    // SAFETY: the caller gives room for one handle.
    found.map_or(INVALID_CONTEXT, |(handle, _)| unsafe {
        *context = *handle;
        0
    })
}

unsafe extern "C" fn event_create(event: *mut Handle, _: u32) -> i32 {
    let handle = next();
    world().events.insert(handle, Arc::default());
    // SAFETY: the caller gives room for one handle.
    unsafe { *event = handle };
    0
}

unsafe extern "C" fn event_destroy(event: Handle) -> i32 {
    if world().events.remove(&event).is_some() { 0 } else { INVALID_VALUE }
}

unsafe extern "C" fn event_record(event: Handle, stream: Handle) -> i32 {
    let Some(event) = world().events.get(&event).cloned() else { return INVALID_VALUE };
    event.counts.lock().unwrap().0 += 1;
    enqueue(stream, move || {
        event.counts.lock().unwrap().1 += 1;
        event.reached.notify_all();
    })
}

unsafe extern "C" fn event_query(event: Handle) -> i32 {
    let Some(context) = current() else { return INVALID_CONTEXT };
    let Some(event) = world().events.get(&event).cloned() else { return INVALID_VALUE };
    let (recorded, reached) = *event.counts.lock().unwrap();
    match context.error.load(Ordering::Acquire) {
        0 if reached < recorded => NOT_READY,
        code => code,
    }
}

unsafe extern "C" fn module_load(module: *mut Handle, source: *const c_void) -> i32 {
    // SAFETY: the caller gives a zero-terminated source and room for one handle.
    let source = unsafe {
        *module = next();
        CStr::from_ptr(source.cast())
    };
    if source.to_bytes().starts_with(b"//") { 0 } else { INVALID_VALUE }
}

unsafe extern "C" fn module_unload(_: Handle) -> i32 {
    0
}

unsafe extern "C" fn module_function(function: *mut Handle, _: Handle, name: *const c_char) -> i32 {
    // SAFETY: the caller gives a zero-terminated name and room for one handle.
    let name = unsafe {
        *function = next();
        CStr::from_ptr(name)
    };
    if name == c"ckpt_copy_pieces" { 0 } else { INVALID_VALUE }
}

/// The one kernel there is: a list of pieces to copy.
#[allow(clippy::too_many_arguments, reason = "the driver's signature")]
unsafe extern "C" fn launch(
    _: Handle,
    blocks: u32,
    _: u32,
    _: u32,
    threads: u32,
    _: u32,
    _: u32,
    _: u32,
    stream: Handle,
    arguments: *mut *mut c_void,
    _: *mut *mut c_void,
) -> i32 {
    // SAFETY: the kernel's arguments are a pointer and a count.
    let (list, count) = unsafe { (*(*arguments).cast::<u64>(), *(*arguments.add(1)).cast::<u32>()) };
    if blocks != count || threads == 0 {
        return INVALID_VALUE;
    }
    enqueue(stream, move || {
        for piece in 0..u64::from(count) {
            // SAFETY: the list and its ranges are memory of this process that the stream's owner keeps.
            unsafe {
                let [from, to, bytes] = *((list + piece * 24) as *const [u64; 3]);
                assert!(bytes <= 64 << 10, "a piece is too large");
                std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes as usize);
            }
        }
    })
}

/// `cuMemGetHandleForAddressRange` of a whole block, as a file of its length.
pub(super) unsafe extern "C" fn dma_buf(
    fd: *mut i32,
    address: u64,
    len: usize,
    kind: i32,
    flags: u64,
) -> i32 {
    if world().device.get(&address) != Some(&(len as u64)) || (kind, flags) != (1, 0) {
        return INVALID_VALUE;
    }
    let file = rustix::fs::memfd_create("dma-buf", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, len as u64).unwrap();
    // SAFETY: the caller gives room for one descriptor, which it then owns.
    unsafe { *fd = std::os::fd::IntoRawFd::into_raw_fd(file) };
    0
}

/// `CUDA_ERROR_NOT_SUPPORTED`, as where the kernel's driver is without it.
pub(super) unsafe extern "C" fn dma_buf_refused(_: *mut i32, _: u64, _: usize, _: i32, _: u64) -> i32 {
    801
}

/// The table.
pub(super) fn functions() -> Functions {
    Functions {
        init,
        driver_version,
        error_name: error_text,
        error_string: error_text,
        device_count,
        device_get,
        device_name,
        device_uuid,
        device_pci,
        device_attribute,
        context_retain,
        context_release,
        context_push,
        context_pop,
        memory_info,
        memory_alloc,
        memory_free,
        memory_block,
        host_register,
        host_unregister,
        ipc_export,
        ipc_open,
        ipc_close,
        copy_any: copy,
        copy_to_device: copy,
        copy_to_host,
        copy_on_device: copy,
        fill,
        stream_create,
        stream_destroy,
        stream_wait,
        stream_context,
        event_create,
        event_destroy,
        event_record,
        event_query,
        copy_batch: None,
        module_load: Some(module_load),
        module_unload: Some(module_unload),
        module_function: Some(module_function),
        launch: Some(launch),
        dma_buf: None,
        flush_writes: None,
    }
}
