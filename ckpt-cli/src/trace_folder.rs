//! `--trace-dir`: a file for each update of a server, of which the last are kept.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
};

use ckpt_core::{Error, ErrorKind, Key, Result, update::trace::Timeline};

use crate::{timeline::since_1970, trace_file::TraceFile};

/// Files of one rank. Servers live long, and disks are finite.
const FILES_KEPT: usize = 100;

/// A folder that can be written.
#[derive(Debug)]
pub(crate) struct TraceFolder {
    folder: PathBuf,
    rank: u32,
    /// The files of this rank, the oldest first; also those of its earlier processes.
    files: VecDeque<PathBuf>,
}

impl TraceFolder {
    /// An error unless files can be made in `folder`.
    pub(crate) fn open(folder: &Path, rank: u32) -> Result<Self> {
        let refused = |error: std::io::Error| {
            Error::new(
                ErrorKind::ConfigInvalid,
                "write traces",
                "no files can be made in this folder; make it, or choose another --trace-dir",
            )
            .with(Key::Path, folder.display())
            .caused_by(error)
        };
        tempfile::tempfile_in(folder).map_err(refused)?;
        let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
            .map_err(refused)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| is_ours(path, rank))
            .collect();
        files.sort();
        Ok(Self { folder: folder.to_owned(), rank, files: files.into() })
    }

    /// Writes one update, and what was tried after it failed. Anything that goes wrong here is a warning.
    pub(crate) async fn write(&mut self, attempts: Vec<Timeline>) {
        let Some(first) = attempts.first() else { return };
        // Names sort by time.
        let began_ms = since_1970(first.began) / 1000;
        let name = format!("{began_ms:013}-version-{}-rank-{}.json", first.version, self.rank);
        let path = self.folder.join(name);
        match TraceFile::create(path.clone(), self.rank) {
            Ok(file) => file.write(attempts, None).await,
            Err(error) => {
                tracing::warn!(%error, "the trace was not written; the update does not depend on it")
            }
        }
        self.files.push_back(path);
        while self.files.len() > FILES_KEPT
            && let Some(oldest) = self.files.pop_front()
        {
            // Somebody may have taken it away.
            let _ = std::fs::remove_file(oldest);
        }
    }
}

/// Whether the name is one that [`TraceFolder::write`] gives.
fn is_ours(path: &Path, rank: u32) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let numbers = || {
        let rest = name.strip_suffix(&format!("-rank-{rank}.json"))?;
        rest.split_once("-version-")
    };
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    numbers().is_some_and(|(began, version)| began.len() == 13 && digits(began) && digits(version))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use ckpt_core::Version;

    use super::*;

    fn attempt(number: u64) -> Timeline {
        Timeline {
            checkpoint: "model".into(),
            version: Version(number),
            epoch: None,
            began: UNIX_EPOCH + Duration::from_millis(1_700_000_000_000 + number),
            took: Duration::ZERO,
            spans: Vec::new(),
            failure: None,
        }
    }

    #[tokio::test]
    async fn the_last_files_of_a_rank_are_kept_across_its_processes_and_others_files_stay() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["1700000000000-version-1-rank-1.json", "notes-version-1-rank-0.json"] {
            std::fs::write(folder.path().join(name), "x").unwrap();
        }
        for process in 0..2 {
            let mut traces = TraceFolder::open(folder.path(), 0).unwrap();
            for i in 0..60 {
                traces.write(vec![attempt(process * 60 + i)]).await;
            }
        }
        let mut names: Vec<_> =
            std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names.len(), FILES_KEPT + 2, "{names:?}");
        assert_eq!(names[0], "1700000000000-version-1-rank-1.json");
        assert_eq!(names[1], "1700000000020-version-20-rank-0.json");
    }

    #[tokio::test]
    async fn a_folder_that_goes_away_is_only_a_warning_and_one_that_is_none_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let gone = folder.path().join("gone");
        assert_eq!(TraceFolder::open(&gone, 0).unwrap_err().kind(), ErrorKind::ConfigInvalid);
        std::fs::create_dir(&gone).unwrap();
        let mut traces = TraceFolder::open(&gone, 0).unwrap();
        std::fs::remove_dir(&gone).unwrap();
        traces.write(vec![attempt(1)]).await;
        assert!(!gone.exists());
    }
}
