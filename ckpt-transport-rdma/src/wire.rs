//! The small TCP exchange beside the queue pairs: who you are, where your queue pairs are, whether a region still lives.

use ckpt_core::{Error, ErrorKind, Result};
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::Sha256;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{memory::Claim, nic::NicAddress};

/// The first bytes of every connection; the last one is the protocol's version.
const MAGIC: [u8; 8] = *b"ckptrdm\x02";
/// No frame is longer.
const FRAME_LIMIT: usize = 1 << 20;

/// Names a transport that serves reads; another after a restart.
pub(crate) type Id = [u8; 16];

/// What [`ckpt_core::transport::RemoteRegion::descriptor`] holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Descriptor {
    /// Version of this format.
    pub(crate) version: u8,
    pub(crate) id: Id,
    pub(crate) secret: [u8; 32],
    /// The owner's NICs, and the region's key on each.
    pub(crate) nics: Vec<NicAddress>,
    pub(crate) keys: Vec<u32>,
}

impl Descriptor {
    /// The region's key on the owner's NIC `nic`. A descriptor with too few is refused before; an empty region has none.
    pub(crate) fn key(&self, nic: usize) -> u32 {
        self.keys.get(nic).copied().unwrap_or(0)
    }
}

/// One end of a queue pair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct End {
    pub(crate) gid: [u8; 16],
    pub(crate) lid: u16,
    pub(crate) queue_pair: u32,
    pub(crate) psn: u32,
    /// `ibv_mtu`; the smaller of both ends counts.
    pub(crate) mtu: u32,
    /// Reads that this end has in flight (the reader's) or answers at once (the owner's); the smaller counts.
    pub(crate) reads: u8,
}

/// From the reader.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Make a queue pair for each, on the owner's NIC of that number.
    Connect(Vec<(u32, End)>),
    /// Do these regions live?
    Check(u32, Vec<Claim>),
}

/// From the owner.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// For each queue pair of the request.
    Connected(Vec<Result<End, Error>>),
    /// To the check of that number.
    Checked(u32, Result<(), Error>),
    /// Unasked: this region is released; all must be asked for again if there is no number.
    Released(Option<u64>),
}

pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| {
        Error::new(ErrorKind::Backend, "make a secret", "the system has no randomness")
            .caused_by(e.to_string())
    })?;
    Ok(bytes)
}

pub(crate) fn encode(value: &impl Serialize) -> Result<Vec<u8>> {
    postcard::to_allocvec(value).map_err(|e| {
        Error::new(ErrorKind::Internal, "encode a message", "a value cannot be encoded").caused_by(e)
    })
}

pub(crate) fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    postcard::from_bytes(body)
        .map_err(|e| Error::new(ErrorKind::Corrupt, "read a message", "the peer sent nonsense").caused_by(e))
}

pub(crate) fn broken(error: std::io::Error) -> Error {
    Error::new(ErrorKind::PeerLost, "talk to a peer", "the connection broke").caused_by(error)
}

/// A length and a postcard value.
pub(crate) async fn send(stream: &mut (impl AsyncWrite + Unpin), value: &impl Serialize) -> Result<()> {
    let body = encode(value)?;
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(&body);
    stream.write_all(&bytes).await.map_err(broken)
}

pub(crate) async fn receive<T: DeserializeOwned>(stream: &mut (impl AsyncRead + Unpin)) -> Result<T> {
    let len = stream.read_u32_le().await.map_err(broken)? as usize;
    if len > FRAME_LIMIT {
        return Err(Error::new(ErrorKind::Corrupt, "read a message", format!("{len} bytes are too many")));
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await.map_err(broken)?;
    decode(&body)
}

const KNOWN: u8 = 0;
const UNKNOWN: u8 = 1;

fn mac(key: &[u8], side: &[u8], nonces: [&[u8; 32]; 2], id: &Id) -> Result<Hmac<Sha256>> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).map_err(|e| {
        Error::new(ErrorKind::Internal, "authenticate a peer", "bad key").caused_by(e.to_string())
    })?;
    for part in [side, nonces[0], nonces[1], id] {
        mac.update(part);
    }
    Ok(mac)
}

fn other_secret() -> Error {
    let what = "the job secrets differ; give all processes the same token";
    Error::new(ErrorKind::ConfigInvalid, "connect to a peer", what)
}

