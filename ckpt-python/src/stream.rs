//! An update whose worker is this process: an iterator of buckets, whose consumer sets the pace.

use std::sync::Arc;

use ckpt_core::{
    ErrorKind, Result,
    server::UpdateReport,
    sink::{StreamBucket, TensorStream, stream},
};
use pyo3::prelude::*;
use tokio::{
    sync::{Mutex, OwnedMutexGuard},
    task::JoinHandle,
};

use crate::{
    error::invalid,
    memory::{Memory, describe},
    runtime::wait,
    server::{Asked, State},
};

/// The tensors of one bucket: name, torch's dtype, torch's shape, bytes.
type Tensors = Vec<(String, &'static str, Vec<u64>, Memory)>;

/// Buckets of an update, each valid until the next is asked for.
#[pyclass(frozen, module = "ckpt_engine._native")]
pub(crate) struct Stream(Arc<Mutex<Inner>>);

struct Inner {
    tensors: TensorStream,
    held: Option<StreamBucket>,
    update: Option<JoinHandle<Result<UpdateReport>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // A consumer that leaves early is an update that fails: the closed stream says so to all ranks.
        if let Some(bucket) = self.held.take() {
            bucket.reject(ckpt_core::Error::new(
                ErrorKind::Aborted,
                "take a bucket",
                "the consumer left in the middle of the update",
            ));
        }
    }
}

impl Stream {
    /// Begins the update. Must be called on the runtime.
    pub(crate) fn start(mut guard: OwnedMutexGuard<Option<State>>, asked: Asked, consumer: &str) -> Self {
        let (sink, tensors) = stream(consumer);
        let update = tokio::spawn(async move {
            let state = guard.as_mut().ok_or_else(|| invalid("update weights", "the server was closed"))?;
            state.update(asked, Box::new(sink), None).await
        });
        Self(Arc::new(Mutex::new(Inner { tensors, held: None, update: Some(update) })))
    }
}

#[pymethods]
impl Stream {
    /// Gives the last bucket back and returns the next one; `None` when the update is complete on all ranks.
    fn next_bucket(&self, py: Python<'_>) -> PyResult<Option<Tensors>> {
        let inner = self.0.clone();
        wait(py, async move {
            let mut inner = inner.lock().await;
            inner.held = None;
            match inner.tensors.next_bucket().await {
                Ok(Some(bucket)) => {
                    let mut tensors = Vec::with_capacity(bucket.tensors().len());
                    for tensor in bucket.tensors() {
                        let (name, dtype, shape) = describe(tensor.meta())?;
                        tensors.push((name, dtype, shape, Memory::new(tensor.slice().clone())));
                    }
                    inner.held = Some(bucket);
                    Ok(Some(tensors))
                }
                // The update knows the cause.
                outcome => match inner.update.take() {
                    Some(update) => match update.await {
                        Ok(Ok(_)) => outcome.map(|_| None),
                        Ok(Err(cause)) => Err(cause),
                        Err(broken) => Err(ckpt_core::Error::new(
                            ErrorKind::Internal,
                            "update weights",
                            broken.to_string(),
                        )),
                    },
                    None => outcome.map(|_| None),
                },
            }
        })
    }
}
