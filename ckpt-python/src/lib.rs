//! The native half of the Python package `ckpt_engine`: parameter server, worker link and tensor stream.
//!
//! Python code decides what a call means (`ckpt-python/python/ckpt_engine`); this half moves bytes. It knows nothing of
//! torch: tensors are addresses with a dtype's name and a shape, and an object that keeps the memory. Nothing here waits
//! with the interpreter's lock held.

mod error;
mod memory;
mod request;
mod runtime;
mod server;
mod stream;
mod worker;

use std::{ffi::OsString, process::ExitCode};

use pyo3::prelude::*;

/// The command line `ckpt`, program name first; its exit code.
#[pyfunction]
fn run_command(py: Python<'_>, arguments: Vec<OsString>) -> u8 {
    let code = py.detach(|| ckpt_cli::run(arguments));
    // The type does not tell its number.
    (0..=u8::MAX).find(|number| ExitCode::from(*number) == code).unwrap_or(1)
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("Error", module.py().get_type::<error::Error>())?;
    module.add_class::<memory::Memory>()?;
    module.add_class::<server::Server>()?;
    module.add_class::<stream::Stream>()?;
    module.add_class::<worker::Worker>()?;
    module.add_function(wrap_pyfunction!(run_command, module)?)
}
