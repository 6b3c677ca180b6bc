//! TLS, where it is asked for: between the ranks of a job, and for HTTP.
//!
//! # Within a job
//! Nothing but the job's token is needed. Every process derives the same two key pairs from it, one for the side that
//! listens and one for the side that dials, and each side takes no other key than the one that it expects: raw public keys
//! (RFC 7250), no certificates, TLS 1.3 only. Who lacks the token can neither read nor join; the greetings with which ranks
//! prove that they know it stay as they are, inside.
//!
//! The keys are as good as the token: somebody who connects is shown a public key, and can try tokens against it at
//! leisure. So a token that could be guessed is refused ([`SHORTEST_TOKEN_BYTES`]).
//!
//! # HTTP
//! [`ServerTls`] holds the certificate of a server; [`http_client`] makes clients that verify servers.
//!
//! All of it is behind the cargo feature `tls`, and needs a processor with AES instructions. Without one of them
//! everything here is an error that says so, and plain connections work as ever.

#[cfg(all(feature = "tls", not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
compile_error!("there is TLS for x86-64 and aarch64 only; build without the cargo feature `tls`");

#[cfg(not(feature = "tls"))]
#[path = "absent.rs"]
mod built;
#[cfg(feature = "tls")]
#[path = "present/mod.rs"]
mod built;
mod meeting;

use std::path::Path;

use reqwest::{ClientBuilder, Url};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

pub(crate) use self::{
    built::Secure,
    meeting::{Meeting, farewell, meet, refuse_tls},
};
use crate::error::{Error, ErrorKind, Result};

/// A shorter token is no key: 128 random bits in hexadecimal digits have this length.
pub const SHORTEST_TOKEN_BYTES: usize = 32;

/// Switches TLS between the ranks of a job on: `1`, `true`, `yes` or `on`.
pub const TLS_VARIABLE: &str = "CKPT_TLS";
/// What the certificates of servers are verified with, where no option says it: a file with PEM certificates.
pub const CA_VARIABLE: &str = "CKPT_TLS_CA";

const OPERATION: &str = "set up TLS";

/// A connection, encrypted.
pub type SecureStream = Box<dyn Duplex>;

/// Both directions of a connection.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Whether the environment asks for TLS between the ranks of a job.
pub fn is_wanted(variable: &dyn Fn(&str) -> Option<String>) -> Result<bool> {
    let text = variable(TLS_VARIABLE).unwrap_or_default();
    match text.to_ascii_lowercase().as_str() {
        "" | "0" | "false" | "no" | "off" => Ok(false),
        "1" | "true" | "yes" | "on" => Ok(true),
        _ => Err(invalid(format!("{TLS_VARIABLE}={text} is neither 1 nor 0"))),
    }
}

/// Whether this build and this processor can do TLS; the error says what is missing.
pub fn check() -> Result<()> {
    built::check()
}

/// The TLS of a job, made of its token. Cheap to clone.
#[derive(Clone, Debug)]
pub struct JobTls(built::Job);

/// Why no TLS came about.
#[derive(Debug, thiserror::Error)]
#[cfg_attr(not(feature = "tls"), allow(dead_code, reason = "no handshake comes about without TLS"))]
pub(crate) enum HandshakeError {
    #[error("the other side does not speak TLS")]
    NotTls,
    #[error("the other side's key was made of another token")]
    OtherToken,
    #[error("the TLS handshake failed: {0}")]
    Broken(std::io::Error),
}

impl JobTls {
    /// Derives the keys; an error if the token is too short, or if this build or this processor cannot do TLS.
    pub fn new(token: &[u8]) -> Result<Self> {
        check()?;
        if token.len() < SHORTEST_TOKEN_BYTES {
            return Err(invalid(format!(
                "the token has {} bytes, and TLS needs one that nobody can guess, of {SHORTEST_TOKEN_BYTES} or more; make \
                 one with `openssl rand -hex 32`",
                token.len()
            )));
        }
        built::Job::new(token).map(Self)
    }

    /// The dialler's half of the handshake. The caller bounds the time.
    pub(crate) async fn connect(&self, stream: TcpStream) -> Result<SecureStream, HandshakeError> {
        self.0.connect(stream).await
    }

    /// The listener's half. The caller bounds the time.
    pub(crate) async fn accept(&self, stream: TcpStream) -> Result<SecureStream, HandshakeError> {
        self.0.accept(stream).await
    }

    /// As [`JobTls::connect`], for bulk data.
    pub(crate) async fn connect_bulk(&self, stream: TcpStream) -> Result<Secure, HandshakeError> {
        self.0.connect_bulk(stream).await
    }

    /// As [`JobTls::accept`], for bulk data.
    pub(crate) async fn accept_bulk(&self, stream: TcpStream) -> Result<Secure, HandshakeError> {
        self.0.accept_bulk(stream).await
    }
}

/// What an HTTP server shows to prove who it is. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ServerTls(built::Server);

impl ServerTls {
    /// From files in PEM: the certificate with those that it was signed with, and its private key.
    pub fn load(certificate: &Path, key: &Path) -> Result<Self> {
        check()?;
        built::Server::load(certificate, key).map(Self)
    }

    /// Takes a connection; one that does not speak TLS is told so in HTTP. The caller bounds the time.
    pub async fn accept(&self, stream: TcpStream) -> std::io::Result<SecureStream> {
        if matches!(meet(&stream, true).await?, Meeting::WantsPlain) {
            const ANSWER: &[u8] =
                b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: 33\r\n\
                connection: close\r\n\r\nthis port speaks HTTPS, not HTTP\n";
            farewell(stream, ANSWER).await;
            return Err(std::io::Error::other("the client spoke plain HTTP"));
        }
        self.0.accept(stream).await
    }
}

/// An HTTP client for `url`. A server at `https://` is verified with the certificates in the file `ca`, or with those that
/// this system trusts.
#[allow(clippy::disallowed_methods, reason = "the one place")]
pub fn http_client(url: &Url, ca: Option<&Path>) -> Result<ClientBuilder> {
    built::configure(ClientBuilder::new(), url.scheme() == "https", ca)
}

/// What is wrong between a client and a server at `https://`, if that is why a request failed.
pub fn explain(error: &(dyn std::error::Error + 'static)) -> Option<&'static str> {
    std::iter::successors(Some(error), |error| error.source()).find_map(built::explain)
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::ConfigInvalid, OPERATION, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_switches_and_typing_errors_are_told() {
        let wanted = |text: &'static str| is_wanted(&move |_| Some(text.to_owned()));
        assert!(!is_wanted(&|_| None).unwrap());
        for (text, on) in
            [("", false), ("0", false), ("off", false), ("1", true), ("True", true), ("on", true)]
        {
            assert_eq!(wanted(text).unwrap(), on, "{text}");
        }
        assert!(wanted("2").unwrap_err().message().contains("CKPT_TLS=2"));
    }
}
