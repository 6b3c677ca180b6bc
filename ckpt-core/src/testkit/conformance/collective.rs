//! What every collective facet promises.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use futures_util::future::try_join_all;

use super::{Factory, LIMIT, Node, Report, Tracked, ensure, eventually, fail, form, pattern, soon};
use crate::{
    device::{BufferSlice, Event},
    error::{Error, ErrorKind, Result},
    transport::{CollectiveOp, Communicator},
};

const SIZES: [u64; 6] = [0, 1, 255, 256, 4097, (3 << 20) + 17];

/// Checks the collective facet with groups of 1 to [`Factory::max_members`].
pub async fn collective(factory: &dyn Factory) -> Result<Report> {
    let mut report = Report::default();
    let probe = Node::open_all(factory, 1)?;
    let capability = probe[0].transport.capability();
    if !capability.collective {
        ensure(probe[0].transport.collective().is_none(), || "a facet that it says it lacks".to_owned())?;
        report.skip("all", "the transport has no collective facet");
        return Ok(report);
    }
    let kind = probe[0].bench.device.kind();
    ensure(capability.devices.contains(&kind), || format!("it does not work on devices of kind {kind}"))?;
    drop(probe);
    for members in 1..=factory.max_members() {
        let name = |what: &str| format!("{what} ({members} members)");
        report.check(name("broadcast from each root"), each_root(factory, members)).await?;
        report.check(name("several broadcasts in a group"), many_ops(factory, members)).await?;
        report.check(name("groups are pipelined"), pipelined(factory, members)).await?;
        report.check(name("groups on two streams keep their order"), two_streams(factory, members)).await?;
        report.check(name("memory in flight stays alive"), keep_alive(factory, members)).await?;
        report.check(name("dropped waits and events are safe"), dropped(factory, members)).await?;
    }
    report.check("wrong operations and groups are refused", refused(factory)).await?;
    for members in 2..=factory.max_members() {
        let name = |what: &str| format!("{what} ({members} members)");
        report.check(name("abort frees those who wait for a dead member"), dead(factory, members)).await?;
        report.check(name("a join without all members ends"), absent(factory, members)).await?;
        report.check(name("two groups at once"), two_groups(factory, members)).await?;
        if factory.detects_mismatch() {
            report.check(name("different lengths are found"), mismatch(factory, members)).await?;
        } else {
            report.skip(name("different lengths are found"), "the transport cannot tell");
        }
    }
    Ok(report)
}

/// One broadcast that every member takes part in.
#[derive(Clone, Copy)]
struct Cast {
    root: u32,
    len: u64,
    seed: u64,
}

/// This member's buffers: filled on the root, holding other bytes elsewhere.
async fn buffers(node: &Node, casts: &[Cast]) -> Result<Vec<CollectiveOp>> {
    let mut ops = Vec::new();
    for cast in casts {
        let seed = if cast.root == node.rank { cast.seed } else { !cast.seed };
        ops.push(CollectiveOp {
            root: cast.root,
            buffer: node.bench.upload(&pattern(seed, cast.len)).await?,
        });
    }
    Ok(ops)
}

async fn verify(node: &Node, casts: &[Cast], ops: &[CollectiveOp]) -> Result<()> {
    for (cast, op) in casts.iter().zip(ops) {
        let what = || format!("{} bytes from {} on {}", cast.len, cast.root, node.rank);
        node.bench.expect(&op.buffer, &pattern(cast.seed, cast.len), what).await?;
    }
    Ok(())
}

/// Enqueues one group, waits, and sees whether it counts.
async fn exchange(node: &Node, communicator: &mut Communicator, casts: &[Cast]) -> Result<()> {
    let ops = buffers(node, casts).await?;
    let event = communicator.queue.enqueue(ops.clone(), &node.bench.stream).await?;
    event.done(soon()).await?;
    healthy(communicator)?;
    verify(node, casts, &ops).await
}

fn healthy(communicator: &Communicator) -> Result<()> {
    communicator.abort.poisoned().map_or(Ok(()), Err)
}

/// Runs one member's part on all members at once.
async fn all<T, F: Future<Output = Result<T>>>(
    nodes: &[Node],
    communicators: Vec<Communicator>,
    part: impl Fn(usize, Communicator) -> F,
) -> Result<Vec<T>> {
    ensure(nodes.len() == communicators.len(), || "a communicator is missing".to_owned())?;
    try_join_all(communicators.into_iter().enumerate().map(|(rank, communicator)| part(rank, communicator)))
        .await
}

