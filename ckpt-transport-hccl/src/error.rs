//! What HCCL's and ACL's return codes mean.

use std::fmt;

use ckpt_core::{Error, ErrorKind, Key};

/// A code that an HCCL function returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HcclError {
    /// The function.
    pub function: &'static str,
    /// Its result.
    pub code: i32,
    /// The library's own last message, where it gave one.
    pub detail: Option<String>,
}

impl HcclError {
    /// The code's name in CANN's headers without its prefix; `UNKNOWN` for one that this table lacks.
    pub const fn name(&self) -> &'static str {
        match self.code {
            0 => "SUCCESS",
            1 => "PARA",
            2 => "PTR",
            3 => "MEMORY",
            4 => "INTERNAL",
            5 => "NOT_SUPPORT",
            6 => "NOT_FOUND",
            7 => "UNAVAIL",
            8 => "SYSCALL",
            9 => "TIMEOUT",
            10 => "OPEN_FILE",
            11 => "TCP_CONNECT",
            12 => "ROCE_CONNECT",
            13 => "TCP_TRANSFER",
            14 => "ROCE_TRANSFER",
            15 => "RUNTIME",
            16 => "DRV",
            17 => "PROFILING",
            18 => "CCE",
            19 => "NETWORK",
            20 => "AGAIN",
            21 => "REMOTE",
            22 => "SUSPENDING",
            23 => "OPRETRY_FAIL",
            24 => "OOM",
            _ => "UNKNOWN",
        }
    }

    const fn kind(&self) -> ErrorKind {
        match self.code {
            3 | 24 => ErrorKind::ResourceExhausted,
            5 => ErrorKind::Unsupported,
            6 | 7 => ErrorKind::Unavailable,
            9 => ErrorKind::Timeout,
            11..=14 | 19 | 21 => ErrorKind::PeerLost,
            _ => ErrorKind::Backend,
        }
    }
}

impl fmt::Display for HcclError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        describe(f, self.function, self.name(), self.code, self.detail.as_deref())
    }
}

impl std::error::Error for HcclError {}

impl From<HcclError> for Error {
    fn from(error: HcclError) -> Self {
        Error::new(error.kind(), "call HCCL", error.to_string()).with(Key::Code, error.code)
    }
}

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
    /// `aclInit` in a process that is initialised already: not an error.
    pub const REPEAT_INITIALIZE: i32 = 100_002;

    /// The code's meaning; `UNKNOWN` for one that this table lacks.
    pub const fn name(&self) -> &'static str {
        match self.code {
            0 => "SUCCESS",
            100_000 => "INVALID_PARAM",
            Self::REPEAT_INITIALIZE => "REPEAT_INITIALIZE",
            100_037 => "REPEAT_FINALIZE",
            200_000 => "BAD_ALLOC",
            500_000 => "INTERNAL_ERROR",
            500_003 => "RT_FAILURE",
            _ => "UNKNOWN",
        }
    }
}

impl fmt::Display for AclError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        describe(f, self.function, self.name(), self.code, self.detail.as_deref())
    }
}

impl std::error::Error for AclError {}

impl From<AclError> for Error {
    fn from(error: AclError) -> Self {
        let kind = if error.code == 200_000 { ErrorKind::ResourceExhausted } else { ErrorKind::Backend };
        Error::new(kind, "call the ACL runtime", error.to_string()).with(Key::Code, error.code)
    }
}

fn describe(
    f: &mut fmt::Formatter<'_>,
    function: &str,
    name: &str,
    code: i32,
    detail: Option<&str>,
) -> fmt::Result {
    write!(f, "{function} failed: {name} ({code})")?;
    detail.map_or(Ok(()), |detail| write!(f, ": {detail}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_keeps_its_name_and_the_librarys_words() {
        let detail = Some("EI0006: connecting timed out".to_owned());
        let error = Error::from(HcclError { function: "HcclBroadcast", code: 9, detail });
        assert_eq!(error.kind(), ErrorKind::Timeout);
        assert_eq!(error.message(), "HcclBroadcast failed: TIMEOUT (9): EI0006: connecting timed out");
        let error = Error::from(AclError { function: "aclrtMalloc", code: 200_000, detail: None });
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
        assert_eq!(error.get(Key::Code), Some("200000"));
    }
}
