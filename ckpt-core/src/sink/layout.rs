//! The list of all tensors of a checkpoint, told to a native worker once and referred to by index afterwards.

use std::{collections::HashMap, fmt, sync::Arc};

use crate::{
    error::{Error, ErrorKind, Key, Result},
    types::TensorMeta,
    worker::wire,
};

/// Every tensor that an update may deliver, in any fixed order. Build it once per checkpoint, not per update.
pub struct Layout {
    tensors: Arc<[TensorMeta]>,
    index: HashMap<Arc<str>, u32>,
    digest: u128,
}

impl Layout {
    /// Numbers the tensors in the order given; the same name twice is an error.
    pub fn new(tensors: impl Into<Arc<[TensorMeta]>>) -> Result<Self> {
        let tensors = tensors.into();
        let mut index = HashMap::with_capacity(tensors.len());
        for (number, meta) in tensors.iter().enumerate() {
            let number = u32::try_from(number).map_err(|_| {
                Error::new(ErrorKind::Unsupported, "number the tensors", "more than 2^32 tensors")
            })?;
            if index.insert(meta.name.clone(), number).is_some() {
                return Err(Error::new(ErrorKind::Corrupt, "number the tensors", "a name occurs twice")
                    .with(Key::Tensor, &meta.name));
            }
        }
        let digest = wire::layout_digest(&tensors);
        Ok(Self { tensors, index, digest })
    }

    /// All tensors, in order.
    pub fn tensors(&self) -> &Arc<[TensorMeta]> {
        &self.tensors
    }

    pub(super) fn digest(&self) -> u128 {
        self.digest
    }

    /// The number of exactly this tensor. `guess` is tried first: buckets have runs of tensors in the layout's order, and
    /// looking a long name up takes longer than all else that is done for a small tensor.
    pub(super) fn find(&self, meta: &TensorMeta, guess: u32) -> Option<u32> {
        let is = |number: u32| self.tensors.get(number as usize) == Some(meta);
        if is(guess) {
            return Some(guess);
        }
        self.index.get(&meta.name).copied().filter(|number| is(*number))
    }
}

impl fmt::Debug for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layout").field("tensors", &self.tensors.len()).finish_non_exhaustive()
    }
}
