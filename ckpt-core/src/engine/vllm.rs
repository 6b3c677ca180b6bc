//! vLLM: the update goes through `collective_rpc` to the checkpoint-engine worker extension.

use std::time::Instant;

use async_trait::async_trait;
use reqwest::StatusCode;
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
}

#[async_trait]
impl Engine for VllmEngine {
    fn name(&self) -> &'static str {
        "vllm"
    }

    async fn ready(&self, deadline: Instant) -> Result<()> {
        self.client
            .wait_ready(self.client.address().join("/health"), deadline, |status| status.is_success())
            .await
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
            .post(OPERATION, self.client.address().join("/collective_rpc"), &body, deadline)
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
        let mut url = self.client.address().join("/pause");
        url.set_query(Some(&format!("mode={}", mode.name())));
        let reply = self.client.post("pause vLLM", url, &json!({}), deadline).await?;
        match reply.status {
            status if status.is_success() => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            _ => Err(self.client.refused("pause vLLM", &reply)),
        }
    }

    async fn resume(&self, deadline: Instant) -> Result<()> {
        // What stands in the cache was computed from the old weights.
        let mut url = self.client.address().join("/reset_prefix_cache");
        url.set_query(Some("reset_running_requests=true"));
        let reset = self.client.post("reset vLLM's cache", url, &json!({}), deadline).await?;
        if !reset.status.is_success() && reset.status != StatusCode::NOT_FOUND {
            return Err(self.client.refused("reset vLLM's cache", &reset));
        }
        let url = self.client.address().join("/resume");
        let reply = self.client.post("resume vLLM", url, &json!({}), deadline).await?;
        if reply.status.is_success() { Ok(()) } else { Err(self.client.refused("resume vLLM", &reply)) }
    }
}
