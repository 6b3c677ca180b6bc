//! What every device promises.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::FutureExt;

use super::{Bench, Factory, LIMIT, Report, Tracked, ensure, fail, pattern, soon};
use crate::{
    device::{BufferSlice, HostJob, HostStream, OnAbort, RawStream, RingExport, Stream},
    error::{Error, ErrorKind, Result},
};

const SIZES: [u64; 6] = [0, 1, 255, 4097, 65_537, (3 << 20) + 17];

/// Checks a device.
pub async fn device(factory: &dyn Factory) -> Result<Report> {
    let mut report = Report::default();
    let bench = Bench::new(factory.device(0)?)?;
    report.check("it says what it is", describes(&bench)).await?;
    report.check("copies run in order", copies(&bench)).await?;
    report.check("copies of unequal lengths are refused", unequal(&bench)).await?;
    report.check("a stream waits for another's event", cross_wait(&bench)).await?;
    report.check("dropped slices stay alive", keep_alive(&bench)).await?;
    report.check("rings can be exported and freed", rings(&bench)).await?;
    report.check("pinned memory stays alive and can be copied from", pin(&bench)).await?;
    report.check("events can be polled", polled(&bench)).await?;
    let host = [
        "jobs run one at a time, in order",
        "a wait ends by its deadline and can be dropped",
        "a failure spreads",
    ];
    if bench.stream.host().is_some() {
        report.check(host[0], ordered_jobs(&bench)).await?;
        report.check(host[1], deadlines(&bench)).await?;
        report.check(host[2], failures(&bench)).await?;
    } else {
        host.into_iter().for_each(|name| report.skip(name, "its streams take no host jobs"));
    }
    Ok(report)
}

async fn describes(bench: &Bench) -> Result<()> {
    let (device, info) = (&bench.device, bench.device.info());
    ensure(!info.uuid.is_empty() && !info.name.is_empty(), || format!("{info:?} has no name"))?;
    ensure(device.free_memory_bytes()? > 0, || "no free memory".to_owned())?;
    let agrees = match bench.stream.raw() {
        RawStream::Host => device.kind() == "host" && bench.stream.host().is_some(),
        RawStream::Cuda(_) => device.kind() == "cuda",
        RawStream::Ascend(_) => device.kind() == "ascend",
    };
    ensure(agrees, || format!("a device of kind {} has streams {:?}", device.kind(), bench.stream.raw()))?;
    device.flush_remote_writes()
}

async fn copies(bench: &Bench) -> Result<()> {
    for len in SIZES {
        let bytes = pattern(len, len);
        let (a, b, c) = (bench.memory(len)?, bench.memory(len)?, bench.memory(len)?);
        // Each overwrites what the one before has written; only in order is the last content right.
        for round in 0..4 {
            bench.stream.copy(bench.host(&pattern(round + 1000, len))?, a.clone())?;
        }
        bench.stream.copy(bench.host(&bytes)?, a.clone())?;
        bench.stream.copy(a.clone(), b.clone())?;
        bench.stream.copy(bench.host(&pattern(77, len))?, a)?;
        bench.stream.copy(b, c.clone())?;
        bench.expect(&c, &bytes, || format!("{len} bytes through three places")).await?;
    }
    Ok(())
}

async fn unequal(bench: &Bench) -> Result<()> {
    let refused = bench.stream.copy(bench.host(&[1; 10])?, bench.memory(11)?).is_err();
    ensure(refused, || "10 bytes were copied to a place of 11".to_owned())
}

async fn cross_wait(bench: &Bench) -> Result<()> {
    let other = bench.device.stream("other")?;
    for round in 0..8 {
        let bytes = pattern(round, 1 << 20);
        let (a, b) = (bench.memory(1 << 20)?, bench.memory(1 << 20)?);
        other.copy(bench.host(&bytes)?, a.clone())?;
        bench.stream.wait(&other.record()?)?;
        bench.stream.copy(a, b.clone())?;
        bench.expect(&b, &bytes, || "bytes that another stream brings".to_owned()).await?;
    }
    // Waiting for one's own past is nothing.
    bench.stream.wait(&bench.stream.record()?)?;
    bench.stream.record()?.done(soon()).await
}

