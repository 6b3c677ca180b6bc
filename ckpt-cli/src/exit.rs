//! What the exit status says.

use std::process::ExitCode;

use ckpt_core::ErrorKind;

/// Exit codes of every command. `ckpt launch` passes on the code of the first process that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Success = 0,
    /// It was tried and failed: an engine, a worker, a library or the operating system said no.
    Failed = 1,
    /// The command line, a setting or an input is wrong.
    Usage = 2,
    /// Hardware, a library or a service is not there, or cannot do this.
    Unavailable = 3,
    /// A deadline passed, a peer was lost, or another rank's failure ended this one.
    PeerLost = 4,
    /// Memory or another resource ran out.
    Exhausted = 5,
    /// Bytes are not what they must be: a damaged file, a failed verification.
    Corrupt = 6,
    /// A bug in ckpt.
    Bug = 70,
}

/// The same for `--help`.
pub(crate) const HELP: &str = "\
Exit codes:
  0   done
  1   it was tried and failed (engine, worker, library, operating system)
  2   the command line, a setting or an input is wrong
  3   hardware, a library or a service is not there or cannot do this
  4   a deadline passed, a peer was lost, or another rank's failure ended this one
  5   memory or another resource ran out
  6   bytes are not what they must be (damaged file, failed verification)
  70  a bug in ckpt";

impl From<ErrorKind> for Exit {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::ConfigInvalid => Exit::Usage,
            ErrorKind::Unavailable | ErrorKind::Unsupported => Exit::Unavailable,
            ErrorKind::Timeout | ErrorKind::PeerLost | ErrorKind::Aborted => Exit::PeerLost,
            ErrorKind::ResourceExhausted => Exit::Exhausted,
            ErrorKind::Corrupt => Exit::Corrupt,
            ErrorKind::Internal => Exit::Bug,
            _ => Exit::Failed,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_text_documents_every_code() {
        use Exit::*;
        for exit in [Success, Failed, Usage, Unavailable, PeerLost, Exhausted, Corrupt, Bug] {
            let number = (exit as u8).to_string();
            let documented = HELP.lines().any(|line| line.split_whitespace().next() == Some(&number));
            assert!(documented, "exit code {number} ({exit:?}) is missing in the help");
        }
    }
}
