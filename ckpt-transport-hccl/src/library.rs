//! HCCL: finding the library and calling it.
//!
//! Signatures and layouts are those of the headers in the wheel torch-npu 2.9.0 (HCCL config version 6), which agree with
//! CANN's open source (hccl 2d9f07df, hcomm 2b912e7d) on everything used here.

use std::{
    ffi::c_char,
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use ckpt_core::{
    Error, ErrorKind, Result,
    transport::library::{LibrarySearch, Opened},
};

use crate::{
    config::HcclConfig,
    device::Acl,
    error::{self, HcclError},
    table::{Handle, function_table, load},
};

/// `HcclRootInfo`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RootInfo(pub(crate) [u8; 4108]);

/// `HcclCommConfig`, version 6. The library reads as much as `version` and `size` say: this prefix is understood by every
/// later one. `HcclCommConfigInit` is an inline function of the header, which [`Self::new`] stands for.
#[repr(C)]
pub(crate) struct CommConfig {
    size: usize,
    magic: u32,
    version: u32,
    reserved: u64,
    buffer_size: u32,
    deterministic: u32,
    name: [u8; 128],
    udi: [u8; 128],
    op_expansion_mode: u32,
    rdma_traffic_class: u32,
    rdma_service_level: u32,
    world_rank: u32,
    job_id: u64,
}

const _: () = assert!(size_of::<RootInfo>() == 4108 && size_of::<CommConfig>() == 312);
const _: () = assert!(
    std::mem::offset_of!(CommConfig, buffer_size) == 24
        && std::mem::offset_of!(CommConfig, name) == 32
        && std::mem::offset_of!(CommConfig, udi) == 160
        && std::mem::offset_of!(CommConfig, op_expansion_mode) == 288
        && std::mem::offset_of!(CommConfig, job_id) == 304
);

impl CommConfig {
    /// "Not set", for the numbers whose zero means something.
    const UNSET: u32 = u32::MAX;

    /// Nothing set but the size of HCCL's own buffers.
    pub(crate) fn new(buffer_mib: Option<u32>) -> Self {
        Self {
            size: size_of::<Self>(),
            magic: 0xf0f0_f0f0,
            version: 6,
            reserved: 0,
            buffer_size: buffer_mib.unwrap_or(Self::UNSET),
            deterministic: Self::UNSET,
            name: [0; 128],
            udi: [0; 128],
            op_expansion_mode: 0,
            rdma_traffic_class: Self::UNSET,
            rdma_service_level: Self::UNSET,
            world_rank: 0,
            job_id: 0,
        }
    }
}

/// `HCCL_DATA_TYPE_UINT8`. Allowed for broadcasts and gathers; not for reductions, which nothing here uses.
pub(crate) const UINT8: i32 = 7;

function_table! {
    /// The HCCL functions in use.
    struct Functions {
        required {
            root_info = "HcclGetRootInfo": fn(*mut RootInfo) -> i32;
            init = "HcclCommInitRootInfoConfig":
                fn(u32, *const RootInfo, u32, *const CommConfig, *mut Handle) -> i32;
            destroy = "HcclCommDestroy": fn(Handle) -> i32;
            broadcast = "HcclBroadcast": fn(u64, u64, i32, u32, Handle, Handle) -> i32;
            all_gather = "HcclAllGather": fn(u64, u64, u64, i32, Handle, Handle) -> i32;
            barrier = "HcclBarrier": fn(Handle, Handle) -> i32;
            async_error = "HcclGetCommAsyncError": fn(Handle, *mut i32) -> i32;
            error_string = "HcclGetErrorString": fn(i32) -> *const c_char;
        }
        optional {
            // The parent is passed by pointer to its handle.
            subgroup = "HcclCreateSubCommConfig":
                fn(*mut Handle, u32, *mut u32, u64, u32, *mut CommConfig, *mut Handle) -> i32;
        }
    }
}

/// A loaded HCCL.
pub(crate) struct Hccl {
    pub(crate) functions: Functions,
    /// Keeps HCCL's messages as well as its own.
    acl: Arc<Acl>,
    path: PathBuf,
}

impl fmt::Debug for Hccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hccl").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Where CANN's libraries are looked for; `chosen` as the user set it.
pub(crate) fn search(
    config: &HcclConfig,
    product: &'static str,
    names: &'static [&'static str],
    chosen: Option<PathBuf>,
) -> LibrarySearch {
    LibrarySearch {
        product,
        names,
        chosen,
        variable: "CKPT_ASCEND_LIBRARY_DIR",
        folders: config.folders.clone(),
        remedy: "install Huawei's CANN toolkit and source its set_env.sh",
    }
}

impl Hccl {
    /// Opens the library, after the ACL runtime. Where it has collectives only, the rest is looked for in `libhcomm.so`.
    pub(crate) fn load(config: &HcclConfig, acl: Arc<Acl>) -> Result<Arc<Self>> {
        let chosen = config.folder.clone().or_else(|| config.hccl.clone());
        let Opened { library, path } = search(config, "CANN's HCCL", &["libhccl.so"], chosen).open(load)?;
        // SAFETY: the signatures are those of hccl.h and hccl_comm.h for these names; `load` never unloads.
        let functions = unsafe { Functions::from_libraries(&[library]) }.or_else(|missing| {
            let lacks = |extra: &str| {
                let message =
                    format!("{} has no `{missing}`{extra}; CANN 8 or newer is needed", path.display());
                Error::new(ErrorKind::Unavailable, "open HCCL", message)
            };
            let beside = config.folder.clone().or_else(|| path.parent().map(Path::to_path_buf));
            let second = search(config, "CANN's HCOMM", &["libhcomm.so"], beside.filter(|p| p.is_dir()));
            let Opened { library: second, .. } =
                second.open(load).map_err(|_| lacks(" and there is no libhcomm.so"))?;
            // SAFETY: as above.
            unsafe { Functions::from_libraries(&[library, second]) }
                .map_err(|_| lacks(", nor has libhcomm.so"))
        })?;
        Ok(Arc::new(Self { functions, acl, path }))
    }

    /// Where it was found.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// `Ok` for success, else the error with HCCL's own words.
    pub(crate) fn check(&self, operation: &'static str, function: &'static str, code: i32) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: returns a static string, or null.
        let words = unsafe { error::text((self.functions.error_string)(code)) };
        // The string only names the code; what happened stands in the runtime's last message.
        let details: Vec<String> = words.into_iter().chain(self.acl.recent_message()).collect();
        let detail = (!details.is_empty()).then(|| details.join("; "));
        Err(HcclError { function, code, detail }.during(operation))
    }
}

/// HCCL, opened at the first use.
#[derive(Debug, Default)]
pub(crate) struct HcclCell(OnceLock<Result<Arc<Hccl>>>);

impl HcclCell {
    /// The library, or why there is none.
    pub(crate) fn hccl(&self, config: &HcclConfig, acl: &Arc<Acl>) -> Result<Arc<Hccl>> {
        self.0.get_or_init(|| Hccl::load(config, acl.clone())).clone()
    }
}
