//! HTTP listeners of commands, over TCP or a UNIX socket, and how others learn of them.

use std::{
    fs,
    future::Future,
    io::{self, Write},
    net::SocketAddr,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::Request,
    middleware::{self, Next},
    response::Response,
};
use ckpt_core::{Error, ErrorKind, Key, Result, tls::ServerTls};
use futures_util::{StreamExt, stream};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// From one request, or the connection, to the next request's whole head.
const HEAD_TIME: Duration = Duration::from_secs(5);
/// From a connection to the end of its TLS handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(5);
/// A head with all its headers.
const HEAD_BYTES: usize = 64 << 10;
/// Between two pieces of a body.
const PIECE_TIME: Duration = Duration::from_secs(10);
/// For a whole body.
const BODY_TIME: Duration = Duration::from_secs(300);
/// At once; more wait to be accepted.
const CONNECTIONS: usize = 512;

/// A bound listener.
pub(crate) struct Listener {
    socket: Socket,
    address: String,
}

enum Socket {
    Tcp(TcpListener, Option<ServerTls>),
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
    /// With `tls` it speaks HTTPS and nothing else.
    pub(crate) async fn tcp(address: SocketAddr, tls: Option<ServerTls>) -> Result<Self> {
        let fail = |error: io::Error| cannot_listen(address.to_string(), error);
        let listener = TcpListener::bind(address).await.map_err(fail)?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let address = format!("{scheme}://{}", listener.local_addr().map_err(fail)?);
        Ok(Self { socket: Socket::Tcp(listener, tls), address })
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

    /// `http://host:port`, `https://host:port` or `unix:/path`.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Serves until `stop` completes and the requests under way are answered.
    pub(crate) async fn serve(self, router: Router, stop: impl Future<Output = ()> + Send + 'static) {
        let router = router.layer(middleware::from_fn(bound_body));
        match self.socket {
            Socket::Tcp(listener, None) => serve_on(listener, as_it_is, router, stop).await,
            Socket::Tcp(listener, Some(tls)) => {
                let shake_hands = move |stream| {
                    let tls = tls.clone();
                    async move {
                        tokio::time::timeout(HANDSHAKE_TIME, tls.accept(stream))
                            .await
                            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
                    }
                };
                serve_on(listener, shake_hands, router, stop).await;
            }
            Socket::Unix(listener, _path) => serve_on(listener, as_it_is, router, stop).await,
        }
    }
}

async fn as_it_is<T>(stream: T) -> io::Result<T> {
    Ok(stream)
}

/// Accepts until `stop`, then lets the requests under way end. `open` makes of a connection what HTTP is spoken over.
async fn serve_on<L, S, O>(
    mut listener: L,
    open: impl Fn(L::Io) -> O,
    router: Router,
    stop: impl Future<Output = ()>,
) where
    L: axum::serve::Listener,
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    O: Future<Output = io::Result<S>> + Send + 'static,
{
    let mut http = http1::Builder::new();
    // The limit also ends connections on which nothing more is asked.
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME).max_buf_size(HEAD_BYTES);
    let (places, ending, tasks) =
        (Arc::new(Semaphore::new(CONNECTIONS)), CancellationToken::new(), TaskTracker::new());
    let accept = async {
        // Never closed.
        while let Ok(place) = places.clone().acquire_owned().await {
            let (stream, _) = listener.accept().await;
            let (opening, http, router, ending) =
                (open(stream), http.clone(), router.clone(), ending.clone());
            tasks.spawn(async move {
                // A connection has its place from here on, also one that never gets further.
                let opened = tokio::select! {
                    opened = opening => opened,
                    () = ending.cancelled() => return,
                };
                let stream = match opened {
                    Ok(stream) => stream,
                    Err(error) => return tracing::debug!(%error, "a connection was refused"),
                };
                let connection =
                    http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
                let mut connection = std::pin::pin!(connection);
                let ended = tokio::select! {
                    ended = &mut connection => ended,
                    () = ending.cancelled() => {
                        connection.as_mut().graceful_shutdown();
                        connection.await
                    }
                };
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection ended early");
                }
                drop(place);
            });
        }
    };
    tokio::select! {
        () = accept => {}
        () = stop => {}
    }
    drop(listener);
    ending.cancel();
    tasks.close();
    tasks.wait().await;
}

/// Ends requests whose bodies trickle in.
async fn bound_body(request: Request, next: Next) -> Response {
    let end = Instant::now() + BODY_TIME;
    let body = |body: Body| {
        let pieces = stream::unfold(Some(body.into_data_stream()), move |pieces| async move {
            let mut pieces = pieces?;
            match tokio::time::timeout_at(end.min(Instant::now() + PIECE_TIME), pieces.next()).await {
                Ok(Some(piece)) => Some((piece, Some(pieces))),
                Ok(None) => None,
                Err(_) => Some((Err(axum::Error::new(io::Error::from(io::ErrorKind::TimedOut))), None)),
            }
        });
        Body::from_stream(pieces)
    };
    next.run(request.map(body)).await
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
