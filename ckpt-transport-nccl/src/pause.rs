//! Waiting for something that tells nobody when it is over.

use std::time::Duration;

/// Waits that are short at first and never long.
#[derive(Default)]
pub(crate) struct Pause(u32);

impl Pause {
    pub(crate) fn take(&mut self) {
        self.0 = self.0.saturating_add(1);
        match self.0 {
            ..200 => std::thread::yield_now(),
            200..2000 => std::thread::sleep(Duration::from_micros(20)),
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}
