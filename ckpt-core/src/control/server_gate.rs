//! The gate in front of the hub: nobody gets to the hub's task without a valid greeting.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    sync::mpsc,
    time::{timeout, timeout_at},
};

use super::{
    codec::{BoxRead, BoxWrite, GREETING_FRAME_BYTES, PROTOCOL_VERSION, ReceiveError, Receiver, encode},
    message::{Hello, ToHub, ToRank},
    server::HubOptions,
    server_core::Input,
    token::Token,
};
use crate::{
    error::{Error, ErrorKind, Key, Recovery, Result},
    tls::{self, HandshakeError, JobTls, Meeting},
};

/// The operation of a refusal because of the token: a rank that reads it from a file tries again.
pub(super) const CHECK_TOKEN: &str = "check the job's token";

/// From accepted to greeted.
const GREET_FOR: Duration = Duration::from_secs(5);
/// For a refusal to get out.
const REFUSE_FOR: Duration = Duration::from_secs(1);
/// How much of a stranger's words is repeated in messages.
const QUOTED_CHARS: usize = 64;

/// How a connection from outside gets to the gate.
#[derive(Clone, Debug)]
pub(super) struct Door {
    pub(super) gate: Arc<Gate>,
    pub(super) tls: Option<JobTls>,
}

impl Door {
    /// Shakes hands where the job has TLS, and passes the connection on. Ends in bounded time.
    pub(super) async fn open(self, stream: TcpStream, peer: &str) {
        let until = self.gate.deadline();
        let meeting = match timeout_at(until.into(), tls::meet(&stream, self.tls.is_some())).await {
            Ok(Ok(meeting)) => meeting,
            // It said nothing.
            Ok(Err(_)) | Err(_) => return tracing::debug!(peer, "a connection said nothing and is closed"),
        };
        match (meeting, &self.tls) {
            (Meeting::Fits, None) => {
                let (read, write) = stream.into_split();
                self.gate.admit(Box::new(read), Box::new(write), peer, until).await;
            }
            (Meeting::Fits, Some(tls)) => match timeout_at(until.into(), tls.accept(stream)).await {
                Ok(Ok(stream)) => {
                    let (read, write) = tokio::io::split(stream);
                    self.gate.admit(Box::new(read), Box::new(write), peer, until).await;
                }
                Ok(Err(error @ HandshakeError::OtherToken)) => {
                    tracing::warn!(peer, %error, "refused a connection");
                }
                Ok(Err(error)) => tracing::debug!(peer, %error, "a connection is closed"),
                Err(_) => tracing::debug!(peer, "a TLS handshake took too long"),
            },
            (Meeting::WantsPlain, _) => {
                tracing::warn!(peer, "refused a connection without TLS");
                let message = "the hub wants TLS and this rank does not; give --tls or CKPT_TLS=1 to all ranks or to none";
                if let Ok(frame) = refusal_frame(refusal("join the job", message.to_owned())) {
                    tls::farewell(stream, &frame).await;
                }
            }
            (Meeting::WantsTls, _) => {
                tracing::warn!(peer, "refused a connection with TLS, which this job does not use");
                tls::refuse_tls(stream).await;
            }
        }
    }
}

/// Checks greetings.
#[derive(Debug)]
pub(super) struct Gate {
    job: String,
    token: Token,
    world_size: u32,
    greet_for: Duration,
    inputs: mpsc::Sender<Input>,
}

impl Gate {
    pub(super) fn new(options: &HubOptions, inputs: mpsc::Sender<Input>) -> Self {
        Self {
            job: options.job.clone(),
            token: options.token.clone(),
            world_size: options.world_size,
            greet_for: GREET_FOR.min(options.deadlines.join),
            inputs,
        }
    }

    /// When a connection that comes now must have greeted.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.greet_for
    }

    /// Reads the greeting; passes the connection on or refuses it. Ends in bounded time.
    pub(super) async fn admit(&self, read: BoxRead, write: BoxWrite, peer: &str, until: Instant) {
        let mut receiver = Receiver::new(read);
        let cause = match timeout_at(until.into(), receiver.next::<ToHub>()).await {
            Err(_) => {
                tracing::debug!(peer, "a connection said nothing and is closed");
                return;
            }
            Ok(Ok(ToHub::Hello(hello))) => match self.check(&hello) {
                Ok(()) => {
                    receiver.trust();
                    // If the hub's task is gone, the connection is closed by being dropped here.
                    let _ = self.inputs.send(Input::Arrived { hello, receiver, write }).await;
                    return;
                }
                Err(cause) => cause,
            },
            // The refusal's own header tells the other side which version it met.
            Ok(Err(error @ ReceiveError::Version { .. })) => {
                refusal("greet a rank", format!("{error}; install the same ckpt on all nodes"))
            }
            Ok(Ok(_)) => refusal("greet a rank", "the first message must be a greeting".into()),
            Ok(Err(error)) => {
                tracing::debug!(peer, %error, "a connection is not from a rank and is closed");
                return;
            }
        };
        tracing::warn!(peer, %cause, "refused a connection");
        refuse(write, cause).await;
    }

    fn check(&self, hello: &Hello) -> Result<()> {
        const GREET: &str = "join the job";
        let rank = hello.rank;
        if hello.protocol != PROTOCOL_VERSION {
            return Err(refusal(
                GREET,
                format!(
                    "rank {rank} speaks version {} of the control protocol and the hub version {PROTOCOL_VERSION}; \
                     install the same ckpt on all nodes",
                    hello.protocol
                ),
            ));
        }
        if hello.job != self.job {
            return Err(refusal(
                GREET,
                format!(
                    "the hub on this port belongs to job {:?} and rank {rank} to job {:?}; choose another MASTER_PORT",
                    quoted(&self.job),
                    quoted(&hello.job)
                ),
            ));
        }
        if !self.token.matches(&hello.token) {
            return Err(refusal(
                CHECK_TOKEN,
                format!("rank {rank} has another token than the hub; give all ranks the same CKPT_TOKEN"),
            )
            .recovery_is(Recovery::Retry));
        }
        if hello.world_size != self.world_size {
            return Err(refusal(
                GREET,
                format!(
                    "rank {rank} believes in a job of {} ranks and the hub in one of {}; give all ranks the same \
                     WORLD_SIZE",
                    hello.world_size, self.world_size
                ),
            ));
        }
        if rank >= self.world_size {
            return Err(refusal(
                GREET,
                format!("rank {rank} is not below the job's {} ranks; check RANK", self.world_size),
            )
            .with(Key::Rank, rank));
        }
        Ok(())
    }
}

fn refusal(operation: &'static str, message: String) -> Error {
    Error::new(ErrorKind::ConfigInvalid, operation, message)
}

fn quoted(text: &str) -> String {
    text.chars().take(QUOTED_CHARS).collect()
}

fn refusal_frame(cause: Error) -> Result<Bytes> {
    encode(&ToRank::Refused { cause }, GREETING_FRAME_BYTES)
}

/// Says why and closes.
pub(super) async fn refuse(mut write: BoxWrite, cause: Error) {
    let Ok(frame) = refusal_frame(cause) else { return };
    let say = async {
        write.write_all(&frame).await?;
        write.shutdown().await
    };
    // The other side may be gone already; nobody is left to be told.
    let _ = timeout(REFUSE_FOR, say).await;
}
