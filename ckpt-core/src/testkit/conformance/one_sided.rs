//! What every one-sided facet promises.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::try_join_all;

use super::{Factory, LIMIT, Node, Report, Tracked, ensure, fail, pattern, soon};
use crate::{
    device::{Buffer, BufferSlice},
    error::{Error, ErrorKind, Result},
    transport::{ReadOp, RemoteRegion},
};

pub(super) const REGION: u64 = (9 << 20) + 13;
/// Reads whose deadline has passed: a race with the clock shows only now and then.
pub(super) const PAST_DEADLINES: usize = 200;

/// Checks the one-sided facet between two ranks (and a third that works at the same time): reads, and writes if it has them.
pub async fn one_sided(factory: &dyn Factory) -> Result<Report> {
    let mut report = Report::default();
    let probe = Node::open_all(factory, 1)?;
    let capability = probe[0].transport.capability();
    if !capability.one_sided {
        ensure(probe[0].transport.one_sided().is_none(), || "a facet that it says it lacks".to_owned())?;
        report.skip("all", "the transport has no one-sided facet");
        return Ok(report);
    }
    drop(probe);
    report.check("ranges of any size and place", ranges(factory)).await?;
    report.check("several readers at once", readers(factory)).await?;
    report.check("reads of a rank's own memory", own(factory)).await?;
    report.check("generations rise and old ones fail", generations(factory)).await?;
    report.check("ranges outside the region are refused", outside(factory)).await?;
    report.check("a read ends by its deadline", deadline(factory)).await?;
    report.check("memory stays alive under a read", alive(factory)).await?;
    report.check("a batch whose event is dropped harms nobody", dropped(factory)).await?;
    report.check("unknown owners are errors", unknown(factory)).await?;
    if capability.across_processes {
        report.check("a dead owner is an error", dead(factory)).await?;
    } else {
        report.skip("a dead owner is an error", "owner and reader are one process");
    }
    super::write::writes(factory, &mut report).await?;
    Ok(report)
}

pub(super) fn memory(node: &Node, bytes: &[u8]) -> Result<Arc<dyn Buffer>> {
    Ok(node.bench.host(bytes)?.buffer().clone())
}

fn read(region: &RemoteRegion, offset: u64, into: &BufferSlice) -> ReadOp {
    ReadOp { region: Arc::new(region.clone()), offset, into: into.clone() }
}

/// Host memory of `len` other bytes.
pub(super) fn target(node: &Node, len: u64) -> Result<BufferSlice> {
    node.bench.host(&vec![0xEE; len as usize])
}

pub(super) fn same(into: &BufferSlice, bytes: &[u8], what: &str) -> Result<()> {
    // SAFETY: what was written into it is done.
    ensure(unsafe { into.as_slice() }? == bytes, || format!("{what} arrived wrong"))
}

/// The error of a read that must fail, whether when posted or later.
async fn error_of(node: &Node, op: ReadOp, deadline: Instant) -> Result<Error> {
    match node.one_sided()?.post_read(vec![op], deadline) {
        Err(error) => Ok(error),
        Ok(event) => match event.done(soon()).await {
            Err(error) => Ok(error),
            Ok(()) => fail("a read that must fail was done"),
        },
    }
}

async fn ranges(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 2)?;
    let bytes = pattern(1, REGION);
    let registration = nodes[0].one_sided()?.register(memory(&nodes[0], &bytes)?).await?;
    let region = registration.region();
    ensure(region.len_bytes == REGION, || "the region has another length".to_owned())?;
    let parts =
        [(0, 0), (0, 1), (255, 257), (4095, 4097), (REGION - 1, 1), (REGION, 0), (77, 5 << 20), (0, REGION)];
    // A batch of one, and then all in one batch.
    for (offset, len) in parts {
        let into = target(&nodes[1], len)?;
        nodes[1].one_sided()?.post_read(vec![read(region, offset, &into)], soon())?.done(soon()).await?;
        same(&into, &bytes[offset as usize..(offset + len) as usize], "a range")?;
    }
    let targets = parts.iter().map(|(_, len)| target(&nodes[1], *len)).collect::<Result<Vec<_>>>()?;
    let batch = parts.iter().zip(&targets).map(|((offset, _), into)| read(region, *offset, into)).collect();
    nodes[1].one_sided()?.post_read(batch, soon())?.done(soon()).await?;
    for ((offset, len), into) in parts.iter().zip(&targets) {
        same(into, &bytes[*offset as usize..(offset + len) as usize], "a range of a batch")?;
    }
    nodes[1].one_sided()?.post_read(Vec::new(), soon())?.done(soon()).await
}

