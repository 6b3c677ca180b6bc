//! The engine seam: telling an inference engine that an update begins and where its workers find it.

use std::{collections::BTreeMap, time::Instant};

use async_trait::async_trait;

use crate::{error::Result, types::Version};

/// What an engine is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineRequest {
    /// Worker-link endpoint by device UUID, for the ranks of this engine.
    pub endpoints: BTreeMap<String, String>,
    /// The version that is about to be installed.
    pub version: Version,
}

/// One inference engine (one HTTP server in front of one or more workers).
#[async_trait]
pub trait Engine: Send + Sync {
    /// `vllm`, `sglang`, `http`, `none`.
    fn name(&self) -> &'static str;
    /// Waits until the engine answers that it can be updated.
    async fn ready(&self, deadline: Instant) -> Result<()>;
    /// Tells the engine; returns when the engine says that the whole update is over, so it runs beside the transfer.
    /// An error carries the engine's status and body.
    async fn update(&self, request: &EngineRequest, deadline: Instant) -> Result<()>;
}
