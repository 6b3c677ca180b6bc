//! Opening `libibverbs.so.1` at run time.

use std::{ffi::OsStr, sync::Arc};

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    transport::library::{LibrarySearch, Opened, loader_reason},
};

use crate::{config::RdmaConfig, sys::Symbols};

/// The opened library: its symbols live as long as this.
pub(crate) struct Api {
    pub(crate) symbols: Symbols,
    /// The file, or the name that the system resolved.
    pub(crate) path: String,
    _library: libloading::Library,
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Api {
    /// Opens the verbs library and looks up all that is used of it.
    pub(crate) fn load(config: &RdmaConfig) -> Result<Arc<Self>> {
        let Opened { library, path } = find_verbs(config)?;
        let symbols = symbols(&library).map_err(|symbol| {
            Error::new(
                ErrorKind::Unavailable,
                "open a native library",
                format!("{symbol} is missing in the verbs library; install rdma-core 22 or newer"),
            )
            .with(Key::Path, path.display())
        })?;
        Ok(Arc::new(Self { symbols, path: path.display().to_string(), _library: library }))
    }
}

fn symbols(library: &libloading::Library) -> Result<Symbols, &'static str> {
    macro_rules! table {
        ($($field:ident),* ; $($newer:ident),* $(,)?) => {
            Symbols { $($field: {
                const NAME: &str = concat!("ibv_", stringify!($field));
                // SAFETY: the field's type is that of the function of this name in verbs.h, whose symbol version
                // IBVERBS_1.1 fixes it. The pointer is used only while `Api` keeps the library open.
                *unsafe { library.get(NAME.as_bytes()) }.map_err(|_| NAME)?
            },)* $($newer: {
                // SAFETY: as above; the type says that it may be missing.
                unsafe { library.get(concat!("ibv_", stringify!($newer)).as_bytes()) }.ok().map(|found| *found)
            },)* }
        };
    }
    Ok(table! {
        get_device_list, free_device_list, get_device_name, open_device, close_device, query_device, query_port,
        alloc_pd, dealloc_pd, reg_mr, dereg_mr, create_comp_channel, destroy_comp_channel, create_cq, destroy_cq,
        get_cq_event, ack_cq_events, create_qp, modify_qp, destroy_qp, get_async_event, ack_async_event; reg_dmabuf_mr,
    })
}

fn find_verbs(config: &RdmaConfig) -> Result<Opened<libloading::Library>> {
    let search = LibrarySearch {
        product: "the verbs library",
        names: &["libibverbs.so.1"],
        chosen: config.verbs.clone(),
        variable: "CKPT_VERBS_LIBRARY",
        folders: Vec::new(),
        remedy: "install rdma-core (Debian and Ubuntu: apt-get install libibverbs1 ibverbs-providers)",
    };
    search.open(|name| open_with(name, "ibv_get_device_list"))
}

/// Opens `name` and checks that it has `symbol`.
pub(crate) fn open_with(name: &OsStr, symbol: &str) -> Result<libloading::Library, String> {
    // SAFETY: loading runs the library's initialisers. The user or the system chose this file as the named library;
    // the initialisers of rdma-core and UCX only set up static data.
    let library = unsafe { libloading::Library::new(name) }.map_err(|error| loader_reason(&error))?;
    // SAFETY: the address is only compared with null by libloading; nothing is called or read through it.
    let present = unsafe { library.get::<*const ()>(symbol.as_bytes()) }.is_ok();
    if present { Ok(library) } else { Err(format!("{symbol} is missing in it")) }
}
