//! Device memory that other processes have mapped: it may be freed only after they have unmapped it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::sync::mpsc::UnboundedSender;

use super::memory::Block;

/// Who has told other processes of which blocks, by the blocks' addresses.
#[derive(Debug, Default)]
pub(crate) struct Loans(Mutex<BTreeMap<u64, Vec<UnboundedSender<Arc<Block>>>>>);

impl Loans {
    fn locked(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<UnboundedSender<Arc<Block>>>>> {
        self.0.lock().expect("nothing panics while the list is locked")
    }

    /// When the block at `address` would be freed, `lender` gets it instead, and frees it by dropping it. A lender that
    /// is gone by then is passed over. The caller holds the block's memory during the call.
    pub(crate) fn lend(&self, address: u64, lender: UnboundedSender<Arc<Block>>) {
        let mut loans = self.locked();
        let lenders = loans.entry(address).or_default();
        lenders.retain(|other| !other.is_closed());
        lenders.push(lender);
    }

    /// The last user of `block` is gone.
    pub(crate) fn give_back(&self, block: &Arc<Block>) {
        let lenders = self.locked().remove(&block.address);
        for lender in lenders.into_iter().flatten() {
            // Who is gone has seen to it that nobody uses the block.
            let _ = lender.send(block.clone());
        }
    }
}
