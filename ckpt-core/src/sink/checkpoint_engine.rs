//! A worker link that speaks checkpoint-engine's protocol: pickles from a ZeroMQ request socket to its worker's reply
//! socket. Workers from PyPI take updates through it unmodified.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::{
    net::UnixStream,
    time::{timeout, timeout_at},
};

use super::{
    Afterwards, BucketMessage, WeightSink, ce_message,
    gate::{Gate, Protocol},
    zmtp::{Replier, ZmtpError},
};
use crate::{
    device::Ring,
    error::{Error, ErrorKind, Key, Result},
    liveness,
    worker::wire::clip,
};

/// How long a worker that was busy when its update failed is waited for in the background.
const LINGER: Duration = Duration::from_secs(600);
/// How long a worker that was told to raise may take to close its socket before it is left alone.
const LEAVE: Duration = Duration::from_millis(500);
/// How long a worker may take to answer an exception that came where a ring was due.
const FIRST_ANSWER: Duration = Duration::from_secs(5);
/// Longest part of a worker's reply that goes into an error.
const MAX_REPORT: usize = 16 << 10;
pub(super) const FILE_KIND: &str = "ce";

/// What the worker understands; there is no negotiation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WireVersion {
    /// checkpoint-engine 0.4.0 and newer: one `None` drops the ring, another runs the post hook.
    #[default]
    Ce04,
    /// Before 0.4.0: a single `None` does both, so the post hook runs before the ring is free.
    Ce03,
}

/// The link to one checkpoint-engine worker.
#[derive(Debug)]
pub struct CheckpointEngineSink {
    uuid: String,
    endpoint: String,
    wire: WireVersion,
    stage: Stage,
    /// Gone once the worker was told to raise.
    link: Option<Link>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Bound,
    Open,
    Released,
    Finished,
}

impl CheckpointEngineSink {
    /// Listens for the worker of the device `uuid` in `runtime_dir` (mode 0700). Needs a tokio runtime.
    pub fn bind(runtime_dir: &Path, uuid: &str, wire: WireVersion) -> Result<Self> {
        let gate =
            Gate::bind(runtime_dir, FILE_KIND, uuid, ZmtpProtocol).map_err(|e| e.with(Key::Worker, uuid))?;
        let endpoint = format!("ipc://{}", gate.path().display());
        let link = Link::new(gate);
        Ok(Self { uuid: uuid.to_owned(), endpoint, wire, stage: Stage::Bound, link: Some(link) })
    }

    fn error(&self, kind: ErrorKind, operation: &'static str, message: impl Into<String>) -> Error {
        let error = Error::new(kind, operation, message).with(Key::Worker, &self.uuid);
        match self.link.as_ref().and_then(|l| l.peer.as_ref()).and_then(Replier::pid) {
            Some(pid) => error.with(Key::Pid, pid),
            None => error.with(Key::Endpoint, &self.endpoint),
        }
    }

    fn expect(&self, stage: Stage, operation: &'static str) -> Result<()> {
        if self.stage == stage && self.link.is_some() {
            return Ok(());
        }
        let message = format!("called while the link is {:?}, not {stage:?}", self.stage);
        Err(self.error(ErrorKind::Internal, operation, message))
    }

    /// One request and its reply.
    async fn ask(&mut self, payload: &[u8], operation: &'static str, deadline: Instant) -> Result<()> {
        let Some(link) = &mut self.link else {
            return Err(self.error(ErrorKind::Aborted, operation, "the worker was already told to raise"));
        };
        if link.lost.is_some() {
            return Err(self.error(ErrorKind::PeerLost, operation, "the link broke earlier"));
        }
        if link.peer.is_none() {
            let waited = link.gate.worker(deadline).await;
            link.peer = Some(
                waited.map_err(|e| e.with(Key::Worker, &self.uuid).with(Key::Endpoint, &self.endpoint))?,
            );
        }
        let Some(peer) = &mut link.peer else {
            return Err(self.error(ErrorKind::Internal, operation, "no worker is connected"));
        };
        link.untouched = false;
        let pid = peer.pid();
        let asked = async {
            peer.request(payload).await?;
            peer.reply().await
        };
        let waited = tokio::select! {
            biased;
            waited = timeout_at(deadline.into(), asked) => waited,
            pid = liveness::stopped(pid) => {
                return Err(self.error(ErrorKind::PeerLost, operation, liveness::told(pid, "the worker")));
            }
        };
        match waited {
            Ok(Ok(reply)) => {
                read_reply(&reply).map_err(|(kind, message)| self.error(kind, operation, message))
            }
            Ok(Err(error)) => {
                let by_peer = by_peer(&error);
                link.lost = Some(if by_peer { Lost::ByPeer } else { Lost::ByUs });
                Err(self.broken(error, by_peer, operation))
            }
            Err(_) => {
                Err(self.error(ErrorKind::Timeout, operation, "the worker has not answered by the deadline"))
            }
        }
    }

