//! UCX: looking for `libucp.so.0`.

use std::{ffi::c_uint, fmt, sync::Arc};

use ckpt_core::{
    Result,
    transport::{
        Probe, Transport, TransportConfig, TransportProvider,
        library::{LibrarySearch, Opened, unavailable},
    },
};

use crate::{config::RdmaConfig, library::open_with};

/// Finds UCX.
#[derive(Clone, Debug)]
pub struct UcxProvider {
    config: RdmaConfig,
}

impl UcxProvider {
    /// A provider that looks where `config` says.
    pub fn new(config: RdmaConfig) -> Self {
        Self { config }
    }

    fn reason(&self) -> String {
        match find(&self.config) {
            Ok(opened) => format!(
                "found UCX {} ({}), but this version of ckpt does not drive it; use --transport tcp",
                version(&opened.library),
                opened.path.display()
            ),
            Err(error) => error.message().to_owned(),
        }
    }
}

impl TransportProvider for UcxProvider {
    fn name(&self) -> &'static str {
        "ucx"
    }

    fn probe(&self) -> Probe {
        Probe::Unavailable(self.reason())
    }

    fn open(&self, _config: &TransportConfig) -> Result<Arc<dyn Transport>> {
        Err(unavailable("ucx", self.reason()))
    }
}

struct Version(c_uint, c_uint, c_uint);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

const GET_VERSION: &str = "ucp_get_version";

fn find(config: &RdmaConfig) -> Result<Opened<libloading::Library>> {
    let search = LibrarySearch {
        product: "UCX",
        names: &["libucp.so.0"],
        chosen: config.ucx.clone(),
        variable: "CKPT_UCX_LIBRARY",
        folders: config.ucx_wheels.clone(),
        remedy: "install UCX (Debian and Ubuntu: apt-get install libucx0; pip: libucx-cu12)",
    };
    search.open(|name| open_with(name, GET_VERSION))
}

fn version(library: &libloading::Library) -> Version {
    let mut version = Version(0, 0, 0);
    // SAFETY: the symbol was found by `find`; its type is from ucp.h and has not changed since UCX 1.0. It writes three
    // integers through pointers that are valid for the call.
    unsafe {
        if let Ok(get) =
            library.get::<unsafe extern "C" fn(*mut c_uint, *mut c_uint, *mut c_uint)>(GET_VERSION)
        {
            get(&mut version.0, &mut version.1, &mut version.2);
        }
    }
    version
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_named_with_the_way_to_get_it() {
        let config = RdmaConfig { ucx: Some("/nonexistent/libucp.so.0".into()), ..RdmaConfig::default() };
        let Probe::Unavailable(why) = UcxProvider::new(config).probe() else {
            panic!("found nothing's library")
        };
        assert!(why.contains("tried /nonexistent/libucp.so.0") && why.contains("CKPT_UCX_LIBRARY"), "{why}");
    }
}
