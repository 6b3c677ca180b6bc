//! The CUDA driver: its functions, its primary context, and what it says about a failed call.

use std::{
    ffi::{c_char, c_void},
    fmt,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use ckpt_core::{
    Error, ErrorKind, Result,
    transport::library::{LibrarySearch, Opened},
};

use crate::{
    error,
    table::{Handle, function_table, load},
};

/// `CUipcMemHandle`, passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct IpcHandle(pub(crate) [u8; 64]);

/// `CUmemcpyAttributes`; every copy of a batch uses the one at index 0.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct CopyAttributes {
    /// `CUmemcpySrcAccessOrder`.
    pub(crate) source_order: i32,
    /// Two `CUmemLocation` (kind, id): hints, all zero.
    pub(crate) locations: [i32; 4],
    /// Flags, 0.
    pub(crate) flags: u32,
}

impl CopyAttributes {
    /// The source is read when the stream gets there, not before.
    pub(crate) const STREAM_ORDER: i32 = 1;
}

const _: () = assert!(size_of::<IpcHandle>() == 64 && size_of::<CopyAttributes>() == 24);

function_table! {
    /// The driver functions in use.
    struct Functions {
        required {
            init = "cuInit": fn(u32) -> i32;
            driver_version = "cuDriverGetVersion": fn(*mut i32) -> i32;
            error_name = "cuGetErrorName": fn(i32, *mut *const c_char) -> i32;
            error_string = "cuGetErrorString": fn(i32, *mut *const c_char) -> i32;
            device_count = "cuDeviceGetCount": fn(*mut i32) -> i32;
            device_get = "cuDeviceGet": fn(*mut i32, i32) -> i32;
            device_name = "cuDeviceGetName": fn(*mut c_char, i32, i32) -> i32;
            device_uuid = "cuDeviceGetUuid": fn(*mut [u8; 16], i32) -> i32;
            device_pci = "cuDeviceGetPCIBusId": fn(*mut c_char, i32, i32) -> i32;
            device_attribute = "cuDeviceGetAttribute": fn(*mut i32, i32, i32) -> i32;
            context_retain = "cuDevicePrimaryCtxRetain": fn(*mut Handle, i32) -> i32;
            context_release = "cuDevicePrimaryCtxRelease_v2": fn(i32) -> i32;
            context_push = "cuCtxPushCurrent_v2": fn(Handle) -> i32;
            context_pop = "cuCtxPopCurrent_v2": fn(*mut Handle) -> i32;
            memory_info = "cuMemGetInfo_v2": fn(*mut usize, *mut usize) -> i32;
            memory_alloc = "cuMemAlloc_v2": fn(*mut u64, usize) -> i32;
            memory_free = "cuMemFree_v2": fn(u64) -> i32;
            memory_block = "cuMemGetAddressRange_v2": fn(*mut u64, *mut usize, u64) -> i32;
            host_register = "cuMemHostRegister_v2": fn(usize, usize, u32) -> i32;
            host_unregister = "cuMemHostUnregister": fn(usize) -> i32;
            ipc_export = "cuIpcGetMemHandle": fn(*mut IpcHandle, u64) -> i32;
            ipc_open = "cuIpcOpenMemHandle_v2": fn(*mut u64, IpcHandle, u32) -> i32;
            ipc_close = "cuIpcCloseMemHandle": fn(u64) -> i32;
            copy_any = "cuMemcpyAsync": fn(u64, u64, usize, Handle) -> i32;
            copy_to_device = "cuMemcpyHtoDAsync_v2": fn(u64, u64, usize, Handle) -> i32;
            copy_to_host = "cuMemcpyDtoHAsync_v2": fn(u64, u64, usize, Handle) -> i32;
            copy_on_device = "cuMemcpyDtoDAsync_v2": fn(u64, u64, usize, Handle) -> i32;
            fill = "cuMemsetD8Async": fn(u64, u8, usize, Handle) -> i32;
            stream_create = "cuStreamCreate": fn(*mut Handle, u32) -> i32;
            stream_destroy = "cuStreamDestroy_v2": fn(Handle) -> i32;
            stream_wait = "cuStreamWaitEvent": fn(Handle, Handle, u32) -> i32;
            stream_context = "cuStreamGetCtx": fn(Handle, *mut Handle) -> i32;
            event_create = "cuEventCreate": fn(*mut Handle, u32) -> i32;
            event_destroy = "cuEventDestroy_v2": fn(Handle) -> i32;
            event_record = "cuEventRecord": fn(Handle, Handle) -> i32;
            event_query = "cuEventQuery": fn(Handle) -> i32;
        }
        optional {
            // CUDA 13's form; the one of 12.8 has one more argument and is not used.
            copy_batch = "cuMemcpyBatchAsync_v2":
                fn(*const u64, *const u64, *const usize, usize, *const CopyAttributes, *const usize, usize, Handle) -> i32;
            module_load = "cuModuleLoadData": fn(*mut Handle, *const c_void) -> i32;
            module_unload = "cuModuleUnload": fn(Handle) -> i32;
            module_function = "cuModuleGetFunction": fn(*mut Handle, Handle, *const c_char) -> i32;
            // Function, grid (3), block (3), shared memory, stream, arguments, more.
            launch = "cuLaunchKernel":
                fn(Handle, u32, u32, u32, u32, u32, u32, u32, Handle, *mut *mut c_void, *mut *mut c_void) -> i32;
            dma_buf = "cuMemGetHandleForAddressRange": fn(*mut i32, u64, usize, i32, u64) -> i32;
            flush_writes = "cuFlushGPUDirectRDMAWrites": fn(i32, i32) -> i32;
        }
    }
}

