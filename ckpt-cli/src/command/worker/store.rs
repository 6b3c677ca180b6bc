//! The weights that one device of the reference engine holds.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
};

use ckpt_core::types::TensorMeta;

/// One parameter.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) meta: TensorMeta,
    pub(super) bytes: Vec<u8>,
}

/// Parameters by name. Like a real engine it writes in place: a failed update leaves old and new weights mixed.
#[derive(Debug, Default)]
pub(super) struct Store {
    tensors: BTreeMap<Arc<str>, Held>,
    mixed: bool,
    updates: u64,
}

impl Store {
    /// Takes one tensor.
    pub(super) fn put(&mut self, meta: &TensorMeta, bytes: &[u8]) {
        self.mixed = true;
        match self.tensors.entry(meta.name.clone()) {
            Entry::Occupied(mut entry) => {
                let held = entry.get_mut();
                held.meta = meta.clone();
                // Keeps the memory of the last update.
                held.bytes.clear();
                held.bytes.extend_from_slice(bytes);
            }
            Entry::Vacant(entry) => {
                entry.insert(Held { meta: meta.clone(), bytes: bytes.to_vec() });
            }
        }
    }

    /// All of an update is in.
    pub(super) fn complete(&mut self) {
        self.mixed = false;
        self.updates += 1;
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
    pub(super) fn tensors(&self) -> impl ExactSizeIterator<Item = &Held> {
        self.tensors.values()
    }

    /// Bytes of all parameters.
    pub(super) fn len_bytes(&self) -> u64 {
        self.tensors().map(|held| held.bytes.len() as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use ckpt_core::DType;

    use super::*;

    #[test]
    fn an_update_replaces_in_place_and_is_mixed_until_complete() {
        let mut store = Store::default();
        let meta = |shape: &[u64]| TensorMeta::new("w", DType::U8, shape).unwrap();
        store.put(&meta(&[2]), &[1, 2]);
        assert!(store.mixed());
        store.complete();
        assert!(!store.mixed());
        store.put(&meta(&[3]), &[3, 4, 5]);
        assert_eq!((store.tensors().len(), store.len_bytes(), store.updates()), (1, 3, 1));
        assert_eq!(store.tensors().next().unwrap().bytes, [3, 4, 5]);
        assert!(store.mixed());
    }
}
