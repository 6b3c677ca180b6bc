//! Ranks that leave, come back, and ask how it ended.

use bytes::Bytes;

use super::{
    tests::{T0, aborts, all, begin, drain, hello, hub, joining, seconds},
    *,
};
use crate::control::{Installed, Mark, MarkKind};

fn part(n: u8) -> ToHub {
    ToHub::Gather { name: "metas".into(), part: Bytes::from(vec![n]) }
}

fn reset() -> Error {
    Error::new(ErrorKind::PeerLost, "read", "reset")
}

#[test]
fn a_rank_that_left_is_not_waited_for() {
    let mut hub = hub();
    hub.handle(2, ToHub::Bye, T0);
    assert_eq!(hub.poll_close(), Some(2));
    // Who names it is told; who does not, and who gathers, goes on without it.
    hub.handle(0, ToHub::Join(joining(&[0, 1, 2], 1)), T0);
    assert!(aborts(&mut hub)[0].2.contains("rank 2 is gone: it left the job; gather metas again"));
    hub.handle(0, part(0), T0);
    hub.handle(1, part(1), T0);
    match &drain(&mut hub)[..] {
        [(0, ToRank::Gathered { parts, .. }), (1, _)] => assert_eq!(*parts, [vec![0], vec![1], vec![]]),
        other => panic!("{other:?}"),
    }
    hub.handle(0, ToHub::Join(joining(&[], 1)), T0);
    hub.handle(1, ToHub::Join(joining(&[], 1)), T0);
    match &drain(&mut hub)[..] {
        [(0, ToRank::Begin { members, .. }), (1, _)] => assert_eq!(members.len(), 2),
        other => panic!("{other:?}"),
    }
    // It is waited for again as soon as it is back, and a gather that it never came to ends when it leaves.
    hub.connected(2, hello(2, 2), T0).unwrap();
    drain(&mut hub);
    hub.handle(0, part(0), T0);
    hub.handle(1, part(1), T0);
    assert!(drain(&mut hub).is_empty());
    hub.handle(2, ToHub::Bye, T0);
    assert!(matches!(&drain(&mut hub)[..], [(0, ToRank::Gathered { .. }), (1, ToRank::Gathered { .. })]));
}

#[test]
fn a_gather_that_failed_can_be_called_again_under_its_name() {
    let mut hub = hub();
    hub.handle(0, part(0), T0);
    hub.disconnected(2, reset(), T0);
    hub.connected(2, hello(2, 2), T0).unwrap();
    drain(&mut hub);
    // Rank 1 never called the first one, and comes long after it. Rank 0 gave its call up and calls anew.
    hub.handle(0, part(7), seconds(4.0));
    all(&mut hub, ToHub::Alive, seconds(4.0));
    all(&mut hub, ToHub::Alive, seconds(6.0));
    hub.handle(1, part(1), seconds(6.0));
    hub.handle(0, part(8), seconds(6.0));
    hub.handle(2, part(2), seconds(6.0));
    match &drain(&mut hub)[..] {
        [(0, ToRank::Gathered { parts, .. }), _, _] => assert_eq!(*parts, [vec![8], vec![1], vec![2]]),
        other => panic!("{other:?}"),
    }
}

fn doubt(epoch: Epoch) -> Weights {
    let mark = Mark {
        kind: MarkKind::InDoubt,
        checkpoint: "c".into(),
        version: Version(3),
        epoch,
        members: vec![0, 1, 2],
        cause: "the hub is lost".into(),
    };
    Weights { committed: None, mark: Some(mark) }
}

/// What ranks are told of their workers: the mark, and whether a version was decided.
fn told(hub: &mut HubMachine) -> Vec<(Rank, MarkKind, bool)> {
    let of = |(rank, message)| match message {
        ToRank::Weights(Weights { committed, mark: Some(mark) }) => {
            Some((rank, mark.kind, committed.is_some()))
        }
        _ => None,
    };
    drain(hub).into_iter().filter_map(of).collect()
}

/// All ranks are in the middle of an update, with their workers.
fn in_the_middle(hub: &mut HubMachine) -> Epoch {
    for rank in 0..3 {
        let joining = Joining { endpoint: Some("ipc:///w".into()), ..joining(&[], 3) };
        hub.handle(rank, ToHub::Join(joining), T0);
    }
    let Some((_, ToRank::Begin { epoch, .. })) = drain(hub).pop() else { panic!("no Begin") };
    all(hub, ToHub::Ready { epoch, plan_digest: 1 }, T0);
    all(hub, ToHub::Opened { epoch }, T0);
    epoch
}

