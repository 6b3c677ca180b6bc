//! vLLM: the update goes through `collective_rpc` to the checkpoint-engine worker extension.

use std::time::Instant;

use async_trait::async_trait;
use reqwest::{StatusCode, Url};
use serde_json::json;

use super::{Engine, EngineAddress, EngineRequest, PauseMode, client::EngineClient};
use crate::error::{ErrorKind, Result};

const OPERATION: &str = "update vLLM";

/// A vLLM server with the worker extension loaded.
#[derive(Clone, Debug)]
pub struct VllmEngine {
    client: EngineClient,
}

impl VllmEngine {
    /// The server at `address`.
    pub fn new(address: EngineAddress) -> Result<Self> {
        Ok(Self { client: EngineClient::new("vLLM", address)? })
    }

    fn health(&self) -> Url {
        self.client.address().join("/health")
    }
}

#[async_trait]
impl Engine for VllmEngine {
    fn name(&self) -> &'static str {
        "vllm"
    }

    async fn ready(&self, deadline: Instant) -> Result<()> {
        self.client.wait_ready(self.health(), deadline, |status| status.is_success()).await
    }

    async fn update(&self, request: &EngineRequest, deadline: Instant) -> Result<()> {
        let timeout = deadline.saturating_duration_since(Instant::now()).as_secs_f64();
        let body = json!({
            "method": "update_weights_from_ipc",
            "args": [request.endpoints],
            "timeout": timeout,
        });
        let reply = self
            .client
            .post(
                OPERATION,
                self.client.address().join("/collective_rpc"),
                &body,
                Some(self.health()),
                deadline,
            )
            .await?;
        match reply.status {
            status if status.is_success() => Ok(()),
            StatusCode::NOT_FOUND => Err(self.client.error(
                ErrorKind::ConfigInvalid,
                OPERATION,
                "vLLM has no /collective_rpc (404): start it with VLLM_SERVER_DEV_MODE=1 in its environment and \
                 --worker-extension-cls checkpoint_engine.worker.VllmColocateWorkerExtension",
            )),
            _ => Err(self.client.refused(OPERATION, &reply)),
        }
    }

    async fn pause(&self, mode: PauseMode, deadline: Instant) -> Result<bool> {
        pause(&self.client, mode, deadline).await
    }

    async fn resume(&self, deadline: Instant) -> Result<()> {
        resume(&self.client, deadline).await
    }
}

/// `false` from a vLLM without its development mode, or older than the call.
pub(super) async fn pause(client: &EngineClient, mode: PauseMode, deadline: Instant) -> Result<bool> {
    let mut url = client.address().join("/pause");
    url.set_query(Some(&format!("mode={}", mode.name())));
    let health = Some(client.address().join("/health"));
    let reply = client.post("pause vLLM", url, &json!({}), health, deadline).await?;
    match reply.status {
        status if status.is_success() => Ok(true),
        StatusCode::NOT_FOUND => Ok(false),
        _ => Err(client.refused("pause vLLM", &reply)),
    }
}

pub(super) async fn resume(client: &EngineClient, deadline: Instant) -> Result<()> {
    // What stands in the cache was computed from the old weights.
    let mut url = client.address().join("/reset_prefix_cache");
    url.set_query(Some("reset_running_requests=true"));
    let health = || Some(client.address().join("/health"));
    let reset = client.post("reset vLLM's cache", url, &json!({}), health(), deadline).await?;
    if !reset.status.is_success() && reset.status != StatusCode::NOT_FOUND {
        return Err(client.refused("reset vLLM's cache", &reset));
    }
    let url = client.address().join("/resume");
    let reply = client.post("resume vLLM", url, &json!({}), health(), deadline).await?;
    if reply.status.is_success() { Ok(()) } else { Err(client.refused("resume vLLM", &reply)) }
}