async fn each_root(factory: &dyn Factory, members: u32) -> Result<()> {
    let nodes = Node::open_all(factory, members)?;
    let communicators = form(&nodes, 1).await?;
    // Nobody drops its communicator before all are through.
    let done = all(&nodes, communicators, |rank, mut communicator| {
        let node = &nodes[rank];
        async move {
            for root in 0..members {
                for len in SIZES {
                    let cast = Cast { root, len, seed: u64::from(root) * 100 + len };
                    exchange(node, &mut communicator, &[cast]).await?;
                }
            }
            exchange(node, &mut communicator, &[]).await?;
            Ok(communicator)
        }
    })
    .await?;
    done.iter().try_for_each(healthy)
}

async fn many_ops(factory: &dyn Factory, members: u32) -> Result<()> {
    let nodes = Node::open_all(factory, members)?;
    let communicators = form(&nodes, 2).await?;
    all(&nodes, communicators, |rank, mut communicator| {
        let node = &nodes[rank];
        async move {
            for round in 0..3 {
                let casts: Vec<Cast> = (0..9)
                    .map(|i| Cast {
                        root: (i as u32 + round) % members,
                        len: SIZES[(i as usize + round as usize) % SIZES.len()],
                        seed: i + u64::from(round) * 10,
                    })
                    .collect();
                exchange(node, &mut communicator, &casts).await?;
            }
            Ok(communicator)
        }
    })
    .await?;
    Ok(())
}

/// Enqueues `groups` at once, on streams in turn, and only then waits.
async fn enqueue_all(
    node: &Node,
    communicator: &mut Communicator,
    groups: &[Vec<Cast>],
    streams: usize,
) -> Result<()> {
    let mut all = Vec::new();
    for casts in groups {
        all.push(buffers(node, casts).await?);
    }
    let streams = (0..streams).map(|_| node.bench.device.stream("groups")).collect::<Result<Vec<_>>>()?;
    let mut events: Vec<Event> = Vec::new();
    for (index, ops) in all.iter().enumerate() {
        events.push(communicator.queue.enqueue(ops.clone(), &streams[index % streams.len()]).await?);
    }
    for event in &events {
        event.done(soon()).await?;
    }
    healthy(communicator)?;
    for (casts, ops) in groups.iter().zip(&all) {
        verify(node, casts, ops).await?;
    }
    Ok(())
}

fn groups(members: u32) -> Vec<Vec<Cast>> {
    let cast =
        |i: u32| Cast { root: i % members, len: 70_000 * u64::from(i % 4) + u64::from(i), seed: i.into() };
    (0..8).map(|i| vec![cast(i), cast(i + 3)]).collect()
}

async fn pipelined(factory: &dyn Factory, members: u32) -> Result<()> {
    let nodes = Node::open_all(factory, members)?;
    let communicators = form(&nodes, 3).await?;
    all(&nodes, communicators, |rank, mut communicator| {
        let node = &nodes[rank];
        async move {
            enqueue_all(node, &mut communicator, &groups(members), 1).await?;
            Ok(communicator)
        }
    })
    .await?;
    Ok(())
}

async fn two_streams(factory: &dyn Factory, members: u32) -> Result<()> {
    let nodes = Node::open_all(factory, members)?;
    let communicators = form(&nodes, 4).await?;
    all(&nodes, communicators, |rank, mut communicator| {
        let node = &nodes[rank];
        async move {
            enqueue_all(node, &mut communicator, &groups(members), 2).await?;
            Ok(communicator)
        }
    })
    .await?;
    Ok(())
}

async fn keep_alive(factory: &dyn Factory, members: u32) -> Result<()> {
    let nodes = Node::open_all(factory, members)?;
    let communicators = form(&nodes, 5).await?;
    let len = 1 << 20;
    all(&nodes, communicators, |rank, mut communicator| {
        let node = &nodes[rank];
        async move {
            let bytes = pattern(8, len);
            let (source, gone) = Tracked::buffer(&bytes)?;
            let (middle, target) = (node.bench.memory(len)?, node.bench.memory(len)?);
            let gate = super::device::close_gate(&node.bench.stream)?;
            if rank == 0 {
                let source = node.bench.device.pin(source)?;
                node.bench.stream.copy(BufferSlice::whole(source), middle.clone())?;
            } else {
                drop(source);
            }
            let op = CollectiveOp { root: 0, buffer: middle.clone() };
            let event = communicator.queue.enqueue(vec![op], &node.bench.stream).await?;
            if !factory.later_work_waits() {
                event.done(soon()).await?;
            }
            node.bench.stream.copy(middle, target.clone())?;
            if let Some(gate) = gate {
                let early = rank == 0 && gone.load(Ordering::SeqCst);
                ensure(!early, || "a source was freed too early".to_owned())?;
                let _ = gate.send(());
            }
            // Behind the broadcast in the same stream: no other wait is needed.
            node.bench.expect(&target, &bytes, || "bytes of dropped buffers".to_owned()).await?;
            event.done(soon()).await?;
            Ok(communicator)
        }
    })
    .await?;
    Ok(())
}

