//! Writes into another process's memory. A request is followed by its bytes; the answer comes when they are in place.
//!
//! The owner takes them into memory of its own and copies them from there while the region lives: nothing that a slow
//! or dead writer does can reach memory that was released.

use std::io;

use futures_util::future::try_join;

use super::{
    link::Link,
    node::Node,
    one_sided::{FINE, IDLE_TIME, PIECE_BYTES, PIECE_TIME, Piece, answer_head, refuse, take_answer},
    socket::{Heard, read_exact, write_all},
    wire::{RangeRequest, broken},
};
use crate::{
    error::{Error, ErrorKind, Result},
    transport::Way,
};

/// Taken from the socket, and put in place, at a time: what fits into the processor's caches.
const CHUNK_BYTES: usize = 256 << 10;

/// Takes one writer's bytes until it leaves.
pub(super) async fn serve(node: &Node, stream: &Link) {
    let mut request = [0; RangeRequest::BYTES];
    let mut chunk = Vec::new();
    while let Ok(Ok(())) = tokio::time::timeout(IDLE_TIME, read_exact(stream, &mut request)).await {
        let taken = take(node, stream, RangeRequest::decode(&request), &mut chunk);
        match tokio::time::timeout(PIECE_TIME, taken).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return tracing::debug!(%error, "a writer left"),
            Err(_) => return tracing::warn!("a writer did not bring its bytes in time"),
        }
    }
}

async fn take(node: &Node, stream: &Link, request: RangeRequest, chunk: &mut Vec<u8>) -> io::Result<()> {
    let RangeRequest { generation, address, offset, len_bytes } = request;
    if len_bytes > PIECE_BYTES {
        let what = format!("{len_bytes} bytes at once are too many");
        refuse(stream, &Error::new(ErrorKind::Corrupt, Way::Write.operation(), what)).await?;
        // What follows is not looked at.
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut target = node.regions.target(generation, address, offset, len_bytes);
    let mut start = 0;
    // Also the bytes of a write that is refused are taken: the next request is behind them.
    while start < len_bytes {
        let len = (CHUNK_BYTES as u64).min(len_bytes - start) as usize;
        chunk.resize(chunk.len().max(len), 0);
        read_exact(stream, &mut chunk[..len]).await?;
        target = target.and_then(|target| target.put(start, &chunk[..len]).map(|()| target));
        start += len as u64;
    }
    match target.and_then(|target| target.check()) {
        Ok(()) => write_all(stream, &answer_head(FINE, len_bytes), &[]).await,
        Err(error) => refuse(stream, &error).await,
    }
}

/// The writer's half: all pieces, and the answers meanwhile.
pub(super) async fn write(stream: &Link, share: &[Piece], heard: &Heard) -> Result<()> {
    let bring = async {
        for piece in share {
            // SAFETY: the source belongs to this write until its event has completed, and `piece` keeps it mapped.
            let bytes = unsafe { piece.memory.as_slice() }?;
            write_all(stream, &piece.request.encode(), bytes).await.map_err(broken)?;
        }
        Ok(())
    };
    let hear = async {
        for piece in share {
            if take_answer(Way::Write, stream, heard).await? != piece.memory.len_bytes() {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    Way::Write.operation(),
                    "the owner's answer does not fit the request",
                ));
            }
        }
        Ok(())
    };
    try_join(bring, hear).await.map(drop)
}
