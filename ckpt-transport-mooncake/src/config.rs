//! Where to look for Mooncake.

use std::path::PathBuf;

use ckpt_core::transport::library::python_package_folders;

/// Settings of the Mooncake transport.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MooncakeConfig {
    /// `CKPT_MOONCAKE_LIBRARY`: the engine's shared library, or the folder that it lies in.
    pub library: Option<PathBuf>,
    /// Folders of installed Python wheels; `libtransfer_engine.so` lies in them where the wheel has the C interface.
    pub wheels: Vec<PathBuf>,
}

impl MooncakeConfig {
    /// From environment variables.
    pub fn from_env(env: &dyn Fn(&str) -> Option<String>) -> Self {
        Self {
            library: env("CKPT_MOONCAKE_LIBRARY").filter(|path| !path.is_empty()).map(PathBuf::from),
            wheels: python_package_folders("mooncake", env),
        }
    }
}