async fn keep_alive(bench: &Bench) -> Result<()> {
    let bytes = pattern(5, 2 << 20);
    let (source, gone) = Tracked::buffer(&bytes)?;
    let (middle, end) = (bench.memory(2 << 20)?, bench.memory(2 << 20)?);
    let stream = bench.device.stream("short-lived")?;
    let gate = close_gate(&stream)?;
    // Accelerators copy from pinned memory only.
    let source = bench.device.pin(source)?;
    stream.copy(BufferSlice::whole(source), middle.clone())?;
    stream.copy(middle, end.clone())?;
    let event = stream.record()?;
    drop(stream);
    if let Some(gate) = gate {
        let waited = event.done(Instant::now() + Duration::from_millis(20)).await;
        ensure(waited.is_err(), || "work ran before what it waits for".to_owned())?;
        ensure(!gone.load(Ordering::SeqCst), || "memory was freed before the copy from it".to_owned())?;
        let _ = gate.send(());
    }
    event.done(soon()).await?;
    bench.expect(&end, &bytes, || "bytes of a dropped source".to_owned()).await?;
    drop(event);
    super::eventually("freeing the source", || gone.load(Ordering::SeqCst)).await
}

async fn rings(bench: &Bench) -> Result<()> {
    for len in [1, 4096, (1 << 20) + 1] {
        let ring = bench.device.allocate_ring(len)?;
        ensure(ring.buffer().len_bytes() >= len, || format!("a ring of {len} bytes is too short"))?;
        let agrees = match ring.export() {
            RingExport::Host { path, .. } => bench.device.kind() == "host" && path.exists(),
            RingExport::Cuda { handle, .. } => bench.device.kind() == "cuda" && handle.len() == 64,
            RingExport::Ascend { key, .. } => bench.device.kind() == "ascend" && key.len() == 65,
        };
        ensure(agrees, || format!("{:?} is no export of a {} device", ring.export(), bench.device.kind()))?;
        let (bytes, slice) = (pattern(len, len), BufferSlice::whole(ring.buffer()).slice(0..len)?);
        bench.stream.copy(bench.host(&bytes)?, slice.clone())?;
        bench.expect(&slice, &bytes, || "bytes in a ring".to_owned()).await?;
        // Only what is freed may change.
        ring.freed(0..len / 2);
        let rest = slice.slice(len / 2..len)?;
        bench.expect(&rest, &bytes[len as usize / 2..], || "bytes beside freed ones".to_owned()).await?;
    }
    Ok(())
}

async fn pin(bench: &Bench) -> Result<()> {
    let bytes = pattern(3, 100_001);
    let (memory, gone) = Tracked::buffer(&bytes)?;
    let pinned = bench.device.pin(memory)?;
    ensure(!gone.load(Ordering::SeqCst), || "pinned memory was freed".to_owned())?;
    ensure(pinned.len_bytes() == 100_001, || "pinned memory has another length".to_owned())?;
    let target = bench.memory(100_001)?;
    bench.stream.copy(BufferSlice::whole(pinned.clone()), target.clone())?;
    bench.expect(&target, &bytes, || "bytes of pinned memory".to_owned()).await?;
    drop(pinned);
    super::eventually("freeing pinned memory", || gone.load(Ordering::SeqCst)).await
}

async fn polled(bench: &Bench) -> Result<()> {
    let bytes = pattern(9, 1 << 20);
    let target = bench.memory(1 << 20)?;
    bench.stream.copy(bench.host(&bytes)?, target.clone())?;
    let event = bench.stream.record()?;
    let mut error = None;
    super::eventually("completion of a polled event", || {
        event.is_complete().unwrap_or_else(|e| {
            error = Some(e);
            true
        })
    })
    .await?;
    error.map_or(Ok(()), Err)?;
    // A completed event answers at once, for ever, and to every clone.
    event.clone().done(Instant::now()).await?;
    bench.expect(&target, &bytes, || "bytes behind a polled event".to_owned()).await
}

