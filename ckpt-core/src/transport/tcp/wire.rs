//! What goes over the sockets besides bytes of weights: tokens, the handshake, frames, headers.

use std::net::SocketAddr;

use bytes::Bytes;
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::Sha256;

use super::{
    link::Link,
    socket::{read_exact, write_all},
};
use crate::{
    error::{Error, ErrorKind, Result},
    transport::group::random,
};

/// The first bytes of every connection; the last one is the protocol's version.
const MAGIC: [u8; 8] = *b"ckpttcp\x01";
/// No frame is longer.
pub(super) const FRAME_LIMIT: usize = 1 << 20;
/// Before the other side has proved anything.
const HELLO_LIMIT: usize = 1 << 10;

/// Names a group, or a transport that serves reads.
pub(crate) type Id = [u8; 16];

/// What [`crate::transport::GroupSpec::token`] holds.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Token {
    /// Version of this format.
    version: u8,
    /// Where the root listens.
    pub(super) root: SocketAddr,
    pub(super) group: Id,
    pub(super) secret: [u8; 32],
}

impl Token {
    pub(super) fn new(root: SocketAddr) -> Result<Self> {
        Ok(Self { version: 1, root, group: random()?, secret: random()? })
    }

    pub(super) fn encode(&self) -> Result<Bytes> {
        encode(self).map(Bytes::from)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let error = || {
            Error::new(
                ErrorKind::ConfigInvalid,
                "join a group",
                "the token is not one of the transport `tcp`",
            )
        };
        let (token, rest) = postcard::take_from_bytes::<Self>(bytes).map_err(|e| error().caused_by(e))?;
        if token.version == 1 && rest.is_empty() { Ok(token) } else { Err(error()) }
    }
}

/// What a connection is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Purpose {
    /// A member tells the root where it listens; answers come on this connection.
    Meet { listens: SocketAddr },
    /// Carries stripes of broadcasts.
    Lane { lane: u32 },
    /// Carries [`Notice`]s.
    Control,
    /// Asks for ranges of registered memory.
    Read,
    /// Brings bytes for ranges of registered memory.
    Write,
}

/// The dialler's first words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(super) id: Id,
    pub(super) rank: u32,
    pub(super) world_size: u32,
    pub(super) epoch: u64,
    pub(super) purpose: Purpose,
}

/// The root's answer to those who met.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Table {
    /// Lanes between any two members: the root's setting counts.
    pub(super) lanes: u32,
    /// Where each member listens.
    pub(super) listens: Vec<SocketAddr>,
}

/// On a control connection.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Notice {
    /// The sender's communicator is poisoned.
    Aborted(Error),
    /// The sender has dropped its communicator in peace.
    Left,
}

pub(super) fn encode(value: &impl Serialize) -> Result<Vec<u8>> {
    postcard::to_allocvec(value).map_err(|e| {
        Error::new(ErrorKind::Internal, "encode a message", "a value cannot be encoded").caused_by(e)
    })
}

/// A length and a postcard value.
pub(super) fn frame(value: &impl Serialize) -> Result<Vec<u8>> {
    let body = encode(value)?;
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

pub(super) async fn send<T: Serialize>(stream: &Link, value: &T) -> Result<()> {
    write_all(stream, &frame(value)?, &[]).await.map_err(broken)
}

pub(super) async fn receive<T: DeserializeOwned>(stream: &Link) -> Result<T> {
    let body = receive_frame(stream, FRAME_LIMIT).await?;
    decode(&body)
}

pub(super) async fn receive_frame(stream: &Link, limit: usize) -> Result<Vec<u8>> {
    let mut len = [0; 4];
    read_exact(stream, &mut len).await.map_err(broken)?;
    let len = u32::from_le_bytes(len) as usize;
    if len > limit {
        return Err(Error::new(ErrorKind::Corrupt, "read a message", format!("{len} bytes are too many")));
    }
    let mut body = vec![0; len];
    read_exact(stream, &mut body).await.map_err(broken)?;
    Ok(body)
}

pub(crate) fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    postcard::from_bytes(body)
        .map_err(|e| Error::new(ErrorKind::Corrupt, "read a message", "the peer sent nonsense").caused_by(e))
}