    fn broken(&self, cause: ZmtpError, by_peer: bool, operation: &'static str) -> Error {
        if !by_peer {
            return self
                .error(ErrorKind::Corrupt, operation, "the worker's socket broke the protocol")
                .caused_by(cause);
        }
        let hint = match (self.stage, self.wire) {
            (Stage::Released, WireVersion::Ce04) => {
                "the worker closed its link instead of answering the second None: its post hook raised (see the \
                 engine's answer), or it is older than checkpoint-engine 0.4.0 and needs --worker-protocol ce-0.3"
            }
            _ => {
                "the worker closed its link while it owed a reply: it died or raised (see the engine's answer)"
            }
        };
        self.error(ErrorKind::PeerLost, operation, hint).caused_by(cause)
    }
}

#[async_trait]
impl WeightSink for CheckpointEngineSink {
    fn endpoint(&self) -> &str {
        &self.endpoint
    }

    async fn open(&mut self, ring: &dyn Ring, deadline: Instant) -> Result<()> {
        self.expect(Stage::Bound, "open the ring")?;
        let payload = ce_message::open(&ring.export(), ring.buffer().len_bytes())
            .map_err(|e| e.with(Key::Worker, &self.uuid))?;
        self.ask(&payload, "open the ring", deadline).await?;
        self.stage = Stage::Open;
        Ok(())
    }

    async fn deliver(&mut self, bucket: &BucketMessage, deadline: Instant) -> Result<()> {
        self.expect(Stage::Open, "deliver a bucket")?;
        let name = |e: Error| e.with(Key::Worker, &self.uuid).with(Key::Bucket, bucket.bucket);
        let payload = ce_message::bucket(bucket).map_err(name)?;
        self.ask(&payload, "deliver a bucket", deadline).await.map_err(|e| e.with(Key::Bucket, bucket.bucket))
    }

    async fn release(&mut self, deadline: Instant) -> Result<()> {
        self.expect(Stage::Open, "release the ring")?;
        self.ask(&ce_message::none(), "release the ring", deadline).await?;
        self.stage = Stage::Released;
        Ok(())
    }

    async fn finish(&mut self, deadline: Instant) -> Result<()> {
        self.expect(Stage::Released, "run the post hook")?;
        if self.wire == WireVersion::Ce04 {
            self.ask(&ce_message::none(), "run the post hook", deadline).await?;
        }
        self.stage = Stage::Finished;
        Ok(())
    }

    async fn fail(&mut self, cause: &Error, deadline: Instant) -> Result<Afterwards> {
        let Some(link) = self.link.take() else { return Ok(Afterwards::LetGo) };
        let over = self.stage == Stage::Finished
            || (self.stage == Stage::Released && self.wire == WireVersion::Ce03);
        if over {
            return Ok(Afterwards::LetGo);
        }
        // The worker has no deadline of its own: if it is busy for longer than this call may take, it must still hear
        // the exception when it comes back, or it would wait for ever. So this runs by itself.
        let text = cause.flattened().to_string();
        let stopped = link.peer.as_ref().and_then(Replier::pid).is_some_and(liveness::is_stopped);
        let mut telling = tokio::spawn(async move { timeout(LINGER, link.raise(&text)).await.is_ok() });
        if stopped {
            return Ok(Afterwards::MayHold);
        }
        match timeout_at(deadline.into(), &mut telling).await {
            // It closes its socket before it drops the ring, so even a closed link says nothing.
            Ok(_) => Ok(Afterwards::MayHold),
            Err(_) => Err(self.error(
                ErrorKind::Timeout,
                "tell the worker to raise",
                "the worker was still busy or absent at the deadline; it will be told when it is back",
            )),
        }
    }
}

#[derive(Debug)]
pub(super) struct Link {
    gate: Gate<ZmtpProtocol>,
    peer: Option<Replier>,
    lost: Option<Lost>,
    /// Nothing was ever sent: the worker still waits for its first message.
    untouched: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lost {
    /// It closed its socket: it has raised or died, and hears nothing more.
    ByPeer,
    /// Given up on this side: its ZeroMQ will connect again.
    ByUs,
}

impl Link {
    /// To a worker that may come to `gate`.
    pub(super) fn new(gate: Gate<ZmtpProtocol>) -> Self {
        Self { gate, peer: None, lost: None, untouched: true }
    }

