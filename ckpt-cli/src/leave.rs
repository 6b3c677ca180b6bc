//! Leaving the process without the destructors of native libraries.
//!
//! CUDA and NCCL have threads of their own. When `exit` runs their destructors beneath those threads the process crashes
//! after its work was done (seen with NCCL 2.28). Everything that is ours has been flushed and joined by then.

#[cfg(target_env = "gnu")]
use std::ffi::{c_int, c_void};

#[cfg(target_env = "gnu")]
unsafe extern "C" {
    fn on_exit(handler: extern "C" fn(c_int, *mut c_void), argument: *mut c_void) -> c_int;
    fn fflush(stream: *mut c_void) -> c_int;
    fn _exit(status: c_int) -> !;
}

/// From now on `exit` ends the process at once, with the status that it was given. Handlers run in the reverse order of
/// their registration, so this must be called last.
#[cfg(target_env = "gnu")]
pub(crate) fn skip_library_destructors() {
    extern "C" fn leave(status: c_int, _argument: *mut c_void) {
        // SAFETY: `fflush(NULL)` flushes the C library's streams (native libraries log there) and takes no memory of ours;
        // `_exit` has no preconditions.
        unsafe {
            fflush(std::ptr::null_mut());
            _exit(status)
        }
    }
    // SAFETY: the handler is a function without state and the argument is not used. A failure leaves `exit` as it was.
    let _ = unsafe { on_exit(leave, std::ptr::null_mut()) };
}

/// Other C libraries have no `on_exit`; there `exit` stays as it is.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn skip_library_destructors() {}