async fn readers(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 3)?;
    let bytes = pattern(2, REGION);
    let registration = nodes[0].one_sided()?.register(memory(&nodes[0], &bytes)?).await?;
    let region = registration.region();
    let reads = (0..8).map(|number: usize| {
        let (node, bytes) = (&nodes[1 + number % 2], &bytes);
        async move {
            let into = target(node, REGION)?;
            node.one_sided()?.post_read(vec![read(region, 0, &into)], soon())?.done(soon()).await?;
            same(&into, bytes, "a region that several read")
        }
    });
    try_join_all(reads).await?;
    Ok(())
}

async fn own(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 1)?;
    let bytes = pattern(3, 5000);
    let registration = nodes[0].one_sided()?.register(memory(&nodes[0], &bytes)?).await?;
    let into = target(&nodes[0], 5000)?;
    nodes[0]
        .one_sided()?
        .post_read(vec![read(registration.region(), 0, &into)], soon())?
        .done(soon())
        .await?;
    same(&into, &bytes, "a rank's own region")
}

async fn generations(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 2)?;
    let buffer = memory(&nodes[0], &pattern(4, 1000))?;
    let first = nodes[0].one_sided()?.register(buffer.clone()).await?;
    let old = first.region().clone();
    drop(first);
    let second = nodes[0].one_sided()?.register(buffer).await?;
    ensure(second.region().generation > old.generation, || "the generation did not rise".to_owned())?;
    let into = target(&nodes[1], 1000)?;
    let error = error_of(&nodes[1], read(&old, 0, &into), soon()).await?;
    ensure(error.kind() == ErrorKind::Aborted, || format!("an old generation gave {error:?}"))?;
    nodes[1].one_sided()?.post_read(vec![read(second.region(), 0, &into)], soon())?.done(soon()).await?;
    same(&into, &pattern(4, 1000), "a region that was registered again")?;
    let gone = second.region().clone();
    drop(second);
    let error = error_of(&nodes[1], read(&gone, 0, &into), soon()).await?;
    ensure(error.kind() == ErrorKind::Aborted, || format!("a released region gave {error:?}"))
}

async fn outside(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 2)?;
    let registration = nodes[0].one_sided()?.register(memory(&nodes[0], &pattern(5, 1000))?).await?;
    let into = target(&nodes[1], 100)?;
    for offset in [901, 1000, 1001, u64::MAX, u64::MAX - 50] {
        let error = error_of(&nodes[1], read(registration.region(), offset, &into), soon()).await?;
        ensure(error.kind() == ErrorKind::ConfigInvalid, || format!("offset {offset} gave {error:?}"))?;
    }
    // The owner checks too: what the reader believes does not count.
    let forged = RemoteRegion { len_bytes: 1 << 30, ..registration.region().clone() };
    error_of(&nodes[1], read(&forged, 950, &into), soon()).await?;
    // The connection, if it has one, is still good after all that.
    nodes[1]
        .one_sided()?
        .post_read(vec![read(registration.region(), 900, &into)], soon())?
        .done(soon())
        .await?;
    same(&into, &pattern(5, 1000)[900..], "a good range after bad ones")
}

