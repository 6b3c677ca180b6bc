//! The parameter server's side of the native worker protocol (`docs/worker-protocol.md`).

use std::{
    collections::{HashMap, VecDeque},
    path::Path,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use super::{
    Afterwards, BucketMessage, TensorInRing, WeightSink,
    gate::{Gate, Protocol},
    layout::Layout,
};
use crate::{
    device::{Ring, RingExport},
    error::{Error, ErrorKind, Key, Result},
    liveness,
    worker::wire::{self, Down, Entry, Hello, Open, RingId, TensorRef, Up},
};

/// How long a worker that has not come yet is waited for to be told of a failure.
const LATE: Duration = Duration::from_secs(1);
/// Tensors of one layout frame.
const LAYOUT_CHUNK: usize = 16_384;
pub(super) const FILE_KIND: &str = "native";

/// What makes a [`NativeSink`] faster or stricter than the plain one of `Default`.
#[derive(Clone, Debug, Default)]
pub struct NativeSinkConfig {
    /// The ring's number if its owner keeps it between updates and [`Ring::kept`] does not say so itself: the worker then
    /// keeps its mapping too, until another number comes. A number must never be used for two rings of one process.
    pub kept_ring: Option<u64>,
    /// All tensors; the worker is told once, and buckets refer to them by index.
    pub layout: Option<Arc<Layout>>,
    /// xxh3-64 (seed 0) by tensor name; the worker refuses bytes that differ.
    pub digests: Option<Arc<HashMap<Arc<str>, u64>>>,
}

/// A worker link that speaks our own protocol.
///
/// Besides the methods of [`WeightSink`] it can have several buckets under way: [`NativeSink::post`] and
/// [`NativeSink::acked`], up to [`NativeSink::window`] at once.
#[derive(Debug)]
pub struct NativeSink {
    uuid: String,
    endpoint: String,
    config: NativeSinkConfig,
    gate: Gate<NativeProtocol>,
    peer: Option<Peer>,
    stage: Stage,
    owed: VecDeque<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Bound,
    Open,
    Released,
    Finished,
    /// The worker has reported an error and waits for [`Down::Fail`].
    Reported,
}

impl NativeSink {
    /// Listens for the worker of the device `uuid` in `runtime_dir` (mode 0700). Needs a tokio runtime.
    pub fn bind(runtime_dir: &Path, uuid: &str, config: NativeSinkConfig) -> Result<Self> {
        let protocol = NativeProtocol { uuid: uuid.to_owned() };
        let gate =
            Gate::bind(runtime_dir, FILE_KIND, uuid, protocol).map_err(|e| e.with(Key::Worker, uuid))?;
        let endpoint = format!("{}{}", crate::worker::ENDPOINT_SCHEME, gate.path().display());
        Ok(Self {
            uuid: uuid.to_owned(),
            endpoint,
            config,
            gate,
            peer: None,
            stage: Stage::Bound,
            owed: VecDeque::new(),
        })
    }

    /// How many buckets the worker lets be under way; 1 before it has connected.
    pub fn window(&self) -> usize {
        self.peer.as_ref().map_or(1, |p| p.hello.window.max(1) as usize)
    }

    /// Sends a bucket without waiting for its ack. At most [`NativeSink::window`] may be under way.
    pub async fn post(&mut self, bucket: &BucketMessage, deadline: Instant) -> Result<()> {
        self.expect(Stage::Open, "deliver a bucket")?;
        if self.owed.len() >= self.window() {
            return Err(self.error(
                ErrorKind::Internal,
                "deliver a bucket",
                "the worker's window is full; wait for an ack first",
            ));
        }
        let mut next = 0;
        let entries = bucket.tensors.iter().map(|t| self.entry(t, &mut next)).collect::<Result<_>>()?;
        self.owed.push_back(bucket.bucket);
        self.send(&Down::Bucket { bucket: bucket.bucket, entries }, "deliver a bucket", deadline)
            .await
            .map_err(|e| e.with(Key::Bucket, bucket.bucket))
    }

    /// Waits until the oldest bucket under way has been copied out; its number.
    pub async fn acked(&mut self, deadline: Instant) -> Result<u32> {
        let Some(bucket) = self.owed.front().copied() else {
            return Err(self.error(ErrorKind::Internal, "wait for an ack", "no bucket is under way"));
        };
        match self.reply("wait for an ack", deadline).await.map_err(|e| e.with(Key::Bucket, bucket))? {
            Up::Ack { bucket: acked } if acked == bucket => {
                self.owed.pop_front();
                Ok(bucket)
            }
            other => Err(self.unexpected("wait for an ack", &other).with(Key::Bucket, bucket)),
        }
    }

    /// `next` is the number that the tensor is likely to have, and then the one that its successor is.
    fn entry(&self, tensor: &TensorInRing, next: &mut u32) -> Result<Entry> {
        let meta = &tensor.meta;
        let index = self.config.layout.as_ref().and_then(|layout| layout.find(meta, *next));
        *next = index.map_or(*next, |index| index.wrapping_add(1));
        if meta.shape.len() > usize::from(u16::MAX) || meta.name.len() > wire::MAX_TEXT {
            return Err(self
                .error(ErrorKind::Unsupported, "deliver a bucket", "name or shape are too long for the wire")
                .with(Key::Tensor, meta.name.chars().take(80).collect::<String>()));
        }
        let digest = self.config.digests.as_ref().and_then(|d| d.get(&meta.name).copied());
        let tensor_ref = match index {
            Some(index) => TensorRef::Index(index),
            None => TensorRef::Inline(meta.clone()),
        };
        Ok(Entry { tensor: tensor_ref, offset: tensor.offset, digest })
    }

    fn error(&self, kind: ErrorKind, operation: &'static str, message: impl Into<String>) -> Error {
        let error = Error::new(kind, operation, message).with(Key::Worker, &self.uuid);
        match &self.peer {
            Some(peer) => error.with(Key::Pid, peer.hello.pid),
            None => error.with(Key::Endpoint, &self.endpoint),
        }
    }

    fn unexpected(&self, operation: &'static str, message: &Up) -> Error {
        self.error(ErrorKind::Corrupt, operation, format!("the worker sent {message:?} out of turn"))
    }

    fn expect(&self, stage: Stage, operation: &'static str) -> Result<()> {
        if self.stage == stage {
            return Ok(());
        }
        let message = format!("called while the link is {:?}, not {stage:?}", self.stage);
        Err(self.error(ErrorKind::Internal, operation, message))
    }

    async fn send(&mut self, message: &Down, operation: &'static str, deadline: Instant) -> Result<()> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        if bytes.len() - wire::HEADER_LEN > wire::MAX_TO_WORKER as usize {
            let what = format!(
                "a message of {} bytes is over the protocol's limit; use smaller buckets",
                bytes.len()
            );
            return Err(self.error(ErrorKind::Unsupported, operation, what));
        }
        self.send_bytes(&bytes, operation, deadline).await
    }

    async fn send_bytes(&mut self, bytes: &[u8], operation: &'static str, deadline: Instant) -> Result<()> {
        let Some(peer) = &mut self.peer else {
            return Err(self.error(ErrorKind::Internal, operation, "no worker is connected"));
        };
        if peer.half_sent {
            return Err(self.error(ErrorKind::PeerLost, operation, "an earlier message was cut off"));
        }
        // A message that was begun and not ended, by an error or a dropped future, ends the link.
        peer.half_sent = true;
        match tokio::time::timeout_at(deadline.into(), peer.stream.write_all(bytes)).await {
            Ok(Ok(())) => {
                peer.half_sent = false;
                Ok(())
            }
            // What the worker said before it left explains more than the broken pipe.
            Ok(Err(io)) => match self.reply(operation, deadline).await {
                Err(error) if error.kind() == ErrorKind::Backend => Err(error),
                _ => Err(self
                    .error(ErrorKind::PeerLost, operation, "the worker closed its link; it died or gave up")
                    .caused_by(io)),
            },
            Err(_) => {
                Err(self.error(ErrorKind::Timeout, operation, "the worker took no message by the deadline"))
            }
        }
    }

    /// The next message; a worker's error becomes this call's error.
    async fn reply(&mut self, operation: &'static str, deadline: Instant) -> Result<Up> {
        let Some(peer) = &mut self.peer else {
            return Err(self.error(ErrorKind::Internal, operation, "no worker is connected"));
        };
        let pid = peer.pid;
        let waited = tokio::select! {
            biased;
            waited = tokio::time::timeout_at(deadline.into(), peer.receive()) => waited,
            pid = liveness::stopped(pid) => {
                return Err(self.error(ErrorKind::PeerLost, operation, liveness::told(pid, "the worker")));
            }
        };
        match waited {
            Ok(Ok(Up::Error { text })) => {
                self.stage = Stage::Reported;
                self.owed.clear();
                Err(self.error(ErrorKind::Backend, operation, format!("the worker reports: {text}")))
            }
            Ok(Ok(message)) => Ok(message),
            Ok(Err(Lost::Closed)) => Err(self.error(
                ErrorKind::PeerLost,
                operation,
                "the worker closed its link while it owed an answer; it died or gave up",
            )),
            Ok(Err(Lost::Io(io))) => {
                Err(self.error(ErrorKind::PeerLost, operation, "the link to the worker broke").caused_by(io))
            }
            Ok(Err(Lost::Wire(wire))) => {
                Err(self.error(ErrorKind::Corrupt, operation, "the worker sent nonsense").caused_by(wire))
            }
            Err(_) => {
                Err(self.error(ErrorKind::Timeout, operation, "the worker has not answered by the deadline"))
            }
        }
    }

    async fn connected(&mut self, deadline: Instant) -> Result<()> {
        if self.peer.is_none() {
            let peer = self
                .gate
                .worker(deadline)
                .await
                .map_err(|e| e.with(Key::Worker, &self.uuid).with(Key::Endpoint, &self.endpoint))?;
            tracing::debug!(uuid = %self.uuid, pid = peer.hello.pid, software = %peer.hello.software, "worker connected");
            self.peer = Some(peer);
        }
        Ok(())
    }

    fn open_bytes(&self, ring: &dyn Ring, hello: &Hello) -> Result<Vec<u8>> {
        let export = ring.export();
        let (kind, bit) = match &export {
            RingExport::Host { path, .. } => {
                if path.to_str().is_none() {
                    return Err(self.error(
                        ErrorKind::Unsupported,
                        "open the ring",
                        "the ring's path is not UTF-8; set CKPT_RUNTIME_DIR to a plain path",
                    ));
                }
                ("host", wire::CAN_HOST)
            }
            RingExport::Cuda { .. } => ("cuda", wire::CAN_CUDA),
            RingExport::Ascend { .. } => ("ascend", wire::CAN_ASCEND),
        };
        if hello.capabilities & bit == 0 {
            let what = format!("this worker ({}) cannot map {kind} memory", hello.software);
            return Err(self.error(ErrorKind::Unsupported, "open the ring", what));
        }
        let ring_id = match self.config.kept_ring {
            Some(number) => RingId { process: process_nonce()?, number },
            None => RingId::default(),
        };
        let (layout, layout_len) = match &self.config.layout {
            Some(layout) => (layout.digest(), layout.tensors().len() as u32),
            None => (0, 0),
        };
        let ring_bytes = ring.buffer().len_bytes();
        let mut bytes = Vec::new();
        Down::Open(Open { ring: ring_id, ring_bytes, export, layout, layout_len }).encode(&mut bytes);
        if let Some(layout) = &self.config.layout
            && hello.layout != layout.digest()
        {
            for (chunk, tensors) in layout.tensors().chunks(LAYOUT_CHUNK).enumerate() {
                let first = (chunk * LAYOUT_CHUNK) as u32;
                Down::Layout { first, tensors: tensors.to_vec() }.encode(&mut bytes);
            }
        }
        Ok(bytes)
    }
}

