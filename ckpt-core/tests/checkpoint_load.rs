//! Loading: the right bytes at the right places, and memory that is used again.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod checkpoint_support;

use std::{
    fs::{self, File},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use checkpoint_support::{CountingDevice, check, meta, varied, write};
use ckpt_core::{
    DType, ErrorKind, Key, Recovery,
    checkpoint::{
        CheckpointSource, InPlace, LoadOptions, NamedTensor, Pool, Progress, RegisteredCheckpoint, generate,
        load, save_checkpoint,
    },
    types::TensorMeta,
};
use proptest::prelude::*;
use tempfile::{TempDir, tempdir};

fn load_all(source: &CheckpointSource, pool: &Arc<Pool>, options: &LoadOptions) -> RegisteredCheckpoint {
    load(source, 0..source.tensors().len(), pool, options).unwrap()
}

#[derive(Default)]
struct Count(AtomicU64);

impl Progress for Count {
    fn advance(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

#[test]
fn files_memory_and_generated_tensors_arrive_whole() {
    let dir = tempdir().unwrap();
    write(&dir.path().join("a.safetensors"), &varied("a"), 1);
    write(&dir.path().join("b.safetensors"), &varied("b"), 2);
    let named = NamedTensor::from_slice(meta("a.wide", DType::U8, &[5]), &[1, 2, 3, 4, 5]).unwrap();
    let source = CheckpointSource::open(dir.path()).unwrap().with_tensors([named]).unwrap();
    for (threads, block_bytes) in [(1, 1 << 30), (3, 5 << 20), (4, 1), (0, 4096)] {
        let device = CountingDevice::new();
        let pool = Pool::with_block_bytes(device.clone(), block_bytes);
        let progress = Arc::new(Count::default());
        let options = LoadOptions { threads, progress: Some(progress.clone()), ..LoadOptions::new("c") };
        let registered = load_all(&source, &pool, &options);
        check(&registered, &source);
        assert_eq!(registered.copied_bytes, source.len_bytes());
        assert_eq!(progress.0.load(Ordering::Relaxed), source.len_bytes());
        assert_eq!(device.pinned_now(), registered.arenas.len() as u64);
        drop(registered);
        assert!(pool.free().unwrap() > 0);
        assert_eq!(device.pinned_now(), 0);
    }
}

#[test]
fn each_rank_loads_its_part_and_all_parts_are_the_whole() {
    let dir = tempdir().unwrap();
    let source = CheckpointSource::generated(generate::qwen_shaped(8 << 20), 9);
    save_checkpoint(&source, dir.path(), 2 << 20).unwrap();
    let opened = CheckpointSource::open(dir.path()).unwrap();
    for world_size in [1, 3, 64] {
        let mut names = Vec::new();
        for part in opened.split(world_size).unwrap() {
            let pool = Pool::new(CountingDevice::new());
            let registered = load(&opened, part, &pool, &LoadOptions::new("c")).unwrap();
            check(&registered, &source);
            names.extend(registered.share.tensors().map(|t| t.meta.name.clone()));
        }
        let all: Vec<_> = opened.tensors().iter().map(|t| t.meta.name.clone()).collect();
        assert_eq!(names, all);
    }
}

#[test]
fn nothing_and_only_empty_tensors() {
    let pool = Pool::new(CountingDevice::new());
    let source = CheckpointSource::default();
    assert!(load_all(&source, &pool, &LoadOptions::new("none")).share.arenas.is_empty());
    let source = CheckpointSource::generated([meta("e", DType::F32, &[0])], 1);
    let registered = load_all(&source, &pool, &LoadOptions::new("empty"));
    check(&registered, &source);
    assert_eq!(registered.share.arenas[0].len_bytes, 0);
    assert!(registered.arenas[0].len_bytes() > 0, "a device can pin it");
}

#[test]
fn without_digests_there_are_none() {
    let source = CheckpointSource::generated(varied("a"), 1);
    let options = LoadOptions { digests: None, ..LoadOptions::new("c") };
    let registered = load_all(&source, &Pool::new(CountingDevice::new()), &options);
    check(&registered, &source);
    assert!(registered.digests.is_none());
}

#[test]
fn the_same_shapes_again_neither_allocate_nor_pin() {
    let pool = Pool::with_block_bytes(CountingDevice::new(), 5 << 20);
    let first = CheckpointSource::generated(varied("a"), 1);
    let registered = load_all(&first, &pool, &LoadOptions::new("step 1"));
    let (share, addresses) = (registered.share.clone(), addresses(&registered));
    let before = pool.counters();
    assert!(before.allocations > 1 && before.allocations == before.pins);
    drop(registered);
    let second = CheckpointSource::generated(varied("a"), 2);
    let registered = load_all(&second, &pool, &LoadOptions::new("step 2"));
    check(&registered, &second);
    assert_eq!(pool.counters(), before);
    assert_eq!((registered.share.clone(), self::addresses(&registered)), (share, addresses));
    assert_eq!(registered.generation, 2);
}

fn addresses(registered: &RegisteredCheckpoint) -> Vec<u64> {
    registered.arenas.iter().map(|a| a.address()).collect()
}

#[test]
fn a_pool_grows_for_more_and_keeps_for_less() {
    let device = CountingDevice::new();
    let pool = Pool::with_block_bytes(device.clone(), 4096);
    let sized = |sizes: &[u64]| {
        let metas = sizes.iter().enumerate().map(|(i, s)| meta(&format!("t{i}"), DType::U8, &[*s]));
        CheckpointSource::generated(metas, 1)
    };
    let run = |sizes: &[u64]| {
        let source = sized(sizes);
        let registered = load_all(&source, &pool, &LoadOptions::new("c"));
        check(&registered, &source);
        pool.counters()
    };
    assert_eq!(run(&[4096, 4096, 4096]).allocations, 3);
    assert_eq!(run(&[100]).allocations, 3);
    assert_eq!(run(&[4096, 4096, 4096, 1]).allocations, 4);
    // One large tensor fits nowhere: the pool does not keep memory that it could not use.
    let counters = run(&[100_000]);
    assert_eq!((counters.allocations, counters.held_bytes), (5, 100_096));
    assert_eq!(device.pinned_now(), 1);
}

#[test]
fn one_user_at_a_time_and_no_reuse_under_a_reader() {
    let pool = Pool::new(CountingDevice::new());
    let source = CheckpointSource::generated(varied("a"), 1);
    let options = LoadOptions::new("first");
    let registered = load_all(&source, &pool, &options);
    assert_eq!(pool.user().as_deref(), Some("first"));
    let again = |name: &str| load(&source, 0..1, &pool, &LoadOptions::new(name));
    let error = again("second").unwrap_err();
    assert!(error.message().contains("\"first\""), "{error}");
    assert_eq!(pool.free().unwrap_err().kind(), ErrorKind::ConfigInvalid);
    let reader = registered.slice(0, 0..1).unwrap();
    drop(registered);
    let error = again("second").unwrap_err();
    assert_eq!((error.kind(), error.recovery()), (ErrorKind::ResourceExhausted, Recovery::Retry));
    drop(reader);
    again("second").unwrap();
}

#[test]
fn a_failed_load_keeps_the_pool_and_names_the_culprit() {
    let dir = tempdir().unwrap();
    let path = write(&dir.path().join("m.safetensors"), &varied("a"), 1);
    let pool = Pool::with_block_bytes(CountingDevice::new(), 5 << 20);
    let source = CheckpointSource::open(&path).unwrap();
    drop(load_all(&source, &pool, &LoadOptions::new("c")));
    let before = pool.counters();

    let late = LoadOptions { deadline: Some(Instant::now()), ..LoadOptions::new("late") };
    assert_eq!(
        load(&source, 0..source.tensors().len(), &pool, &late).unwrap_err().kind(),
        ErrorKind::Timeout
    );
    fs::remove_file(&path).unwrap();
    let error = load(&source, 0..1, &pool, &LoadOptions::new("gone")).unwrap_err();
    assert_eq!(error.get(Key::Path), path.to_str());
    let error = load(&source, 0..1000, &pool, &LoadOptions::new("c")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);

    assert_eq!((pool.user(), pool.counters()), (None, before));
    let again = CheckpointSource::generated(varied("a"), 2);
    check(&load_all(&again, &pool, &LoadOptions::new("c")), &again);
}

/// Truncates the file as soon as the first bytes of it are read.
struct Truncate(File);

impl Progress for Truncate {
    fn advance(&self, _: u64) {
        self.0.set_len(1 << 20).unwrap();
    }
}

#[test]
fn a_file_that_shrinks_meanwhile_is_an_error_not_zeros() {
    let dir = tempdir().unwrap();
    let large = meta("large", DType::U8, &[40 << 20]);
    let small: Vec<TensorMeta> =
        (0..2000).map(|i| meta(&format!("small{i:04}"), DType::U8, &[4000])).collect();
    for (metas, culprit) in [(vec![large], "large"), (small, "small")] {
        let path = write(&dir.path().join("m.safetensors"), &metas, 1);
        let source = CheckpointSource::open(&path).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let options =
            LoadOptions { threads: 1, progress: Some(Arc::new(Truncate(file))), ..LoadOptions::new("c") };
        let pool = Pool::new(CountingDevice::new());
        let error = load(&source, 0..metas.len(), &pool, &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.message().contains("shrank"), "{error}");
        assert!(error.get(Key::Tensor).unwrap().starts_with(culprit), "{error}");
        assert_eq!(error.get(Key::Path), path.to_str());
    }
}

#[test]
fn a_device_that_cannot_pin_fails_the_load() {
    let device = CountingDevice::new();
    device.refuse.store(true, Ordering::SeqCst);
    let pool = Pool::new(device);
    let source = CheckpointSource::generated(varied("a"), 1);
    let error = load(&source, 0..3, &pool, &LoadOptions::new("c")).unwrap_err();
    assert_eq!((error.kind(), error.get(Key::Device)), (ErrorKind::ResourceExhausted, Some("TEST-0")));
    assert_eq!(pool.user(), None);
}

fn shared_memory() -> TempDir {
    tempfile::Builder::new().prefix("ckpt-test-").tempdir_in("/dev/shm").unwrap()
}

#[test]
fn files_in_shared_memory_are_used_in_place_and_not_deleted() {
    let dir = shared_memory();
    let path = write(&dir.path().join("m.safetensors"), &varied("a"), 1);
    let named = NamedTensor::from_slice(meta("n", DType::U8, &[5]), &[1, 2, 3, 4, 5]).unwrap();
    let open = || CheckpointSource::open(&path).unwrap().with_tensors([named.clone()]).unwrap();
    let device = CountingDevice::new();
    let pool = Pool::new(device.clone());
    for digests in [None, LoadOptions::new("").digests] {
        let source = open();
        let options = LoadOptions { digests, ..LoadOptions::new("c") };
        let registered = load_all(&source, &pool, &options);
        assert_eq!((registered.copied_bytes, registered.in_place_bytes), (5, source.len_bytes() - 5));
        assert_eq!(registered.arenas.len(), 2);
        check(&registered, &source);
        let counters = pool.counters();
        assert_eq!(
            (counters.maps, counters.allocations, counters.pins),
            (1, 1, 2),
            "the second time reuses all"
        );
    }
    assert!(path.exists());

    // New bytes in the same file: nothing is pinned again, and the new bytes are seen.
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 0xff;
    use std::os::unix::fs::FileExt;
    File::options().write(true).open(&path).unwrap().write_all_at(&bytes[last..], last as u64).unwrap();
    let source = open();
    let registered = load_all(&source, &pool, &LoadOptions::new("c"));
    check(&registered, &source);
    assert_eq!(pool.counters().pins, 2);

    // Another part is another mapping; the old one goes.
    drop(registered);
    let registered = load(&source, 0..4, &pool, &LoadOptions::new("c")).unwrap();
    check(&registered, &source);
    assert_eq!((pool.counters().maps, device.pinned_now()), (2, 2));
    drop(registered);

    let options = LoadOptions { in_place: InPlace::Never, ..LoadOptions::new("c") };
    assert_eq!(load_all(&source, &pool, &options).in_place_bytes, 0);
    let options = LoadOptions { delete_in_place_files: true, ..LoadOptions::new("c") };
    let registered = load(&source, 1..5, &pool, &options).unwrap();
    assert!(registered.in_place_bytes > 0 && !path.exists());
}

#[test]
fn ranks_that_pin_one_file_do_not_disturb_each_other() {
    let dir = shared_memory();
    let path = write(&dir.path().join("m.safetensors"), &varied("a"), 1);
    let sources = [CheckpointSource::open(&path).unwrap(), CheckpointSource::open(&path).unwrap()];
    let parts = sources[0].split(2).unwrap();
    let mut registered = Vec::new();
    for (source, part) in sources.iter().zip(parts) {
        let pool = Pool::new(CountingDevice::new());
        registered.push(load(source, part, &pool, &LoadOptions::new("c")).unwrap());
        // A device that pins writes to the pages as far as the system can tell; do it for real, without a change.
        let slice =
            registered.last().unwrap().slice(0, 0..registered.last().unwrap().arenas[0].len_bytes()).unwrap();
        // SAFETY: nothing reads the arena meanwhile.
        let bytes = unsafe { slice.as_mut_slice() }.unwrap();
        for at in (0..bytes.len()).step_by(4096) {
            // SAFETY: `at` is inside the slice.
            unsafe { std::ptr::write_volatile(&mut bytes[at], std::ptr::read_volatile(&bytes[at])) };
        }
    }
    registered.iter().for_each(|r| check(r, &sources[0]));
    let tensors: usize = registered.iter().map(|r| r.share.tensors().count()).sum();
    assert_eq!(tensors, sources[0].tensors().len());
}

#[test]
fn a_file_whose_tensors_are_not_aligned_is_copied() {
    let dir = shared_memory();
    let header = r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"F32","shape":[1],"data_offsets":[3,7]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend([1, 2, 3, 4, 5, 6, 7]);
    let path = dir.path().join("m.safetensors");
    fs::write(&path, bytes).unwrap();
    let source = CheckpointSource::open(&path).unwrap();
    let registered = load_all(&source, &Pool::new(CountingDevice::new()), &LoadOptions::new("c"));
    check(&registered, &source);
    assert_eq!((registered.copied_bytes, registered.in_place_bytes), (7, 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Any sizes, twice through one pool: always the right bytes.
    #[test]
    fn any_sizes_through_a_used_pool(
        rounds in proptest::collection::vec(proptest::collection::vec(0_u64..200_000, 0..40), 1..4),
        block_bytes in 1_u64..1_000_000,
        threads in 1_usize..4,
    ) {
        let pool = Pool::with_block_bytes(CountingDevice::new(), block_bytes);
        for (seed, sizes) in rounds.iter().enumerate() {
            let dir = tempdir().unwrap();
            let metas: Vec<TensorMeta> =
                sizes.iter().enumerate().map(|(i, s)| meta(&format!("t{i}"), DType::U8, &[*s])).collect();
            let path = write(&dir.path().join("m.safetensors"), &metas, seed as u64);
            let source = CheckpointSource::open(&path).unwrap();
            let registered = load_all(&source, &pool, &LoadOptions { threads, ..LoadOptions::new("c") });
            check(&registered, &source);
        }
    }
}
