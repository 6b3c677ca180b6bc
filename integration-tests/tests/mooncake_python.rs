//! The `mooncake` transport over the real library, between processes, and with Mooncake's own Python API.
//!
//! The library comes from the wheel for NPUs, forced to TCP; the Python peer from the wheel without accelerators. Both
//! install into one package folder, so they need an environment each.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod mooncake_support;

use std::{
    io::{Read, Write},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use ckpt_core::{
    ErrorKind, Key, Result,
    control::Token,
    device::{Buffer, DeviceBackend, host::HostBuffer},
    manifest::{Arena, Share, Tensor},
    metas::{Metas, Placement, RankMetas},
    testkit::conformance::{self, Factory},
    transport::{RemoteRegion, Transport},
    types::TensorMeta,
};
use integration_tests::{Job, LONG, Program};
use mooncake_support::{Node, Peer, Real, holds, pattern, plays, run, soon, target};
use sha2::{Digest, Sha256};

const LARGE: u64 = 512 << 20;
const SMALL: u64 = 3 << 20;

impl Factory for Real {
    fn device(&self, rank: u32) -> Result<Arc<dyn DeviceBackend>> {
        self.open_device(rank)
    }

    fn transport(&self, _: u32, device: &Arc<dyn DeviceBackend>) -> Result<Arc<dyn Transport>> {
        self.open(device.clone())
    }

    fn max_members(&self) -> u32 {
        4
    }

    fn detects_mismatch(&self) -> bool {
        false
    }
}

#[test]
#[ignore = "needs the npu wheel's library: pip install --no-deps --target T mooncake-transfer-engine-npu==0.3.13.post1; \
            CKPT_TEST_MOONCAKE_LIBRARY=T/mooncake/libtransfer_engine.so cargo test -p integration-tests --test \
            mooncake_python -- --ignored"]
fn the_suite_passes_over_the_real_library() {
    run("suite");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of the_suite_passes_over_the_real_library, which starts it as a process"]
async fn suite() {
    if !plays("suite") {
        return;
    }
    let report = conformance::one_sided(&Real::new()).await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((report.passed.len(), report.skipped.len()), (19, 0), "{report:?}");
}

#[test]
#[ignore = "needs the npu wheel's library: see the_suite_passes_over_the_real_library"]
fn a_peer_that_stops_or_dies_is_named_in_time() {
    run("reader");
}

/// Serves one large region until its stdin ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of a_peer_that_stops_or_dies_is_named_in_time, which starts it as a process"]
async fn owner() {
    if !plays("owner") {
        return;
    }
    let node = Node::new();
    let registered = node
        .one_sided()
        .register(HostBuffer::from_bytes(&vec![0xAB; LARGE as usize]).unwrap())
        .await
        .unwrap();
    println!("REGION {}", serde_json::to_string(registered.region()).unwrap());
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await.unwrap().unwrap();
}

fn owner_process() -> (Peer, Arc<RemoteRegion>) {
    let mut peer = Peer::part("owner");
    let region = serde_json::from_str(&peer.says("REGION ")).unwrap();
    (peer, Arc::new(region))
}

fn signal(peer: &Peer, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(peer.child.id() as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of a_peer_that_stops_or_dies_is_named_in_time, which starts it as a process"]
async fn reader() {
    if !plays("reader") {
        return;
    }
    let node = Node::new();
    let (stopped, region) = owner_process();
    let (mut killed, doomed) = owner_process();
    let (_, into) = target(LARGE);
    node.read(&region, &into, soon()).await.unwrap();
    assert!(holds(&into, &vec![0xAB; LARGE as usize]));

    // Stopped: Mooncake waits for ever, we do not.
    signal(&stopped, rustix::process::Signal::STOP);
    let (late, place) = target(LARGE);
    let begun = Instant::now();
    let error = node.read(&region, &place, begun + Duration::from_millis(500)).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.get(Key::Peer)),
        (ErrorKind::Timeout, Some(region.peer.as_str())),
        "{error}"
    );
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    drop(place);
    assert!(Arc::strong_count(&late) > 1, "the memory was given up under a transfer");

    // Killed in the middle of a transfer, while the other peer still hangs.
    let (watched, place) = target(LARGE);
    let op = ckpt_core::transport::ReadOp { region: doomed.clone(), offset: 0, into: place.clone() };
    let event = node.one_sided().post_read(vec![op], soon()).unwrap();
    // SAFETY: a byte of live memory, read while Mooncake writes it; whichever value comes is fine.
    while unsafe { std::ptr::read_volatile(watched.address() as *const u8) } != 0xAB {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    killed.child.kill().unwrap();
    killed.child.wait().unwrap();
    let begun = Instant::now();
    let error = event.done(soon()).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.get(Key::Peer)),
        (ErrorKind::PeerLost, Some(doomed.peer.as_str())),
        "{error}"
    );
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());

    // The stopped one goes on: its transfer ends and the memory comes back, and the next read works.
    signal(&stopped, rustix::process::Signal::CONT);
    let patience = soon();
    while Arc::strong_count(&late) > 1 {
        assert!(Instant::now() < patience, "the memory never comes back");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    node.read(&region, &into, soon()).await.unwrap();

    // Unknown peer, unregistered address, too long: by address alone, as in checkpoint-engine's metas.
    let bare = RemoteRegion { generation: 0, descriptor: Bytes::new(), ..(*region).clone() };
    let (_, small) = target(4096);
    let wrong = [
        (RemoteRegion { peer: "127.0.0.1:1".into(), ..bare.clone() }, ErrorKind::PeerLost),
        (RemoteRegion { address: 4096, ..bare.clone() }, ErrorKind::Backend),
        (RemoteRegion { address: bare.address + LARGE - 100, ..bare.clone() }, ErrorKind::Backend),
    ];
    for (region, kind) in wrong {
        let region = Arc::new(region);
        let error = node.read(&region, &small, soon()).await.unwrap_err();
        assert_eq!((error.kind(), error.get(Key::Peer)), (kind, Some(region.peer.as_str())), "{error}");
    }
    node.read(&Arc::new(bare), &small, soon()).await.unwrap();
    assert!(holds(&small, &[0xAB; 4096]));
}

#[test]
#[ignore = "needs both wheels: as the_suite_passes_over_the_real_library, and CKPT_TEST_PYTHON with \
            mooncake-transfer-engine-non-cuda==0.3.13.post1 and numpy"]
fn bytes_are_equal_from_and_to_a_python_peer() {
    run("python");
}

/// The regions that metas of checkpoint-engine's form name.
fn regions(metas: &Metas) -> Vec<RemoteRegion> {
    let of_rank = |rank: &RankMetas| {
        let peer = rank.placement.p2p_store_addr.clone().unwrap();
        let arenas = rank.share.arenas.iter().zip(rank.placement.arena_addresses.clone());
        arenas
            .map(|(arena, address)| RemoteRegion {
                peer: peer.clone(),
                address,
                len_bytes: arena.len_bytes,
                generation: 0,
                descriptor: Bytes::new(),
            })
            .collect::<Vec<_>>()
    };
    metas.ranks.values().flat_map(of_rank).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of bytes_are_equal_from_and_to_a_python_peer, which starts it as a process"]
async fn python() {
    if !plays("python") {
        return;
    }
    let node = Node::new();

    // Its memory into ours.
    let mut sender = Peer::python(&["send".to_owned(), SMALL.to_string(), LARGE.to_string()]);
    let metas = Metas::from_json(sender.says("METAS ").as_bytes()).unwrap();
    let found = regions(&metas);
    assert_eq!(found.iter().map(|r| r.len_bytes).collect::<Vec<_>>(), [SMALL, LARGE]);
    for (index, region) in (0..).zip(found) {
        let (_, into) = target(region.len_bytes);
        node.read(&Arc::new(region.clone()), &into, soon()).await.unwrap();
        assert!(holds(&into, &pattern(index, region.len_bytes)), "buffer {index} arrived wrong");
    }

    // Ours into its.
    let bytes = pattern(7, SMALL);
    let memory = HostBuffer::from_bytes(&bytes).unwrap();
    let registered = node.one_sided().register(memory.clone()).await.unwrap();
    let meta = TensorMeta::new("w", ckpt_core::DType::U8, [SMALL].as_slice()).unwrap();
    let arena = Arena { len_bytes: SMALL, tensors: vec![Tensor { meta, offset: 0 }] };
    let placement = Placement {
        p2p_store_addr: Some(registered.region().peer.clone()),
        arena_addresses: vec![memory.address()],
        ..Placement::default()
    };
    let rank = RankMetas::new(Arc::new(Share { arenas: vec![arena] }), placement).unwrap();
    let json = Metas { ranks: [(0, rank)].into() }.to_json().unwrap();
    let mut receiver = Peer::python(&["receive"]);
    receiver.child.stdin.take().unwrap().write_all(json.as_bytes()).unwrap();
    let digest = tokio::task::spawn_blocking(move || receiver.says("SHA256 ")).await.unwrap();
    assert_eq!(digest, format!("{:x}", Sha256::digest(&bytes)));
}

#[test]
#[ignore = "needs the npu wheel's library: see the_suite_passes_over_the_real_library"]
fn the_program_updates_and_joins_over_mooncake() {
    run("programs");
}

#[tokio::test]
#[ignore = "a part of the_program_updates_and_joins_over_mooncake, which starts it as a process"]
async fn programs() {
    if !plays("programs") {
        return;
    }
    const PROGRAM: &str = env!("CARGO_BIN_EXE_ckpt-under-test");
    let job = Job::new(PROGRAM, 3, 4);
    let (metas, token) = (job.path("metas.json"), job.path("token"));
    Token::random().unwrap().write_to(&token).unwrap();
    let mut workers = job.workers(&[]).await;
    let (metas_text, token_text) = (metas.to_str().unwrap(), token.to_str().unwrap());
    let mut senders = job.update(&[
        "--update-method",
        "all",
        "--ranks",
        "1-2",
        "--p2p-transport",
        "mooncake",
        "--save-metas-file",
        metas_text,
        "--token-file",
        token_text,
        "--sleep-time",
        "600",
    ]);
    senders.get(0).stdout_line("update_s_by_method").await;
    for rank in 0..3 {
        job.assert_holds(rank).await;
    }
    // As checkpoint-engine's own receivers need them.
    let saved = Metas::from_json(&std::fs::read(&metas).unwrap()).unwrap();
    assert!(
        saved.ranks.values().all(|rank| rank.placement.p2p_store_addr.is_some()),
        "no address to pull from"
    );

    // Another job, with an engine that holds nothing.
    let old = workers.remove(0);
    old.signal(rustix::process::Signal::KILL);
    old.finish(LONG).await;
    workers.insert(0, job.worker(0, &[]).await);
    Program::new(PROGRAM)
        .args(["join", "--json", "--device", "host", "--worker-protocol", "native"])
        .args(["--inference-parallel-size", "1", "--bucket-mib", "1", "--p2p-transport", "mooncake"])
        .args(["--metas", metas_text, "--token-file", token_text])
        .arg("--uds")
        .arg(job.path("worker-{rank}.sock"))
        .env("CKPT_RUNTIME_DIR", job.runtime_dir())
        .spawn()
        .finish(LONG)
        .await
        .expect_code(0);
    job.assert_holds(0).await;
}
