//! What Mooncake's return codes mean.

use std::fmt;

use ckpt_core::{Error, ErrorKind, Key};

use crate::api::status;

/// Stands for the function where the code is the status in which a transfer ended.
pub(crate) const TRANSFER: &str = "transfer";

/// A code that one of Mooncake's functions returned.
///
/// Registering and opening return negative codes, submitting and polling positive ones, with the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MooncakeError {
    /// The function.
    pub function: &'static str,
    /// Its result.
    pub code: i32,
}

impl MooncakeError {
    /// The code's meaning; `unknown` for one that this table lacks.
    pub fn name(&self) -> &'static str {
        if self.function == TRANSFER {
            return status::name(self.code);
        }
        match self.code.unsigned_abs() {
            1 => "invalid argument",
            2 => "too many requests",
            3 => "address not registered",
            4 => "batch busy",
            6 => "device not found",
            7 => "memory already registered",
            8 => "transport not supported",
            101 => "name lookup failed",
            102 => "socket error",
            103 => "malformed JSON",
            104 => "handshake rejected",
            200 => "metadata error",
            201 => "endpoint error",
            202 => "context error",
            300 => "NUMA error",
            301 => "clock error",
            302 => "out of memory",
            303 | 999 => "not supported by this build",
            _ => "unknown",
        }
    }

    fn kind(&self) -> ErrorKind {
        match self.code.unsigned_abs() {
            _ if self.function == TRANSFER => ErrorKind::Backend,
            2 | 302 => ErrorKind::ResourceExhausted,
            6 => ErrorKind::Unavailable,
            8 | 303 | 999 => ErrorKind::Unsupported,
            101 | 102 | 104 | 201 => ErrorKind::PeerLost,
            _ => ErrorKind::Backend,
        }
    }
}

impl fmt::Display for MooncakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mooncake's {} failed: {} ({})", self.function, self.name(), self.code)
    }
}

impl std::error::Error for MooncakeError {}

impl From<MooncakeError> for Error {
    fn from(error: MooncakeError) -> Self {
        Error::new(error.kind(), "call Mooncake", error.to_string()).with(Key::Code, error.code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_signs_of_a_code_mean_the_same() {
        for code in [-7, 7] {
            let error = MooncakeError { function: "registerLocalMemory", code };
            assert_eq!(error.name(), "memory already registered");
            assert_eq!(Error::from(error).get(Key::Code), Some(code.to_string().as_str()));
        }
        let minimum = MooncakeError { function: "openSegment", code: i32::MIN };
        assert_eq!(minimum.name(), "unknown");
        // A transfer's status has numbers of its own.
        let failed = MooncakeError { function: TRANSFER, code: 6 };
        assert_eq!(failed.to_string(), "Mooncake's transfer failed: failed (6)");
    }
}
