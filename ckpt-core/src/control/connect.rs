//! How a rank reaches the hub: tries, greets, and says in one line why it could not.

use std::time::{Duration, Instant};

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::{sleep_until, timeout_at},
};

use super::{
    address::HubAddress,
    codec::{BoxWrite, GREETING_FRAME_BYTES, ReceiveError, Receiver, encode},
    message::{ToHub, ToRank},
    server::Hub,
    server_gate::CHECK_TOKEN,
    session::SessionConfig,
    token::{Token, TokenSource},
};
use crate::{
    error::{Error, ErrorKind, Key, Recovery, Result},
    tls::{HandshakeError, JobTls, SecureStream},
};

/// One attempt to open a connection.
const TRY_FOR: Duration = Duration::from_secs(3);
/// From an open connection to the hub's answer.
const GREET_FOR: Duration = Duration::from_secs(10);
const GREET: &str = "greet the hub";
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// A connection whose hub has said welcome.
pub(super) struct Connected {
    pub(super) receiver: Receiver,
    pub(super) writer: BoxWrite,
    pub(super) heartbeat: Duration,
    pub(super) dead_after: Duration,
    /// When the greeting that was answered was sent: the first lease counts from here.
    pub(super) greeted_at: Instant,
}

/// One failed attempt.
enum Attempt {
    /// May go better the next time.
    Again(Error),
    /// Will not.
    Never(Error),
}

/// How the hub is reached.
#[derive(Clone, Copy)]
pub(super) enum Way<'a> {
    /// Over TCP, by the configured address.
    Tcp,
    /// Inside this process.
    InProcess(&'a Hub),
}

