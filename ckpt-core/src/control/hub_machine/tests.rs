use bytes::Bytes;

use super::*;
use crate::control::CommunicatorChoice;

pub(super) const T0: Duration = Duration::from_secs(10);

pub(super) fn seconds(n: f64) -> Duration {
    T0 + Duration::from_secs_f64(n)
}

pub(super) fn hello(rank: Rank, incarnation: u64) -> Hello {
    Hello {
        protocol: 1,
        job: "job".into(),
        token: Bytes::new(),
        rank,
        world_size: 3,
        incarnation,
        host: format!("host-{rank}"),
        pid: 100 + rank,
    }
}

pub(super) fn joining(ranks: &[Rank], version: u64) -> Joining {
    Joining {
        checkpoint: "qwen".into(),
        version: Version(version),
        ranks: ranks.to_vec(),
        device_uuid: "GPU-0".into(),
        endpoint: None,
        free_bytes: 1,
        communicator: None,
        token: Some(Bytes::from_static(b"token")),
    }
}

/// A hub with all three ranks connected and drained.
pub(super) fn hub() -> HubMachine {
    let mut hub = HubMachine::new(HubConfig::new(3, Deadlines::default()));
    for rank in 0..3 {
        hub.connected(rank, hello(rank, 1), T0).unwrap();
    }
    let welcomes = drain(&mut hub);
    assert!(matches!(welcomes[..], [(0, ToRank::Welcome { heartbeat_ms: 1000, dead_after_ms: 5000 }), _, _]));
    hub
}

pub(super) fn drain(hub: &mut HubMachine) -> Vec<(Rank, ToRank)> {
    std::iter::from_fn(|| hub.poll_message()).collect()
}

/// All ranks, each with the text of the abort that it heard.
pub(super) fn aborts(hub: &mut HubMachine) -> Vec<(Rank, Option<Epoch>, String)> {
    drain(hub)
        .into_iter()
        .filter_map(|(rank, message)| match message {
            ToRank::Abort { epoch, cause } => Some((rank, epoch, cause.to_string())),
            _ => None,
        })
        .collect()
}

/// Begins an update of all ranks and returns its epoch.
pub(super) fn begin(hub: &mut HubMachine, now: Duration) -> Epoch {
    for rank in 0..3 {
        hub.handle(rank, ToHub::Join(joining(&[], 7)), now);
    }
    match drain(hub)[..] {
        [(0, ToRank::Begin { epoch, .. }), (1, _), (2, _)] => epoch,
        ref other => panic!("{other:?}"),
    }
}

/// Gives all ranks a word in turn.
pub(super) fn all(hub: &mut HubMachine, message: ToHub, now: Duration) -> Vec<(Rank, ToRank)> {
    for rank in 0..3 {
        hub.handle(rank, message.clone(), now);
    }
    drain(hub)
}

#[test]
fn an_update_is_four_agreements() {
    let mut hub = hub();
    let epoch = begin(&mut hub, T0);
    assert_eq!(hub.attempts()[0].stage, "preparing");
    let replies = all(&mut hub, ToHub::Ready { epoch, plan_digest: 9 }, T0);
    assert!(matches!(replies[..], [(0, ToRank::Go { .. }), (1, ToRank::Go { .. }), (2, ToRank::Go { .. })]));
    let replies = all(&mut hub, ToHub::Opened { epoch }, T0);
    assert!(matches!(replies[..], [(0, ToRank::AllOpened { .. }), _, _]));
    hub.handle(0, ToHub::Loaded { epoch }, T0);
    hub.handle(1, ToHub::Loaded { epoch }, T0);
    hub.handle(1, ToHub::Loaded { epoch }, T0);
    assert!(drain(&mut hub).is_empty(), "one rank twice is not two ranks");
    hub.handle(2, ToHub::Loaded { epoch }, T0);
    assert!(matches!(drain(&mut hub)[..], [(0, ToRank::Committed { .. }), _, _]));
    let replies = all(&mut hub, ToHub::Finished { epoch, failure: None }, T0);
    assert!(matches!(replies[..], [(0, ToRank::Closed { failure: None, .. }), _, _]));
    assert!(hub.attempts().is_empty());
    assert_eq!(begin(&mut hub, T0), Epoch(epoch.0 + 1));
}

#[test]
fn missing_callers_are_named_after_the_join_deadline() {
    let mut hub = hub();
    hub.handle(1, ToHub::Join(joining(&[], 7)), T0);
    for tenth in 1..=600 {
        let now = seconds(f64::from(tenth) / 10.0);
        all(&mut hub, ToHub::Alive, now);
        if tenth < 600 {
            hub.handle_timeout(now);
            assert_eq!(hub.attempts().len(), 1);
        }
    }
    hub.handle_timeout(seconds(60.0));
    let heard = aborts(&mut hub);
    assert_eq!(heard.len(), 1);
    let (rank, epoch, text) = &heard[0];
    assert_eq!((*rank, *epoch), (1, None));
    assert!(text.contains("ranks 0, 2 never called update within 60 s"), "{text}");
}

