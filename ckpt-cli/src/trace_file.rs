//! `--trace`: the timelines of this rank's updates as a file. Whatever becomes of the file, the update does not care.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use ckpt_core::{
    Error, ErrorKind, Key, Result, cluster::ClusterEnv, control::host_name, update::trace::Timeline,
};
use rustix::fs::OFlags;

use crate::timeline::{Timelines, since_1970};

/// Attempts that are kept for one file: those of thousands would fill the memory.
pub(crate) const ATTEMPTS_KEPT: usize = 100;
/// For a disk that does not answer.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// A file that was opened before the update, so that it fails before and not after.
#[derive(Debug)]
pub(crate) struct TraceFile {
    rank: u32,
    path: PathBuf,
    file: File,
}

impl TraceFile {
    /// The file that `--trace` names for this process.
    pub(crate) fn of_this_rank(named: &str) -> Result<Self> {
        let ClusterEnv { rank, world_size, .. } = ClusterEnv::from_process()?;
        Self::create(path_of(named, rank, world_size), rank)
    }

    /// A new file, or one that is emptied.
    pub(crate) fn create(path: PathBuf, rank: u32) -> Result<Self> {
        // A pipe that nobody reads is refused instead of waited for.
        let pipes_end = OFlags::NONBLOCK.bits().cast_signed();
        let opened =
            OpenOptions::new().write(true).create(true).truncate(true).custom_flags(pipes_end).open(&path);
        match opened {
            Ok(file) => Ok(Self { rank, path, file }),
            Err(error) => Err(Error::new(
                ErrorKind::ConfigInvalid,
                "write the trace",
                "the file cannot be written; choose another path for the trace",
            )
            .with(Key::Path, path.display())
            .caused_by(error)),
        }
    }

    /// Writes what happened; `failure` is marked if no attempt knows of one. Anything that goes wrong here is a warning.
    pub(crate) async fn write(self, attempts: Vec<Timeline>, failure: Option<Error>) {
        let path = self.path.clone();
        let written = tokio::task::spawn_blocking(move || self.write_now(&attempts, failure.as_ref()));
        let why = match tokio::time::timeout(WRITE_LIMIT, written).await {
            Ok(Ok(Ok(()))) => return,
            Ok(Ok(Err(error))) => error.to_string(),
            Ok(Err(_)) => "the writer panicked".to_owned(),
            Err(_) => format!("not done within {} s", WRITE_LIMIT.as_secs()),
        };
        tracing::warn!(path = %path.display(), why, "the trace was not written; the update does not depend on it");
    }

    fn write_now(mut self, attempts: &[Timeline], failure: Option<&Error>) -> std::io::Result<()> {
        let mut timelines = Timelines::default();
        timelines.rank(self.rank, &format!("rank {} on {}", self.rank, host_name()));
        attempts.iter().for_each(|attempt| timelines.attempt(self.rank, attempt));
        if let Some(failure) = failure.filter(|_| attempts.iter().all(|of| of.failure.is_none())) {
            timelines.failure(self.rank, since_1970(SystemTime::now()), failure);
        }
        let written = self.file.write_all(&timelines.into_bytes()?);
        if written.is_err() {
            // Half a file is no JSON; that it is empty is seen at once.
            let _ = self.file.set_len(0);
        }
        written
    }
}

/// Where this rank writes: `{rank}` is filled in, and where there are several ranks and no `{rank}`, the number stands
/// before the extension.
fn path_of(named: &str, rank: u32, world_size: u32) -> PathBuf {
    if named.contains("{rank}") || world_size == 1 {
        return PathBuf::from(named.replace("{rank}", &rank.to_string()));
    }
    let path = Path::new(named);
    let mut name = path.file_stem().unwrap_or_default().to_os_string();
    name.push(format!("-{rank}"));
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use ckpt_core::{
        Version,
        types::Epoch,
        update::trace::{Span, Stage},
    };
    use serde_json::Value;

    use super::*;

    fn attempt(failure: Option<(Duration, Error)>) -> Timeline {
        let us = Duration::from_micros;
        let span = |stage, start, end, complete| Span {
            stage,
            bucket: Some(2),
            start: us(start),
            end: us(end),
            complete,
        };
        Timeline {
            checkpoint: "model".into(),
            version: Version(3),
            epoch: Some(Epoch(1)),
            began: std::time::UNIX_EPOCH + us(1_000_000),
            took: us(50),
            spans: vec![span(Stage::Load, 3, 10, true), span(Stage::Exchange, 5, 40, false)],
            failure,
        }
    }

    fn events(file: &Path) -> Vec<Value> {
        let trace: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        trace["traceEvents"].as_array().unwrap().clone()
    }

    fn error() -> Error {
        Error::new(ErrorKind::PeerLost, "broadcast", "it is gone").with(Key::Rank, 5)
    }

    #[tokio::test]
    async fn a_failed_attempt_has_its_error_and_what_it_cut_short() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.json");
        let file = TraceFile::create(path.clone(), 7).unwrap();
        file.write(vec![attempt(Some((Duration::from_micros(30), error())))], Some(error())).await;
        let events = events(&path);
        let of = |name: &str| events.iter().filter(|e| e["name"] == name).cloned().collect::<Vec<_>>();
        let [failed] = &of("failed")[..] else { panic!("{events:?}") };
        assert_eq!(
            (&failed["ts"], &failed["pid"], &failed["ph"]),
            (&1_000_030.into(), &7.into(), &"i".into())
        );
        assert_eq!(
            (&failed["args"]["kind"], &failed["args"]["context"]["rank"]),
            (&"PeerLost".into(), &"5".into())
        );
        assert_eq!((&of("load 2")[0]["ts"], &of("load 2")[0]["dur"]), (&1_000_003.into(), &7.into()));
        assert!(of("load 2")[0].get("args").is_none());
        assert_eq!(of("exchange 2")[0]["args"]["cut_short"], true);
        assert_eq!(of("model version 3")[0]["dur"], 50);
    }

    #[tokio::test]
    async fn an_error_that_no_attempt_has_is_marked_too() {
        let folder = tempfile::tempdir().unwrap();
        for attempts in [vec![], vec![attempt(None)]] {
            let path = folder.path().join("t.json");
            TraceFile::create(path.clone(), 0).unwrap().write(attempts, Some(error())).await;
            assert_eq!(events(&path).iter().filter(|e| e["name"] == "failed").count(), 1);
        }
    }

    #[test]
    fn what_cannot_be_written_is_refused_and_pipes_are_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)
            .unwrap();
        for path in [folder.path().to_owned(), folder.path().join("no/such/folder/t.json"), pipe] {
            let error = TraceFile::create(path.clone(), 0).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConfigInvalid, "{error}");
            assert_eq!(error.get(Key::Path), Some(&*path.display().to_string()));
        }
    }

    #[test]
    fn a_full_disk_is_an_error_of_the_writer_alone() {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let file = TraceFile { rank: 0, path: "/dev/full".into(), file: full };
        file.write_now(&[attempt(None)], None).unwrap_err();
    }

    #[test]
    fn each_rank_has_its_own_file() {
        let at = |named, rank, world_size| path_of(named, rank, world_size).display().to_string();
        assert_eq!(at("t.json", 0, 1), "t.json");
        assert_eq!(at("/a.b/t.json", 3, 8), "/a.b/t-3.json");
        assert_eq!(at("trace", 3, 8), "trace-3");
        assert_eq!(at("r{rank}/t.json", 3, 8), "r3/t.json");
        assert_eq!(at("t-{rank}.json", 0, 1), "t-0.json");
    }
}
