//! Finding a native library at run time: which files are tried, and what to say when none can be opened.
//!
//! Core opens nothing itself: each crate passes its own loader, so that `unsafe` stays in the crate that knows the
//! library.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
};

use crate::error::{Error, ErrorKind, Key, Result};

/// A library to look for.
#[derive(Clone, Debug)]
pub struct LibrarySearch {
    /// The product, for messages: `CANN's HCCL`.
    pub product: &'static str,
    /// File names, the best first; each is tried in every folder and then by the system's own search.
    pub names: &'static [&'static str],
    /// What the user set in `variable`: a file, or a folder that holds one of `names`. Nothing else is tried then.
    pub chosen: Option<PathBuf>,
    /// The environment variable that `chosen` came from.
    pub variable: &'static str,
    /// Folders looked at before the system's own search.
    pub folders: Vec<PathBuf>,
    /// How to get it: `install CANN 8 or newer`.
    pub remedy: &'static str,
}

/// A library that was found.
#[derive(Debug)]
pub struct Opened<L> {
    /// What the loader returned.
    pub library: L,
    /// The file, or the bare name that the system resolved.
    pub path: PathBuf,
}

impl LibrarySearch {
    /// The files to try, in order. A bare name stands for the system's search.
    pub fn candidates(&self) -> Vec<PathBuf> {
        let in_folder = |folder: &Path| self.names.iter().map(|name| folder.join(name)).collect::<Vec<_>>();
        match &self.chosen {
            Some(path) if path.is_dir() => in_folder(path),
            Some(path) => vec![path.clone()],
            None => {
                let folders = self.folders.iter().flat_map(|folder| in_folder(folder));
                folders.filter(|path| path.exists()).chain(self.names.iter().map(PathBuf::from)).collect()
            }
        }
    }

    /// Opens the first candidate that `load` accepts; the error lists what was tried and why files that exist failed.
    pub fn open<L>(&self, mut load: impl FnMut(&OsStr) -> Result<L, String>) -> Result<Opened<L>> {
        let mut tried = Vec::new();
        for path in self.candidates() {
            match load(path.as_os_str()) {
                Ok(library) => return Ok(Opened { library, path }),
                Err(why) => tried.push(describe(&path, &why)),
            }
        }
        let name = self.names.first().copied().unwrap_or(self.product);
        let fix = match &self.chosen {
            Some(path) => format!("{} is set to {}: correct or unset it", self.variable, path.display()),
            None => format!("{}, or set {} to the file or its folder", self.remedy, self.variable),
        };
        Err(Error::new(
            ErrorKind::Unavailable,
            "open a native library",
            format!("{} ({name}) not found (tried {}); {fix}", self.product, tried.join(", ")),
        ))
    }
}

/// The loader's text is kept only where it says more than "no such file".
fn describe(path: &Path, why: &str) -> String {
    let shown = path.display().to_string();
    let plain_absence = why.starts_with(&format!("{shown}: cannot open shared object file"));
    if why.is_empty() || plain_absence && !path.is_absolute() || plain_absence && !path.exists() {
        shown
    } else {
        let line = why.lines().next().unwrap_or_default();
        format!("{shown}: {}", line.strip_prefix(&format!("{shown}: ")).unwrap_or(line))
    }
}

/// The words of the system's loader: the deepest cause of `error`. `libloading` itself only says "dlopen failed".
pub fn loader_reason(error: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(Some(error), |error| error.source()).last().unwrap_or(error).to_string()
}

/// Existing folders `<site-packages>/<package>` of the Python environments that this process can know of: the active
/// virtual environment, Conda, `PYTHONPATH`, that of the `python3` on the `PATH`, the user's and the system's. pip is
/// how many of these libraries come.
pub fn python_package_folders(package: &str, env: &dyn Fn(&str) -> Option<String>) -> Vec<PathBuf> {
    let mut sites: Vec<PathBuf> = env("PYTHONPATH")
        .iter()
        .flat_map(|paths| std::env::split_paths(paths).collect::<Vec<_>>())
        .filter(|path| path.is_absolute())
        .collect();
    let prefixes = ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|name| env(name)).map(PathBuf::from);
    let prefixes = prefixes.chain(env("PATH").map(|path| path_python_prefixes(&path)).unwrap_or_default());
    let user = env("HOME").map(|home| Path::new(&home).join(".local"));
    for prefix in prefixes.chain(user).chain(["/usr/local", "/usr"].map(PathBuf::from)) {
        let mut pythons: Vec<PathBuf> = std::fs::read_dir(prefix.join("lib"))
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"))
            .map(|entry| entry.path())
            .collect();
        pythons.sort();
        for python in pythons.into_iter().rev() {
            sites.push(python.join("site-packages"));
            sites.push(python.join("dist-packages"));
        }
    }
    let mut folders: Vec<PathBuf> = Vec::new();
    for folder in sites.into_iter().map(|site| site.join(package)).filter(|folder| folder.is_dir()) {
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    folders
}

