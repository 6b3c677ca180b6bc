//! The emulated ACL runtime, found where the loader of CANN's own libraries would find it: among the global symbols.

use std::{
    ffi::{c_char, c_void},
    sync::OnceLock,
};

use crate::c_text;

pub(crate) struct Acl {
    device: unsafe extern "C" fn() -> i32,
    injected: unsafe extern "C" fn(*const c_char) -> i32,
    tell: unsafe extern "C" fn(*const c_char),
    resolve: unsafe extern "C" fn(i32, u64, u64, *mut *const c_void) -> usize,
    release: unsafe extern "C" fn(*const c_void),
    submit: unsafe extern "C" fn(usize, unsafe extern "C" fn(*mut c_void) -> i32, *mut c_void) -> i32,
}

/// The runtime, if it is loaded.
pub(crate) fn acl() -> Option<&'static Acl> {
    static ACL: OnceLock<Option<Acl>> = OnceLock::new();
    ACL.get_or_init(find).as_ref()
}

fn find() -> Option<Acl> {
    let all = libloading::os::unix::Library::this();
    // SAFETY: the functions have the types that ../acl/src/shared.rs gives them, and are never unloaded.
    unsafe {
        Some(Acl {
            device: *all.get("ascend_emulator_device").ok()?,
            injected: *all.get("ascend_emulator_injected").ok()?,
            tell: *all.get("ascend_emulator_tell").ok()?,
            resolve: *all.get("ascend_emulator_resolve").ok()?,
            release: *all.get("ascend_emulator_release").ok()?,
            submit: *all.get("ascend_emulator_submit").ok()?,
        })
    }
}

/// A range of device memory as the host sees it.
pub(crate) struct Range {
    pub(crate) at: usize,
    held: *const c_void,
}

impl Drop for Range {
    fn drop(&mut self) {
        if let Some(acl) = acl() {
            // SAFETY: `held` came from `resolve`, and is given back once.
            unsafe { (acl.release)(self.held) };
        }
    }
}

impl Acl {
    pub(crate) fn device(&self) -> i32 {
        // SAFETY: takes nothing.
        unsafe { (self.device)() }
    }

    pub(crate) fn injected(&self, function: &str) -> i32 {
        // SAFETY: a zero-terminated string that lives during the call.
        unsafe { (self.injected)(c_text(function).as_ptr()) }
    }

    pub(crate) fn tell(&self, why: &str) {
        // SAFETY: as above.
        unsafe { (self.tell)(c_text(why).as_ptr()) }
    }

    pub(crate) fn resolve(&self, device: i32, address: u64, bytes: u64) -> Option<Range> {
        let mut held = std::ptr::null();
        // SAFETY: writes one pointer.
        let at = unsafe { (self.resolve)(device, address, bytes, &mut held) };
        (at != 0).then(|| Range { at, held })
    }

    /// Appends `task` to a stream; its result is the stream's failure, or 0.
    pub(crate) fn submit(&self, stream: usize, task: Box<dyn FnOnce() -> i32 + Send>) -> i32 {
        unsafe extern "C" fn run(context: *mut c_void) -> i32 {
            // SAFETY: the box made below, opened once.
            let task = unsafe { Box::from_raw(context.cast::<Box<dyn FnOnce() -> i32 + Send>>()) };
            task()
        }
        let context = Box::into_raw(Box::new(task)).cast();
        // SAFETY: `run` takes what `context` is; a refused submit does not call it.
        let code = unsafe { (self.submit)(stream, run, context) };
        if code != 0 {
            // SAFETY: refused, so nobody else has it.
            drop(unsafe { Box::from_raw(context.cast::<Box<dyn FnOnce() -> i32 + Send>>()) });
        }
        code
    }
}
