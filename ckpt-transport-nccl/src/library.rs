//! NCCL: finding the library and calling it.

use std::{
    ffi::c_char,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use ckpt_core::{
    Error, ErrorKind, Result,
    transport::library::{LibrarySearch, Opened, python_package_folders},
};

use crate::{
    config::NcclConfig,
    error,
    table::{Handle, function_table, load},
};

/// `ncclUniqueId`, passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct UniqueId(pub(crate) [u8; 128]);

/// `ncclConfig_t` of NCCL 2.18. The struct only ever grows, and the library reads as much as `size` says: this prefix
/// is understood by every later version.
#[repr(C)]
pub(crate) struct RawConfig {
    size: usize,
    magic: u32,
    version: u32,
    blocking: i32,
    cga_cluster_size: i32,
    min_ctas: i32,
    max_ctas: i32,
    net_name: *const c_char,
    split_share: i32,
}

const _: () = assert!(size_of::<UniqueId>() == 128 && size_of::<RawConfig>() == 48);
const _: () = assert!(
    std::mem::offset_of!(RawConfig, blocking) == 16 && std::mem::offset_of!(RawConfig, net_name) == 32
);

impl RawConfig {
    /// "Not set", for integers.
    const UNDEFINED: i32 = i32::MIN;

    /// A communicator whose calls return at once.
    pub(crate) fn non_blocking(max_ctas: Option<u32>) -> Self {
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: MINIMUM_VERSION as u32,
            blocking: 0,
            cga_cluster_size: Self::UNDEFINED,
            min_ctas: Self::UNDEFINED,
            max_ctas: max_ctas.and_then(|n| i32::try_from(n).ok()).unwrap_or(Self::UNDEFINED),
            net_name: std::ptr::null(),
            split_share: Self::UNDEFINED,
        }
    }
}

/// NCCL 2.18.0: non-blocking communicators, and the layout of [`RawConfig`].
const MINIMUM_VERSION: i32 = 21800;

/// `ncclUint8`.
pub(crate) const UINT8: i32 = 1;

function_table! {
    /// The NCCL functions in use.
    struct Functions {
        required {
            version = "ncclGetVersion": fn(*mut i32) -> i32;
            unique_id = "ncclGetUniqueId": fn(*mut UniqueId) -> i32;
            init = "ncclCommInitRankConfig": fn(*mut Handle, i32, UniqueId, i32, *mut RawConfig) -> i32;
            finalize = "ncclCommFinalize": fn(Handle) -> i32;
            destroy = "ncclCommDestroy": fn(Handle) -> i32;
            abort = "ncclCommAbort": fn(Handle) -> i32;
            async_error = "ncclCommGetAsyncError": fn(Handle, *mut i32) -> i32;
            error_string = "ncclGetErrorString": fn(i32) -> *const c_char;
            last_error = "ncclGetLastError": fn(Handle) -> *const c_char;
            group_start = "ncclGroupStart": fn() -> i32;
            group_end = "ncclGroupEnd": fn() -> i32;
            broadcast = "ncclBroadcast": fn(u64, u64, usize, i32, i32, Handle, Handle) -> i32;
        }
        optional {}
    }
}

