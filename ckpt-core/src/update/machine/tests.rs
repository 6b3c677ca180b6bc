use bytes::Bytes;

use super::*;
use crate::control::CommunicatorChoice;

const EPOCH: Epoch = Epoch(4);

fn at(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

fn cause(text: &str) -> Error {
    Error::new(ErrorKind::Backend, "test", text)
}

/// A machine and its actions as short words.
struct Rig {
    machine: UpdateMachine,
    now: Duration,
}

impl Rig {
    fn new(has_worker: bool, starts_engine: bool) -> Self {
        let mut config = MachineConfig::new(3, Deadlines::default(), at(0.0));
        config.has_worker = has_worker;
        config.starts_engine = starts_engine;
        Self { machine: UpdateMachine::new(config), now: at(0.0) }
    }

    /// Says it and returns what the machine wants then.
    fn say(&mut self, event: Event) -> Vec<String> {
        self.machine.handle_event(event, self.now);
        self.actions()
    }

    fn actions(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.machine.poll_action(self.now)).map(word).collect()
    }

    /// This rank's worker has mapped the ring, and then all have.
    fn all_opened(&mut self) -> Vec<String> {
        let mut actions = self.say(Event::SinkOpened);
        actions.extend(self.say(Event::AllOpened { epoch: EPOCH }));
        actions
    }

    /// Time passes, with the hub answering.
    fn wait(&mut self, seconds: f64) -> Vec<String> {
        self.now += at(seconds);
        self.machine.handle_event(Event::LeaseRenewed { asked: self.now }, self.now);
        self.actions()
    }

    fn until_go(waits_for: &[Option<u32>], has_worker: bool, starts_engine: bool) -> Self {
        let mut rig = Self::new(has_worker, starts_engine);
        let communicator = CommunicatorChoice::Build(Bytes::new());
        assert_eq!(rig.say(Event::Begun { epoch: EPOCH, members: Vec::new(), communicator }), ["prepare"]);
        let waits_for = waits_for.to_vec();
        let loads = (0..waits_for.len() as u32).collect();
        assert_eq!(rig.say(Event::Prepared { plan_digest: 1, waits_for, loads }), ["ready"]);
        rig
    }

    /// Two buckets, both acked; the last actions are returned.
    fn until_loaded(has_worker: bool, starts_engine: bool) -> Self {
        let mut rig = Self::until_go(&[None, Some(0)], has_worker, starts_engine);
        rig.say(Event::Go { epoch: EPOCH });
        rig.all_opened();
        for bucket in 0..2 {
            rig.say(Event::Exchanged { bucket });
            if has_worker {
                rig.say(Event::Acked { bucket });
            }
        }
        assert_eq!(rig.machine.stage, Stage::Loaded);
        rig
    }
}

fn word(action: Action) -> String {
    match action {
        Action::Prepare { .. } => "prepare".into(),
        Action::SendReady { .. } => "ready".into(),
        Action::StartEngine => "engine".into(),
        Action::OpenSink => "open".into(),
        Action::SendOpened { .. } => "opened".into(),
        Action::Load { bucket } => format!("load {bucket}"),
        Action::Exchange { bucket } => format!("exchange {bucket}"),
        Action::Publish { bucket } => format!("publish {bucket}"),
        Action::Free { bucket } => format!("free {bucket}"),
        Action::SendLoaded { .. } => "loaded".into(),
        Action::ReleaseSink => "release".into(),
        Action::RunPostHook => "hook".into(),
        Action::SendFinished { failure, .. } => format!("finished {}", failure.is_none()),
        Action::SendFailed { cause, .. } => format!("failed {}", cause.message()),
        Action::AbortLocal { .. } => "abort".into(),
        Action::End(Outcome::Committed { failure: None }) => "end committed".into(),
        Action::End(Outcome::Committed { failure: Some(f) }) => format!("end committed, but {}", f.message()),
        Action::End(Outcome::Failed { cause }) => format!("end failed: {}", cause.message()),
        Action::End(Outcome::InDoubt { .. }) => "end in doubt".into(),
    }
}

