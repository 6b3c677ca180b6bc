//! Launches of small shell commands; signals are fed in so that tests can run beside each other.

use std::{
    ffi::OsString,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use ckpt_core::cluster::{ClusterEnv, Launcher};
use clap::Parser;
use rustix::process::{Pid, Signal, test_kill_process};
use tokio::sync::mpsc;

use super::{LaunchArgs, LaunchPlan, supervise};

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    launch: LaunchArgs,
}

fn parse(args: &[&str]) -> Result<LaunchArgs, clap::Error> {
    Line::try_parse_from([&["launch"], args].concat()).map(|line| line.launch)
}

fn plan_in(args: &[&str], variables: &[(&str, &str)]) -> anyhow::Result<LaunchPlan> {
    LaunchPlan::new(parse(args)?, &|name| {
        variables.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
    })
}

fn plan(args: &[&str]) -> LaunchPlan {
    plan_in(args, &[]).unwrap()
}

/// `ranks` shells that run `script`, which may use `$DIR`. A script that traps signals must spend its time in `wait`: dash
/// forgets a signal that comes while it starts a command (0.5.12, `onsig`).
fn shells(ranks: u32, grace: u32, dir: &Path, script: &str) -> LaunchPlan {
    let script = format!("DIR='{}'; {script}", dir.display());
    plan(&["--nproc-per-node", &ranks.to_string(), "--grace", &grace.to_string(), "--", "sh", "-c", &script])
}

fn no_signals() -> (mpsc::Sender<Signal>, mpsc::Receiver<Signal>) {
    mpsc::channel(8)
}

async fn until(what: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !what() {
        assert!(Instant::now() < deadline, "it never became true");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn count(dir: &Path, prefix: &str) -> usize {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().starts_with(prefix)).count()
}

#[test]
fn each_rank_gets_the_variables_that_detection_reads() {
    let plan = plan_in(
        &[
            "--nproc-per-node",
            "4",
            "--nnodes",
            "2",
            "--node-rank",
            "1",
            "--master-addr",
            "node0",
            "--job",
            "j",
            "--",
            "x",
        ],
        &[("CKPT_TOKEN", "s3cret")],
    )
    .unwrap();
    let variables = plan.variables(2);
    let cluster = ClusterEnv::detect(&|name| {
        variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string_lossy().into_owned())
    })
    .unwrap();
    assert_eq!(cluster.launcher, Launcher::Torchrun);
    assert_eq!((cluster.rank, cluster.world_size, cluster.local_rank), (6, 8, 2));
    assert_eq!((cluster.hub.to_string().as_str(), cluster.job.as_str()), ("node0:29501", "j"));
    assert!(plan.token.matches(b"s3cret"));
    assert!(!format!("{plan:?}").contains("s3cret"));
}

#[tokio::test]
async fn on_one_host_port_job_and_token_are_made_up() {
    let (a, b) = (plan(&["--", "x"]), plan(&["--", "x"]));
    assert_ne!(a.master_port, b.master_port);
    assert_ne!(a.job, b.job);
    assert_ne!(a.token, b.token);
    // Rank 0's hub can listen on the reserved port.
    let hub = ckpt_core::control::Hub::bind(ckpt_core::control::HubOptions {
        address: ckpt_core::control::HubAddress::new("127.0.0.1", a.master_port + 1),
        job: a.job.clone(),
        token: a.token.clone(),
        world_size: 1,
        deadlines: Default::default(),
        tls: false,
    })
    .await
    .unwrap();
    assert_eq!(hub.address().unwrap().port(), a.master_port + 1);
    hub.shutdown().await;
}

#[test]
fn bad_arguments_are_one_line_that_names_the_fix() {
    let error = |args: &[&str]| plan_in(args, &[]).unwrap_err().to_string();
    assert!(error(&["--nnodes", "2", "--node-rank", "2", "--", "x"]).contains("--node-rank 2"));
    assert!(error(&["--nnodes", "2", "--", "x"]).contains("--master-addr"));
    let text = error(&["--nnodes", "2", "--master-addr", "a", "--", "x"]);
    assert!(text.contains("CKPT_TOKEN") && text.contains("--token-file"), "{text}");
    assert!(error(&["--token-file", "/nonexistent/token", "--", "x"]).contains("/nonexistent/token"));
    assert!(parse(&["--nproc-per-node", "0", "--", "x"]).is_err());
    assert!(parse(&["--master-port", "65535", "--", "x"]).is_err());
    assert!(parse(&["--nproc-per-node", "2"]).is_err());
}

