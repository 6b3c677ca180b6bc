//! The emulator of CANN's libraries, ready to be opened. See `ascend-emulator/README.md`.

use std::{os::unix::fs::symlink, path::Path};

use crate::{Program, built::find};

/// A folder with the emulator's two libraries under CANN's names.
#[derive(Debug)]
pub struct Emulator {
    folder: tempfile::TempDir,
}

impl Emulator {
    /// Puts the libraries that cargo built beside this test into a folder of their own. They have other names there, since
    /// cargo's folders are on the loader's path of every test.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap_or_else(|error| panic!("no temporary folder: {error}"));
        for (built, name) in [("acl", "libascendcl.so"), ("hccl", "libhccl.so")] {
            let built = find(&format!("libascend_emulator_{built}.so"));
            symlink(&built, folder.path().join(name))
                .unwrap_or_else(|error| panic!("cannot link {}: {error}", built.display()));
        }
        Self { folder }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Has `program` use the emulator.
    pub fn serve(&self, program: Program) -> Program {
        program.env("CKPT_ASCEND_LIBRARY_DIR", self.path())
    }
}

impl Default for Emulator {
    fn default() -> Self {
        Self::new()
    }
}