#[test]
fn a_later_load_goes_ahead_where_its_place_is_free_and_exchanges_stay_in_order() {
    let mut rig = Rig::until_go(&[None, Some(0), Some(1), None], true, false);
    assert_eq!(rig.say(Event::Go { epoch: EPOCH }), ["open", "load 0", "exchange 0", "load 3"]);
    rig.all_opened();
    assert_eq!(rig.say(Event::Exchanged { bucket: 0 }), ["publish 0"]);
    assert_eq!(rig.say(Event::Acked { bucket: 0 }), ["free 0", "load 1", "exchange 1"]);
    assert_eq!(rig.say(Event::Exchanged { bucket: 1 }), ["publish 1"]);
    assert_eq!(rig.say(Event::Acked { bucket: 1 }), ["free 1", "load 2", "exchange 2", "exchange 3"]);
}

#[test]
fn a_healthy_update_runs_ahead_and_waits_where_it_must() {
    let mut rig = Rig::until_go(&[None, None, Some(0)], true, true);
    assert_eq!(
        rig.say(Event::Go { epoch: EPOCH }),
        ["engine", "open", "load 0", "exchange 0", "load 1", "exchange 1"],
        "all that the ring has room for, before the worker is there"
    );
    assert!(rig.say(Event::Exchanged { bucket: 0 }).is_empty());
    assert_eq!(
        rig.say(Event::SinkOpened),
        ["opened"],
        "another rank's worker has no ring: nothing is touched"
    );
    assert_eq!(rig.say(Event::AllOpened { epoch: EPOCH }), ["publish 0"]);
    assert!(rig.say(Event::Exchanged { bucket: 1 }).is_empty(), "one question at a time");
    assert_eq!(rig.say(Event::Acked { bucket: 0 }), ["free 0", "publish 1", "load 2", "exchange 2"]);
    assert_eq!(rig.say(Event::Acked { bucket: 1 }), ["free 1"]);
    assert_eq!(rig.say(Event::Exchanged { bucket: 2 }), ["publish 2"]);
    assert_eq!(rig.say(Event::Acked { bucket: 2 }), ["free 2", "loaded"]);
    assert_eq!(rig.say(Event::Committed { epoch: EPOCH }), ["release"]);
    assert_eq!(rig.say(Event::Released), ["hook"]);
    assert!(rig.say(Event::PostHookDone).is_empty(), "the engine's request is still open");
    assert_eq!(rig.say(Event::EngineDone), ["finished true"]);
    assert_eq!(rig.say(Event::Closed { epoch: EPOCH, failure: None }), ["end committed"]);
    assert!(rig.machine.is_ended() && rig.machine.poll_timeout().is_none());
}

#[test]
fn a_rank_without_worker_and_an_empty_plan_take_part() {
    let mut rig = Rig::until_go(&[None, Some(0)], false, false);
    assert_eq!(rig.say(Event::Go { epoch: EPOCH }), ["opened", "load 0", "exchange 0"]);
    assert_eq!(rig.say(Event::Exchanged { bucket: 0 }), ["free 0", "load 1", "exchange 1"]);
    assert_eq!(rig.say(Event::Exchanged { bucket: 1 }), ["free 1", "loaded"]);
    assert_eq!(rig.say(Event::Committed { epoch: EPOCH }), ["finished true"]);
    let mut rig = Rig::until_go(&[], true, false);
    assert_eq!(rig.say(Event::Go { epoch: EPOCH }), ["open"]);
    assert_eq!(rig.say(Event::SinkOpened), ["opened", "loaded"]);
}

#[test]
fn a_failure_is_reported_and_aborted_once_and_the_hubs_cause_wins() {
    let mut rig = Rig::until_go(&[None], true, false);
    rig.say(Event::Go { epoch: EPOCH });
    assert_eq!(rig.say(Event::Failed { cause: cause("mine") }), ["failed mine", "abort"]);
    assert!(rig.say(Event::Failed { cause: cause("echo") }).is_empty());
    assert!(rig.say(Event::Exchanged { bucket: 0 }).is_empty());
    assert!(rig.say(Event::AbortDone).is_empty(), "the hub's word comes");
    let abort = Event::HubAborted { epoch: Some(EPOCH), cause: cause("the first") };
    assert_eq!(rig.say(abort), ["end failed: the first"]);
}

