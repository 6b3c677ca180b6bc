//! An engine that answers what a test wants, over TCP or TLS.

use std::net::{Ipv4Addr, SocketAddr};

use ckpt_core::tls::ServerTls;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::TcpListener,
    task::JoinHandle,
};

use crate::Certificates;

/// What the engine answers to the update request. Every other request gets 200.
#[derive(Clone, Debug)]
pub enum Script {
    /// This status and body, at once.
    Answer(u16, &'static str),
    /// Nothing; the connection is closed.
    HangUp,
}

/// A server that lives as long as this value.
#[derive(Debug)]
pub struct FakeEngine {
    address: SocketAddr,
    scheme: &'static str,
    server: JoinHandle<()>,
}

impl Drop for FakeEngine {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl FakeEngine {
    /// Listens on a free port.
    pub async fn start(script: Script) -> Self {
        Self::listen(script, None).await
    }

    /// The same, at `https://`.
    pub async fn start_tls(script: Script, certificates: &Certificates) -> Self {
        let tls = ServerTls::load(&certificates.certificate, &certificates.key);
        Self::listen(script, Some(tls.unwrap_or_else(|error| panic!("{error}")))).await
    }

    async fn listen(script: Script, tls: Option<ServerTls>) -> Self {
        let scheme = if tls.is_some() { "https" } else { "http" };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("a bound listener has an address");
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (script, tls) = (script.clone(), tls.clone());
                // A client that goes away is its own business.
                tokio::spawn(async move {
                    match tls {
                        None => serve(stream, script).await,
                        Some(tls) => serve(tls.accept(stream).await?, script).await,
                    }
                });
            }
        });
        Self { address, scheme, server }
    }

    /// `http://127.0.0.1:port`, or the same with `https://`.
    pub fn endpoint(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, script: Script) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let (mut request, mut line, mut body) = (String::new(), String::new(), 0);
        loop {
            line.clear();
            if stream.read_line(&mut line).await? == 0 {
                return Ok(());
            }
            if request.is_empty() {
                request = line.clone();
            }
            if let Some(length) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                body = length.trim().parse().unwrap_or(0);
            }
            if line == "\r\n" {
                break;
            }
        }
        stream.read_exact(&mut vec![0; body]).await?;
        let (status, text) = match (&script, request.starts_with("POST ")) {
            (_, false) => (200, ""),
            (Script::Answer(status, text), true) => (*status, *text),
            (Script::HangUp, true) => return Ok(()),
        };
        let answer = format!("HTTP/1.1 {status} Said\r\ncontent-length: {}\r\n\r\n{text}", text.len());
        stream.write_all(answer.as_bytes()).await?;
    }
}
