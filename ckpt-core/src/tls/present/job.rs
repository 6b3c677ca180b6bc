//! The TLS of a job: raw public keys that both sides derive from the token.

use std::{io, sync::Arc};

use hmac::{Hmac, Mac};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
    client::{
        AlwaysResolvesClientRawPublicKeys, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key},
    pki_types::{
        CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
    },
    server::{
        AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
    version::TLS13,
};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{
    super::{HandshakeError, SecureStream},
    Secure, internal, provider,
};
use crate::error::{Error, ErrorKind, Result};

/// What the keys are made for; part of the derivation, so that no other use of the token gives the same bytes.
const LISTENER: &[u8] = b"ckpt tls 1 listener";
const DIALLER: &[u8] = b"ckpt tls 1 dialler";
/// An Ed25519 private key in PKCS #8, up to its 32 bytes.
const ED25519_PKCS8: &[u8] = &[48, 46, 2, 1, 0, 48, 5, 6, 3, 43, 101, 112, 4, 34, 4, 32];
/// The ranks have no names; their keys tell who they are.
const NAME: &str = "ckpt";

#[derive(Clone)]
pub(in super::super) struct Job {
    dialler: TlsConnector,
    listener: TlsAcceptor,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Job(hidden)")
    }
}

impl Job {
    pub(in super::super) fn new(token: &[u8]) -> Result<Self> {
        Self::of(key(token, LISTENER)?, key(token, DIALLER)?)
    }

    fn of(listener: Arc<CertifiedKey>, dialler: Arc<CertifiedKey>) -> Result<Self> {
        let wrong = |cause| internal("the TLS settings do not go together", cause);
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(wrong)?
            .dangerous()
            .with_custom_certificate_verifier(Pinned::new(&listener)?)
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(dialler.clone())));
        client.enable_sni = false;
        client.resumption = Resumption::disabled();
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(wrong)?
            .with_client_cert_verifier(Pinned::new(&dialler)?)
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(listener)));
        // Nothing is resumed: each connection proves its keys, and nothing but data follows the handshake.
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self { dialler: Arc::new(client).into(), listener: Arc::new(server).into() })
    }

    pub(in super::super) async fn connect(&self, stream: TcpStream) -> Result<SecureStream, HandshakeError> {
        Ok(Box::new(self.dial(stream).await?))
    }

    pub(in super::super) async fn accept(&self, stream: TcpStream) -> Result<SecureStream, HandshakeError> {
        Ok(Box::new(self.listener.accept(stream).await.map_err(told)?))
    }

    pub(in super::super) async fn connect_bulk(&self, stream: TcpStream) -> Result<Secure, HandshakeError> {
        let (socket, connection) = self.dial(stream).await?.into_inner();
        Ok(Secure::new(socket, connection.into()))
    }

    pub(in super::super) async fn accept_bulk(&self, stream: TcpStream) -> Result<Secure, HandshakeError> {
        let (socket, connection) = self.listener.accept(stream).await.map_err(told)?.into_inner();
        Ok(Secure::new(socket, connection.into()))
    }

    async fn dial(
        &self,
        stream: TcpStream,
    ) -> Result<tokio_rustls::client::TlsStream<TcpStream>, HandshakeError> {
        let name = ServerName::try_from(NAME).map_err(|e| HandshakeError::Broken(io::Error::other(e)))?;
        self.dialler.connect(name, stream).await.map_err(told)
    }
}

/// What a handshake's error means.
fn told(error: io::Error) -> HandshakeError {
    match error.get_ref().and_then(|cause| cause.downcast_ref()) {
        // Nonsense where a handshake should be, or the answer of a side without TLS: ours never says this otherwise.
        Some(
            rustls::Error::InvalidMessage(_)
            | rustls::Error::AlertReceived(rustls::AlertDescription::ProtocolVersion),
        ) => HandshakeError::NotTls,
        Some(rustls::Error::InvalidCertificate(_)) => HandshakeError::OtherToken,
        _ => HandshakeError::Broken(error),
    }
}

/// The key pair for `use_of` the token.
fn key(token: &[u8], use_of: &[u8]) -> Result<Arc<CertifiedKey>> {
    let mut mac = Hmac::<Sha256>::new_from_slice(token).map_err(|e| {
        Error::new(ErrorKind::Internal, super::OPERATION, "no key comes of the token")
            .caused_by(e.to_string())
    })?;
    mac.update(use_of);
    let private = [ED25519_PKCS8, &mac.finalize().into_bytes()].concat();
    let wrong = |cause| internal("no key comes of the token", cause);
    let key = provider()
        .key_provider
        .load_private_key(PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(private)))
        .map_err(wrong)?;
    let public = key.public_key().ok_or_else(|| wrong(rustls::Error::General("no public key".to_owned())))?;
    // Where certificates would stand there is the key alone.
    let public = CertificateDer::from(public.as_ref().to_vec());
    Ok(Arc::new(CertifiedKey::new(vec![public], key)))
}

