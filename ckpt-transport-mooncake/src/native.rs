//! The library's function table.
//!
//! Written by hand from `mooncake-transfer-engine/include/transfer_engine_c.h` of kvcache-ai/Mooncake at commit
//! 3b5a594133958449a1feaf1c9e0fc1b553e34a28 (2026-08-22), and run against the library of the PyPI wheel
//! `mooncake-transfer-engine-npu` 0.3.13.post1. To renew: compare each signature below with the header's declaration of
//! that name, and `transfer_request` and `transfer_status` with [`Request`] and [`RawStatus`].

use std::{
    ffi::{CString, c_char, c_int, c_void},
    ptr::null_mut,
};

use libloading::Library;

use crate::api::{Api, Handle, Request};

type Engine = *mut c_void;

/// `transfer_status`.
#[repr(C)]
#[derive(Default)]
struct RawStatus {
    status: c_int,
    transferred_bytes: u64,
}

macro_rules! table {
    ($($name:ident: $symbol:literal fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// The functions, all found.
        pub(crate) struct Native {
            $($name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl Native {
            /// Finds all functions, or names the first that is missing. The library stays loaded for ever: its threads
            /// and its exit handlers outlive any engine.
            ///
            /// # Safety
            /// `library` must be Mooncake's: the functions must have the types of its header.
            pub(crate) unsafe fn new(library: Library) -> Result<Self, &'static str> {
                let table = Self {
                    $($name: {
                        // SAFETY: the caller says that the library is Mooncake's; the type is that of its header.
                        let symbol = unsafe { library.get(concat!($symbol, "\0").as_bytes()) };
                        *symbol.map_err(|_| $symbol)?
                    },)*
                };
                std::mem::forget(library);
                Ok(table)
            }
        }
    };
}

table! {
    create: "createTransferEngine" fn(*const c_char, *const c_char, *const c_char, u64, c_int) -> Engine;
    discover: "discoverTopology" fn(Engine) -> c_int;
    address: "getLocalIpAndPort" fn(Engine, *mut c_char, usize) -> c_int;
    install: "installTransport" fn(Engine, *const c_char, *mut *mut c_void) -> *mut c_void;
    open: "openSegment" fn(Engine, *const c_char) -> i32;
    open_again: "openSegmentNoCache" fn(Engine, *const c_char) -> i32;
    destroy: "destroyTransferEngine" fn(Engine);
    register: "registerLocalMemory" fn(Engine, *mut c_void, usize, *const c_char, c_int) -> c_int;
    unregister: "unregisterLocalMemory" fn(Engine, *mut c_void) -> c_int;
    allocate: "allocateBatchID" fn(Engine, usize) -> u64;
    submit: "submitTransfer" fn(Engine, u64, *mut Request, usize) -> c_int;
    status: "getTransferStatus" fn(Engine, u64, usize, *mut RawStatus) -> c_int;
    free: "freeBatchID" fn(Engine, u64) -> c_int;
}

/// No metadata server: peers ask each other.
const HANDSHAKE: &std::ffi::CStr = c"P2PHANDSHAKE";
/// "Find out": Mooncake asks the system where the memory is.
const ANYWHERE: &std::ffi::CStr = c"*";
/// The code that Mooncake itself gives to such an argument.
const INVALID_ARGUMENT: i32 = -1;

fn pointer(engine: Handle) -> Engine {
    engine.0 as Engine
}

// What each call needs is said at the trait; `Engine` and `Batch` of this crate keep it. Strings live until the call has
// returned, and Mooncake copies them.
impl Api for Native {
    fn create(&self, host: &str) -> Option<Handle> {
        let host = CString::new(host).ok()?;
        // SAFETY: the three strings end with a zero. Port and automatic choice are off: the mode picks a free port, and
        // `install` says which transport.
        let engine = unsafe { (self.create)(HANDSHAKE.as_ptr(), host.as_ptr(), host.as_ptr(), 0, 0) };
        (!engine.is_null()).then_some(Handle(engine as usize))
    }

    unsafe fn install(&self, engine: Handle, protocol: &str, nics: Option<&str>) -> bool {
        let (Ok(protocol), Ok(nics)) = (CString::new(protocol), nics.map(CString::new).transpose()) else {
            return false;
        };
        let mut arguments = [nics.as_ref().map_or(null_mut(), |n| n.as_ptr() as *mut c_void), null_mut()];
        if nics.is_none() {
            // Finds the NICs by itself; tells nothing of use, and no NIC is an error of the next call.
            // SAFETY: the engine is alive, as the caller promises.
            unsafe { (self.discover)(pointer(engine)) };
        }
        // SAFETY: the engine is alive, as the caller promises; `arguments` holds a zero-ended string or null.
        !unsafe { (self.install)(pointer(engine), protocol.as_ptr(), arguments.as_mut_ptr()) }.is_null()
    }

    unsafe fn address(&self, engine: Handle) -> String {
        let mut text = [0_u8; 256];
        // SAFETY: the engine is alive, as the caller promises; the call writes at most `len`, zero-ended.
        unsafe { (self.address)(pointer(engine), text.as_mut_ptr().cast(), text.len()) };
        let len = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
        String::from_utf8_lossy(&text[..len]).into_owned()
    }

    unsafe fn register(&self, engine: Handle, address: u64, len_bytes: u64, remote: bool) -> i32 {
        let (address, len, remote) = (address as *mut c_void, len_bytes as usize, c_int::from(remote));
        // SAFETY: engine alive and range mapped, as the caller promises.
        unsafe { (self.register)(pointer(engine), address, len, ANYWHERE.as_ptr(), remote) }
    }

    unsafe fn unregister(&self, engine: Handle, address: u64) -> i32 {
        // SAFETY: engine alive, as the caller promises; an unknown address is an error code.
        unsafe { (self.unregister)(pointer(engine), address as *mut c_void) }
    }

    unsafe fn open(&self, engine: Handle, peer: &str, refresh: bool) -> i32 {
        let Ok(peer) = CString::new(peer) else { return INVALID_ARGUMENT };
        let open = if refresh { self.open_again } else { self.open };
        // SAFETY: engine alive, as the caller promises.
        unsafe { open(pointer(engine), peer.as_ptr()) }
    }

    unsafe fn allocate(&self, engine: Handle, tasks: usize) -> u64 {
        // SAFETY: engine alive, as the caller promises.
        unsafe { (self.allocate)(pointer(engine), tasks) }
    }

    unsafe fn submit(&self, engine: Handle, batch: u64, requests: &mut [Request]) -> i32 {
        // SAFETY: engine, batch and memory live, as the caller promises; the entries are copied.
        unsafe { (self.submit)(pointer(engine), batch, requests.as_mut_ptr(), requests.len()) }
    }

    unsafe fn status(&self, engine: Handle, batch: u64, task: usize) -> Result<i32, i32> {
        let mut found = RawStatus::default();
        // SAFETY: engine and batch live, as the caller promises.
        match unsafe { (self.status)(pointer(engine), batch, task, &mut found) } {
            0 => Ok(found.status),
            code => Err(code),
        }
    }

    unsafe fn free(&self, engine: Handle, batch: u64) -> i32 {
        // SAFETY: engine and batch live, as the caller promises.
        unsafe { (self.free)(pointer(engine), batch) }
    }

    unsafe fn destroy(&self, engine: Handle) {
        // SAFETY: the caller promises that this is the last call.
        unsafe { (self.destroy)(pointer(engine)) }
    }
}