    /// Makes the worker raise, however long it takes.
    pub(super) async fn raise(mut self, text: &str) {
        let far = Instant::now() + LINGER;
        if self.lost == Some(Lost::ByPeer) {
            return;
        }
        if self.lost.is_none() {
            if self.peer.is_none() {
                self.peer = self.gate.worker(far).await.ok();
            }
            let Some(peer) = &mut self.peer else { return };
            match tell(peer, text, self.untouched).await {
                Ok(()) => return,
                Err(error) if by_peer(&error) => return,
                Err(error) => {
                    tracing::warn!(%error, "the link broke; the worker will be told when it reconnects")
                }
            }
        }
        self.peer = None;
        self.gate.refuse_next(text, far).await;
    }
}

/// Sends the exception, after the reply that is still owed.
async fn tell(peer: &mut Replier, text: &str, untouched: bool) -> Result<(), ZmtpError> {
    if peer.owes_reply() {
        peer.reply().await?;
    }
    let exception = ce_message::exception(text);
    peer.request(&exception).await?;
    // A worker that was waiting for its ring answers with a traceback and raises after one more message. Any other
    // worker raises at once and closes its socket.
    let patience = if untouched { FIRST_ANSWER } else { LEAVE };
    if let Ok(Ok(_)) = timeout(patience, peer.reply()).await {
        peer.request(&exception).await?;
        // Its closed socket says that it has gone; a message in its queue arrives all the same.
        let _ = timeout(LEAVE, peer.left()).await;
    }
    Ok(())
}

fn by_peer(error: &ZmtpError) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
    match error {
        ZmtpError::Closed => true,
        ZmtpError::Io(io) => matches!(io.kind(), BrokenPipe | ConnectionReset),
        _ => false,
    }
}

/// `Ok` for the empty reply; else what the worker says.
pub(crate) fn read_reply(reply: &[u8]) -> Result<(), (ErrorKind, String)> {
    if reply.is_empty() {
        return Ok(());
    }
    // 0.2.x sent its exception as a pickle. Loading one would run whatever it says.
    if let [0x80, 2..=5, rest @ ..] = reply {
        let text = clip(&printable_runs(rest), MAX_REPORT);
        return Err((
            ErrorKind::Backend,
            format!(
                "the worker replied with a pickled exception, which is never loaded; readable in it: {text}"
            ),
        ));
    }
    match std::str::from_utf8(reply) {
        Ok(text) => {
            Err((ErrorKind::Backend, format!("the worker reports: {}", clip(text.trim_end(), MAX_REPORT))))
        }
        Err(_) => Err((
            ErrorKind::Corrupt,
            format!("the worker's reply of {} bytes is neither empty nor text", reply.len()),
        )),
    }
}

fn printable_runs(bytes: &[u8]) -> String {
    let runs = bytes.split(|b| !(b' '..=b'~').contains(b)).filter(|run| run.len() >= 4);
    runs.map(String::from_utf8_lossy).collect::<Vec<_>>().join(" | ")
}

#[derive(Debug)]
pub(super) struct ZmtpProtocol;

impl Protocol for ZmtpProtocol {
    type Peer = Replier;

    async fn handshake(&self, stream: UnixStream) -> Result<Replier, String> {
        Replier::handshake(stream).await.map_err(|e| e.to_string())
    }

    async fn refuse(&self, mut peer: Replier, why: String) {
        // It is told once; a worker that leaves before that needs no telling.
        let _ = tell(&mut peer, &why, true).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_read_as_text_and_never_loaded() {
        assert!(read_reply(b"").is_ok());
        let (kind, text) = read_reply("Traceback\n  ValueError: \u{e9}\n".as_bytes()).unwrap_err();
        assert_eq!(
            (kind, text.as_str()),
            (ErrorKind::Backend, "the worker reports: Traceback\n  ValueError: \u{e9}")
        );
        let pickled = b"\x80\x04\x95\x2d\0\0\0\0\0\0\0\x8c\x08builtins\x94\x8c\x0aValueError\x94\x93\x94\x8c\x0bno lm_head!\x94\x85\x94R\x94.";
        let (kind, text) = read_reply(pickled).unwrap_err();
        assert_eq!(kind, ErrorKind::Backend);
        assert!(text.ends_with("builtins | ValueError | no lm_head!"), "{text}");
        assert_eq!(read_reply(b"\xff\xfe\x00").unwrap_err().0, ErrorKind::Corrupt);
        let long = "x".repeat(1 << 20);
        assert!(read_reply(long.as_bytes()).unwrap_err().1.len() < 20_000);
    }
}
