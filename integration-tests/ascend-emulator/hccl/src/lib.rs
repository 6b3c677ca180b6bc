//! Test code: the functions of `libhccl.so` that `ckpt` calls, over shared memory, and strict. See ../../README.md.

// What the functions ask of their callers is what the HCCL headers ask.
#![allow(clippy::missing_safety_doc)]

mod acl;
mod collective;
mod communicator;
mod segment;

use std::{ffi::CString, time::Duration};

use acl::acl;
use collective::Work;
use communicator::{Communicator, communicators};
use segment::Segment;

pub(crate) const OK: i32 = 0;
pub(crate) const PARA: i32 = 1;
pub(crate) const PTR: i32 = 2;
pub(crate) const INTERNAL: i32 = 4;
pub(crate) const NOT_SUPPORT: i32 = 5;
pub(crate) const UNAVAIL: i32 = 7;
pub(crate) const SYSCALL: i32 = 8;
pub(crate) const TIMEOUT: i32 = 9;
pub(crate) const RUNTIME: i32 = 15;

/// Bytes of an element, by `HcclDataType`.
const ELEMENT: [u64; 18] = [1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2, 16, 0, 1, 1, 1, 1];
const UINT8: i32 = 7;
const FP32: i32 = 4;

/// Why a call fails.
pub(crate) struct Refusal {
    pub(crate) code: i32,
    pub(crate) why: String,
}

pub(crate) type Answer<T = ()> = Result<T, Refusal>;

pub(crate) fn refuse<T>(code: i32, why: impl Into<String>) -> Answer<T> {
    Err(Refusal { code, why: why.into() })
}

/// Runs the body of an exported function.
fn call(name: &str, body: impl FnOnce() -> Answer) -> i32 {
    let Some(acl) = acl() else {
        eprintln!("ascend emulator: libascendcl was not loaded before HCCL, with global symbols");
        return RUNTIME;
    };
    let outcome = match acl.injected(name) {
        OK => body(),
        code => refuse(code, "injected"),
    };
    match outcome {
        Ok(()) => OK,
        Err(Refusal { code, why }) => {
            acl.tell(&format!("{name}: {why}"));
            code
        }
    }
}

/// The thread's device, which every call needs.
fn device() -> Answer<i32> {
    match acl().map_or(-1, |acl| acl.device()) {
        -1 => refuse(RUNTIME, "this thread has no device; call aclrtSetDevice"),
        device => Ok(device),
    }
}

/// Writes through a pointer of the caller's.
///
/// # Safety
/// `to` must be null or valid for writing a `T`.
unsafe fn give<T>(to: *mut T, value: T) -> Answer {
    if to.is_null() {
        return refuse(PTR, "a null pointer for a result");
    }
    // SAFETY: not null, and valid by this function's contract.
    unsafe { to.write(value) };
    Ok(())
}

/// `HcclRootInfo`.
#[repr(C)]
struct RootInfo([u8; 4108]);

/// The part of `HcclCommConfig` that is looked at.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
}

const MAGIC: &[u8; 12] = b"emulatedhccl";

/// # Safety
/// `config` must be null or point to the beginning of a `HcclCommConfig`.
unsafe fn check_config(config: *const Config) -> Answer {
    if config.is_null() {
        return refuse(PTR, "no config");
    }
    // SAFETY: not null, and readable by this function's contract.
    let Config { size, magic, version } = unsafe { config.read() };
    if (size, magic, version) != (312, 0xf0f0_f0f0, 6) {
        return refuse(PARA, format!("a config of {size} bytes, magic {magic:#x}, version {version}"));
    }
    Ok(())
}

