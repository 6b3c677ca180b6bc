//! HTTP listeners of commands, over TCP or a UNIX socket, and how others learn of them.

use std::{
    fs,
    future::Future,
    io::{self, Write},
    net::SocketAddr,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
};

use axum::Router;
use ckpt_core::{Error, ErrorKind, Key, Result};
use tokio::net::{TcpListener, UnixListener};

/// A bound listener.
pub(crate) struct Listener {
    socket: Socket,
    address: String,
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, UnixPath),
}

/// Removes the socket's file at the end.
struct UnixPath(std::path::PathBuf);

impl Drop for UnixPath {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl Listener {
    pub(crate) async fn tcp(address: SocketAddr) -> Result<Self> {
        let fail = |error: io::Error| cannot_listen(address.to_string(), error);
        let listener = TcpListener::bind(address).await.map_err(fail)?;
        let address = format!("http://{}", listener.local_addr().map_err(fail)?);
        Ok(Self { socket: Socket::Tcp(listener), address })
    }

    pub(crate) fn unix(path: &Path) -> Result<Self> {
        let path =
            std::path::absolute(path).map_err(|error| cannot_listen(path.display().to_string(), error))?;
        let address = format!("unix:{}", path.display());
        let fail = |error: io::Error| cannot_listen(address.clone(), error);
        let listener = match UnixListener::bind(&path) {
            // The file of a dead process is in the way; a living one would answer.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && UnixStream::connect(&path).is_err() => {
                fs::remove_file(&path).map_err(fail)?;
                UnixListener::bind(&path).map_err(fail)?
            }
            other => other.map_err(fail)?,
        };
        let guard = UnixPath(path.clone());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(fail)?;
        Ok(Self { socket: Socket::Unix(listener, guard), address })
    }

    /// `http://host:port` or `unix:/path`.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Serves until `stop` completes and the requests under way are answered.
    pub(crate) async fn serve(
        self,
        router: Router,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> Result<()> {
        let ended = match self.socket {
            Socket::Tcp(listener) => axum::serve(listener, router).with_graceful_shutdown(stop).await,
            Socket::Unix(listener, _path) => axum::serve(listener, router).with_graceful_shutdown(stop).await,
        };
        ended.map_err(|error| {
            Error::new(ErrorKind::Backend, "serve requests", "the server ended").caused_by(error)
        })
    }
}

fn cannot_listen(address: String, error: io::Error) -> Error {
    let hint = match error.kind() {
        io::ErrorKind::AddrInUse => "the address is in use: stop the other process or choose another one",
        _ => "cannot listen there; choose another --listen or --uds",
    };
    Error::new(ErrorKind::ConfigInvalid, "listen for requests", hint)
        .with(Key::Endpoint, address)
        .caused_by(error)
}

/// Writes `address` to `file` at once: a reader sees nothing or all of it.
pub(crate) fn announce(file: &Path, address: &str) -> Result<()> {
    let folder = match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let write = || -> io::Result<()> {
        let mut temporary = tempfile::NamedTempFile::new_in(folder)?;
        writeln!(temporary, "{address}")?;
        temporary.persist(file).map_err(|error| error.error)?;
        Ok(())
    };
    write().map_err(|error| {
        Error::new(
            ErrorKind::ConfigInvalid,
            "write the port file",
            "it cannot be written; choose another --port-file",
        )
        .with(Key::Path, file.display())
        .caused_by(error)
    })
}