/// Takes one public key and no other.
#[derive(Debug)]
struct Pinned {
    public: CertificateDer<'static>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Pinned {
    fn new(key: &CertifiedKey) -> Result<Arc<Self>> {
        let public = key.end_entity_cert().map_err(|cause| internal("a key has no public half", cause))?;
        let public = CertificateDer::from(public.as_ref().to_vec());
        Ok(Arc::new(Self { public, algorithms: provider().signature_verification_algorithms }))
    }

    fn check(&self, presented: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        if self.public.as_ref().ct_eq(presented.as_ref()).into() {
            return Ok(());
        }
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn signed(
        &self,
        message: &[u8],
        presented: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let key = SubjectPublicKeyInfoDer::from(presented.as_ref());
        verify_tls13_signature_with_raw_key(message, &key, signature, &self.algorithms)
    }
}

fn only_tls13() -> rustls::Error {
    rustls::Error::General("a signature of TLS 1.2 in a handshake of 1.3".to_owned())
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        presented: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(presented).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        presented: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed(message, presented, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        presented: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(presented).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        presented: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed(message, presented, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncWriteExt, net::TcpListener};

    use super::*;

    const TOKEN: &[u8] = b"a token that is long enough for a key";
    const OTHER: &[u8] = b"a token of another job, also long enough";

    /// What both sides make of a connection.
    async fn meet(listening: &Job, dialling: &Job) -> (Option<HandshakeError>, Option<HandshakeError>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let accept = async { listening.accept(listener.accept().await.unwrap().0).await };
        let dial = async {
            let mut secure = dialling.connect(stream).await?;
            // In TLS 1.3 a dialler is done before the listener has looked at its key.
            secure.write_all(b"?").await.map_err(HandshakeError::Broken)?;
            Ok::<_, HandshakeError>(secure)
        };
        let (accepted, dialled) = tokio::join!(accept, dial);
        (accepted.err(), dialled.err())
    }

    #[tokio::test]
    async fn each_side_takes_one_key_and_no_other() {
        let job = Job::new(TOKEN).unwrap();
        assert!(matches!(meet(&job, &Job::new(TOKEN).unwrap()).await, (None, None)));
        let (listener, dialler) = (key(TOKEN, LISTENER).unwrap(), key(TOKEN, DIALLER).unwrap());
        // Somebody who has found out one half of the keys is still a stranger, on either side.
        let stranger = Job::of(listener, key(OTHER, DIALLER).unwrap()).unwrap();
        assert!(matches!(meet(&job, &stranger).await.0, Some(HandshakeError::OtherToken)));
        let stranger = Job::of(key(OTHER, LISTENER).unwrap(), dialler.clone()).unwrap();
        assert!(matches!(meet(&stranger, &job).await.1, Some(HandshakeError::OtherToken)));
        // The two roles are not exchangeable: what a dialler shows does not open a door from inside.
        let mirror = Job::of(dialler.clone(), dialler).unwrap();
        assert!(matches!(meet(&mirror, &job).await.1, Some(HandshakeError::OtherToken)));
    }

    #[tokio::test]
    async fn large_writes_both_ways_at_once_arrive_whole() {
        let job = Job::new(TOKEN).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let accept = async { job.accept_bulk(listener.accept().await.unwrap().0).await.unwrap() };
        let (one, two) = tokio::join!(accept, async { job.connect_bulk(stream).await.unwrap() });
        let bytes: Vec<u8> = (0..5_000_003_u32).map(|i| (i % 251) as u8).collect();
        let read = async |from: &Secure| {
            let (mut all, mut piece) = (Vec::new(), vec![0; 70_001]);
            while all.len() < bytes.len() + 3 {
                match from.try_read(&mut piece) {
                    Ok(0) => panic!("it ended after {} bytes", all.len()),
                    Ok(n) => all.extend_from_slice(&piece[..n]),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                        from.socket().readable().await.unwrap()
                    }
                    Err(e) => panic!("{e}"),
                }
            }
            all
        };
        let there = async { one.write_all(b"abc", &bytes).await.unwrap() };
        let back = async { two.write_all(b"xyz", &bytes).await.unwrap() };
        let ((), (), at_two, at_one) = tokio::join!(there, back, read(&two), read(&one));
        assert!(at_two == [b"abc", &bytes[..]].concat() && at_one == [b"xyz", &bytes[..]].concat());
        assert!(!one.has_unread() && !two.has_unread());
        // What was sent comes before the end.
        two.send_now(b"last").unwrap();
        drop(two);
        let mut last = [0; 8];
        one.socket().readable().await.unwrap();
        assert_eq!(one.try_read(&mut last).unwrap(), 4);
        one.socket().readable().await.unwrap();
        assert_eq!(one.try_read(&mut last).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