async fn dropped(factory: &dyn Factory, members: u32) -> Result<()> {
    let nodes = Node::open_all(factory, members)?;
    let communicators = form(&nodes, 6).await?;
    all(&nodes, communicators, |rank, mut communicator| {
        let node = &nodes[rank];
        async move {
            let cast = |seed| Cast { root: seed as u32 % members, len: 100_000, seed };
            let (first, second) = ([cast(1)], [cast(2)]);
            let (one, two) = (buffers(node, &first).await?, buffers(node, &second).await?);
            let event = communicator.queue.enqueue(one.clone(), &node.bench.stream).await?;
            // A wait that is dropped after its first poll, and an event that nobody keeps.
            let _ = tokio::time::timeout(Duration::ZERO, event.done(soon())).await;
            // Where only the group's own event tells that it is done, it must be kept.
            let kept = (!factory.later_work_waits()).then_some(event);
            let event = communicator.queue.enqueue(two.clone(), &node.bench.stream).await?;
            event.done(soon()).await?;
            if let Some(kept) = kept {
                kept.done(soon()).await?;
            }
            healthy(&communicator)?;
            verify(node, &first, &one).await?;
            verify(node, &second, &two).await?;
            Ok(communicator)
        }
    })
    .await?;
    Ok(())
}

async fn refused(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 1)?;
    let node = &nodes[0];
    let token = node.collective()?.create_token().await?;
    let outside = node.join(&token, 0, 1, soon()).await;
    ensure(outside.is_err(), || "a group without members was joined".to_owned())?;
    let nonsense = node.join(&bytes::Bytes::from_static(b"nonsense"), 1, 1, soon()).await;
    ensure(nonsense.is_err(), || "a token of nonsense was accepted".to_owned())?;
    let mut communicator = node.join(&token, 1, 1, soon()).await?;
    let op = CollectiveOp { root: 1, buffer: node.bench.memory(1)? };
    let outside = communicator.queue.enqueue(vec![op], &node.bench.stream).await;
    ensure(outside.is_err(), || "a root outside the group was accepted".to_owned())?;
    exchange(node, &mut communicator, &[Cast { root: 0, len: 10, seed: 1 }]).await
}

async fn dead(factory: &dyn Factory, members: u32) -> Result<()> {
    let nodes = Node::open_all(factory, members)?;
    let mut communicators = form(&nodes, 7).await?;
    // The last member is there and takes no part, like a process that hangs.
    let silent = communicators.pop();
    let living = &nodes[..members as usize - 1];
    let aborted = all(living, communicators, |rank, mut communicator| {
        let node = &nodes[rank];
        async move {
            let casts: Vec<Cast> = (0..members).map(|root| Cast { root, len: 5 << 20, seed: 1 }).collect();
            let ops = buffers(node, &casts).await?;
            let cause = Error::new(ErrorKind::PeerLost, "update", "the last member died")
                .with(crate::Key::Rank, rank);
            // A slow member finds another's abort here already.
            let event = communicator.queue.enqueue(ops, &node.bench.stream).await.ok();
            let waited = match &event {
                Some(event) => event.done(Instant::now() + Duration::from_millis(200)).await,
                None => Ok(()),
            };
            // On an accelerator, or after another member's abort, the event may have ended: only the poison tells.
            if waited.is_ok() {
                ensure(communicator.abort.poisoned().is_some(), || {
                    "a broadcast without a root was done".to_owned()
                })?;
            }
            let began = Instant::now();
            communicator.abort.abort(cause);
            ensure(began.elapsed() < LIMIT / 4, || "abort itself took long".to_owned())?;
            if let Some(event) = event
                && let Err(error) = event.done(soon()).await
            {
                ensure(error.kind() != ErrorKind::Timeout, || "abort did not free the event".to_owned())?;
            }
            let Some(first) = communicator.abort.poisoned() else {
                return fail("it is not poisoned after abort");
            };
            communicator.abort.abort(Error::new(ErrorKind::Internal, "update", "a second cause"));
            let stays = communicator.abort.poisoned().is_some_and(|c| c.to_string() == first.to_string());
            ensure(stays, || "a second abort changed the cause".to_owned())?;
            let op = CollectiveOp { root: 0, buffer: node.bench.memory(1)? };
            let after = communicator.queue.enqueue(vec![op], &node.bench.stream).await;
            ensure(after.is_err(), || "an aborted communicator took another group".to_owned())?;
            Ok(first)
        }
    })
    .await?;
    // Who is slow may have heard of the other's abort before its own: that is its first cause then.
    let own = aborted.iter().any(|cause| cause.message() == "the last member died");
    ensure(own && aborted.iter().all(|cause| cause.kind() == ErrorKind::PeerLost), || {
        format!("causes were {aborted:?}")
    })?;
    drop(silent);
    // The next epoch: new streams, since a failure stays with a stream.
    let nodes = nodes
        .into_iter()
        .map(|node| Ok(Node { bench: super::Bench::new(node.bench.device)?, ..node }))
        .collect::<Result<Vec<_>>>()?;
    let communicators = form(&nodes, 8).await?;
    all(&nodes, communicators, |rank, mut communicator| {
        let node = &nodes[rank];
        async move {
            exchange(node, &mut communicator, &[Cast { root: members - 1, len: 70_001, seed: 4 }]).await?;
            Ok(communicator)
        }
    })
    .await?;
    Ok(())
}

