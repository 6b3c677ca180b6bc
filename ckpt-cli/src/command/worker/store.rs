//! The weights that one device of the reference engine holds.

use std::{collections::BTreeMap, sync::Arc};

use ckpt_core::{Result, types::TensorMeta, worker::TensorView};

use super::device::WeightMemory;

/// Parameters by name. Like a real engine it writes in place: a failed update leaves old and new weights mixed.
pub(super) struct Store {
    memory: Box<dyn WeightMemory>,
    tensors: BTreeMap<Arc<str>, TensorMeta>,
    layout: Option<Arc<[TensorMeta]>>,
    /// For each tensor of the layout: it is among `tensors`, with this very meta.
    noted: Vec<bool>,
    mixed: bool,
    updates: u64,
}

impl Store {
    /// An empty one on `memory`.
    pub(super) fn new(memory: Box<dyn WeightMemory>) -> Self {
        Self { memory, tensors: BTreeMap::new(), layout: None, noted: Vec::new(), mixed: false, updates: 0 }
    }

    /// All tensors that may come.
    pub(super) fn layout(&mut self, tensors: &Arc<[TensorMeta]>) -> Result<()> {
        if !self.layout.as_ref().is_some_and(|known| Arc::ptr_eq(known, tensors)) {
            self.noted = vec![false; tensors.len()];
            self.layout = Some(tensors.clone());
        }
        self.memory.layout(tensors)
    }

    /// Takes the tensors of one bucket.
    pub(super) fn bucket(&mut self, bucket: u32, tensors: &[TensorView<'_>]) -> Result<()> {
        self.mixed = true;
        self.memory.bucket(bucket, tensors)?;
        for tensor in tensors {
            // Hundreds of thousands of names cost time; those of a known layout are put down once.
            match tensor.layout_index().and_then(|index| self.noted.get_mut(index as usize)) {
                Some(true) => continue,
                Some(noted) => *noted = true,
                // It may have another shape than the layout says.
                None => {
                    self.layout = None;
                    self.noted.clear();
                }
            }
            self.tensors.insert(tensor.meta().name.clone(), tensor.meta().clone());
        }
        Ok(())
    }

    /// All of an update is in.
    pub(super) fn complete(&mut self) -> Result<()> {
        self.memory.post_hook()?;
        self.mixed = false;
        self.updates += 1;
        Ok(())
    }

    /// The update failed somewhere.
    pub(super) fn failed(&mut self, cause: &ckpt_core::Error) {
        self.memory.failed(cause);
    }

    /// Whether the last update ended in the middle.
    pub(super) fn mixed(&self) -> bool {
        self.mixed
    }

    /// Complete updates.
    pub(super) fn updates(&self) -> u64 {
        self.updates
    }

    /// All parameters by name.
    pub(super) fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorMeta> {
        self.tensors.values()
    }

    /// Bytes of all parameters.
    pub(super) fn len_bytes(&self) -> u64 {
        self.tensors().map(TensorMeta::len_bytes).sum()
    }

    /// Hands each parameter's meta and then its bytes, piece by piece, to `take`.
    pub(super) fn read(&mut self, name: &str, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.memory.read(name, take)
    }
}
