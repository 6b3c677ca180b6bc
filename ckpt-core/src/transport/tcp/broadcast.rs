//! One group of broadcasts: every lane to every peer at once, bytes straight from and to their places.

use std::{io, ops::Range, sync::Arc};

use futures_util::future::{BoxFuture, FutureExt, try_join_all};
use tokio::task::JoinSet;

use super::{
    mesh::{Mesh, Peer},
    socket::{read_exact, write_all},
    wire::StripeHeader,
};
use crate::{
    device::BufferSlice,
    error::{Error, ErrorKind, Key, Result},
    transport::CollectiveOp,
};

/// Stripes are not made smaller than this.
const STRIPE_BYTES: u64 = 64 << 10;
/// Groups below this are done on one task: spawning costs more.
const SPAWN_BYTES: u64 = 1 << 20;

/// The part of operation `op` that goes over `lane`; `None` if none does. Small operations take one lane each, in turn.
fn stripe(len_bytes: u64, op: usize, lane: usize, lanes: usize) -> Option<Range<u64>> {
    let used = (len_bytes / STRIPE_BYTES).clamp(1, lanes as u64);
    let turn = ((lane + lanes - op % lanes) % lanes) as u64;
    if turn >= used {
        return None;
    }
    let size = len_bytes.div_ceil(used).next_multiple_of(4096);
    let start = (turn * size).min(len_bytes);
    let end = (start + size).min(len_bytes);
    (turn == 0 || start < end).then_some(start..end)
}

/// A job that its runtime dropped in the middle is a dead member to the others.
struct Unfinished {
    mesh: Arc<Mesh>,
    armed: bool,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.armed {
            let message = "a member's runtime ended in the middle of a broadcast";
            self.mesh
                .fail(Error::new(ErrorKind::PeerLost, "broadcast", message).with(Key::Rank, self.mesh.rank));
        }
    }
}

/// One member's part of group `number`.
pub(super) async fn run(mesh: Arc<Mesh>, number: u64, ops: Vec<CollectiveOp>) -> Result<()> {
    mesh.poison.check()?;
    let mut unfinished = Unfinished { mesh: mesh.clone(), armed: true };
    let ops: Arc<[CollectiveOp]> = ops.into();
    let mut work: Vec<BoxFuture<'static, Result<()>>> = Vec::new();
    for (index, peer) in mesh.peers.iter().enumerate() {
        for lane in 0..peer.lanes.len() {
            if ops.iter().any(|op| op.root == mesh.rank) {
                work.push(send(mesh.clone(), index, lane, number, ops.clone()).boxed());
            }
            if ops.iter().any(|op| op.root == peer.rank) {
                work.push(receive(mesh.clone(), index, lane, number, ops.clone()).boxed());
            }
        }
    }
    let outcome = if ops.iter().map(|op| op.buffer.len_bytes()).sum::<u64>() < SPAWN_BYTES {
        tokio::select! {
            outcome = try_join_all(work) => outcome.map(drop),
            cause = mesh.poison.wait() => Err(cause),
        }
    } else {
        spread(&mesh, work).await
    };
    unfinished.armed = false;
    outcome
}

/// Runs every lane on a task of its own, and ends only when none of them touches a buffer any more.
async fn spread(mesh: &Mesh, work: Vec<BoxFuture<'static, Result<()>>>) -> Result<()> {
    let mut tasks: JoinSet<Result<()>> = work.into_iter().collect();
    let all = async {
        while let Some(task) = tasks.join_next().await {
            task.map_err(|e| Error::new(ErrorKind::Internal, "broadcast", "a task ended").caused_by(e))
                .flatten()?;
        }
        Ok(())
    };
    let outcome = tokio::select! {
        outcome = all => outcome,
        cause = mesh.poison.wait() => Err(cause),
    };
    if let Err(error) = outcome {
        // The lanes are shut by this, and aborted tasks end at their next wait.
        let cause = mesh.fail(error);
        tasks.shutdown().await;
        return Err(cause);
    }
    Ok(())
}

