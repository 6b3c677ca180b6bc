//! One GET over TCP or a UNIX socket.

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

use crate::LONG;

/// What a server answered.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The status code.
    pub status: u16,
    /// The body.
    pub body: String,
}

impl Reply {
    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("no JSON ({error}): {}", self.body))
    }
}

/// Gets `path` from a server at `http://host:port` or `unix:/path`.
pub async fn http_get(address: &str, path: &str) -> Reply {
    let exchange = async {
        match address.strip_prefix("unix:") {
            Some(socket) => get(UnixStream::connect(socket).await?, path).await,
            None => get(TcpStream::connect(address.trim_start_matches("http://")).await?, path).await,
        }
    };
    match tokio::time::timeout(LONG, exchange).await {
        Ok(Ok(reply)) => reply,
        Ok(Err(error)) => panic!("GET {address}{path} failed: {error}"),
        Err(_) => panic!("GET {address}{path} had no answer"),
    }
}

async fn get(mut stream: impl AsyncRead + AsyncWrite + Unpin, path: &str) -> std::io::Result<Reply> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    let bad = || std::io::Error::new(std::io::ErrorKind::InvalidData, format!("not HTTP: {answer}"));
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(bad)?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or_else(bad)?;
    Ok(Reply { status, body: body.to_owned() })
}
