//! HTTPS: a server's certificate, and how clients verify servers.

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Arc, OnceLock},
};

use reqwest::ClientBuilder;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject},
    version::TLS13,
};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

use super::{
    super::{OPERATION, SecureStream, invalid},
    check, internal, provider,
};
use crate::error::{Error, ErrorKind, Key, Result};

#[derive(Clone)]
pub(in super::super) struct Server(TlsAcceptor);

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Server(hidden)")
    }
}

impl Server {
    pub(in super::super) fn load(certificate: &Path, key: &Path) -> Result<Self> {
        let chain = certificates(certificate)?;
        let private = PrivateKeyDer::from_pem_file(key)
            .map_err(|e| unreadable("it holds no private key in PEM", key, e))?;
        if std::fs::metadata(key).is_ok_and(|file| file.mode() & 0o077 != 0) {
            tracing::warn!(path = %key.display(), "other users can read the private key; run chmod 600 on it");
        }
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| internal("the TLS settings do not go together", e))?
            .with_no_client_auth()
            .with_single_cert(chain, private)
            .map_err(|e| {
                invalid("certificate and key do not go together")
                    .with(Key::Path, certificate.display())
                    .caused_by(e)
            })?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self(Arc::new(config).into()))
    }

    pub(in super::super) async fn accept(&self, stream: TcpStream) -> io::Result<SecureStream> {
        Ok(Box::new(self.0.accept(stream).await?))
    }
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let read = || CertificateDer::pem_file_iter(file)?.collect::<Result<Vec<_>, _>>();
    let found = read().map_err(|e| unreadable("it holds no certificates in PEM", file, e))?;
    if found.is_empty() {
        return Err(invalid("it holds no certificates in PEM").with(Key::Path, file.display()));
    }
    Ok(found)
}

fn unreadable(what: &str, file: &Path, error: pem::Error) -> Error {
    let message = match &error {
        pem::Error::Io(_) => "the file cannot be read".to_owned(),
        _ => what.to_owned(),
    };
    invalid(message).with(Key::Path, file.display()).caused_by(error)
}

/// `builder` with this provider, which it would panic without even if `secure` is false and nothing is encrypted.
pub(in super::super) fn configure(
    builder: ClientBuilder,
    secure: bool,
    ca: Option<&Path>,
) -> Result<ClientBuilder> {
    if secure {
        check()?;
    }
    let config = match ca.filter(|_| secure) {
        Some(file) => client(roots(certificates(file)?, Some(file))?)?,
        None if secure => client(system()?)?,
        None => client(RootCertStore::empty())?,
    };
    Ok(builder.tls_backend_preconfigured(config))
}

pub(in super::super) fn explain(error: &(dyn std::error::Error + 'static)) -> Option<&'static str> {
    // An `io::Error` does not name what it wraps as its source, and there are several of them around ours.
    match std::iter::successors(Some(error), inside).find_map(|error| error.downcast_ref())? {
        rustls::Error::InvalidCertificate(_) => Some(
            "its certificate is not trusted here: name what it was signed with, --tls-ca FILE or CKPT_TLS_CA",
        ),
        rustls::Error::InvalidMessage(_) => Some("it does not speak TLS: write http://"),
        _ => None,
    }
}

fn inside<'a>(
    error: &&'a (dyn std::error::Error + 'static),
) -> Option<&'a (dyn std::error::Error + 'static)> {
    let inside = error.downcast_ref::<io::Error>()?.get_ref()?;
    Some(inside)
}

fn client(roots: RootCertStore) -> Result<ClientConfig> {
    Ok(ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| internal("the TLS settings do not go together", e))?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

/// What this system trusts; read once.
fn system() -> Result<RootCertStore> {
    static SYSTEM: OnceLock<RootCertStore> = OnceLock::new();
    if let Some(found) = SYSTEM.get() {
        return Ok(found.clone());
    }
    let found = roots(rustls_native_certs::load_native_certs().certs, None)?;
    Ok(SYSTEM.get_or_init(|| found).clone())
}

fn roots(found: Vec<CertificateDer<'static>>, file: Option<&Path>) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    let (taken, _) = roots.add_parsable_certificates(found);
    match (taken, file) {
        (0, None) => Err(Error::new(
            ErrorKind::ConfigInvalid,
            OPERATION,
            "this system trusts no certificates; name those to trust with --tls-ca FILE or CKPT_TLS_CA",
        )),
        (0, Some(file)) => {
            Err(invalid("none of its certificates can be used").with(Key::Path, file.display()))
        }
        _ => Ok(roots),
    }
}
