//! Test code: the functions of `libascendcl.so` that `ckpt` calls, over host memory, and strict. See ../../README.md.

// What the functions ask of their callers is what the ACL headers ask.
#![allow(clippy::missing_safety_doc)]

mod fault;
mod memory;
mod shared;
mod state;
mod stream;

use std::{
    cell::{Cell, RefCell},
    ffi::{CStr, CString, c_char},
};

use state::state;

pub(crate) const OK: i32 = 0;
pub(crate) const REPEAT_INITIALIZE: i32 = 100_002;
pub(crate) const PARAM_INVALID: i32 = 107_000;
pub(crate) const INVALID_DEVICE: i32 = 107_001;
pub(crate) const CONTEXT_NULL: i32 = 107_002;
pub(crate) const STREAM_CONTEXT: i32 = 107_003;
pub(crate) const INVALID_HANDLE: i32 = 107_017;
pub(crate) const OUT_OF_MEMORY: i32 = 207_001;
pub(crate) const NOT_COMPLETE: i32 = 507_004;
pub(crate) const IPC_ERROR: i32 = 507_022;

/// Why a call fails.
pub(crate) struct Refusal {
    pub(crate) code: i32,
    pub(crate) why: String,
}

pub(crate) type Answer<T = ()> = Result<T, Refusal>;

pub(crate) fn refuse<T>(code: i32, why: impl Into<String>) -> Answer<T> {
    Err(Refusal { code, why: why.into() })
}

thread_local! {
    static DEVICE: Cell<i32> = const { Cell::new(-1) };
    static MESSAGE: RefCell<CString> = RefCell::default();
}

pub(crate) fn tell(why: &str) {
    let line = format!("emulator: {}", why.replace('\0', " "));
    MESSAGE.with(|message| *message.borrow_mut() = CString::new(line).unwrap_or_default());
}

/// Runs the body of an exported function.
pub(crate) fn call(name: &str, body: impl FnOnce() -> Answer) -> i32 {
    let outcome = match fault::injected(name) {
        OK if name != "aclInit" && !state().initialised => refuse(100_001, "aclInit was not called"),
        OK => body(),
        code => refuse(code, "injected"),
    };
    match outcome {
        Ok(()) => OK,
        Err(Refusal { code, why }) => {
            tell(&format!("{name}: {why}"));
            code
        }
    }
}

/// The thread's device.
pub(crate) fn current() -> Answer<i32> {
    match DEVICE.get() {
        -1 => refuse(CONTEXT_NULL, "this thread has no device; call aclrtSetDevice"),
        device => Ok(device),
    }
}

pub(crate) fn must_be_current(device: i32, what: &str) -> Answer {
    let current = current()?;
    if current == device {
        return Ok(());
    }
    refuse(STREAM_CONTEXT, format!("the {what} is of device {device}, this thread's device is {current}"))
}

/// Writes through a pointer of the caller's.
///
/// # Safety
/// `to` must be null or valid for writing a `T`.
pub(crate) unsafe fn give<T>(to: *mut T, value: T) -> Answer {
    if to.is_null() {
        return refuse(PARAM_INVALID, "a null pointer for a result");
    }
    // SAFETY: not null, and valid by this function's contract.
    unsafe { to.write(value) };
    Ok(())
}

#[unsafe(no_mangle)]
extern "C" fn aclInit(config: *const c_char) -> i32 {
    call("aclInit", || {
        if !config.is_null() {
            return refuse(PARAM_INVALID, "the emulator takes no configuration");
        }
        let mut state = state();
        if std::mem::replace(&mut state.initialised, true) {
            return refuse(REPEAT_INITIALIZE, "it is initialised");
        }
        Ok(())
    })
}

/// The last message, which is then forgotten.
#[unsafe(no_mangle)]
extern "C" fn aclGetRecentErrMsg() -> *const c_char {
    thread_local!(static TAKEN: RefCell<CString> = RefCell::default());
    let message = MESSAGE.with(RefCell::take);
    if message.is_empty() {
        return std::ptr::null();
    }
    TAKEN.with(|taken| {
        *taken.borrow_mut() = message;
        taken.borrow().as_ptr()
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtGetVersion(major: *mut i32, minor: *mut i32, patch: *mut i32) -> i32 {
    call("aclrtGetVersion", || {
        // SAFETY: the caller's pointers.
        unsafe { give(major, 1).and(give(minor, 15)).and(give(patch, 0)) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn aclrtGetSocName() -> *const c_char {
    c"Ascend910-emulated".as_ptr()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtGetDeviceCount(count: *mut u32) -> i32 {
    // SAFETY: the caller's pointer.
    call("aclrtGetDeviceCount", || unsafe { give(count, state::devices()) })
}

#[unsafe(no_mangle)]
extern "C" fn aclrtSetDevice(device: i32) -> i32 {
    call("aclrtSetDevice", || {
        if !u32::try_from(device).is_ok_and(|device| device < state::devices()) {
            return refuse(INVALID_DEVICE, format!("there is no device {device}"));
        }
        DEVICE.set(device);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtGetDevice(device: *mut i32) -> i32 {
    // SAFETY: the caller's pointer.
    call("aclrtGetDevice", || unsafe { give(device, current()?) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtGetPhyDevIdByLogicDevId(logical: i32, physical: *mut i32) -> i32 {
    call("aclrtGetPhyDevIdByLogicDevId", || {
        if !u32::try_from(logical).is_ok_and(|device| device < state::devices()) {
            return refuse(INVALID_DEVICE, format!("there is no device {logical}"));
        }
        // SAFETY: the caller's pointer.
        unsafe { give(physical, logical) }
    })
}

/// Sets faults, in the form of the variable.
#[unsafe(no_mangle)]
unsafe extern "C" fn ascend_emulator_fault(text: *const c_char) {
    // SAFETY: a zero-terminated string, by contract.
    fault::set(&unsafe { CStr::from_ptr(text) }.to_string_lossy());
}
