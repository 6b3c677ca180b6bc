//! What every one-sided facet that writes promises.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use futures_util::future::try_join_all;

use super::{
    Factory, LIMIT, Node, Report, Tracked, ensure, fail,
    one_sided::{PAST_DEADLINES, REGION, memory, same, target},
    pattern, soon,
};
use crate::{
    device::BufferSlice,
    error::{Error, ErrorKind, Result},
    transport::{Registration, RemoteRegion, WriteOp},
};

/// Bytes that no pattern is made of.
const UNTOUCHED: u8 = 0xEE;

pub(super) async fn writes(factory: &dyn Factory, report: &mut Report) -> Result<()> {
    let probe = Node::open_all(factory, 1)?;
    let capability = probe[0].transport.capability();
    drop(probe);
    if !capability.one_sided_write {
        report.check("writes are refused", refused(factory)).await?;
        report.skip("writes", "the transport reads only");
        return Ok(());
    }
    report.check("writes of any size and place", ranges(factory)).await?;
    report.check("several writers at once", writers(factory)).await?;
    report.check("writes into a rank's own memory", own(factory)).await?;
    report.check("a region for reading is not written", read_only(factory)).await?;
    report.check("writes outside the region are refused", outside(factory)).await?;
    report.check("writes into a released region fail", released(factory)).await?;
    report.check("a write ends by its deadline", deadline(factory)).await?;
    report.check("a batch of writes whose event is dropped harms nobody", dropped(factory)).await?;
    if capability.across_processes {
        report.check("a dead owner is a writer's error", dead(factory)).await?;
    } else {
        report.skip("a dead owner is a writer's error", "owner and writer are one process");
    }
    Ok(())
}

fn write(region: &RemoteRegion, offset: u64, from: &BufferSlice) -> WriteOp {
    WriteOp { region: Arc::new(region.clone()), offset, from: from.clone() }
}

/// Memory of `node` that peers may write, and its registration.
async fn lend(node: &Node, len: u64) -> Result<(BufferSlice, Arc<dyn Registration>)> {
    let slice = target(node, len)?;
    let registration = node.one_sided()?.register_writable(slice.buffer().clone()).await?;
    ensure(registration.region().len_bytes == len, || "the region has another length".to_owned())?;
    Ok((slice, registration))
}

async fn put(node: &Node, region: &RemoteRegion, offset: u64, bytes: &[u8]) -> Result<()> {
    let from = node.bench.host(bytes)?;
    node.one_sided()?.post_write(vec![write(region, offset, &from)], soon())?.done(soon()).await
}

/// The error of a write that must fail, whether when posted or later.
async fn error_of(node: &Node, op: WriteOp, deadline: Instant) -> Result<Error> {
    match node.one_sided()?.post_write(vec![op], deadline) {
        Err(error) => Ok(error),
        Ok(event) => match event.done(soon()).await {
            Err(error) => Ok(error),
            Ok(()) => fail("a write that must fail was done"),
        },
    }
}

async fn refused(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 1)?;
    let buffer = memory(&nodes[0], &pattern(20, 10))?;
    let one_sided = nodes[0].one_sided()?;
    let registered = one_sided.register_writable(buffer).await.map(drop);
    let posted = one_sided.post_write(Vec::new(), soon()).map(drop);
    for outcome in [registered, posted] {
        ensure(outcome.is_err_and(|e| e.kind() == ErrorKind::Unsupported), || {
            "a transport that only reads takes a write".to_owned()
        })?;
    }
    Ok(())
}

async fn ranges(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 2)?;
    let (there, registration) = lend(&nodes[0], REGION).await?;
    let mut expected = vec![UNTOUCHED; REGION as usize];
    let parts: [(u64, u64); 7] =
        [(0, 0), (0, 1), (255, 257), (4095, 4097), (REGION - 1, 1), (REGION, 0), (77_777, 5 << 20)];
    for (seed, (offset, len)) in (20..).zip(parts) {
        let bytes = pattern(seed, len);
        put(&nodes[1], registration.region(), offset, &bytes).await?;
        expected[offset as usize..(offset + len) as usize].copy_from_slice(&bytes);
        same(&there, &expected, "a written range, or what is beside it,")?;
    }
    // All in one batch, side by side.
    let bytes = pattern(30, REGION);
    let from = nodes[1].bench.host(&bytes)?;
    let mut batch = Vec::new();
    let cuts = [0, 1, 257, 4096, 9000, 1 << 20, 7 << 20, REGION];
    for pair in cuts.windows(2) {
        batch.push(write(registration.region(), pair[0], &from.slice(pair[0]..pair[1])?));
    }
    nodes[1].one_sided()?.post_write(batch, soon())?.done(soon()).await?;
    same(&there, &bytes, "a batch of writes")?;
    nodes[1].one_sided()?.post_write(Vec::new(), soon())?.done(soon()).await
}

async fn writers(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 3)?;
    let (there, registration) = lend(&nodes[0], REGION).await?;
    let (bytes, region) = (pattern(31, REGION), registration.region());
    let share = REGION.div_ceil(8);
    try_join_all((0..8).map(|number: u64| {
        let range = number * share..((number + 1) * share).min(REGION);
        let part = &bytes[range.start as usize..range.end as usize];
        put(&nodes[1 + number as usize % 2], region, range.start, part)
    }))
    .await?;
    same(&there, &bytes, "what several wrote")
}