#[test]
fn a_hub_that_aborts_is_obeyed_without_a_report() {
    let mut rig = Rig::until_go(&[None], true, false);
    let abort = Event::HubAborted { epoch: Some(EPOCH), cause: cause("another's") };
    assert_eq!(rig.say(abort), ["abort"]);
    assert_eq!(rig.say(Event::AbortDone), ["end failed: another's"]);
}

#[test]
fn a_stopped_process_fences_itself_before_it_publishes() {
    let mut rig = Rig::until_go(&[None, None], true, false);
    rig.say(Event::Go { epoch: EPOCH });
    rig.all_opened();
    rig.say(Event::Exchanged { bucket: 0 });
    rig.say(Event::Exchanged { bucket: 1 });
    // 30 s of SIGSTOP. The ack and an old heartbeat's answer lie in the sockets.
    rig.now += at(30.0);
    rig.machine.handle_event(Event::Acked { bucket: 0 }, rig.now);
    rig.machine.handle_event(Event::LeaseRenewed { asked: at(0.5) }, rig.now);
    assert!(!rig.machine.lease_is_valid(rig.now));
    let actions = rig.actions();
    assert!(actions[0].starts_with("failed the hub on rank 0 has not answered within 5 s"), "{actions:?}");
    assert_eq!(actions[1..], ["abort"]);
}

#[test]
fn an_early_engine_is_an_error_and_a_late_one_after_the_commit_too() {
    let mut rig = Rig::until_go(&[None], true, true);
    rig.say(Event::Go { epoch: EPOCH });
    let actions = rig.say(Event::EngineDone);
    assert!(actions[0].starts_with("failed the engine answered its update request before"), "{actions:?}");
    let mut rig = Rig::until_loaded(true, true);
    rig.say(Event::Committed { epoch: EPOCH });
    rig.say(Event::Released);
    rig.say(Event::PostHookDone);
    assert!((0..119).all(|_| rig.wait(1.0).is_empty()));
    assert_eq!(rig.wait(1.0), ["finished false"]);
}

#[test]
fn after_loaded_only_the_hub_decides() {
    // It fails here; the hub had not decided.
    let mut rig = Rig::until_loaded(true, false);
    assert_eq!(rig.say(Event::Failed { cause: cause("engine died") }), ["failed engine died"]);
    let abort = Event::HubAborted { epoch: Some(EPOCH), cause: cause("engine died") };
    assert_eq!(rig.say(abort), ["abort"]);
    assert_eq!(rig.say(Event::AbortDone), ["end failed: engine died"]);
    // It fails here; the decision was on its way.
    let mut rig = Rig::until_loaded(true, false);
    rig.say(Event::Failed { cause: cause("engine died") });
    assert_eq!(rig.say(Event::Committed { epoch: EPOCH }), ["abort"]);
    assert_eq!(rig.say(Event::AbortDone), ["finished false"]);
    let closed = Event::Closed { epoch: EPOCH, failure: Some(cause("engine died")) };
    assert_eq!(rig.say(closed), ["end committed, but engine died"]);
    // The hub is lost: nobody knows.
    let mut rig = Rig::until_loaded(true, false);
    assert_eq!(rig.say(Event::HubLost { cause: cause("reset") }), ["abort"]);
    assert_eq!(rig.say(Event::AbortDone), ["end in doubt"]);
}

#[test]
fn a_stopped_process_may_still_read_the_decision() {
    let mut rig = Rig::until_loaded(true, false);
    rig.now += at(60.0);
    assert!(rig.actions().is_empty(), "what lies in the socket is read first");
    assert_eq!(rig.say(Event::Committed { epoch: EPOCH }), ["release"]);
    let mut rig = Rig::until_loaded(true, false);
    rig.now += at(60.0);
    assert!(rig.actions().is_empty());
    rig.now += at(1.0);
    assert_eq!(rig.actions(), ["abort"], "it was not there");
}

#[test]
fn the_hub_may_go_once_all_is_decided() {
    let mut rig = Rig::until_loaded(true, false);
    rig.say(Event::Committed { epoch: EPOCH });
    assert!(rig.say(Event::HubLost { cause: cause("hub died") }).is_empty());
    assert_eq!(rig.say(Event::Released), ["hook"]);
    assert_eq!(rig.say(Event::PostHookDone), ["end committed, but hub died"]);
}

