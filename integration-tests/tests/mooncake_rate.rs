//! How fast our reads are beside those of Mooncake's Python API: the same sender, the same sizes, in turns.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod mooncake_support;

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use ckpt_core::{
    device::host::HostBuffer,
    metas::Metas,
    transport::{ReadOp, RemoteRegion},
};
use mooncake_support::{Node, Peer, plays, run, soon, target};

const MIB: u64 = 1 << 20;
/// Size and turns.
const READS: [(u64, usize); 3] = [(MIB, 60), (64 * MIB, 16), (1024 * MIB, 6)];

#[test]
#[ignore = "a measurement on a quiet machine, with both wheels as for mooncake_python: \
            cargo test --release -p integration-tests --test mooncake_rate -- --ignored --nocapture"]
fn rates_beside_the_python_api() {
    run("rates");
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of rates_beside_the_python_api, which starts it as a process"]
async fn rates() {
    if !plays("rates") {
        return;
    }
    let node = Node::new();
    let mut sender = Peer::python(&["send".to_owned(), (1024 * MIB).to_string()]);
    let metas = Metas::from_json(sender.says("METAS ").as_bytes()).unwrap();
    let placement = &metas.ranks[&0].placement;
    let (peer, address) = (placement.p2p_store_addr.clone().unwrap(), placement.arena_addresses[0]);
    let mut theirs = Peer::python(&["rate"]);
    theirs.says("READY");
    let (_, into) = target(1024 * MIB);
    let region = |len_bytes| {
        let (peer, descriptor) = (peer.clone(), Bytes::new());
        Arc::new(RemoteRegion { peer, address, len_bytes, generation: 0, descriptor })
    };
    // Touches all of the target.
    node.read(&region(1024 * MIB), &into, soon()).await.unwrap();
    for (size, turns) in READS {
        let (mut own, mut other) = (Vec::new(), Vec::new());
        for _ in 0..turns {
            let ops = vec![ReadOp { region: region(size), offset: 0, into: into.slice(0..size).unwrap() }];
            let begun = Instant::now();
            node.one_sided().post_read(ops, soon()).unwrap().done(soon()).await.unwrap();
            own.push(begun.elapsed().as_secs_f64());
            theirs.tell(&format!("{peer} {address} {size}"));
            other.push(theirs.says("TOOK ").parse::<f64>().unwrap());
        }
        let (own, other) = (median(own), median(other));
        let rate = |seconds: f64| size as f64 / seconds / 1e9;
        println!(
            "RATE {:>4} MiB: ours {:.2} GB/s, Python API {:.2} GB/s, ratio {:.3} (medians of {turns})",
            size / MIB,
            rate(own),
            rate(other),
            other / own
        );
        assert!(other / own > 0.5, "far behind the Python API");
    }
    // What the owner's ledger costs, between two engines of ours.
    let owner = Node::new();
    let memory = HostBuffer::from_bytes(&vec![1; MIB as usize]).unwrap();
    let registered = owner.one_sided().register(memory).await.unwrap();
    let checked = Arc::new(registered.region().clone());
    let bare = Arc::new(RemoteRegion { generation: 0, descriptor: Bytes::new(), ..(*checked).clone() });
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..60 {
        for (region, times) in [(&checked, &mut with), (&bare, &mut without)] {
            let begun = Instant::now();
            node.read(region, &into.slice(0..MIB).unwrap(), soon()).await.unwrap();
            times.push(begun.elapsed().as_secs_f64());
        }
    }
    let (with, without) = (median(with) * 1e6, median(without) * 1e6);
    println!("LEDGER 1 MiB: {with:.0} us with the check, {without:.0} us without");
}
