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

use pyo3::prelude::*;
use tracing_subscriber::EnvFilter;

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let filter = EnvFilter::try_from_env("CKPT_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    // A program that has its own subscriber keeps it.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("Error", module.py().get_type::<error::Error>())?;
    module.add_class::<memory::Memory>()?;
    module.add_class::<server::Server>()?;
    module.add_class::<stream::Stream>()?;
    module.add_class::<worker::Worker>()?;
    Ok(())
}