/// The reader's half: both sides prove that they know `key`, which never crosses the wire. The caller bounds the time.
pub(crate) async fn introduce(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    key: &[u8],
    id: &Id,
) -> Result<()> {
    let ours = random::<32>()?;
    stream.write_all(&[&MAGIC[..], id, &ours].concat()).await.map_err(broken)?;
    if stream.read_u8().await.map_err(broken)? == UNKNOWN {
        let what = "the peer knows nothing of this memory: it has ended or restarted; get its metas again";
        return Err(Error::new(ErrorKind::PeerLost, "connect to a peer", what));
    }
    let mut theirs = [0; 32];
    stream.read_exact(&mut theirs).await.map_err(broken)?;
    let proof = mac(key, b"dial", [&theirs, &ours], id)?.finalize().into_bytes();
    stream.write_all(&proof).await.map_err(broken)?;
    let mut answer = [0; 32];
    // An owner that does not believe the proof hangs up.
    match stream.read_exact(&mut answer).await {
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Err(other_secret()),
        Err(e) => return Err(broken(e)),
    }
    mac(key, b"accept", [&theirs, &ours], id)?.verify_slice(&answer).map_err(|_| other_secret())
}

/// The owner's half.
pub(crate) async fn examine(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    key: &[u8],
    id: &Id,
) -> Result<()> {
    let mut hello = [0; 8 + 16 + 32];
    stream.read_exact(&mut hello).await.map_err(broken)?;
    if hello[..8] != MAGIC {
        let what = "a stranger spoke another protocol, or another version of this one";
        return Err(Error::new(ErrorKind::Corrupt, "accept a peer", what));
    }
    if hello[8..24] != id[..] {
        stream.write_all(&[UNKNOWN]).await.map_err(broken)?;
        return Err(Error::new(ErrorKind::PeerLost, "accept a peer", "it looks for another process"));
    }
    let (mut theirs, ours) = ([0; 32], random::<32>()?);
    theirs.copy_from_slice(&hello[24..]);
    stream.write_all(&[&[KNOWN][..], &ours].concat()).await.map_err(broken)?;
    let mut proof = [0; 32];
    stream.read_exact(&mut proof).await.map_err(broken)?;
    mac(key, b"dial", [&ours, &theirs], id)?.verify_slice(&proof).map_err(|_| other_secret())?;
    let answer = mac(key, b"accept", [&ours, &theirs], id)?.finalize().into_bytes();
    stream.write_all(&answer).await.map_err(broken)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn meet(keys: [&[u8]; 2], ids: [Id; 2]) -> (Result<()>, Result<()>) {
        let (mut reader, mut owner) = tokio::io::duplex(64);
        let dial = async move { introduce(&mut reader, keys[0], &ids[0]).await };
        let accept = async move { examine(&mut owner, keys[1], &ids[1]).await };
        tokio::join!(dial, accept)
    }

    #[tokio::test]
    async fn both_sides_prove_the_secret() {
        let (a, b) = ([1; 16], [2; 16]);
        assert!(matches!(meet([b"x", b"x"], [a, a]).await, (Ok(()), Ok(()))));
        let (reader, owner) = meet([b"x", b"y"], [a, a]).await;
        assert_eq!(reader.unwrap_err().kind(), ErrorKind::ConfigInvalid);
        assert_eq!(owner.unwrap_err().kind(), ErrorKind::ConfigInvalid);
        let (reader, _) = meet([b"x", b"x"], [a, b]).await;
        assert_eq!(reader.unwrap_err().kind(), ErrorKind::PeerLost);
    }

    #[test]
    fn a_descriptor_has_fixed_bytes() {
        let nic = NicAddress { hca: "mlx5_0".into(), ethernet: true, gid: [3; 16], lid: 0 };
        let descriptor =
            Descriptor { version: 1, id: [1; 16], secret: [2; 32], nics: vec![nic], keys: vec![0x1234] };
        let expected =
            [&[1][..], &[1; 16], &[2; 32], &[1, 6], b"mlx5_0", &[1], &[3; 16], &[0, 1, 0xb4, 0x24]];
        let bytes = encode(&descriptor).unwrap();
        assert_eq!(bytes, expected.concat());
        assert_eq!(decode::<Descriptor>(&bytes).unwrap(), descriptor);
        assert_eq!(decode::<Descriptor>(&bytes[..20]).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[tokio::test]
    async fn a_long_frame_is_refused_unread() {
        let (mut writer, mut reader) = tokio::io::duplex(64);
        writer.write_u32_le(FRAME_LIMIT as u32 + 1).await.unwrap();
        let refused = receive::<Request>(&mut reader).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Corrupt);
    }
}
