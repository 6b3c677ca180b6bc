//! Certificates for HTTPS servers of tests: made here, of a made-up authority.

use std::path::{Path, PathBuf};

use graviola::signing::eddsa::Ed25519SigningKey;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, Error, IsCa, Issuer, KeyUsagePurpose, PKCS_ED25519,
    PublicKeyData, SerialNumber, SignatureAlgorithm, SigningKey,
};

/// Files in PEM.
#[derive(Clone, Debug)]
pub struct Certificates {
    /// The authority's certificate: what clients trust.
    pub ca: PathBuf,
    /// The server's, for `127.0.0.1` and `localhost`.
    pub certificate: PathBuf,
    /// The server's private key.
    pub key: PathBuf,
}

struct Key {
    private: Ed25519SigningKey,
    public: [u8; 32],
}

impl Key {
    fn new() -> Self {
        let private = Ed25519SigningKey::generate().unwrap_or_else(|error| panic!("no key: {error:?}"));
        let public = private.public_key().as_bytes();
        Self { private, public }
    }

    fn pem(&self) -> String {
        let mut der = [0; 128];
        let der = self.private.to_pkcs8_der(&mut der).unwrap_or_else(|error| panic!("no PKCS #8: {error:?}"));
        pem("PRIVATE KEY", der)
    }
}

impl PublicKeyData for Key {
    fn der_bytes(&self) -> &[u8] {
        &self.public
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ED25519
    }
}

impl SigningKey for Key {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        Ok(self.private.sign(message).to_vec())
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    let text: String =
        base64(der).as_bytes().chunks(64).map(|line| String::from_utf8_lossy(line) + "\n").collect();
    format!("-----BEGIN {label}-----\n{text}-----END {label}-----\n")
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let mut three = [0; 3];
        three[..chunk.len()].copy_from_slice(chunk);
        let word = u32::from_be_bytes([0, three[0], three[1], three[2]]);
        for digit in 0..4 {
            let value = (word >> (18 - 6 * digit)) as usize & 63;
            text.push(if digit <= chunk.len() { char::from(DIGITS[value]) } else { '=' });
        }
    }
    text
}

fn params(names: &[&str], common_name: &str, serial: u64) -> CertificateParams {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap_or_else(|error| panic!("no certificate: {error}"));
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.serial_number = Some(SerialNumber::from(serial));
    params
}

impl Certificates {
    /// Writes new ones into `folder`.
    pub fn make(folder: &Path) -> Self {
        let (authority, server) = (Key::new(), Key::new());
        let mut issuer = params(&[], "an authority of this test", 1);
        issuer.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        issuer.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let fail = |error: Error| -> ! { panic!("no certificate: {error}") };
        let ca = issuer.self_signed(&authority).unwrap_or_else(|e| fail(e));
        let signed = params(&["127.0.0.1", "localhost"], "a server of this test", 2)
            .signed_by(&server, &Issuer::new(issuer, authority))
            .unwrap_or_else(|e| fail(e));
        let write = |name: &str, text: String| {
            let path = folder.join(name);
            std::fs::write(&path, text)
                .unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
            path
        };
        Self {
            ca: write("ca.pem", pem("CERTIFICATE", ca.der())),
            certificate: write("server.pem", pem("CERTIFICATE", signed.der())),
            key: write("server-key.pem", server.pem()),
        }
    }
}
