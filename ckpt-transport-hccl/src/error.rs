//! What HCCL's and ACL's return codes mean.

use std::{
    ffi::{CStr, c_char},
    fmt,
};

use ckpt_core::{Error, ErrorKind, Key, Recovery};

/// `aclInit` in a process that is initialised already: not an error.
pub(crate) const ACL_REPEAT_INITIALIZE: i32 = 100_002;

/// Copies a C string that a library owns; `None` for null and for nothing.
///
/// # Safety
/// `text` must be null or a zero-terminated string that stays valid during the call.
pub(crate) unsafe fn text(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: not null, and zero-terminated by this function's contract.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    // CANN's messages have several lines; an error has one.
    let line = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    (!line.is_empty()).then_some(line)
}

/// A code that an HCCL function returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HcclError {
    /// The function.
    pub function: &'static str,
    /// Its result.
    pub code: i32,
    /// The library's own words, where it gave some.
    pub detail: Option<String>,
}

impl HcclError {
    /// The code's name in CANN's headers; `unknown HCCL result` for one that this table lacks.
    pub const fn name(&self) -> &'static str {
        match self.code {
            0 => "HCCL_SUCCESS",
            1 => "HCCL_E_PARA",
            2 => "HCCL_E_PTR",
            3 => "HCCL_E_MEMORY",
            4 => "HCCL_E_INTERNAL",
            5 => "HCCL_E_NOT_SUPPORT",
            6 => "HCCL_E_NOT_FOUND",
            7 => "HCCL_E_UNAVAIL",
            8 => "HCCL_E_SYSCALL",
            9 => "HCCL_E_TIMEOUT",
            10 => "HCCL_E_OPEN_FILE_FAILURE",
            11 => "HCCL_E_TCP_CONNECT",
            12 => "HCCL_E_ROCE_CONNECT",
            13 => "HCCL_E_TCP_TRANSFER",
            14 => "HCCL_E_ROCE_TRANSFER",
            15 => "HCCL_E_RUNTIME",
            16 => "HCCL_E_DRV",
            17 => "HCCL_E_PROFILING",
            18 => "HCCL_E_CCE",
            19 => "HCCL_E_NETWORK",
            20 => "HCCL_E_AGAIN",
            21 => "HCCL_E_REMOTE",
            22 => "HCCL_E_SUSPENDING",
            23 => "HCCL_E_OPRETRY_FAIL",
            24 => "HCCL_E_OOM",
            1041 => "HCCL_E_IN_STATUS",
            _ => "unknown HCCL result",
        }
    }

    const fn kind(&self) -> ErrorKind {
        match self.code {
            1 | 2 => ErrorKind::Internal,
            3 | 24 => ErrorKind::ResourceExhausted,
            5 => ErrorKind::Unsupported,
            6 | 7 => ErrorKind::Unavailable,
            9 => ErrorKind::Timeout,
            11..=14 | 19 | 21 => ErrorKind::PeerLost,
            _ => ErrorKind::Backend,
        }
    }

    /// As the project's error. Whatever happened inside HCCL, a new group is what can be tried next.
    pub(crate) fn during(self, operation: &'static str) -> Error {
        let hint = match self.code {
            9 | 11 | 19 => "; check the HCCL_* variables with `ckpt doctor`",
            _ => "",
        };
        Error::new(self.kind(), operation, format!("{self}{hint}"))
            .with(Key::Code, format!("{} ({})", self.name(), self.code))
            .recovery_is(Recovery::Rebuild)
    }
}

impl fmt::Display for HcclError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        describe(f, self.function, self.name(), self.detail.as_deref())
    }
}

impl std::error::Error for HcclError {}

/// A code that an ACL runtime function returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AclError {
    /// The function.
    pub function: &'static str,
    /// Its result.
    pub code: i32,
    /// The library's own last message, where it gave one.
    pub detail: Option<String>,
}

