//! The fuzz targets on any toolchain: each for a while, or for a number of runs.
//!
//! `CKPT_FUZZ_SECONDS=10` and `CKPT_FUZZ_RUNS=10000000` say how long, `CKPT_FUZZ_TARGET` which one, `CKPT_FUZZ_SEED` where
//! to start.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::{
    fs,
    panic::catch_unwind,
    path::PathBuf,
    time::{Duration, Instant},
};

use ckpt_core::testkit::fuzz::{Mutator, TARGETS, Target};

/// One input may take this long: a debug build on a busy machine needs a thousandth.
const SLOWEST: Duration = Duration::from_secs(5);

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|f| f.unwrap().path())
        .collect();
    files.sort();
    files.into_iter().map(|file| fs::read(file).unwrap()).collect()
}

fn run_one(name: &str, target: Target, input: &[u8]) {
    let begun = Instant::now();
    let ended = catch_unwind(|| target(input));
    let took = begun.elapsed();
    let shown = input.escape_ascii();
    assert!(ended.is_ok(), "{name} panics on b\"{shown}\"");
    assert!(took < SLOWEST, "{name} takes {took:?} for b\"{shown}\"");
}

#[test]
fn no_target_panics_or_hangs() {
    let seed = number("CKPT_FUZZ_SEED").unwrap_or(1);
    let runs = number("CKPT_FUZZ_RUNS");
    let time = Duration::from_secs(number("CKPT_FUZZ_SECONDS").unwrap_or(1));
    let only = std::env::var("CKPT_FUZZ_TARGET").ok();
    let chosen: Vec<_> =
        TARGETS.iter().filter(|(name, _)| only.as_ref().is_none_or(|only| only == name)).collect();
    assert!(!chosen.is_empty(), "CKPT_FUZZ_TARGET names no target");
    for (name, target) in chosen {
        let corpus = corpus(name);
        assert!(corpus.len() > 3, "the corpus of {name} is too small");
        corpus.iter().for_each(|input| run_one(name, *target, input));
        let mut mutator = Mutator::new(corpus, seed);
        let (begun, mut done) = (Instant::now(), 0_u64);
        while runs.map_or_else(|| begun.elapsed() < time, |runs| done < runs) {
            run_one(name, *target, &mutator.make());
            done += 1;
        }
        println!("{name}: {done} runs in {:.1} s", begun.elapsed().as_secs_f64());
        assert!(done > 100, "{name} made only {done} runs");
    }
}

#[test]
fn every_corpus_has_a_target() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for entry in fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name();
        assert!(TARGETS.iter().any(|(target, _)| name == *target), "{name:?} has no target");
    }
}
