//! One batch of reads or writes with one owner: cut into pieces, put on lanes, tried again elsewhere when a lane fails.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::BufferSlice,
    transport::{Transfer, Way},
};
use smallvec::SmallVec;

use crate::{
    connection::Connection,
    lane::{Batch, FLUSHED, Failure, Lane, Piece},
    memory::{Claim, MrSet, transfer_own},
    node::{Node, Peer},
    wire::Descriptor,
};

/// One work request asks for at most this much.
const PIECE_BYTES: u64 = 1 << 20;
/// Times that pieces are tried before their failure is the batch's.
const ATTEMPTS: usize = 4;
/// A device flushes a queue pair at once; this long a batch waits for it after its deadline.
const QUIET: Duration = Duration::from_secs(2);

/// A part of one transfer.
#[derive(Clone)]
struct Part {
    memory: BufferSlice,
    registered: Arc<MrSet>,
    remote_address: u64,
    descriptor: Arc<Descriptor>,
}

type Parts = SmallVec<[Part; 1]>;

/// What is on a device now.
type Current = Mutex<Option<(Arc<Connection>, Arc<Batch>)>>;

/// A batch with one owner.
pub(crate) struct Job {
    pub(crate) way: Way,
    pub(crate) transfers: SmallVec<[(Transfer, Arc<Descriptor>); 1]>,
}

/// Moves the bytes. When it returns, no device touches this side's memory any more.
pub(crate) async fn run(node: &Arc<Node>, peer: Peer, job: Job, deadline: Instant) -> Result<()> {
    if peer.1 == node.id {
        return own(node, job, deadline).await.map_err(|e| e.with(Key::Peer, peer.0));
    }
    drive(node, peer, job, None, deadline).await
}

/// A batch that was posted at once.
pub(crate) struct Flight {
    pub(crate) connection: Arc<Connection>,
    pub(crate) batch: Arc<Batch>,
}

/// Posts the batch if nothing has to be waited for before: registered, and known to the owner.
pub(crate) fn post_now(node: &Node, connection: Arc<Connection>, job: &Job) -> Option<Flight> {
    let batch = match &job.transfers[..] {
        [(transfer, descriptor)] if (1..=PIECE_BYTES).contains(&transfer.memory.len_bytes()) => {
            if !connection.knows(&[claim(job.way, transfer)]) {
                return None;
            }
            let registered = node.local.get_now(transfer.memory.buffer())?;
            post_one(&connection, job.way, transfer, descriptor, registered)?
        }
        transfers => {
            if !connection.knows(&claims(job)) {
                return None;
            }
            let mut parts = Parts::new();
            for (transfer, descriptor) in transfers {
                if transfer.memory.len_bytes() > 0 {
                    let registered = node.local.get_now(transfer.memory.buffer())?;
                    cut(transfer, descriptor, &registered, &mut parts).ok()?;
                }
            }
            post(&connection, job.way, &parts)?
        }
    };
    Some(Flight { connection, batch })
}

/// As [`post`], for a transfer that is one piece.
fn post_one(
    connection: &Connection,
    way: Way,
    transfer: &Transfer,
    descriptor: &Descriptor,
    registered: Arc<MrSet>,
) -> Option<Arc<Batch>> {
    let lane = connection.next_lane()?;
    let batch = Batch::new(1);
    lane.submit(std::iter::once(Piece {
        batch: batch.clone(),
        index: 0,
        way,
        memory: transfer.memory.clone(),
        registered,
        remote_address: transfer.region.address + transfer.offset,
        remote_key: descriptor.key(lane.remote_nic),
    }));
    Some(batch)
}

/// Goes on with a batch, to its end.
pub(crate) async fn drive(
    node: &Arc<Node>,
    peer: Peer,
    job: Job,
    flight: Option<Flight>,
    deadline: Instant,
) -> Result<()> {
    let operation = job.way.operation();
    let current = Current::default();
    let trying = attempts(node, peer, &job, flight, &current);
    let outcome = tokio::time::timeout_at(deadline.into(), trying).await;
    let outcome = outcome.unwrap_or_else(|_| {
        let what = "the bytes did not arrive by the deadline";
        let mut error = Error::new(ErrorKind::Timeout, operation, what);
        let current = current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((connection, _)) = &*current {
            let names = connection.lanes.iter().map(|lane| lane.nic.name());
            error = error.with(
                Key::Hca,
                names.collect::<std::collections::BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(","),
            );
        }
        Err(error)
    });
    let flying = current.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some((connection, batch)) = flying {
        connection.kill();
        if tokio::time::timeout(QUIET, batch.finished()).await.is_err() {
            // The pieces own their memory, so nothing breaks but the promise that it may be reused.
            tracing::error!(peer = %peer.0, "a device does not let go of a batch that has failed");
        }
    }
    outcome.map_err(|e| e.with(Key::Peer, peer.0))
}