/// Where the `python3` that a user would start lives. In a virtual environment it is a link to another one.
fn path_python_prefixes(path: &str) -> Vec<PathBuf> {
    let mut prefixes = Vec::new();
    let found =
        std::env::split_paths(path).map(|folder| folder.join("python3")).find(|python| python.exists());
    let mut next = found;
    // Links in a ring would never end.
    for _ in 0..8 {
        let Some(python) = next else { break };
        prefixes.extend(python.parent().and_then(Path::parent).map(Path::to_path_buf));
        next = std::fs::read_link(&python).ok().and_then(|to| python.parent().map(|folder| folder.join(to)));
    }
    prefixes
}

/// The error with which a provider answers `open` when its probe says no.
pub fn unavailable(transport: &'static str, why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unavailable, "open a backend", why).with(Key::Device, transport)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(chosen: Option<PathBuf>, folders: Vec<PathBuf>) -> LibrarySearch {
        LibrarySearch {
            product: "the test library",
            names: &["libckpt-test.so.2", "libckpt-test.so"],
            chosen,
            variable: "CKPT_TEST_LIBRARY",
            folders,
            remedy: "install it",
        }
    }

    fn nothing(name: &OsStr) -> Result<(), String> {
        Err(format!("{}: cannot open shared object file: No such file or directory", name.display()))
    }

    #[test]
    fn folders_come_before_the_system_and_a_choice_replaces_both() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("libckpt-test.so");
        std::fs::write(&file, b"").unwrap();
        let bare = [PathBuf::from("libckpt-test.so.2"), PathBuf::from("libckpt-test.so")];
        let all: Vec<_> = std::iter::once(file.clone()).chain(bare).collect();
        assert_eq!(search(None, vec![folder.path().into()]).candidates(), all);
        assert_eq!(search(Some(file.clone()), vec![]).candidates(), std::slice::from_ref(&file));
        assert_eq!(search(Some(folder.path().into()), vec![]).candidates().len(), 2);
        let opened = search(None, vec![folder.path().into()]).open(|_| Ok(())).unwrap();
        assert_eq!(opened.path, file);
    }

    #[test]
    fn the_error_lists_what_was_tried_and_how_to_mend_it() {
        let error = search(None, vec![]).open(nothing).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert_eq!(
            error.message(),
            "the test library (libckpt-test.so.2) not found (tried libckpt-test.so.2, libckpt-test.so); install it, \
             or set CKPT_TEST_LIBRARY to the file or its folder"
        );
        let error = search(Some("/nowhere/x.so".into()), vec![]).open(nothing).unwrap_err();
        assert!(error.message().ends_with("CKPT_TEST_LIBRARY is set to /nowhere/x.so: correct or unset it"));
    }

    #[test]
    fn a_file_that_exists_and_fails_says_why() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("libckpt-test.so"), b"").unwrap();
        let error = search(None, vec![folder.path().into()])
            .open(|_| Err::<(), _>("libascendcl.so: cannot open shared object file".into()))
            .unwrap_err();
        assert!(error.message().contains("libckpt-test.so: libascendcl.so: cannot open"), "{error}");
    }

    #[test]
    fn python_folders_follow_the_environment() {
        let root = tempfile::tempdir().unwrap();
        let package = root.path().join("lib/python3.11/site-packages/mooncake");
        std::fs::create_dir_all(&package).unwrap();
        let prefix = root.path().to_string_lossy().into_owned();
        let found =
            python_package_folders("mooncake", &|name| (name == "VIRTUAL_ENV").then(|| prefix.clone()));
        assert_eq!(found.first(), Some(&package));
        // Through the python3 on the PATH, by way of a link.
        let (bin, path) = (root.path().join("bin"), tempfile::tempdir().unwrap());
        std::fs::create_dir(&bin).unwrap();
        std::fs::write(bin.join("python3"), b"").unwrap();
        std::os::unix::fs::symlink(bin.join("python3"), path.path().join("python3")).unwrap();
        let path = path.path().to_string_lossy().into_owned();
        let found = python_package_folders("mooncake", &|name| (name == "PATH").then(|| path.clone()));
        assert_eq!(found.first(), Some(&package));
    }
}
