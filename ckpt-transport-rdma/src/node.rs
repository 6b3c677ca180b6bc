//! What one opened transport holds.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    transport::{RemoteRegion, TransportConfig},
};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::{
    config::RdmaConfig,
    connection::Connection,
    library::Api,
    memory::{Claim, MrCache, Regions},
    nic::Nic,
    owner::{self, Door},
    wire::{Descriptor, Id, random},
};

/// A pair of NICs that lost its peer is left out of new connections for this long, if there are others.
const SUSPICION: Duration = Duration::from_secs(30);
/// How often registrations of buffers that are gone are looked for.
const PRUNE: Duration = Duration::from_secs(5);

/// An owner, as its descriptors name it.
pub(crate) type Peer = (SocketAddr, Id);
type Slot = Arc<tokio::sync::Mutex<Option<Arc<Connection>>>>;

pub(crate) struct Node {
    pub(crate) id: Id,
    /// Goes out with descriptors.
    pub(crate) secret: [u8; 32],
    pub(crate) listens: SocketAddr,
    pub(crate) nics: Vec<Arc<Nic>>,
    pub(crate) config: RdmaConfig,
    pub(crate) regions: Arc<Regions>,
    pub(crate) local: MrCache,
    pub(crate) stop: CancellationToken,
    /// The runtime that the transport was opened in.
    pub(crate) runtime: Handle,
    job_secret: Vec<u8>,
    state: Mutex<State>,
}

/// What the last batch was with: batches tend to be of the same region.
struct Last {
    region: Arc<RemoteRegion>,
    peer: Peer,
    descriptor: Arc<Descriptor>,
    /// Once there was one.
    connection: Weak<Connection>,
    /// What the owner has said of the region, and how often it had released one before.
    known: Option<(Claim, u64)>,
}

#[derive(Default)]
struct State {
    last: Option<Last>,
    connections: BTreeMap<Peer, Slot>,
    /// Since when a pair of NICs is not to be used for a peer.
    suspects: HashMap<(Peer, usize, usize), Instant>,
}

impl Node {
    /// Opens the chosen NICs and listens. Must be called in a tokio runtime.
    pub(crate) fn start(config: &RdmaConfig, transport: &TransportConfig) -> Result<Arc<Self>> {
        let failed = |kind, message: &str| {
            Error::new(kind, "open the transport rdma", message.to_owned())
                .with(Key::Endpoint, transport.bind)
        };
        let runtime = Handle::try_current()
            .map_err(|e| failed(ErrorKind::Internal, "must be called in a tokio runtime").caused_by(e))?;
        if transport.bind.is_unspecified() {
            let what = "peers cannot reach this address; bind that of one interface";
            return Err(failed(ErrorKind::ConfigInvalid, what));
        }
        let api = Api::load(config)?;
        let nics = open_nics(&api, config, transport.device.info().pci_address.as_deref())?;
        let listen = || {
            let listener = std::net::TcpListener::bind((transport.bind, 0))?;
            listener.set_nonblocking(true)?;
            let listener = tokio::net::TcpListener::from_std(listener)?;
            Ok::<_, std::io::Error>((listener.local_addr()?, listener))
        };
        let listening = listen().map_err(|e| {
            nics.iter().for_each(|nic| nic.stop());
            failed(ErrorKind::Backend, "cannot listen; bind an address of this host").caused_by(e)
        });
        let (listens, listener) = listening?;
        let node = Arc::new(Self {
            id: random()?,
            secret: random()?,
            listens,
            nics,
            config: config.clone(),
            regions: Arc::default(),
            local: MrCache::default(),
            stop: CancellationToken::new(),
            runtime,
            job_secret: transport.secret.clone(),
            state: Mutex::default(),
        });
        let door = Door { key: node.key(&node.secret), id: node.id, stop: node.stop.clone() };
        let served = node.clone();
        let accept = owner::accept(door, listener, move |stream| owner::serve(served.clone(), stream));
        tokio::spawn(node.stop.clone().run_until_cancelled_owned(accept));
        tokio::spawn(node.stop.clone().run_until_cancelled_owned(prune(node.clone())));
        Ok(node)
    }

