//! Frames on a control connection.
//!
//! ```text
//! length: u32, big endian, of all that follows | 0xCB | protocol version: u8 | message, postcard
//! ```
//! The length is checked against a limit before a byte is reserved for it. The two bytes before each message tell a
//! foreign service and another version of this one apart from a damaged message, whatever the message holds.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Instant,
};

use bytes::Bytes;
use futures_util::StreamExt;
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::codec::{FramedRead, LengthDelimitedCodec, LengthDelimitedCodecError};

use super::message::{ToHub, ToRank};
use crate::error::{Error, ErrorKind, Result};

/// Version of the messages; both sides must have the same.
pub const PROTOCOL_VERSION: u32 = 1;

/// Longest frame before the sender has shown that it belongs to the job.
pub(crate) const GREETING_FRAME_BYTES: usize = 64 << 10;
/// Longest frame afterwards: the metas of all ranks of a very large job fit.
pub(crate) const FRAME_BYTES: usize = 256 << 20;

const MAGIC: u8 = 0xCB;
const VERSION: u8 = PROTOCOL_VERSION as u8;
const LENGTH_BYTES: usize = 4;

pub(crate) type BoxRead = Box<dyn AsyncRead + Send + Unpin>;
pub(crate) type BoxWrite = Box<dyn AsyncWrite + Send + Unpin>;

/// A message that crosses a control connection.
pub(crate) trait Message: Serialize + DeserializeOwned + Clone {
    /// The same with errors whose causes became text; `None` if there is nothing to change.
    fn flattened(&self) -> Option<Self>;
}

impl Message for ToHub {
    fn flattened(&self) -> Option<Self> {
        match self {
            ToHub::Finished { epoch, failure: Some(failure) } => {
                Some(ToHub::Finished { epoch: *epoch, failure: Some(failure.flattened()) })
            }
            ToHub::Failed { epoch, cause } => Some(ToHub::Failed { epoch: *epoch, cause: cause.flattened() }),
            _ => None,
        }
    }
}

impl Message for ToRank {
    fn flattened(&self) -> Option<Self> {
        match self {
            ToRank::Refused { cause } => Some(ToRank::Refused { cause: cause.flattened() }),
            ToRank::GatherFailed { name, cause } => {
                Some(ToRank::GatherFailed { name: name.clone(), cause: cause.flattened() })
            }
            ToRank::Closed { epoch, failure: Some(failure) } => {
                Some(ToRank::Closed { epoch: *epoch, failure: Some(failure.flattened()) })
            }
            ToRank::Abort { epoch, cause } => Some(ToRank::Abort { epoch: *epoch, cause: cause.flattened() }),
            _ => None,
        }
    }
}

/// A whole frame, ready to be written; an error if it is longer than `limit`.
pub(crate) fn encode<T: Message>(message: &T, limit: usize) -> Result<Bytes> {
    let flattened = message.flattened();
    let mut frame = Vec::with_capacity(128);
    frame.extend_from_slice(&[0, 0, 0, 0, MAGIC, VERSION]);
    let mut frame = postcard::to_extend(flattened.as_ref().unwrap_or(message), frame).map_err(|e| {
        Error::new(ErrorKind::Internal, "encode a control message", "it has no encoding").caused_by(e)
    })?;
    let len = frame.len() - LENGTH_BYTES;
    match u32::try_from(len) {
        Ok(prefix) if len <= limit => frame[..LENGTH_BYTES].copy_from_slice(&prefix.to_be_bytes()),
        _ => {
            return Err(Error::new(
                ErrorKind::ResourceExhausted,
                "encode a control message",
                format!("it takes {len} bytes and the limit is {limit}; send bulk data through a transport"),
            ));
        }
    }
    Ok(Bytes::from(frame))
}

/// Why the next message of a connection could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReceiveError {
    #[error("the connection was closed")]
    Closed,
    #[error("the connection broke: {0}")]
    Io(std::io::Error),
    #[error("the other side does not speak ckpt's control protocol")]
    Foreign,
    #[error(
        "the other side speaks version {theirs} of the control protocol and this program version {VERSION}"
    )]
    Version { theirs: u8 },
    #[error("a message of more than {limit} bytes")]
    TooLong { limit: usize },
    #[error("a damaged message: {0}")]
    Malformed(String),
}

