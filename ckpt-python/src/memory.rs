//! Memory that crosses the border, in both directions, without a copy.

use std::{fmt, sync::Arc};

use ckpt_core::{
    DType, Result,
    checkpoint::NamedTensor,
    device::{Buffer, BufferSlice, MemoryKind},
    types::TensorMeta,
};
use pyo3::prelude::*;

use crate::error::invalid;

/// Bytes of this package, for Python: an address, and what keeps it valid. `ckpt_engine.tensors.as_tensor` makes a tensor
/// of it.
#[pyclass(frozen, module = "ckpt_engine._native")]
pub(crate) struct Memory(BufferSlice);

impl Memory {
    pub(crate) fn new(slice: BufferSlice) -> Self {
        Self(slice)
    }
}

#[pymethods]
impl Memory {
    /// First byte.
    #[getter]
    fn address(&self) -> u64 {
        self.0.address()
    }

    /// Bytes.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.0.len_bytes()
    }

    /// `"host"` or `"device"`.
    #[getter]
    fn kind(&self) -> &'static str {
        match self.0.memory() {
            MemoryKind::Device => "device",
            _ => "host",
        }
    }
}

/// Memory of a Python object, such as a tensor, for this package.
pub(crate) struct Lent {
    pub(crate) address: u64,
    pub(crate) len_bytes: u64,
    pub(crate) memory: MemoryKind,
    pub(crate) owner: Option<Py<PyAny>>,
    /// Called after the owner was let go.
    pub(crate) afterwards: Option<Py<PyAny>>,
}

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lent").field("address", &self.address).field("len_bytes", &self.len_bytes).finish()
    }
}

// SAFETY: `owner` is the object whose memory this is, and keeps it at one place until this value is dropped; Python code
// of this package passes the tensor itself with the tensor's own `data_ptr()` and size.
unsafe impl Buffer for Lent {
    fn address(&self) -> u64 {
        self.address
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn memory(&self) -> MemoryKind {
        self.memory
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let (owner, afterwards) = (self.owner.take(), self.afterwards.take());
        // At the interpreter's end there is nothing left to give back.
        let _ = Python::try_attach(|py| {
            drop(owner);
            if let Some(Err(raised)) = afterwards.map(|call| call.call0(py)) {
                raised.write_unraisable(py, None);
            }
        });
    }
}

/// A tensor as Python describes it: name, torch's dtype, torch's shape, address, bytes, and the object that owns them.
pub(crate) type Described = (String, String, Vec<u64>, u64, u64, Py<PyAny>);

/// A tensor of a checkpoint that lies where Python has it.
pub(crate) fn named_tensor(
    (name, dtype, shape, address, len_bytes, owner): Described,
) -> Result<NamedTensor> {
    let dtype = DType::from_torch(&dtype).ok_or_else(|| {
        invalid("take a named tensor", format!("no checkpoint can hold the dtype {dtype} of `{name}`"))
    })?;
    let meta = TensorMeta::from_torch(name, dtype, &shape)?;
    // An empty tensor has no address.
    let address = if len_bytes == 0 { std::ptr::NonNull::<u64>::dangling().as_ptr() as u64 } else { address };
    let lent = Lent { address, len_bytes, memory: MemoryKind::Host, owner: Some(owner), afterwards: None };
    NamedTensor::from_buffer(meta, BufferSlice::whole(Arc::new(lent)))
}

/// Name, torch's dtype, torch's shape.
pub(crate) fn describe(meta: &TensorMeta) -> Result<(String, &'static str, Vec<u64>)> {
    let shape = meta.torch_shape().ok_or_else(|| {
        invalid(
            "describe a tensor",
            format!("torch has no shape for `{}`: its last dimension is odd", meta.name),
        )
    })?;
    Ok((meta.name.to_string(), meta.dtype.torch_name(), shape.to_vec()))
}
