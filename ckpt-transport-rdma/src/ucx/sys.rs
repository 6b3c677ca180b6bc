//! The part of `ucp/api/ucp.h` that this crate uses: a table of functions, and mirrors of the structures that go in.
//!
//! UCX reads of a structure only the fields that its mask names, and newer versions add fields behind. So each mirror is
//! longer than the header's structure and zero where nothing is said, and the assertions below hold the fields that are
//! used in their places. Sizes are those of UCX 1.13 and 1.22; nothing else of a version matters here.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    ptr::{null, null_mut},
};

use libloading::Library;

/// `ucs_status_t`: negative is an error.
pub(super) type Status = i8;
/// `ucs_status_ptr_t`: null, an error as a small negative number, or a request.
pub(super) type StatusPtr = *mut c_void;
type Handle = *mut c_void;
type OnError = unsafe extern "C" fn(*mut c_void, Handle, Status);

pub(super) const OK: Status = 0;
pub(super) const IN_PROGRESS: Status = 1;
pub(super) const BUSY: Status = -15;
pub(super) const UNREACHABLE: Status = -6;
const LAST_ERROR: isize = -100;

/// What a call that may take long has answered.
pub(super) enum Started {
    Done,
    Failed(Status),
    Runs(StatusPtr),
}

/// Takes a `ucs_status_ptr_t` apart.
pub(super) fn started(answer: StatusPtr) -> Started {
    match answer as isize {
        0 => Started::Done,
        error if (LAST_ERROR..0).contains(&error) => Started::Failed(error as Status),
        _ => Started::Runs(answer),
    }
}

/// `ucp_params_t`.
#[repr(C)]
pub(super) struct Params {
    field_mask: u64,
    features: u64,
    rest: [u64; 14],
}

/// `ucp_worker_params_t`.
#[repr(C)]
pub(super) struct WorkerParams {
    field_mask: u64,
    thread_mode: c_uint,
    rest: [u64; 28],
}

/// `ucp_ep_params_t`.
#[repr(C)]
pub(super) struct EpParams {
    field_mask: u64,
    address: *const c_void,
    err_mode: c_uint,
    on_error: Option<OnError>,
    on_error_arg: *mut c_void,
    rest: [u64; 12],
}

/// `ucp_mem_map_params_t`.
#[repr(C)]
pub(super) struct MapParams {
    field_mask: u64,
    address: *mut c_void,
    length: usize,
    rest: [u64; 8],
}

/// `ucp_request_param_t`.
#[repr(C)]
pub(super) struct RequestParam {
    mask: u32,
    flags: u32,
    between: [u64; 7],
    memh: Handle,
    rest: [u64; 8],
}

macro_rules! layout {
    ($type:ty: at least $size:literal $(, $field:ident = $offset:literal)*) => {
        const _: () = {
            assert!(size_of::<$type>() >= $size);
            $(assert!(std::mem::offset_of!($type, $field) == $offset);)*
        };
    };
}

// Sizes of UCX 1.22's headers (1.13's are smaller or equal), and offsets that both have.
layout!(Params: at least 88, features = 8);
layout!(WorkerParams: at least 200, thread_mode = 8);
layout!(EpParams: at least 104, address = 8, err_mode = 16, on_error = 24, on_error_arg = 32);
layout!(MapParams: at least 48, address = 8, length = 16);
layout!(RequestParam: at least 96, flags = 4, memh = 64);

impl Params {
    /// One-sided operations, and events to sleep on if `wakeup`.
    pub(super) fn one_sided(wakeup: bool) -> Self {
        let features = 1 << 1 | if wakeup { 1 << 4 } else { 0 };
        Self { field_mask: 1, features, rest: [0; 14] }
    }
}

impl WorkerParams {
    /// One thread makes all calls.
    pub(super) fn one_thread() -> Self {
        Self { field_mask: 1, thread_mode: 0, rest: [0; 28] }
    }
}

impl EpParams {
    /// To the worker at `address`, with failures of the peer told to `on_error` if `watched`.
    pub(super) fn to(address: &[u8], on_error: OnError, arg: *mut c_void, watched: bool) -> Self {
        Self {
            field_mask: 1 | 2 | 4,
            address: address.as_ptr().cast(),
            err_mode: watched.into(),
            on_error: Some(on_error),
            on_error_arg: arg,
            rest: [0; 12],
        }
    }
}

impl MapParams {
    pub(super) fn range(address: u64, length: u64) -> Self {
        Self { field_mask: 1 | 2, address: address as *mut c_void, length: length as usize, rest: [0; 8] }
    }
}

impl RequestParam {
    const fn new(mask: u32, flags: u32, memh: Handle) -> Self {
        Self { mask, flags, between: [0; 7], memh, rest: [0; 8] }
    }

    pub(super) const fn plain() -> Self {
        Self::new(0, 0, null_mut())
    }

    /// This side's memory is mapped as `memh`.
    pub(super) const fn mapped(memh: Handle) -> Self {
        Self::new(1 << 8, 0, memh)
    }

    /// Closes without asking the peer: what runs ends as cancelled.
    pub(super) const fn force() -> Self {
        Self::new(1 << 4, 1, null_mut())
    }
}

