//! vLLM's own weight-transfer API, with this project's backend loaded: init, start, update, finish.

use std::time::Instant;

use async_trait::async_trait;
use reqwest::{StatusCode, Url};
use serde_json::{Value, json};

use super::{Engine, EngineAddress, EngineRequest, PauseMode, client::EngineClient, vllm};
use crate::error::{ErrorKind, Result};

const OPERATION: &str = "update vLLM";

/// A vLLM server that was started with `--weight-transfer-config '{"backend": "ckpt_engine"}'`.
#[derive(Clone, Debug)]
pub struct VllmNativeEngine {
    client: EngineClient,
}

impl VllmNativeEngine {
    /// The server at `address`.
    pub fn new(address: EngineAddress) -> Result<Self> {
        Ok(Self { client: EngineClient::new("vLLM", address)? })
    }

    fn health(&self) -> Url {
        self.client.address().join("/health")
    }

    async fn post(&self, path: &str, body: &Value, deadline: Instant) -> Result<()> {
        let url = self.client.address().join(path);
        let reply = self.client.post(OPERATION, url, body, Some(self.health()), deadline).await?;
        match reply.status {
            status if status.is_success() => Ok(()),
            StatusCode::NOT_FOUND => Err(self.client.error(
                ErrorKind::ConfigInvalid,
                OPERATION,
                format!(
                    "vLLM has no {path} (404): start it with VLLM_SERVER_DEV_MODE=1 in its environment and \
                     --weight-transfer-config '{{\"backend\": \"ckpt_engine\"}}', with the Python package ckpt-engine \
                     installed beside it"
                ),
            )),
            _ => Err(self.client.refused(OPERATION, &reply)),
        }
    }
}

#[async_trait]
impl Engine for VllmNativeEngine {
    fn name(&self) -> &'static str {
        "vllm-native"
    }

    async fn ready(&self, deadline: Instant) -> Result<()> {
        self.client.wait_ready(self.health(), deadline, |status| status.is_success()).await
    }

    /// The workers take the weights during `/update_weights`; what compiles or repacks them runs in
    /// `/finish_weight_update`.
    async fn update(&self, request: &EngineRequest, deadline: Instant) -> Result<()> {
        let version = request.version.to_string();
        let update = json!({ "update_info": { "endpoints": request.endpoints } });
        self.post("/init_weight_transfer_engine", &json!({ "init_info": {} }), deadline).await?;
        self.post("/start_weight_update", &json!({}), deadline).await?;
        self.post("/update_weights", &update, deadline).await?;
        self.post("/finish_weight_update", &json!({ "weight_version": version }), deadline).await
    }
    async fn pause(&self, mode: PauseMode, deadline: Instant) -> Result<bool> {
        vllm::pause(&self.client, mode, deadline).await
    }

    async fn resume(&self, deadline: Instant) -> Result<()> {
        vllm::resume(&self.client, deadline).await
    }
}
