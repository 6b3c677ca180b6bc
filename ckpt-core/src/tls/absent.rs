//! What stands in the place of TLS in a build without it. No value of these types can be made.

use std::{convert::Infallible, io, path::Path};

use reqwest::ClientBuilder;
use tokio::net::TcpStream;

use super::{HandshakeError, OPERATION, SecureStream};
use crate::error::{Error, ErrorKind, Result};

pub(super) fn check() -> Result<()> {
    Err(absent())
}

fn absent() -> Error {
    let message = "this build has no TLS; build ckpt with the cargo feature `tls`";
    Error::new(ErrorKind::Unsupported, OPERATION, message)
}

pub(super) fn configure(builder: ClientBuilder, secure: bool, _: Option<&Path>) -> Result<ClientBuilder> {
    if secure { Err(absent()) } else { Ok(builder) }
}

pub(super) fn explain(_: &(dyn std::error::Error + 'static)) -> Option<&'static str> {
    None
}

#[derive(Clone, Debug)]
pub(super) struct Job(Infallible);

impl Job {
    pub(super) fn new(_: &[u8]) -> Result<Self> {
        Err(absent())
    }

    pub(super) async fn connect(&self, _: TcpStream) -> Result<SecureStream, HandshakeError> {
        match self.0 {}
    }

    pub(super) async fn accept(&self, _: TcpStream) -> Result<SecureStream, HandshakeError> {
        match self.0 {}
    }

    pub(super) async fn connect_bulk(&self, _: TcpStream) -> Result<Secure, HandshakeError> {
        match self.0 {}
    }

    pub(super) async fn accept_bulk(&self, _: TcpStream) -> Result<Secure, HandshakeError> {
        match self.0 {}
    }
}

#[derive(Clone, Debug)]
pub(super) struct Server(Infallible);

impl Server {
    pub(super) fn load(_: &Path, _: &Path) -> Result<Self> {
        Err(absent())
    }

    pub(super) async fn accept(&self, _: TcpStream) -> io::Result<SecureStream> {
        match self.0 {}
    }
}

#[derive(Debug)]
pub(crate) struct Secure(Infallible);

impl Secure {
    pub(crate) fn socket(&self) -> &TcpStream {
        match self.0 {}
    }

    pub(crate) fn try_read(&self, _: &mut [u8]) -> io::Result<usize> {
        match self.0 {}
    }

    pub(crate) async fn write_all(&self, _: &[u8], _: &[u8]) -> io::Result<()> {
        match self.0 {}
    }

    pub(crate) fn send_now(&self, _: &[u8]) -> io::Result<()> {
        match self.0 {}
    }

    pub(crate) fn has_unread(&self) -> bool {
        match self.0 {}
    }
}
