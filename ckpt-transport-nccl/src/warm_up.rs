//! The first broadcasts of a group: NCCL connects its peers at the first use, and broken links show here, before an
//! engine has been asked for anything.

use std::{sync::Arc, time::Instant};

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{Buffer, BufferSlice, Event, RawStream, Stream, poll::Pause},
    transport::CollectiveOp,
};

use crate::{communicator::Shared, device::DeviceMemory};

/// Bytes that each member sends.
const ROW: u64 = 256;

/// One small broadcast from every member, in one group, with the bytes checked.
pub(crate) fn run(shared: &Shared, stream: &Arc<dyn Stream>, deadline: Instant) -> Result<()> {
    const OPERATION: &str = "warm up an NCCL group";
    let member = &shared.member;
    let RawStream::Cuda(raw) = stream.raw() else {
        return Err(Error::new(ErrorKind::Unsupported, OPERATION, "NCCL enqueues on CUDA streams only"));
    };
    let context = &member.context;
    let rows: Arc<dyn Buffer> =
        Arc::new(DeviceMemory::allocate(context, ROW * u64::from(member.world_size))?);
    let own = rows.address() + ROW * u64::from(member.rank);
    // SAFETY: the range lies in `rows`, which the stream keeps from the launch below on.
    context.run(OPERATION, |f| unsafe { (f.fill)(own, mark(member.rank), ROW as usize, raw) })?;
    let ops = (0..member.world_size)
        .map(|root| {
            let start = ROW * u64::from(root);
            Ok(CollectiveOp { root, buffer: BufferSlice::new(rows.clone(), start..start + ROW)? })
        })
        .collect::<Result<Vec<_>>>()?;
    let sent = shared.launch_by(ops, stream, deadline)?;
    wait(shared, &sent, deadline)?;
    let mut seen = vec![0u8; (ROW * u64::from(member.world_size)) as usize];
    // SAFETY: nothing else is on the stream, so that this copy into ordinary memory ends before the call returns.
    context.run(OPERATION, |f| unsafe {
        (f.copy_to_host)(seen.as_mut_ptr() as u64, rows.address(), seen.len(), raw)
    })?;
    wait(shared, &stream.record()?, deadline)?;
    for (root, row) in seen.chunks(ROW as usize).enumerate() {
        if row.iter().any(|byte| *byte != mark(root as u32)) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                OPERATION,
                "wrong bytes arrived; the path between these devices is broken (try NCCL_P2P_DISABLE=1)",
            )
            .with(Key::Peer, root));
        }
    }
    Ok(())
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
                "warm up an NCCL group",
                "the members are connected, but nothing arrived by the deadline",
            ));
        }
        pause.take();
    }
    shared.poisoned().map_or(Ok(()), Err)
}