/// The message in a frame's bytes after the length.
pub(crate) fn decode<T: Message>(frame: &[u8]) -> Result<T, ReceiveError> {
    let [MAGIC, version, body @ ..] = frame else { return Err(ReceiveError::Foreign) };
    if *version != VERSION {
        return Err(ReceiveError::Version { theirs: *version });
    }
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(ReceiveError::Malformed(format!("{} bytes after its end", rest.len()))),
        Err(error) => Err(ReceiveError::Malformed(error.to_string())),
    }
}

/// When bytes last came in. Slow large messages count as a sign of life while they arrive.
#[derive(Clone, Debug)]
pub(crate) struct Heard(Arc<Mutex<Instant>>);

impl Heard {
    fn lock(&self) -> MutexGuard<'_, Instant> {
        // An `Instant` is valid whatever happened to its last holder.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The instant.
    pub(crate) fn at(&self) -> Instant {
        *self.lock()
    }
}

/// The reading half of a connection.
pub(crate) struct Receiver {
    frames: FramedRead<Listening, LengthDelimitedCodec>,
    heard: Heard,
}

impl Receiver {
    /// Frames of at most [`GREETING_FRAME_BYTES`] until [`Self::trust`] is called.
    pub(crate) fn new(io: BoxRead) -> Self {
        let heard = Heard(Arc::new(Mutex::new(Instant::now())));
        let codec = LengthDelimitedCodec::builder().max_frame_length(GREETING_FRAME_BYTES).new_codec();
        let frames = FramedRead::new(Listening { io, heard: heard.clone() }, codec);
        Self { frames, heard }
    }

    /// The other side has shown that it belongs to the job.
    pub(crate) fn trust(&mut self) {
        self.frames.decoder_mut().set_max_frame_length(FRAME_BYTES);
    }

    /// When bytes last came in.
    pub(crate) fn heard(&self) -> Heard {
        self.heard.clone()
    }

    /// The next message. Cancel safe.
    pub(crate) async fn next<T: Message>(&mut self) -> Result<T, ReceiveError> {
        match self.frames.next().await {
            None => Err(ReceiveError::Closed),
            Some(Ok(frame)) => decode(&frame),
            Some(Err(error)) if error.get_ref().is_some_and(|e| e.is::<LengthDelimitedCodecError>()) => {
                Err(ReceiveError::TooLong { limit: self.frames.decoder().max_frame_length() })
            }
            // TLS whose end was not announced: a process that was killed does not.
            Some(Err(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(ReceiveError::Closed)
            }
            Some(Err(error)) => Err(ReceiveError::Io(error)),
        }
    }
}

struct Listening {
    io: BoxRead,
    heard: Heard,
}

impl AsyncRead for Listening {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let poll = Pin::new(&mut self.io).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            *self.heard.lock() = Instant::now();
        }
        poll
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::super::{
        message::{CommunicatorChoice, Hello, Joining, Member},
        weights::{Installed, Mark, MarkKind, Weights},
    };
    use super::*;
    use crate::{Epoch, Key, Version};

