//! The worker's connection: blocking, and never past its deadline.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use socket2::{Domain, SockAddr, Socket, Type};

use super::{
    ENDPOINT_SCHEME,
    wire::{self, Down, Up},
};
use crate::error::{Error, ErrorKind, Key, Result};

/// Ends an update from another thread: the worker's call returns an [`ErrorKind::Aborted`] error.
#[derive(Clone, Debug, Default)]
pub struct Canceller(Arc<Mutex<CancelState>>);

#[derive(Debug, Default)]
struct CancelState {
    cancelled: bool,
    stream: Option<UnixStream>,
}

impl Canceller {
    /// Ends the update under way, and every later one of the same worker.
    pub fn cancel(&self) {
        let mut state = self.lock();
        state.cancelled = true;
        if let Some(stream) = state.stream.take() {
            // Wakes the thread that reads; a socket that is already closed needs no waking.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn lock(&self) -> MutexGuard<'_, CancelState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cancelled(&self) -> bool {
        self.lock().cancelled
    }

    fn watch(&self, stream: &UnixStream) -> std::io::Result<()> {
        self.lock().stream = Some(stream.try_clone()?);
        Ok(())
    }
}

/// A connection to the parameter server, after the preambles.
pub(super) struct Link {
    stream: UnixStream,
    endpoint: String,
    canceller: Canceller,
    deadline: Instant,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.canceller.lock().stream = None;
    }
}

impl Link {
    /// Connects and agrees on the version.
    pub(super) fn connect(endpoint: &str, canceller: Canceller, deadline: Instant) -> Result<Self> {
        let fail = |kind, message: &str| {
            Error::new(kind, "connect to the parameter server", message).with(Key::Endpoint, endpoint)
        };
        let path = match endpoint.strip_prefix(ENDPOINT_SCHEME) {
            Some(path) => path,
            None if endpoint.starts_with('/') => endpoint,
            None => {
                return Err(fail(
                    ErrorKind::ConfigInvalid,
                    "a native worker needs a ckpt+unix:// endpoint; is the parameter server's --worker-protocol native?",
                ));
            }
        };
        let stream = connect(path, deadline).map_err(|e| {
            let hint = "cannot connect; is it alive, and do both see the same file system?";
            fail(ErrorKind::Unavailable, hint).caused_by(e)
        })?;
        let mut link = Self { stream, endpoint: endpoint.to_owned(), canceller, deadline };
        link.canceller.watch(&link.stream).map_err(|e| link.broken(e))?;
        link.write(&wire::preamble())?;
        let mut preamble = [0; wire::PREAMBLE_LEN];
        link.read(&mut preamble)?;
        wire::agree(&preamble).map_err(|e| link.nonsense(e))?;
        Ok(link)
    }

    /// Sends one message.
    pub(super) fn send(&mut self, message: &Up) -> Result<()> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.write(&bytes)
    }

    /// The next message.
    pub(super) fn receive(&mut self) -> Result<Down> {
        let mut header = [0; wire::HEADER_LEN];
        self.read(&mut header)?;
        let (len, kind) = wire::header(&header, wire::MAX_TO_WORKER).map_err(|e| self.nonsense(e))?;
        // Memory grows with what has really come, not with what a header claims.
        let mut body = Vec::new();
        while body.len() < len {
            let start = body.len();
            body.resize(len.min(start + start.max(64 << 10)), 0);
            self.read(&mut body[start..])?;
        }
        Down::decode(kind, &body).map_err(|e| self.nonsense(e))
    }

    fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let left = self.left()?;
            let written = self.stream.set_write_timeout(Some(left)).and_then(|()| self.stream.write(bytes));
            match written {
                Ok(0) => return Err(self.closed()),
                Ok(n) => bytes = &bytes[n..],
                Err(error) if retry(&error) => {}
                Err(error) => return Err(self.broken(error)),
            }
        }
        Ok(())
    }

    fn read(&mut self, mut bytes: &mut [u8]) -> Result<()> {
        while !bytes.is_empty() {
            let left = self.left()?;
            let read = self.stream.set_read_timeout(Some(left)).and_then(|()| self.stream.read(bytes));
            match read {
                Ok(0) => return Err(self.closed()),
                Ok(n) => bytes = &mut bytes[n..],
                Err(error) if retry(&error) => {}
                Err(error) => return Err(self.broken(error)),
            }
        }
        Ok(())
    }

    /// Time until the deadline, never zero (a zero timeout means none to the operating system).
    fn left(&self) -> Result<Duration> {
        if self.canceller.cancelled() {
            return Err(self.error(ErrorKind::Aborted, "the update was cancelled in this worker"));
        }
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left < Duration::from_micros(1) {
            return Err(self.error(ErrorKind::Timeout, "the parameter server was silent until the deadline"));
        }
        Ok(left)
    }

    fn closed(&self) -> Error {
        if self.canceller.cancelled() {
            return self.error(ErrorKind::Aborted, "the update was cancelled in this worker");
        }
        self.error(
            ErrorKind::PeerLost,
            "the parameter server closed the link before the update was over; it probably died, see its log",
        )
    }

    fn broken(&self, error: std::io::Error) -> Error {
        self.closed().caused_by(error)
    }

    /// An error for bytes that the protocol does not allow.
    pub(super) fn nonsense(&self, error: wire::WireError) -> Error {
        self.error(ErrorKind::Corrupt, "the parameter server sent nonsense").caused_by(error)
    }

    /// An error that names this link.
    pub(super) fn error(&self, kind: ErrorKind, message: impl Into<String>) -> Error {
        Error::new(kind, "take new weights", message).with(Key::Endpoint, &self.endpoint)
    }
}

fn retry(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), Interrupted | TimedOut | WouldBlock)
}

/// A blocking connect may hang on a full backlog; this one ends.
fn connect(path: &str, deadline: Instant) -> std::io::Result<UnixStream> {
    let address = SockAddr::unix(path)?;
    loop {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        match socket.connect(&address) {
            Ok(()) => {
                socket.set_nonblocking(false)?;
                return Ok(UnixStream::from(std::os::fd::OwnedFd::from(socket)));
            }
            // The backlog is full: there is no event to wait for.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error),
        }
    }
}
