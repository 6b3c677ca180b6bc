//! The whole program over verbs: a P2P update, and a join from another job's memory. Two "hosts" a and b with two
//! soft-RoCE NICs each, as `integration-tests/rdma-vm/two-hosts.sh` makes them in its virtual machine.

use ckpt_core::control::Token;
use integration_tests::{Job, LONG, Program};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ckpt-under-test");
/// The emulated machine has two slow processors.
const PATIENCE: [&str; 4] = ["--bucket-timeout", "120", "--timeout", "400"];

/// Packets that each of host a's NICs has sent.
fn sent() -> Vec<u64> {
    let sent = |device: &str| {
        let file = format!("/sys/class/infiniband/{device}/ports/1/hw_counters/sent_pkts");
        std::fs::read_to_string(file).expect("a soft-RoCE device").trim().parse().expect("a number")
    };
    ["rxe_a0", "rxe_a1"].map(sent).to_vec()
}

/// Both NICs of host a, whose memory was read, carried bytes since.
fn assert_both_carried(before: &[u64], at_least: u64) {
    for (nic, (before, now)) in before.iter().zip(sent()).enumerate() {
        println!("rxe_a{nic} sent {} packets", now - before);
        assert!(now - before >= at_least, "rxe_a{nic} sent {} packets only", now - before);
    }
}

#[tokio::test]
#[ignore = "needs soft-RoCE devices: integration-tests/rdma-vm/test.sh"]
async fn p2p_update_over_verbs() {
    let job = Job::new(PROGRAM, 2, 8);
    let _workers = job.workers(&[]).await;
    let before = sent();
    // By the rule of local ranks rank 0 has host a's NICs and rank 1 host b's.
    let options = ["--update-method", "p2p", "--ranks", "1", "--transport", "rdma"];
    let ranks = job.update(&[&options[..], &PATIENCE].concat());
    for (rank, ended) in ranks.finish(LONG * 4).await {
        let ended = ended.expect_code(0);
        if rank == 0 {
            println!("{}", ended.stdout);
        }
    }
    job.assert_holds(1).await;
    // Rank 0 holds half of 8 MiB; a packet has at most 4 KiB.
    assert_both_carried(&before, 200);
}

#[tokio::test]
#[ignore = "needs soft-RoCE devices: integration-tests/rdma-vm/test.sh"]
async fn join_over_verbs_from_two_owners_into_two_receivers() {
    let job = Job::new(PROGRAM, 2, 8);
    let (metas, token) = (job.path("metas.json"), job.path("token"));
    Token::random().expect("randomness").write_to(&token).expect("a token file");
    let (metas, token) = (metas.to_str().expect("UTF-8"), token.to_str().expect("UTF-8"));
    let workers = job.workers(&[]).await;
    let saving = ["--save-metas-file", metas, "--token-file", token, "--sleep-time", "900"];
    let options = [&saving[..], &["--transport", "rdma", "--bind", "10.9.0.1"], &PATIENCE].concat();
    // As if each were alone on its host: else the ranks of a host share its NICs out.
    let env =
        [("PS_P2P_STORE_RDMA_DEVICES", "rxe_a0,rxe_a1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")];
    let mut senders = job.update_in(&env, &options);
    senders.get(0).stdout_line("update_s_by_method").await;

    // Engines that hold nothing, and another job on host b.
    for old in workers {
        old.signal(rustix::process::Signal::KILL);
        old.finish(LONG).await;
    }
    let _workers = job.workers(&[]).await;
    let before = sent();
    Program::new(PROGRAM)
        .args(["launch", "--nproc-per-node", "2", "--"])
        .args(["/usr/bin/env", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=1", PROGRAM])
        .args(["join", "--json", "--device", "host", "--worker-protocol", "native", "--transport", "rdma"])
        .args([
            "--inference-parallel-size",
            "1",
            "--bucket-mib",
            "1",
            "--metas",
            metas,
            "--token-file",
            token,
        ])
        .args(PATIENCE)
        .args(["--bind", "10.9.0.2"])
        .arg("--uds")
        .arg(job.path("worker-{rank}.sock"))
        .env("CKPT_RUNTIME_DIR", job.runtime_dir())
        .env("PS_P2P_STORE_RDMA_DEVICES", "rxe_b0,rxe_b1")
        .spawn()
        .finish(LONG * 4)
        .await
        .expect_code(0);
    for rank in 0..2 {
        job.assert_holds(rank).await;
    }
    assert_both_carried(&before, 400);
}
