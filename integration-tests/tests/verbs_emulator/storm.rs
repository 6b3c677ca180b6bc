//! Many reads and writes at once while devices fail at random: each ends in time, with the right bytes or an error, and
//! nothing is left.

use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use ckpt_core::{
    ErrorKind,
    device::{Buffer, BufferSlice, Event},
    testkit::Random,
};
use integration_tests::verbs::{Hca, PORT_ACTIVE, PORT_ERR};

use crate::support::{Hosts, PIECE, assert_arrived, blank, freed, soon};

/// `ibv_wc_status` of failures that devices report.
const STATUSES: [u32; 4] = [4, 9, 10, 12];

struct Read {
    offset: u64,
    into: BufferSlice,
    memory: Weak<dyn Buffer>,
    event: Event,
    deadline: Instant,
}

fn start(hosts: &Hosts, random: &mut Random) -> Read {
    let total = hosts.memory.len_bytes();
    let len = match random.below(3) {
        0 => 1 + random.below(100),
        1 => PIECE,
        _ => 1 + random.below(6 * PIECE),
    };
    let (offset, into) = (random.below(total - len + 1), blank(len));
    let millis = if random.one_in(4) { 1 + random.below(60) } else { 30_000 };
    let deadline = Instant::now() + Duration::from_millis(millis);
    let event = hosts.start(offset, &into, deadline);
    Read { offset, memory: Arc::downgrade(into.buffer()), into, event, deadline }
}

/// What may happen to a device of the reader's.
fn disturb(hca: &Hca, random: &mut Random) {
    match random.below(8) {
        0 => hca.fail(random.below(12), STATUSES[random.below(4) as usize]),
        1 => hca.lose(random.below(12)),
        2 => hca.event(PORT_ERR),
        3 => hca.event(PORT_ACTIVE),
        4 => hca.hold(true),
        5 => hca.hold(false),
        6 => {
            let calls = ["post_send", "create_qp", "modify_qp to RTS", "modify_qp to ERR", "reg_mr"];
            hca.refuse(calls[random.below(5) as usize], 12, random.below(3) as u32);
        }
        _ => {
            for (number, held) in hca.held() {
                hca.release(number, random.below(u64::from(held) + 1) as usize);
            }
        }
    }
}

async fn storm(hosts: &Hosts, random: &mut Random) {
    let hcas = &hosts.reader_host.hcas;
    let mut reads: Vec<Read> = Vec::new();
    let mut left: Vec<Weak<dyn Buffer>> = Vec::new();
    for _ in 0..40 {
        match random.below(4) {
            0 => reads.push(start(hosts, random)),
            1 if !reads.is_empty() && random.one_in(3) => {
                let read = reads.swap_remove(random.below(reads.len() as u64) as usize);
                left.push(read.memory.clone());
            }
            2 => tokio::task::yield_now().await,
            _ => disturb(&hcas[random.below(hcas.len() as u64) as usize], random),
        }
        for read in &reads {
            if let Ok(true) = read.event.is_complete() {
                assert_arrived(&read.into, read.offset);
            }
        }
    }
    for hca in hcas {
        hca.hold(false);
        hca.event(PORT_ACTIVE);
        hca.clear();
    }
    let mut ends = [0; 3];
    for Read { offset, into, memory, event, deadline } in reads {
        // Requests that were lost before keep a batch until its deadline; it is not waited for so long.
        let patience = Duration::from_millis(200);
        match tokio::time::timeout(patience, event.done(soon())).await {
            Ok(Ok(())) => {
                ends[0] += 1;
                assert_arrived(&into, offset);
            }
            Ok(Err(error)) => {
                ends[1] += 1;
                let known = [
                    ErrorKind::Backend,
                    ErrorKind::PeerLost,
                    ErrorKind::Timeout,
                    ErrorKind::ResourceExhausted,
                ];
                assert!(known.contains(&error.kind()), "{error}");
                assert!(error.kind() != ErrorKind::Timeout || Instant::now() >= deadline, "{error}");
                drop((event, into));
                freed(&memory).await;
            }
            Err(_) => assert!(
                hcas.iter().any(|hca| hca.count("held") > 0),
                "nothing is in flight, and yet it waits"
            ),
        }
    }
    println!("arrived, failed, lost: {ends:?}");
    drop(left);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_end_whatever_the_devices_do() {
    let seeds = match std::env::var("CKPT_TEST_SEED") {
        Ok(seed) => seed.parse().map(|seed| seed..seed + 1).unwrap(),
        Err(_) => 0..30u64,
    };
    for seed in seeds {
        println!("seed {seed}");
        let hosts =
            Hosts::new(2, (8 * PIECE) as usize, |config| (config.depth, config.queue_pairs) = (4, 2)).await;
        storm(&hosts, &mut Random::new(seed)).await;
        hosts.finish().await;
    }
}
