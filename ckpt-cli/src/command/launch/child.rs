//! One rank's process.

use std::process::Stdio;

use ckpt_core::{Error, ErrorKind, Key};
use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};
use tokio::process::{Child, Command};

use super::{LaunchPlan, OPERATION};

/// Starts the process of `local_rank`.
///
/// The kernel kills it when the *thread* that calls this ends, so that must be the program's main thread.
pub(super) fn spawn(plan: &LaunchPlan, local_rank: u32, tagged: bool) -> Result<Child, Error> {
    let [program, arguments @ ..] = plan.command.as_slice() else {
        return Err(super::invalid("no command was given; put it after --"));
    };
    let output = || if tagged { Stdio::piped() } else { Stdio::inherit() };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .envs(plan.variables(local_rank))
        .stdin(Stdio::null())
        .stdout(output())
        .stderr(output())
        // Its own group: a signal reaches what it has started too, and Ctrl-C reaches it only through us.
        .process_group(0)
        .kill_on_drop(true);
    let launcher = getpid();
    // SAFETY: between fork and exec the closure makes two system calls (prctl, getppid), allocates nothing and takes
    // no lock, so it is async-signal-safe; the values that it captures are `Copy`.
    unsafe { command.pre_exec(move || die_with(launcher)) };
    command.spawn().map_err(|e| {
        let name = program.to_string_lossy();
        let message = match e.kind() {
            std::io::ErrorKind::NotFound => format!("cannot start {name:?}: there is no such program"),
            _ => format!("cannot start {name:?}: {e}"),
        };
        Error::new(ErrorKind::ConfigInvalid, OPERATION, message).with(Key::Rank, plan.rank(local_rank))
    })
}

/// Runs in the child.
fn die_with(launcher: Pid) -> std::io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // The launcher may have died before the line above.
    if getppid() != Some(launcher) {
        return Err(std::io::ErrorKind::Other.into());
    }
    Ok(())
}