pub(super) fn broken(error: std::io::Error) -> Error {
    Error::new(ErrorKind::PeerLost, "talk to a peer", "the connection broke").caused_by(error)
}

const REFUSED_ID: u8 = 1;
const REFUSED_SECRET: u8 = 2;
/// In the place of the challenge, to a dialler without TLS.
pub(super) const WANTS_TLS: u8 = 3;

fn mac(key: &[u8], side: &[u8], nonces: [&[u8; 32]; 2], hello: &[u8]) -> Result<Hmac<Sha256>> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).map_err(|e| {
        Error::new(ErrorKind::Internal, "authenticate a peer", "bad key").caused_by(e.to_string())
    })?;
    for part in [side, nonces[0], nonces[1], hello] {
        mac.update(part);
    }
    Ok(mac)
}

/// The dialler's half: both sides prove that they know `key`, which never crosses the wire. The caller bounds the time.
pub(super) async fn introduce(stream: &Link, key: &[u8], hello: &Hello) -> Result<()> {
    let body = frame(hello)?;
    write_all(stream, &MAGIC, &body).await.map_err(broken)?;
    let mut challenge = [0; 33];
    read_exact(stream, &mut challenge[..1]).await.map_err(broken)?;
    if challenge[0] == WANTS_TLS {
        let what = "the peer wants TLS; give --tls or CKPT_TLS=1 to all processes or to none";
        return Err(Error::new(ErrorKind::ConfigInvalid, "connect to a peer", what));
    }
    if challenge[0] == REFUSED_ID {
        let what = "the peer knows nothing of this group or memory: it has given up, ended or restarted";
        return Err(Error::new(ErrorKind::PeerLost, "connect to a peer", what));
    }
    read_exact(stream, &mut challenge[1..]).await.map_err(broken)?;
    let (mut theirs, ours) = ([0; 32], random::<32>()?);
    theirs.copy_from_slice(&challenge[1..]);
    let proof = mac(key, b"dial", [&theirs, &ours], &body)?.finalize().into_bytes();
    write_all(stream, &ours, &proof).await.map_err(broken)?;
    let mut answer = [0; 33];
    read_exact(stream, &mut answer[..1]).await.map_err(broken)?;
    if answer[0] == REFUSED_SECRET {
        return Err(other_secret());
    }
    read_exact(stream, &mut answer[1..]).await.map_err(broken)?;
    mac(key, b"accept", [&theirs, &ours], &body)?.verify_slice(&answer[1..]).map_err(|_| other_secret())
}

pub(super) fn other_secret() -> Error {
    let what = "the job secrets differ; give all processes the same token";
    Error::new(ErrorKind::ConfigInvalid, "connect to a peer", what)
}

/// The acceptor's half. `key_of` answers the key for an id that is known here. The caller bounds the time.
pub(super) async fn examine(stream: &Link, key_of: impl FnOnce(&Hello) -> Option<Vec<u8>>) -> Result<Hello> {
    let mut magic = [0; 8];
    read_exact(stream, &mut magic).await.map_err(broken)?;
    if magic != MAGIC {
        let what = "a stranger spoke another protocol, or another version of this one";
        return Err(Error::new(ErrorKind::Corrupt, "accept a peer", what));
    }
    let body = receive_frame(stream, HELLO_LIMIT).await?;
    let hello: Hello = decode(&body)?;
    let Some(key) = key_of(&hello) else {
        write_all(stream, &[REFUSED_ID], &[]).await.map_err(broken)?;
        return Err(Error::new(
            ErrorKind::ConfigInvalid,
            "accept a peer",
            "a peer asked for an unknown group",
        ));
    };
    let ours = random::<32>()?;
    write_all(stream, &[0], &ours).await.map_err(broken)?;
    let mut reply = [0; 64];
    read_exact(stream, &mut reply).await.map_err(broken)?;
    let mut theirs = [0; 32];
    theirs.copy_from_slice(&reply[..32]);
    let mut framed = (body.len() as u32).to_le_bytes().to_vec();
    framed.extend_from_slice(&body);
    // `verify_slice` takes the same time wherever the proofs differ.
    if mac(&key, b"dial", [&ours, &theirs], &framed)?.verify_slice(&reply[32..]).is_err() {
        write_all(stream, &[REFUSED_SECRET], &[]).await.map_err(broken)?;
        return Err(Error::new(ErrorKind::ConfigInvalid, "accept a peer", "a peer does not know the secret"));
    }
    let proof = mac(&key, b"accept", [&ours, &theirs], &framed)?.finalize().into_bytes();
    write_all(stream, &[0], &proof).await.map_err(broken)?;
    Ok(hello)
}

