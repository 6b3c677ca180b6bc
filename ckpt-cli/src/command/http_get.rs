//! HTTP to a running instance or engine, over TCP, TLS or a UNIX socket.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    tls::{self, http_client},
};
use clap::Args;
use reqwest::{ClientBuilder, Url};

/// Hashing gigabytes takes a while.
const TIME: Duration = Duration::from_secs(300);

/// Options of every command that talks to servers
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct TrustArgs {
    /// Certificates in PEM with which servers at https:// are verified [default: those that this system trusts]
    #[arg(long, env = tls::CA_VARIABLE, value_name = "FILE")]
    pub(crate) tls_ca: Option<PathBuf>,
}

/// A client for the server at `http://host:port`, `https://host:port` or `unix:/socket`, and the URL by which to ask it.
pub(crate) fn client(
    source: &str,
    trust: &TrustArgs,
    operation: &'static str,
) -> Result<(ClientBuilder, Url)> {
    let parse = |url: &str| {
        Url::parse(url).map_err(|e| {
            let message = "not a URL; write http://host:port, https://host:port or unix:SOCKET";
            Error::new(ErrorKind::ConfigInvalid, operation, message).with(Key::Endpoint, source).caused_by(e)
        })
    };
    let (builder, url) = match source.strip_prefix("unix:") {
        Some(socket) => {
            let socket = socket.strip_prefix("//").unwrap_or(socket);
            let url = parse("http://localhost")?;
            (http_client(&url, None)?.unix_socket(Path::new(socket)), url)
        }
        None => {
            let url = parse(source)?;
            (http_client(&url, trust.tls_ca.as_deref())?, url)
        }
    };
    // A proxy from the environment must not stand between a rank and what is beside it.
    Ok((builder.no_proxy(), url))
}

/// The error for a request that had no answer; `hint` is for a server that is not there.
pub(crate) fn unreachable(
    source: &str,
    operation: &'static str,
    hint: &'static str,
    error: reqwest::Error,
) -> Error {
    let (kind, message) = match tls::explain(&error) {
        Some(why) => (ErrorKind::ConfigInvalid, why),
        None => (ErrorKind::Unavailable, hint),
    };
    Error::new(kind, operation, message).with(Key::Endpoint, source).caused_by(error.without_url())
}

/// The body of `path` at a server; anything but a success is an error.
pub(crate) async fn get(
    source: &str,
    path: &str,
    trust: &TrustArgs,
    operation: &'static str,
) -> Result<Vec<u8>> {
    let unreachable = |e| unreachable(source, operation, "it does not answer; is it running?", e);
    let (builder, url) = client(source, trust, operation)?;
    let client = builder.timeout(TIME).build().map_err(unreachable)?;
    let url = format!("{}{path}", url.as_str().trim_end_matches('/'));
    let response = client.get(url).send().await.map_err(unreachable)?;
    let status = response.status();
    let body = response.bytes().await.map_err(unreachable)?;
    if status.is_success() {
        return Ok(body.into());
    }
    let text: String = String::from_utf8_lossy(&body).chars().take(500).collect();
    let message = format!("GET {path} was answered with {status}: {text}");
    Err(Error::new(ErrorKind::Backend, operation, message).with(Key::Endpoint, source))
}