/// After this an incomplete group is given up.
fn patience() -> Duration {
    let text = std::env::var("ASCEND_EMULATOR_CONNECT_MS").ok();
    Duration::from_millis(text.and_then(|text| text.parse().ok()).unwrap_or(10_000))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn HcclGetRootInfo(info: *mut RootInfo) -> i32 {
    call("HcclGetRootInfo", || {
        device()?;
        let name = segment::new_name()?;
        Segment::open(&name, true)?;
        let mut root = RootInfo([0; 4108]);
        root.0[..MAGIC.len()].copy_from_slice(MAGIC);
        root.0[64..64 + name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: the caller's pointer.
        unsafe { give(info, root) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn HcclCommInitRootInfoConfig(
    members: u32,
    info: *const RootInfo,
    rank: u32,
    config: *const Config,
    made: *mut usize,
) -> i32 {
    call("HcclCommInitRootInfoConfig", || {
        let device = device()?;
        // SAFETY: the caller's pointer.
        unsafe { check_config(config) }?;
        if info.is_null() || made.is_null() {
            return refuse(PTR, "no root info, or no place for the handle");
        }
        // SAFETY: the caller's pointer.
        let root = unsafe { info.read() };
        if root.0[..MAGIC.len()] != *MAGIC {
            return refuse(PARA, "no root info of ours");
        }
        let name: Vec<u8> = root.0[64..].iter().copied().take_while(|byte| *byte != 0).collect();
        let name = String::from_utf8_lossy(&name).into_owned();
        let handle = communicator::join(&name, false, members, rank, device, patience())?;
        // SAFETY: the caller's pointer.
        unsafe { give(made, handle) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn HcclCreateSubCommConfig(
    parent: *mut usize,
    members: u32,
    ranks: *mut u32,
    id: u64,
    own: u32,
    config: *const Config,
    made: *mut usize,
) -> i32 {
    call("HcclCreateSubCommConfig", || {
        // SAFETY: the caller's pointer.
        unsafe { check_config(config) }?;
        if parent.is_null() || ranks.is_null() || made.is_null() {
            return refuse(PTR, "the parent's handle is passed by pointer, as are ranks and result");
        }
        // SAFETY: the caller's pointers; `ranks` has `members` elements.
        let (parent, ranks) = unsafe { (parent.read(), std::slice::from_raw_parts(ranks, members as usize)) };
        let parent = Communicator::find(parent, device()?)?;
        if ranks.get(own as usize) != Some(&parent.rank) {
            return refuse(PARA, format!("rank {} is not number {own} of {ranks:?}", parent.rank));
        }
        let name = format!("{}-{id}", parent.name);
        let handle = communicator::join(&name, true, members, own, parent.device, patience())?;
        // SAFETY: the caller's pointer.
        unsafe { give(made, handle) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn HcclCommDestroy(handle: usize) -> i32 {
    call("HcclCommDestroy", || {
        let communicator = Communicator::find(handle, device()?)?;
        if communicator.inside() {
            return refuse(INTERNAL, "another thread is in a call of this communicator");
        }
        communicators().remove(&handle);
        communicator.end();
        Ok(())
    })
}

fn bytes_of(count: u64, data_type: i32) -> Answer<u64> {
    let element = usize::try_from(data_type).ok().and_then(|n| ELEMENT.get(n)).copied().unwrap_or(0);
    match count.checked_mul(element) {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => refuse(PARA, format!("{count} elements of type {data_type}")),
    }
}

/// Enqueues `work` after checking the ranges that it names.
fn enqueue(
    name: &str,
    handle: usize,
    stream: usize,
    work: impl FnOnce(&Communicator) -> Answer<Work>,
) -> i32 {
    call(name, || {
        let communicator = Communicator::find(handle, device()?)?;
        let _inside = communicator.enter();
        let work = work(&communicator)?;
        for (address, bytes) in work.ranges() {
            collective::range(communicator.device, address, bytes)?;
        }
        communicator.submit(stream, work)
    })
}

#[unsafe(no_mangle)]
extern "C" fn HcclBroadcast(
    memory: u64,
    count: u64,
    data_type: i32,
    root: u32,
    handle: usize,
    stream: usize,
) -> i32 {
    enqueue("HcclBroadcast", handle, stream, |communicator| {
        if root >= communicator.members {
            return refuse(PARA, format!("root {root} of {}", communicator.members));
        }
        Ok(Work::Broadcast { memory, bytes: bytes_of(count, data_type)?, root })
    })
}

#[unsafe(no_mangle)]
extern "C" fn HcclAllGather(
    own: u64,
    all: u64,
    count: u64,
    data_type: i32,
    handle: usize,
    stream: usize,
) -> i32 {
    enqueue("HcclAllGather", handle, stream, |communicator| {
        let bytes = bytes_of(count, data_type)?;
        let end = all + bytes * u64::from(communicator.members);
        if own < end && all < own + bytes {
            return refuse(PARA, "source and result overlap");
        }
        Ok(Work::Gather { own, all, bytes })
    })
}

#[unsafe(no_mangle)]
extern "C" fn HcclAllReduce(
    from: u64,
    to: u64,
    count: u64,
    data_type: i32,
    reduction: i32,
    handle: usize,
    stream: usize,
) -> i32 {
    enqueue("HcclAllReduce", handle, stream, |_| {
        if data_type == UINT8 {
            return refuse(NOT_SUPPORT, "HCCL does not reduce UINT8");
        }
        if (data_type, reduction) != (FP32, 0) {
            return refuse(NOT_SUPPORT, "the emulator adds FP32 only");
        }
        Ok(Work::Sum { from, to, bytes: bytes_of(count, data_type)? })
    })
}

#[unsafe(no_mangle)]
extern "C" fn HcclBarrier(handle: usize, stream: usize) -> i32 {
    enqueue("HcclBarrier", handle, stream, |_| Ok(Work::Barrier))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn HcclGetCommAsyncError(handle: usize, state: *mut i32) -> i32 {
    call("HcclGetCommAsyncError", || {
        let communicator = Communicator::find(handle, device()?)?;
        let injected = acl().map_or(OK, |acl| acl.injected("async"));
        // SAFETY: the caller's pointer.
        unsafe { give(state, if injected == OK { communicator.failed() } else { injected }) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn HcclGetErrorString(code: i32) -> *const std::ffi::c_char {
    let text = match code {
        OK => c"no error",
        PARA => c"parameter error",
        PTR => c"empty pointer",
        INTERNAL => c"internal error",
        NOT_SUPPORT => c"not support",
        TIMEOUT => c"timeout",
        RUNTIME => c"call runtime api fail",
        21 => c"remote error",
        _ => c"unknown error",
    };
    text.as_ptr()
}

/// Text for C; what cannot be is left out.
pub(crate) fn c_text(text: &str) -> CString {
    CString::new(text.replace('\0', " ")).unwrap_or_default()
}
