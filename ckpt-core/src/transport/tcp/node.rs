//! One process's listener: who may connect, and where connections go.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
};
use tokio_util::sync::CancellationToken;

use super::{
    link::Link,
    one_sided::{self, Pool},
    socket::{self, Heard},
    wire::{Hello, Id, Purpose, Token, WANTS_TLS, broken, examine, other_secret},
    write,
};
use crate::{
    device::DeviceBackend,
    error::{Error, ErrorKind, Key, Result},
    tls::{self, HandshakeError, JobTls, Meeting},
    transport::{TransportConfig, group::random, regions::Regions},
};

/// A stranger must have introduced itself by then.
const HELLO_TIME: Duration = Duration::from_secs(5);
/// Connections that have not introduced themselves yet; more wait in the kernel's queue.
const STRANGERS: usize = 256;
/// Groups that were announced and not joined; more are forgotten, oldest first.
const ANNOUNCED: usize = 64;
/// Connections of one group that wait to be looked at.
const INBOX: usize = 4096;

/// A connection whose other side has proved that it belongs here.
pub(super) struct Incoming {
    pub(super) hello: Hello,
    pub(super) stream: Link,
}

struct Route {
    key: Vec<u8>,
    sender: mpsc::Sender<Incoming>,
    /// Until the join takes it.
    receiver: Option<mpsc::Receiver<Incoming>>,
}

#[derive(Default)]
struct Routes {
    groups: HashMap<Id, Route>,
    announced: VecDeque<Id>,
}

pub(super) struct Node {
    pub(super) listens: SocketAddr,
    pub(super) lanes: usize,
    pub(super) device: Arc<dyn DeviceBackend>,
    pub(super) stop: CancellationToken,
    /// Names this transport to those who read its memory, and the secret that its descriptors carry.
    pub(super) id: Id,
    pub(super) read_secret: [u8; 32],
    pub(super) regions: Arc<Regions>,
    pub(super) pool: Pool,
    heard: Mutex<HashMap<SocketAddr, Arc<Heard>>>,
    job_secret: Vec<u8>,
    pub(super) tls: Option<JobTls>,
    routes: Mutex<Routes>,
}