#[async_trait]
impl WeightSink for NativeSink {
    fn endpoint(&self) -> &str {
        &self.endpoint
    }

    async fn open(&mut self, ring: &dyn Ring, deadline: Instant) -> Result<()> {
        self.expect(Stage::Bound, "open the ring")?;
        self.connected(deadline).await?;
        self.config.kept_ring = self.config.kept_ring.or(ring.kept());
        let Some(peer) = &self.peer else {
            return Err(self.error(ErrorKind::Internal, "open the ring", "no worker is connected"));
        };
        let bytes = self.open_bytes(ring, &peer.hello)?;
        self.stage = Stage::Open;
        self.send_bytes(&bytes, "open the ring", deadline).await?;
        match self.reply("open the ring", deadline).await? {
            Up::Opened { .. } => Ok(()),
            other => Err(self.unexpected("open the ring", &other)),
        }
    }

    async fn deliver(&mut self, bucket: &BucketMessage, deadline: Instant) -> Result<()> {
        self.post(bucket, deadline).await?;
        while !self.owed.is_empty() {
            self.acked(deadline).await?;
        }
        Ok(())
    }

    async fn release(&mut self, deadline: Instant) -> Result<()> {
        self.expect(Stage::Open, "release the ring")?;
        while !self.owed.is_empty() {
            self.acked(deadline).await?;
        }
        self.stage = Stage::Released;
        let keep = self.config.kept_ring.is_some();
        self.send(&Down::Release { keep }, "release the ring", deadline).await?;
        match self.reply("release the ring", deadline).await? {
            Up::Released => Ok(()),
            other => Err(self.unexpected("release the ring", &other)),
        }
    }

