//! TLS by rustls. The crypto provider is graviola: Rust and assembly inside it, so that no C compiler is needed.

mod bulk;
mod job;
mod web;

use std::sync::{Arc, OnceLock};

use rustls::crypto::CryptoProvider;

pub(crate) use self::bulk::Secure;
pub(super) use self::{
    job::Job,
    web::{Server, configure, explain},
};
use super::OPERATION;
use crate::error::{Error, ErrorKind, Result};

/// Graviola panics on a processor that lacks what it needs, so this must be asked before anything is computed.
pub(super) fn check() -> Result<()> {
    if graviola::util::is_cpu_supported() {
        return Ok(());
    }
    let wanted = if cfg!(target_arch = "x86_64") {
        "aes, pclmulqdq, bmi1, adx, avx and avx2 (x86-64 from about 2014 on)"
    } else {
        "aes, pmull, sha2 and neon"
    };
    let message =
        format!("this processor lacks an instruction set that TLS needs here: {wanted}; go without TLS");
    Err(Error::new(ErrorKind::Unsupported, OPERATION, message))
}

/// Computes nothing.
fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(rustls_graviola::default_provider())).clone()
}

fn internal(message: &'static str, cause: rustls::Error) -> Error {
    Error::new(ErrorKind::Internal, OPERATION, message).caused_by(cause)
}
