//! The transport: registrations and posted batches of one engine.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{Buffer, BufferSlice, Event, MemoryKind},
    transport::{
        Capability, Collective, OneSided, ReadOp, Registration, RemoteRegion, Transfer, Transport, Way,
        WriteOp,
    },
};
use tokio::sync::oneshot;

use crate::{
    api::Api,
    batch::{Ending, InFlight, Posted},
    engine::Engine,
    keeper::{self, Command},
    lane::{self, Job},
    ledger::Ledger,
    protocol::{Choice, Protocol},
};

/// Ending an engine takes about half a second; a process that exits under it may crash in Mooncake's exit handlers.
const END_TIME: Duration = Duration::from_secs(3);

/// What the transport and its registrations share.
struct Shared {
    address: String,
    protocol: Protocol,
    across_hosts: bool,
    ledger: Arc<Ledger>,
    in_flight: InFlight,
    lines: Mutex<Option<Lines>>,
    /// Disconnected when the engine is gone.
    gone: Mutex<Receiver<()>>,
}

/// The threads; they hold the engine, and end when this is dropped.
struct Lines {
    engine: Arc<Engine>,
    keeper: Sender<Command>,
    lanes: HashMap<String, Sender<Job>>,
}

impl Shared {
    fn with_lines<T>(&self, use_them: impl FnOnce(&mut Lines) -> Result<T>) -> Result<T> {
        // Maps and channels: whole even after a panic elsewhere.
        match self.lines.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(lines) => use_them(lines),
            None => Err(Error::new(ErrorKind::Aborted, "use Mooncake", "the transport is closing")),
        }
    }

    fn tell_keeper(&self, command: Command) -> Result<()> {
        self.with_lines(|lines| {
            lines.keeper.send(command).map_err(|_| {
                Error::new(ErrorKind::Internal, "register memory", "Mooncake's keeper thread has ended")
            })
        })
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let lines = self.lines.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Lines { engine, keeper, lanes }) = lines {
            // In this order the last of the threads ends the engine, and not this one.
            drop(engine);
            drop((keeper, lanes));
        }
        let gone = self.gone.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Err(std::sync::mpsc::RecvTimeoutError::Timeout) = gone.recv_timeout(END_TIME) {
            tracing::warn!(
                address = self.address,
                "Mooncake's engine still has transfers under way; it is left behind"
            );
        }
    }
}

/// See the crate's documentation.
pub(crate) struct MooncakeTransport {
    shared: Arc<Shared>,
}

impl MooncakeTransport {
    pub(crate) fn start(api: Arc<dyn Api>, host: std::net::IpAddr, choice: Choice) -> Result<Self> {
        let (alive, gone) = channel();
        let engine = Arc::new(Engine::start(api, &host.to_string(), choice, alive)?);
        if !host.is_loopback() {
            tracing::warn!(
                address = engine.address,
                "Mooncake's ports accept connections on all interfaces and ask for no secret: whoever reaches them can \
                 read and write the registered memory; keep them behind a firewall (docs/mooncake.md)"
            );
        }
        tracing::info!(address = engine.address, protocol = %engine.choice, "Mooncake's engine is up");
        let keeper = keeper::start(engine.clone())?;
        let shared = Shared {
            address: engine.address.clone(),
            protocol: engine.choice.protocol,
            across_hosts: !host.is_loopback(),
            ledger: engine.ledger.clone(),
            in_flight: InFlight::default(),
            lines: Mutex::new(Some(Lines { engine, keeper, lanes: HashMap::new() })),
            gone: Mutex::new(gone),
        };
        Ok(Self { shared: Arc::new(shared) })
    }
}

impl fmt::Debug for MooncakeTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MooncakeTransport")
            .field("address", &self.shared.address)
            .field("protocol", &self.shared.protocol.name())
            .finish_non_exhaustive()
    }
}

impl Transport for MooncakeTransport {
    fn name(&self) -> &'static str {
        "mooncake"
    }

    fn capability(&self) -> Capability {
        Capability {
            collective: false,
            one_sided: true,
            one_sided_write: true,
            across_processes: true,
            across_hosts: self.shared.across_hosts,
            encrypts: false,
            devices: &["host"],
        }
    }

    fn collective(&self) -> Option<&dyn Collective> {
        None
    }

    fn one_sided(&self) -> Option<&dyn OneSided> {
        Some(self)
    }
}

#[async_trait]
impl OneSided for MooncakeTransport {
    async fn register(&self, buffer: Arc<dyn Buffer>) -> Result<Arc<dyn Registration>> {
        self.lend(buffer, false).await
    }

    fn post_read(&self, batch: Vec<ReadOp>, deadline: Instant) -> Result<Event> {
        self.post(Way::Read, batch.into_iter().map(Transfer::from).collect(), deadline)
    }

