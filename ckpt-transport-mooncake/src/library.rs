//! Opening `libtransfer_engine.so` at run time.

use std::{fmt, path::PathBuf};

use ckpt_core::{
    Error, ErrorKind, Result,
    transport::library::{LibrarySearch, Opened, loader_reason},
};

use crate::{config::MooncakeConfig, native::Native};

const NAMES: &[&str] = &["libtransfer_engine.so"];

/// A library that has the C interface.
pub(crate) struct Found {
    pub(crate) native: Native,
    path: PathBuf,
    /// It uses an NPU unless it is told to use TCP.
    pub(crate) ascend_build: bool,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mooncake's transfer engine ({})", self.path.display())
    }
}

/// Opens the library and checks that it has the C interface.
pub(crate) fn find(config: &MooncakeConfig) -> Result<Found> {
    let search = LibrarySearch {
        product: "Mooncake's transfer engine",
        names: NAMES,
        chosen: config.library.clone(),
        variable: "CKPT_MOONCAKE_LIBRARY",
        folders: config.wheels.iter().cloned().chain(["/usr/local/lib".into()]).collect(),
        remedy: "build Mooncake with its shared C library or pip install mooncake-transfer-engine-npu",
    };
    search
        .open(|name| {
            // SAFETY: loading runs the library's initialisers. The user or the system chose this file as Mooncake's;
            // its initialisers only set up static data.
            let library = unsafe { libloading::Library::new(name) }.map_err(|error| loader_reason(&error))?;
            // SAFETY: a library with all of these names is Mooncake's.
            unsafe { Native::new(library) }
                .map_err(|symbol| format!("it has no C interface: {symbol} is missing"))
        })
        .map(|Opened { library, path }| Found {
            native: library,
            path,
            ascend_build: loaded("ascend_transport"),
        })
        .map_err(|error| explain_wheel_without_c_interface(config, error))
}

/// Whether a library of this name is in the process: the Ascend build brings its transport as a library of its own.
fn loaded(name: &str) -> bool {
    std::fs::read_to_string("/proc/self/maps").unwrap_or_default().contains(name)
}

/// The CUDA and CPU wheels hold only a Python module; whoever installed one would search long for the reason.
fn explain_wheel_without_c_interface(config: &MooncakeConfig, error: Error) -> Error {
    let holds_module = |folder: &&std::path::PathBuf| {
        let mut files = std::fs::read_dir(folder).into_iter().flatten().flatten();
        files.any(|file| file.file_name().to_string_lossy().starts_with("engine"))
    };
    match config.wheels.iter().find(holds_module) {
        Some(folder) => Error::new(
            ErrorKind::Unavailable,
            "open a native library",
            format!("{}; the wheel in {} has no C interface", error.message(), folder.display()),
        ),
        None => error,
    }
}
