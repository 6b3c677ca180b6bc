//! The small TCP exchange beside UCX: where the owner's worker is, and which memory a batch is about to touch.
//!
//! Where UCX emulates one-sided operations, the owner's own thread touches the memory that a request names, and looks at
//! nothing. So the owner holds the memory of a batch from before its first request until its end, whatever becomes of the
//! registration meanwhile; that the batch then does not count is told at its end.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use ckpt_core::{Error, ErrorKind, Result, device::Buffer};
use serde::{Deserialize, Serialize};
use tokio::{
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::oneshot,
    task::AbortHandle,
};
use tokio_util::sync::CancellationToken;

use super::{
    node::{Node, Peer},
    worker::{Command, Worker},
};
use crate::{
    memory::Claim,
    owner::tune,
    wire::{broken, introduce, receive, send},
};

/// Batches of one peer at a time.
const HELD_LIMIT: usize = 4096;
/// A peer that has gone may have left requests in sockets and queues: its memory is held so much longer.
const LINGER: Duration = Duration::from_secs(10);

#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// Where is your worker?
    Open,
    /// A batch of this number begins.
    Hold(u32, Vec<Claim>),
    /// It has ended.
    Done(u32),
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Opened(Vec<u8>),
    /// To the request of that number: whether all of the batch's claims hold.
    Told(u32, Result<(), Error>),
}

type Held = HashMap<u32, (Vec<Claim>, Vec<Arc<dyn Buffer>>)>;

/// The owner's side: answers one peer until it leaves.
pub(super) async fn serve(node: Arc<Node>, mut stream: TcpStream) {
    let mut held = Held::new();
    if let Err(error) = answer(&node, &mut stream, &mut held).await {
        tracing::debug!(%error, "a peer left");
    }
    if !held.is_empty() {
        tokio::time::sleep(LINGER).await;
    }
}

async fn answer(node: &Node, stream: &mut TcpStream, held: &mut Held) -> Result<()> {
    loop {
        let reply = match receive::<Request>(stream).await? {
            Request::Open => Answer::Opened(node.worker.address.clone()),
            Request::Hold(..) if held.len() >= HELD_LIMIT => {
                return Err(Error::new(ErrorKind::Corrupt, "serve a peer", "it begins too many batches"));
            }
            Request::Hold(number, claims) => {
                let buffers = node.regions.hold(&claims).map_err(|e| e.flattened());
                Answer::Told(number, buffers.map(|buffers| drop(held.insert(number, (claims, buffers)))))
            }
            Request::Done(number) => {
                let ended = held.remove(&number).map(|(claims, _)| node.regions.check(&claims));
                Answer::Told(number, ended.unwrap_or(Ok(())).map_err(|e| e.flattened()))
            }
        };
        send(stream, &reply).await?;
    }
}

type Waiting = Arc<Mutex<Option<HashMap<u32, oneshot::Sender<Result<()>>>>>>;

/// A peer's side.
pub(super) struct Link {
    pub(super) ep: u64,
    /// Cancelled when the owner's side has ended.
    pub(super) lost: CancellationToken,
    worker: Arc<Worker>,
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    waiting: Waiting,
    number: AtomicU32,
    listening: AbortHandle,
}

impl Link {
    /// Dials the owner and connects to its worker. The caller bounds the time.
    pub(super) async fn open(node: &Node, peer: Peer, secret: &[u8]) -> Result<Arc<Self>> {
        let mut stream = TcpStream::connect(peer.0).await.map_err(|e| {
            Error::new(ErrorKind::PeerLost, "connect to a peer", "the peer does not answer").caused_by(e)
        })?;
        tune(&stream).map_err(broken)?;
        introduce(&mut stream, &node.key(secret), &peer.1).await?;
        send(&mut stream, &Request::Open).await?;
        let Answer::Opened(address) = receive(&mut stream).await? else {
            return Err(Error::new(ErrorKind::Corrupt, "connect to a peer", "it answered something else"));
        };
        let ep = node.worker.ask(|reply| Command::Connect(address, reply)).await?;
        let (reader, writer) = stream.into_split();
        let (waiting, lost): (Waiting, _) =
            (Arc::new(Mutex::new(Some(HashMap::new()))), CancellationToken::new());
        let listening = tokio::spawn(listen(reader, waiting.clone(), lost.clone())).abort_handle();
        Ok(Arc::new(Self {
            ep,
            lost,
            worker: node.worker.clone(),
            writer: tokio::sync::Mutex::new(writer),
            waiting,
            number: AtomicU32::new(0),
            listening,
        }))
    }

    /// Whether new batches may use it.
    pub(super) fn is_usable(&self) -> bool {
        !self.lost.is_cancelled()
    }

    /// Ends what runs on it.
    pub(super) fn kill(&self) {
        self.lost.cancel();
        self.worker.tell(Command::Close(self.ep));
    }

    /// A batch begins; answers its number.
    pub(super) async fn hold(&self, claims: Vec<Claim>) -> Result<u32> {
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        self.ask(number, &Request::Hold(number, claims)).await.map(|()| number)
    }

    /// It has ended; answers whether it counts.
    pub(super) async fn done(&self, number: u32) -> Result<()> {
        self.ask(number, &Request::Done(number)).await
    }

    async fn ask(&self, number: u32, request: &Request) -> Result<()> {
        let gone = || {
            let what = "the owner has ended or closed its transport";
            Error::new(ErrorKind::PeerLost, "talk to a peer", what)
        };
        let (sender, receiver) = oneshot::channel();
        {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            // `None` once nobody listens any more.
            waiting.as_mut().ok_or_else(gone)?.insert(number, sender);
        }
        let mut writer = self.writer.lock().await;
        // A frame that is cut short by a cancelled caller ends the link, as the next would not be understood.
        let whole = self.lost.clone().drop_guard();
        let sent = send(&mut *writer, request).await;
        whole.disarm();
        drop(writer);
        sent?;
        receiver.await.unwrap_or_else(|_| Err(gone()))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.listening.abort();
        self.kill();
    }
}

/// Hands answers to those who wait, until the connection ends.
async fn listen(mut reader: OwnedReadHalf, waiting: Waiting, lost: CancellationToken) {
    loop {
        match receive::<Answer>(&mut reader).await {
            Ok(Answer::Told(number, outcome)) => {
                let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
                let sender = waiting.as_mut().and_then(|waiting| waiting.remove(&number));
                // Nobody waits for the answer to a batch that has timed out.
                sender.map(|sender| sender.send(outcome));
            }
            Ok(Answer::Opened(_)) => {}
            Err(error) => {
                tracing::debug!(%error, "an owner left");
                let unanswered = waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
                drop(unanswered);
                return lost.cancel();
            }
        }
    }
}
