//! The ranks' lives: started together, ended together.

use std::{
    collections::BTreeMap,
    os::unix::process::ExitStatusExt,
    process::ExitStatus,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use ckpt_core::{device::runtime_dir, sink::release_in_background};
use futures_util::{StreamExt, stream::FuturesUnordered};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::Serialize;
use tokio::{
    process::Child,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};

use super::{LaunchPlan, child, output};

/// For output that is still in a pipe when the last rank has ended.
const OUTPUT_WAIT: Duration = Duration::from_secs(1);
/// For workers of dead ranks to hear of it. One that is there connects again within a moment.
const FREEING_WAIT: Duration = Duration::from_secs(2);

/// The first rank that did not end well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Failure {
    pub(super) rank: u32,
    pub(super) pid: u32,
    /// Its exit code, if it ended by itself.
    pub(super) code: Option<i32>,
    /// The signal that killed it.
    pub(super) signal: Option<i32>,
}

impl Failure {
    /// What a shell would report.
    pub(super) fn exit_code(&self) -> u8 {
        let code = self.signal.map_or(self.code.unwrap_or(1), |signal| 128 + signal);
        // A failure must never look like a success.
        u8::try_from(code).ok().filter(|code| *code != 0).unwrap_or(1)
    }

    fn of(rank: u32, pid: u32, status: ExitStatus) -> Option<Self> {
        (!status.success()).then(|| Self { rank, pid, code: status.code(), signal: status.signal() })
    }
}

/// SIGINT, SIGTERM and SIGHUP of this process, from now on.
pub(super) fn forwarded_signals() -> anyhow::Result<mpsc::Receiver<Signal>> {
    let (sender, signals) = mpsc::channel(8);
    for (kind, name) in [
        (SignalKind::interrupt(), Signal::INT),
        (SignalKind::terminate(), Signal::TERM),
        (SignalKind::hangup(), Signal::HUP),
    ] {
        let mut stream = signal(kind).context("listen for signals")?;
        let sender = sender.clone();
        tokio::spawn(
            async move { while stream.recv().await.is_some() && sender.send(name).await.is_ok() {} },
        );
    }
    Ok(signals)
}

/// Starts all ranks and waits until all have ended. Must run on the program's main thread, see [`child::spawn`].
pub(super) async fn run(
    plan: &LaunchPlan,
    tagged: bool,
    mut signals: mpsc::Receiver<Signal>,
) -> anyhow::Result<Option<Failure>> {
    let mut output = JoinSet::new();
    let mut running = Running::default();
    let mut waits = FuturesUnordered::new();
    let mut restarts_left = plan.max_restarts;
    let mut to_start: Vec<u32> = (0..plan.local_world_size).collect();
    let mut first_failure = None;
    let mut freeing: Vec<JoinHandle<()>> = Vec::new();
    let mut kill_at: Option<Instant> = None;
    loop {
        for local_rank in to_start.drain(..) {
            let rank = plan.rank(local_rank);
            match child::spawn(plan, local_rank, tagged) {
                Ok(mut child) => {
                    forward_output(&mut output, rank, &mut child);
                    running.add(rank, &child);
                    waits.push(async move { (rank, child.wait().await) });
                }
                Err(error) => {
                    running.send_all(Signal::KILL);
                    return Err(error.into());
                }
            }
        }
        tokio::select! {
            ended = waits.next() => {
                let Some((rank, status)) = ended else { break };
                let status = status.context("wait for a rank")?;
                let pid = running.remove(rank);
                let Some(failure) = Failure::of(rank, pid.map_or(0, |pid| pid.as_raw_nonzero().get().cast_unsigned()), status)
                else {
                    continue;
                };
                // What it has started must not outlive it. The group's number cannot be in use by others yet.
                pid.inspect(|pid| send(*pid, Signal::KILL));
                // Its worker may wait for it, for ever.
                freeing.extend(runtime_dir().ok().map(|folder| release_in_background(folder, None)));
                if restarts_left > 0 && kill_at.is_none() {
                    restarts_left -= 1;
                    tracing::warn!(rank, pid = failure.pid, restarts_left, "this rank failed ({status}); starting it anew");
                    to_start.push(rank - plan.rank(0));
                    continue;
                }
                if first_failure.is_none() {
                    tracing::error!(rank, pid = failure.pid, "this rank failed ({status}); ending all ranks");
                    first_failure = Some(failure);
                }
                if kill_at.is_none() {
                    running.send_all(Signal::TERM);
                    kill_at = Some(Instant::now() + plan.grace);
                }
            }
            Some(signal) = signals.recv() => {
                if kill_at.is_none() {
                    tracing::info!("passing signal {} on to all ranks", signal.as_raw());
                    running.send_all(signal);
                    kill_at = Some(Instant::now() + plan.grace);
                } else {
                    kill_at = Some(Instant::now());
                }
            }
            () = sleep_until(kill_at) => {
                tracing::warn!(ranks = ?running.ranks(), "these ranks did not end in time and are killed");
                running.send_all(Signal::KILL);
                // A process in an uninterruptible wait dies when that ends; there is nothing else to do.
                kill_at = Some(Instant::now() + plan.grace.max(Duration::from_secs(1)));
            }
        }
    }
    for task in freeing {
        let _ = tokio::time::timeout(FREEING_WAIT, task).await;
    }
    // What a rank left running in the background may hold the pipe open.
    let drain = async { while output.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(OUTPUT_WAIT, drain).await;
    Ok(first_failure)
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

fn forward_output(tasks: &mut JoinSet<()>, rank: u32, child: &mut Child) {
    if let Some(stdout) = child.stdout.take() {
        tasks.spawn(output::tag(rank, stdout, std::io::stdout));
    }
    if let Some(stderr) = child.stderr.take() {
        tasks.spawn(output::tag(rank, stderr, std::io::stderr));
    }
}

/// Ranks that have not been waited for: their process numbers are still theirs.
#[derive(Default)]
struct Running(BTreeMap<u32, Pid>);

impl Running {
    fn add(&mut self, rank: u32, child: &Child) {
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        self.0.extend(pid.map(|pid| (rank, pid)));
    }

    fn remove(&mut self, rank: u32) -> Option<Pid> {
        self.0.remove(&rank)
    }

    fn ranks(&self) -> Vec<u32> {
        self.0.keys().copied().collect()
    }

    fn send_all(&self, signal: Signal) {
        self.0.values().for_each(|pid| send(*pid, signal));
    }
}

/// To a rank's process and all that it has started in its group.
fn send(group: Pid, signal: Signal) {
    // It may have ended by itself.
    let _ = kill_process_group(group, signal);
}
