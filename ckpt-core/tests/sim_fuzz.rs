//! Whatever comes in whatever order, machine and hub neither panic nor hang.

use std::time::Duration;

use bytes::Bytes;
use ckpt_core::{
    Epoch, Error, ErrorKind, Version,
    control::{CommunicatorChoice, Hello, HubConfig, HubMachine, Joining, ToHub, ToRank},
    testkit::tight_deadlines,
    update::{Action, Event, MachineConfig, UpdateMachine},
};
use proptest::prelude::*;

fn cause() -> Error {
    Error::new(ErrorKind::Backend, "test", "something broke")
}

fn event() -> impl Strategy<Value = Event> {
    let epoch = (0_u64..3).prop_map(Epoch);
    let bucket = 0_u32..6;
    let waits = proptest::collection::vec(proptest::option::weighted(0.5, 0_u32..5), 0..6);
    prop_oneof![
        3 => epoch.clone().prop_map(|epoch| Event::Begun {
            epoch,
            members: Vec::new(),
            communicator: CommunicatorChoice::Build(Bytes::new()),
        }),
        2 => waits.prop_map(|waits| {
            // Mostly plans in order; now and then a hostile one.
            let waits_for = (0_u32..).zip(waits).map(|(b, w)| w.map(|w| if b == 0 { w } else { w % b })).collect();
            Event::Prepared { plan_digest: 1, waits_for, loads: vec![0, 2, 3, 9] }
        }),
        3 => epoch.clone().prop_map(|epoch| Event::Go { epoch }),
        2 => Just(Event::SinkOpened),
        1 => epoch.clone().prop_map(|epoch| Event::AllOpened { epoch }),
        8 => bucket.clone().prop_map(|bucket| Event::Exchanged { bucket }),
        8 => bucket.prop_map(|bucket| Event::Acked { bucket }),
        2 => epoch.clone().prop_map(|epoch| Event::Committed { epoch }),
        2 => Just(Event::Released),
        2 => Just(Event::PostHookDone),
        1 => Just(Event::EngineDone),
        1 => epoch.clone().prop_map(|epoch| Event::Closed { epoch, failure: None }),
        1 => Just(Event::Failed { cause: cause() }),
        1 => proptest::option::of(epoch).prop_map(|epoch| Event::HubAborted { epoch, cause: cause() }),
        1 => Just(Event::HubLost { cause: cause() }),
        4 => (0_u64..20_000).prop_map(|ms| Event::LeaseRenewed { asked: Duration::from_millis(ms) }),
        1 => Just(Event::AbortDone),
    ]
}

