//! Completion of a group on this member, told by the group's task.

use std::{any::Any, time::Instant};

use async_trait::async_trait;
use ckpt_core::{Error, ErrorKind, Result, device::EventState};
use tokio::sync::watch;

/// The task's end.
pub(super) type Done = watch::Sender<Option<Result<()>>>;

/// Completes when this member's part of a group is done.
#[derive(Debug)]
pub(super) struct GroupEvent(watch::Receiver<Option<Result<()>>>);

impl GroupEvent {
    pub(super) fn new() -> (Done, Self) {
        let (done, state) = watch::channel(None);
        (done, Self(state))
    }
}

fn dropped() -> Error {
    Error::new(ErrorKind::Aborted, "broadcast", "the group has ended")
}

#[async_trait]
impl EventState for GroupEvent {
    fn is_complete(&self) -> Result<bool> {
        match (&*self.0.borrow(), self.0.has_changed()) {
            (Some(result), _) => result.clone().map(|()| true),
            (None, Ok(_)) => Ok(false),
            (None, Err(_)) => Err(dropped()),
        }
    }

    async fn done(&self, deadline: Instant) -> Result<()> {
        let mut state = self.0.clone();
        match tokio::time::timeout_at(deadline.into(), state.wait_for(Option::is_some)).await {
            Ok(Ok(result)) => result.clone().unwrap_or_else(|| Err(dropped())),
            Ok(Err(_)) => Err(dropped()),
            Err(_) => Err(Error::new(
                ErrorKind::Timeout,
                "broadcast",
                "the group was not done by its deadline; another member is late or stopped",
            )),
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
