//! The worker's side of the native protocol, for engines in Python.

use std::{
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use ckpt_core::{
    ErrorKind, Result,
    device::{Buffer, MemoryKind, RingExport},
    worker::{Apply, NativeWorker, RingMapper, TensorView},
};
use pyo3::{prelude::*, types::PyBytes};

use crate::{
    error::{from_python, to_python},
    memory::{Lent, describe},
};

/// A worker of one device: keep it between updates.
#[pyclass(frozen, module = "ckpt_engine._native")]
pub(crate) struct Worker {
    worker: Mutex<NativeWorker>,
    mapped: Arc<Mutex<Weak<Lent>>>,
    raised: Arc<Mutex<Option<PyErr>>>,
}

/// Maps a ring by calling Python, which knows how torch does it.
struct PythonMapper {
    capabilities: u64,
    map: Py<PyAny>,
    unmapped: Py<PyAny>,
    mapped: Arc<Mutex<Weak<Lent>>>,
    raised: Arc<Mutex<Option<PyErr>>>,
}

impl RingMapper for PythonMapper {
    fn capabilities(&self) -> u64 {
        self.capabilities
    }

    fn map(&mut self, export: &RingExport, len_bytes: u64) -> Result<Arc<dyn Buffer>> {
        let lent = Python::attach(|py| {
            let map = |kind: &str, handle: Py<PyAny>, offset: u64| -> PyResult<Lent> {
                let ring = self.map.bind(py).call1((kind, handle, offset, len_bytes))?;
                let address: u64 = ring.call_method0("data_ptr")?.extract()?;
                let memory = if kind == "host" { MemoryKind::Host } else { MemoryKind::Device };
                let afterwards = Some(self.unmapped.clone_ref(py));
                Ok(Lent { address, len_bytes, memory, owner: Some(ring.unbind()), afterwards })
            };
            let bytes = |handle: &[u8]| PyBytes::new(py, handle).into_any().unbind();
            let mapped = match export {
                RingExport::Host { path, offset_bytes } => path
                    .into_pyobject(py)
                    .and_then(|path| map("host", path.into_any().unbind(), *offset_bytes)),
                RingExport::Cuda { handle, offset_bytes } => map("cuda", bytes(handle), *offset_bytes),
                RingExport::Ascend { key, offset_bytes } => map("npu", bytes(key), *offset_bytes),
            };
            mapped.map_err(|raised| keep(py, &self.raised, "map the ring", raised))
        })?;
        let lent = Arc::new(lent);
        *lock(&self.mapped) = Arc::downgrade(&lent);
        Ok(lent)
    }
}

/// Calls Python for every bucket and for the post hook.
struct PythonApply<'a> {
    bucket: &'a Py<PyAny>,
    post_hook: &'a Py<PyAny>,
    mapped: &'a Mutex<Weak<Lent>>,
    raised: &'a Mutex<Option<PyErr>>,
}

impl Apply for PythonApply<'_> {
    fn bucket(&mut self, _bucket: u32, tensors: &[TensorView<'_>]) -> Result<()> {
        let Some(ring) = lock(self.mapped).upgrade() else {
            return Err(ckpt_core::Error::new(
                ErrorKind::Internal,
                "take a bucket",
                "the ring is not mapped",
            ));
        };
        let mut described = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            let (name, dtype, shape) = describe(tensor.meta())?;
            described.push((name, dtype, shape, tensor.address() - ring.address()));
        }
        Python::attach(|py| {
            let owner = ring.owner.as_ref().map(|owner| owner.clone_ref(py));
            self.bucket
                .call1(py, (owner, described))
                .map(drop)
                .map_err(|raised| keep(py, self.raised, "load a bucket", raised))
        })
    }

    fn post_hook(&mut self) -> Result<()> {
        Python::attach(|py| {
            let called = self.post_hook.call0(py).map(drop);
            called.map_err(|raised| keep(py, self.raised, "run the post hook", raised))
        })
    }
}

#[pymethods]
impl Worker {
    /// `map(kind, path or handle, offset, nbytes)` returns the ring as a tensor; `unmapped()` is called after it was let
    /// go. `capabilities` are bits: 1 host, 2 CUDA, 4 Ascend.
    #[new]
    fn new(uuid: String, capabilities: u64, map: Py<PyAny>, unmapped: Py<PyAny>, window: u32) -> Self {
        let (mapped, raised) = (Arc::default(), Arc::default());
        let mapper = PythonMapper {
            capabilities,
            map,
            unmapped,
            mapped: Arc::clone(&mapped),
            raised: Arc::clone(&raised),
        };
        let worker = NativeWorker::new(uuid).with_mapper(mapper).with_window(window);
        Self { worker: Mutex::new(worker), mapped, raised }
    }

    /// Takes one update. `bucket(ring, [(name, dtype, shape, offset), ...])` copies tensors out of the ring and returns
    /// when that is done. Both functions run in the caller's thread. Returns (buckets, tensors, bytes).
    fn update(
        &self,
        py: Python<'_>,
        endpoint: &str,
        timeout: f64,
        bucket: Py<PyAny>,
        post_hook: Py<PyAny>,
    ) -> PyResult<(u64, u64, u64)> {
        let deadline = Duration::try_from_secs_f64(timeout)
            .ok()
            .and_then(|limit| Instant::now().checked_add(limit))
            .ok_or_else(|| pyo3::exceptions::PyValueError::new_err("timeout is no time in seconds"))?;
        let updated = py.detach(|| {
            let mut apply = PythonApply {
                bucket: &bucket,
                post_hook: &post_hook,
                mapped: &self.mapped,
                raised: &self.raised,
            };
            lock(&self.worker).update(endpoint, &mut apply, deadline)
        });
        let raised = lock(&self.raised).take();
        match (updated, raised) {
            (Ok(summary), _) => Ok((summary.buckets, summary.tensors, summary.tensor_bytes)),
            // The caller's own exception says more to the caller than its text.
            (Err(_), Some(raised)) => Err(raised),
            (Err(error), None) => Err(to_python(py, &error)),
        }
    }

    /// Unmaps a ring that was kept for the next update.
    fn forget(&self, py: Python<'_>) {
        py.detach(|| lock(&self.worker).forget());
    }
}

fn keep(
    py: Python<'_>,
    place: &Mutex<Option<PyErr>>,
    operation: &'static str,
    raised: PyErr,
) -> ckpt_core::Error {
    let error = from_python(py, operation, &raised);
    *lock(place) = Some(raised);
    error
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What these hold stays whole whatever happened to the last holder.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
