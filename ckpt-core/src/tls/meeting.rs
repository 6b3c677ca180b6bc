//! One side speaks TLS and the other does not: both are told in words that they understand.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// The first byte of every TLS connection: the type of a handshake record.
const HANDSHAKE_RECORD: u8 = 22;
/// A fatal alert, `protocol_version`: what a client takes for "no TLS here" and not for a broken connection.
const NO_TLS: &[u8] = &[21, 3, 3, 0, 2, 2, 70];
/// For last words to get out.
const FAREWELL: Duration = Duration::from_secs(1);
/// What is read of a stranger whose words no longer matter.
const UNREAD_BYTES: u64 = 64 << 10;

/// How a new connection goes together with what this side wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meeting {
    /// Both want the same.
    Fits,
    /// The other side speaks TLS and this one does not.
    WantsTls,
    /// The other way round.
    WantsPlain,
}

/// Waits for the first byte, which stays in the socket. The caller bounds the time.
pub(crate) async fn meet(stream: &TcpStream, tls: bool) -> io::Result<Meeting> {
    let mut first = [0];
    if stream.peek(&mut first).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(match (first[0] == HANDSHAKE_RECORD, tls) {
        (true, false) => Meeting::WantsTls,
        (false, true) => Meeting::WantsPlain,
        _ => Meeting::Fits,
    })
}

/// Tells a TLS client that there is no TLS here.
pub(crate) async fn refuse_tls(stream: TcpStream) {
    farewell(stream, NO_TLS).await;
}

/// Says `words` and closes. What the other side has sent is read first: a socket that is closed over unread bytes takes
/// back what it has sent.
pub(crate) async fn farewell(mut stream: TcpStream, words: &[u8]) {
    let say = async {
        stream.write_all(words).await?;
        stream.shutdown().await?;
        tokio::io::copy(&mut stream.take(UNREAD_BYTES), &mut tokio::io::sink()).await
    };
    // The other side may be gone already; nobody is left to be told.
    let _ = tokio::time::timeout(FAREWELL, say).await;
}
