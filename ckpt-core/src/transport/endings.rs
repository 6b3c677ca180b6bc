//! Calls of native libraries that end a group and may not return.

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use crate::error::{Error, ErrorKind, Recovery, Result};

/// Aborts (or ends) of groups that have not returned. One that never does leaves kernels and threads behind: then no new
/// group is formed in this process.
#[derive(Debug, Default)]
pub struct Endings {
    running: Mutex<Vec<Running>>,
    next: AtomicU64,
    ended: Notify,
}

#[derive(Debug)]
struct Running {
    number: u64,
    began: Instant,
    limit: Duration,
}

impl Endings {
    fn running(&self) -> MutexGuard<'_, Vec<Running>> {
        self.running.lock().expect("nothing panics while the list is locked")
    }

    /// A call begins; it has ended when the ticket is dropped, and must have within `limit`.
    pub fn begin(self: &Arc<Self>, limit: Duration) -> EndingTicket {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.running().push(Running { number, began: Instant::now(), limit });
        EndingTicket { endings: self.clone(), number }
    }

    /// Waits until every call has returned; a fatal error once one has taken longer than its limit.
    pub async fn settle(&self, deadline: Instant) -> Result<()> {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            let soonest = self.running().iter().map(|r| (r.began + r.limit, r.limit)).min();
            let Some((overdue, limit)) = soonest else { return Ok(()) };
            let now = Instant::now();
            if now >= overdue {
                return Err(Error::new(
                    ErrorKind::Backend,
                    "join a group",
                    format!(
                        "the end of an earlier group has not returned for {} s; restart this process",
                        limit.as_secs()
                    ),
                )
                .recovery_is(Recovery::Fatal));
            }
            if now >= deadline {
                return Err(Error::new(
                    ErrorKind::Timeout,
                    "join a group",
                    "the end of an earlier group goes on; try again",
                ));
            }
            // Whether it ended or time passed is seen above.
            let _ = tokio::time::timeout_at(deadline.min(overdue).into(), ended).await;
        }
    }
}

/// See [`Endings::begin`].
#[derive(Debug)]
pub struct EndingTicket {
    endings: Arc<Endings>,
    number: u64,
}

impl Drop for EndingTicket {
    fn drop(&mut self) {
        self.endings.running().retain(|running| running.number != self.number);
        self.endings.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_new_group_waits_for_the_end_of_an_old_one_but_not_for_ever() {
        let endings = Arc::new(Endings::default());
        let soon = || Instant::now() + Duration::from_secs(20);
        let ticket = endings.begin(Duration::from_secs(10));
        let waiting = tokio::spawn({
            let endings = endings.clone();
            async move { endings.settle(soon()).await }
        });
        tokio::task::yield_now().await;
        drop(ticket);
        waiting.await.unwrap().unwrap();
        let _slow = endings.begin(Duration::from_secs(10));
        let error = endings.settle(Instant::now()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        let _stuck = endings.begin(Duration::from_millis(20));
        let error = endings.settle(soon()).await.unwrap_err();
        assert_eq!((error.kind(), error.recovery()), (ErrorKind::Backend, Recovery::Fatal));
    }
}
