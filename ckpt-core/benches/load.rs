//! Registering 512 MiB: first, again in the same pool, and in place, beside a plain parallel read of the same files.
#![allow(missing_docs, reason = "the criterion macros make undocumented functions")]
#![allow(clippy::unwrap_used, reason = "a benchmark ends at the first surprise")]

#[path = "../tests/checkpoint_support/mod.rs"]
mod checkpoint_support;

use std::{
    fs::File,
    hint::black_box,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use checkpoint_support::CountingDevice;
use ckpt_core::checkpoint::{CheckpointSource, InPlace, LoadOptions, Pool, generate, load, save_checkpoint};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const TOTAL_BYTES: u64 = 512 << 20;
const CHUNK_BYTES: u64 = 4 << 20;

/// What any program could do: all cores read chunks of the files into memory that is there already.
fn plain_read(paths: &[PathBuf], memory: &mut [Vec<u8>]) {
    let files: Vec<File> = paths.iter().map(|p| File::open(p).unwrap()).collect();
    let chunks: Vec<(usize, u64, u64)> = (files.iter().enumerate())
        .flat_map(|(i, f)| {
            let len = f.metadata().unwrap().len();
            (0..len).step_by(CHUNK_BYTES as usize).map(move |at| (i, at, (len - at).min(CHUNK_BYTES)))
        })
        .collect();
    let next = AtomicUsize::new(0);
    let (next, chunks, files) = (&next, &chunks, &files);
    std::thread::scope(|scope| {
        for buffer in memory {
            scope.spawn(move || {
                while let Some((file, at, len)) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    // Each thread goes over memory of its share's size, as a real reader does.
                    let start = (*at as usize).min(buffer.len() - *len as usize);
                    files[*file].read_exact_at(&mut buffer[start..start + *len as usize], *at).unwrap();
                }
                black_box(&buffer);
            });
        }
    });
}

fn benchmark(c: &mut Criterion) {
    let threads = std::thread::available_parallelism().unwrap().get();
    let source = CheckpointSource::generated(generate::qwen_shaped(TOTAL_BYTES), 1);
    let disk = tempfile::tempdir().unwrap();
    let shared_memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let open = |folder: &Path| {
        save_checkpoint(&source, folder, TOTAL_BYTES / 4).unwrap();
        CheckpointSource::open(folder).unwrap()
    };
    let files = open(disk.path());
    let memory_files = open(shared_memory.path());
    let paths: Vec<PathBuf> = files.paths().map(Path::to_owned).collect();
    let count = files.tensors().len();
    let options = LoadOptions { in_place: InPlace::Never, ..LoadOptions::new("bench") };
    let without_digests = LoadOptions { digests: None, ..options.clone() };

    let mut group = c.benchmark_group("load");
    group.sample_size(10).throughput(Throughput::Bytes(files.len_bytes()));
    let mut memory = vec![vec![1_u8; TOTAL_BYTES as usize / threads]; threads];
    group.bench_function("plain_read", |b| b.iter(|| plain_read(&paths, &mut memory)));
    drop(memory);
    let first =
        |options: &LoadOptions| load(&files, 0..count, &Pool::new(CountingDevice::new()), options).unwrap();
    group.bench_function("first", |b| b.iter(|| first(&options)));
    let pool = Pool::new(CountingDevice::new());
    let again =
        |pool: &Arc<Pool>, options: &LoadOptions| load(&files, 0..count, pool, options).unwrap().generation;
    again(&pool, &options);
    let counters = pool.counters();
    group.bench_function("again", |b| b.iter(|| again(&pool, &options)));
    group.bench_function("again_without_digests", |b| b.iter(|| again(&pool, &without_digests)));
    assert_eq!(pool.counters(), counters, "registering the same shapes again must neither allocate nor pin");
    drop(pool);
    let in_place = LoadOptions::new("bench");
    group.bench_function("in_place", |b| {
        b.iter(|| {
            let pool = Pool::new(CountingDevice::new());
            load(&memory_files, 0..count, &pool, &in_place).unwrap().in_place_bytes
        })
    });
    let made_up = LoadOptions { digests: None, ..LoadOptions::new("bench") };
    let pool = Pool::new(CountingDevice::new());
    group.bench_function("generated", |b| {
        b.iter(|| load(&source, 0..count, &pool, &made_up).unwrap().generation)
    });
    group.finish();
}

criterion_group!(benches, benchmark);
criterion_main!(benches);
