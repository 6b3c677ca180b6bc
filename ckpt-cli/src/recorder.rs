//! What becomes of a rank's trace: it is written in the end, after a failure, and before a signal ends the process.

use std::{pin::pin, time::Duration};

use ckpt_core::{
    Error, ErrorKind, Result, control::Session, server::ParameterServer, update::trace::Timeline,
};

use crate::{
    signals::Signals,
    trace_file::{ATTEMPTS_KEPT, TraceFile},
};

/// A launcher signals all ranks when one has failed: most of the others know why by then, or will soon.
const FAILING: Duration = Duration::from_secs(1);

/// The trace of one command, if one is wanted and until it is written.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    file: Option<TraceFile>,
}

impl Recorder {
    /// Opens the file: one that cannot be written is an error now and not after the update.
    pub(crate) fn new(named: Option<&str>) -> Result<Self> {
        Ok(Self { file: named.map(TraceFile::of_this_rank).transpose()? })
    }

    /// From now on the server keeps what is to be written.
    pub(crate) fn watch(&self, server: &mut ParameterServer) {
        if self.file.is_some() {
            server.keep_timelines(ATTEMPTS_KEPT);
        }
    }

    /// The signals that must not end the process before the trace is written.
    pub(crate) fn signals(&self) -> Result<Option<Signals>> {
        self.file.as_ref().map(|_| Signals::new()).transpose()
    }

    /// Writes what happened, once.
    pub(crate) async fn write(&mut self, attempts: Vec<Timeline>, failure: Option<&anyhow::Error>) {
        if let Some(file) = self.file.take() {
            file.write(attempts, failure.map(as_error)).await;
        }
    }
}

fn as_error(error: &anyhow::Error) -> Error {
    let ours = error.chain().find_map(|cause| cause.downcast_ref::<Error>()).cloned();
    ours.unwrap_or_else(|| Error::new(ErrorKind::Backend, "update weights", format!("{error:#}")))
}

/// Does `work`. A signal makes its update fail, as the loss of the session does, instead of ending the process at once;
/// `abort` is what it may take to fail.
pub(crate) async fn through_signals(
    mut signals: Signals,
    session: Session,
    abort: Duration,
    work: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<()> {
    let mut work = pin!(work);
    let name = tokio::select! {
        result = &mut work => return result,
        name = signals.next() => name,
    };
    if let Ok(result) = tokio::time::timeout(FAILING, &mut work).await {
        return result;
    }
    session.close().await;
    let ended = format!("ended by {name}");
    match tokio::time::timeout(abort + FAILING, &mut work).await {
        Ok(result) => result.map_err(|error| error.context(ended)),
        Err(_) => Err(Error::new(ErrorKind::Aborted, "update weights", ended).into()),
    }
}
