//! One error for every seam: what kind it is, what the caller should do next, and who or what is to blame.

use std::{borrow::Cow, fmt, sync::Arc};

use serde::{Deserialize, Serialize};

/// The result of every fallible call in this workspace's libraries.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as a closed set that callers can match on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The caller asked for something that cannot be right; the message names the setting.
    ConfigInvalid,
    /// A library, device or service is not there.
    Unavailable,
    /// It is there and cannot do this.
    Unsupported,
    /// A deadline passed.
    Timeout,
    /// A peer process, worker or link died.
    PeerLost,
    /// Ended because something else failed first; the message carries the first cause.
    Aborted,
    /// Memory, descriptors or queue slots ran out.
    ResourceExhausted,
    /// A native library or the operating system reported an error.
    Backend,
    /// Bytes are not what they must be: a bad header, a wrong digest, a protocol violation.
    Corrupt,
    /// A bug in this program.
    Internal,
}

/// What the driver may do after an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Recovery {
    /// The same call may succeed if repeated.
    Retry,
    /// The communicator must be rebuilt first; the process can go on.
    Rebuild,
    /// Nothing will help without a change from outside.
    Fatal,
}

/// The fixed words under which an error names its culprit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Key {
    /// The rank that failed.
    Rank,
    /// The rank or address on the other side.
    Peer,
    /// A host name.
    Host,
    /// A process id.
    Pid,
    /// The inference worker, by device UUID.
    Worker,
    /// A device, by UUID or index.
    Device,
    /// The bucket in flight.
    Bucket,
    /// A tensor's name.
    Tensor,
    /// An RDMA device.
    Hca,
    /// A port.
    Port,
    /// A file.
    Path,
    /// A URL or socket.
    Endpoint,
    /// A native library's error code, with its name.
    Code,
}

impl Key {
    /// The word printed in messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Key::Rank => "rank",
            Key::Peer => "peer",
            Key::Host => "host",
            Key::Pid => "pid",
            Key::Worker => "worker",
            Key::Device => "device",
            Key::Bucket => "bucket",
            Key::Tensor => "tensor",
            Key::Hca => "hca",
            Key::Port => "port",
            Key::Path => "path",
            Key::Endpoint => "endpoint",
            Key::Code => "code",
        }
    }
}

/// The error of every seam. Cheap to clone, so that one cause can be told to every rank.
#[derive(Clone, Serialize, Deserialize)]
pub struct Error {
    kind: ErrorKind,
    recovery: Recovery,
    operation: Cow<'static, str>,
    message: String,
    context: Vec<(Key, String)>,
    #[serde(skip)]
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// `operation` is what was being done ("open checkpoint"); `message` says what happened and what to do.
    pub fn new(kind: ErrorKind, operation: &'static str, message: impl Into<String>) -> Self {
        let recovery = match kind {
            ErrorKind::Timeout | ErrorKind::PeerLost | ErrorKind::Aborted => Recovery::Rebuild,
            _ => Recovery::Fatal,
        };
        Self {
            kind,
            recovery,
            operation: Cow::Borrowed(operation),
            message: message.into(),
            context: Vec::new(),
            source: None,
        }
    }

    /// Names a culprit. Keys are printed in the order in which they were added; the first value of a key stays.
    pub fn with(mut self, key: Key, value: impl fmt::Display) -> Self {
        if self.get(key).is_none() {
            self.context.push((key, value.to_string()));
        }
        self
    }

    /// The same with another value under `key`, if it has one: what a part counted by its own numbers.
    pub fn renamed(mut self, key: Key, new: impl FnOnce(&str) -> String) -> Self {
        if let Some((_, value)) = self.context.iter_mut().find(|(k, _)| *k == key) {
            *value = new(value);
        }
        self
    }

    /// Overrides what the driver may do next.
    pub fn recovery_is(mut self, recovery: Recovery) -> Self {
        self.recovery = recovery;
        self
    }

    /// Keeps the underlying error; its text is printed after the message.
    pub fn caused_by(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(Arc::from(source.into()));
        self
    }

    /// Says what happened afterwards, behind the message.
    #[must_use]
    pub fn followed_by(mut self, text: impl fmt::Display) -> Self {
        self.message = format!("{}; {text}", self.message);
        self
    }

    /// The kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What the driver may do next.
    pub fn recovery(&self) -> Recovery {
        self.recovery
    }

    /// What was being done.
    pub fn operation(&self) -> &str {
        &self.operation
    }

    /// What happened, without operation, culprit or cause.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The named culprit, if this error names one under `key`.
    pub fn get(&self, key: Key) -> Option<&str> {
        self.context.iter().find(|(k, _)| *k == key).map(|(_, v)| v.as_str())
    }

    /// All that it names, each key once.
    pub fn context(&self) -> impl Iterator<Item = (Key, &str)> {
        self.context.iter().map(|(key, value)| (*key, value.as_str()))
    }

    /// The same error fit for a wire: causes that are not serializable become text.
    pub fn flattened(&self) -> Self {
        let mut flat = self.clone();
        if let Some(source) = flat.source.take() {
            flat.message = format!("{}: {}", flat.message, chain(&*source));
        }
        flat
    }
}

fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

/// One line: `operation: message [rank=3 worker=GPU-...]: cause`.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.operation, self.message)?;
        if !self.context.is_empty() {
            let words: Vec<String> =
                self.context.iter().map(|(k, v)| format!("{}={v}", k.as_str())).collect();
            write!(f, " [{}]", words.join(" "))?;
        }
        if let Some(source) = &self.source {
            write!(f, ": {}", chain(&**source))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({:?}, {:?}, {self})", self.kind, self.recovery)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|s| &**s as &(dyn std::error::Error + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_that_names_the_culprit_and_survives_the_wire() {
        let io = std::io::Error::other("connection reset");
        let error = Error::new(ErrorKind::PeerLost, "broadcast", "the link to a peer broke")
            .with(Key::Rank, 3)
            .with(Key::Rank, 4)
            .caused_by(io);
        assert_eq!(error.to_string(), "broadcast: the link to a peer broke [rank=3]: connection reset");
        assert_eq!(error.recovery(), Recovery::Rebuild);
        let renamed =
            error.clone().renamed(Key::Rank, |rank| format!("{rank}0")).renamed(Key::Peer, str::to_owned);
        assert_eq!((renamed.get(Key::Rank), renamed.get(Key::Peer)), (Some("30"), None));
        let bytes = postcard::to_allocvec(&error.flattened()).unwrap();
        let back: Error = postcard::from_bytes(&bytes).unwrap();
        assert_eq!(back.kind(), ErrorKind::PeerLost);
        assert_eq!(back.to_string(), "broadcast: the link to a peer broke: connection reset [rank=3]");
    }
}