fn header(number: u64, index: usize, op: &CollectiveOp) -> StripeHeader {
    StripeHeader { number, op: index as u32, root: op.root, len_bytes: op.buffer.len_bytes() }
}

/// What one lane carries of the operations that come from `root`: their numbers, and the stripes of their buffers.
fn stripes(
    ops: &[CollectiveOp],
    root: u32,
    lane: usize,
    lanes: usize,
) -> impl Iterator<Item = (usize, &CollectiveOp, Range<u64>)> {
    ops.iter()
        .enumerate()
        .filter(move |(_, op)| op.root == root)
        .filter_map(move |(index, op)| Some((index, op, stripe(op.buffer.len_bytes(), index, lane, lanes)?)))
}

/// Sends this member's operations over one lane.
async fn send(
    mesh: Arc<Mesh>,
    peer: usize,
    lane: usize,
    number: u64,
    ops: Arc<[CollectiveOp]>,
) -> Result<()> {
    let peer = &mesh.peers[peer];
    for (index, op, range) in stripes(&ops, mesh.rank, lane, peer.lanes.len()) {
        let header = header(number, index, op).encode();
        if let Err(error) = send_stripe(peer, lane, &header, &op.buffer.slice(range)?).await {
            return Err(mesh.broken(peer, error).await);
        }
    }
    Ok(())
}

async fn send_stripe(peer: &Peer, lane: usize, header: &[u8], bytes: &BufferSlice) -> io::Result<()> {
    // SAFETY: the range is a source of this group, which the caller may not write before the event has completed; `ops`
    // keeps it mapped.
    let bytes = unsafe { bytes.as_slice() }.map_err(io::Error::other)?;
    write_all(&peer.lanes[lane], header, bytes).await
}

/// Receives one peer's operations from one lane.
async fn receive(
    mesh: Arc<Mesh>,
    peer: usize,
    lane: usize,
    number: u64,
    ops: Arc<[CollectiveOp]>,
) -> Result<()> {
    let peer = &mesh.peers[peer];
    for (index, op, range) in stripes(&ops, peer.rank, lane, peer.lanes.len()) {
        let mut found = [0; StripeHeader::BYTES];
        if let Err(error) = read_exact(&peer.lanes[lane], &mut found).await {
            return Err(mesh.broken(peer, error).await);
        }
        if found != header(number, index, op).encode() {
            let message = "members enqueued different operations in the same group";
            return Err(mesh.fail(
                Error::new(ErrorKind::Corrupt, "broadcast", message)
                    .with(Key::Rank, peer.rank)
                    .with(Key::Peer, peer.address),
            ));
        }
        if let Err(error) = receive_stripe(peer, lane, &op.buffer.slice(range)?).await {
            return Err(mesh.broken(peer, error).await);
        }
    }
    Ok(())
}

async fn receive_stripe(peer: &Peer, lane: usize, bytes: &BufferSlice) -> io::Result<()> {
    // SAFETY: the range is a destination of this group: nobody else may touch it before the event has completed, each
    // stripe belongs to one lane, and `ops` keeps it mapped.
    let bytes = unsafe { bytes.as_mut_slice() }.map_err(io::Error::other)?;
    read_exact(&peer.lanes[lane], bytes).await
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::stripe;

    proptest! {
        #[test]
        fn stripes_tile_the_operation(len in 0_u64..1 << 24, op in 0_usize..9, lanes in 1_usize..9) {
            let mut parts: Vec<_> = (0..lanes).filter_map(|lane| stripe(len, op, lane, lanes)).collect();
            parts.sort_by_key(|part| (part.start, part.end));
            prop_assert!(!parts.is_empty());
            prop_assert_eq!(parts[0].start, 0);
            prop_assert_eq!(parts[parts.len() - 1].end, len);
            prop_assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
        }
    }
}