    async fn finish(&mut self, deadline: Instant) -> Result<()> {
        self.expect(Stage::Released, "run the post hook")?;
        self.send(&Down::Finish, "run the post hook", deadline).await?;
        match self.reply("run the post hook", deadline).await? {
            Up::Finished => {
                self.stage = Stage::Finished;
                Ok(())
            }
            other => Err(self.unexpected("run the post hook", &other)),
        }
    }

    async fn fail(&mut self, cause: &Error, deadline: Instant) -> Result<Afterwards> {
        if self.stage == Stage::Finished {
            return Ok(Afterwards::LetGo);
        }
        if self.peer.as_ref().is_some_and(|p| p.half_sent) {
            // Nothing can follow half a message. A closed link makes the worker raise as well.
            self.stage = Stage::Finished;
            self.peer = None;
            return Ok(Afterwards::MayHold);
        }
        // A worker that comes later finds the door closed, which says enough.
        self.connected(deadline.min(Instant::now() + LATE)).await?;
        let text = cause.flattened().to_string();
        self.send(&Down::Fail { text }, "tell the worker to raise", deadline).await?;
        if self.peer.as_ref().and_then(|p| p.pid).is_some_and(liveness::is_stopped) {
            // It will read that when it is woken. Looked at now: another failure may have come before the link's own.
            self.stage = Stage::Finished;
            return Ok(Afterwards::MayHold);
        }
        // It answers once it has let go of the ring; a closed link says the same.
        loop {
            match self.reply("wait until the worker has raised", deadline).await {
                Ok(Up::Dropped) => break,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Backend => {}
                Err(error) if error.kind() == ErrorKind::PeerLost => break,
                Err(error) => return Err(error),
            }
        }
        self.stage = Stage::Finished;
        Ok(Afterwards::LetGo)
    }
}