/// Transfers with this process's own regions are copies: a NIC would carry the bytes twice over its link, and some setups
/// do not route to themselves.
async fn own(node: &Arc<Node>, job: Job, deadline: Instant) -> Result<()> {
    let operation = job.way.operation();
    let late = move || {
        let what = "the bytes were not copied by the deadline";
        let error = || Err(Error::new(ErrorKind::Timeout, operation, what));
        if Instant::now() < deadline { Ok(()) } else { error() }
    };
    let claims = claims(&job);
    node.regions.check(&claims)?;
    let regions = node.regions.clone();
    let copied = tokio::task::spawn_blocking(move || {
        job.transfers.iter().try_for_each(|(transfer, _)| transfer_own(&regions, job.way, transfer, late))
    });
    copied
        .await
        .unwrap_or_else(|e| Err(Error::new(ErrorKind::Internal, operation, "the task ended").caused_by(e)))?;
    late()?;
    node.regions.check(&claims)
}

async fn attempts(
    node: &Arc<Node>,
    peer: Peer,
    job: &Job,
    mut flight: Option<Flight>,
    current: &Current,
) -> Result<()> {
    let Some((_, descriptor)) = job.transfers.first() else { return Ok(()) };
    let operation = job.way.operation();
    let claims = claims(job);
    // Those of a batch that was posted already are cut again if some fail.
    let mut parts = match &flight {
        Some(_) => Parts::new(),
        None => cut_all(node, job).await?,
    };
    let mut last = None;
    for _ in 0..ATTEMPTS {
        let (connection, batch) = match flight.take() {
            Some(Flight { connection, batch }) => (connection, Some(batch)),
            None => {
                let connection = match node.connection(peer, descriptor).await {
                    Ok(connection) => connection,
                    Err(error) => return Err(last.unwrap_or(error)),
                };
                if let Err(error) = connection.make_sure(&claims).await {
                    // A connection that was kept may have ended since: then a new one tells what is the matter.
                    if error.kind() != ErrorKind::PeerLost {
                        return Err(error);
                    }
                    connection.lost.cancel();
                    last = Some(error);
                    continue;
                }
                let batch = post(&connection, job.way, &parts);
                (connection, batch)
            }
        };
        let failures = match batch {
            Some(batch) => settled(&connection, batch, current).await,
            None => {
                let failed = |index| Failure { index, error: FLUSHED, hca: String::new(), lane: 0 };
                (0..parts.len()).map(failed).collect()
            }
        };
        if failures.is_empty() {
            // Each piece met the region that its key is of, while that lived.
            return Ok(());
        }
        let word = connection.check(&claims).await;
        if let Err(error) = word
            && error.kind() != ErrorKind::PeerLost
        {
            return Err(error);
        }
        let culprit = failures.iter().find(|failure| failure.error != FLUSHED && !is_flush(failure));
        if let Some(failure) = culprit {
            let lane = connection.lanes.get(failure.lane);
            let error = describe(operation, failure, lane.map(|lane| &**lane), descriptor);
            if error.kind() != ErrorKind::PeerLost {
                return Err(error);
            }
            tracing::warn!(%error, peer = %peer.0, "a lane failed; its pieces are tried elsewhere");
            if let Some(lane) = lane {
                node.suspect(peer, (lane.nic.index, lane.remote_nic));
            }
            last = Some(error);
        } else if last.is_none() {
            last = failures.first().map(|failure| {
                let lane = connection.lanes.get(failure.lane).map(|lane| &**lane);
                describe(operation, failure, lane, descriptor)
            });
        }
        if parts.is_empty() {
            parts = cut_all(node, job).await?;
        }
        let failed: Parts = failures.iter().filter_map(|failure| parts.get(failure.index).cloned()).collect();
        parts = failed;
    }
    Err(last.unwrap_or_else(|| Error::new(ErrorKind::PeerLost, operation, "every lane to the owner failed")))
}