#[test]
fn messages_of_other_attempts_change_nothing() {
    let mut rig = Rig::until_go(&[None], true, false);
    for event in [
        Event::Go { epoch: Epoch(3) },
        Event::Committed { epoch: Epoch(3) },
        Event::Closed { epoch: Epoch(3), failure: None },
        Event::HubAborted { epoch: Some(Epoch(3)), cause: cause("old") },
        Event::HubAborted { epoch: None, cause: cause("another call was refused") },
    ] {
        assert!(rig.say(event).is_empty());
    }
    assert_eq!(rig.machine.stage, Stage::Ready);
}

#[test]
fn deadlines_name_stage_and_bucket() {
    // The worker does not ack.
    let mut rig = Rig::until_go(&[None], true, false);
    rig.say(Event::Go { epoch: EPOCH });
    rig.all_opened();
    rig.say(Event::Exchanged { bucket: 0 });
    assert!((0..29).all(|_| rig.wait(1.0).is_empty()));
    rig.now += at(1.0);
    rig.machine.handle_timeout(rig.now);
    match rig.machine.poll_action(rig.now) {
        Some(Action::SendFailed { cause, .. }) => {
            assert_eq!(cause.kind(), ErrorKind::Timeout);
            assert_eq!((cause.get(Key::Bucket), cause.get(Key::Rank)), (Some("0"), Some("3")));
            assert!(cause.message().contains("did not acknowledge"), "{cause}");
        }
        other => panic!("{other:?}"),
    }
    // A bucket does not come. Behind a wait any worker may be to blame: twice the time, once all are there.
    let mut rig = Rig::until_go(&[None, Some(0)], true, false);
    rig.say(Event::Go { epoch: EPOCH });
    rig.say(Event::SinkOpened);
    rig.say(Event::Exchanged { bucket: 0 });
    assert!((0..100).all(|_| rig.wait(1.0).is_empty()), "some worker has not opened yet");
    assert_eq!(rig.say(Event::AllOpened { epoch: EPOCH }), ["publish 0"]);
    rig.say(Event::Acked { bucket: 0 });
    assert!((0..59).all(|_| rig.wait(1.0).is_empty()));
    let actions = rig.wait(1.0);
    assert_eq!(actions, ["failed a bucket was not exchanged within 30 s", "abort"]);
    // The worker never maps the ring.
    let mut rig = Rig::until_go(&[None], true, false);
    rig.say(Event::Go { epoch: EPOCH });
    rig.say(Event::Exchanged { bucket: 0 });
    let actions: Vec<String> = (0..305).flat_map(|_| rig.wait(1.0)).collect();
    let text = "was not loaded within 300 s (0 of 1 buckets were): the worker has not mapped the ring";
    assert!(actions[0].contains(text), "{actions:?}");
}

#[test]
fn limits_without_end_do_not_overflow() {
    let forever = Duration::MAX;
    let deadlines = Deadlines {
        join: forever,
        ready: forever,
        bucket: forever,
        release: forever,
        abort: forever,
        total: forever,
        heartbeat: forever,
        dead_after: forever,
    };
    let mut machine = UpdateMachine::new(MachineConfig::new(0, deadlines, at(5.0)));
    let communicator = CommunicatorChoice::Build(Bytes::new());
    machine.handle_event(Event::Begun { epoch: EPOCH, members: Vec::new(), communicator }, at(6.0));
    assert!(matches!(machine.poll_action(at(7.0)), Some(Action::Prepare { .. })));
    assert_eq!(machine.poll_timeout(), Some(Duration::MAX));
}

#[test]
fn a_worker_that_answers_twice_is_caught() {
    let mut rig = Rig::until_go(&[None, None], true, false);
    rig.say(Event::Go { epoch: EPOCH });
    rig.all_opened();
    rig.say(Event::Exchanged { bucket: 0 });
    rig.say(Event::Acked { bucket: 0 });
    let actions = rig.say(Event::Acked { bucket: 0 });
    assert_eq!(actions, ["failed the worker acknowledged a bucket that it was not given", "abort"]);
}
