//! A rank in a process of its own that is killed, or stopped and woken.

use std::{
    io::{BufRead, BufReader, Lines},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use ckpt_core::{
    ErrorKind, Key,
    control::{Session, SessionEvent},
};
use rustix::process::{Pid, Signal, kill_process};

use crate::support::*;

const ADDRESS: &str = "CKPT_TEST_HUB";
const UP: &str = "rank 1 is up";
const LOST: &str = "rank 1 lost the hub; leases since: ";

/// Not a test by itself: the process of rank 1, started by the tests below.
#[test]
fn child_rank() {
    let Ok(address) = std::env::var(ADDRESS) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let session = Session::connect(config(address.parse().unwrap(), 1, 2, nervous())).await.unwrap();
        let mut caller = Caller::new(&session);
        caller.join(1);
        caller.begun().await;
        // Before the line: the other side stops this process as soon as it has read it.
        let mut last_turn = Instant::now();
        println!("{UP}");
        let (mut valid_leases, mut woken) = (0, false);
        loop {
            let event = tokio::time::timeout(Duration::from_millis(200), caller.updates.next()).await;
            woken |= last_turn.elapsed() > Duration::from_secs(1);
            last_turn = Instant::now();
            match event {
                Ok(SessionEvent::HubLost { .. }) => break,
                // After a sleep, only an answer to a heartbeat sent after it would be a lease.
                Ok(SessionEvent::LeaseRenewed { sent_at })
                    if woken && sent_at.elapsed() < session.dead_after() =>
                {
                    valid_leases += 1;
                }
                _ => {}
            }
        }
        println!("{LOST}{valid_leases} woken: {woken} valid: {}", session.lease_is_valid());
    });
}

struct RankProcess {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl RankProcess {
    fn start(address: String) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["processes::child_rank", "--exact", "--nocapture"])
            .env(ADDRESS, address)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    fn wait_for(&mut self, text: &str) -> String {
        self.lines.find_map(|line| line.ok().filter(|line| line.contains(text))).expect("the line comes")
    }

    fn send(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id().cast_signed()).unwrap(), signal).unwrap();
    }
}

impl Drop for RankProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Hub and rank 0 here, rank 1 there, in an update that has begun.
async fn begin(deadlines: ckpt_core::deadlines::Deadlines) -> (ckpt_core::control::Hub, Caller, RankProcess) {
    let hub = hub(2, deadlines).await;
    let address = hub.address().unwrap().to_string();
    let mut rank_1 = RankProcess::start(address);
    let mut caller = Caller::new(&session(&hub, 0, 2, deadlines).await);
    caller.join(1);
    caller.begun().await;
    let rank_1 = tokio::task::spawn_blocking(move || {
        rank_1.wait_for(UP);
        rank_1
    });
    (hub, caller, rank_1.await.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_is_noticed_at_once() {
    let (_hub, mut caller, rank_1) = begin(patient()).await;
    rank_1.send(Signal::KILL);
    let cause = caller.aborted().await;
    assert_eq!(cause.kind(), ErrorKind::PeerLost);
    assert_eq!(cause.get(Key::Rank), Some("1"));
    assert_eq!(cause.get(Key::Pid), Some(rank_1.child.id().to_string().as_str()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_process_is_dead_after_its_time_and_knows_it_when_it_wakes() {
    let (_hub, mut caller, mut rank_1) = begin(nervous()).await;
    let stopped_at = Instant::now();
    rank_1.send(Signal::STOP);
    let cause = caller.aborted().await;
    let noticed_after = stopped_at.elapsed();
    assert!(noticed_after >= Duration::from_millis(1300), "{noticed_after:?}");
    assert_eq!((cause.kind(), cause.get(Key::Rank)), (ErrorKind::PeerLost, Some("1")));
    assert!(caller.session.lease_is_valid());
    rank_1.send(Signal::CONT);
    let line = tokio::task::spawn_blocking(move || rank_1.wait_for(LOST)).await.unwrap();
    assert!(line.contains("since: 0 woken: true valid: false"), "{line}");
}
