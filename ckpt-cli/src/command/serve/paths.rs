//! Which files a request may name.

use std::path::{Path, PathBuf};

use ckpt_core::{Error, ErrorKind, Key, Result};

const OPERATION: &str = "check a file's path";

/// The folders below which files may be registered; none means anywhere.
#[derive(Debug, Default)]
pub(super) struct AllowedPaths(Vec<PathBuf>);

impl AllowedPaths {
    /// `roots` with their links resolved; each must exist.
    pub(super) fn new(roots: &[PathBuf]) -> Result<Self> {
        roots.iter().map(|root| resolve(root)).collect::<Result<_>>().map(Self)
    }

    /// Whether every path is allowed.
    pub(super) fn is_any(&self) -> bool {
        self.0.is_empty()
    }

    /// The real path of `file`, without links. It is what must be opened: a link that is changed after this check
    /// leads nowhere.
    pub(super) fn check(&self, file: &Path) -> Result<PathBuf> {
        let real = resolve(file)?;
        if self.is_any() || self.0.iter().any(|root| real.starts_with(root)) {
            return Ok(real);
        }
        // The real path is not told: it would show what lies outside.
        Err(Error::new(
            ErrorKind::ConfigInvalid,
            OPERATION,
            "the file is outside the folders that --allow-path names",
        )
        .with(Key::Path, file.display()))
    }
}

fn resolve(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).map_err(|error| {
        Error::new(ErrorKind::ConfigInvalid, OPERATION, "it cannot be found on this host; check the path")
            .with(Key::Path, path.display())
            .caused_by(error)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_out_of_the_root_and_dots_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (inside, outside) = (folder.path().join("in"), folder.path().join("out"));
        for place in [&inside, &outside, &folder.path().join("in-side")] {
            std::fs::create_dir(place).unwrap();
            std::fs::write(place.join("f"), b"").unwrap();
        }
        symlink(outside.join("f"), inside.join("link")).unwrap();
        symlink(inside.join("f"), outside.join("back")).unwrap();
        let allowed = AllowedPaths::new(std::slice::from_ref(&inside)).unwrap();
        allowed.check(&inside.join("f")).unwrap();
        // A link that leads inside is inside.
        allowed.check(&outside.join("back")).unwrap();
        for bad in ["in/link", "in/../out/f", "out/f", "in-side/f", "in/none"] {
            let error = allowed.check(&folder.path().join(bad)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConfigInvalid, "{bad}");
        }
        assert!(AllowedPaths::new(&[folder.path().join("none")]).is_err());
        AllowedPaths::default().check(&outside.join("f")).unwrap();
    }
}
