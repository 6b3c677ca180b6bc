//! `ckpt launch` as a process: real signals, its own death, and what it prints.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

fn launch(ranks: u32, dir: &Path, options: &[&str], script: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ckpt"));
    command.args(["launch", "--nproc-per-node", &ranks.to_string()]).args(options);
    command.args(["--", "sh", "-c", script]).env("DIR", dir);
    command.env_remove("CKPT_TOKEN").env_remove("CKPT_JOB").env_remove("RUST_LOG");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn until(what: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !what() {
        assert!(Instant::now() < deadline, "it never became true");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn is_running(pid: &str) -> bool {
    // A zombie has ended; whether somebody waits for it is not our business.
    fs::read_to_string(format!("/proc/{}/stat", pid.trim())).is_ok_and(|stat| !stat.contains(") Z "))
}

fn send(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(child.id().cast_signed()).unwrap();
    kill_process(pid, signal).unwrap();
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn finish(child: Child) -> Output {
    child.wait_with_output().unwrap()
}

#[test]
fn output_is_tagged_on_request_and_the_report_is_the_last_line() {
    let dir = tempfile::tempdir().unwrap();
    let script = "echo out; echo err >&2; exit $((RANK * 3))";
    let output = finish(launch(2, dir.path(), &["--tag-output", "--json"], script).spawn().unwrap());
    assert_eq!(output.status.code(), Some(3));
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    let last = stdout.lines().last().unwrap();
    let report: serde_json::Value = serde_json::from_str(last).unwrap();
    assert_eq!(report["exit_code"], 3);
    assert_eq!(report["first_failure"]["rank"], 1);
    assert_eq!(report["world_size"], 2);
    // Rank 0 may have been ended before it said anything.
    assert!(stdout.contains("[1] out\n") && stderr.contains("[1] err\n"), "{stdout} {stderr}");
    assert!(stderr.contains("rank=1"), "{stderr}");

    let output = finish(launch(1, dir.path(), &[], "echo plain").spawn().unwrap());
    assert!(output.status.success());
    assert_eq!(text(&output.stdout), "plain\n");
}

#[test]
fn sigterm_reaches_the_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let script = "sleep 600 & trap 'kill $!; touch $DIR/term$RANK; exit 5' TERM; : >$DIR/up$RANK; wait";
    let launcher = launch(2, dir.path(), &[], script).spawn().unwrap();
    until(|| dir.path().join("up0").exists() && dir.path().join("up1").exists());
    send(&launcher, Signal::TERM);
    let output = finish(launcher);
    assert_eq!(output.status.code(), Some(5), "{}", text(&output.stderr));
    assert!(dir.path().join("term0").exists() && dir.path().join("term1").exists());
}

#[test]
fn ranks_die_with_a_launcher_that_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    // `exec`: the rank itself, not a shell around it, waits.
    let script = "echo $$ >$DIR/new$RANK; mv $DIR/new$RANK $DIR/pid$RANK; exec sleep 600";
    let mut launcher = launch(2, dir.path(), &[], script).spawn().unwrap();
    let file = |rank| dir.path().join(format!("pid{rank}"));
    until(|| file(0).exists() && file(1).exists());
    let pids: Vec<String> = (0..2).map(|rank| fs::read_to_string(file(rank)).unwrap()).collect();
    assert!(pids.iter().all(|pid| is_running(pid)));
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    until(|| !pids.iter().any(|pid| is_running(pid)));
}

#[test]
fn a_missing_program_is_one_line_and_exit_code_2() {
    let output = Command::new(env!("CARGO_BIN_EXE_ckpt"))
        .args(["launch", "--", "no-such-program-anywhere"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let stderr = text(&output.stderr);
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains("no-such-program-anywhere"), "{stderr}");
}