fn host(stream: &Arc<dyn Stream>) -> Result<&dyn HostStream> {
    stream.host().map_or_else(|| fail("a stream of this device takes no host jobs"), Ok)
}

fn job(run: impl Future<Output = Result<()>> + Send + 'static) -> HostJob {
    HostJob { label: "conformance", on_abort: OnAbort::Fails, run: run.boxed() }
}

/// Lets nothing behind it run until the answer is used; `None` where streams take no jobs.
pub(super) fn close_gate(stream: &Arc<dyn Stream>) -> Result<Option<tokio::sync::oneshot::Sender<()>>> {
    let Some(host) = stream.host() else { return Ok(None) };
    let (open, gate) = tokio::sync::oneshot::channel();
    host.submit(job(gate.map(|_| Ok(()))))?;
    Ok(Some(open))
}

async fn ordered_jobs(bench: &Bench) -> Result<()> {
    let stream = bench.device.stream("jobs")?;
    let (busy, log) = (Arc::new(AtomicBool::new(false)), Arc::new(std::sync::Mutex::new(Vec::new())));
    for number in 0..50 {
        let (busy, log) = (busy.clone(), log.clone());
        host(&stream)?.submit(job(async move {
            if busy.swap(true, Ordering::SeqCst) {
                return fail("two jobs of one stream ran at once");
            }
            tokio::task::yield_now().await;
            if let Ok(mut log) = log.lock() {
                log.push(number);
            }
            busy.store(false, Ordering::SeqCst);
            Ok(())
        }))?;
    }
    stream.record()?.done(soon()).await?;
    let log = log.lock().map(|log| log.clone()).unwrap_or_default();
    ensure(log == (0..50).collect::<Vec<_>>(), || format!("jobs ran in the order {log:?}"))
}

async fn deadlines(bench: &Bench) -> Result<()> {
    let (stream, other) = (bench.device.stream("gated")?, bench.device.stream("behind")?);
    let Some(open) = close_gate(&stream)? else { return fail("its streams take no host jobs") };
    let ran = Arc::new(AtomicBool::new(false));
    other.wait(&stream.record()?)?;
    let flag = ran.clone();
    host(&other)?.submit(job(async move {
        flag.store(true, Ordering::SeqCst);
        Ok(())
    }))?;
    let event = other.record()?;
    let began = Instant::now();
    match event.done(began + Duration::from_millis(30)).await {
        Err(error) if error.kind() == ErrorKind::Timeout => {}
        outcome => return fail(format!("a wait for work that cannot be done ended with {outcome:?}")),
    }
    ensure(began.elapsed() < LIMIT, || "a wait ended long after its deadline".to_owned())?;
    let dropped = tokio::time::timeout(Duration::from_millis(10), event.done(soon())).await;
    ensure(dropped.is_err(), || "a wait for work that cannot be done ended".to_owned())?;
    ensure(!ran.load(Ordering::SeqCst), || "work ran before what it waits for".to_owned())?;
    let _ = open.send(());
    event.done(soon()).await?;
    ensure(ran.load(Ordering::SeqCst), || "an event completed before its work".to_owned())
}

async fn failures(bench: &Bench) -> Result<()> {
    let (stream, other) = (bench.device.stream("failing")?, bench.device.stream("behind")?);
    let before = stream.record()?;
    host(&stream)?.submit(job(async { Err(Error::new(ErrorKind::Backend, "test", "broken on purpose")) }))?;
    let after = stream.record()?;
    other.wait(&after)?;
    let behind = other.record()?;
    before.done(soon()).await?;
    for event in [after, behind] {
        match event.done(soon()).await {
            Err(error) if error.to_string().contains("broken on purpose") => {}
            outcome => return fail(format!("an event behind failed work ended with {outcome:?}")),
        }
    }
    Ok(())
}
