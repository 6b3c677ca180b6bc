//! Where to look for Mooncake.

use std::path::PathBuf;

use ckpt_core::transport::library::python_package_folders;

use crate::protocol::Settings;

/// Settings of the Mooncake transport.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MooncakeConfig {
    /// `CKPT_MOONCAKE_LIBRARY`: the engine's shared library, or the folder that it lies in.
    pub library: Option<PathBuf>,
    /// Folders of installed Python wheels; `libtransfer_engine.so` lies in them where the wheel has the C interface.
    pub wheels: Vec<PathBuf>,
    /// What decides which of Mooncake's transports is used.
    pub(crate) settings: Settings,
}

impl MooncakeConfig {
    /// From environment variables. Mooncake reads its own (`MC_...`) from the process's environment: pass that.
    pub fn from_env(env: &dyn Fn(&str) -> Option<String>) -> Self {
        Self {
            library: env("CKPT_MOONCAKE_LIBRARY").filter(|path| !path.is_empty()).map(PathBuf::from),
            wheels: python_package_folders("mooncake", env),
            settings: Settings::from_env(env),
        }
    }
}
