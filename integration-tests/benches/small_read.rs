//! One read of few bytes at a time by the transport `rdma`, over the emulator of libibverbs, which copies at once: what is
//! left is the transport's own path, from posting to the end. The emulator's share is the copy, a lock and two look-ups.
#![allow(missing_docs, reason = "the criterion macros make undocumented functions")]
#![allow(clippy::unwrap_used, reason = "a benchmark ends at the first surprise")]
#![allow(dead_code, reason = "the tests need more of it")]

#[path = "../tests/verbs_emulator/support.rs"]
mod support;

use std::sync::Arc;

use ckpt_core::{
    device::{BufferSlice, host::HostBuffer},
    transport::ReadOp,
};
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use support::{Hosts, soon};

fn small_read(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let hosts = runtime.block_on(Hosts::new(1, 4096, |_| {}));
    let facet = hosts.reader.one_sided().unwrap();
    // One for all: batches with the region of the last one are what is quick.
    let region = Arc::new(hosts.region());
    let into = BufferSlice::whole(HostBuffer::allocate(4096).unwrap());
    let mut group = criterion.benchmark_group("small_read");
    for bytes in [8, 4096] {
        let op = || vec![ReadOp { region: region.clone(), offset: 0, into: into.slice(0..bytes).unwrap() }];
        group.bench_function(format!("{bytes} bytes"), |bencher| {
            bencher.iter_batched(
                op,
                |ops| runtime.block_on(async { facet.post_read(ops, soon())?.done(soon()).await }).unwrap(),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
    runtime.block_on(hosts.finish());
}

criterion_group!(benches, small_read);
criterion_main!(benches);
