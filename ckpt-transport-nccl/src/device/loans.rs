//! Device memory that other processes have mapped: it may be freed only after they have unmapped it.
//!
//! Device addresses are unique in a process, and so is this list: whoever lends a block need not have opened the driver
//! through the same value as whoever allocated it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::sync::mpsc::UnboundedSender;

use super::memory::Block;

type Lenders = Vec<UnboundedSender<Arc<Block>>>;

/// Who has told other processes of which blocks, by the blocks' addresses.
static LOANS: Mutex<BTreeMap<u64, Lenders>> = Mutex::new(BTreeMap::new());

fn loans() -> MutexGuard<'static, BTreeMap<u64, Lenders>> {
    LOANS.lock().expect("nothing panics while the list is locked")
}

/// When the block at `address` would be freed, `lender` gets it instead, and frees it by dropping it. A lender that is
/// gone by then is passed over. The caller holds the block's memory during the call.
pub(crate) fn lend(address: u64, lender: UnboundedSender<Arc<Block>>) {
    let mut loans = loans();
    let lenders = loans.entry(address).or_default();
    lenders.retain(|other| !other.is_closed());
    lenders.push(lender);
}

/// The last user of `block` is gone.
pub(crate) fn give_back(block: &Arc<Block>) {
    let lenders = loans().remove(&block.address);
    for lender in lenders.into_iter().flatten() {
        // Who is gone has seen to it that nobody uses the block.
        let _ = lender.send(block.clone());
    }
}
