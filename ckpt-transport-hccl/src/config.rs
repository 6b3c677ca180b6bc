//! Where to look for CANN, and how long its calls may take.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use ckpt_core::{Error, ErrorKind, Result};

/// Settings of the Ascend device and transport. HCCL's own variables (`HCCL_*`) are read by HCCL and never changed here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HcclConfig {
    /// `CKPT_ASCEND_LIBRARY_DIR`: the folder of `libascendcl.so` and `libhccl.so`.
    pub folder: Option<PathBuf>,
    /// `HCCL_SO_PATH`, as vLLM's Ascend plugin reads it: the HCCL library alone.
    pub hccl: Option<PathBuf>,
    /// Folders looked at where nothing was chosen.
    pub folders: Vec<PathBuf>,
    /// Memory of HCCL's own on the device, for each direction of each group; HCCL's default is 200 MiB:
    /// `CKPT_HCCL_BUFFER_MIB`.
    pub buffer_mib: Option<u32>,
    /// After this the end of a group that has not returned is given up: `CKPT_HCCL_ABORT_SECONDS`.
    pub abort_deadline: Duration,
    /// After this a call that HCCL has not put on the stream is a failure. The update's own deadlines are shorter.
    pub launch_deadline: Duration,
    /// HCCL gives a group up that is not complete after this, `HCCL_CONNECT_TIMEOUT` and its own 20 s: until then such a
    /// group holds its thread and ports.
    pub connect_limit: Duration,
}

impl Default for HcclConfig {
    fn default() -> Self {
        Self {
            folder: None,
            hccl: None,
            folders: Vec::new(),
            buffer_mib: None,
            abort_deadline: Duration::from_secs(10),
            launch_deadline: Duration::from_secs(60),
            connect_limit: Duration::from_secs(150),
        }
    }
}

impl HcclConfig {
    /// From environment variables.
    pub fn from_env(env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let path = |name: &str| env(name).filter(|path| !path.is_empty()).map(PathBuf::from);
        let number = |name: &'static str| match env(name).filter(|text| !text.is_empty()) {
            None => Ok(None),
            Some(text) => match text.trim().parse::<u32>() {
                Ok(value) if value > 0 => Ok(Some(value)),
                _ => Err(Error::new(
                    ErrorKind::ConfigInvalid,
                    "read the HCCL settings",
                    format!("{name}={text} is not a number above 0"),
                )),
            },
        };
        let defaults = Self::default();
        let seconds = |name, default: Duration| {
            Ok::<_, Error>(number(name)?.map_or(default, |n| Duration::from_secs(n.into())))
        };
        let installed = [
            "/usr/local/Ascend/ascend-toolkit/latest/lib64",
            "/usr/local/Ascend/latest/lib64",
            "/usr/local/Ascend/driver/lib64",
            "/usr/local/Ascend/driver/lib64/driver",
            "/usr/local/Ascend/driver/lib64/common",
        ];
        let home = path("ASCEND_HOME_PATH").map(|home| home.join("lib64"));
        Ok(Self {
            folder: path("CKPT_ASCEND_LIBRARY_DIR"),
            hccl: path("HCCL_SO_PATH"),
            folders: home.into_iter().chain(installed.iter().map(PathBuf::from)).collect(),
            buffer_mib: number("CKPT_HCCL_BUFFER_MIB")?,
            abort_deadline: seconds("CKPT_HCCL_ABORT_SECONDS", defaults.abort_deadline)?,
            connect_limit: seconds("HCCL_CONNECT_TIMEOUT", Duration::from_secs(120))?
                + Duration::from_secs(30),
            ..defaults
        })
    }

    /// Devices of this machine: the numbers of `/dev/davinci<N>`.
    pub(crate) fn devices() -> Vec<u32> {
        devices_in(Path::new("/dev"))
    }
}

fn devices_in(folder: &Path) -> Vec<u32> {
    let mut numbers: Vec<u32> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("davinci")?.parse().ok())
        .collect();
    numbers.sort_unstable();
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbered_nodes_are_devices() {
        let dev = tempfile::tempdir().unwrap();
        for name in ["davinci10", "davinci2", "davinci_manager", "null"] {
            std::fs::write(dev.path().join(name), b"").unwrap();
        }
        assert_eq!(devices_in(dev.path()), [2, 10]);
    }

    #[test]
    fn variables_are_read_in_their_order_and_nonsense_is_named() {
        let both = |name: &str| match name {
            "HCCL_SO_PATH" => Some("/opt/hccl/libhccl.so".to_owned()),
            "ASCEND_HOME_PATH" => Some("/opt/cann".to_owned()),
            "HCCL_CONNECT_TIMEOUT" => Some("600".to_owned()),
            _ => None,
        };
        let config = HcclConfig::from_env(&both).unwrap();
        assert_eq!(config.hccl, Some("/opt/hccl/libhccl.so".into()));
        assert_eq!(config.folder, None);
        assert_eq!(config.folders.first(), Some(&"/opt/cann/lib64".into()));
        assert_eq!(config.connect_limit, Duration::from_secs(630));
        let error = HcclConfig::from_env(&|name| (name == "CKPT_HCCL_BUFFER_MIB").then(|| "-1".into()));
        assert!(error.unwrap_err().to_string().contains("CKPT_HCCL_BUFFER_MIB=-1"));
    }
}