macro_rules! table {
    ($($name:ident: $symbol:literal fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// The functions, all found.
        #[derive(Clone, Copy)]
        pub(super) struct Ucp {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl Ucp {
            /// Finds all functions, or names the first that is missing. The library stays loaded for ever: its exit
            /// handlers outlive any worker.
            pub(super) fn new(library: Library) -> Result<Self, &'static str> {
                let table = Self {
                    $($name: {
                        // SAFETY: the library is UCX's, as whoever named it said; the type is that of its header, and
                        // UCX keeps the types of these functions within libucp.so.0.
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
    get_version: "ucp_get_version" fn(*mut c_uint, *mut c_uint, *mut c_uint);
    status_string: "ucs_status_string" fn(Status) -> *const c_char;
    config_read: "ucp_config_read" fn(*const c_char, *const c_char, *mut Handle) -> Status;
    config_modify: "ucp_config_modify" fn(Handle, *const c_char, *const c_char) -> Status;
    config_release: "ucp_config_release" fn(Handle);
    init: "ucp_init_version" fn(c_uint, c_uint, *const Params, Handle, *mut Handle) -> Status;
    cleanup: "ucp_cleanup" fn(Handle);
    worker_create: "ucp_worker_create" fn(Handle, *const WorkerParams, *mut Handle) -> Status;
    worker_destroy: "ucp_worker_destroy" fn(Handle);
    worker_address: "ucp_worker_get_address" fn(Handle, *mut Handle, *mut usize) -> Status;
    release_address: "ucp_worker_release_address" fn(Handle, Handle);
    progress: "ucp_worker_progress" fn(Handle) -> c_uint;
    event_fd: "ucp_worker_get_efd" fn(Handle, *mut c_int) -> Status;
    arm: "ucp_worker_arm" fn(Handle) -> Status;
    ep_create: "ucp_ep_create" fn(Handle, *const EpParams, *mut Handle) -> Status;
    ep_close: "ucp_ep_close_nbx" fn(Handle, *const RequestParam) -> StatusPtr;
    flush: "ucp_ep_flush_nbx" fn(Handle, *const RequestParam) -> StatusPtr;
    map: "ucp_mem_map" fn(Handle, *const MapParams, *mut Handle) -> Status;
    unmap: "ucp_mem_unmap" fn(Handle, Handle) -> Status;
    pack: "ucp_rkey_pack" fn(Handle, Handle, *mut Handle, *mut usize) -> Status;
    release_packed: "ucp_rkey_buffer_release" fn(Handle);
    unpack: "ucp_ep_rkey_unpack" fn(Handle, *const c_void, *mut Handle) -> Status;
    rkey_destroy: "ucp_rkey_destroy" fn(Handle);
    get: "ucp_get_nbx" fn(Handle, *mut c_void, usize, u64, Handle, *const RequestParam) -> StatusPtr;
    put: "ucp_put_nbx" fn(Handle, *const c_void, usize, u64, Handle, *const RequestParam) -> StatusPtr;
    check_request: "ucp_request_check_status" fn(StatusPtr) -> Status;
    free_request: "ucp_request_free" fn(StatusPtr);
}

impl Ucp {
    /// `major.minor.release`.
    pub(super) fn version(&self) -> String {
        let (mut major, mut minor, mut release) = (0, 0, 0);
        // SAFETY: it writes three integers through pointers that are valid for the call.
        unsafe { (self.get_version)(&mut major, &mut minor, &mut release) };
        format!("{major}.{minor}.{release}")
    }

    /// What UCX calls a status.
    pub(super) fn name(&self, status: Status) -> String {
        // SAFETY: the function takes any number and answers a text that is never freed.
        let text = unsafe { (self.status_string)(status) };
        if text.is_null() {
            return format!("status {status}");
        }
        // SAFETY: as above; it ends with a zero.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    /// A context; over loopback only if `local`, whatever UCX would take.
    pub(super) fn context(&self, wakeup: bool, local: bool) -> Result<Handle, Status> {
        let mut config = null_mut();
        // SAFETY: null means "no prefix" and "no file"; the configuration is released below.
        check(unsafe { (self.config_read)(null(), null(), &mut config) })?;
        if local {
            // SAFETY: the configuration lives; both are C strings. A version without the setting ignores it.
            unsafe { (self.config_modify)(config, c"NET_DEVICES".as_ptr(), c"lo".as_ptr()) };
        }
        let (params, mut context) = (Params::one_sided(wakeup), null_mut());
        // The oldest version whose structures these are: a newer library takes them silently.
        // SAFETY: parameters and configuration live for the call.
        let status = unsafe { (self.init)(1, 13, &params, config, &mut context) };
        // SAFETY: the configuration is not used afterwards.
        unsafe { (self.config_release)(config) };
        check(status).map(|()| context)
    }
}

pub(super) fn check(status: Status) -> Result<(), Status> {
    if status == OK { Ok(()) } else { Err(status) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_done_an_error_or_a_request() {
        assert!(matches!(started(null_mut()), Started::Done));
        assert!(matches!(started(-25_isize as StatusPtr), Started::Failed(-25)));
        assert!(matches!(started(-100_isize as StatusPtr), Started::Failed(-100)));
        assert!(matches!(started(0x7f00_0000_1000 as StatusPtr), Started::Runs(_)));
    }
}
