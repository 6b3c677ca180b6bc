//! One batch of reads or writes with one owner: cut into pieces, put on lanes, tried again elsewhere when a lane fails.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::Event,
    transport::{Transfer, Way},
};
use smallvec::SmallVec;

use crate::{
    batch::{Batch, Failure, Part},
    connection::Connection,
    flying,
    lane::{FLUSHED, Lane},
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

type Parts = SmallVec<[Part; 1]>;
type Claims = SmallVec<[Claim; 1]>;

/// What is on a device now.
type Current = Mutex<Option<(Arc<Connection>, Arc<Batch>)>>;

/// A batch with one owner.
pub(crate) struct Job {
    pub(crate) way: Way,
    pub(crate) transfers: SmallVec<[(Transfer, Arc<Descriptor>); 1]>,
}

/// What is to be brought to its end.
enum Work {
    Begin(Job),
    /// It was posted at once.
    GoOn(Arc<Connection>, Arc<Batch>),
}

/// Moves the bytes. When it returns, no device touches this side's memory any more.
pub(crate) async fn run(node: &Arc<Node>, peer: Peer, job: Job, deadline: Instant) -> Result<()> {
    if peer.1 == node.id {
        return own(node, job, deadline).await.map_err(|e| e.with(Key::Peer, peer.0));
    }
    drive(node, peer, job.way, Work::Begin(job), deadline).await
}

/// Posts the transfer if nothing has to be waited for before and one request carries it; else gives it back.
pub(crate) fn post_one(
    node: &Arc<Node>,
    way: Way,
    transfer: Transfer,
    deadline: Instant,
) -> Result<Event, Transfer> {
    let len = transfer.memory.len_bytes();
    let ready = || {
        if !(1..=PIECE_BYTES).contains(&len) {
            return None;
        }
        let (descriptor, connection) = node.at_hand(&transfer.region, &claim(way, &transfer))?;
        let registered = node.local.get_now(transfer.memory.buffer())?;
        Some((descriptor, registered, connection.next_lane()?, connection))
    };
    let Some((descriptor, registered, lane, connection)) = ready() else { return Err(transfer) };
    let batch = flying::batch(node, connection, way, 1, len, deadline);
    let pieces: Arc<Batch> = batch.clone();
    batch.waiter.connection.lanes[lane].submit(&pieces, [Part { transfer, registered, descriptor }]);
    Ok(Event::shared(batch))
}

/// Posts the batch if nothing has to be waited for before: registered, and known to the owner.
pub(crate) fn post_now(
    node: &Arc<Node>,
    connection: Arc<Connection>,
    job: &Job,
    deadline: Instant,
) -> Option<Event> {
    if !connection.knows(&claims(job.way, job.transfers.iter().map(|(transfer, _)| transfer))) {
        return None;
    }
    let mut parts = Parts::new();
    for (transfer, descriptor) in &job.transfers {
        if transfer.memory.len_bytes() > 0 {
            let registered = node.local.get_now(transfer.memory.buffer())?;
            cut(transfer, descriptor, &registered, &mut parts).ok()?;
        }
    }
    let bytes = parts.iter().map(|part| part.transfer.memory.len_bytes()).sum();
    let lanes = connection.clone();
    let lanes = lanes.open_lanes();
    if lanes.is_empty() {
        return None;
    }
    let batch = flying::batch(node, connection, job.way, parts.len(), bytes, deadline);
    submit(&lanes, &(batch.clone() as Arc<Batch>), parts);
    Some(Event::shared(batch))
}

/// Goes on with a batch that was posted at once.
pub(crate) async fn go_on(
    node: &Arc<Node>,
    connection: Arc<Connection>,
    batch: Arc<Batch>,
    deadline: Instant,
) -> Result<()> {
    let (way, peer) = (batch.way, connection.peer);
    drive(node, peer, way, Work::GoOn(connection, batch), deadline).await
}

async fn drive(node: &Arc<Node>, peer: Peer, way: Way, work: Work, deadline: Instant) -> Result<()> {
    let current = Current::default();
    let trying = attempts(node, peer, way, work, &current);
    let outcome = tokio::time::timeout_at(deadline.into(), trying).await;
    let outcome = outcome.unwrap_or_else(|_| {
        let what = "the bytes did not arrive by the deadline";
        let mut error = Error::new(ErrorKind::Timeout, way.operation(), what);
        let current = current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((connection, _)) = &*current {
            let names = connection.nics.iter().map(|nic| nic.name());
            error = error.with(Key::Hca, names.collect::<Vec<_>>().join(","));
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
    let claims = claims(job.way, job.transfers.iter().map(|(transfer, _)| transfer));
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

async fn attempts(node: &Arc<Node>, peer: Peer, way: Way, work: Work, current: &Current) -> Result<()> {
    let operation = way.operation();
    let (mut parts, mut wanted, mut descriptor, mut posted) = match work {
        Work::GoOn(connection, batch) => (Parts::new(), Claims::new(), None, Some((connection, batch))),
        Work::Begin(job) => {
            let descriptor = job.transfers.first().map(|(_, descriptor)| descriptor.clone());
            (
                cut_all(node, &job).await?,
                claims(way, job.transfers.iter().map(|(transfer, _)| transfer)),
                descriptor,
                None,
            )
        }
    };
    let mut last = None;
    for _ in 0..ATTEMPTS {
        let (connection, batch) = match (posted.take(), &descriptor) {
            (Some((connection, batch)), _) => (connection, Ok(batch)),
            (None, None) => return Ok(()),
            (None, Some(descriptor)) => {
                let connection = match node.connection(peer, descriptor).await {
                    Ok(connection) => connection,
                    Err(error) => return Err(last.unwrap_or(error)),
                };
                if let Err(error) = connection.make_sure(&wanted).await {
                    // A connection that was kept may have ended since: then a new one tells what is the matter.
                    if error.kind() != ErrorKind::PeerLost {
                        return Err(error);
                    }
                    connection.lost.tell();
                    last = Some(error);
                    continue;
                }
                let batch = post(&connection, way, std::mem::take(&mut parts));
                (connection, batch)
            }
        };
        let failures = match batch {
            Ok(batch) => settled(&connection, batch, current).await,
            Err(parts) => {
                let failed = |part| Failure { part, error: FLUSHED, hca: String::new(), lane: 0 };
                parts.into_iter().map(failed).collect()
            }
        };
        if failures.is_empty() {
            // Each piece met the region that its key is of, while that lived.
            return Ok(());
        }
        wanted = claims(way, failures.iter().map(|failure| &failure.part.transfer));
        let word = connection.check(&wanted).await;
        if let Err(error) = word
            && error.kind() != ErrorKind::PeerLost
        {
            return Err(error);
        }
        let culprit = failures.iter().find(|failure| failure.error != FLUSHED && !is_flush(failure));
        if let Some(failure) = culprit {
            let lane = connection.lanes.get(failure.lane);
            let error = describe(operation, failure, lane.map(|lane| &**lane));
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
                describe(operation, failure, lane)
            });
        }
        descriptor = failures.first().map(|failure| failure.part.descriptor.clone());
        parts = failures.into_iter().map(|failure| failure.part).collect();
    }
    Err(last.unwrap_or_else(|| Error::new(ErrorKind::PeerLost, operation, "every lane to the owner failed")))
}

fn is_flush(failure: &Failure) -> bool {
    matches!(failure.error, crate::VerbsError::Completion { status: 5, .. })
}

/// What the owner is asked for each region.
fn claims<'a>(way: Way, transfers: impl Iterator<Item = &'a Transfer>) -> Claims {
    let mut furthest: BTreeMap<(u64, u64), Claim> = BTreeMap::new();
    for claim in transfers.map(|transfer| claim(way, transfer)) {
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
        let memory = transfer.memory.slice(start..end)?;
        parts.push(Part {
            transfer: Transfer { region: transfer.region.clone(), offset: transfer.offset + start, memory },
            registered: registered.clone(),
            descriptor: descriptor.clone(),
        });
        start = end;
    }
    Ok(())
}

/// Puts `parts` on the connection's lanes; gives them back if none is open.
fn post(connection: &Connection, way: Way, parts: Parts) -> Result<Arc<Batch>, Parts> {
    let lanes = connection.open_lanes();
    if lanes.is_empty() {
        return Err(parts);
    }
    let batch: Arc<Batch> = Arc::new(Batch::new(way, parts.len(), ()));
    submit(&lanes, &batch, parts);
    Ok(batch)
}

/// Parts go to the lanes in turn; each lane is handed all of its own at once.
fn submit(lanes: &[&Arc<Lane>], batch: &Arc<Batch>, parts: Parts) {
    let mut shares: SmallVec<[Parts; 4]> = lanes.iter().map(|_| Parts::new()).collect();
    let count = shares.len();
    for (index, part) in parts.into_iter().enumerate() {
        shares[index % count].push(part);
    }
    for (lane, share) in lanes.iter().zip(shares) {
        lane.submit(batch, share);
    }
}

/// Waits until none of the batch is on a device; answers what failed.
async fn settled(connection: &Arc<Connection>, batch: Arc<Batch>, current: &Current) -> Vec<Failure> {
    *current.lock().unwrap_or_else(PoisonError::into_inner) = Some((connection.clone(), batch.clone()));
    let _reliance = connection.rely();
    let failures = tokio::select! {
        failures = batch.finished() => failures,
        () = connection.lost.told() => {
            // The owner is gone: the queue pairs would learn of it only after all their retries.
            connection.kill();
            batch.finished().await
        }
    };
    *current.lock().unwrap_or_else(PoisonError::into_inner) = None;
    failures
}

fn describe(operation: &'static str, failure: &Failure, lane: Option<&Lane>) -> Error {
    let error = Error::from(failure.error.clone());
    let theirs =
        lane.and_then(|lane| failure.part.descriptor.nics.get(lane.remote_nic)).map_or("?", |nic| &nic.hca);
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
