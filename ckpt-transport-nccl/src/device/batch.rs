//! Many small copies on the device in one call: an engine's parameters are thousands.

use ckpt_core::{
    Error, ErrorKind, Result,
    device::{BufferSlice, MemoryKind},
};

use super::driver::{Context, CopyAttributes};
use crate::{error::CUDA_NOT_SUPPORTED, table::Handle};

/// Copies from device memory to device memory, in no order among themselves. Destinations must not overlap.
#[derive(Debug, Default)]
pub struct CopyBatch {
    from: Vec<u64>,
    to: Vec<u64>,
    bytes: Vec<usize>,
    memory: Vec<BufferSlice>,
}

impl CopyBatch {
    /// Room for `copies`.
    pub fn with_capacity(copies: usize) -> Self {
        Self {
            from: Vec::with_capacity(copies),
            to: Vec::with_capacity(copies),
            bytes: Vec::with_capacity(copies),
            memory: Vec::with_capacity(2 * copies),
        }
    }

    /// Adds a copy of `src` to `dst`, of equal lengths. Copies of nothing are left out.
    pub fn push(&mut self, src: &BufferSlice, dst: &BufferSlice) -> Result<()> {
        let device = src.memory() == MemoryKind::Device && dst.memory() == MemoryKind::Device;
        if src.len_bytes() != dst.len_bytes() || !device {
            return Err(Error::new(
                ErrorKind::Internal,
                "copy a batch on the device",
                format!(
                    "cannot copy {} bytes to {} bytes, both in device memory",
                    src.len_bytes(),
                    dst.len_bytes()
                ),
            ));
        }
        if src.len_bytes() > 0 {
            self.from.push(src.address());
            self.to.push(dst.address());
            self.bytes.push(src.len_bytes() as usize);
            self.memory.extend([src.clone(), dst.clone()]);
        }
        Ok(())
    }

    /// Copies in the batch.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// What the copies use.
    pub(crate) fn into_memory(self) -> Vec<BufferSlice> {
        self.memory
    }

    /// In one call where the driver has one for that.
    pub(crate) fn enqueue(&self, context: &Context, stream: Handle) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        context.run("copy a batch on the device", |f| {
            if let Some(batch) = f.copy_batch {
                let attributes =
                    CopyAttributes { source_order: CopyAttributes::STREAM_ORDER, ..Default::default() };
                let (first, copies) = (0usize, self.len());
                // SAFETY: each array has `copies` elements; the one attribute applies from copy 0 on; `push` took the
                // ranges from slices, which the stream keeps.
                let code = unsafe {
                    batch(
                        self.to.as_ptr(),
                        self.from.as_ptr(),
                        self.bytes.as_ptr(),
                        copies,
                        &attributes,
                        &first,
                        1,
                        stream,
                    )
                };
                if code != CUDA_NOT_SUPPORTED {
                    return code;
                }
            }
            for ((to, from), bytes) in self.to.iter().zip(&self.from).zip(&self.bytes) {
                // SAFETY: as above.
                let code = unsafe { (f.copy_on_device)(*to, *from, *bytes, stream) };
                if code != 0 {
                    return code;
                }
            }
            0
        })
    }
}
