//! The ACL runtime: its functions, a device that is current on a thread, and what the library says about a failed call.

use std::{
    collections::HashMap,
    ffi::{CStr, c_char},
    fmt,
    marker::PhantomData,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, Weak},
};

use ckpt_core::{Error, ErrorKind, Result, transport::library::Opened};

use crate::{
    config::HcclConfig,
    error::{self, ACL_REPEAT_INITIALIZE, AclError},
    library::search,
    table::{Handle, function_table, load},
};

/// The 65 bytes that name an exported block.
pub(crate) type IpcKey = [u8; 65];

function_table! {
    /// The functions in use, as in acl_rt.h of ACL 1.15 (the wheel torch-npu 2.9.0) and of hicann/runtime 681ef761.
    struct Functions {
        required {
            init = "aclInit": fn(*const c_char) -> i32;
            recent_error = "aclGetRecentErrMsg": fn() -> *const c_char;
            version = "aclrtGetVersion": fn(*mut i32, *mut i32, *mut i32) -> i32;
            soc_name = "aclrtGetSocName": fn() -> *const c_char;
            device_count = "aclrtGetDeviceCount": fn(*mut u32) -> i32;
            device_set = "aclrtSetDevice": fn(i32) -> i32;
            device_get = "aclrtGetDevice": fn(*mut i32) -> i32;
            memory_info = "aclrtGetMemInfo": fn(i32, *mut usize, *mut usize) -> i32;
            memory_alloc = "aclrtMalloc": fn(*mut u64, usize, i32) -> i32;
            memory_free = "aclrtFree": fn(u64) -> i32;
            host_alloc = "aclrtMallocHost": fn(*mut u64, usize) -> i32;
            host_free = "aclrtFreeHost": fn(u64) -> i32;
            ipc_export = "aclrtIpcMemGetExportKey": fn(u64, usize, *mut IpcKey, usize, u64) -> i32;
            ipc_import = "aclrtIpcMemImportByKey": fn(*mut u64, *const IpcKey, u64) -> i32;
            ipc_close = "aclrtIpcMemClose": fn(*const IpcKey) -> i32;
            // Destination, its room, source, bytes, kind, stream.
            copy = "aclrtMemcpyAsync": fn(u64, usize, u64, usize, i32, Handle) -> i32;
            stream_create = "aclrtCreateStream": fn(*mut Handle) -> i32;
            stream_destroy = "aclrtDestroyStream": fn(Handle) -> i32;
            stream_wait = "aclrtStreamWaitEvent": fn(Handle, Handle) -> i32;
            event_create = "aclrtCreateEventWithFlag": fn(*mut Handle, u32) -> i32;
            event_destroy = "aclrtDestroyEvent": fn(Handle) -> i32;
            event_record = "aclrtRecordEvent": fn(Handle, Handle) -> i32;
            event_query = "aclrtQueryEventStatus": fn(Handle, *mut i32) -> i32;
        }
        optional {
            // Its events are not bound to the device's few hardware ones.
            event_create_ex = "aclrtCreateEventExWithFlag": fn(*mut Handle, u32) -> i32;
            physical_id = "aclrtGetPhyDevIdByLogicDevId": fn(i32, *mut i32) -> i32;
        }
    }
}

/// A started ACL runtime.
pub(crate) struct Acl {
    pub(crate) functions: Functions,
    path: PathBuf,
    /// Opened devices by UUID, for the transport, which is given a device behind its seam.
    opened: Mutex<HashMap<String, Weak<Npu>>>,
}

