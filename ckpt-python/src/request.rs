//! The caller's function that tells an engine, as an engine.
//!
//! The function is called on every rank, and on those that tell nobody it returns at once. So its return does not mean that
//! an engine is done; the engine here is done when this rank's worker is, too.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use async_trait::async_trait;
use ckpt_core::{
    ErrorKind, Result,
    device::Ring,
    engine::{Engine, EngineRequest},
    sink::{Afterwards, BucketMessage, WeightSink},
};
use pyo3::prelude::*;
use tokio::sync::watch;

use crate::error::from_python;

const OPERATION: &str = "tell the engine";

/// Calls a Python function with `[(device UUID, endpoint), ...]`, one pair a rank of the job.
pub(crate) struct PythonEngine {
    call: Arc<Py<PyAny>>,
    /// All ranks' devices in rank order; without them the pairs come in the order of the UUIDs.
    uuids: Vec<String>,
    /// What the function raised.
    raised: Arc<Mutex<Option<PyErr>>>,
    /// Ends when this rank's link to its worker does.
    worker: watch::Receiver<()>,
}

impl PythonEngine {
    /// `call`, and the end of `link` as it knows it.
    pub(crate) fn new(
        call: Py<PyAny>,
        uuids: Vec<String>,
        link: Box<dyn WeightSink>,
    ) -> (Self, Box<dyn WeightSink>) {
        let (over, worker) = watch::channel(());
        let engine = Self { call: Arc::new(call), uuids, raised: Arc::default(), worker };
        (engine, Box::new(Watched { link, over: Some(over) }))
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
        let mut worker = self.worker.clone();
        let told = async {
            let outcome = called.await;
            if let Ok(Ok(())) = &outcome {
                // Nothing is ever sent: an error is the end.
                let _ = worker.changed().await;
            }
            outcome
        };
        match tokio::time::timeout_at(deadline.into(), told).await {
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

/// A link that tells when it is over: after its last call, or when it is dropped.
struct Watched {
    link: Box<dyn WeightSink>,
    over: Option<watch::Sender<()>>,
}

#[async_trait]
impl WeightSink for Watched {
    fn endpoint(&self) -> &str {
        self.link.endpoint()
    }

    async fn open(&mut self, ring: &dyn Ring, deadline: Instant) -> Result<()> {
        self.link.open(ring, deadline).await
    }

    async fn deliver(&mut self, bucket: &BucketMessage, deadline: Instant) -> Result<()> {
        self.link.deliver(bucket, deadline).await
    }

    async fn release(&mut self, deadline: Instant) -> Result<()> {
        self.link.release(deadline).await
    }

    async fn finish(&mut self, deadline: Instant) -> Result<()> {
        let finished = self.link.finish(deadline).await;
        self.over = None;
        finished
    }

    async fn fail(&mut self, cause: &ckpt_core::Error, deadline: Instant) -> Result<Afterwards> {
        self.over = None;
        self.link.fail(cause, deadline).await
    }
}
