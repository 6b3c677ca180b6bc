//! The libraries' result codes as the project's error.

use std::ffi::{CStr, c_char};

use ckpt_core::{Error, ErrorKind, Key, Recovery};

/// CUDA: the operation has not finished (from `cuEventQuery`).
pub(crate) const CUDA_NOT_READY: i32 = 600;
/// CUDA: an argument is out of range, or, from `cuMemHostRegister`, the memory cannot be registered this way.
pub(crate) const CUDA_INVALID_VALUE: i32 = 1;
/// CUDA: the device or driver cannot do this.
pub(crate) const CUDA_NOT_SUPPORTED: i32 = 801;
/// NCCL: a non-blocking call goes on in the background.
pub(crate) const NCCL_IN_PROGRESS: i32 = 7;

/// Copies a C string that a library owns.
///
/// # Safety
/// `text` must be null or a zero-terminated string that stays valid during the call.
pub(crate) unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: not null, and zero-terminated by this function's contract.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// A failed driver call. `name` and `words` are what the driver says about `code`.
pub(crate) fn cuda(operation: &'static str, code: i32, name: &str, words: &str) -> Error {
    let (kind, hint) = match code {
        2 => (ErrorKind::ResourceExhausted, "; free device memory or ask for less"),
        3 | 4 => (ErrorKind::Unavailable, "; the driver is shutting down or was never started"),
        100 | 101 => (ErrorKind::Unavailable, "; check CUDA_VISIBLE_DEVICES and nvidia-smi"),
        712 => (ErrorKind::ConfigInvalid, "; pages of this range are pinned already"),
        801..=803 => (ErrorKind::Unsupported, ""),
        // Everything that breaks the context (700 and its neighbours) breaks every later call as well.
        700 | 702 | 709 | 710 | 714..=719 => {
            (ErrorKind::Backend, "; this process can no longer use the device")
        }
        _ => (ErrorKind::Backend, ""),
    };
    let name = if name.is_empty() { "unknown CUDA result" } else { name };
    let words = if words.is_empty() { "no description" } else { words };
    Error::new(kind, operation, format!("{words}{hint}")).with(Key::Code, format!("{name} ({code})"))
}

/// A failed NCCL call or an asynchronous error. `last` is NCCL's own last message, which often names the peer.
pub(crate) fn nccl(operation: &'static str, code: i32, words: &str, last: &str) -> Error {
    let (kind, name) = match code {
        1 => (ErrorKind::Backend, "ncclUnhandledCudaError"),
        2 => (ErrorKind::PeerLost, "ncclSystemError"),
        3 => (ErrorKind::Backend, "ncclInternalError"),
        4 => (ErrorKind::Internal, "ncclInvalidArgument"),
        5 => (ErrorKind::ConfigInvalid, "ncclInvalidUsage"),
        6 => (ErrorKind::PeerLost, "ncclRemoteError"),
        8 => (ErrorKind::Timeout, "ncclTimeout"),
        _ => (ErrorKind::Backend, "unknown NCCL result"),
    };
    let words = if words.is_empty() { "no description" } else { words };
    let last = last.trim();
    let message =
        if last.is_empty() || last == words { words.to_owned() } else { format!("{words}: {last}") };
    // Whatever happened inside NCCL, a new communicator is what can be tried next.
    Error::new(kind, operation, format!("{message} (NCCL_DEBUG=INFO shows more)"))
        .with(Key::Code, format!("{name} ({code})"))
        .recovery_is(Recovery::Rebuild)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_newer_libraries_are_errors_with_their_number() {
        let error = cuda("copy", 4711, "", "");
        assert_eq!(error.kind(), ErrorKind::Backend);
        assert_eq!(error.get(Key::Code), Some("unknown CUDA result (4711)"));
        let error = nccl("broadcast", 99, "", "");
        assert_eq!(error.get(Key::Code), Some("unknown NCCL result (99)"));
        assert_eq!(error.recovery(), Recovery::Rebuild);
    }

    #[test]
    fn the_kind_says_what_to_do_next() {
        assert_eq!(
            cuda("allocate", 2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory").kind(),
            ErrorKind::ResourceExhausted
        );
        assert_eq!(nccl("join", 6, "remote process exited", "").kind(), ErrorKind::PeerLost);
        let error = nccl("join", 5, "invalid usage", "Duplicate GPU detected : rank 1 and rank 0");
        assert!(error.to_string().contains("Duplicate GPU"), "{error}");
    }
}
