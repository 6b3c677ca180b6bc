//! The first broadcasts of a group: peers are connected at the first use, and broken links show here, before an engine
//! has been asked for anything.

use std::{sync::Arc, time::Instant};

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{Buffer, BufferSlice, Event, RawStream, Stream, poll::Pause},
    transport::CollectiveOp,
};

use crate::{
    communicator::Shared,
    device::{Context, DeviceMemory},
};

/// Bytes that each member sends.
const ROW: u64 = 256;
const OPERATION: &str = "warm up a group";

/// A row of each member in device memory, to be broadcast in one group.
pub(crate) struct Rows {
    context: Arc<Context>,
    memory: Arc<dyn Buffer>,
    world_size: u32,
    raw: usize,
}

impl Rows {
    /// Enqueues the filling of the own row.
    pub(crate) fn fill(
        context: &Arc<Context>,
        (rank, world_size): (u32, u32),
        stream: &Arc<dyn Stream>,
    ) -> Result<Self> {
        let RawStream::Cuda(raw) = stream.raw() else {
            let message = "broadcasts between GPUs are enqueued on CUDA streams only";
            return Err(Error::new(ErrorKind::Unsupported, OPERATION, message));
        };
        let memory: Arc<dyn Buffer> = Arc::new(DeviceMemory::allocate(context, ROW * u64::from(world_size))?);
        let own = memory.address() + ROW * u64::from(rank);
        stream.keep_alive(vec![BufferSlice::whole(memory.clone())])?;
        // SAFETY: the range lies in `memory`, which the stream keeps from the line above on.
        context.run(OPERATION, |f| unsafe { (f.fill)(own, mark(rank), ROW as usize, raw) })?;
        Ok(Self { context: context.clone(), memory, world_size, raw })
    }

    /// One broadcast from every member.
    pub(crate) fn ops(&self) -> Result<Vec<CollectiveOp>> {
        let row = |root: u32| {
            let start = ROW * u64::from(root);
            Ok(CollectiveOp { root, buffer: BufferSlice::new(self.memory.clone(), start..start + ROW)? })
        };
        (0..self.world_size).map(row).collect()
    }

    /// Compares what arrived. Nothing else may be on the stream.
    pub(crate) fn check(&self, advice: &str) -> Result<()> {
        let mut seen = vec![0u8; (ROW * u64::from(self.world_size)) as usize];
        // SAFETY: with nothing else on the stream, this copy into ordinary memory ends before the call returns.
        self.context.run(OPERATION, |f| unsafe {
            (f.copy_to_host)(seen.as_mut_ptr() as u64, self.memory.address(), seen.len(), self.raw)
        })?;
        for (root, row) in seen.chunks(ROW as usize).enumerate() {
            if row.iter().any(|byte| *byte != mark(root as u32)) {
                let message =
                    format!("wrong bytes arrived; the path between these devices is broken ({advice})");
                return Err(Error::new(ErrorKind::Corrupt, OPERATION, message).with(Key::Peer, root));
            }
        }
        Ok(())
    }
}

/// One small broadcast from every member over NCCL, in one group, with the bytes checked.
pub(crate) fn run(shared: &Shared, stream: &Arc<dyn Stream>, deadline: Instant) -> Result<()> {
    let member = &shared.member;
    let rows = Rows::fill(&member.context, (member.rank, member.world_size), stream)?;
    let sent = shared.launch_by(rows.ops()?, stream, deadline)?;
    wait(shared, &sent, deadline)?;
    rows.check("try NCCL_P2P_DISABLE=1")?;
    shared.poisoned().map_or(Ok(()), Err)
}

/// Never zero, which is what fresh memory mostly holds.
fn mark(rank: u32) -> u8 {
    (rank % 251 + 1) as u8
}

fn wait(shared: &Shared, event: &Event, deadline: Instant) -> Result<()> {
    let mut pause = Pause::default();
    while !event.is_complete()? {
        // An abort ends the wait here, even if the device does not answer.
        if let Some(cause) = shared.poisoned() {
            return Err(cause);
        }
        if Instant::now() >= deadline {
            return Err(Error::new(
                ErrorKind::Timeout,
                OPERATION,
                "the members are connected, but nothing arrived by the deadline",
            ));
        }
        pause.take();
    }
    shared.poisoned().map_or(Ok(()), Err)
}