async fn absent(factory: &dyn Factory, members: u32) -> Result<()> {
    let nodes = Node::open_all(factory, members)?;
    let token = nodes[0].collective()?.create_token().await?;
    let present = &nodes[..members as usize - 1];
    let began = Instant::now();
    let deadline = began + Duration::from_millis(400);
    let joins = present.iter().map(|node| node.join(&token, members, 1, deadline));
    for outcome in futures_util::future::join_all(joins).await {
        ensure(outcome.is_err(), || "a group formed without all members".to_owned())?;
    }
    ensure(began.elapsed() < LIMIT / 4, || "a join ended long after its deadline".to_owned())?;
    // A join that is dropped in the middle leaves nothing behind.
    let token = nodes[0].collective()?.create_token().await?;
    let _ = tokio::time::timeout(Duration::from_millis(50), nodes[0].join(&token, members, 2, soon())).await;
    let communicators = form(&nodes, 3).await?;
    ensure(communicators.len() == nodes.len(), || "the next group did not form".to_owned())
}

async fn two_groups(factory: &dyn Factory, members: u32) -> Result<()> {
    let nodes = Node::open_all(factory, members)?;
    let (first, second) = futures_util::future::try_join(form(&nodes, 9), form(&nodes, 10)).await?;
    let part = |seed: u64| {
        let nodes = &nodes;
        move |rank: usize, mut communicator: Communicator| async move {
            let node = &nodes[rank];
            let ops = buffers(node, &[Cast { root: 1, len: 90_000, seed }]).await?;
            let stream = node.bench.device.stream("group")?;
            let event = communicator.queue.enqueue(ops.clone(), &stream).await?;
            event.done(soon()).await?;
            verify(node, &[Cast { root: 1, len: 90_000, seed }], &ops).await?;
            Ok(communicator)
        }
    };
    futures_util::future::try_join(all(&nodes, first, part(1)), all(&nodes, second, part(2))).await?;
    Ok(())
}

async fn mismatch(factory: &dyn Factory, members: u32) -> Result<()> {
    let nodes = Node::open_all(factory, members)?;
    let communicators = form(&nodes, 11).await?;
    all(&nodes, communicators, |rank, mut communicator| {
        let node = &nodes[rank];
        async move {
            let len = if rank == 0 { 200 } else { 100 };
            let op = CollectiveOp { root: 0, buffer: node.bench.memory(len)? };
            let outcome = match communicator.queue.enqueue(vec![op], &node.bench.stream).await {
                Ok(event) => event.done(soon()).await,
                // Another member has found it already.
                Err(error) => Err(error),
            };
            eventually("poison of a member", || communicator.abort.poisoned().is_some()).await?;
            let cause = communicator.abort.poisoned().map(|cause| cause.kind());
            ensure(cause == Some(ErrorKind::Corrupt), || {
                format!("the cause is {cause:?} after {outcome:?}")
            })?;
            Ok(communicator)
        }
    })
    .await?;
    Ok(())
}