    async fn first<T: Message>(bytes: Vec<u8>) -> Result<T, ReceiveError> {
        Receiver::new(Box::new(Cursor::new(bytes))).next().await
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    #[test]
    fn golden_bytes() {
        assert_eq!(&encode(&ToHub::Alive, 100).unwrap()[..], &[0, 0, 0, 3, 0xCB, 1, 1]);
        let gather = ToHub::Gather { name: "m1".into(), part: Bytes::from_static(b"xyz") };
        let golden = [0, 0, 0, 10, 0xCB, 1, 2, 2, b'm', b'1', 3, b'x', b'y', b'z'];
        assert_eq!(&encode(&gather, 100).unwrap()[..], &golden);
        let ready = ToHub::Ready { epoch: Epoch(300), plan_digest: 1 };
        assert_eq!(&encode(&ready, 100).unwrap()[..], &[0, 0, 0, 6, 0xCB, 1, 4, 0xAC, 2, 1]);
        let go = ToRank::Go { epoch: Epoch(1) };
        assert_eq!(&encode(&go, 100).unwrap()[..], &[0, 0, 0, 4, 0xCB, 1, 6, 1]);
    }

    #[tokio::test]
    async fn a_message_over_the_limit_is_refused_on_both_sides() {
        let part = Bytes::from(vec![7; GREETING_FRAME_BYTES]);
        let gather = ToHub::Gather { name: "g".into(), part };
        let error = encode(&gather, GREETING_FRAME_BYTES).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
        let frame = encode(&gather, FRAME_BYTES).unwrap().to_vec();
        assert!(matches!(first::<ToHub>(frame.clone()).await, Err(ReceiveError::TooLong { .. })));
        let mut receiver = Receiver::new(Box::new(Cursor::new(frame)));
        receiver.trust();
        assert!(matches!(receiver.next().await, Ok(ToHub::Gather { .. })));
        assert!(matches!(receiver.next::<ToHub>().await, Err(ReceiveError::Closed)));
    }

    #[tokio::test]
    async fn foreign_services_and_other_versions_are_told_apart() {
        assert!(matches!(
            first::<ToRank>(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()).await,
            Err(ReceiveError::TooLong { .. })
        ));
        assert!(matches!(first::<ToRank>(vec![0, 0, 0, 2, b'h', b'i']).await, Err(ReceiveError::Foreign)));
        assert!(matches!(first::<ToRank>(vec![0, 0, 0, 0]).await, Err(ReceiveError::Foreign)));
        let mut frame = encode(&ToRank::Alive, 100).unwrap().to_vec();
        frame[5] = 9;
        assert!(matches!(first::<ToRank>(frame).await, Err(ReceiveError::Version { theirs: 9 })));
        let mut frame = encode(&ToRank::Alive, 100).unwrap().to_vec();
        frame[3] += 1;
        frame.push(0);
        assert!(matches!(first::<ToRank>(frame).await, Err(ReceiveError::Malformed(_))));
    }

    /// Every message, so that a change of the protocol is seen here.
    fn every_message() -> (Vec<ToHub>, Vec<ToRank>) {
        let cause = || Error::new(ErrorKind::Timeout, "wait", "too long").with(Key::Rank, 1);
        let (epoch, name, host) = (Epoch(u64::MAX), || "n".to_owned(), || "h".to_owned());
        let hello = Hello {
            protocol: 1,
            job: "j".into(),
            token: Bytes::from_static(b"t"),
            rank: 3,
            world_size: 4,
            incarnation: 5,
            host: host(),
            pid: 6,
        };
        let joining = Joining {
            checkpoint: "c".into(),
            version: Version(1),
            ranks: vec![0, 300],
            device_uuid: "GPU-x".into(),
            endpoint: Some("ipc://x".into()),
            free_bytes: 1 << 40,
            communicator: Some(epoch),
            token: None,
        };
        let member =
            Member { rank: 1, host: host(), pid: 2, device_uuid: "d".into(), endpoint: None, free_bytes: 0 };
        let part = Bytes::from_static(b"part");
        let weights = Weights {
            committed: Some(Installed { checkpoint: "c".into(), version: Version(1), epoch }),
            mark: Some(Mark {
                kind: MarkKind::InDoubt,
                checkpoint: "d".into(),
                version: Version(2),
                epoch,
                members: vec![0, 1],
                cause: "why".into(),
            }),
        };
        let to_hub = vec![
            ToHub::Hello(hello),
            ToHub::Alive,
            ToHub::Gather { name: name(), part: part.clone() },
            ToHub::Join(joining),
            ToHub::Ready { epoch, plan_digest: 9 },
            ToHub::Loaded { epoch },
            ToHub::Finished { epoch, failure: None },
            ToHub::Finished { epoch, failure: Some(cause()) },
            ToHub::Failed { epoch: None, cause: cause() },
            ToHub::Bye,
            ToHub::Opened { epoch },
            ToHub::Weights(weights.clone()),
        ];
        let communicators = [CommunicatorChoice::Reuse(epoch), CommunicatorChoice::Build(part.clone())];
        let mut to_rank = vec![
            ToRank::Welcome { heartbeat_ms: 1, dead_after_ms: 2 },
            ToRank::Refused { cause: cause() },
            ToRank::Alive,
            ToRank::Gathered { name: name(), parts: vec![part, Bytes::new()] },
            ToRank::GatherFailed { name: name(), cause: cause() },
            ToRank::Go { epoch },
            ToRank::Committed { epoch },
            ToRank::Closed { epoch, failure: Some(cause()) },
            ToRank::Abort { epoch: Some(epoch), cause: cause() },
            ToRank::AllOpened { epoch },
            ToRank::Weights(weights),
            ToRank::Returned { rank: 300 },
        ];
        to_rank.extend(communicators.map(|communicator| ToRank::Begin {
            epoch,
            members: vec![member.clone(), member.clone()],
            communicator,
        }));
        (to_hub, to_rank)
    }

    #[test]
    fn every_message_round_trips_and_no_cut_or_longer_one_is_taken_for_it() {
        fn check<T: Message + std::fmt::Debug>(message: &T) {
            let frame = encode(message, FRAME_BYTES).unwrap();
            let body = &frame[LENGTH_BYTES..];
            let back: T = decode(body).unwrap();
            assert_eq!(format!("{back:?}"), format!("{message:?}"));
            for cut in 0..body.len() {
                assert!(decode::<T>(&body[..cut]).is_err(), "{message:?} cut to {cut}");
            }
            assert!(decode::<T>(&[body, &[0]].concat()).is_err(), "{message:?}");
        }
        let (to_hub, to_rank) = every_message();
        to_hub.iter().for_each(check);
        to_rank.iter().for_each(check);
    }

    #[test]
    fn causes_cross_the_wire_as_text() {
        let cause = Error::new(ErrorKind::Backend, "copy", "failed")
            .with(Key::Rank, 3)
            .caused_by(std::io::Error::other("disk full"));
        let frame = encode(&ToHub::Failed { epoch: None, cause }, 1000).unwrap();
        let Ok(ToHub::Failed { cause, .. }) = decode(&frame[LENGTH_BYTES..]) else { panic!("not Failed") };
        assert_eq!(cause.to_string(), "copy: failed: disk full [rank=3]");
    }

    proptest! {
        #[test]
        fn random_bytes_never_decode_into_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut framed = vec![MAGIC, VERSION];
            framed.extend_from_slice(&bytes);
            let _ = decode::<ToHub>(&framed);
            let _ = decode::<ToRank>(&framed);
            let _ = decode::<ToHub>(&bytes);
        }

        #[test]
        fn damaged_frames_end_in_an_error_or_a_message(
            parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..5),
            cut in 0_usize..200,
            flip in 0_usize..200,
            bit in 0_u8..8,
        ) {
            let parts = parts.into_iter().map(Bytes::from).collect();
            let frame = encode(&ToRank::Gathered { name: "g".into(), parts }, 10_000).unwrap();
            let mut bytes = frame.to_vec();
            if let Some(byte) = bytes.get_mut(flip) {
                *byte ^= 1 << bit;
            }
            bytes.truncate(cut.max(1));
            let _ = block_on(first::<ToRank>(bytes));
        }

        #[test]
        fn every_prefix_of_a_frame_waits_or_closes(cut in 0_usize..64) {
            let frame = encode(&ToHub::Gather { name: "n".into(), part: Bytes::from(vec![1; 50]) }, 100).unwrap();
            let cut = cut.min(frame.len() - 1);
            let result = block_on(first::<ToHub>(frame[..cut].to_vec()));
            prop_assert!(matches!(result, Err(ReceiveError::Closed | ReceiveError::Io(_))));
        }
    }
}
