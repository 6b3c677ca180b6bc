//! Chrome's trace format, which chrome://tracing and Perfetto show. Times are in microseconds.

use std::{io, path::Path};

use anyhow::Context as _;
use serde_json::{Value, json};

/// Events in the making. Places are a process and a thread of it.
#[derive(Debug, Default)]
pub(crate) struct ChromeTrace {
    events: Vec<Value>,
}

impl ChromeTrace {
    /// Names a process.
    pub(crate) fn process(&mut self, pid: u32, name: &str) {
        self.events.push(json!({ "ph": "M", "name": "process_name", "pid": pid, "args": { "name": name } }));
    }

    /// Names a thread.
    pub(crate) fn thread(&mut self, (pid, tid): (u32, u32), name: &str) {
        self.events.push(
            json!({ "ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": { "name": name } }),
        );
    }

    /// Something that took a while: `at` is its start and its length.
    pub(crate) fn span<T: Into<Value>>(
        &mut self,
        (pid, tid): (u32, u32),
        name: &str,
        category: &str,
        (start, length): (T, T),
        args: Option<Value>,
    ) {
        let (start, length): (Value, Value) = (start.into(), length.into());
        let mut event = json!({
            "ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid, "ts": start, "dur": length,
        });
        if let Some(args) = args {
            event["args"] = args;
        }
        self.events.push(event);
    }

    /// A moment of a process.
    pub(crate) fn mark(
        &mut self,
        (pid, tid): (u32, u32),
        name: &str,
        category: &str,
        at: impl Into<Value>,
        args: Value,
    ) {
        let at: Value = at.into();
        self.events.push(json!({
            "ph": "i", "s": "p", "name": name, "cat": category, "pid": pid, "tid": tid, "ts": at, "args": args,
        }));
    }

    /// All of it, as one JSON object.
    pub(crate) fn write_to(self, into: impl io::Write) -> io::Result<()> {
        let whole = json!({ "displayTimeUnit": "ms", "traceEvents": self.events });
        serde_json::to_writer(into, &whole).map_err(io::Error::from)
    }

    /// The same into a file.
    pub(crate) fn write(self, file: &Path) -> anyhow::Result<()> {
        let write = || {
            let mut into = io::BufWriter::new(std::fs::File::create(file)?);
            self.write_to(&mut into)?;
            io::Write::flush(&mut into)
        };
        write().with_context(|| format!("write the trace to {}", file.display()))
    }
}