/// What a cooperative driver answers.
fn answer(action: &Action) -> Option<Event> {
    Some(match action {
        Action::Prepare { .. } => {
            let waits_for = vec![None, None, Some(0), Some(1)];
            Event::Prepared { plan_digest: 1, waits_for, loads: vec![0, 1, 2, 3] }
        }
        Action::SendReady { epoch, .. } => Event::Go { epoch: *epoch },
        Action::OpenSink => Event::SinkOpened,
        Action::Exchange { bucket } => Event::Exchanged { bucket: *bucket },
        Action::Publish { bucket } => Event::Acked { bucket: *bucket },
        Action::SendLoaded { epoch } => Event::Committed { epoch: *epoch },
        Action::ReleaseSink => Event::Released,
        Action::RunPostHook => Event::PostHookDone,
        Action::SendFinished { epoch, .. } => Event::Closed { epoch: *epoch, failure: None },
        Action::AbortLocal { .. } => Event::AbortDone,
        _ => return None,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_machine_ends_whatever_it_hears(
        steps in proptest::collection::vec((event(), 0_u64..300, any::<bool>()), 0..120),
        has_worker in any::<bool>(),
        starts_engine in any::<bool>(),
    ) {
        let mut config = MachineConfig::new(1, tight_deadlines(), Duration::ZERO);
        config.has_worker = has_worker;
        config.starts_engine = starts_engine;
        let mut machine = UpdateMachine::new(config);
        let mut now = Duration::ZERO;
        let (mut aborts, mut reports, mut ends, mut actions) = (0, 0, 0, 0);
        let mut drain = |machine: &mut UpdateMachine, now: Duration, answers: bool| {
            while let Some(action) = machine.poll_action(now) {
                actions += 1;
                assert!(actions < 200, "a machine asks for ever");
                assert_eq!(ends, 0, "{action:?} after the end");
                aborts += u32::from(matches!(action, Action::AbortLocal { .. }));
                reports += u32::from(matches!(action, Action::SendFailed { .. }));
                ends += u32::from(matches!(action, Action::End(_)));
                if let Some(event) = answer(&action).filter(|_| answers) {
                    machine.handle_event(event, now);
                }
            }
            assert!(aborts <= 1 && reports <= 1);
        };
        for (event, wait, answers) in steps {
            now += Duration::from_millis(wait);
            machine.handle_event(event, now);
            drain(&mut machine, now, answers);
        }
        // From here on nothing comes any more: its own timers must end it.
        for _ in 0..20 {
            let Some(at) = machine.poll_timeout() else { break };
            now = now.max(at);
            machine.handle_timeout(now);
            drain(&mut machine, now, false);
        }
        prop_assert!(machine.is_ended());
        prop_assert_eq!(machine.poll_timeout(), None);
    }

    #[test]
    fn a_hub_ends_whatever_it_hears(
        steps in proptest::collection::vec((0_u32..5, 0_u32..9, 0_u64..3, 0_u64..400), 0..150),
    ) {
        let mut hub = HubMachine::new(HubConfig::new(4, tight_deadlines()));
        let mut now = Duration::ZERO;
        // Per rank: calls that wait for their last word.
        let mut open = [0_i32; 4];
        let drain = |hub: &mut HubMachine, open: &mut [i32; 4]| {
            while let Some((rank, message)) = hub.poll_message() {
                if matches!(message, ToRank::Abort { .. } | ToRank::Closed { .. }) {
                    open[rank as usize] -= 1;
                    assert!(open[rank as usize] >= 0, "rank {rank} heard two last words for one call");
                }
            }
            while let Some(rank) = hub.poll_close() {
                open[rank as usize] = 0;
            }
        };
        for (rank, what, n, wait) in steps {
            now += Duration::from_millis(wait);
            let epoch = Epoch(n);
            let connected = hub.members().get(rank as usize).is_some_and(|m| m.connected);
            match what {
                0 | 1 => {
                    let hello = Hello {
                        protocol: 1,
                        job: "job".into(),
                        token: Bytes::new(),
                        rank,
                        world_size: 4,
                        incarnation: n,
                        host: "host".into(),
                        pid: 1,
                    };
                    prop_assert_eq!(hub.connected(rank, hello, now).is_ok(), rank < 4 && !connected);
                }
                2 if n == 0 => {
                    hub.disconnected(rank, cause(), now);
                    if rank < 4 {
                        open[rank as usize] = 0;
                    }
                }
                2 | 3 => {
                    if connected {
                        open[rank as usize] += 1;
                    }
                    let ranks = [vec![], vec![0, 1], vec![2, 3, 9]].into_iter().nth(n as usize).unwrap_or_default();
                    hub.handle(rank, ToHub::Join(Joining {
                        checkpoint: "c".into(),
                        version: Version(u64::from(wait > 390)),
                        ranks,
                        device_uuid: String::new(),
                        endpoint: None,
                        free_bytes: 0,
                        communicator: None,
                        token: Some(Bytes::new()),
                    }), now);
                }
                4 => hub.handle(rank, ToHub::Ready { epoch, plan_digest: u64::from(wait > 390) }, now),
                5 => hub.handle(rank, ToHub::Loaded { epoch }, now),
                6 => hub.handle(rank, ToHub::Finished { epoch, failure: None }, now),
                7 => hub.handle(rank, ToHub::Failed { epoch: (n > 0).then_some(epoch), cause: cause() }, now),
                _ => hub.handle(rank, ToHub::Gather { name: n.to_string(), part: Bytes::new() }, now),
            }
            drain(&mut hub, &mut open);
        }
        for _ in 0..200 {
            let Some(at) = hub.poll_timeout() else { break };
            now = now.max(at);
            hub.handle_timeout(now);
            drain(&mut hub, &mut open);
        }
        prop_assert!(hub.attempts().is_empty());
        prop_assert_eq!(hub.poll_timeout(), None);
        prop_assert!(open.iter().all(|n| *n == 0), "calls without a last word: {:?}", open);
    }
}
