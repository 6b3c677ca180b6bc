//! Workers that wait for a parameter server which died. checkpoint-engine's have no deadline of their own: they wait
//! until somebody binds the same endpoint again and tells them to raise.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tokio::{net::UnixStream, task::JoinHandle, time::timeout_at};

use super::{
    checkpoint_engine::{FILE_KIND, Link, ZmtpProtocol},
    gate::{self, Gate},
    native,
};
use crate::{
    device::host::check_private_dir,
    error::{Error, ErrorKind, Key, Result},
};

/// How long a stranded worker is waited for in the background. ZeroMQ connects again after 0.1 s; a worker that does not
/// come has gone itself.
const BACKGROUND: Duration = Duration::from_secs(10);
const TEXT: &str = "the parameter server of this update died; the weights may be mixed, update again";

/// Frees the workers of the device `uuid`, or of every device, that wait for a parameter server which died: binds the
/// endpoint that it left in `runtime_dir` again and sends an exception. Returns how many were told by the deadline.
///
/// Any process of the user on this host may do it: a restarted rank, its neighbours, the launcher. Endpoints that dead
/// servers have left for native workers, which notice by themselves, are removed.
pub async fn release_stranded_workers(
    runtime_dir: &Path,
    uuid: Option<&str>,
    deadline: Instant,
) -> Result<u32> {
    check_private_dir(runtime_dir)?;
    let entries = std::fs::read_dir(runtime_dir).map_err(|e| {
        Error::new(ErrorKind::Backend, "look for stranded workers", "cannot read the runtime folder")
            .with(Key::Path, runtime_dir.display())
            .caused_by(e)
    })?;
    let prefix = |kind: &str| match uuid {
        Some(uuid) => gate::file_prefix(kind, uuid),
        None => format!("{kind}-"),
    };
    let (waiting, silent) = (prefix(FILE_KIND), prefix(native::FILE_KIND));
    let mut told = tokio::task::JoinSet::new();
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let Some(name) = name.to_str().filter(|name| name.ends_with(".sock")) else { continue };
        let waits = name.starts_with(&waiting);
        if !(waits || name.starts_with(&silent)) {
            continue;
        }
        // A live parameter server listens as long as its link lives; a dead one refuses.
        let refused = matches!(
            UnixStream::connect(&path).await,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused
        );
        if !refused || std::fs::remove_file(&path).is_err() || !waits {
            continue;
        }
        let gate = Gate::bind_path(&path, ZmtpProtocol)?;
        tracing::info!(path = %path.display(), "a dead parameter server left an endpoint; telling its worker");
        let link = Link::new(gate);
        told.spawn(async move { timeout_at(deadline.into(), link.raise(TEXT)).await.is_ok() });
    }
    let mut count = 0;
    while let Some(done) = told.join_next().await {
        count += u32::from(done.unwrap_or(false));
    }
    Ok(count)
}

/// The same as a task, for whoever has other things to do. Needs a tokio runtime.
pub fn release_in_background(runtime_dir: PathBuf, uuid: Option<String>) -> JoinHandle<()> {
    tokio::spawn(async move {
        let deadline = Instant::now() + BACKGROUND;
        match release_stranded_workers(&runtime_dir, uuid.as_deref(), deadline).await {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "stranded workers were told to raise"),
            Err(error) => tracing::debug!(%error, "no stranded workers were looked for"),
        }
    })
}
