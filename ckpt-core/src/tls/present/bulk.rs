//! An encrypted connection for bulk data, used through a shared reference: one reader and one writer at once.

use std::{
    io::{self, IoSlice, Read, Write},
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustls::Connection;
use tokio::net::TcpStream;

/// Taken from the socket at a time. rustls alone would take 4 KiB a call.
const TAKE_BYTES: usize = 64 << 10;
/// Encrypted at a time: four records, which stay in the processor's caches until they are sent.
const SEAL_BYTES: usize = 64 << 10;

/// A socket and what encrypts it.
pub(crate) struct Secure {
    socket: TcpStream,
    state: Mutex<State>,
}

struct State {
    tls: Connection,
    /// Bytes from the socket; those before `start` have gone to `tls`. Nothing is reserved before the first read.
    taken: Vec<u8>,
    start: usize,
    end: usize,
}

impl std::fmt::Debug for Secure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secure").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Secure {
    pub(super) fn new(socket: TcpStream, mut tls: Connection) -> Self {
        tls.set_buffer_limit(Some(SEAL_BYTES));
        Self { socket, state: Mutex::new(State { tls, taken: Vec::new(), start: 0, end: 0 }) }
    }

    /// The socket, to be waited for, asked and shut.
    pub(crate) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what is there. `WouldBlock`: the socket has no more for now, so that it can be waited for.
    pub(crate) fn try_read(&self, into: &mut [u8]) -> io::Result<usize> {
        let mut state = self.lock();
        loop {
            match state.tls.reader().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => state.take(&self.socket)?,
                other => return other,
            }
        }
    }

    /// Writes `head`, then `body`; returns when all has gone to the kernel.
    pub(crate) async fn write_all(&self, mut head: &[u8], mut body: &[u8]) -> io::Result<()> {
        loop {
            // Given back each time round: a reader may wait.
            let sent = {
                let mut state = self.lock();
                let sent = state.send(&self.socket)?;
                if sent && head.is_empty() && body.is_empty() {
                    return Ok(());
                }
                if sent {
                    let n = state.seal(head, body)?;
                    let from_head = n.min(head.len());
                    head = &head[from_head..];
                    body = &body[n - from_head..];
                    state.send(&self.socket)?
                } else {
                    false
                }
            };
            if !sent {
                self.socket.writable().await?;
            }
        }
    }

    /// Writes without waiting; what the kernel does not take now goes with the next write.
    pub(crate) fn send_now(&self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.lock();
        if state.seal(bytes, &[])? < bytes.len() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        state.send(&self.socket).map(drop)
    }

    /// Whether something has come that nobody has read.
    pub(crate) fn has_unread(&self) -> bool {
        let mut state = self.lock();
        state.start < state.end
            || state.tls.process_new_packets().map_or(true, |state| state.plaintext_bytes_to_read() > 0)
    }
}

impl State {
    /// Takes bytes from the socket and decrypts what is complete. At the end of the stream the next read says so.
    fn take(&mut self, socket: &TcpStream) -> io::Result<()> {
        if self.start == self.end {
            self.taken.resize(TAKE_BYTES, 0);
            self.end = socket.try_read(&mut self.taken)?;
            self.start = 0;
        }
        let mut rest = &self.taken[self.start..self.end];
        self.tls.read_tls(&mut rest)?;
        self.start = self.end - rest.len();
        if let Err(error) = self.tls.process_new_packets() {
            // The other side is told why, if the socket takes it.
            let _ = self.send(socket);
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        // An answer to the other side's change of keys; if it must wait, it goes with the next write.
        self.send(socket).map(drop)
    }

    /// Encrypts as much as fits.
    fn seal(&mut self, head: &[u8], body: &[u8]) -> io::Result<usize> {
        let room = SEAL_BYTES.saturating_sub(head.len());
        let n = self
            .tls
            .writer()
            .write_vectored(&[IoSlice::new(head), IoSlice::new(&body[..body.len().min(room)])])?;
        if n == 0 && !(head.is_empty() && body.is_empty()) {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(n)
    }

    /// Sends what is encrypted; whether all of it went.
    fn send(&mut self, socket: &TcpStream) -> io::Result<bool> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut Nonblocking(socket)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

/// The writing half of a socket that never waits.
struct Nonblocking<'a>(&'a TcpStream);

impl Write for Nonblocking<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