/// A started CUDA driver.
pub struct Driver {
    pub(crate) functions: Functions,
    version: i32,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("cuda", &self.version_text()).finish_non_exhaustive()
    }
}

impl Driver {
    /// Opens `libcuda.so.1` and starts the driver. An error says what is missing.
    pub fn load() -> Result<Arc<Self>> {
        let search = LibrarySearch {
            product: "NVIDIA's CUDA driver",
            names: &["libcuda.so.1", "libcuda.so"],
            chosen: std::env::var_os("CKPT_CUDA_LIBRARY").map(PathBuf::from),
            variable: "CKPT_CUDA_LIBRARY",
            folders: ["/usr/local/nvidia/lib64", "/usr/lib/wsl/lib"].map(PathBuf::from).to_vec(),
            remedy: "install the driver, use --device host",
        };
        let Opened { library, path } = search.open(load)?;
        // SAFETY: the signatures are those of cuda.h for these names; `load` never unloads.
        let functions = unsafe { Functions::from_library(library) }.map_err(|symbol| {
            Error::new(
                ErrorKind::Unavailable,
                "open the CUDA driver",
                format!("{} has no `{symbol}`; CUDA 11.4 or newer is needed", path.display()),
            )
        })?;
        Self::start(functions)
    }

    /// Calls `cuInit` through `functions`.
    pub(crate) fn start(functions: Functions) -> Result<Arc<Self>> {
        let mut driver = Self { functions, version: 0 };
        // SAFETY: `cuInit` takes no pointers and may be called more than once.
        driver.check("start the CUDA driver", unsafe { (driver.functions.init)(0) })?;
        let mut version = 0;
        // SAFETY: writes one i32.
        let code = unsafe { (driver.functions.driver_version)(&mut version) };
        driver.check("read the driver's version", code)?;
        driver.version = version;
        Ok(Arc::new(driver))
    }

    /// The CUDA version of the driver, `12.8`.
    pub fn version_text(&self) -> String {
        format!("{}.{}", self.version / 1000, self.version % 1000 / 10)
    }

    /// How many devices this process may use: CUDA_VISIBLE_DEVICES is obeyed by the driver.
    pub fn device_count(&self) -> Result<u32> {
        let mut count = 0;
        // SAFETY: writes one i32.
        self.check("count the CUDA devices", unsafe { (self.functions.device_count)(&mut count) })?;
        Ok(count.max(0) as u32)
    }