fn is_flush(failure: &Failure) -> bool {
    matches!(failure.error, crate::VerbsError::Completion { status: 5, .. })
}

/// What the owner is asked for each region.
fn claims(job: &Job) -> SmallVec<[Claim; 1]> {
    let mut furthest: BTreeMap<(u64, u64), Claim> = BTreeMap::new();
    for claim in job.transfers.iter().map(|(transfer, _)| claim(job.way, transfer)) {
        let known = furthest.entry((claim.generation, claim.address)).or_insert(claim);
        known.end = known.end.max(claim.end);
    }
    furthest.into_values().collect()
}

fn claim(way: Way, transfer: &Transfer) -> Claim {
    Claim {
        generation: transfer.region.generation,
        address: transfer.region.address,
        end: transfer.offset + transfer.memory.len_bytes(),
        write: way == Way::Write,
    }
}

async fn cut_all(node: &Node, job: &Job) -> Result<Parts> {
    let mut parts = Parts::new();
    for (transfer, descriptor) in &job.transfers {
        if transfer.memory.len_bytes() > 0 {
            let registered = node.local.get(&node.nics, transfer.memory.buffer()).await?;
            cut(transfer, descriptor, &registered, &mut parts)?;
        }
    }
    Ok(parts)
}

fn cut(
    transfer: &Transfer,
    descriptor: &Arc<Descriptor>,
    registered: &Arc<MrSet>,
    parts: &mut Parts,
) -> Result<()> {
    let (mut start, len) = (0, transfer.memory.len_bytes());
    while start < len {
        let end = len.min(start + PIECE_BYTES);
        parts.push(Part {
            memory: transfer.memory.slice(start..end)?,
            registered: registered.clone(),
            remote_address: transfer.region.address + transfer.offset + start,
            descriptor: descriptor.clone(),
        });
        start = end;
    }
    Ok(())
}

/// Puts `parts` on the connection's lanes; `None` if none is open.
fn post(connection: &Arc<Connection>, way: Way, parts: &[Part]) -> Option<Arc<Batch>> {
    let lanes = connection.open_lanes();
    if lanes.is_empty() {
        return None;
    }
    let batch = Batch::new(parts.len());
    // Parts go to the lanes in turn; each lane is handed all of its own at once.
    for (first, lane) in lanes.iter().enumerate().take(parts.len()) {
        lane.submit(parts.iter().enumerate().skip(first).step_by(lanes.len()).map(|(index, part)| Piece {
            batch: batch.clone(),
            index,
            way,
            memory: part.memory.clone(),
            registered: part.registered.clone(),
            remote_address: part.remote_address,
            remote_key: part.descriptor.key(lane.remote_nic),
        }));
    }
    Some(batch)
}

/// Waits until none of the batch is on a device; answers what failed.
async fn settled(connection: &Arc<Connection>, batch: Arc<Batch>, current: &Current) -> Vec<Failure> {
    *current.lock().unwrap_or_else(PoisonError::into_inner) = Some((connection.clone(), batch.clone()));
    connection.attend();
    let failures = tokio::select! {
        failures = batch.finished() => failures,
        () = connection.lost.cancelled() => {
            // The owner is gone: the queue pairs would learn of it only after all their retries.
            connection.kill();
            batch.finished().await
        }
    };
    *current.lock().unwrap_or_else(PoisonError::into_inner) = None;
    failures
}

fn describe(
    operation: &'static str,
    failure: &Failure,
    lane: Option<&Lane>,
    descriptor: &Descriptor,
) -> Error {
    let error = Error::from(failure.error.clone());
    let theirs = lane.and_then(|lane| descriptor.nics.get(lane.remote_nic)).map_or("?", |nic| &nic.hca);
    let what = match error.kind() {
        ErrorKind::PeerLost => "the owner's device does not answer: the link or the owner is down",
        ErrorKind::Aborted => "the queue pair ended before the bytes arrived",
        _ => "the devices refused the request",
    };
    let kind = if error.kind() == ErrorKind::Aborted { ErrorKind::PeerLost } else { error.kind() };
    let code = error.get(Key::Code).unwrap_or_default().to_owned();
    let mut named = Error::new(kind, operation, format!("{what} (owner's device {theirs})"))
        .with(Key::Hca, &failure.hca)
        .with(Key::Code, code);
    if let Some(lane) = lane {
        named = named.with(Key::Port, lane.nic.port);
    }
    named.caused_by(error)
}