/// A loaded NCCL.
pub(crate) struct Nccl {
    pub(crate) functions: Functions,
    pub(crate) version: i32,
    path: PathBuf,
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nccl")
            .field("version", &self.version_text())
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Nccl {
    /// Opens the library. An error lists every place that was tried.
    pub(crate) fn load(config: &NcclConfig) -> Result<Arc<Self>> {
        let search = |folders| LibrarySearch {
            product: "NCCL",
            names: &["libnccl.so.2", "libnccl.so"],
            chosen: config.library.clone(),
            variable: "CKPT_NCCL_LIBRARY",
            folders,
            remedy: "install it (`pip install nvidia-nccl-cu12` is enough), use --transport tcp",
        };
        // What the loader finds by itself comes first: LD_LIBRARY_PATH is how users choose. Then pip's wheels.
        let by_name = LibrarySearch { names: &["libnccl.so.2"], ..search(Vec::new()) };
        let Opened { library, path } = by_name.open(load).or_else(|_| {
            search(python_package_folders("nvidia/nccl/lib", &|name| std::env::var(name).ok())).open(load)
        })?;
        // SAFETY: the signatures are those of nccl.h for these names; `load` never unloads.
        let functions = unsafe { Functions::from_library(library) }.map_err(|symbol| {
            Error::new(
                ErrorKind::Unavailable,
                "open NCCL",
                format!("{} has no `{symbol}`; NCCL 2.18 or newer is needed", path.display()),
            )
        })?;
        Self::start(functions, path)
    }

    /// Checks the version behind `functions`.
    pub(crate) fn start(functions: Functions, path: PathBuf) -> Result<Arc<Self>> {
        let mut nccl = Self { functions, version: 0, path };
        let mut version = 0;
        // SAFETY: writes one i32.
        nccl.check("read NCCL's version", 0, unsafe { (nccl.functions.version)(&mut version) })?;
        nccl.version = version;
        if version < MINIMUM_VERSION {
            return Err(Error::new(
                ErrorKind::Unavailable,
                "open NCCL",
                format!(
                    "{} is NCCL {}; 2.18 or newer is needed: set CKPT_NCCL_LIBRARY to one",
                    nccl.path.display(),
                    nccl.version_text()
                ),
            ));
        }
        Ok(Arc::new(nccl))
    }

    /// `2.28.9`.
    pub(crate) fn version_text(&self) -> String {
        version_text(self.version)
    }

    /// Where it was found.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// `Ok` for success and "in progress", else the error with NCCL's own words. `communicator` may be 0.
    pub(crate) fn check(&self, operation: &'static str, communicator: Handle, code: i32) -> Result<()> {
        if code == 0 || code == error::NCCL_IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: both return static strings, or a buffer of the library that only its own failing calls change.
        let (words, last) = unsafe {
            (
                error::text((self.functions.error_string)(code)),
                error::text((self.functions.last_error)(communicator)),
            )
        };
        Err(error::nccl(operation, code, &words, &last))
    }
}

/// NCCL's version number as people write it.
pub(crate) fn version_text(version: i32) -> String {
    format!("{}.{}.{}", version / 10000, version % 10000 / 100, version % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_not_nccl_is_named_with_what_it_lacks() {
        let config = NcclConfig { library: Some("libc.so.6".into()), ..NcclConfig::default() };
        let error = Nccl::load(&config).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.to_string().contains("libc.so.6 has no `ncclGetVersion`"), "{error}");
    }

    #[test]
    fn a_missing_library_is_one_line_that_says_where_it_was_looked_for() {
        let config = NcclConfig { library: Some("/nowhere/libnccl.so.2".into()), ..NcclConfig::default() };
        let text = Nccl::load(&config).unwrap_err().to_string();
        assert!(text.contains("/nowhere/libnccl.so.2") && text.contains("CKPT_NCCL_LIBRARY"), "{text}");
        assert!(!text.contains('\n'), "{text}");
    }

    #[test]
    #[ignore = "needs NCCL, no GPU: pip install nvidia-nccl-cu12; cargo test -p ckpt-transport-nccl --lib the_real_nccl -- --ignored"]
    fn the_real_nccl_understands_the_table() {
        let nccl = Nccl::load(&NcclConfig::from_env().unwrap()).unwrap();
        assert!(nccl.version >= MINIMUM_VERSION, "{nccl:?}");
        let mut id = UniqueId([0; 128]);
        // SAFETY: writes 128 bytes.
        nccl.check("make an NCCL unique id", 0, unsafe { (nccl.functions.unique_id)(&mut id) }).unwrap();
        assert_ne!(id.0, [0; 128]);
        if crate::device::Driver::load().is_ok() {
            return;
        }
        // Without a driver the call goes all the way through the config and the id, and fails at CUDA.
        let (mut communicator, mut config) = (0, RawConfig::non_blocking(Some(4)));
        // SAFETY: writes one handle; the config is read during the call.
        let code = unsafe { (nccl.functions.init)(&mut communicator, 1, id, 0, &mut config) };
        let error = nccl.check("join an NCCL group", communicator, code).unwrap_err();
        assert!(error.to_string().contains("ncclUnhandledCudaError"), "{error}");
    }

    #[test]
    fn versions_are_written_as_people_do() {
        assert_eq!(version_text(23203), "2.32.3");
        assert_eq!(version_text(21805), "2.18.5");
    }
}
