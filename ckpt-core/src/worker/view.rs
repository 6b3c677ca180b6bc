//! One tensor of a bucket as the worker sees it.

use std::sync::Arc;

use twox_hash::XxHash3_64;

use crate::{
    device::{Buffer, BufferSlice, MemoryKind},
    error::{Error, ErrorKind, Key, Result},
    types::TensorMeta,
};

/// A tensor in the mapped ring. It can be read until the call that was given it returns.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    meta: &'a TensorMeta,
    ring: &'a Arc<dyn Buffer>,
    offset: u64,
    len_bytes: u64,
    layout_index: Option<u32>,
    digest: Option<u64>,
}

impl<'a> TensorView<'a> {
    /// Checks that the tensor lies in the ring.
    pub(super) fn new(
        meta: &'a TensorMeta,
        ring: &'a Arc<dyn Buffer>,
        offset: u64,
        layout_index: Option<u32>,
        digest: Option<u64>,
    ) -> Result<Self> {
        let len_bytes = meta.len_bytes();
        let end = offset.checked_add(len_bytes);
        if end.is_none_or(|end| end > ring.len_bytes()) {
            let message =
                format!("{len_bytes} bytes at {offset} are outside the ring of {} bytes", ring.len_bytes());
            return Err(
                Error::new(ErrorKind::Corrupt, "read a bucket", message).with(Key::Tensor, &meta.name)
            );
        }
        Ok(Self { meta, ring, offset, len_bytes, layout_index, digest })
    }

    /// Name, dtype, shape.
    pub fn meta(&self) -> &'a TensorMeta {
        self.meta
    }

    /// Its index in the list given to [`super::Apply::layout`], if the parameter server refers to one: a worker that
    /// looked its parameters up there needs no lookup by name here.
    pub fn layout_index(&self) -> Option<u32> {
        self.layout_index
    }

    /// [`TensorMeta::len_bytes`], which need not be computed again.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Where the bytes are; a device pointer for [`MemoryKind::Device`].
    pub fn address(&self) -> u64 {
        self.ring.address() + self.offset
    }

    /// The memory that [`Self::address`] points to.
    pub fn memory(&self) -> MemoryKind {
        self.ring.memory()
    }

    /// The bytes with what keeps them mapped: for copies that a device makes by itself.
    pub fn slice(&self) -> Result<BufferSlice> {
        BufferSlice::new(self.ring.clone(), self.offset..self.offset + self.len_bytes)
    }

    /// The bytes; an error for device memory.
    pub fn bytes(&self) -> Result<&'a [u8]> {
        let pointer = self.slice()?.host_ptr()?;
        // SAFETY: `new` checked the range; `ring` keeps the mapping for 'a; the parameter server writes these bytes
        // only after the ack of this bucket, which is sent after the call that this view was made for.
        Ok(unsafe { std::slice::from_raw_parts(pointer.as_ptr(), self.len_bytes as usize) })
    }

    /// The xxh3-64 (seed 0) that the bytes must have, if the parameter server sent one.
    pub fn digest(&self) -> Option<u64> {
        self.digest
    }

    /// Compares the bytes with [`Self::digest`]; fine if there is none.
    pub fn verify(&self) -> Result<()> {
        let Some(expected) = self.digest else { return Ok(()) };
        let found = XxHash3_64::oneshot(self.bytes()?);
        if found == expected {
            return Ok(());
        }
        let message = format!(
            "the bytes that arrived have the xxh3 digest {found:016x}, the source has {expected:016x}; update again"
        );
        Err(Error::new(ErrorKind::Corrupt, "verify a tensor", message).with(Key::Tensor, &self.meta.name))
    }
}
