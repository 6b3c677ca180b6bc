//! Libraries that cargo built for the tests.

use std::path::PathBuf;

/// The library that cargo built beside this test.
pub(crate) fn find(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap_or_else(|error| panic!("where is this test? {error}"));
    let near = test.ancestors().skip(1).take(2).map(|folder| folder.join(name));
    near.into_iter().find(|path| path.exists()).unwrap_or_else(|| {
        panic!("{name} was not built beside {}; run cargo with -p integration-tests", test.display())
    })
}
