//! The first cause that ended a communicator.

use std::sync::OnceLock;

use tokio_util::sync::CancellationToken;

use crate::error::Error;

/// Set at most once; whoever waits is woken then.
#[derive(Debug, Default)]
pub(super) struct Poison {
    cause: OnceLock<Error>,
    set: CancellationToken,
}

impl Poison {
    /// Sets the cause; false if there was one already.
    pub(super) fn set(&self, cause: Error) -> bool {
        let first = self.cause.set(cause).is_ok();
        if first {
            self.set.cancel();
        }
        first
    }

    /// The cause.
    pub(super) fn get(&self) -> Option<Error> {
        self.cause.get().cloned()
    }

    /// `Err` with the cause, once there is one.
    pub(super) fn check(&self) -> Result<(), Error> {
        self.get().map_or(Ok(()), Err)
    }

    /// Waits until there is a cause. Cancel safe.
    pub(super) async fn wait(&self) -> Error {
        loop {
            self.set.cancelled().await;
            // The token is cancelled only after the cause was set.
            if let Some(cause) = self.get() {
                return cause;
            }
        }
    }
}
