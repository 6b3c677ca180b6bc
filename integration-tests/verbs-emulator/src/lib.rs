//! Test code: the functions of `libibverbs.so.1` that `ckpt` calls, over the memory of one process, and strict. See
//! ../README.md.

// What the functions ask of their callers is what the verbs manual pages ask.
#![allow(clippy::missing_safety_doc)]

mod abi;
mod completion;
mod control;
mod device;
mod memory;
mod queue_pair;
mod request;
mod world;

use std::{ffi::c_int, ptr::null_mut};

use world::{World, world};

/// An error number.
pub(crate) type Errno = c_int;
pub(crate) type Answer<T = ()> = Result<T, Errno>;

/// Runs the body of a function that answers an object, or null with `errno` set.
fn object<T>(body: impl FnOnce(&mut World) -> Answer<*mut T>) -> *mut T {
    body(&mut world()).unwrap_or_else(|errno| {
        // SAFETY: the thread's own variable.
        unsafe { *libc::__errno_location() = errno };
        null_mut()
    })
}

/// Runs the body of a function that answers 0 or an error number.
fn outcome(body: impl FnOnce(&mut World) -> Answer) -> c_int {
    body(&mut world()).err().unwrap_or(0)
}

/// Puts a structure where its address does not change, for the caller and for [`discard`].
fn expose<T>(value: T) -> *mut T {
    Box::into_raw(Box::new(value))
}

/// Ends what [`expose`] made.
///
/// # Safety
/// `address` must come from `expose` with this type, and be ended once.
unsafe fn discard<T>(address: usize) {
    // SAFETY: by this function's contract.
    drop(unsafe { Box::from_raw(address as *mut T) });
}
