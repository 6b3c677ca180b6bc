//! The async runtime behind all calls, and how Python waits for it.

use std::{future::Future, sync::OnceLock, time::Duration};

use ckpt_core::{ErrorKind, Result};
use pyo3::prelude::*;
use tokio::{runtime::Runtime, time::timeout};
use tracing_subscriber::EnvFilter;

use crate::error::to_python;

/// How often a waiting call looks for signals, such as Ctrl-C.
const SIGNALS: Duration = Duration::from_millis(100);
/// How long a call that was interrupted may take to end.
const INTERRUPTED: Duration = Duration::from_secs(5);

/// The process's runtime, made by its first call.
pub(crate) fn runtime() -> Result<&'static Runtime> {
    static RUNTIME: OnceLock<(u32, std::io::Result<Runtime>)> = OnceLock::new();
    let fail = |message: &str| ckpt_core::Error::new(ErrorKind::Backend, "start the engine", message);
    let (pid, runtime) = RUNTIME.get_or_init(|| {
        let filter = EnvFilter::try_from_env("CKPT_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
        // A program that has its own subscriber keeps it.
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
        let built =
            tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("ckpt-engine").build();
        (std::process::id(), built)
    });
    if *pid != std::process::id() {
        // Threads do not survive a fork, so nothing would ever answer.
        return Err(fail(
            "this process was forked after its parent had used ckpt_engine; start processes with `spawn`",
        ));
    }
    runtime.as_ref().map_err(|error| fail("the threads cannot be started").caused_by(error.to_string()))
}

/// Runs `future` to its end while other Python threads go on. A signal handler that raises ends it.
pub(crate) fn wait<T, F>(py: Python<'_>, future: F) -> PyResult<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let runtime = runtime().map_err(|e| to_python(py, &e))?;
    let mut task = runtime.spawn(future);
    loop {
        let waited = py.detach(|| runtime.block_on(async { timeout(SIGNALS, &mut task).await }));
        match waited {
            Ok(Ok(outcome)) => return outcome.map_err(|e| to_python(py, &e)),
            Ok(Err(broken)) => {
                let error =
                    ckpt_core::Error::new(ErrorKind::Internal, "wait for the engine", broken.to_string());
                return Err(to_python(py, &error));
            }
            Err(_) => {
                if let Err(raised) = py.check_signals() {
                    task.abort();
                    // What it says no longer matters.
                    let _ = py.detach(|| runtime.block_on(async { timeout(INTERRUPTED, task).await }));
                    return Err(raised);
                }
            }
        }
    }
}