/// Before every stripe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StripeHeader {
    /// Number of the group of operations.
    pub(super) number: u64,
    /// Index of the operation in the group.
    pub(super) op: u32,
    pub(super) root: u32,
    /// Bytes of the whole operation.
    pub(super) len_bytes: u64,
}

impl StripeHeader {
    pub(super) const BYTES: usize = 32;
    const MAGIC: u64 = u64::from_le_bytes(*b"ckstripe");

    pub(super) fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&Self::MAGIC.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.number.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.op.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.root.to_le_bytes());
        bytes[24..].copy_from_slice(&self.len_bytes.to_le_bytes());
        bytes
    }
}

/// Asks for a range of registered memory, or stands before the bytes for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RangeRequest {
    pub(super) generation: u64,
    pub(super) address: u64,
    pub(super) offset: u64,
    pub(super) len_bytes: u64,
}

impl RangeRequest {
    pub(super) const BYTES: usize = 32;

    pub(super) fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        for (place, word) in
            bytes.chunks_exact_mut(8).zip([self.generation, self.address, self.offset, self.len_bytes])
        {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        let mut words = [0; 4];
        for (word, place) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut le = [0; 8];
            le.copy_from_slice(place);
            *word = u64::from_le_bytes(le);
        }
        let [generation, address, offset, len_bytes] = words;
        Self { generation, address, offset, len_bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_formats_stay_as_they_are() {
        let root: SocketAddr = "127.0.0.1:258".parse().unwrap();
        let token = Token { version: 1, root, group: [7; 16], secret: [9; 32] };
        let mut golden = vec![1, 0, 127, 0, 0, 1, 0x82, 0x02];
        golden.extend([7; 16]);
        golden.extend([9; 32]);
        assert_eq!(token.encode().unwrap(), golden);
        assert_eq!(Token::decode(&golden).unwrap(), token);
        golden.push(0);
        assert!(Token::decode(&golden).is_err());

        let header = StripeHeader { number: 1, op: 2, root: 3, len_bytes: 4 };
        let golden = *b"ckstripe\x01\0\0\0\0\0\0\0\x02\0\0\0\x03\0\0\0\x04\0\0\0\0\0\0\0";
        assert_eq!(header.encode(), golden);

        let request = RangeRequest { generation: 1, address: 2, offset: 3, len_bytes: u64::MAX };
        let mut golden = [0; 32];
        (golden[0], golden[8], golden[16]) = (1, 2, 3);
        golden[24..].fill(255);
        assert_eq!(request.encode(), golden);
        assert_eq!(RangeRequest::decode(&golden), request);

        let hello =
            Hello { id: [1; 16], rank: 2, world_size: 3, epoch: 300, purpose: Purpose::Lane { lane: 1 } };
        let mut golden = vec![22, 0, 0, 0];
        golden.extend([1; 16]);
        golden.extend([2, 3, 0xAC, 2, 1, 1]);
        assert_eq!(frame(&hello).unwrap(), golden);
    }
}
