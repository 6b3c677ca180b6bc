//! The first operations of a group: HCCL connects its peers at the first use, and broken links show here, before an engine
//! has been asked for anything.

use std::{sync::Arc, time::Instant};

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{Buffer, BufferSlice, Event, Stream, poll::Pause},
    transport::CollectiveOp,
};

use crate::{
    communicator::Shared,
    device::{DeviceMemory, HostMemory},
};

const OPERATION: &str = "warm up an HCCL group";
/// Bytes that each member sends.
const ROW: u64 = 512;

/// A barrier, one small broadcast from every member, and a gather of what was there before, with all bytes checked.
pub(crate) fn run(shared: &Shared, stream: &Arc<dyn Stream>, deadline: Instant) -> Result<()> {
    let member = &shared.member;
    let members = u64::from(member.world_size);
    let device = |len| -> Result<Arc<dyn Buffer>> { Ok(Arc::new(DeviceMemory::allocate(&member.npu, len)?)) };
    // Own bytes, then the rows that broadcasts fill, then those that the gather fills.
    let memory = device(ROW * (2 * members + 1))?;
    let row = |number: u64| BufferSlice::new(memory.clone(), ROW * number..ROW * (number + 1));
    let seen = BufferSlice::whole(Arc::new(HostMemory::allocate(&member.npu, ROW * 2 * members)?));
    let marks = seen.slice(0..ROW)?;
    // SAFETY: the memory was just allocated; nothing else has it.
    unsafe { marks.as_mut_slice() }?.fill(mark(member.rank));
    let own = row(0)?;
    stream.copy(marks.clone(), own.clone())?;
    stream.copy(marks, row(1 + u64::from(member.rank))?)?;

    shared.launch_on(stream, Vec::new(), |raw| shared.barrier(raw))?;
    let ops = (0..member.world_size)
        .map(|root| Ok(CollectiveOp { root, buffer: row(1 + u64::from(root))? }))
        .collect::<Result<Vec<_>>>()?;
    let kept = vec![BufferSlice::whole(memory.clone())];
    shared.launch_on(stream, kept.clone(), |raw| shared.broadcast(&ops, raw))?;
    let gathered = BufferSlice::new(memory.clone(), ROW * (1 + members)..ROW * (1 + 2 * members))?;
    let done = shared.launch_on(stream, kept, |raw| shared.all_gather(&own, &gathered, raw))?;
    wait(shared, &done, deadline)?;

    stream.copy(BufferSlice::new(memory.clone(), ROW..ROW * (1 + 2 * members))?, seen.clone())?;
    wait(shared, &stream.record()?, deadline)?;
    // SAFETY: the copy into it is done.
    for (number, row) in unsafe { seen.as_slice() }?.chunks(ROW as usize).enumerate() {
        let root = number as u32 % member.world_size;
        if row.iter().any(|byte| *byte != mark(root)) {
            let message = "wrong bytes arrived; the path between these NPUs is broken";
            return Err(Error::new(ErrorKind::Corrupt, OPERATION, message).with(Key::Peer, root));
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
                OPERATION,
                "the members are connected, but nothing arrived by the deadline",
            ));
        }
        pause.take();
    }
    shared.poisoned().map_or(Ok(()), Err)
}
