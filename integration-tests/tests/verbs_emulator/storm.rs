//! Many reads and writes at once while devices fail at random: each ends in time, with the right bytes or an error, and
//! nothing is left.

use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use ckpt_core::{
    ErrorKind,
    device::{Buffer, BufferSlice, Event, host::HostBuffer},
    testkit::Random,
    transport::WriteOp,
};
use integration_tests::verbs::{Hca, PORT_ACTIVE, PORT_ERR};

use crate::support::{Hosts, PIECE, assert_arrived, blank, bytes, freed, soon};

/// `ibv_wc_status` of failures that devices report.
const STATUSES: [u32; 4] = [4, 9, 10, 12];

struct Read {
    offset: u64,
    into: BufferSlice,
    memory: Weak<dyn Buffer>,
    event: Event,
    deadline: Instant,
}

/// `None` if its deadline was over before it began.
fn start(hosts: &Hosts, random: &mut Random) -> Option<Read> {
    let (len, piece) = match random.below(4) {
        0 => (1 + random.below(100), PIECE),
        1 => (PIECE, PIECE),
        2 => (64 * (1 + random.below(30)), 64),
        _ => (1 + random.below(6 * PIECE), 6 * PIECE),
    };
    let (offset, mut into) = (random.below(hosts.memory.len_bytes() - len + 1), blank(len));
    let millis = if random.one_in(4) { 1 + random.below(60) } else { 30_000 };
    let deadline = Instant::now() + Duration::from_millis(millis);
    // A write brings the bytes that are there already, so that reads may go on.
    let started = if random.one_in(4) {
        let content = &bytes((offset + len) as usize)[offset as usize..];
        let from = BufferSlice::whole(HostBuffer::from_bytes(content).unwrap());
        into = from.clone();
        let op = WriteOp { region: Arc::new(hosts.region()), offset, from };
        hosts.reader.one_sided().unwrap().post_write(vec![op], deadline)
    } else {
        hosts.post(hosts.ops(offset, &into, piece), deadline)
    };
    match started {
        Ok(event) => Some(Read { offset, memory: Arc::downgrade(into.buffer()), into, event, deadline }),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
            None
        }
    }
}

/// What may happen to a device of the owner's.
fn disturb_owner(hca: &Hca, random: &mut Random) {
    match random.below(4) {
        0 => hca.event(PORT_ERR),
        1 => hca.event(PORT_ACTIVE),
        _ => {
            let calls = ["create_qp", "modify_qp to INIT", "modify_qp to RTR"];
            hca.refuse(calls[random.below(3) as usize], 12, random.below(3) as u32);
        }
    }
}

/// What may happen to a device of the reader's.
fn disturb(hca: &Hca, random: &mut Random) {
    match random.below(10) {
        0 => hca.fail(random.below(12), STATUSES[random.below(4) as usize]),
        1 => hca.lose(random.below(12)),
        2 => hca.event(PORT_ERR),
        3 => hca.event(PORT_ACTIVE),
        4 => hca.hold(true),
        5 => hca.hold(false),
        6 => hca.set("mute", 1),
        7 => hca.set("mute", 0),
        8 => {
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
    for _ in 0..100 {
        match random.below(5) {
            0 | 1 => reads.extend(start(hosts, random)),
            2 if !reads.is_empty() && random.one_in(3) => {
                let read = reads.swap_remove(random.below(reads.len() as u64) as usize);
                left.push(read.memory.clone());
            }
            3 if random.one_in(4) => {
                let hca = &hosts.owner_host.hcas[random.below(2) as usize];
                disturb_owner(hca, random);
            }
            3 => tokio::task::yield_now().await,
            _ => disturb(&hcas[random.below(hcas.len() as u64) as usize], random),
        }
        for read in &reads {
            if let Ok(true) = read.event.is_complete() {
                assert_arrived(&read.into, read.offset);
            }
        }
    }
    hosts.owner_host.hcas.iter().for_each(|hca| hca.event(PORT_ACTIVE));
    for hca in hcas {
        hca.set("mute", 0);
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
    let number = |name: &str| std::env::var(name).ok().map(|number| number.parse::<u64>().unwrap());
    let first = number("CKPT_VERBS_SEED").unwrap_or(0);
    let seeds = first..first + number("CKPT_VERBS_SEEDS").unwrap_or(8);
    for seed in seeds {
        println!("seed {seed}");
        let hosts =
            Hosts::new(2, (8 * PIECE) as usize, |config| (config.depth, config.queue_pairs) = (5, 2)).await;
        storm(&hosts, &mut Random::new(seed)).await;
        hosts.finish().await;
    }
}
