//! A connection: a socket, or a socket with TLS around its bytes.

use std::io;

use socket2::SockRef;
use tokio::net::TcpStream;

use crate::tls::Secure;

/// Used through a shared reference: one reader and one writer at once.
#[derive(Debug)]
pub(super) enum Link {
    Plain(TcpStream),
    Secure(Box<Secure>),
}

impl Link {
    /// The socket, to be waited for, asked and shut.
    pub(super) fn socket(&self) -> &TcpStream {
        match self {
            Link::Plain(socket) => socket,
            Link::Secure(secure) => secure.socket(),
        }
    }

    /// Reads what is there. `WouldBlock`: the socket has no more for now, so that it can be waited for.
    pub(super) fn try_read(&self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Link::Plain(socket) => socket.try_read(into),
            Link::Secure(secure) => secure.try_read(into),
        }
    }

    /// Writes without waiting, where there is room.
    pub(super) fn send_now(&self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Link::Plain(socket) => SockRef::from(socket).send(bytes).map(drop),
            Link::Secure(secure) => secure.send_now(bytes),
        }
    }

    /// Whether it can still be used although nothing is going on: nothing to read, and not the end.
    pub(super) fn is_idle(&self) -> bool {
        let mut byte = [std::mem::MaybeUninit::uninit()];
        let peeked = SockRef::from(self.socket()).peek(&mut byte);
        matches!(peeked, Err(e) if e.kind() == io::ErrorKind::WouldBlock)
            && !matches!(self, Link::Secure(secure) if secure.has_unread())
    }

    /// Ends both directions at once; whoever reads or writes is woken. An error means that it had ended already.
    pub(super) fn shut(&self) {
        let _ = SockRef::from(self.socket()).shutdown(std::net::Shutdown::Both);
    }

    /// Says that nothing more will come. An error means that it had ended already.
    pub(super) fn finish(&self) {
        let _ = SockRef::from(self.socket()).shutdown(std::net::Shutdown::Write);
    }
}
