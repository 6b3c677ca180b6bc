//! Processes on this host that are stopped: they keep their sockets open and answer nothing, so nothing else tells.

use std::{path::Path, time::Duration};

use rustix::process::Pid;
use tokio::net::UnixStream;

/// How often a process is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// A process that was stopped this long is given up: as long as a rank may be silent.
pub(crate) const STOPPED_FOR: Duration = Duration::from_secs(5);

/// Completes once the process has been stopped, as by SIGSTOP, for [`STOPPED_FOR`]; never for one that cannot be seen
/// (another container, another host) or that a debugger holds.
pub(crate) async fn stopped(pid: Option<i32>) -> i32 {
    let pid = match pid.filter(|pid| is_visible(*pid)) {
        Some(pid) => pid,
        None => return std::future::pending().await,
    };
    let mut looks = tokio::time::interval(LOOK);
    // Looks and not a clock: a pause of this process itself must not count for the other one's.
    let mut seen = 0;
    loop {
        looks.tick().await;
        seen = if is_stopped(pid) { seen + 1 } else { 0 };
        if seen > STOPPED_FOR.as_millis() / LOOK.as_millis() {
            return pid;
        }
    }
}

/// What an error says of it.
pub(crate) fn told(pid: i32, whose: &str) -> String {
    let seconds = STOPPED_FOR.as_secs();
    format!("{whose}'s process {pid} has been stopped for {seconds} s (as by SIGSTOP); resume or restart it")
}

/// Whether it is stopped now.
pub(crate) fn is_stopped(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold anything.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
}

fn is_visible(pid: i32) -> bool {
    Pid::from_raw(pid).is_some() && Path::new(&format!("/proc/{pid}/stat")).exists()
}

/// The process that listens on a UNIX socket. It need not accept: the kernel knows.
pub(crate) async fn listener_of(socket: &Path) -> Option<i32> {
    UnixStream::connect(socket).await.ok()?.peer_cred().ok()?.pid()
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, process::Command, time::Instant};

    use rustix::process::{Signal, kill_process};

    use super::*;

    #[tokio::test]
    async fn a_stopped_process_is_found_and_a_running_one_is_not() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let pid = child.id().cast_signed();
        let signal = |signal| kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
        let soon = STOPPED_FOR + Duration::from_secs(20);
        tokio::time::timeout(2 * LOOK, stopped(Some(pid))).await.unwrap_err();
        let begun = Instant::now();
        signal(Signal::STOP);
        assert_eq!(tokio::time::timeout(soon, stopped(Some(pid))).await.unwrap(), pid);
        assert!(begun.elapsed() >= STOPPED_FOR);
        signal(Signal::KILL);
        child.wait().unwrap();
        tokio::time::timeout(LOOK, stopped(Some(pid))).await.unwrap_err();
        tokio::time::timeout(LOOK, stopped(None)).await.unwrap_err();
    }

    #[tokio::test]
    async fn the_listener_of_a_socket_is_known_before_it_accepts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(listener_of(&path).await, Some(std::process::id().cast_signed()));
        drop(listener);
        assert_eq!(listener_of(&path).await, None);
    }
}
