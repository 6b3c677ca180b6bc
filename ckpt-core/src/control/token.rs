//! The job's shared secret: whoever has it may join the job.
//!
//! It keeps a rank of another job, or a stranger on the network, out of this one. It crosses the network in clear
//! text unless the job has TLS, so without TLS it is no defence against somebody who can read the traffic between the nodes.

use std::{
    fmt,
    fs::{self, OpenOptions},
    io::{ErrorKind as IoKind, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use subtle::ConstantTimeEq;

use crate::error::{Error, ErrorKind, Key, Result};

/// Longest accepted token, bytes.
const MAX_TOKEN_BYTES: u64 = 4096;
/// Bytes of randomness in a token that is made up here.
const RANDOM_BYTES: usize = 32;

/// A job's secret. It never appears in a log: `Debug` hides it, there is no `Display`, and `==` takes the same time
/// wherever the first difference is.
#[derive(Clone)]
pub struct Token(Bytes);

impl Token {
    /// Wraps the bytes of a secret; an error if there are none or too many.
    pub fn new(secret: impl Into<Bytes>) -> Result<Self> {
        let secret = secret.into();
        if secret.is_empty() || secret.len() as u64 > MAX_TOKEN_BYTES {
            return Err(Error::new(
                ErrorKind::ConfigInvalid,
                "read the token",
                format!("a token has 1 to {MAX_TOKEN_BYTES} bytes, this one has {}", secret.len()),
            ));
        }
        Ok(Self(secret))
    }

    /// Makes one up: 64 hexadecimal digits, so that it also fits into an environment variable.
    pub fn random() -> Result<Self> {
        let mut random = [0_u8; RANDOM_BYTES];
        getrandom::fill(&mut random).map_err(|e| {
            Error::new(ErrorKind::Backend, "make a token", "the system has no randomness to give")
                .caused_by(e.to_string())
        })?;
        let text: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self(Bytes::from(text)))
    }

    /// Reads it from a file, without white space around it. A file that others may read is used with a warning.
    pub fn from_file(path: &Path) -> Result<Self> {
        let fail = |message: String| {
            Error::new(ErrorKind::ConfigInvalid, "read the token file", message)
                .with(Key::Path, path.display())
        };
        let metadata = fs::metadata(path).map_err(|e| fail(format!("cannot open it: {e}")))?;
        if !metadata.is_file() || metadata.len() > MAX_TOKEN_BYTES {
            return Err(fail(format!("a token file is a plain file of at most {MAX_TOKEN_BYTES} bytes")));
        }
        if metadata.mode() & 0o077 != 0 {
            tracing::warn!(
                path = %path.display(),
                mode = format!("{:o}", metadata.mode() & 0o777),
                "other users can read the token file; run chmod 600 on it"
            );
        }
        let text = fs::read(path).map_err(|e| fail(format!("cannot read it: {e}")))?;
        let secret = text.trim_ascii();
        if secret.is_empty() {
            return Err(fail("it is empty; write the job's token into it".into()));
        }
        Self::new(Bytes::copy_from_slice(secret))
    }

    /// Writes it to `path` with mode 0600, whole or not at all; an older file there is replaced.
    pub fn write_to(&self, path: &Path) -> Result<()> {
        let temporary = path.with_extension(format!("{}.new", std::process::id()));
        let write = || -> std::io::Result<()> {
            match fs::remove_file(&temporary) {
                Err(e) if e.kind() != IoKind::NotFound => return Err(e),
                _ => {}
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
            file.write_all(&self.0)?;
            fs::rename(&temporary, path)
        };
        write().map_err(|e| {
            Error::new(ErrorKind::Backend, "write the token file", format!("cannot write it: {e}"))
                .with(Key::Path, path.display())
        })
    }

    /// The secret, for the first message of a session and for a child's environment. Do not print it.
    pub fn reveal(&self) -> &Bytes {
        &self.0
    }

    /// Compares with what a stranger sent, in constant time.
    pub fn matches(&self, presented: &[u8]) -> bool {
        self.0.ct_eq(presented).into()
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.matches(&other.0)
    }
}

impl Eq for Token {}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(hidden)")
    }
}

/// Where a rank finds the token when it connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenSource {
    /// It is known.
    Known(Token),
    /// Rank 0 on this host writes it to this file when its hub is up; read anew at each attempt to connect.
    File(PathBuf),
}

impl TokenSource {
    /// The token as of now.
    pub fn read(&self) -> Result<Token> {
        match self {
            TokenSource::Known(token) => Ok(token.clone()),
            TokenSource::File(path) => Token::from_file(path),
        }
    }
}

impl From<Token> for TokenSource {
    fn from(token: Token) -> Self {
        TokenSource::Known(token)
    }
}

/// A token file that is removed when this value is dropped, unless somebody else has replaced it.
#[derive(Debug)]
pub struct PublishedToken {
    path: PathBuf,
    token: Token,
}

impl PublishedToken {
    /// Writes the file.
    pub fn new(path: PathBuf, token: Token) -> Result<Self> {
        token.write_to(&path)?;
        Ok(Self { path, token })
    }
}

impl Drop for PublishedToken {
    fn drop(&mut self) {
        if Token::from_file(&self.path).is_ok_and(|there| there == self.token)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::debug!(path = %self.path.display(), %error, "the token file stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_hides_itself_and_compares() {
        let token = Token::new("s3cret").unwrap();
        assert!(!format!("{token:?} {:?}", TokenSource::Known(token.clone())).contains("s3cret"));
        assert!(token.matches(b"s3cret"));
        assert!(!token.matches(b"s3creT"));
        assert!(!token.matches(b"s3cre"));
        assert!(!token.matches(b""));
        assert!(Token::new("").is_err());
        assert_ne!(Token::random().unwrap(), Token::random().unwrap());
        assert_eq!(Token::random().unwrap().reveal().len(), 64);
    }

    #[test]
    fn a_file_round_trips_with_mode_0600() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let error = Token::from_file(&path).unwrap_err().to_string();
        assert!(error.contains("cannot open it") && error.contains("token"), "{error}");
        fs::write(&path, "  \n").unwrap();
        assert!(Token::from_file(&path).unwrap_err().to_string().contains("it is empty"));
        fs::write(&path, " abc \n").unwrap();
        assert!(Token::from_file(&path).unwrap().matches(b"abc"));
        fs::write(&path, vec![b'x'; 5000]).unwrap();
        assert!(Token::from_file(&path).is_err());
        assert!(Token::from_file(dir.path()).is_err());

        let token = Token::random().unwrap();
        let published = PublishedToken::new(path.clone(), token.clone()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(TokenSource::File(path.clone()).read().unwrap(), token);
        drop(published);
        assert!(!path.exists());

        let published = PublishedToken::new(path.clone(), token).unwrap();
        Token::new("the next job's").unwrap().write_to(&path).unwrap();
        drop(published);
        assert!(path.exists(), "a file that was replaced is not ours to remove");
    }
}