    async fn register_writable(&self, buffer: Arc<dyn Buffer>) -> Result<Arc<dyn Registration>> {
        self.lend(buffer, true).await
    }

    fn post_write(&self, batch: Vec<WriteOp>, deadline: Instant) -> Result<Event> {
        self.post(Way::Write, batch.into_iter().map(Transfer::from).collect(), deadline)
    }
}

impl MooncakeTransport {
    async fn lend(&self, buffer: Arc<dyn Buffer>, writable: bool) -> Result<Arc<dyn Registration>> {
        let shared = &self.shared;
        check_memory(buffer.memory(), shared.protocol, "register memory")?;
        let (address, len_bytes) = (buffer.address(), buffer.len_bytes());
        let (reply, answer) = oneshot::channel();
        shared.tell_keeper(Command::Serve { buffer, reply })?;
        answer.await.map_err(|_| {
            Error::new(ErrorKind::Internal, "register memory", "Mooncake's keeper thread has ended")
        })??;
        match shared.ledger.enter(&shared.address, address, len_bytes, writable) {
            Ok((slot, region)) => Ok(Arc::new(Registered { region, slot, shared: shared.clone() })),
            Err(error) => {
                shared.tell_keeper(Command::Withdraw { address })?;
                Err(error)
            }
        }
    }

    fn post(&self, way: Way, batch: Vec<Transfer>, deadline: Instant) -> Result<Event> {
        way.check_deadline(deadline)?;
        for transfer in &batch {
            check(transfer, way, self.shared.protocol)
                .map_err(|error| error.with(Key::Peer, &transfer.region.peer))?;
        }
        let mut by_peer: Vec<(String, Vec<Transfer>)> = Vec::new();
        let memory: Vec<BufferSlice> = batch.iter().map(|transfer| transfer.memory.clone()).collect();
        for transfer in batch {
            match by_peer.iter_mut().find(|(peer, _)| *peer == transfer.region.peer) {
                Some((_, transfers)) => transfers.push(transfer),
                None => by_peer.push((transfer.region.peer.clone(), vec![transfer])),
            }
        }
        let peers: Vec<&str> = by_peer.iter().map(|(peer, _)| peer.as_str()).collect();
        let memory: Vec<&BufferSlice> = memory.iter().collect();
        let posted = Posted::new(way, &peers, deadline, &memory);
        self.shared.in_flight.admit(&posted, &memory)?;
        self.shared.with_lines(|lines| {
            for (peer, transfers) in by_peer {
                let lane = match lines.lanes.get(&peer) {
                    Some(lane) => Ok(lane),
                    None => lane::start(lines.engine.clone(), &peer, lines.keeper.clone())
                        .map(|lane| &*lines.lanes.entry(peer).or_insert(lane)),
                };
                // Parts that are under way already keep the event from ending too early.
                let sent = lane.and_then(|lane| {
                    lane.send(Job { way, transfers, posted: posted.clone() }).map_err(|_| {
                        let what = "a thread of Mooncake's has ended";
                        Error::new(ErrorKind::Internal, way.operation(), what)
                    })
                });
                if let Err(error) = sent {
                    posted.part_ended(Err(error));
                }
            }
            Ok(())
        })?;
        Ok(Event::new(Ending(posted)))
    }
}

fn check_memory(memory: MemoryKind, protocol: Protocol, operation: &'static str) -> Result<()> {
    if memory == MemoryKind::Device && protocol == Protocol::Tcp {
        let what = "Mooncake over tcp moves host memory only; read into pinned host memory first";
        return Err(Error::new(ErrorKind::Unsupported, operation, what));
    }
    Ok(())
}

fn check(transfer: &Transfer, way: Way, protocol: Protocol) -> Result<()> {
    check_memory(transfer.memory.memory(), protocol, way.operation())?;
    let peer = &transfer.region.peer;
    let port =
        peer.rsplit_once(':').and_then(|(host, port)| port.parse::<u16>().ok().filter(|_| !host.is_empty()));
    if port.is_none() || peer.contains('\0') {
        let what = "this is no address of a Mooncake engine (`host:port`)";
        return Err(Error::new(ErrorKind::ConfigInvalid, way.operation(), what));
    }
    transfer.check(way)
}

struct Registered {
    region: RemoteRegion,
    slot: u64,
    shared: Arc<Shared>,
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registered").field("region", &self.region).finish_non_exhaustive()
    }
}

impl Registration for Registered {
    fn region(&self) -> &RemoteRegion {
        &self.region
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // In this order: no reader takes bytes of memory that is on its way out.
        self.shared.ledger.clear(self.slot);
        if self.region.len_bytes > 0
            && let Err(error) = self.shared.tell_keeper(Command::Withdraw { address: self.region.address })
        {
            tracing::warn!(%error, "memory stays registered until the engine ends");
        }
    }
}
