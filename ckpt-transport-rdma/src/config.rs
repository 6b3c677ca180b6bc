//! Where to look for verbs and UCX.

use std::path::PathBuf;

use ckpt_core::transport::library::python_package_folders;

/// Settings of the RDMA transports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RdmaConfig {
    /// `CKPT_VERBS_LIBRARY`: `libibverbs.so.1`, or the folder that it lies in.
    pub verbs: Option<PathBuf>,
    /// `CKPT_UCX_LIBRARY`: `libucp.so.0`, or the folder that it lies in.
    pub ucx: Option<PathBuf>,
    /// Folders of the Python wheels that ship UCX.
    pub ucx_wheels: Vec<PathBuf>,
}

impl RdmaConfig {
    /// From environment variables.
    pub fn from_env(env: &dyn Fn(&str) -> Option<String>) -> Self {
        let path = |name: &str| env(name).filter(|path| !path.is_empty()).map(PathBuf::from);
        Self {
            verbs: path("CKPT_VERBS_LIBRARY"),
            ucx: path("CKPT_UCX_LIBRARY"),
            ucx_wheels: python_package_folders("libucx/lib", env),
        }
    }
}
