//! The engine seam: telling an inference engine that an update begins and where its workers find it.

mod address;
mod client;
mod http;
mod none;
mod sglang;
mod vllm;
mod vllm_native;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Instant};

use async_trait::async_trait;

pub use address::EngineAddress;
pub use http::{HttpEngine, HttpTemplate};
pub use none::NoEngine;
pub use sglang::SglangEngine;
pub use vllm::VllmEngine;
pub use vllm_native::VllmNativeEngine;

use crate::{
    error::{Error, ErrorKind, Result},
    types::Version,
};

/// What an engine is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineRequest {
    /// Worker-link endpoint by device UUID, for the ranks of this engine.
    pub endpoints: BTreeMap<String, String>,
    /// The version that is about to be installed.
    pub version: Version,
}

/// How an engine is kept from generating while its weights change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PauseMode {
    /// Requests under way are kept and go on afterwards, computed anew from their tokens where the engine can do that.
    #[default]
    Keep,
    /// Requests under way are finished first; may take as long as the longest one.
    Wait,
    /// Requests under way are ended.
    Abort,
}

impl PauseMode {
    /// Every mode, by its name on the command line.
    pub const NAMES: &'static [(&'static str, PauseMode)] =
        &[("keep", PauseMode::Keep), ("wait", PauseMode::Wait), ("abort", PauseMode::Abort)];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            PauseMode::Keep => "keep",
            PauseMode::Wait => "wait",
            PauseMode::Abort => "abort",
        }
    }
}

/// One inference engine (one HTTP server in front of one or more workers).
#[async_trait]
pub trait Engine: Send + Sync {
    /// One of [`ENGINES`].
    fn name(&self) -> &'static str;
    /// Waits until the engine answers that it can be updated.
    async fn ready(&self, deadline: Instant) -> Result<()>;
    /// Tells the engine; returns when the engine says that the whole update is over, so it runs beside the transfer.
    /// An error carries the engine's status and body.
    async fn update(&self, request: &EngineRequest, deadline: Instant) -> Result<()>;
    /// Keeps it from generating until [`Engine::resume`]; pausing twice is no error. `false`: it has no such call, which
    /// is what an engine says that does not know better.
    async fn pause(&self, mode: PauseMode, deadline: Instant) -> Result<bool> {
        let _ = (mode, deadline);
        Ok(false)
    }
    /// Lets a paused engine go on, without what it had computed from the old weights.
    async fn resume(&self, deadline: Instant) -> Result<()> {
        let _ = deadline;
        Ok(())
    }
}

/// Which engine, and where.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// One of [`ENGINES`].
    pub kind: String,
    /// `http://host:port`, `https://host:port` or `unix:/path`; for `http` the full URL of the update request.
    pub endpoint: String,
    /// A UNIX socket to connect to instead of the endpoint's host; the endpoint still gives the path.
    pub uds: Option<PathBuf>,
    /// A file with the certificates that an `https://` endpoint is verified with; `None`: those that this system trusts.
    pub ca: Option<PathBuf>,
    /// For `http`: what to send.
    pub template: Option<HttpTemplate>,
}

/// The engines that [`create`] knows.
pub const ENGINES: &[&str] = &["vllm", "vllm-native", "sglang", "http", "none"];

/// Makes the engine of `config`; connects to nothing yet.
pub fn create(config: EngineConfig) -> Result<Arc<dyn Engine>> {
    let invalid = |message: String| Error::new(ErrorKind::ConfigInvalid, "choose an engine", message);
    if config.template.is_some() && config.kind != "http" {
        return Err(invalid(format!("a request template goes with engine http, not with {}", config.kind)));
    }
    let address = || {
        Ok::<_, Error>(
            EngineAddress::parse(&config.endpoint)?
                .over_socket(config.uds.clone())?
                .trusting(config.ca.clone()),
        )
    };
    Ok(match config.kind.as_str() {
        "vllm" => Arc::new(VllmEngine::new(address()?)?),
        "vllm-native" => Arc::new(VllmNativeEngine::new(address()?)?),
        "sglang" => Arc::new(SglangEngine::new(address()?)?),
        "http" => Arc::new(HttpEngine::new(address()?, config.template.unwrap_or_default())?),
        "none" => Arc::new(NoEngine),
        other => {
            return Err(invalid(format!(
                "there is no engine `{other}`; choose one of {}",
                ENGINES.join(", ")
            )));
        }
    })
}
