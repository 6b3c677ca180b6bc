//! SGLang: it has a route of its own for weights over IPC.

use std::time::Instant;

use async_trait::async_trait;
use reqwest::{StatusCode, Url};
use serde_json::{Value, json};

use super::{Engine, EngineAddress, EngineRequest, PauseMode, client::EngineClient};
use crate::error::{ErrorKind, Result};

const OPERATION: &str = "update SGLang";

/// An SGLang server.
#[derive(Clone, Debug)]
pub struct SglangEngine {
    client: EngineClient,
}

impl SglangEngine {
    /// The server at `address`.
    pub fn new(address: EngineAddress) -> Result<Self> {
        Ok(Self { client: EngineClient::new("SGLang", address)? })
    }

    /// `/ping` answers while the server still waits for its first weights; `/health` does not.
    fn health(&self) -> Url {
        self.client.address().join("/ping")
    }
}

#[async_trait]
impl Engine for SglangEngine {
    fn name(&self) -> &'static str {
        "sglang"
    }

    async fn ready(&self, deadline: Instant) -> Result<()> {
        self.client.wait_ready(self.health(), deadline, |status| status.is_success()).await
    }

    async fn update(&self, request: &EngineRequest, deadline: Instant) -> Result<()> {
        let body = json!({
            "zmq_handles": request.endpoints,
            "flush_cache": true,
            "weight_version": request.version.to_string(),
        });
        let url = self.client.address().join("/update_weights_from_ipc");
        let reply = self.client.post(OPERATION, url, &body, Some(self.health()), deadline).await?;
        let denied = reply.json().is_some_and(|answer| answer.get("success") == Some(&Value::Bool(false)));
        match reply.status {
            status if status.is_success() && !denied => Ok(()),
            StatusCode::NOT_FOUND => Err(self.client.error(
                ErrorKind::ConfigInvalid,
                OPERATION,
                "SGLang has no /update_weights_from_ipc (404): this version takes no weights over IPC; install a newer one",
            )),
            _ => Err(self.client.refused(OPERATION, &reply)),
        }
    }

    /// SGLang cannot wait for requests: they are put back into its queue instead, which loses none either.
    async fn pause(&self, mode: PauseMode, deadline: Instant) -> Result<bool> {
        let mode = match mode {
            // Not `in_place`: an update ends with an emptied cache, which running requests would not allow.
            PauseMode::Keep | PauseMode::Wait => "retract",
            PauseMode::Abort => "abort",
        };
        let url = self.client.address().join("/pause_generation");
        let reply = self
            .client
            .post("pause SGLang", url, &json!({ "mode": mode }), Some(self.health()), deadline)
            .await?;
        match reply.status {
            status if status.is_success() => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            _ => Err(self.client.refused("pause SGLang", &reply)),
        }
    }

    async fn resume(&self, deadline: Instant) -> Result<()> {
        let url = self.client.address().join("/continue_generation");
        let reply = self.client.post("resume SGLang", url, &json!({}), Some(self.health()), deadline).await?;
        if reply.status.is_success() { Ok(()) } else { Err(self.client.refused("resume SGLang", &reply)) }
    }
}
