//! Where an engine listens.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use reqwest::Url;

use crate::error::{Error, ErrorKind, Key, Result};

/// The longest path that fits a UNIX socket address, without the ending zero.
const LONGEST_SOCKET_PATH: usize = 107;

/// An engine's HTTP server, over TCP or a UNIX socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineAddress {
    url: Url,
    socket: Option<PathBuf>,
    ca: Option<PathBuf>,
}

impl EngineAddress {
    /// From `http://host:port[/path]`, the same with `https://`, or `unix:/path/of/socket`.
    pub fn parse(endpoint: &str) -> Result<Self> {
        if let Some(path) = endpoint.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            let url =
                Url::parse("http://localhost/").map_err(|error| invalid(endpoint, &error.to_string()))?;
            return Self { url, socket: None, ca: None }.over_socket(Some(PathBuf::from(path)));
        }
        let url = Url::parse(endpoint).map_err(|error| invalid(endpoint, &error.to_string()))?;
        match url.scheme() {
            "http" | "https" if url.has_host() => Ok(Self { url, socket: None, ca: None }),
            "http" | "https" => Err(invalid(endpoint, "it names no host")),
            // `localhost:8000` parses as scheme `localhost`.
            _ => Err(invalid(endpoint, "it does not begin with http://, https:// or unix:")),
        }
    }

    /// The same server reached through a UNIX socket; `None` changes nothing.
    pub fn over_socket(mut self, socket: Option<PathBuf>) -> Result<Self> {
        let Some(socket) = socket else { return Ok(self) };
        let shown = format!("unix:{}", socket.display());
        if !socket.is_absolute() {
            return Err(invalid(&shown, "the socket's path must begin with /"));
        }
        if socket.as_os_str().len() > LONGEST_SOCKET_PATH {
            return Err(invalid(
                &shown,
                "the socket's path is longer than 107 bytes: move it to a shorter folder",
            ));
        }
        self.socket = Some(socket);
        Ok(self)
    }

    /// The same; a server at `https://` is verified with the certificates in this file and not with those that the system
    /// trusts.
    pub fn trusting(mut self, ca: Option<PathBuf>) -> Self {
        self.ca = ca;
        self
    }

    /// The file with the certificates to verify it with.
    pub(crate) fn ca(&self) -> Option<&Path> {
        self.ca.as_deref()
    }

    /// The URL of `path` below the endpoint's own path.
    pub(crate) fn join(&self, path: &str) -> Url {
        let mut url = self.url.clone();
        url.set_path(&format!("{}{path}", self.url.path().trim_end_matches('/')));
        url
    }

    /// The endpoint as it was given.
    pub(crate) fn url(&self) -> &Url {
        &self.url
    }

    /// The UNIX socket, if it is reached through one.
    pub(crate) fn socket(&self) -> Option<&PathBuf> {
        self.socket.as_ref()
    }
}

impl fmt::Display for EngineAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.socket {
            Some(socket) => write!(f, "unix:{}", socket.display()),
            None => f.write_str(self.url.as_str().trim_end_matches('/')),
        }
    }
}

fn invalid(endpoint: &str, why: &str) -> Error {
    let message =
        format!("`{endpoint}` is no engine address: {why}; write http(s)://host:port or unix:/path");
    Error::new(ErrorKind::ConfigInvalid, "read an engine's address", message).with(Key::Endpoint, endpoint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let shown = |text: &str| EngineAddress::parse(text).unwrap().to_string();
        assert_eq!(shown("http://localhost:19730/"), "http://localhost:19730");
        assert_eq!(shown("http://[::1]:8000"), "http://[::1]:8000");
        assert_eq!(shown("unix:/run/vllm.sock"), "unix:/run/vllm.sock");
        assert_eq!(shown("unix:///run/vllm.sock"), "unix:/run/vllm.sock");
        let behind_path = EngineAddress::parse("http://host/engine-3/").unwrap();
        assert_eq!(behind_path.join("/health").as_str(), "http://host/engine-3/health");
    }

    #[test]
    fn mistakes_are_told_with_the_fix() {
        let long = format!("unix:/{}", "x".repeat(LONGEST_SOCKET_PATH));
        for bad in ["", "localhost:8000", "https://", "http://", "unix:", "unix:relative", "ftp://h", &long] {
            let error = EngineAddress::parse(bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConfigInvalid, "{bad}");
            assert!(error.to_string().contains("write http(s)://host:port or unix:/path"), "{error}");
        }
    }
}