#[test]
fn disagreements_name_both_sides_and_reach_all_callers() {
    let mut hub = hub();
    hub.handle(0, ToHub::Join(joining(&[], 7)), T0);
    hub.handle(1, ToHub::Join(joining(&[], 8)), T0);
    assert!(aborts(&mut hub).is_empty(), "the third is on its way");
    hub.handle(2, ToHub::Join(joining(&[], 7)), T0);
    let heard = aborts(&mut hub);
    assert_eq!(heard.iter().map(|(r, ..)| *r).collect::<Vec<_>>(), [0, 1, 2]);
    assert!(heard[2].2.contains("rank 0 updates version 7 and rank 1 8"), "{}", heard[2].2);
    // If the third does not come, the two need not wait for the join deadline.
    hub.handle(0, ToHub::Join(joining(&[], 7)), T0);
    hub.handle(1, ToHub::Join(joining(&[0, 1], 7)), T0);
    hub.handle_timeout(seconds(1.0));
    let heard = aborts(&mut hub);
    assert_eq!(heard.len(), 2);
    assert!(heard[0].2.contains("rank 0 updates ranks [0, 1, 2] and rank 1 [0, 1]"), "{}", heard[0].2);
    begin(&mut hub, seconds(1.0));
}

#[test]
fn disjoint_updates_run_side_by_side_and_overlapping_ones_are_refused() {
    let mut hub = hub();
    hub.handle(0, ToHub::Join(joining(&[0, 1], 7)), T0);
    hub.handle(1, ToHub::Join(joining(&[0, 1], 7)), T0);
    hub.handle(2, ToHub::Join(joining(&[2], 9)), T0);
    assert_eq!(drain(&mut hub).len(), 3, "three Begins");
    assert_eq!(hub.attempts().len(), 2);
    let mut other = HubMachine::new(HubConfig::new(4, Deadlines::default()));
    for rank in 0..4 {
        let mut hello = hello(rank, 1);
        hello.world_size = 4;
        other.connected(rank, hello, T0).unwrap();
    }
    other.handle(0, ToHub::Join(joining(&[0, 1], 7)), T0);
    other.handle(1, ToHub::Join(joining(&[0, 1], 7)), T0);
    drain(&mut other);
    for caller in [0, 2] {
        other.handle(caller, ToHub::Join(joining(&[0, 2], 7)), T0);
        match &drain(&mut other)[..] {
            [(rank, ToRank::Abort { epoch: None, cause })] => {
                assert_eq!(*rank, caller);
                assert_eq!(cause.kind(), ErrorKind::ConfigInvalid);
                assert_eq!(cause.recovery(), Recovery::Retry);
                assert!(cause.message().contains("an update is running on rank 0"), "{cause}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(other.attempts().len(), 1, "the running one is not touched");
}

#[test]
fn callers_must_name_members_that_exist_and_themselves() {
    let mut hub = hub();
    for (ranks, wanted) in [(&[0, 9][..], "the job has 3 ranks"), (&[1, 2], "it is not part of")] {
        hub.handle(0, ToHub::Join(joining(ranks, 1)), T0);
        let heard = aborts(&mut hub);
        assert!(heard[0].2.contains(wanted), "{heard:?}");
    }
    assert!(hub.attempts().is_empty());
}

#[test]
fn the_communicator_is_reused_only_if_all_have_the_same() {
    let choice = |kept: [Option<u64>; 3]| {
        let mut hub = hub();
        for (rank, kept) in (0..).zip(kept) {
            let mut joining = joining(&[], 1);
            joining.communicator = kept.map(Epoch);
            joining.token = Some(Bytes::from(format!("token of {rank}")));
            hub.handle(rank, ToHub::Join(joining), T0);
        }
        match drain(&mut hub).into_iter().next() {
            Some((_, ToRank::Begin { communicator, .. })) => communicator,
            other => panic!("{other:?}"),
        }
    };
    let build = CommunicatorChoice::Build(Bytes::from_static(b"token of 0"));
    assert_eq!(choice([Some(3); 3]), CommunicatorChoice::Reuse(Epoch(3)));
    assert_eq!(choice([Some(3), Some(3), None]), build);
    assert_eq!(choice([None, Some(3), Some(3)]), build);
    assert_eq!(choice([Some(3), Some(2), Some(3)]), build);
    assert_eq!(choice([None; 3]), build);
}

#[test]
fn different_plans_are_refused_before_a_byte_moves() {
    let mut hub = hub();
    let epoch = begin(&mut hub, T0);
    for (rank, plan_digest) in [(0, 1), (1, 1), (2, 0xbad)] {
        hub.handle(rank, ToHub::Ready { epoch, plan_digest }, T0);
    }
    let heard = aborts(&mut hub);
    assert_eq!(heard.len(), 3);
    assert!(heard[0].2.contains("rank 2 planned 0000000000000bad"), "{}", heard[0].2);
}

#[test]
fn a_death_ends_the_update_everywhere_and_the_next_works() {
    let mut hub = hub();
    let epoch = begin(&mut hub, T0);
    hub.disconnected(2, Error::new(ErrorKind::PeerLost, "read", "connection reset"), T0);
    let heard = aborts(&mut hub);
    assert_eq!(
        heard.iter().map(|(r, e, _)| (*r, *e)).collect::<Vec<_>>(),
        [(0, Some(epoch)), (1, Some(epoch))]
    );
    for word in ["rank 2 is gone", "host=host-2", "pid=102", "connection reset"] {
        assert!(heard[0].2.contains(word), "{}", heard[0].2);
    }
    // Late words of the old attempt change nothing.
    hub.handle(0, ToHub::Failed { epoch: Some(epoch), cause: Error::new(ErrorKind::Aborted, "x", "y") }, T0);
    hub.handle(1, ToHub::Failed { epoch: None, cause: Error::new(ErrorKind::Aborted, "x", "y") }, T0);
    hub.handle(1, ToHub::Loaded { epoch }, T0);
    assert!(drain(&mut hub).is_empty());
    // While it is away, a call hears so at once.
    hub.handle(0, ToHub::Join(joining(&[], 7)), T0);
    assert!(aborts(&mut hub)[0].2.contains("rank 2 is gone"));
    hub.connected(2, hello(2, 2), T0).unwrap();
    drain(&mut hub);
    assert!(begin(&mut hub, T0) > epoch);
}

#[test]
fn a_live_duplicate_is_refused_and_a_wrong_world_too() {
    let mut hub = hub();
    let refused = hub.connected(1, hello(1, 99), T0).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConfigInvalid);
    assert!(refused.message().contains("already here (host host-1, pid 101)"), "{refused}");
    hub.disconnected(1, refused, T0);
    hub.connected(1, hello(1, 99), T0).unwrap();
    assert!(hub.connected(3, hello(3, 1), T0).unwrap_err().message().contains("no rank 3"));
    let mut foreign = hello(0, 1);
    foreign.world_size = 8;
    assert!(hub.connected(0, foreign, T0).unwrap_err().message().contains("WORLD_SIZE"));
}

#[test]
fn silence_kills_but_the_hubs_own_sleep_does_not() {
    let mut hub = hub();
    begin(&mut hub, T0);
    // The hub's process was stopped for a minute: nobody is dead.
    hub.handle_timeout(seconds(60.0));
    assert!(aborts(&mut hub).is_empty());
    // Rank 1 really says nothing, while the others do.
    let mut dead_at = None;
    for tenth in 601..=700 {
        let now = seconds(f64::from(tenth) / 10.0);
        hub.handle(0, ToHub::Alive, now);
        hub.handle(2, ToHub::Alive, now);
        hub.handle_timeout(now);
        if hub.poll_close() == Some(1) {
            dead_at = Some(now);
            break;
        }
    }
    let silent = dead_at.expect("rank 1 is given up") - seconds(60.0);
    assert!(silent >= Duration::from_secs(5) && silent < Duration::from_secs(6), "{silent:?}");
    let heard = aborts(&mut hub);
    assert!(heard[0].2.contains("rank 1 is gone: it was silent for 5 s"), "{heard:?}");
    assert!(!hub.members()[1].connected);
}

#[test]
fn the_cause_is_told_and_not_its_symptoms() {
    let symptom = || {
        Error::new(ErrorKind::PeerLost, "broadcast", "the link to a peer broke").with(Key::Peer, "10.0.0.3:1")
    };
    let worker = || Error::new(ErrorKind::Backend, "update", "shapes differ").with(Key::Worker, "GPU-2");
    let failed = |epoch, cause| ToHub::Failed { epoch: Some(epoch), cause };
    // The worker's words come a moment after a peer saw its link break.
    let mut first = hub();
    let epoch = begin(&mut first, T0);
    first.handle(0, failed(epoch, symptom()), T0);
    assert!(aborts(&mut first).is_empty());
    first.handle(2, failed(epoch, worker()), seconds(0.2));
    let heard = aborts(&mut first);
    assert!(heard[0].2.contains("shapes differ [worker=GPU-2 rank=2 host=host-2 pid=102]"), "{heard:?}");
    // Nothing better comes: the symptom is the cause.
    let epoch = begin(&mut first, seconds(1.0));
    first.handle(0, failed(epoch, symptom()), seconds(1.0));
    assert!(first.poll_timeout().unwrap() <= seconds(2.0));
    first.handle_timeout(seconds(2.0));
    assert!(aborts(&mut first)[1].2.contains("the link to a peer broke [peer=10.0.0.3:1 rank=0"));
    // An engine whose worker was made to raise is no news; one that fails by itself is told at once.
    let engine =
        || Error::new(ErrorKind::Backend, "engine", "500").with(Key::Endpoint, "http://localhost:19730");
    let epoch = begin(&mut first, seconds(3.0));
    first.handle(1, failed(epoch, symptom()), seconds(3.0));
    first.handle(0, failed(epoch, engine()), seconds(3.1));
    assert!(aborts(&mut first).is_empty());
    first.disconnected(2, Error::new(ErrorKind::PeerLost, "read", "reset"), seconds(3.2));
    assert!(aborts(&mut first)[0].2.contains("rank 2 is gone"));
    first.connected(2, hello(2, 3), seconds(3.3)).unwrap();
    drain(&mut first);
    let epoch = begin(&mut first, seconds(4.0));
    first.handle(0, failed(epoch, engine()), seconds(4.0));
    assert_eq!(aborts(&mut first).len(), 3);
}

#[test]
fn after_the_commit_failures_and_deaths_are_told_with_closed() {
    let mut hub = hub();
    let epoch = begin(&mut hub, T0);
    all(&mut hub, ToHub::Ready { epoch, plan_digest: 9 }, T0);
    all(&mut hub, ToHub::Loaded { epoch }, T0);
    let hook = Error::new(ErrorKind::Backend, "finish", "post hook raised").with(Key::Worker, "GPU-1");
    hub.handle(1, ToHub::Finished { epoch, failure: Some(hook) }, T0);
    hub.disconnected(2, Error::new(ErrorKind::PeerLost, "read", "reset"), T0);
    assert!(drain(&mut hub).is_empty(), "rank 0 is still at it");
    hub.handle(0, ToHub::Finished { epoch, failure: None }, T0);
    match &drain(&mut hub)[..] {
        [(0, ToRank::Closed { failure: Some(a), .. }), (1, ToRank::Closed { failure: Some(b), .. })] => {
            assert_eq!(a.to_string(), b.to_string());
            assert!(a.to_string().contains("post hook raised [worker=GPU-1 rank=1"), "{a}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn gathers_give_every_rank_all_parts_or_name_who_is_missing() {
    let mut hub = hub();
    let part = |n: u8| ToHub::Gather { name: "metas-1".into(), part: Bytes::from(vec![n]) };
    for rank in [2, 0] {
        hub.handle(rank, part(rank as u8), T0);
        assert!(drain(&mut hub).is_empty());
    }
    hub.handle(1, part(1), T0);
    let replies = drain(&mut hub);
    assert_eq!(replies.len(), 3);
    for (_, reply) in replies {
        match reply {
            ToRank::Gathered { name, parts } => {
                assert_eq!(name, "metas-1");
                assert_eq!(parts, [vec![0], vec![1], vec![2]]);
            }
            other => panic!("{other:?}"),
        }
    }
    // A rank dies in the middle; one that comes later hears the same.
    let part = |name: &str| ToHub::Gather { name: name.into(), part: Bytes::new() };
    let why = |hub: &mut HubMachine| match drain(hub).pop() {
        Some((rank, ToRank::GatherFailed { cause, .. })) => (rank, cause.to_string()),
        other => panic!("{other:?}"),
    };
    hub.handle(0, part("metas-2"), T0);
    hub.disconnected(2, Error::new(ErrorKind::PeerLost, "read", "reset"), T0);
    assert!(why(&mut hub).1.contains("rank 2 is gone"));
    hub.connected(2, hello(2, 2), T0).unwrap();
    drain(&mut hub);
    hub.handle(1, part("metas-2"), T0);
    let (rank, text) = why(&mut hub);
    assert!(rank == 1 && text.contains("rank 2 is gone"), "{text}");
    // Nobody dies, and two do not come.
    hub.handle(1, part("metas-3"), T0);
    for half in 1..=120 {
        all(&mut hub, ToHub::Alive, seconds(f64::from(half) / 2.0));
        hub.handle_timeout(seconds(f64::from(half) / 2.0));
        if half < 120 {
            drain(&mut hub);
        }
    }
    let (rank, text) = why(&mut hub);
    assert!(rank == 1 && text.contains("ranks 0, 2 did not take part in metas-3 within 60 s"), "{text}");
}
