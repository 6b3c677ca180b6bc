//! What verbs calls and work completions report.

use std::{fmt, io};

use ckpt_core::{Error, ErrorKind, Key};

/// An error of the verbs library.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VerbsError {
    /// A call failed with an errno.
    Call {
        /// The function.
        function: &'static str,
        /// Its errno.
        errno: i32,
    },
    /// A work request completed with an error status.
    Completion {
        /// `ibv_wc_status`.
        status: u32,
        /// The vendor's own code.
        vendor: u32,
    },
}

impl VerbsError {
    /// The status's name in the verbs headers without its prefix; `UNKNOWN` for one that this table lacks.
    pub const fn status_name(status: u32) -> &'static str {
        const NAMES: [&str; 24] = [
            "SUCCESS",
            "LOC_LEN_ERR",
            "LOC_QP_OP_ERR",
            "LOC_EEC_OP_ERR",
            "LOC_PROT_ERR",
            "WR_FLUSH_ERR",
            "MW_BIND_ERR",
            "BAD_RESP_ERR",
            "LOC_ACCESS_ERR",
            "REM_INV_REQ_ERR",
            "REM_ACCESS_ERR",
            "REM_OP_ERR",
            "RETRY_EXC_ERR",
            "RNR_RETRY_EXC_ERR",
            "LOC_RDD_VIOL_ERR",
            "REM_INV_RD_REQ_ERR",
            "REM_ABORT_ERR",
            "INV_EECN_ERR",
            "INV_EEC_STATE_ERR",
            "FATAL_ERR",
            "RESP_TIMEOUT_ERR",
            "GENERAL_ERR",
            "TM_ERR",
            "TM_RNDV_INCOMPLETE",
        ];
        if (status as usize) < NAMES.len() { NAMES[status as usize] } else { "UNKNOWN" }
    }

    fn kind(&self) -> ErrorKind {
        match self {
            VerbsError::Call { errno, .. } => match io::Error::from_raw_os_error(*errno).kind() {
                io::ErrorKind::OutOfMemory => ErrorKind::ResourceExhausted,
                io::ErrorKind::Unsupported => ErrorKind::Unsupported,
                _ => ErrorKind::Backend,
            },
            // The peer does not answer: retries, receiver-not-ready retries, response timeout, remote abort.
            VerbsError::Completion { status: 12 | 13 | 16 | 20, .. } => ErrorKind::PeerLost,
            // Flushed behind another failure of the same queue pair.
            VerbsError::Completion { status: 5, .. } => ErrorKind::Aborted,
            VerbsError::Completion { .. } => ErrorKind::Backend,
        }
    }
}

impl fmt::Display for VerbsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VerbsError::Call { function, errno } => {
                write!(f, "{function} failed: {}", io::Error::from_raw_os_error(*errno))
            }
            VerbsError::Completion { status, vendor } => {
                let name = Self::status_name(*status);
                write!(f, "a work request failed: {name} ({status}, vendor {vendor:#x})")
            }
        }
    }
}

impl std::error::Error for VerbsError {}

impl From<VerbsError> for Error {
    fn from(error: VerbsError) -> Self {
        let code = match &error {
            VerbsError::Call { errno, .. } => i64::from(*errno),
            VerbsError::Completion { status, .. } => i64::from(*status),
        };
        Error::new(error.kind(), "use verbs", error.to_string()).with(Key::Code, code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_tells_a_dead_peer_from_a_local_mistake() {
        let lost = Error::from(VerbsError::Completion { status: 12, vendor: 0x81 });
        assert_eq!(lost.kind(), ErrorKind::PeerLost);
        assert_eq!(lost.message(), "a work request failed: RETRY_EXC_ERR (12, vendor 0x81)");
        let local = Error::from(VerbsError::Completion { status: 4, vendor: 0 });
        assert_eq!(local.kind(), ErrorKind::Backend);
        assert_eq!(VerbsError::status_name(99), "UNKNOWN");
        let full = Error::from(VerbsError::Call { function: "ibv_reg_mr", errno: 12 });
        assert_eq!(full.kind(), ErrorKind::ResourceExhausted);
    }
}