#[tokio::test]
async fn all_ranks_run_and_success_is_success() {
    let dir = tempfile::tempdir().unwrap();
    let plan = shells(3, 10, dir.path(), "echo $RANK/$WORLD_SIZE >$DIR/rank$LOCAL_RANK; cat; echo done");
    let (_keep, signals) = no_signals();
    assert_eq!(supervise::run(&plan, true, signals).await.unwrap(), None);
    for rank in 0..3 {
        let text = fs::read_to_string(dir.path().join(format!("rank{rank}"))).unwrap();
        assert_eq!(text, format!("{rank}/3\n"));
    }
}

#[tokio::test]
async fn one_failure_ends_all_with_its_code() {
    let dir = tempfile::tempdir().unwrap();
    // Rank 1 fails when all others are up; they clean up when told.
    let plan = shells(
        3,
        20,
        dir.path(),
        "if [ $RANK = 1 ]; then while [ ! -e $DIR/up0 ] || [ ! -e $DIR/up2 ]; do sleep 0.02; done; exit 7; fi
         sleep 600 & trap 'kill $!; touch $DIR/cleaned$RANK; exit 0' TERM; : >$DIR/up$RANK; wait",
    );
    let (_keep, signals) = no_signals();
    let failure = supervise::run(&plan, false, signals).await.unwrap().unwrap();
    assert_eq!((failure.rank, failure.code, failure.exit_code()), (1, Some(7), 7));
    assert_eq!(count(dir.path(), "cleaned"), 2);
}

#[tokio::test]
async fn who_ignores_sigterm_is_killed_after_the_grace_period_with_all_it_started() {
    let dir = tempfile::tempdir().unwrap();
    let plan = shells(
        2,
        1,
        dir.path(),
        "if [ $RANK = 1 ]; then while [ ! -s $DIR/pid ]; do sleep 0.02; done; kill -9 $$; fi
         trap '' TERM; sleep 600 & echo $! >$DIR/pid.new; mv $DIR/pid.new $DIR/pid; while :; do sleep 0.05; done",
    );
    let (_keep, signals) = no_signals();
    let failure = supervise::run(&plan, false, signals).await.unwrap().unwrap();
    assert_eq!((failure.rank, failure.signal, failure.exit_code()), (1, Some(9), 137));
    let grandchild: i32 = fs::read_to_string(dir.path().join("pid")).unwrap().trim().parse().unwrap();
    let grandchild = Pid::from_raw(grandchild).unwrap();
    // Nobody waits for an orphan at once, so it may be a zombie for a moment or, without an init, for good.
    let gone = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", grandchild.as_raw_nonzero()));
        test_kill_process(grandchild).is_err() || stat.is_ok_and(|stat| stat.contains(") Z "))
    };
    until(gone).await;
}

#[tokio::test]
async fn signals_are_passed_on_and_a_second_one_kills() {
    let dir = tempfile::tempdir().unwrap();
    // Whoever runs the tests in the background may have SIGINT ignored, which no shell below can undo.
    let script = "sleep 600 & trap 'kill $!; touch $DIR/told$RANK; exit 0' USR1; : >$DIR/up$RANK; wait";
    let plan = shells(2, 20, dir.path(), script);
    let (sender, signals) = no_signals();
    let press = async {
        until(|| count(dir.path(), "up") == 2).await;
        sender.send(Signal::USR1).await.unwrap();
    };
    let (failure, ()) = tokio::join!(supervise::run(&plan, false, signals), press);
    // Ranks that end well when asked make the whole end well.
    assert_eq!(failure.unwrap(), None);
    assert_eq!(count(dir.path(), "told"), 2);

    let dir = tempfile::tempdir().unwrap();
    let plan =
        shells(2, 600, dir.path(), "trap '' INT TERM; touch $DIR/up$RANK; while :; do sleep 0.05; done");
    let (sender, signals) = no_signals();
    let press_twice = async {
        until(|| count(dir.path(), "up") == 2).await;
        sender.send(Signal::TERM).await.unwrap();
        sender.send(Signal::TERM).await.unwrap();
    };
    let (failure, ()) = tokio::join!(supervise::run(&plan, false, signals), press_twice);
    assert_eq!(failure.unwrap().unwrap().exit_code(), 137);
}

#[tokio::test]
async fn a_program_that_is_not_there_is_one_line() {
    let plan = plan(&["--nproc-per-node", "2", "--", "no-such-program-anywhere"]);
    let (_keep, signals) = no_signals();
    let error = supervise::run(&plan, false, signals).await.unwrap_err().to_string();
    assert!(error.contains("no-such-program-anywhere") && error.contains("no such program"), "{error}");
}
