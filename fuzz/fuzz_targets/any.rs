//! One binary for all targets: `CKPT_FUZZ_TARGET=zmtp cargo +nightly fuzz run any corpus/zmtp`.

#![no_main]

use std::sync::LazyLock;

use ckpt_core::testkit::fuzz::{TARGETS, Target};

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let wanted = std::env::var("CKPT_FUZZ_TARGET").unwrap_or_default();
    let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
    let found = TARGETS.iter().find(|(name, _)| *name == wanted);
    found.unwrap_or_else(|| panic!("set CKPT_FUZZ_TARGET to one of {}", names.join(", "))).1
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| TARGET(data));
