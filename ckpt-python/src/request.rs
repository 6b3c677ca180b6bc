//! The caller's function that tells an engine, as an engine.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use async_trait::async_trait;
use ckpt_core::{
    ErrorKind, Result,
    engine::{Engine, EngineRequest},
};
use pyo3::prelude::*;

use crate::error::from_python;

const OPERATION: &str = "tell the engine";

/// Calls a Python function with `[(device UUID, endpoint), ...]`, one pair a rank of the job.
pub(crate) struct PythonEngine {
    call: Arc<Py<PyAny>>,
    /// All ranks' devices in rank order; without them the pairs come in the order of the UUIDs.
    uuids: Vec<String>,
    /// What the function raised.
    raised: Arc<Mutex<Option<PyErr>>>,
}

impl PythonEngine {
    pub(crate) fn new(call: Py<PyAny>, uuids: Vec<String>) -> Self {
        Self { call: Arc::new(call), uuids, raised: Arc::default() }
    }

    /// Where the exception will be found.
    pub(crate) fn raised(&self) -> Arc<Mutex<Option<PyErr>>> {
        self.raised.clone()
    }
}

#[async_trait]
impl Engine for PythonEngine {
    fn name(&self) -> &'static str {
        "python"
    }

    async fn ready(&self, _deadline: Instant) -> Result<()> {
        Ok(())
    }

    async fn update(&self, request: &EngineRequest, deadline: Instant) -> Result<()> {
        let pairs: Vec<(String, String)> = if self.uuids.is_empty() {
            request.endpoints.clone().into_iter().collect()
        } else {
            // A rank that takes no part keeps its place: callers index this list by rank.
            let endpoint = |uuid: &String| request.endpoints.get(uuid).cloned().unwrap_or_default();
            self.uuids.iter().map(|uuid| (uuid.clone(), endpoint(uuid))).collect()
        };
        let (call, raised) = (self.call.clone(), self.raised.clone());
        let called = tokio::task::spawn_blocking(move || {
            Python::attach(|py| {
                call.call1(py, (pairs,)).map(drop).map_err(|exception| {
                    let error = from_python(py, OPERATION, &exception);
                    *raised.lock().unwrap_or_else(PoisonError::into_inner) = Some(exception);
                    error
                })
            })
        });
        match tokio::time::timeout_at(deadline.into(), called).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(broken)) => Err(ckpt_core::Error::new(ErrorKind::Internal, OPERATION, broken.to_string())),
            Err(_) => Err(ckpt_core::Error::new(
                ErrorKind::Timeout,
                OPERATION,
                "the function that tells the engine has not returned by the deadline",
            )),
        }
    }
}