    /// The key of a connection: what was handed out with the descriptor, and the job's secret.
    pub(crate) fn key(&self, secret: &[u8]) -> Vec<u8> {
        [secret, &self.job_secret].concat()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change under this lock is one call.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection to `peer` that can still be used, made if there is none. Only one is made at a time.
    pub(crate) async fn connection(
        self: &Arc<Self>,
        peer: Peer,
        descriptor: &Descriptor,
    ) -> Result<Arc<Connection>> {
        let slot = self.lock().connections.entry(peer).or_default().clone();
        let mut slot = slot.lock().await;
        if let Some(connection) = slot.as_ref().filter(|connection| connection.is_usable()) {
            return Ok(connection.clone());
        }
        *slot = None;
        let connection = Connection::open(self, peer, descriptor).await?;
        *slot = Some(connection.clone());
        Ok(connection)
    }

    /// The connection to `peer`, if there is one now.
    pub(crate) fn connected(&self, peer: Peer) -> Option<Arc<Connection>> {
        let mut state = self.lock();
        if let Some(last) = &state.last
            && last.peer == peer
            && let Some(connection) = last.connection.upgrade().filter(|connection| connection.is_usable())
        {
            return Some(connection);
        }
        let slot = state.connections.get(&peer)?.try_lock().ok()?;
        let connection = slot.as_ref().filter(|connection| connection.is_usable()).cloned()?;
        drop(slot);
        if let Some(last) = state.last.as_mut().filter(|last| last.peer == peer) {
            (last.connection, last.known) = (Arc::downgrade(&connection), None);
        }
        Some(connection)
    }

    /// What `region`'s owner says of it and a connection that knows that `claim` holds, if the last batch was with it as
    /// well.
    pub(crate) fn at_hand(
        &self,
        region: &Arc<RemoteRegion>,
        claim: &Claim,
    ) -> Option<(Arc<Descriptor>, Arc<Connection>)> {
        let mut state = self.lock();
        let last = state.last.as_mut().filter(|last| Arc::ptr_eq(&last.region, region))?;
        let connection = last.connection.upgrade().filter(|connection| connection.is_usable())?;
        let releases = connection.releases();
        let covers = |known: &Claim| known.write == claim.write && claim.end <= known.end;
        if !last.known.is_some_and(|(known, since)| since == releases && covers(&known)) {
            if !connection.knows(std::slice::from_ref(claim)) {
                return None;
            }
            last.known = Some((*claim, releases));
        }
        Some((last.descriptor.clone(), connection))
    }

    /// The owner of `region`, and what it says of it.
    pub(crate) fn described(
        &self,
        region: &Arc<RemoteRegion>,
        describe: impl FnOnce(&RemoteRegion) -> Result<(Peer, Descriptor)>,
    ) -> Result<(Peer, Arc<Descriptor>)> {
        if let Some(last) = &self.lock().last
            && Arc::ptr_eq(&last.region, region)
        {
            return Ok((last.peer, last.descriptor.clone()));
        }
        let (peer, descriptor) = describe(region)?;
        let descriptor = Arc::new(descriptor);
        let (region, connection) = (region.clone(), Weak::new());
        let last = Last { region, peer, descriptor: descriptor.clone(), connection, known: None };
        self.lock().last = Some(last);
        Ok((peer, descriptor))
    }

    /// Leaves a pair of NICs out of the next connections to `peer`.
    pub(crate) fn suspect(&self, peer: Peer, pair: (usize, usize)) {
        self.lock().suspects.insert((peer, pair.0, pair.1), Instant::now());
    }

    /// Those of `pairs` that are not suspected and whose own NIC is up; all if none is left.
    pub(crate) fn trusted(&self, peer: Peer, pairs: Vec<(usize, usize)>) -> Vec<(usize, usize)> {
        let mut state = self.lock();
        state.suspects.retain(|_, since| since.elapsed() < SUSPICION);
        let trusted: Vec<_> = pairs
            .iter()
            .copied()
            .filter(|(l, r)| !state.suspects.contains_key(&(peer, *l, *r)))
            .filter(|(l, _)| self.nics.get(*l).is_some_and(|nic| nic.is_up()))
            .collect();
        if trusted.is_empty() { pairs } else { trusted }
    }

    /// Ends everything that runs for this transport.
    pub(crate) fn close(&self) {
        self.stop.cancel();
        let connections = std::mem::take(&mut self.lock().connections);
        drop(connections);
        self.nics.iter().for_each(|nic| nic.stop());
    }
}

/// Unpins memory whose buffers are gone and forgets connections that have ended, also when nothing is read any more.
async fn prune(node: Arc<Node>) {
    loop {
        tokio::time::sleep(PRUNE).await;
        node.local.prune();
        let mut ended = Vec::new();
        node.lock().connections.retain(|_, slot| match slot.try_lock() {
            Ok(mut slot) => {
                let keep = slot.as_ref().is_some_and(|connection| connection.is_usable());
                if !keep {
                    ended.push(slot.take());
                }
                keep
            }
            // Being made.
            Err(_) => true,
        });
        // Queue pairs end without the lock.
        drop(ended);
    }
}

/// Opens what the rules choose. A device that cannot be opened is left out if there are others.
fn open_nics(api: &Arc<Api>, config: &RdmaConfig, pci_address: Option<&str>) -> Result<Vec<Arc<Nic>>> {
    let (hcas, choice) = config.choose(pci_address);
    let choice = choice?;
    let (mut nics, mut refused) = (Vec::new(), None);
    for port in &choice.ports {
        match Nic::open(api, config, &hcas, port, nics.len()) {
            Ok(nic) => nics.push(nic),
            Err(error) => {
                tracing::warn!(%error, %port, "this RDMA device cannot be used");
                refused.get_or_insert(error);
            }
        }
    }
    tracing::debug!(rule = choice.rule, opened = nics.len(), "opened RDMA devices");
    match refused {
        Some(error) if nics.is_empty() => Err(error),
        _ => Ok(nics),
    }
}
