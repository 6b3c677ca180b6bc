//! The folder for sockets and shared memory, which only its owner may enter.

use std::{
    ffi::OsString,
    fs,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use crate::error::{Error, ErrorKind, Key, Result};

/// The folder for sockets and shared-memory files, made if it is not there: `$CKPT_RUNTIME_DIR`, else
/// `$XDG_RUNTIME_DIR/ckpt` where that exists, else `/tmp/ckpt-<uid>`. Refused if another user could enter it.
pub fn runtime_dir() -> Result<PathBuf> {
    let path = choose(|name| std::env::var_os(name), rustix::process::geteuid().as_raw());
    private_dir(&path)?;
    Ok(path)
}

fn choose(variable: impl Fn(&str) -> Option<OsString>, uid: u32) -> PathBuf {
    let set = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = set("CKPT_RUNTIME_DIR") {
        return path;
    }
    match set("XDG_RUNTIME_DIR").filter(|path| path.is_dir()) {
        Some(path) => path.join("ckpt"),
        None => PathBuf::from(format!("/tmp/ckpt-{uid}")),
    }
}

/// Makes `path` (mode 0700) if it is not there, and checks that only this user may enter it.
pub fn private_dir(path: &Path) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| {
        refuse(path, "cannot make the folder; set CKPT_RUNTIME_DIR to one that can be made").caused_by(e)
    })?;
    check_private_dir(path)
}

/// That `path` is a folder of this user which nobody else can enter.
pub(crate) fn check_private_dir(path: &Path) -> Result<()> {
    let meta = fs::symlink_metadata(path).map_err(|e| {
        refuse(path, "cannot look at the folder; make it with mode 0700 or set CKPT_RUNTIME_DIR").caused_by(e)
    })?;
    let uid = rustix::process::geteuid().as_raw();
    if !meta.is_dir() {
        return Err(refuse(path, "it is a link or not a folder; remove it or set CKPT_RUNTIME_DIR"));
    }
    if meta.uid() != uid {
        let message = format!(
            "the folder belongs to user {}, this process runs as {uid}; set CKPT_RUNTIME_DIR to one of your own",
            meta.uid()
        );
        return Err(refuse(path, message));
    }
    if meta.mode() & 0o077 != 0 {
        let message = format!(
            "other users may enter the folder (mode {:o}); chmod 0700 it or set CKPT_RUNTIME_DIR",
            meta.mode() & 0o777
        );
        return Err(refuse(path, message));
    }
    Ok(())
}

fn refuse(path: &Path, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::ConfigInvalid, "check the runtime folder", message.into())
        .with(Key::Path, path.display())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn the_first_setting_wins() {
        let real = tempfile::tempdir().unwrap();
        let with = |ckpt: &str, xdg: &Path| {
            let (ckpt, xdg) = (ckpt.to_owned(), xdg.to_owned());
            choose(
                move |name| match name {
                    "CKPT_RUNTIME_DIR" => Some(ckpt.clone().into()),
                    "XDG_RUNTIME_DIR" => Some(xdg.clone().into()),
                    _ => None,
                },
                7,
            )
        };
        assert_eq!(with("/a", real.path()), Path::new("/a"));
        assert_eq!(with("", real.path()), real.path().join("ckpt"));
        assert_eq!(with("", Path::new("/no/such/folder")), Path::new("/tmp/ckpt-7"));
        assert_eq!(choose(|_| None, 8), Path::new("/tmp/ckpt-8"));
    }

    #[test]
    fn a_folder_that_others_could_enter_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let fine = base.path().join("a/b");
        private_dir(&fine).unwrap();
        private_dir(&fine).unwrap();
        assert_eq!(fs::metadata(&fine).unwrap().mode() & 0o777, 0o700);

        let open = base.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
        let error = private_dir(&open).unwrap_err();
        assert!(error.to_string().contains("chmod 0700"), "{error}");

        let link = base.path().join("link");
        symlink(&fine, &link).unwrap();
        assert!(private_dir(&link).unwrap_err().to_string().contains("link"));

        let file = base.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(private_dir(&file).unwrap_err().kind(), ErrorKind::ConfigInvalid);
    }
}
