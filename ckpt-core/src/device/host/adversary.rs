//! What an unkind machine may do within the rules: late work, poisoned memory, aborted work that "succeeds".

use std::sync::atomic::{AtomicU64, Ordering};

use crate::device::BufferSlice;

/// Ring bytes that hold nothing of value are filled with this.
pub const POISON: u8 = 0xDB;

/// Polls of [`crate::device::Event::is_complete`] after which even the adversary runs the work, so that a program
/// which polls instead of waiting still ends.
pub(super) const PATIENCE: u32 = 16;

/// The adversary's choices, repeatable by its seed.
#[derive(Debug)]
pub(super) struct Adversary {
    state: AtomicU64,
}

impl Adversary {
    pub(super) fn new(seed: u64) -> Self {
        Self { state: AtomicU64::new(seed) }
    }

    /// The next pseudo-random number (SplitMix64).
    pub(super) fn next(&self) -> u64 {
        const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
        let mut z = self.state.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Lets other tasks run first, a seed-chosen number of times.
    pub(super) async fn dawdle(&self) {
        for _ in 0..self.next() % 4 {
            tokio::task::yield_now().await;
        }
    }

    /// Overwrites what aborted work may have written.
    pub(super) fn scribble(&self, writes: &[BufferSlice]) {
        for slice in writes {
            let garbage = self.next().to_le_bytes();
            // SAFETY: the job that owned this range has ended and its event has not completed yet, so by the stream's
            // contract nothing else may touch the range; the range is mapped while `slice` lives.
            if let Ok(bytes) = unsafe { slice.as_mut_slice() } {
                for (index, byte) in bytes.iter_mut().enumerate() {
                    *byte = garbage[index % garbage.len()];
                }
            }
        }
    }
}
