//! NVIDIA's management library: free memory of a device on which this process has no context.

use std::{
    ffi::{CString, OsStr, c_char},
    sync::OnceLock,
};

use crate::table::{Handle, function_table, load};

/// `nvmlMemory_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RawMemory {
    pub(crate) total: u64,
    pub(crate) free: u64,
    pub(crate) used: u64,
}

const _: () = assert!(size_of::<RawMemory>() == 24);

function_table! {
    /// The functions in use.
    #[derive(Debug)]
    struct Functions {
        required {
            init = "nvmlInit_v2": fn() -> i32;
            by_uuid = "nvmlDeviceGetHandleByUUID": fn(*const c_char, *mut Handle) -> i32;
            memory = "nvmlDeviceGetMemoryInfo": fn(Handle, *mut RawMemory) -> i32;
        }
        optional {}
    }
}

/// The installed library; `None` where there is none.
pub(crate) fn installed() -> Option<&'static Functions> {
    static FUNCTIONS: OnceLock<Option<Functions>> = OnceLock::new();
    let open = || {
        let library = load(OsStr::new("libnvidia-ml.so.1")).ok()?;
        // SAFETY: the signatures are those of nvml.h for these names; `load` never unloads.
        unsafe { Functions::from_library(library) }.ok()
    };
    FUNCTIONS.get_or_init(open).as_ref()
}

impl Functions {
    /// Free memory of the device with this UUID, bytes; `None` if the library does not say.
    pub(crate) fn free_bytes(&self, uuid: &str) -> Option<u64> {
        let uuid = CString::new(uuid).ok()?;
        let (mut device, mut memory) = (0, RawMemory::default());
        // SAFETY: `nvmlInit_v2` takes nothing and counts its calls.
        (unsafe { (self.init)() } == 0).then_some(())?;
        // SAFETY: a terminated string, and room for one handle.
        (unsafe { (self.by_uuid)(uuid.as_ptr(), &mut device) } == 0).then_some(())?;
        // SAFETY: the handle is of this library, and there is room for one struct of its layout.
        (unsafe { (self.memory)(device, &mut memory) } == 0).then_some(memory.free)
    }
}
