//! The requesting side of ZeroMQ's wire protocol (ZMTP 3, NULL mechanism) for exactly one `REP` peer.
//!
//! Why not a general ZeroMQ socket: a `REQ` socket sends its requests to its peers in turn, takes whatever reply lies in
//! the queue for the answer to the newest request, and trusts a frame's length. This one belongs to one connection,
//! numbers its requests (a `REP` peer must send the envelope back), and bounds what it accepts.

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

/// Largest reply: a traceback.
const MAX_REPLY: usize = 4 << 20;
/// Largest command (ready, ping) of a peer.
const MAX_COMMAND: usize = 4 << 10;
const MAX_FRAMES: usize = 8;
const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;
const GREETING_LEN: usize = 64;

/// What ended the connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ZmtpError {
    #[error("the peer closed the connection")]
    Closed,
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("the peer does not speak ZeroMQ: {0}")]
    Foreign(&'static str),
    #[error("the peer is a {0} socket, not a REP socket")]
    SocketType(String),
    #[error("the peer broke the request-reply protocol: {0}")]
    Protocol(&'static str),
    #[error("an earlier message was cut off")]
    HalfSent,
}

type Result<T> = std::result::Result<T, ZmtpError>;

/// A connected `REP` socket.
#[derive(Debug)]
pub(crate) struct Replier {
    stream: UnixStream,
    inbox: BytesMut,
    /// Parts of a message whose last part has not come.
    frames: Vec<BytesMut>,
    /// Answers to heartbeats that are still to be sent.
    pongs: Vec<u8>,
    pid: Option<i32>,
    request: u32,
    owed: bool,
    half_sent: bool,
}

impl Replier {
    /// Greets, exchanges `READY`, checks that the other side is a `REP` socket.
    pub(crate) async fn handshake(mut stream: UnixStream) -> Result<Self> {
        let pid = stream.peer_cred().ok().and_then(|cred| cred.pid());
        stream.write_all(&greeting()).await?;
        let mut theirs = [0; GREETING_LEN];
        // A peer that is not ZeroMQ may never send 64 bytes, so look at the first ones first.
        stream.read_exact(&mut theirs[..10]).await.map_err(eof)?;
        if theirs[0] != 0xff || theirs[9] & 1 == 0 {
            return Err(ZmtpError::Foreign("its greeting has another signature"));
        }
        stream.read_exact(&mut theirs[10..]).await.map_err(eof)?;
        if theirs[10] < 3 {
            return Err(ZmtpError::Foreign("its protocol is older than ZMTP 3"));
        }
        if &theirs[12..32] != mechanism().as_slice() {
            return Err(ZmtpError::Foreign("it asks for a security mechanism; use a plain socket"));
        }
        let mut peer = Self {
            stream,
            inbox: BytesMut::new(),
            frames: Vec::new(),
            pongs: Vec::new(),
            pid,
            request: 0,
            owed: false,
            half_sent: false,
        };
        peer.stream.write_all(&ready()).await?;
        let command = loop {
            match peer.take_frame()? {
                Some((flags, body)) if flags & COMMAND != 0 => break body,
                Some(_) => return Err(ZmtpError::Foreign("it sent a message before READY")),
                None => peer.fill().await?,
            }
        };
        match socket_type(&command) {
            Some(b"REP") => Ok(peer),
            Some(other) => Err(ZmtpError::SocketType(String::from_utf8_lossy(other).into_owned())),
            None => Err(ZmtpError::Foreign("it did not answer READY")),
        }
    }

    /// The peer's process, where the system tells.
    pub(super) fn pid(&self) -> Option<i32> {
        self.pid
    }

    /// Whether a request is without a reply.
    pub(super) fn owes_reply(&self) -> bool {
        self.owed
    }

    /// Sends a request. If the future is dropped in the middle the connection is of no more use.
    pub(crate) async fn request(&mut self, payload: &[u8]) -> Result<()> {
        if self.half_sent {
            return Err(ZmtpError::HalfSent);
        }
        if self.owed {
            return Err(ZmtpError::Protocol("the previous request has no reply yet"));
        }
        // What is here already cannot be an answer to what was not asked. (What comes later is known by its number.)
        loop {
            if self.take_message()?.is_some() {
                return Err(ZmtpError::Protocol("a reply came without a request"));
            }
            match self.stream.try_read_buf(&mut self.inbox) {
                Ok(0) => return Err(ZmtpError::Closed),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        self.request = self.request.wrapping_add(1);
        // Envelope: the request's number and an empty delimiter.
        let mut head = std::mem::take(&mut self.pongs);
        head.extend_from_slice(&[MORE, 4]);
        head.extend_from_slice(&self.request.to_be_bytes());
        head.extend_from_slice(&[MORE, 0]);
        match u8::try_from(payload.len()) {
            Ok(len) => head.extend_from_slice(&[0, len]),
            Err(_) => {
                head.push(LONG);
                head.extend_from_slice(&(payload.len() as u64).to_be_bytes());
            }
        }
        self.half_sent = true;
        self.stream.write_all(&head).await?;
        self.stream.write_all(payload).await?;
        self.half_sent = false;
        self.owed = true;
        Ok(())
    }

    /// The reply to the request. Cancel safe: what has come stays.
    pub(crate) async fn reply(&mut self) -> Result<BytesMut> {
        loop {
            if let Some(mut frames) = self.take_message()? {
                let payload = frames.pop().unwrap_or_default();
                let [number, delimiter] = &frames[..] else {
                    return Err(ZmtpError::Protocol("a reply is not the envelope and one part"));
                };
                if !self.owed || number[..] != self.request.to_be_bytes() || !delimiter.is_empty() {
                    return Err(ZmtpError::Protocol(
                        "a reply belongs to no open request; was it sent twice?",
                    ));
                }
                self.owed = false;
                return Ok(payload);
            }
            self.send_pongs().await?;
            self.fill().await?;
        }
    }

    /// Waits until the peer closes the connection or sends anything.
    pub(super) async fn left(&mut self) {
        // Either way there is nothing more to wait for.
        let _ = self.fill().await;
    }

    async fn send_pongs(&mut self) -> Result<()> {
        if !self.pongs.is_empty() {
            let pongs = std::mem::take(&mut self.pongs);
            self.half_sent = true;
            self.stream.write_all(&pongs).await?;
            self.half_sent = false;
        }
        Ok(())
    }

    async fn fill(&mut self) -> Result<()> {
        match self.stream.read_buf(&mut self.inbox).await? {
            0 => Err(ZmtpError::Closed),
            _ => Ok(()),
        }
    }

    /// A whole message, if it is in the inbox. Heartbeats before it are answered later.
    fn take_message(&mut self) -> Result<Option<Vec<BytesMut>>> {
        while let Some((flags, body)) = self.take_frame()? {
            if flags & COMMAND != 0 {
                // PING: its name, two bytes of time to live, up to 16 bytes that come back in the PONG.
                if let Some(rest) = body.strip_prefix(b"\x04PING")
                    && let Some(context) = rest.get(2..).filter(|c| c.len() <= 16)
                    && self.pongs.len() < MAX_COMMAND
                {
                    self.pongs.extend_from_slice(&[COMMAND, 5 + context.len() as u8]);
                    self.pongs.extend_from_slice(b"\x04PONG");
                    self.pongs.extend_from_slice(context);
                }
                continue;
            }
            self.frames.push(body);
            if self.frames.len() > MAX_FRAMES {
                return Err(ZmtpError::Protocol("a reply has too many parts"));
            }
            if flags & MORE == 0 {
                return Ok(Some(std::mem::take(&mut self.frames)));
            }
        }
        Ok(None)
    }

    /// A whole frame, if it is in the inbox.
    fn take_frame(&mut self) -> Result<Option<(u8, BytesMut)>> {
        let Some(&flags) = self.inbox.first() else { return Ok(None) };
        if flags & !(MORE | LONG | COMMAND) != 0 {
            return Err(ZmtpError::Protocol("a frame has unknown flags"));
        }
        let (head, len) = if flags & LONG == 0 {
            let Some(len) = self.inbox.get(1) else { return Ok(None) };
            (2, u64::from(*len))
        } else {
            let Some(len) = self.inbox.get(1..).and_then(|b| b.first_chunk::<8>()) else { return Ok(None) };
            (9, u64::from_be_bytes(*len))
        };
        let limit = if flags & COMMAND == 0 { MAX_REPLY } else { MAX_COMMAND };
        if len > limit as u64 {
            return Err(ZmtpError::Protocol("a frame is too large"));
        }
        let len = len as usize;
        if self.inbox.len() < head + len {
            return Ok(None);
        }
        self.inbox.advance(head);
        Ok(Some((flags, self.inbox.split_to(len))))
    }
}

fn eof(error: std::io::Error) -> ZmtpError {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => ZmtpError::Closed,
        _ => ZmtpError::Io(error),
    }
}

fn mechanism() -> [u8; 20] {
    let mut name = [0; 20];
    name[..4].copy_from_slice(b"NULL");
    name
}

fn greeting() -> [u8; GREETING_LEN] {
    let mut bytes = [0; GREETING_LEN];
    bytes[0] = 0xff;
    bytes[9] = 0x7f;
    bytes[10] = 3;
    bytes[11] = 1;
    bytes[12..32].copy_from_slice(&mechanism());
    bytes
}

fn ready() -> Vec<u8> {
    let body = b"\x05READY\x0bSocket-Type\0\0\0\x03REQ";
    let mut frame = vec![COMMAND, body.len() as u8];
    frame.extend_from_slice(body);
    frame
}

/// The value of `Socket-Type` in a READY command.
fn socket_type(command: &[u8]) -> Option<&[u8]> {
    let mut rest = command.strip_prefix(b"\x05READY")?;
    while let Some((&name_len, tail)) = rest.split_first() {
        let (name, tail) = tail.split_at_checked(usize::from(name_len))?;
        let (value_len, tail) = tail.split_first_chunk::<4>()?;
        let (value, tail) = tail.split_at_checked(u32::from_be_bytes(*value_len) as usize)?;
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            return Some(value);
        }
        rest = tail;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_is_parsed_and_nonsense_is_not() {
        assert_eq!(socket_type(&ready()[2..]), Some(&b"REQ"[..]));
        assert_eq!(socket_type(b"\x05READY\x01x\0\0\0\x01y\x0bsocket-type\0\0\0\x03REP"), Some(&b"REP"[..]));
        for broken in
            [&b""[..], b"\x05READY", b"\x05READY\xffx", b"\x05READY\x01x\xff\xff\xff\xffy", b"\x05ERROR\0"]
        {
            assert_eq!(socket_type(broken), None);
        }
    }

    async fn pair() -> (Replier, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut hello = greeting().to_vec();
        hello.extend_from_slice(b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03REP");
        theirs.write_all(&hello).await.unwrap();
        let peer = Replier::handshake(ours).await.unwrap();
        let mut seen = vec![0; GREETING_LEN + ready().len()];
        theirs.read_exact(&mut seen).await.unwrap();
        (peer, theirs)
    }

    #[tokio::test]
    async fn a_request_has_its_number_and_only_its_own_reply_counts() {
        let (mut peer, mut theirs) = pair().await;
        peer.request(b"hi").await.unwrap();
        let mut seen = [0; 12];
        theirs.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"\x01\x04\0\0\0\x01\x01\0\0\x02hi");
        // A heartbeat first, then the reply, twice.
        let reply = b"\x01\x04\0\0\0\x01\x01\0\0\x02ok";
        theirs.write_all(&[&b"\x04\x0a\x04PING\0\0abc"[..], reply, reply].concat()).await.unwrap();
        assert_eq!(&peer.reply().await.unwrap()[..], b"ok");
        assert!(!peer.owes_reply());
        let error = peer.request(b"next").await.unwrap_err();
        assert!(matches!(error, ZmtpError::Protocol("a reply came without a request")), "{error}");
    }

    #[tokio::test]
    async fn a_late_second_reply_is_known_by_its_number() {
        let (mut peer, mut theirs) = pair().await;
        let reply = b"\x01\x04\0\0\0\x01\x01\0\0\0";
        peer.request(b"1").await.unwrap();
        theirs.write_all(reply).await.unwrap();
        peer.reply().await.unwrap();
        peer.request(b"2").await.unwrap();
        theirs.write_all(reply).await.unwrap();
        let error = peer.reply().await.unwrap_err();
        assert!(error.to_string().contains("belongs to no open request"), "{error}");
    }

    #[tokio::test]
    async fn pings_are_answered_while_a_reply_is_awaited() {
        let (mut peer, mut theirs) = pair().await;
        peer.request(b"x").await.unwrap();
        let mut request = [0; 11];
        theirs.read_exact(&mut request).await.unwrap();
        theirs.write_all(b"\x04\x0a\x04PING\0\0abc").await.unwrap();
        let waiting = tokio::spawn(async move { peer.reply().await });
        let mut pong = [0; 10];
        theirs.read_exact(&mut pong).await.unwrap();
        assert_eq!(&pong, b"\x04\x08\x04PONGabc");
        drop(theirs);
        assert!(matches!(waiting.await.unwrap(), Err(ZmtpError::Closed)));
    }

    #[tokio::test]
    async fn a_huge_frame_is_refused_before_memory_is_asked_for() {
        let (mut peer, mut theirs) = pair().await;
        peer.request(b"x").await.unwrap();
        theirs.write_all(b"\x02\x3f\xff\xff\xff\xff\xff\xff\xff").await.unwrap();
        let error = peer.reply().await.unwrap_err();
        assert!(matches!(error, ZmtpError::Protocol("a frame is too large")), "{error}");
    }

    #[tokio::test]
    async fn strangers_are_named() {
        for (hello, expected) in [
            (&b"GET / HTTP/1.1\r\n\r\n"[..], "another signature"),
            (&[&greeting()[..], b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03PUB"].concat(), "a PUB socket"),
            (&[&greeting()[..], b"\0\x01x"].concat(), "a message before READY"),
            (&greeting()[..30], "closed the connection"),
        ] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(hello).await.unwrap();
            theirs.shutdown().await.unwrap();
            let error = Replier::handshake(ours).await.unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