impl Node {
    pub(super) fn start(config: &TransportConfig) -> Result<Arc<Self>> {
        let error = |message: &str| {
            Error::new(ErrorKind::Backend, "open the transport tcp", message.to_owned())
                .with(Key::Endpoint, config.bind)
        };
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(Error::new(
                ErrorKind::Internal,
                "open the transport tcp",
                "must be called in a tokio runtime",
            ));
        }
        let tls = config.tls.then(|| JobTls::new(&config.secret)).transpose()?;
        let address = SocketAddr::new(config.bind, 0);
        let listen = || {
            let socket = socket::new(address)?;
            socket.bind(address)?;
            socket.listen(1024)
        };
        let listener =
            listen().map_err(|e| error("cannot listen; bind an address of this host").caused_by(e))?;
        let listens = listener.local_addr().map_err(|e| error("cannot ask for the port").caused_by(e))?;
        let node = Arc::new(Self {
            listens,
            lanes: config.connections.clamp(1, 64),
            device: config.device.clone(),
            stop: CancellationToken::new(),
            id: random()?,
            read_secret: random()?,
            regions: Arc::default(),
            pool: Pool::default(),
            heard: Mutex::default(),
            job_secret: config.secret.clone(),
            tls,
            routes: Mutex::default(),
        });
        tokio::spawn(node.stop.clone().run_until_cancelled_owned(accept(node.clone(), listener)));
        Ok(node)
    }

    fn lock(&self) -> MutexGuard<'_, Routes> {
        // Nothing that can panic runs under this lock.
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects; the caller bounds the time.
    pub(super) async fn dial(&self, address: SocketAddr) -> Result<Link> {
        let stream = socket::dial(address).await?;
        let Some(tls) = &self.tls else { return Ok(Link::Plain(stream)) };
        let secure = tls.connect_bulk(stream).await.map_err(|error| {
            let error = match error {
                HandshakeError::NotTls => Error::new(
                    ErrorKind::ConfigInvalid,
                    "connect to a peer",
                    "the peer does not speak TLS; give --tls or CKPT_TLS=1 to all processes or to none",
                ),
                HandshakeError::OtherToken => other_secret(),
                HandshakeError::Broken(error) => broken(error),
            };
            error.with(Key::Peer, address)
        })?;
        Ok(Link::Secure(Box::new(secure)))
    }

    /// The acceptor's half: a link to one who speaks as this node does; others are told. The caller bounds the time.
    async fn meet(&self, stream: TcpStream) -> Result<Link> {
        socket::tune(&stream).map_err(broken)?;
        let refused = |what: &str| Error::new(ErrorKind::ConfigInvalid, "accept a peer", what.to_owned());
        match (tls::meet(&stream, self.tls.is_some()).await.map_err(broken)?, &self.tls) {
            (Meeting::Fits, None) => Ok(Link::Plain(stream)),
            (Meeting::Fits, Some(tls)) => {
                let secure =
                    tls.accept_bulk(stream).await.map_err(|error| refused("no TLS").caused_by(error))?;
                Ok(Link::Secure(Box::new(secure)))
            }
            (Meeting::WantsPlain, _) => {
                tls::farewell(stream, &[WANTS_TLS]).await;
                Err(refused("a peer does not speak TLS"))
            }
            (Meeting::WantsTls, _) => {
                tls::refuse_tls(stream).await;
                Err(refused("a peer speaks TLS, which this job does not use"))
            }
        }
    }

    /// When this peer was last heard.
    pub(super) fn heard(&self, peer: SocketAddr) -> Arc<Heard> {
        // Nothing that can panic runs under this lock.
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.entry(peer).or_insert_with(|| Arc::new(Heard::new())).clone()
    }

    /// The key of a connection: what was handed out with the token or descriptor, and the job's secret.
    pub(super) fn key(&self, secret: &[u8]) -> Vec<u8> {
        [secret, &self.job_secret].concat()
    }

    fn key_of(&self, hello: &Hello) -> Option<Vec<u8>> {
        match hello.purpose {
            Purpose::Read | Purpose::Write => (hello.id == self.id).then(|| self.key(&self.read_secret)),
            _ => self.lock().groups.get(&hello.id).map(|route| route.key.clone()),
        }
    }

    /// From now on, connections for the group of `token` are kept for its join.
    pub(super) fn expect(&self, token: &Token) {
        let mut routes = self.lock();
        if routes.announced.len() == ANNOUNCED {
            let oldest = routes.announced.pop_front();
            if let Some(oldest) =
                oldest.filter(|id| routes.groups.get(id).is_some_and(|r| r.receiver.is_some()))
            {
                routes.groups.remove(&oldest);
            }
        }
        routes.announced.push_back(token.group);
        let (sender, receiver) = mpsc::channel(INBOX);
        let route = Route { key: self.key(&token.secret), sender, receiver: Some(receiver) };
        routes.groups.insert(token.group, route);
    }

    /// Takes the group's connections; they are refused again when the answer is dropped.
    pub(super) fn inbox(self: &Arc<Self>, token: &Token, root: bool) -> Result<Inbox> {
        let refuse =
            |message: &str| Err(Error::new(ErrorKind::ConfigInvalid, "join a group", message.to_owned()));
        let known = self.lock().groups.contains_key(&token.group);
        if root && !known {
            return refuse(
                "the token was not made by this member; the member that makes it must be number 0",
            );
        }
        if !known {
            self.expect(token);
        }
        let mut routes = self.lock();
        routes.announced.retain(|id| *id != token.group);
        match routes.groups.get_mut(&token.group).and_then(|route| route.receiver.take()) {
            Some(receiver) => Ok(Inbox { node: self.clone(), group: token.group, receiver }),
            None => refuse("this process is joining this group already"),
        }
    }
}

/// A group's connections while it forms.
pub(super) struct Inbox {
    node: Arc<Node>,
    group: Id,
    receiver: mpsc::Receiver<Incoming>,
}

impl Inbox {
    /// The next one. Cancel safe. `None` cannot come while the node lives, and this keeps it alive.
    pub(super) async fn next(&mut self) -> Result<Incoming> {
        self.receiver
            .recv()
            .await
            .ok_or_else(|| Error::new(ErrorKind::Aborted, "join a group", "the transport was closed"))
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.node.lock().groups.remove(&self.group);
    }
}

async fn accept(node: Arc<Node>, listener: TcpListener) {
    let strangers = Arc::new(Semaphore::new(STRANGERS));
    loop {
        // The semaphore is never closed.
        let Ok(permit) = strangers.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: others may be given back meanwhile.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (node, stop) = (node.clone(), node.stop.clone());
        tokio::spawn(stop.run_until_cancelled_owned(async move {
            let introduced = async {
                let link = node.meet(stream).await?;
                let hello = examine(&link, |hello| node.key_of(hello)).await?;
                Ok::<_, Error>((hello, link))
            };
            let (hello, stream) = match tokio::time::timeout(HELLO_TIME, introduced).await {
                Ok(Ok(introduced)) => introduced,
                Ok(Err(error)) => return tracing::debug!(%error, "refused a connection"),
                Err(_) => return tracing::debug!("a connection did not introduce itself in time"),
            };
            drop(permit);
            match hello.purpose {
                Purpose::Read => return one_sided::serve(&node, &stream).await,
                Purpose::Write => return write::serve(&node, &stream).await,
                _ => {}
            }
            let sender = node.lock().groups.get(&hello.id).map(|route| route.sender.clone());
            if let Some(sender) = sender
                && sender.try_send(Incoming { hello, stream }).is_err()
            {
                tracing::debug!("a connection came for a group that has ended or is full");
            }
        }));
    }
}
