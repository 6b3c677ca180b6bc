//! Child processes of a test: every wait has a deadline, output is kept for the failure message, and nothing outlives
//! the test.

use std::{
    ffi::OsStr,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader},
    process::{Child, ChildStdin, Command},
    sync::watch,
    task::JoinHandle,
};

/// Long enough for anything on a loaded machine; a test that works never waits so long.
pub const LONG: Duration = Duration::from_secs(60);

/// A command line that is not running yet.
#[derive(Debug)]
pub struct Program {
    command: Command,
    shown: String,
}

impl Program {
    /// The program at `path`. It does not see the variables that make a process a rank.
    pub fn new(path: impl AsRef<OsStr>) -> Self {
        let path = path.as_ref();
        let mut command = Command::new(path);
        for name in
            ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RUST_LOG"]
        {
            command.env_remove(name);
        }
        Self { command, shown: path.to_string_lossy().into_owned() }
    }

    /// Appends an argument.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.shown = format!("{} {}", self.shown, argument.as_ref().to_string_lossy());
        self.command.arg(argument);
        self
    }

    /// Appends arguments.
    pub fn args(self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        arguments.into_iter().fold(self, Program::arg)
    }

    /// Sets a variable.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Starts it, in a process group of its own.
    pub fn spawn(mut self) -> Process {
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.command.process_group(0).kill_on_drop(true);
        let mut child =
            self.command.spawn().unwrap_or_else(|error| panic!("cannot start {}: {error}", self.shown));
        let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        let pid = pid.unwrap_or_else(|| panic!("{} has no process id", self.shown));
        let stdin = child.stdin.take();
        let stdout = Captured::of(child.stdout.take());
        let stderr = Captured::of(child.stderr.take());
        Process { child, pid, shown: self.shown, _stdin: stdin, stdout, stderr }
    }

    /// Runs it to its end.
    pub async fn finish(self) -> Finished {
        self.spawn().finish(LONG).await
    }
}

/// A running child. Dropping it kills its whole process group.
#[derive(Debug)]
pub struct Process {
    child: Child,
    pid: Pid,
    shown: String,
    /// Kept open: a child started with `--exit-with-parent` ends when it is closed.
    _stdin: Option<ChildStdin>,
    stdout: Captured,
    stderr: Captured,
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only if the group is gone, which is what is wanted.
        let _ = kill_process_group(self.pid, Signal::KILL);
    }
}

impl Process {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().cast_unsigned()
    }

    /// Sends a signal to the process, not to its children.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal)
            .unwrap_or_else(|error| panic!("cannot signal {}: {error}\n{}", self.shown, self.logs()));
    }

    /// The same where it may have ended.
    pub fn signal_if_alive(&mut self, signal: Signal) {
        if self.is_alive() {
            self.signal(signal);
        }
    }

    /// Whether it runs or is stopped.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Kills it and waits until it is gone.
    pub async fn kill(&mut self) {
        self.signal(Signal::KILL);
        let gone = tokio::time::timeout(LONG, self.child.wait()).await;
        assert!(gone.is_ok(), "{} does not die", self.shown);
    }

    /// Closes its standard input.
    pub fn close_stdin(&mut self) {
        self._stdin = None;
    }

    /// Waits for a line of stdout that contains `text`.
    pub async fn stdout_line(&mut self, text: &str) -> String {
        let found = self.stdout.line(text).await;
        found.unwrap_or_else(|| panic!("{} never printed `{text}`\n{}", self.shown, self.logs()))
    }

    /// The same of a process that needs longer than [`LONG`].
    pub async fn stdout_line_within(&mut self, text: &str, within: Duration) -> String {
        let found = self.stdout.line_within(text, within).await;
        found.unwrap_or_else(|| {
            panic!("{} did not print `{text}` within {within:?}\n{}", self.shown, self.logs())
        })
    }

    /// Waits for a line of stderr that contains `text`.
    pub async fn stderr_line(&mut self, text: &str) -> String {
        let found = self.stderr.line(text).await;
        found.unwrap_or_else(|| panic!("{} never logged `{text}`\n{}", self.shown, self.logs()))
    }

    /// What it has written to stderr so far.
    pub fn stderr_text(&self) -> String {
        self.stderr.text()
    }

    /// Waits for its end and all of its output.
    pub async fn finish(mut self, within: Duration) -> Finished {
        let ended = tokio::time::timeout(within, self.child.wait()).await;
        let status = match ended {
            Ok(Ok(status)) => status,
            Ok(Err(error)) => panic!("cannot wait for {}: {error}", self.shown),
            Err(_) => panic!("{} did not end within {within:?}\n{}", self.shown, self.logs()),
        };
        // A grandchild may hold the pipes open; it belongs to the group that is killed on drop.
        self.stdout.end(within).await;
        self.stderr.end(within).await;
        Finished { status, shown: self.shown.clone(), stdout: self.stdout.text(), stderr: self.stderr.text() }
    }

    fn logs(&self) -> String {
        format!("--- stdout\n{}--- stderr\n{}", self.stdout.text(), self.stderr.text())
    }
}