/// Tells rings of this process from those of every other one.
fn process_nonce() -> Result<u64> {
    static NONCE: OnceLock<u64> = OnceLock::new();
    if let Some(nonce) = NONCE.get() {
        return Ok(*nonce);
    }
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|e| {
        Error::new(ErrorKind::Backend, "draw a random number", format!("the operating system gave none: {e}"))
    })?;
    Ok(*NONCE.get_or_init(|| u64::from_le_bytes(bytes) | 1))
}

#[derive(Debug)]
struct NativeProtocol {
    uuid: String,
}

/// A worker that has introduced itself.
#[derive(Debug)]
struct Peer {
    stream: UnixStream,
    inbox: BytesMut,
    hello: Hello,
    half_sent: bool,
    /// As the kernel sees it from here: the worker's own word may be of another namespace.
    pid: Option<i32>,
}

enum Lost {
    Closed,
    Io(std::io::Error),
    Wire(wire::WireError),
}

impl Lost {
    fn text(self) -> String {
        match self {
            Lost::Closed => "it closed the connection".to_owned(),
            Lost::Io(error) => error.to_string(),
            Lost::Wire(error) => error.to_string(),
        }
    }
}

impl Peer {
    /// The next message. Cancel safe: bytes that have come stay in the inbox.
    async fn receive(&mut self) -> Result<Up, Lost> {
        receive(&mut self.stream, &mut self.inbox).await
    }
}