impl fmt::Debug for Acl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acl").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Acl {
    /// Opens `libascendcl.so` and starts the runtime. An error says what is missing.
    pub(crate) fn load(config: &HcclConfig) -> Result<Arc<Self>> {
        let search = search(config, "CANN's ACL runtime", &["libascendcl.so"], config.folder.clone());
        let Opened { library, path } = search.open(load)?;
        // SAFETY: the signatures are those of acl_rt.h for these names; `load` never unloads.
        let functions = unsafe { Functions::from_libraries(&[library]) }.map_err(|symbol| {
            let message = format!("{} has no `{symbol}`; CANN 8.3.RC1 or newer is needed", path.display());
            Error::new(ErrorKind::Unavailable, "open the ACL runtime", message)
        })?;
        let acl = Self { functions, path, opened: Mutex::default() };
        // SAFETY: no configuration; a second call in a process is told so and harms nothing.
        let code = unsafe { (acl.functions.init)(std::ptr::null()) };
        if code != ACL_REPEAT_INITIALIZE {
            acl.check("start the ACL runtime", "aclInit", code)?;
        }
        Ok(Arc::new(acl))
    }

    /// What was found, for people.
    pub(crate) fn describe(&self) -> String {
        let (mut major, mut minor, mut patch) = (0, 0, 0);
        // SAFETY: writes three integers.
        let code = unsafe { (self.functions.version)(&mut major, &mut minor, &mut patch) };
        let version = if code == 0 { format!(" {major}.{minor}.{patch}") } else { String::new() };
        format!("ACL{version} ({})", self.path.display())
    }

    /// How many devices this process may use: the library obeys ASCEND_RT_VISIBLE_DEVICES.
    pub(crate) fn device_count(&self) -> Result<u32> {
        let mut count = 0;
        // SAFETY: writes one integer.
        let code = unsafe { (self.functions.device_count)(&mut count) };
        self.check("count the NPUs", "aclrtGetDeviceCount", code)?;
        Ok(count)
    }

    /// The chip's name, `Ascend910B3`.
    pub(crate) fn soc_name(&self) -> String {
        // SAFETY: returns a static string, or null.
        let name = unsafe { (self.functions.soc_name)() };
        if name.is_null() {
            return "Ascend NPU".to_owned();
        }
        // SAFETY: not null, and zero-terminated.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }

    /// `Ok` for success, else the error with the library's own words.
    pub(crate) fn check(&self, operation: &'static str, function: &'static str, code: i32) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        Err(AclError { function, code, detail: self.recent_message() }.during(operation))
    }

    /// What the libraries last said on this thread; they say it once.
    pub(crate) fn recent_message(&self) -> Option<String> {
        // SAFETY: returns a string that lives until this thread's next call, or null.
        unsafe { error::text((self.functions.recent_error)()) }
    }

    fn opened(&self) -> MutexGuard<'_, HashMap<String, Weak<Npu>>> {
        self.opened.lock().expect("nothing panics while the map is locked")
    }

    pub(crate) fn remember(&self, uuid: &str, npu: &Arc<Npu>) {
        self.opened().insert(uuid.to_owned(), Arc::downgrade(npu));
    }

    /// The opened device with this UUID.
    pub(crate) fn find(&self, uuid: &str) -> Result<Arc<Npu>> {
        self.opened().get(uuid).and_then(Weak::upgrade).ok_or_else(|| {
            let message = format!("no device {uuid} was opened through this registry");
            Error::new(ErrorKind::Internal, "find an NPU", message)
        })
    }
}

/// The runtime, opened at the first use and shared by the device and the transport of one registry.
#[derive(Clone, Debug, Default)]
pub struct AclCell(Arc<OnceLock<Result<Arc<Acl>>>>);

impl AclCell {
    /// The started runtime, or why there is none.
    pub(crate) fn acl(&self, config: &HcclConfig) -> Result<Arc<Acl>> {
        self.0.get_or_init(|| Acl::load(config)).clone()
    }
}

/// One visible device.
#[derive(Debug)]
pub(crate) struct Npu {
    pub(crate) acl: Arc<Acl>,
    /// Its number among the visible ones.
    pub(crate) number: i32,
}

impl Npu {
    /// Makes the device current on this thread until the guard is dropped; another one comes back then.
    pub(crate) fn bind(&self) -> Result<Bound<'_>> {
        let mut current = -1;
        // SAFETY: writes one integer. It fails on a thread that never had a device.
        let code = unsafe { (self.acl.functions.device_get)(&mut current) };
        let before = (code == 0 && current >= 0).then_some(current);
        if before != Some(self.number) {
            // SAFETY: takes a number; the device is left set at the end of the thread, as torch does it.
            let code = unsafe { (self.acl.functions.device_set)(self.number) };
            self.acl.check("make the NPU current", "aclrtSetDevice", code)?;
        }
        let before = before.filter(|device| *device != self.number);
        Ok(Bound { npu: self, before, not_send: PhantomData })
    }

    /// Calls `call`, which is `function`, with the device current.
    pub(crate) fn run(
        &self,
        operation: &'static str,
        function: &'static str,
        call: impl FnOnce(&Functions) -> i32,
    ) -> Result<()> {
        let _bound = self.bind()?;
        self.acl.check(operation, function, call(&self.acl.functions))
    }

    /// The device's number in the host: that of the library, or what ASCEND_RT_VISIBLE_DEVICES says.
    pub(crate) fn physical_id(&self, env: &dyn Fn(&str) -> Option<String>) -> u32 {
        let mut physical = -1;
        if let Some(ask) = self.acl.functions.physical_id {
            // SAFETY: writes one integer.
            let code = unsafe { ask(self.number, &mut physical) };
            if let (0, Ok(physical)) = (code, u32::try_from(physical)) {
                return physical;
            }
        }
        let visible = env("ASCEND_RT_VISIBLE_DEVICES").unwrap_or_default();
        let listed = visible.split(',').nth(self.number as usize).and_then(|n| n.trim().parse().ok());
        listed.unwrap_or(self.number as u32)
    }
}

/// See [`Npu::bind`]. Stays on its thread.
pub(crate) struct Bound<'a> {
    npu: &'a Npu,
    before: Option<i32>,
    not_send: PhantomData<*const ()>,
}

impl Drop for Bound<'_> {
    fn drop(&mut self) {
        let PhantomData = self.not_send;
        if let Some(device) = self.before {
            // SAFETY: takes a number, which was current before. A failure leaves ours current.
            unsafe { (self.npu.acl.functions.device_set)(device) };
        }
    }
}
