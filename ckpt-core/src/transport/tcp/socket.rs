//! Sockets: how they are tuned, dialled and used through a shared reference.

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpSocket, TcpStream};

use super::link::Link;
use crate::error::{Error, ErrorKind, Key, Result};

/// Wanted size of the kernel's buffers. Taken only where the system allows it: a smaller fixed size would switch off
/// the kernel's own tuning and be worse.
const BUFFER_BYTES: usize = 4 << 20;
/// On one host less is more: what fits into the processor's caches moves faster (measured: 6 GB/s instead of 4).
const LOCAL_BUFFER_BYTES: usize = 256 << 10;
/// One call moves at most this much, for the same reason.
const CALL_BYTES: usize = 256 << 10;
/// A host that fell silent is given up after about this long.
const SILENCE: Duration = Duration::from_secs(10);

/// A socket for `address`, tuned before it is connected or listens (the window's scale is agreed then).
pub(super) fn new(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if allowed("rmem_max") >= BUFFER_BYTES {
        SockRef::from(&socket).set_recv_buffer_size(BUFFER_BYTES)?;
    }
    if allowed("wmem_max") >= BUFFER_BYTES {
        SockRef::from(&socket).set_send_buffer_size(BUFFER_BYTES)?;
    }
    Ok(socket)
}

fn allowed(name: &str) -> usize {
    let text = std::fs::read_to_string(format!("/proc/sys/net/core/{name}")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// For every connected socket.
pub(super) fn tune(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    if stream.peer_addr()?.ip() == stream.local_addr()?.ip() {
        socket.set_recv_buffer_size(LOCAL_BUFFER_BYTES)?;
        socket.set_send_buffer_size(LOCAL_BUFFER_BYTES)?;
    }
    socket.set_tcp_user_timeout(Some(SILENCE))?;
    let (idle, interval) = (SILENCE / 2, Duration::from_secs(1));
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(5))
}

/// Connects; the caller bounds the time.
pub(super) async fn dial(address: SocketAddr) -> Result<TcpStream> {
    let connect = async {
        let stream = new(address)?.connect(address).await?;
        tune(&stream)?;
        Ok::<_, io::Error>(stream)
    };
    connect.await.map_err(|e| {
        Error::new(ErrorKind::PeerLost, "connect to a peer", "the peer does not answer")
            .with(Key::Peer, address)
            .caused_by(e)
    })
}

/// Fills `bytes`. A shared reference is enough: one reader and one writer may use a socket at once.
pub(super) async fn read_exact(link: &Link, bytes: &mut [u8]) -> io::Result<()> {
    fill(link, bytes, None).await
}

/// The same; `owed` says who is to be heard, and how long it may be silent.
async fn fill(link: &Link, mut bytes: &mut [u8], owed: Option<(&Heard, Duration)>) -> io::Result<()> {
    while !bytes.is_empty() {
        let len = bytes.len().min(CALL_BYTES);
        match link.try_read(&mut bytes[..len]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                bytes = &mut bytes[n..];
                if let Some((heard, _)) = owed {
                    heard.now();
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => match owed {
                None => link.socket().readable().await?,
                Some((heard, silence)) => heard.unless_silent(silence, link.socket().readable()).await?,
            },
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// When a peer was last heard, over whichever connection: on a slow link one may wait long behind the others.
#[derive(Debug)]
pub(super) struct Heard {
    start: Instant,
    /// Milliseconds after `start`.
    last: AtomicU64,
}

impl Heard {
    pub(super) fn new() -> Self {
        Self { start: Instant::now(), last: AtomicU64::new(0) }
    }

    fn now(&self) {
        self.last.fetch_max(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Runs `work` until the peer has been silent for `silence`, here and elsewhere.
    pub(super) async fn unless_silent<T>(
        &self,
        silence: Duration,
        work: impl Future<Output = io::Result<T>>,
    ) -> io::Result<T> {
        let (mut work, begun) = (std::pin::pin!(work), Instant::now());
        loop {
            let last = self.start + Duration::from_millis(self.last.load(Ordering::Relaxed));
            let until = last.max(begun) + silence;
            match tokio::time::timeout_at(until.into(), &mut work).await {
                Ok(done) => return done,
                Err(_) if self.start + Duration::from_millis(self.last.load(Ordering::Relaxed)) > last => {}
                Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
    }

    /// Fills `bytes` from a peer that owes them. A process that was stopped keeps its connections, and its kernel answers
    /// for it: it is given up once it has sent nothing for `silence`.
    pub(super) async fn read(&self, link: &Link, bytes: &mut [u8], silence: Duration) -> io::Result<()> {
        fill(link, bytes, Some((self, silence))).await
    }
}

/// Writes `head`, then `body`.
pub(super) async fn write_all(link: &Link, mut head: &[u8], mut body: &[u8]) -> io::Result<()> {
    let stream = match link {
        Link::Plain(stream) => stream,
        Link::Secure(secure) => return secure.write_all(head, body).await,
    };
    while !(head.is_empty() && body.is_empty()) {
        let parts = [IoSlice::new(head), IoSlice::new(&body[..body.len().min(CALL_BYTES)])];
        match stream.try_write_vectored(&parts) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                let from_head = n.min(head.len());
                head = &head[from_head..];
                body = &body[n - from_head..];
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
