//! Opening `libibverbs.so.1` at run time.

use ckpt_core::{
    Result,
    transport::library::{LibrarySearch, Opened, loader_reason},
};

use crate::config::RdmaConfig;

/// Opens the verbs library.
pub(crate) fn find_verbs(config: &RdmaConfig) -> Result<Opened<libloading::Library>> {
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
pub(crate) fn open_with(name: &std::ffi::OsStr, symbol: &str) -> Result<libloading::Library, String> {
    // SAFETY: loading runs the library's initialisers. The user or the system chose this file as the named library;
    // the initialisers of rdma-core and UCX only set up static data.
    let library = unsafe { libloading::Library::new(name) }.map_err(|error| loader_reason(&error))?;
    // SAFETY: the address is only compared with null by libloading; nothing is called or read through it.
    let present = unsafe { library.get::<*const ()>(symbol.as_bytes()) }.is_ok();
    if present { Ok(library) } else { Err(format!("{symbol} is missing in it")) }
}
