//! Opening `libtransfer_engine.so` at run time.

use std::fmt;

use ckpt_core::{
    Error, ErrorKind, Result,
    transport::library::{LibrarySearch, Opened, loader_reason},
};

use crate::config::MooncakeConfig;

const NAMES: &[&str] = &["libtransfer_engine.so"];

/// What the C interface must have at the least; a library without these is not usable.
const SYMBOLS: &[&str] = &["createTransferEngine", "registerLocalMemory", "openSegment", "submitTransfer"];

/// A library that has the C interface.
pub(crate) struct Found(Opened<libloading::Library>);

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mooncake's transfer engine ({})", self.0.path.display())
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
            // its initialisers only set up static data. No symbol is called here.
            let library = unsafe { libloading::Library::new(name) }.map_err(|error| loader_reason(&error))?;
            match SYMBOLS.iter().find(|symbol| !has_symbol(&library, symbol)) {
                None => Ok(library),
                Some(symbol) => Err(format!("it has no C interface: {symbol} is missing")),
            }
        })
        .map(Found)
        .map_err(|error| explain_wheel_without_c_interface(config, error))
}

fn has_symbol(library: &libloading::Library, symbol: &str) -> bool {
    // SAFETY: the address is only compared with null by libloading; nothing is called or read through it.
    unsafe { library.get::<*const ()>(symbol.as_bytes()) }.is_ok()
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
