//! What the emulated HCCL needs of this library. CANN's own HCCL reaches into its runtime as well.

use std::{
    ffi::{CStr, c_char, c_void},
    sync::Arc,
};

use crate::{current, fault, memory::Mapping, memory::device_range, stream::submit, tell};

/// The thread's device, or -1.
#[unsafe(no_mangle)]
extern "C" fn ascend_emulator_device() -> i32 {
    current().unwrap_or(-1)
}

/// 0, or what this call of `function` must return.
#[unsafe(no_mangle)]
unsafe extern "C" fn ascend_emulator_injected(function: *const c_char) -> i32 {
    // SAFETY: a zero-terminated string, by contract.
    fault::injected(&unsafe { CStr::from_ptr(function) }.to_string_lossy())
}

/// Makes `text` the thread's last message.
#[unsafe(no_mangle)]
unsafe extern "C" fn ascend_emulator_tell(text: *const c_char) {
    // SAFETY: a zero-terminated string, by contract.
    tell(&unsafe { CStr::from_ptr(text) }.to_string_lossy());
}

/// The host's address of a range on `device`, and what holds it mapped until [`ascend_emulator_release`]; 0 if the range is
/// not allocated there.
#[unsafe(no_mangle)]
unsafe extern "C" fn ascend_emulator_resolve(
    device: i32,
    address: u64,
    len: u64,
    held: *mut *const c_void,
) -> usize {
    match device_range(device, address, len) {
        Ok((at, mapping)) => {
            // SAFETY: the caller's pointer.
            unsafe { held.write(Arc::into_raw(mapping).cast()) };
            at
        }
        Err(refusal) => {
            tell(&refusal.why);
            0
        }
    }
}

/// See [`ascend_emulator_resolve`].
#[unsafe(no_mangle)]
unsafe extern "C" fn ascend_emulator_release(held: *const c_void) {
    // SAFETY: made by `Arc::into_raw` above, given back once.
    drop(unsafe { Arc::from_raw(held.cast::<Mapping>()) });
}

struct Context(*mut c_void);

// SAFETY: the emulated HCCL passes boxes of `Send` values.
unsafe impl Send for Context {}

/// Appends `run(context)` to a stream of the thread's device; its result is 0, or the stream's failure.
#[unsafe(no_mangle)]
unsafe extern "C" fn ascend_emulator_submit(
    stream: usize,
    run: unsafe extern "C" fn(*mut c_void) -> i32,
    context: *mut c_void,
) -> i32 {
    let context = Context(context);
    let task = move || {
        let Context(context) = { context };
        // SAFETY: the caller's function with the caller's context, called once.
        unsafe { run(context) }
    };
    match submit(stream, task) {
        Ok(()) => 0,
        Err(refusal) => {
            tell(&refusal.why);
            refusal.code
        }
    }
}
