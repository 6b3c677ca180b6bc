//! Errors of both languages, each as the other sees them.

use ckpt_core::{ErrorKind, Recovery};
use pyo3::{create_exception, exceptions::PyRuntimeError, prelude::*, types::PyDict};

create_exception!(
    ckpt_engine,
    Error,
    PyRuntimeError,
    "What every call of this package raises when the engine fails: the engine's own words, and the attributes `kind`, \
     `operation`, `message`, `recovery` and `context`."
);

/// The word for a kind, as the command line prints it in JSON.
fn kind_word(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::ConfigInvalid => "config_invalid",
        ErrorKind::Unavailable => "unavailable",
        ErrorKind::Unsupported => "unsupported",
        ErrorKind::Timeout => "timeout",
        ErrorKind::PeerLost => "peer_lost",
        ErrorKind::Aborted => "aborted",
        ErrorKind::ResourceExhausted => "resource_exhausted",
        ErrorKind::Backend => "backend",
        ErrorKind::Corrupt => "corrupt",
        _ => "internal",
    }
}

/// The exception for an error.
pub(crate) fn to_python(py: Python<'_>, error: &ckpt_core::Error) -> PyErr {
    let raised = Error::new_err(error.to_string());
    let fill = || {
        let value = raised.value(py);
        let context = PyDict::new(py);
        for (key, culprit) in error.context() {
            context.set_item(key.as_str(), culprit)?;
        }
        let recovery = match error.recovery() {
            Recovery::Retry => "retry",
            Recovery::Rebuild => "rebuild",
            Recovery::Fatal => "fatal",
        };
        value.setattr("kind", kind_word(error.kind()))?;
        value.setattr("operation", error.operation())?;
        value.setattr("message", error.message())?;
        value.setattr("recovery", recovery)?;
        value.setattr("context", context)
    };
    match fill() {
        Ok(()) => raised,
        Err(error) => error,
    }
}

/// The error for an exception of the caller's code, with its traceback: other ranks and logs get nothing but the text.
pub(crate) fn from_python(py: Python<'_>, operation: &'static str, raised: &PyErr) -> ckpt_core::Error {
    let traceback = || -> PyResult<String> {
        let lines = py.import("traceback")?.call_method1("format_exception", (raised.value(py),))?;
        Ok(lines.extract::<Vec<String>>()?.concat())
    };
    let text = traceback().unwrap_or_else(|_| raised.to_string());
    ckpt_core::Error::new(ErrorKind::Backend, operation, text.trim_end())
}

/// A wrong argument.
pub(crate) fn invalid(operation: &'static str, message: impl Into<String>) -> ckpt_core::Error {
    ckpt_core::Error::new(ErrorKind::ConfigInvalid, operation, message)
}
