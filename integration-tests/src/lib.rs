//! Helpers of the integration tests: processes with deadlines that die with their test, and a tiny HTTP client.

mod http;
mod process;

pub use http::{Reply, http_get};
pub use process::{Finished, LONG, Process, Program};

/// The program under test with these arguments: `ckpt!("doctor", "--json")`. Only usable in `tests/`, where cargo
/// names the binary.
#[macro_export]
macro_rules! ckpt {
    ($($argument:expr),* $(,)?) => {
        $crate::Program::new(env!("CARGO_BIN_EXE_ckpt-under-test"))$(.arg($argument))*
    };
}
