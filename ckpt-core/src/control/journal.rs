//! The last decisions of a hub, in a file: a rank in doubt can ask the hub that is started in a dead one's place.

use std::{
    fs, io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use super::weights::Decision;
use crate::types::Epoch;

/// A list of decisions is never longer; more would be somebody else's file.
const MAX_BYTES: u64 = 64 << 10;

#[derive(Debug, Default)]
pub(super) struct Journal {
    path: Option<PathBuf>,
    found: Vec<Decision>,
}

impl Journal {
    /// Without a path nothing is kept. A file that cannot be read is as good as none: ranks in doubt are then marked.
    pub(super) fn open(path: Option<PathBuf>) -> Self {
        let found = path.as_deref().map(read).unwrap_or_default();
        Self { path, found }
    }

    /// What the last hub had decided.
    pub(super) fn decisions(&self) -> Vec<Decision> {
        self.found.clone()
    }

    /// Epochs count on from here, so that a new hub does not give out an old one's numbers.
    pub(super) fn first_epoch() -> Epoch {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Epoch(u64::try_from(since.as_millis()).unwrap_or_default())
    }

    /// Replaces the file; a reader sees the old one or the new one. A failure costs only what a dead hub would have
    /// known, so the update goes on.
    pub(super) fn write(&mut self, decisions: &[Decision]) {
        let Some(path) = &self.path else { return };
        if let Err(error) = replace(path, decisions) {
            tracing::warn!(path = %path.display(), %error, "the decision cannot be written down");
        }
    }
}

fn read(path: &Path) -> Vec<Decision> {
    let fits = fs::symlink_metadata(path).is_ok_and(|m| m.is_file() && m.len() <= MAX_BYTES);
    if !fits {
        return Vec::new();
    }
    let text = fs::read(path).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_else(|error| {
        tracing::warn!(path = %path.display(), %error, "the last hub's decisions cannot be read");
        Vec::new()
    })
}

fn replace(path: &Path, decisions: &[Decision]) -> io::Result<()> {
    let text = serde_json::to_vec(decisions)?;
    let new = path.with_extension("new");
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    io::Write::write_all(&mut file, &text)?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_hub_reads_what_the_last_one_wrote() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("decisions.json");
        let mut journal = Journal::open(Some(path.clone()));
        assert!(journal.decisions().is_empty());
        let decisions =
            [Decision { epoch: Epoch(4), committed: false }, Decision { epoch: Epoch(5), committed: true }];
        journal.write(&decisions[..1]);
        journal.write(&decisions);
        assert_eq!(Journal::open(Some(path.clone())).decisions(), decisions);
        fs::write(&path, "no JSON").unwrap();
        assert!(Journal::open(Some(path)).decisions().is_empty());
        // Without a place nothing is written, and nothing goes wrong.
        Journal::open(None).write(&decisions);
    }
}
