//! How long planning takes: `cargo bench -p ckpt-core --bench plan`.
#![allow(missing_docs, reason = "criterion's macros make an undocumented function")]

#[path = "../tests/plan_common/models.rs"]
mod models;

use std::hint::black_box;

use ckpt_core::{
    Rank,
    manifest::Manifest,
    plan::{Method, PlanInput, PlanLimits, bucket_message, check, plan},
};
use criterion::{Criterion, criterion_group, criterion_main};

fn input<'a>(manifest: &'a Manifest, members: &'a [Rank], method: Method) -> PlanInput<'a> {
    PlanInput { manifest, members, free_bytes: 40 << 30, limits: PlanLimits::default(), method }
}

fn benches(criterion: &mut Criterion) {
    let ranks: Vec<Rank> = (0..1024).collect();
    let kimi = models::split(models::kimi_k2(), 256);
    let broadcast = input(&kimi, &ranks[..256], Method::Broadcast);
    let p2p = input(
        &kimi,
        &ranks[..128],
        Method::P2p { receivers: ranks[..128].iter().step_by(8).copied().collect() },
    );
    for (name, input) in [("kimi-k2 256 ranks broadcast", &broadcast), ("kimi-k2 256 ranks p2p to 16", &p2p)]
    {
        let made = plan(input).expect("there is memory for it");
        check(&made, &kimi).expect("the laws hold");
        println!("{name}: {} buckets, ring {} MiB", made.buckets.len(), made.ring_bytes >> 20);
        criterion.bench_function(name, |b| b.iter(|| plan(black_box(input)).map(|p| p.digest)));
    }
    let made = plan(&broadcast).expect("there is memory for it");
    criterion.bench_function("kimi-k2 256 ranks all bucket messages", |b| {
        b.iter(|| (0..made.buckets.len() as u32).map(|n| bucket_message(&made, n, &kimi)).collect::<Vec<_>>())
    });
    criterion.bench_function("kimi-k2 256 ranks digest", |b| b.iter(|| made.compute_digest()));
    for (count, world_size) in [(125_000, 128), (250_000, 256), (500_000, 512), (1_000_000, 1024)] {
        let manifest = models::split(models::many(count), world_size);
        let input = input(&manifest, &ranks[..world_size as usize], Method::Broadcast);
        criterion.bench_function(&format!("{count} tensors {world_size} ranks broadcast"), |b| {
            b.iter(|| plan(black_box(&input)))
        });
    }
}

criterion_group! {
    name = plans;
    config = Criterion::default().sample_size(20);
    targets = benches
}
criterion_main!(plans);