async fn own(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 1)?;
    let (there, registration) = lend(&nodes[0], 5000).await?;
    put(&nodes[0], registration.region(), 0, &pattern(32, 5000)).await?;
    same(&there, &pattern(32, 5000), "what a rank wrote into its own region")
}

async fn read_only(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 2)?;
    let bytes = pattern(33, 1000);
    let there = nodes[0].bench.host(&bytes)?;
    let registration = nodes[0].one_sided()?.register(there.buffer().clone()).await?;
    let from = nodes[1].bench.host(&[0x77; 10])?;
    let error = error_of(&nodes[1], write(registration.region(), 5, &from), soon()).await?;
    ensure(error.kind() == ErrorKind::ConfigInvalid, || format!("a region for reading gave {error:?}"))?;
    same(&there, &bytes, "a region for reading")
}

async fn outside(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 2)?;
    let (there, registration) = lend(&nodes[0], 1000).await?;
    let from = nodes[1].bench.host(&[0x77; 100])?;
    for offset in [901, 1000, 1001, u64::MAX, u64::MAX - 50] {
        let error = error_of(&nodes[1], write(registration.region(), offset, &from), soon()).await?;
        ensure(error.kind() == ErrorKind::ConfigInvalid, || format!("offset {offset} gave {error:?}"))?;
    }
    // The owner checks too: what the writer believes does not count.
    let forged = RemoteRegion { len_bytes: 1 << 30, ..registration.region().clone() };
    error_of(&nodes[1], write(&forged, 950, &from), soon()).await?;
    put(&nodes[1], registration.region(), 900, &[0x78; 100]).await?;
    let mut expected = vec![UNTOUCHED; 1000];
    expected[900..].fill(0x78);
    // The refused range that began inside may have begun to arrive, but nothing before it.
    same(&there.slice(0..900)?, &expected[..900], "what was beside a refused write")?;
    same(&there.slice(900..1000)?, &expected[900..], "a good write after bad ones")
}

async fn released(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 2)?;
    let (there, first) = lend(&nodes[0], 1000).await?;
    let old = first.region().clone();
    put(&nodes[1], &old, 0, &pattern(34, 1000)).await?;
    drop(first);
    let from = nodes[1].bench.host(&[0x77; 1000])?;
    let error = error_of(&nodes[1], write(&old, 0, &from), soon()).await?;
    ensure(error.kind() == ErrorKind::Aborted, || format!("a released region gave {error:?}"))?;
    let second = nodes[0].one_sided()?.register_writable(there.buffer().clone()).await?;
    let error = error_of(&nodes[1], write(&old, 0, &from), soon()).await?;
    ensure(error.kind() == ErrorKind::Aborted, || format!("an old generation gave {error:?}"))?;
    same(&there, &pattern(34, 1000), "a region that was written under an old name")?;
    put(&nodes[1], second.region(), 0, &pattern(35, 1000)).await?;
    same(&there, &pattern(35, 1000), "a region that was registered again")
}

async fn deadline(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 2)?;
    let (_there, registration) = lend(&nodes[0], 1000).await?;
    let from = nodes[1].bench.host(&[0x77; 1000])?;
    nodes[1]
        .one_sided()?
        .post_write(vec![write(registration.region(), 0, &from)], soon())?
        .done(soon())
        .await?;
    for _ in 0..PAST_DEADLINES {
        let past = Instant::now().checked_sub(Duration::from_millis(1)).unwrap_or_else(Instant::now);
        let error = error_of(&nodes[1], write(registration.region(), 0, &from), past).await?;
        ensure(error.kind() == ErrorKind::Timeout, || format!("a deadline in the past gave {error:?}"))?;
    }
    Ok(())
}

async fn dropped(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 2)?;
    let (there, registration) = lend(&nodes[0], REGION).await?;
    let (buffer, gone) = Tracked::buffer(&pattern(36, REGION))?;
    let from = BufferSlice::whole(buffer);
    drop(nodes[1].one_sided()?.post_write(vec![write(registration.region(), 0, &from)], soon())?);
    drop(from);
    super::eventually("freeing a dropped batch", || gone.load(Ordering::SeqCst)).await?;
    put(&nodes[1], registration.region(), 0, &pattern(37, REGION)).await?;
    same(&there, &pattern(37, REGION), "a region after a dropped batch")
}

async fn dead(factory: &dyn Factory) -> Result<()> {
    let mut nodes = Node::open_all(factory, 2)?;
    let Some(writer) = nodes.pop() else { return fail("no writer") };
    let (_there, registration) = lend(&nodes[0], 1000).await?;
    let region = registration.region().clone();
    put(&writer, &region, 0, &pattern(38, 1000)).await?;
    drop((registration, nodes));
    let from = writer.bench.host(&[0x77; 1000])?;
    let began = Instant::now();
    error_of(&writer, write(&region, 0, &from), soon()).await?;
    ensure(began.elapsed() < LIMIT / 4, || "a dead owner was noticed late".to_owned())
}
