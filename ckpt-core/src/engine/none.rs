//! No engine: workers listen by themselves, or there are none.

use std::time::Instant;

use async_trait::async_trait;

use super::{Engine, EngineRequest};
use crate::error::Result;

/// Always ready; there is nobody to tell.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoEngine;

#[async_trait]
impl Engine for NoEngine {
    fn name(&self) -> &'static str {
        "none"
    }

    async fn ready(&self, _deadline: Instant) -> Result<()> {
        Ok(())
    }

    /// Returns at once; the workers' own answers say when the update is over.
    async fn update(&self, _request: &EngineRequest, _deadline: Instant) -> Result<()> {
        Ok(())
    }
}