async fn deadline(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 2)?;
    let registration = nodes[0].one_sided()?.register(memory(&nodes[0], &pattern(6, 1000))?).await?;
    let into = target(&nodes[1], 1000)?;
    // With a connection that is there already, a small read could be done before anyone looks at the clock.
    nodes[1]
        .one_sided()?
        .post_read(vec![read(registration.region(), 0, &into)], soon())?
        .done(soon())
        .await?;
    let into = target(&nodes[1], 1000)?;
    for _ in 0..PAST_DEADLINES {
        let past = Instant::now().checked_sub(Duration::from_millis(1)).unwrap_or_else(Instant::now);
        let error = error_of(&nodes[1], read(registration.region(), 0, &into), past).await?;
        ensure(error.kind() == ErrorKind::Timeout, || format!("a deadline in the past gave {error:?}"))?;
    }
    same(&into, &[0xEE; 1000], "nothing of reads after their deadline")
}

async fn alive(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 2)?;
    let bytes = pattern(7, REGION);
    for _ in 0..4 {
        let (buffer, gone) = Tracked::buffer(&bytes)?;
        let registration = nodes[0].one_sided()?.register(buffer).await?;
        let into = target(&nodes[1], REGION)?;
        let event = nodes[1].one_sided()?.post_read(vec![read(registration.region(), 0, &into)], soon())?;
        drop(registration);
        // Either it was in time or it says that it was not: never success with other bytes.
        match event.done(soon()).await {
            Ok(()) => same(&into, &bytes, "a region that was released meanwhile")?,
            Err(error) => ensure(error.kind() == ErrorKind::Aborted, || format!("a release gave {error:?}"))?,
        }
        super::eventually("freeing released memory", || gone.load(std::sync::atomic::Ordering::SeqCst))
            .await?;
    }
    Ok(())
}

async fn dropped(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 2)?;
    let bytes = pattern(8, REGION);
    let registration = nodes[0].one_sided()?.register(memory(&nodes[0], &bytes)?).await?;
    let (buffer, gone) = Tracked::buffer(&bytes)?;
    let into = BufferSlice::whole(buffer);
    drop(nodes[1].one_sided()?.post_read(vec![read(registration.region(), 0, &into)], soon())?);
    drop(into);
    super::eventually("freeing a dropped batch", || gone.load(std::sync::atomic::Ordering::SeqCst)).await?;
    let into = target(&nodes[1], REGION)?;
    nodes[1]
        .one_sided()?
        .post_read(vec![read(registration.region(), 0, &into)], soon())?
        .done(soon())
        .await?;
    same(&into, &bytes, "a region after a dropped batch")
}

async fn unknown(factory: &dyn Factory) -> Result<()> {
    let nodes = Node::open_all(factory, 2)?;
    let registration = nodes[0].one_sided()?.register(memory(&nodes[0], &pattern(9, 10))?).await?;
    let into = target(&nodes[1], 10)?;
    let good = registration.region();
    let forgeries = [
        RemoteRegion { peer: "nobody".to_owned(), ..good.clone() },
        RemoteRegion { generation: good.generation + 1000, ..good.clone() },
        RemoteRegion { address: good.address ^ 4096, ..good.clone() },
    ];
    for forged in forgeries {
        error_of(&nodes[1], read(&forged, 0, &into), soon()).await?;
    }
    Ok(())
}

async fn dead(factory: &dyn Factory) -> Result<()> {
    let mut nodes = Node::open_all(factory, 2)?;
    let reader = nodes.pop();
    let Some(reader) = reader else { return fail("no reader") };
    let registration = nodes[0].one_sided()?.register(memory(&nodes[0], &pattern(10, 1000))?).await?;
    let region = registration.region().clone();
    let into = target(&reader, 1000)?;
    reader.one_sided()?.post_read(vec![read(&region, 0, &into)], soon())?.done(soon()).await?;
    drop((registration, nodes));
    let began = Instant::now();
    error_of(&reader, read(&region, 0, &into), soon()).await?;
    ensure(began.elapsed() < LIMIT / 4, || "a dead owner was noticed late".to_owned())
}