#[test]
fn a_rank_in_doubt_hears_the_decision_when_it_is_back() {
    let mut hub = hub();
    let epoch = in_the_middle(&mut hub);
    all(&mut hub, ToHub::Loaded { epoch }, T0);
    assert_eq!(hub.poll_decisions().unwrap(), [Decision { epoch, committed: true }]);
    assert!(hub.poll_decisions().is_none(), "told once");
    // Rank 2 lost its session right then.
    hub.disconnected(2, reset(), T0);
    hub.connected(2, hello(2, 1), T0).unwrap();
    drain(&mut hub);
    hub.handle(2, ToHub::Weights(doubt(epoch)), T0);
    assert_eq!(told(&mut hub), [(2, MarkKind::Unfinished, true)]);
    let known = hub.members()[2].weights.clone().unwrap();
    assert_eq!(known.committed.unwrap().version, Version(3));
}

#[test]
fn a_restarted_hub_decides_from_what_was_written_down_or_from_what_the_ranks_say() {
    let epoch = Epoch(9);
    let restarted = |decisions: Vec<Decision>| {
        let hub = HubMachine::new(HubConfig::new(3, Deadlines::default()));
        let mut hub = hub.going_on(Epoch(5), decisions);
        for rank in 0..3 {
            hub.connected(rank, hello(rank, 1), T0).unwrap();
        }
        drain(&mut hub);
        hub
    };
    let says = |hub: &mut HubMachine, rank, weights| hub.handle(rank, ToHub::Weights(weights), T0);
    // Written down: the first that asks hears it.
    let mut hub = restarted(vec![Decision { epoch, committed: true }]);
    says(&mut hub, 1, doubt(epoch));
    assert_eq!(told(&mut hub), [(1, MarkKind::Unfinished, true)]);
    // All are there and have loaded.
    let mut hub = restarted(Vec::new());
    says(&mut hub, 1, doubt(epoch));
    says(&mut hub, 2, doubt(epoch));
    assert!(told(&mut hub).is_empty(), "rank 0 may know");
    says(&mut hub, 0, doubt(epoch));
    assert_eq!(told(&mut hub).len(), 3);
    // One had heard of the commit.
    let mut hub = restarted(Vec::new());
    says(&mut hub, 1, doubt(epoch));
    let committed = Some(Installed { checkpoint: "c".into(), version: Version(3), epoch });
    says(&mut hub, 2, Weights { committed, mark: None });
    assert_eq!(told(&mut hub), [(1, MarkKind::Unfinished, true)]);
    // Who could know was restarted: marked.
    let mut hub = restarted(Vec::new());
    says(&mut hub, 1, doubt(epoch));
    says(&mut hub, 2, doubt(epoch));
    says(&mut hub, 0, Weights::default());
    assert_eq!(told(&mut hub), [(1, MarkKind::Mixed, false), (2, MarkKind::Mixed, false)]);
    // Its epochs come after all that were ever given out.
    let mut hub = restarted(vec![Decision { epoch, committed: false }]);
    assert_eq!(begin(&mut hub, T0), Epoch(10));
}

#[test]
fn the_hub_remembers_the_worker_of_a_rank_that_died_in_the_middle() {
    let mut hub = hub();
    let epoch = in_the_middle(&mut hub);
    hub.disconnected(1, reset(), T0);
    let mark = hub.members()[1].weights.clone().unwrap().mark.unwrap();
    assert_eq!((mark.kind, mark.epoch, mark.version), (MarkKind::Mixed, epoch, Version(3)));
    // Its next process is told.
    hub.connected(1, hello(1, 2), T0).unwrap();
    drain(&mut hub);
    hub.handle(1, ToHub::Weights(Weights::default()), T0);
    assert_eq!(told(&mut hub), [(1, MarkKind::Mixed, false)]);
    // It installs a version: the mark is gone.
    let committed = Some(Installed { checkpoint: "c".into(), version: Version(4), epoch: Epoch(2) });
    let clean = Weights { committed, mark: None };
    hub.handle(1, ToHub::Weights(clean.clone()), T0);
    assert_eq!(hub.members()[1].weights, Some(clean));
}