/// Tries until the hub welcomes or refuses for good, or the join deadline passes: rank 0 may start later.
pub(super) async fn connect(config: &SessionConfig, way: Way<'_>) -> Result<Connected> {
    let deadline = Instant::now() + config.deadlines.join;
    let mut refused_until = None;
    let mut pause = FIRST_PAUSE;
    loop {
        let error = match attempt(config, way, deadline).await {
            Ok(connected) => return Ok(connected),
            Err(Attempt::Never(error)) => return Err(error),
            Err(Attempt::Again(error)) => error,
        };
        let next = Instant::now() + pause;
        if error.recovery() == Recovery::Retry {
            // A refusal that may go away does so soon: the hub still believes in a predecessor that died without a
            // word, or the token file is an old one.
            let until =
                *refused_until.get_or_insert_with(|| Instant::now() + config.deadlines.dead_after * 3 / 2);
            if next >= until.min(deadline) {
                return Err(error.recovery_is(Recovery::Fatal));
            }
        } else if next >= deadline {
            return Err(give_up(config, &error));
        }
        tracing::debug!(rank = config.rank, hub = %config.address, %error, "not joined yet");
        sleep_until(next.into()).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// The last attempt's error with what the user can do.
fn give_up(config: &SessionConfig, last: &Error) -> Error {
    Error::new(
        ErrorKind::Timeout,
        "join the job",
        format!(
            "rank {} found no hub at {} within {:.0?} ({}); is rank 0 running, and are MASTER_ADDR and MASTER_PORT the \
             same on all ranks?",
            config.rank,
            config.address,
            config.deadlines.join,
            last.message(),
        ),
    )
}

async fn attempt(config: &SessionConfig, way: Way<'_>, deadline: Instant) -> Result<Connected, Attempt> {
    if let Way::InProcess(hub) = way {
        let (read, write) = tokio::io::split(hub.attach());
        return greet(config, read, write, deadline).await;
    }
    let stream =
        open(&config.address, deadline.min(Instant::now() + TRY_FOR)).await.map_err(Attempt::Again)?;
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    if !config.tls {
        let (read, write) = stream.into_split();
        return greet(config, read, write, deadline).await;
    }
    let (read, write) = tokio::io::split(secure(config, stream, deadline).await?);
    greet(config, read, write, deadline).await
}

async fn secure(
    config: &SessionConfig,
    stream: TcpStream,
    deadline: Instant,
) -> Result<SecureStream, Attempt> {
    let fail = |operation, kind, message: String| {
        Error::new(kind, operation, message).with(Key::Peer, &config.address)
    };
    let tls = JobTls::new(config.read_token()?.reveal()).map_err(Attempt::Never)?;
    let deadline = deadline.min(Instant::now() + GREET_FOR);
    match timeout_at(deadline.into(), tls.connect(stream)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(HandshakeError::NotTls)) => Err(Attempt::Never(fail(
            GREET,
            ErrorKind::ConfigInvalid,
            format!(
                "rank {} wants TLS and the hub does not speak it; give --tls or CKPT_TLS=1 to all ranks or to none",
                config.rank
            ),
        ))),
        Ok(Err(HandshakeError::OtherToken)) => {
            let cause = fail(
                CHECK_TOKEN,
                ErrorKind::ConfigInvalid,
                format!(
                    "the hub's TLS key was made of another token than rank {} has; give all ranks the same CKPT_TOKEN",
                    config.rank
                ),
            )
            .recovery_is(Recovery::Retry);
            Err(if may_go_away(config, &cause) { Attempt::Again(cause) } else { Attempt::Never(cause) })
        }
        Ok(Err(error @ HandshakeError::Broken(_))) => {
            Err(Attempt::Again(fail(GREET, ErrorKind::PeerLost, error.to_string())))
        }
        Err(_) => {
            let message = "the connection was accepted and no TLS handshake came".to_owned();
            Err(Attempt::Again(fail(GREET, ErrorKind::Timeout, message)))
        }
    }
}

async fn open(address: &HubAddress, deadline: Instant) -> Result<TcpStream> {
    let fail = |message: String| Error::new(ErrorKind::Unavailable, "connect to the hub", message);
    let tries = async {
        let mut last = fail(format!("the name {} has no address", address.host));
        match address.resolve().await {
            Err(e) => last = fail(format!("cannot resolve {}: {e}", address.host)),
            Ok(addresses) => {
                for address in addresses {
                    match TcpStream::connect(address).await {
                        Ok(stream) => return Ok(stream),
                        Err(e) => last = fail(e.to_string()),
                    }
                }
            }
        }
        Err(last)
    };
    match timeout_at(deadline.into(), tries).await {
        Ok(result) => result,
        Err(_) => Err(fail(format!("no answer from {}", address.host))),
    }
}

async fn greet(
    config: &SessionConfig,
    read: impl AsyncRead + Send + Unpin + 'static,
    mut write: impl AsyncWrite + Send + Unpin + 'static,
    deadline: Instant,
) -> Result<Connected, Attempt> {
    let fail = |kind, message: String| Error::new(kind, GREET, message).with(Key::Peer, &config.address);
    let deadline = deadline.min(Instant::now() + GREET_FOR);
    let hello = config.hello(config.read_token()?);
    let frame = encode(&ToHub::Hello(hello), GREETING_FRAME_BYTES).map_err(Attempt::Never)?;
    let greeted_at = Instant::now();
    let mut receiver = Receiver::new(Box::new(read));
    let exchange = async {
        write.write_all(&frame).await.map_err(ReceiveError::Io)?;
        write.flush().await.map_err(ReceiveError::Io)?;
        receiver.next::<ToRank>().await
    };
    let reply = match timeout_at(deadline.into(), exchange).await {
        Err(_) => {
            let message = "the connection was accepted and then nothing was said".to_owned();
            return Err(Attempt::Again(fail(ErrorKind::Timeout, message)));
        }
        Ok(reply) => reply,
    };
    let foreign = || {
        fail(
            ErrorKind::ConfigInvalid,
            format!(
                "something that is no hub of ckpt answers at {}; choose another MASTER_PORT",
                config.address
            ),
        )
    };
    match reply {
        Ok(ToRank::Welcome { heartbeat_ms, dead_after_ms }) => {
            receiver.trust();
            Ok(Connected {
                receiver,
                writer: Box::new(write),
                heartbeat: Duration::from_millis(heartbeat_ms.clamp(1, 3_600_000)),
                dead_after: Duration::from_millis(dead_after_ms.clamp(1, 86_400_000)),
                greeted_at,
            })
        }
        Ok(ToRank::Refused { cause }) if may_go_away(config, &cause) => Err(Attempt::Again(cause)),
        Ok(ToRank::Refused { cause }) => Err(Attempt::Never(cause)),
        Ok(_) | Err(ReceiveError::Foreign | ReceiveError::TooLong { .. } | ReceiveError::Malformed(_)) => {
            Err(Attempt::Never(foreign()))
        }
        Err(error @ ReceiveError::Version { .. }) => Err(Attempt::Never(fail(
            ErrorKind::ConfigInvalid,
            format!("{error}; install the same ckpt on all nodes"),
        ))),
        Err(error @ (ReceiveError::Closed | ReceiveError::Io(_))) => {
            Err(Attempt::Again(fail(ErrorKind::PeerLost, error.to_string())))
        }
    }
}

impl SessionConfig {
    fn read_token(&self) -> Result<Token, Attempt> {
        self.token.read().map_err(|error| match self.token {
            // Rank 0 writes the file when its hub is up.
            TokenSource::File(_) => Attempt::Again(error),
            TokenSource::Known(_) => Attempt::Never(error),
        })
    }
}

fn may_go_away(config: &SessionConfig, cause: &Error) -> bool {
    // A token that is known does not change.
    let hopeless = cause.operation() == CHECK_TOKEN && matches!(config.token, TokenSource::Known(_));
    cause.recovery() == Recovery::Retry && !hopeless
}
