//! A proxy between two ends of a byte stream that has bad days, by seed: for control connections, worker links and HTTP.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    task::JoinHandle,
};

use super::Random;

/// What happens to one direction of one connection, once, at a piece that the seed chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkFault {
    /// The piece is lost.
    Drop,
    /// The piece comes late.
    Delay(Duration),
    /// The piece comes twice.
    Duplicate,
    /// A bit of the piece is turned.
    Corrupt,
    /// The connection ends.
    Cut,
    /// Nothing arrives any more, and nobody is told.
    HalfOpen,
    /// From here on the bytes come one by one, this long apart.
    Slow(Duration),
}

/// Which faults may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayConfig {
    /// Decides everything, with the number of the connection and its direction.
    pub seed: u64,
    /// One in so many directions has a fault; 0 is none.
    pub one_in: u64,
    /// Faults that change bytes: where the stream's own checksum excludes them, leave them out.
    pub corrupts: bool,
}

impl RelayConfig {
    /// The fault of a direction, and the piece that it strikes.
    fn fault(&self, connection: u64, direction: u64) -> Option<(u64, LinkFault, Random)> {
        let mut random =
            Random::new(self.seed.wrapping_mul(0x9e37_79b9).wrapping_add(connection * 2 + direction));
        if self.one_in == 0 || !random.one_in(self.one_in) {
            return None;
        }
        let piece = random.below(6);
        let fault = match random.below(if self.corrupts { 7 } else { 6 }) {
            0 => LinkFault::Drop,
            1 => LinkFault::Delay(Duration::from_millis(random.below(800))),
            2 => LinkFault::Duplicate,
            3 => LinkFault::Cut,
            4 => LinkFault::HalfOpen,
            5 => LinkFault::Slow(Duration::from_millis(1 + random.below(4))),
            _ => LinkFault::Corrupt,
        };
        Some((piece, fault, random))
    }
}

/// A running proxy. It ends, and cuts its connections, when it is dropped.
#[derive(Debug)]
pub struct Relay {
    task: JoinHandle<()>,
    struck: Arc<Mutex<Vec<LinkFault>>>,
    connections: Arc<Mutex<Vec<JoinHandle<()>>>>,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
        lock(&self.connections).iter().for_each(JoinHandle::abort);
    }
}

impl Relay {
    /// In front of the TCP listener `to`, on a free port of this host, which is returned too.
    pub async fn tcp(to: SocketAddr, config: RelayConfig) -> std::io::Result<(Self, SocketAddr)> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        Ok((Self::start(config, Ends::Tcp(listener, to)), address))
    }

    /// In front of the UNIX socket `to`, on the new socket `from`.
    pub fn unix(from: &Path, to: PathBuf, config: RelayConfig) -> std::io::Result<Self> {
        Ok(Self::start(config, Ends::Unix(UnixListener::bind(from)?, to)))
    }

    /// The faults that have happened.
    pub fn struck(&self) -> Vec<LinkFault> {
        lock(&self.struck).clone()
    }

    fn start(config: RelayConfig, ends: Ends) -> Self {
        let (struck, connections) =
            (Arc::<Mutex<Vec<LinkFault>>>::default(), Arc::<Mutex<Vec<_>>>::default());
        let (noted, running, number) = (struck.clone(), connections.clone(), AtomicU64::new(0));
        let task = tokio::spawn(async move {
            loop {
                // A side that cannot be reached is a connection that was cut at once.
                let Ok((client, server)) = ends.next().await else { continue };
                let connection = number.fetch_add(1, Ordering::Relaxed);
                let noted = noted.clone();
                lock(&running).push(tokio::spawn(async move {
                    let (from_client, to_client) = tokio::io::split(client);
                    let (from_server, to_server) = tokio::io::split(server);
                    let there = carry(from_client, to_server, config.fault(connection, 0), &noted);
                    let back = carry(from_server, to_client, config.fault(connection, 1), &noted);
                    // The first side that ends, ends both: dropping the halves closes the sockets.
                    tokio::select! {
                        () = there => {}
                        () = back => {}
                    }
                }));
            }
        });
        Self { task, struck, connections }
    }
}

trait Link: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Link for T {}

/// Where connections come from and where they go.
#[derive(Debug)]
enum Ends {
    Tcp(TcpListener, SocketAddr),
    Unix(UnixListener, PathBuf),
}

impl Ends {
    /// The next client, and its connection to the server.
    async fn next(&self) -> std::io::Result<(Box<dyn Link>, Box<dyn Link>)> {
        Ok(match self {
            Ends::Tcp(listener, to) => {
                let (client, _) = listener.accept().await?;
                (Box::new(client), Box::new(TcpStream::connect(to).await?))
            }
            Ends::Unix(listener, to) => {
                let (client, _) = listener.accept().await?;
                (Box::new(client), Box::new(UnixStream::connect(to).await?))
            }
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Carries bytes until either side ends or the fault says so.
async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    fault: Option<(u64, LinkFault, Random)>,
    struck: &Mutex<Vec<LinkFault>>,
) {
    let mut buffer = [0; 4096];
    let mut number = 0;
    let mut slow = None;
    loop {
        let piece = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(len) => &mut buffer[..len],
        };
        let mut copies = 1;
        if let Some((at, fault, random)) = &fault
            && *at == number
        {
            lock(struck).push(*fault);
            match *fault {
                LinkFault::Drop => copies = 0,
                LinkFault::Delay(time) => tokio::time::sleep(time).await,
                LinkFault::Duplicate => copies = 2,
                LinkFault::Corrupt => {
                    let mut random = random.clone();
                    let at = random.below(piece.len() as u64) as usize;
                    piece[at] ^= 1 << random.below(8);
                }
                LinkFault::Cut => return,
                LinkFault::HalfOpen => return std::future::pending().await,
                LinkFault::Slow(pause) => slow = Some(pause),
            }
        }
        number += 1;
        for _ in 0..copies {
            let sent = match slow {
                None => to.write_all(piece).await,
                Some(pause) => trickle(&mut to, piece, pause).await,
            };
            if sent.is_err() {
                return;
            }
        }
    }
}

async fn trickle(to: &mut (impl AsyncWrite + Unpin), piece: &[u8], pause: Duration) -> std::io::Result<()> {
    for byte in piece {
        to.write_all(std::slice::from_ref(byte)).await?;
        tokio::time::sleep(pause).await;
    }
    Ok(())
}
