//! Settings of the NCCL transport.

use std::{path::PathBuf, time::Duration};

use ckpt_core::{Error, ErrorKind, Result};

/// Settings of the NCCL transport. NCCL's own variables (`NCCL_*`) are read by NCCL and never changed here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NcclConfig {
    /// The library to use instead of the first one found: `CKPT_NCCL_LIBRARY`.
    pub library: Option<PathBuf>,
    /// At most so many thread blocks a kernel, which the engine's own kernels then have to spare: `CKPT_NCCL_MAX_CTAS`.
    pub max_ctas: Option<u32>,
    /// After this an abort or a clean end that has not returned is given up: `CKPT_NCCL_ABORT_SECONDS`.
    pub abort_deadline: Duration,
    /// After this a group that NCCL has not launched is a failure. The update's own deadlines are shorter.
    pub launch_deadline: Duration,
}

impl Default for NcclConfig {
    fn default() -> Self {
        Self {
            library: None,
            max_ctas: None,
            abort_deadline: Duration::from_secs(10),
            launch_deadline: Duration::from_secs(60),
        }
    }
}

impl NcclConfig {
    /// The defaults with what the environment says.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let number = |name: &'static str| match variable(name).map(|text| (text.parse::<u32>(), text)) {
            None => Ok(None),
            Some((Ok(value), _)) if value > 0 => Ok(Some(value)),
            Some((_, text)) => Err(Error::new(
                ErrorKind::ConfigInvalid,
                "read the NCCL settings",
                format!("{name}={text} is not a number above 0"),
            )),
        };
        let defaults = Self::default();
        Ok(Self {
            library: variable("CKPT_NCCL_LIBRARY").map(PathBuf::from),
            max_ctas: number("CKPT_NCCL_MAX_CTAS")?,
            abort_deadline: number("CKPT_NCCL_ABORT_SECONDS")?
                .map_or(defaults.abort_deadline, |seconds| Duration::from_secs(seconds.into())),
            ..defaults
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_overrides_defaults_and_nonsense_is_named() {
        let config = NcclConfig::from_variables(|name| match name {
            "CKPT_NCCL_LIBRARY" => Some("/opt/libnccl.so.2".into()),
            "CKPT_NCCL_MAX_CTAS" => Some("4".into()),
            _ => None,
        })
        .unwrap();
        assert_eq!(config.library.as_deref(), Some("/opt/libnccl.so.2".as_ref()));
        assert_eq!(config.max_ctas, Some(4));
        assert_eq!(config.abort_deadline, NcclConfig::default().abort_deadline);
        let error =
            NcclConfig::from_variables(|name| (name == "CKPT_NCCL_ABORT_SECONDS").then(|| "soon".into()))
                .unwrap_err();
        assert!(error.to_string().contains("CKPT_NCCL_ABORT_SECONDS=soon"), "{error}");
    }
}
