//! Helpers of the integration tests: processes with deadlines that die with their test, whole jobs of them, engines
//! that misbehave, and a tiny HTTP client.

pub mod ascend;
mod built;
mod certificate;
mod engine;
mod http;
mod job;
mod process;
mod recorder;
pub mod schema;
pub mod verbs;

pub use certificate::Certificates;
pub use engine::{FakeEngine, Script};
pub use http::{Reply, http_get};
pub use job::{Job, Ranks, assert_dump, digests, names};
pub use process::{Finished, LONG, Process, Program};
pub use recorder::Recorder;

/// The program under test with these arguments: `ckpt!("doctor", "--json")`. Only usable in `tests/`, where cargo
/// names the binary.
#[macro_export]
macro_rules! ckpt {
    ($($argument:expr),* $(,)?) => {
        $crate::Program::new(env!("CARGO_BIN_EXE_ckpt-under-test"))$(.arg($argument))*
    };
}