async fn receive(stream: &mut UnixStream, inbox: &mut BytesMut) -> Result<Up, Lost> {
    loop {
        if let Some(header) = inbox.first_chunk::<{ wire::HEADER_LEN }>() {
            let (len, kind) = wire::header(header, wire::MAX_FROM_WORKER).map_err(Lost::Wire)?;
            if let Some(body) = inbox.get(wire::HEADER_LEN..wire::HEADER_LEN + len) {
                let message = Up::decode(kind, body).map_err(Lost::Wire)?;
                inbox.advance(wire::HEADER_LEN + len);
                return Ok(message);
            }
        }
        match stream.read_buf(inbox).await {
            Ok(0) => return Err(Lost::Closed),
            Ok(_) => {}
            Err(error) => return Err(Lost::Io(error)),
        }
    }
}

impl Protocol for NativeProtocol {
    type Peer = Peer;

    async fn handshake(&self, mut stream: UnixStream) -> Result<Peer, String> {
        let io = |e: std::io::Error| format!("the connection broke during the handshake: {e}");
        stream.write_all(&wire::preamble()).await.map_err(io)?;
        let mut preamble = [0; wire::PREAMBLE_LEN];
        stream.read_exact(&mut preamble).await.map_err(io)?;
        wire::agree(&preamble).map_err(|e| e.to_string())?;
        let mut inbox = BytesMut::new();
        let hello = match receive(&mut stream, &mut inbox).await {
            Ok(Up::Hello(hello)) => hello,
            Ok(_) => return Err("its first message is not a hello".to_owned()),
            Err(lost) => return Err(lost.text()),
        };
        let pid = stream.peer_cred().ok().and_then(|cred| cred.pid());
        let peer = Peer { stream, inbox, hello, half_sent: false, pid };
        if peer.hello.uuid != self.uuid {
            let why = format!("this endpoint is for the worker of {}, not of {}", self.uuid, peer.hello.uuid);
            self.refuse(peer, why.clone()).await;
            return Err(why);
        }
        Ok(peer)
    }

    async fn refuse(&self, mut peer: Peer, why: String) {
        let mut bytes = Vec::new();
        Down::Fail { text: why }.encode(&mut bytes);
        if peer.stream.write_all(&bytes).await.is_ok() {
            // Until it has let go (or closed), so that the text is not lost with the connection.
            while let Ok(message) = peer.receive().await {
                if message == Up::Dropped {
                    break;
                }
            }
        }
    }
}
