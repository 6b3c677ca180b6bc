//! A transport of one's own: broadcasts inside one process, over a table of offers.
//!
//! `cargo run -p ckpt-core --example custom_transport`. What a transport owes: its work goes on the stream, memory in flight
//! is owned by that work, an abort frees whoever waits, and nothing counts after it.
//! [`ckpt_core::testkit::conformance`] checks all of that for any transport; this one leaves out what it would need to pass
//! (several groups, members that die, operations that do not fit).

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use ckpt_core::{
    DType, Epoch, Error, ErrorKind, Result,
    checkpoint::{CheckpointSource, NamedTensor},
    device::{BufferSlice, DeviceBackend, DeviceConfig, Event, HostJob, OnAbort, Stream, host::*},
    transport::*,
    types::TensorMeta,
};
use tokio::sync::{Barrier, watch};

/// Where the members meet: by number of the operation, the root's bytes and how many still want them.
#[derive(Debug)]
struct Hub {
    all_here: Barrier,
    offers: watch::Sender<HashMap<u64, (BufferSlice, usize)>>,
    poison: OnceLock<Error>,
}

impl Hub {
    /// Waits until operation `number` is offered (or, with `gone`, until nobody wants it any more).
    async fn offer(&self, number: u64, gone: bool) -> Result<Option<BufferSlice>> {
        let mut offers = self.offers.subscribe();
        let ready = |offers: &HashMap<_, _>| {
            offers.contains_key(&number) != gone || self.poison.get().is_some() // an abort wakes all
        };
        let offer = offers.wait_for(ready).await.ok().and_then(|o| Some(o.get(&number)?.0.clone()));
        self.poison.get().cloned().map_or(Ok(offer), Err)
    }

    fn taken(&self, number: u64) {
        self.offers.send_modify(|offers| match offers.get_mut(&number) {
            Some((_, 1)) => drop(offers.remove(&number)),
            Some((_, wanted)) => *wanted -= 1,
            None => {}
        });
    }
}

#[derive(Debug)]
struct Table(Arc<Hub>, Arc<dyn DeviceBackend>);

impl Transport for Table {
    fn name(&self) -> &'static str {
        "table"
    }
    fn capability(&self) -> Capability {
        let (collective, devices) = (true, &["host"]);
        Capability {
            collective,
            one_sided: false,
            one_sided_write: false,
            across_processes: false,
            across_hosts: false,
            encrypts: false,
            devices,
        }
    }
    fn collective(&self) -> Option<&dyn Collective> {
        Some(self)
    }
    fn one_sided(&self) -> Option<&dyn OneSided> {
        None
    }
}

#[async_trait]
impl Collective for Table {
    async fn create_token(&self) -> Result<Bytes> {
        Ok(Bytes::from_static(b"the only group"))
    }
    async fn join(&self, group: GroupSpec, deadline: Instant) -> Result<Communicator> {
        let late = |_| Error::new(ErrorKind::Timeout, "join a group", "a member did not come");
        tokio::time::timeout_at(deadline.into(), self.0.all_here.wait()).await.map_err(late)?;
        let queue = Queue { hub: self.0.clone(), copies: self.1.stream("copies")?, group, next: 0 };
        Ok(Communicator { queue: Box::new(queue), abort: Arc::new(Abort(self.0.clone())) })
    }
}

#[derive(Debug)]
struct Queue {
    hub: Arc<Hub>,
    copies: Arc<dyn Stream>,
    group: GroupSpec,
    next: u64,
}

#[async_trait]
impl CommunicatorQueue for Queue {
    async fn enqueue(&mut self, ops: Vec<CollectiveOp>, stream: &Arc<dyn Stream>) -> Result<Event> {
        let other = || Error::new(ErrorKind::Unsupported, "broadcast", "this transport needs host streams");
        for CollectiveOp { root, buffer } in ops {
            let (hub, copies, number) = (self.hub.clone(), self.copies.clone(), self.next);
            let (sends, readers) = (root == self.group.rank, self.group.world_size as usize - 1);
            self.next += 1;
            // Runs when the stream comes to it, and owns the buffer until then.
            let run = async move {
                if sends && readers > 0 {
                    hub.offers.send_modify(|offers| drop(offers.insert(number, (buffer, readers))));
                    hub.offer(number, true).await?; // our bytes may change only when all have them
                } else if let (false, Some(theirs)) = (sends, hub.offer(number, false).await?) {
                    copies.copy(theirs, buffer)?;
                    copies.record()?.done(Instant::now() + Duration::from_secs(30)).await?;
                    hub.taken(number);
                }
                Ok(())
            };
            let job = HostJob { label: "broadcast", on_abort: OnAbort::Fails, run: Box::pin(run) };
            stream.host().ok_or_else(other)?.submit(job)?;
        }
        stream.record()
    }
}

#[derive(Debug)]
struct Abort(Arc<Hub>);

impl AbortHandle for Abort {
    fn abort(&self, cause: Error) {
        let _ = self.0.poison.set(cause); // the first cause stays
        self.0.offers.send_modify(|_| ());
    }
    fn poisoned(&self) -> Option<Error> {
        self.0.poison.get().cloned()
    }
}

/// One member: broadcasts twice, from each root, and answers what it holds then.
async fn member(transport: Arc<Table>, rank: u32, mine: BufferSlice, other: BufferSlice) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    let group = GroupSpec { token: transport.create_token().await?, rank, world_size: 2, epoch: Epoch(1) };
    let mut communicator = transport.join(group, deadline).await?;
    let stream = transport.1.stream("net")?;
    let ops = [(rank, mine), (1 - rank, other)].map(|(root, buffer)| CollectiveOp { root, buffer });
    let mut ops = Vec::from(ops);
    ops.sort_by_key(|op| op.root); // the same order on all members
    communicator.queue.enqueue(ops, &stream).await?.done(deadline).await?;
    communicator.abort.poisoned().map_or(Ok(()), Err) // a completion counts only if nothing was aborted
}

/// Two members exchange a mebibyte each.
#[tokio::main]
pub async fn main() -> anyhow::Result<()> {
    let runtime_dir = ckpt_core::device::runtime_dir()?;
    let hub = Hub { all_here: Barrier::new(2), offers: watch::Sender::default(), poison: OnceLock::new() };
    let hub = Arc::new(hub);
    let device =
        |rank| HostDevice::open(&DeviceConfig { rank, local_rank: rank, runtime_dir: runtime_dir.clone() });
    let sent = [HostBuffer::from_bytes(&[7; 1 << 20])?, HostBuffer::from_bytes(&[8; 1 << 20])?];
    let received = [HostBuffer::from_bytes(&[0; 1 << 20])?, HostBuffer::from_bytes(&[0; 1 << 20])?];
    let run = |rank: usize| -> Result<_> {
        let transport = Arc::new(Table(hub.clone(), Arc::new(device(rank as u32)?)));
        Ok(member(transport, rank as u32, sent[rank].slice(), received[rank].slice()))
    };
    tokio::try_join!(run(0)?, run(1)?)?;
    for (rank, value) in [(0, 8), (1, 7)] {
        let meta = TensorMeta::new("received", DType::U8, [1 << 20])?;
        let tensor = NamedTensor::from_buffer(meta, received[rank].slice())?;
        let bytes = CheckpointSource::from_tensors([tensor])?.read(0)?;
        anyhow::ensure!(bytes.iter().all(|byte| *byte == value), "member {rank} holds other bytes");
    }
    println!("both members hold each other's bytes");
    Ok(())
}
