//! What the host transports share: checks of groups and operations, and the order of jobs.

use futures_util::{FutureExt, future::BoxFuture};

use super::{CollectiveOp, GroupSpec};
use crate::{
    device::{Event, HostJob, MemoryKind, OnAbort, Stream},
    error::{Error, ErrorKind, Key, Result},
};

/// Bytes that nobody can guess.
pub(super) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| {
        Error::new(ErrorKind::Backend, "make a secret", "the system has no randomness")
            .caused_by(e.to_string())
    })?;
    Ok(bytes)
}

/// A group must have members, and this one must be among them.
pub(super) fn check_spec(group: &GroupSpec) -> Result<()> {
    if group.rank < group.world_size {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::ConfigInvalid,
        "join a group",
        format!("member {} is not one of {}", group.rank, group.world_size),
    )
    .with(Key::Rank, group.rank))
}

/// Members that have not come, as text: `2, 3`.
pub(super) fn missing(world_size: u32, joined: impl Fn(u32) -> bool) -> String {
    (0..world_size).filter(|rank| !joined(*rank)).map(|rank| rank.to_string()).collect::<Vec<_>>().join(", ")
}

/// Every buffer must be host memory and every root a member.
fn check_ops(ops: &[CollectiveOp], world_size: u32) -> Result<()> {
    for op in ops {
        if op.root >= world_size {
            return Err(Error::new(
                ErrorKind::Internal,
                "enqueue a broadcast",
                format!("root {} is not one of {world_size} members", op.root),
            ));
        }
        if op.buffer.memory() == MemoryKind::Device {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "enqueue a broadcast",
                "this transport moves host memory only; use --device host or another transport",
            ));
        }
    }
    Ok(())
}

/// Puts one communicator's groups on streams, in order even when the streams differ.
#[derive(Debug, Default)]
pub(super) struct Order {
    last: Option<Event>,
}

impl Order {
    /// Enqueues one group, done by `run`.
    pub(super) fn enqueue(
        &mut self,
        member: (u32, u32),
        ops: Vec<CollectiveOp>,
        stream: &dyn Stream,
        run: impl FnOnce(Vec<CollectiveOp>) -> BoxFuture<'static, Result<()>>,
    ) -> Result<Event> {
        let (rank, world_size) = member;
        check_ops(&ops, world_size)?;
        let host = stream.host().ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                "enqueue a broadcast",
                "this transport works on streams of the host device only; use --device host or another transport",
            )
        })?;
        if let Some(last) = &self.last {
            stream.wait(last)?;
        }
        let writes = ops.iter().filter(|op| op.root != rank).map(|op| op.buffer.clone()).collect();
        host.submit(HostJob {
            label: "broadcast",
            on_abort: OnAbort::MaySucceed(writes),
            run: run(ops).boxed(),
        })?;
        let event = stream.record()?;
        self.last = Some(event.clone());
        Ok(event)
    }
}