    /// `Ok` for a successful `code`, else the error with the driver's own words.
    pub(crate) fn check(&self, operation: &'static str, code: i32) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let (mut name, mut words) = (std::ptr::null(), std::ptr::null());
        // SAFETY: each call writes one pointer to a static string, or null for an unknown code.
        let (name, words) = unsafe {
            (self.functions.error_name)(code, &mut name);
            (self.functions.error_string)(code, &mut words);
            (error::text(name), error::text(words))
        };
        Err(error::cuda(operation, code, &name, &words))
    }
}

/// The driver, opened at the first use and shared by the device and the transport of one registry.
#[derive(Clone, Debug, Default)]
pub struct DriverCell(Arc<OnceLock<Result<Arc<Driver>>>>);

impl DriverCell {
    /// The started driver, or why there is none.
    pub fn driver(&self) -> Result<Arc<Driver>> {
        self.0.get_or_init(Driver::load).clone()
    }

    /// A cell that holds `driver`.
    pub fn of(driver: Arc<Driver>) -> Self {
        let cell = Self::default();
        // A new cell is empty, so this cannot be refused.
        let _ = cell.0.set(Ok(driver));
        cell
    }
}

/// A device's primary context: the one that CUDA's runtime, torch and NCCL use too.
pub(crate) struct Context {
    pub(crate) driver: Arc<Driver>,
    raw: Handle,
    /// The device to release at the end; `None` for a context that somebody else retains.
    device: Option<i32>,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("device", &self.device).finish_non_exhaustive()
    }
}

impl Context {
    /// Retains the primary context of `device` (a `CUdevice`).
    pub(crate) fn retain(driver: Arc<Driver>, device: i32) -> Result<Arc<Self>> {
        let mut raw = 0;
        // SAFETY: writes one handle.
        let code = unsafe { (driver.functions.context_retain)(&mut raw, device) };
        driver.check("open the device's CUDA context", code)?;
        Ok(Arc::new(Self { driver, raw, device: Some(device) }))
    }

    /// The context of `stream`. The caller keeps whatever retains it alive.
    pub(crate) fn of_stream(driver: Arc<Driver>, stream: Handle) -> Result<Arc<Self>> {
        let mut raw = 0;
        // SAFETY: `stream` is a live stream of the caller; writes one handle.
        let code = unsafe { (driver.functions.stream_context)(stream, &mut raw) };
        driver.check("find the stream's CUDA context", code)?;
        Ok(Arc::new(Self { driver, raw, device: None }))
    }

    /// Makes the context current on this thread until the guard is dropped; the caller's own context comes back then.
    pub(crate) fn bind(&self) -> Result<Bound<'_>> {
        // SAFETY: `raw` is retained for as long as `self` lives.
        let code = unsafe { (self.driver.functions.context_push)(self.raw) };
        self.driver.check("make the CUDA context current", code)?;
        Ok(Bound { context: self, not_send: std::marker::PhantomData })
    }

    /// Calls `call` with the context current.
    pub(crate) fn run(&self, operation: &'static str, call: impl FnOnce(&Functions) -> i32) -> Result<()> {
        let _bound = self.bind()?;
        self.driver.check(operation, call(&self.driver.functions))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if let Some(device) = self.device {
            // SAFETY: retained once by `retain`. A failure means that the driver is gone already.
            unsafe { (self.driver.functions.context_release)(device) };
        }
    }
}

/// See [`Context::bind`]. Stays on its thread.
pub(crate) struct Bound<'a> {
    context: &'a Context,
    not_send: std::marker::PhantomData<*const ()>,
}

impl Drop for Bound<'_> {
    fn drop(&mut self) {
        let mut popped = 0;
        // SAFETY: this thread pushed the context in `bind`; guards are dropped in reverse order.
        unsafe { (self.context.driver.functions.context_pop)(&mut popped) };
    }
}
