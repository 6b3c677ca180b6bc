//! Where to look for CANN.

use std::path::{Path, PathBuf};

/// Settings of the Ascend device and transport.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HcclConfig {
    /// `CKPT_ASCEND_LIBRARY_DIR`: the folder of `libascendcl.so` and `libhccl.so`.
    pub folder: Option<PathBuf>,
    /// `HCCL_SO_PATH`, as vLLM's Ascend plugin reads it: the HCCL library alone.
    pub hccl: Option<PathBuf>,
    /// Folders looked at where nothing was chosen.
    pub folders: Vec<PathBuf>,
}

impl HcclConfig {
    /// From environment variables.
    pub fn from_env(env: &dyn Fn(&str) -> Option<String>) -> Self {
        let path = |name: &str| env(name).filter(|path| !path.is_empty()).map(PathBuf::from);
        let installed = [
            "/usr/local/Ascend/ascend-toolkit/latest/lib64",
            "/usr/local/Ascend/latest/lib64",
            "/usr/local/Ascend/driver/lib64",
            "/usr/local/Ascend/driver/lib64/driver",
            "/usr/local/Ascend/driver/lib64/common",
        ];
        let home = path("ASCEND_HOME_PATH").map(|home| home.join("lib64"));
        Self {
            folder: path("CKPT_ASCEND_LIBRARY_DIR"),
            hccl: path("HCCL_SO_PATH"),
            folders: home.into_iter().chain(installed.iter().map(PathBuf::from)).collect(),
        }
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
}