/// A child that has ended.
#[derive(Clone, Debug)]
pub struct Finished {
    /// How.
    pub status: ExitStatus,
    /// All it printed.
    pub stdout: String,
    /// All it logged.
    pub stderr: String,
    shown: String,
}

impl Finished {
    /// Checks the exit code.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(
            self.status.code(),
            Some(code),
            "{} ended with {}\n--- stdout\n{}--- stderr\n{}",
            self.shown,
            self.status,
            self.stdout,
            self.stderr
        );
        self
    }

    /// The object that `--json` promises as the last line of stdout.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        let last = self.stdout.lines().last().unwrap_or_default();
        let parsed: Result<serde_json::Value, _> = serde_json::from_str(last);
        match parsed {
            Ok(value) if value.is_object() => value,
            _ => panic!("the last line of {} is no JSON object: `{last}`\n{}", self.shown, self.stderr),
        }
    }

    /// The one line that tells of a failure.
    #[track_caller]
    pub fn error_line(&self) -> &str {
        let lines: Vec<&str> = self.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        match lines.as_slice() {
            [line] => line,
            _ => panic!("{} printed {} error lines\n{}", self.shown, lines.len(), self.stderr),
        }
    }
}

/// The lines of one pipe so far.
#[derive(Debug)]
struct Captured {
    lines: Arc<Mutex<Vec<String>>>,
    grown: watch::Receiver<usize>,
    reader: JoinHandle<()>,
}

impl Captured {
    fn of(pipe: Option<impl AsyncRead + Unpin + Send + 'static>) -> Self {
        let lines = Arc::<Mutex<Vec<String>>>::default();
        let (grow, grown) = watch::channel(0);
        let into = lines.clone();
        let reader = tokio::spawn(async move {
            let Some(pipe) = pipe else { return };
            let mut reader = BufReader::new(pipe).split(b'\n');
            while let Ok(Some(line)) = reader.next_segment().await {
                let mut lines = into.lock().unwrap_or_else(PoisonError::into_inner);
                lines.push(String::from_utf8_lossy(&line).into_owned());
                grow.send_replace(lines.len());
            }
        });
        Self { lines, grown, reader }
    }

    fn text(&self) -> String {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(|line| format!("{line}\n")).collect()
    }

    async fn line(&mut self, text: &str) -> Option<String> {
        self.line_within(text, LONG).await
    }

    async fn line_within(&mut self, text: &str, within: Duration) -> Option<String> {
        let search = |captured: &Self| {
            let lines = captured.lines.lock().unwrap_or_else(PoisonError::into_inner);
            lines.iter().find(|line| line.contains(text)).cloned()
        };
        let wait = async {
            loop {
                if let Some(line) = search(self) {
                    return Some(line);
                }
                if self.grown.changed().await.is_err() {
                    return search(self);
                }
            }
        };
        tokio::time::timeout(within, wait).await.ok().flatten()
    }

    async fn end(&mut self, within: Duration) {
        if tokio::time::timeout(within.min(Duration::from_secs(5)), &mut self.reader).await.is_err() {
            self.reader.abort();
        }
    }
}
