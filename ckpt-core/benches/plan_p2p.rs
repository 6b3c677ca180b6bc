//! How evenly the pulls of a P2P update are spread, beside checkpoint-engine's rule:
//! `cargo bench -p ckpt-core --bench plan_p2p`. A model in virtual time: the figures do not depend on the machine.

#[path = "../tests/plan_common/models.rs"]
mod models;
#[path = "../tests/plan_common/pulls.rs"]
mod pulls;

use std::collections::{BTreeMap, VecDeque};

use ckpt_core::{
    Rank,
    manifest::Manifest,
    plan::{Method, PlanError, PlanInput, PlanLimits, plan},
    types::align_up,
};
use pulls::{Links, Network, Read, pull_seconds, sent_bytes};

/// A ConnectX-7 port of 400 Gbit/s.
const RATE: f64 = 46e9;
/// The peer's buckets; it holds three of them.
const PEER_BUCKET_BYTES: u64 = 2 << 30;

/// The peer's rule: an owner's tensors fill its buckets in order; the owners' lists are dealt out column by column, one
/// bucket to each receiver, and a round ends early rather than take from one owner's link twice. The rounds follow each
/// other, since a receiver pulls its next bucket only after all of the round's were broadcast (which takes no time here).
fn peer_seconds(manifest: &Manifest, receivers: &[Rank], links: &Links) -> f64 {
    let mut owners: Vec<(Rank, VecDeque<u64>)> = Vec::new();
    for (rank, share) in &manifest.shares {
        let mut buckets: VecDeque<u64> = VecDeque::new();
        for bytes in share.tensors().map(|t| align_up(t.meta.len_bytes())) {
            match buckets.back_mut() {
                Some(last) if *last + bytes <= PEER_BUCKET_BYTES => *last += bytes,
                _ => buckets.push_back(bytes),
            }
        }
        owners.push((*rank, buckets));
    }
    let mut dealt: VecDeque<(Rank, u64)> = VecDeque::new();
    while owners.iter().any(|(_, buckets)| !buckets.is_empty()) {
        dealt.extend(owners.iter_mut().filter_map(|(rank, buckets)| Some((*rank, buckets.pop_front()?))));
    }
    let receivers = &receivers[..receivers.len().min(owners.len())];
    let mut pulls: BTreeMap<Rank, VecDeque<(Rank, u64)>> = BTreeMap::new();
    while !dealt.is_empty() {
        let mut busy = Vec::new();
        for receiver in receivers {
            let free = dealt.front().filter(|(owner, _)| !busy.contains(owner)).copied();
            let Some((owner, bytes)) = free else { break };
            dealt.pop_front();
            busy.push(owner);
            pulls.entry(*receiver).or_default().push_back((owner, bytes));
        }
    }
    let mut network = Network::new(links);
    loop {
        for (receiver, pulls) in &mut pulls {
            if let Some((owner, bytes)) = pulls.pop_front() {
                network.start(Read { owner, receiver: *receiver, left: bytes as f64, tag: 0 });
            }
        }
        if network.advance().is_empty() {
            return network.now;
        }
        while !network.advance().is_empty() {}
    }
}

/// Kimi-K2 on owners with parts of different size.
fn skewed(parts: &[u32]) -> Manifest {
    let even = models::split(models::kimi_k2(), parts.iter().sum());
    let mut shares = even.shares.into_values();
    let mut manifest = Manifest::default();
    for (rank, count) in (0..).zip(parts) {
        let mut arenas = Vec::new();
        for share in shares.by_ref().take(*count as usize) {
            arenas.extend(share.arenas.iter().cloned());
        }
        manifest.shares.insert(rank, std::sync::Arc::new(ckpt_core::manifest::Share { arenas }));
    }
    manifest
}

fn main() -> Result<(), PlanError> {
    let cases = [
        ("8 owners (1 node of 8 x H800), 8 receivers", models::split(models::kimi_k2(), 8), 8),
        ("16 owners (2 x 8 H20), 8 receivers", models::split(models::kimi_k2(), 16), 8),
        ("16 owners (2 x 8 H20), 16 receivers", models::split(models::kimi_k2(), 16), 16),
        ("256 owners (32 x 8 H20), 16 receivers", models::split(models::kimi_k2(), 256), 16),
        ("8 owners with 8:4:2:1:1:1:1:1, 8 receivers", skewed(&[8, 4, 2, 1, 1, 1, 1, 1]), 8),
        (
            "16 owners, one with 4 parts, 8 receivers",
            skewed(&[4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
            8,
        ),
    ];
    println!(
        "| Kimi-K2, all links 46 GB/s | bound s | ckpt s (ratio) | peer's rule s (ratio) | ckpt ring, peer's buffers GiB |"
    );
    println!("|---|---|---|---|---|");
    for (name, manifest, count) in cases {
        let receivers: Vec<Rank> = (1000..1000 + count).collect();
        let made = plan(&PlanInput {
            manifest: &manifest,
            members: &receivers,
            free_bytes: 3 * PEER_BUCKET_BYTES * 10 / 9,
            limits: PlanLimits::default(),
            method: Method::P2p { receivers: receivers.clone() },
        })?;
        let links = Links::equal(manifest.shares.keys().copied(), RATE, receivers.clone(), RATE);
        let bound = links.bound_seconds(&sent_bytes(&made));
        let (ours, peer) = (pull_seconds(&made, &links), peer_seconds(&manifest, &receivers, &links));
        println!(
            "| {name} | {bound:.2} | {ours:.2} ({:.2}) | {peer:.2} ({:.2}) | {:.1}, {:.1} |",
            ours / bound,
            peer / bound,
            made.ring_bytes as f64 / (1_u64 << 30) as f64,
            (3 * PEER_BUCKET_BYTES) as f64 / (1_u64 << 30) as f64,
        );
    }
    Ok(())
}
