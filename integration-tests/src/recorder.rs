//! Somebody on the way between two ends of a TCP connection, who writes down all that passes.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp::OwnedReadHalf, tcp::OwnedWriteHalf},
    task::JoinHandle,
};

/// By direction of each connection: what has passed.
type Passed = Arc<Mutex<Vec<Vec<u8>>>>;

/// A relay that lives as long as this value.
#[derive(Debug)]
pub struct Recorder {
    address: SocketAddr,
    passed: Passed,
    task: JoinHandle<()>,
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Recorder {
    /// Stands in front of `to`, on a free port.
    pub async fn before(to: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("a bound listener has an address");
        let passed = Passed::default();
        let noted = passed.clone();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                // A server that is not there yet: the client sees its connection end, and tries again.
                let Ok(server) = TcpStream::connect(to).await else { continue };
                let ((from_client, to_client), (from_server, to_server)) =
                    (client.into_split(), server.into_split());
                tokio::spawn(carry(from_client, to_server, noted.clone()));
                tokio::spawn(carry(from_server, to_client, noted.clone()));
            }
        });
        Self { address, passed, task }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes that have passed.
    pub fn len_bytes(&self) -> usize {
        self.lock().iter().map(Vec::len).sum()
    }

    /// Whether these bytes have passed, in one direction of one connection.
    pub fn saw(&self, bytes: &[u8]) -> bool {
        self.lock().iter().any(|passed| passed.windows(bytes.len()).any(|window| window == bytes))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.passed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, passed: Passed) {
    let number = {
        let mut passed = passed.lock().unwrap_or_else(PoisonError::into_inner);
        passed.push(Vec::new());
        passed.len() - 1
    };
    let mut piece = vec![0; 64 << 10];
    loop {
        let len = match from.read(&mut piece).await {
            Ok(0) | Err(_) => return,
            Ok(len) => len,
        };
        passed.lock().unwrap_or_else(PoisonError::into_inner)[number].extend_from_slice(&piece[..len]);
        if to.write_all(&piece[..len]).await.is_err() {
            return;
        }
    }
}
