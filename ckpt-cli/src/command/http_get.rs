//! One GET of a running instance or engine, over TCP or a UNIX socket.

use std::{path::Path, time::Duration};

use ckpt_core::{Error, ErrorKind, Key, Result};

/// Hashing gigabytes takes a while.
const TIME: Duration = Duration::from_secs(300);

/// The body of `path` at `http://host:port` or `unix:/socket`; anything but a success is an error.
pub(crate) async fn get(source: &str, path: &str, operation: &'static str) -> Result<Vec<u8>> {
    let fail = |kind, message: String| Error::new(kind, operation, message).with(Key::Endpoint, source);
    let unreachable = |e: reqwest::Error| {
        fail(ErrorKind::Unavailable, "it does not answer; is it running?".to_owned())
            .caused_by(e.without_url())
    };
    let builder = reqwest::Client::builder().timeout(TIME).no_proxy();
    let (builder, url) = match source.strip_prefix("unix:") {
        Some(socket) => {
            let socket = socket.strip_prefix("//").unwrap_or(socket);
            (builder.unix_socket(Path::new(socket)), format!("http://localhost{path}"))
        }
        None => (builder, format!("{}{path}", source.trim_end_matches('/'))),
    };
    let url = reqwest::Url::parse(&url).map_err(|e| {
        let message = "not a URL; write http://host:port or unix:SOCKET".to_owned();
        fail(ErrorKind::ConfigInvalid, message).caused_by(e)
    })?;
    let client = builder.build().map_err(unreachable)?;
    let response = client.get(url).send().await.map_err(unreachable)?;
    let status = response.status();
    let body = response.bytes().await.map_err(unreachable)?;
    if status.is_success() {
        return Ok(body.into());
    }
    let text: String = String::from_utf8_lossy(&body).chars().take(500).collect();
    Err(fail(ErrorKind::Backend, format!("GET {path} was answered with {status}: {text}")))
}
