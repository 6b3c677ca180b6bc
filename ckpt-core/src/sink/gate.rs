//! The door of a worker link: a private UNIX socket that lets exactly one worker in and tells every other one why not.

use std::{
    fmt,
    future::Future,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    net::{UnixListener, UnixStream},
    sync::{mpsc, watch},
    task::{JoinHandle, JoinSet},
    time::timeout,
};
use twox_hash::XxHash3_64;

use crate::{
    device::host::check_private_dir,
    error::{Error, ErrorKind, Key, Result},
};

/// A path in `sockaddr_un` holds this many bytes before its final zero.
const MAX_SOCKET_PATH: usize = 107;
/// A client that has not introduced itself after this long is not a worker.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Strangers that may be in the middle of a handshake at once.
const MAX_HANDSHAKES: usize = 16;

/// What is said on a fresh connection before it counts as a worker, and to one that came too late.
pub(super) trait Protocol: Send + Sync + 'static {
    /// The connection after the handshake.
    type Peer: Send + 'static;
    /// Finds out whether this is the awaited worker; the error is for the log and for a later timeout's message.
    fn handshake(&self, stream: UnixStream) -> impl Future<Output = Result<Self::Peer, String>> + Send;
    /// Makes a worker raise that has no business here.
    fn refuse(&self, peer: Self::Peer, why: String) -> impl Future<Output = ()> + Send;
}

struct Shared {
    /// Why a client is turned away now.
    refusal: Mutex<String>,
    /// What was wrong with the last client that was not a worker.
    last_stranger: Mutex<Option<String>>,
}

/// A bound endpoint. Dropping it closes the door and removes the file.
pub(super) struct Gate<P: Protocol> {
    file: SocketFile,
    worker: mpsc::Receiver<P::Peer>,
    refused: watch::Receiver<u64>,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl<P: Protocol> fmt::Debug for Gate<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("path", &self.file.0).finish_non_exhaustive()
    }
}

impl<P: Protocol> Drop for Gate<P> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl<P: Protocol> Gate<P> {
    /// Listens on a new socket `<kind>-<uuid's hash>-<pid>-<n>.sock` in `runtime_dir`. Needs a tokio runtime.
    pub(super) fn bind(runtime_dir: &Path, kind: &str, uuid: &str, protocol: P) -> Result<Self> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let name = format!(
            "{}{}-{}.sock",
            file_prefix(kind, uuid),
            std::process::id(),
            COUNTER.fetch_add(1, Ordering::Relaxed)
        );
        Self::bind_path(&runtime_dir.join(name), protocol)
    }

    /// Listens on `path`, which must not exist.
    pub(super) fn bind_path(path: &Path, protocol: P) -> Result<Self> {
        let (listener, file) = listen(path)?;
        let (worker_tx, worker) = mpsc::channel(1);
        let (refused_tx, refused) = watch::channel(0);
        let shared = Arc::new(Shared {
            refusal: Mutex::new(format!(
                "another worker is already connected to {}; two workers were given the same device UUID",
                path.display()
            )),
            last_stranger: Mutex::new(None),
        });
        let task = tokio::spawn(accept(listener, protocol, worker_tx, refused_tx, shared.clone()));
        Ok(Self { file, worker, refused, shared, task })
    }

    /// The socket's file.
    pub(super) fn path(&self) -> &Path {
        &self.file.0
    }

    /// The worker's connection; waits for it. At most one is ever handed out.
    pub(super) async fn worker(&mut self, deadline: Instant) -> Result<P::Peer> {
        let waited = tokio::time::timeout_at(deadline.into(), self.worker.recv()).await;
        if let Ok(Some(peer)) = waited {
            return Ok(peer);
        }
        let stranger = lock(&self.shared.last_stranger).clone();
        let hint = match stranger {
            Some(what) => format!("; a client came that is no such worker: {what}"),
            None => "; was the engine told this endpoint, and does it see the same file system?".to_owned(),
        };
        Err(Error::new(
            ErrorKind::Timeout,
            "wait for the worker",
            format!("no worker has connected by the deadline{hint}"),
        )
        .with(Key::Path, self.path().display()))
    }

    /// From now on a worker that comes (or comes back) is told `why`; waits until one was, at most until `deadline`.
    pub(super) async fn refuse_next(&mut self, why: &str, deadline: Instant) -> bool {
        *lock(&self.shared.refusal) = why.to_owned();
        self.refused.borrow_and_update();
        matches!(tokio::time::timeout_at(deadline.into(), self.refused.changed()).await, Ok(Ok(())))
    }
}