impl AclError {
    /// The code's name in CANN's headers; `unknown ACL result` for one that this table lacks.
    pub const fn name(&self) -> &'static str {
        match self.code {
            0 => "ACL_SUCCESS",
            100_000 => "ACL_ERROR_INVALID_PARAM",
            ACL_REPEAT_INITIALIZE => "ACL_ERROR_REPEAT_INITIALIZE",
            100_037 => "ACL_ERROR_REPEAT_FINALIZE",
            107_000 => "ACL_ERROR_RT_PARAM_INVALID",
            107_001 => "ACL_ERROR_RT_INVALID_DEVICEID",
            107_002 => "ACL_ERROR_RT_CONTEXT_NULL",
            107_003 => "ACL_ERROR_RT_STREAM_CONTEXT",
            107_017 => "ACL_ERROR_RT_INVALID_HANDLE",
            107_019 => "ACL_ERROR_RT_WAIT_TIMEOUT",
            107_020 => "ACL_ERROR_RT_TASK_TIMEOUT",
            107_022 => "ACL_ERROR_RT_DEVICE_TASK_ABORT",
            107_023 => "ACL_ERROR_RT_STREAM_ABORT",
            200_000 => "ACL_ERROR_BAD_ALLOC",
            207_000 => "ACL_ERROR_RT_FEATURE_NOT_SUPPORT",
            207_001 => "ACL_ERROR_RT_MEMORY_ALLOCATION",
            207_002 => "ACL_ERROR_RT_MEMORY_FREE",
            207_004 => "ACL_ERROR_RT_NO_DEVICE",
            207_005 => "ACL_ERROR_RT_RESOURCE_ALLOC_FAIL",
            207_006 => "ACL_ERROR_RT_NO_PERMISSION",
            207_007 => "ACL_ERROR_RT_NO_EVENT_RESOURCE",
            207_008 => "ACL_ERROR_RT_NO_STREAM_RESOURCE",
            207_018 => "ACL_ERROR_RT_DEVICE_OOM",
            500_000 => "ACL_ERROR_INTERNAL_ERROR",
            500_003 => "ACL_ERROR_RT_FAILURE",
            507_000 => "ACL_ERROR_RT_INTERNAL_ERROR",
            507_004 => "ACL_ERROR_RT_STREAM_NOT_COMPLETE",
            507_010 => "ACL_ERROR_RT_LOST_HEARTBEAT",
            507_014 => "ACL_ERROR_RT_AICORE_TIMEOUT",
            507_015 => "ACL_ERROR_RT_AICORE_EXCEPTION",
            507_022 => "ACL_ERROR_RT_IPC_ERROR",
            507_899 => "ACL_ERROR_RT_DRV_INTERNAL_ERROR",
            _ => "unknown ACL result",
        }
    }

    /// As the project's error.
    pub(crate) fn during(self, operation: &'static str) -> Error {
        let (kind, hint) = match self.code {
            107_000 | 107_002 | 107_003 | 107_017 => (ErrorKind::Internal, ""),
            107_001 | 207_004 => {
                (ErrorKind::Unavailable, "; check ASCEND_RT_VISIBLE_DEVICES and `npu-smi info`")
            }
            200_000 | 207_001 | 207_018 => {
                (ErrorKind::ResourceExhausted, "; free device memory or ask for less")
            }
            207_005 | 207_007 | 207_008 => (ErrorKind::ResourceExhausted, ""),
            207_000 => (ErrorKind::Unsupported, ""),
            507_899 if self.function.starts_with("aclrtIpcMem") => (
                ErrorKind::ResourceExhausted,
                "; keys that crashed processes left behind may have used them up: restart what holds the NPU",
            ),
            _ => (ErrorKind::Backend, ""),
        };
        Error::new(kind, operation, format!("{self}{hint}"))
            .with(Key::Code, format!("{} ({})", self.name(), self.code))
    }
}

impl fmt::Display for AclError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        describe(f, self.function, self.name(), self.detail.as_deref())
    }
}

impl std::error::Error for AclError {}

fn describe(f: &mut fmt::Formatter<'_>, function: &str, name: &str, detail: Option<&str>) -> fmt::Result {
    write!(f, "{function} returned {name}")?;
    detail.map_or(Ok(()), |detail| write!(f, ": {detail}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_keeps_its_name_and_the_librarys_words() {
        let detail = Some("EI0006: connecting timed out".to_owned());
        let error = HcclError { function: "HcclBroadcast", code: 9, detail }.during("broadcast");
        assert_eq!((error.kind(), error.recovery()), (ErrorKind::Timeout, Recovery::Rebuild));
        let text = error.to_string();
        assert!(text.starts_with("broadcast: HcclBroadcast returned HCCL_E_TIMEOUT: EI0006:"), "{text}");
        assert!(text.ends_with("[code=HCCL_E_TIMEOUT (9)]"), "{text}");
        let error = AclError { function: "aclrtMalloc", code: 207_001, detail: None }.during("allocate");
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
        assert_eq!(error.get(Key::Code), Some("ACL_ERROR_RT_MEMORY_ALLOCATION (207001)"));
    }

    #[test]
    fn codes_of_newer_libraries_are_errors_with_their_number() {
        let error = HcclError { function: "HcclBarrier", code: 4711, detail: None }.during("x");
        assert_eq!(error.get(Key::Code), Some("unknown HCCL result (4711)"));
        assert_eq!(error.kind(), ErrorKind::Backend);
    }

    #[test]
    fn messages_of_many_lines_become_one() {
        // SAFETY: a zero-terminated literal.
        let line = unsafe { text(c"[PID: 7]\n  EE1001: bad argument\n\n".as_ptr()) };
        assert_eq!(line.as_deref(), Some("[PID: 7]; EE1001: bad argument"));
        // SAFETY: null is allowed.
        assert_eq!(unsafe { text(std::ptr::null()) }, None);
    }
}
