//! The choice of a worker link by name.

use std::{fmt, path::Path, str::FromStr};

use super::{CheckpointEngineSink, NativeSink, NativeSinkConfig, WeightSink, WireVersion};
use crate::error::{Error, ErrorKind, Result};

/// What workers speak: `ce-0.4`, `ce-0.3` or `native`. There is no negotiation between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerProtocol {
    /// checkpoint-engine's worker, over ZeroMQ.
    CheckpointEngine(WireVersion),
    /// Ours.
    Native,
}

impl WorkerProtocol {
    /// Every name that [`str::parse`] takes.
    pub const NAMES: [&'static str; 3] = ["ce-0.4", "ce-0.3", "native"];

    /// Binds a link for the worker of the device `uuid`; a native one as `native` says. Needs a tokio runtime.
    pub fn bind(
        self,
        runtime_dir: &Path,
        uuid: &str,
        native: NativeSinkConfig,
    ) -> Result<Box<dyn WeightSink>> {
        Ok(match self {
            Self::CheckpointEngine(wire) => Box::new(CheckpointEngineSink::bind(runtime_dir, uuid, wire)?),
            Self::Native => Box::new(NativeSink::bind(runtime_dir, uuid, native)?),
        })
    }
}

impl Default for WorkerProtocol {
    fn default() -> Self {
        Self::CheckpointEngine(WireVersion::Ce04)
    }
}

impl fmt::Display for WorkerProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CheckpointEngine(WireVersion::Ce04) => "ce-0.4",
            Self::CheckpointEngine(WireVersion::Ce03) => "ce-0.3",
            Self::Native => "native",
        })
    }
}

impl FromStr for WorkerProtocol {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "ce-0.4" => Ok(Self::CheckpointEngine(WireVersion::Ce04)),
            "ce-0.3" => Ok(Self::CheckpointEngine(WireVersion::Ce03)),
            "native" => Ok(Self::Native),
            other => Err(Error::new(
                ErrorKind::ConfigInvalid,
                "choose a worker protocol",
                format!("there is no `{other}`; use one of {}", Self::NAMES.join(", ")),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for name in WorkerProtocol::NAMES {
            assert_eq!(name.parse::<WorkerProtocol>().unwrap().to_string(), name);
        }
        assert_eq!(WorkerProtocol::default().to_string(), "ce-0.4");
        let error = "ce-0.5".parse::<WorkerProtocol>().unwrap_err();
        assert!(error.to_string().contains("ce-0.4, ce-0.3, native"), "{error}");
    }
}