async fn accept<P: Protocol>(
    listener: UnixListener,
    protocol: P,
    worker: mpsc::Sender<P::Peer>,
    refused: watch::Sender<u64>,
    shared: Arc<Shared>,
) {
    let protocol = Arc::new(protocol);
    let mut clients = JoinSet::new();
    // The place of the one worker: whoever ends its handshake first takes it for good.
    let place = Arc::new(Mutex::new(Some(worker)));
    loop {
        let stream = tokio::select! {
            accepted = listener.accept(), if clients.len() < MAX_HANDSHAKES => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors or a client that left early: neither ends the listener.
                    tracing::warn!(%error, "accept on a worker endpoint failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
            _ = clients.join_next(), if !clients.is_empty() => continue,
        };
        let (protocol, place, refused, shared) =
            (protocol.clone(), place.clone(), refused.clone(), shared.clone());
        clients.spawn(async move {
            let peer = match timeout(HANDSHAKE, protocol.handshake(stream)).await {
                Ok(Ok(peer)) => peer,
                Ok(Err(why)) => {
                    tracing::warn!(why, "a client of the worker endpoint was turned away");
                    *lock(&shared.last_stranger) = Some(why);
                    return;
                }
                Err(_) => {
                    *lock(&shared.last_stranger) = Some("it did not introduce itself".to_owned());
                    return;
                }
            };
            let place = lock(&place).take();
            match place {
                // The channel has room for the only message that it ever carries.
                Some(worker) => drop(worker.try_send(peer)),
                None => {
                    let why = lock(&shared.refusal).clone();
                    tracing::warn!(why, "a further worker was turned away");
                    if timeout(HANDSHAKE, protocol.refuse(peer, why)).await.is_ok() {
                        refused.send_modify(|n| *n += 1);
                    }
                }
            }
        });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Removes the socket's file.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// How the names of the sockets of one worker begin.
pub(super) fn file_prefix(kind: &str, uuid: &str) -> String {
    format!("{kind}-{:016x}-", XxHash3_64::oneshot(uuid.as_bytes()))
}

fn listen(path: &Path) -> Result<(UnixListener, SocketFile)> {
    let fail = |kind, message: String| {
        Error::new(kind, "bind the worker endpoint", message).with(Key::Path, path.display())
    };
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        let message = format!(
            "the path is longer than the {MAX_SOCKET_PATH} bytes of a UNIX socket; set CKPT_RUNTIME_DIR to a shorter folder"
        );
        return Err(fail(ErrorKind::ConfigInvalid, message));
    }
    check_private_dir(path.parent().unwrap_or(Path::new("/")))?;
    if tokio::runtime::Handle::try_current().is_err() {
        return Err(fail(ErrorKind::Internal, "there is no tokio runtime here".to_owned()));
    }
    let listener = UnixListener::bind(path)
        .map_err(|e| fail(ErrorKind::Backend, "cannot bind the socket".to_owned()).caused_by(e))?;
    let file = SocketFile(path.to_owned());
    // The folder is private, so nobody could connect before this.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .map_err(|e| fail(ErrorKind::Backend, "cannot make the socket private".to_owned()).caused_by(e))?;
    Ok((listener, file))
}
