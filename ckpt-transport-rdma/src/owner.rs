//! The owner's side: queue pairs for readers, and the answer whether a region still lives. Bytes move without it.

use std::{sync::Arc, time::Duration};

use ckpt_core::{Error, ErrorKind, Key, Result};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Semaphore, broadcast::error::RecvError},
};
use tokio_util::sync::CancellationToken;

use crate::{
    node::Node,
    verbs::{Path, Qp},
    wire::{Answer, End, Id, Request, examine, random, receive, send},
};

/// A stranger must have introduced itself by then.
const HELLO_TIME: Duration = Duration::from_secs(5);
/// Connections that have not introduced themselves yet; more wait in the kernel's queue.
const STRANGERS: usize = 64;
/// Queue pairs for one reader.
const LANES_LIMIT: usize = 256;
/// A host that fell silent is given up after about this long.
const SILENCE: Duration = Duration::from_secs(10);

/// For every connected socket.
pub(crate) fn tune(stream: &TcpStream) -> std::io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(SILENCE))?;
    let interval = Duration::from_secs(1);
    socket.set_tcp_keepalive(
        &TcpKeepalive::new().with_time(SILENCE / 2).with_interval(interval).with_retries(5),
    )
}

/// Who may come in.
pub(crate) struct Door {
    /// What both sides must know.
    pub(crate) key: Vec<u8>,
    /// Names the transport.
    pub(crate) id: Id,
    pub(crate) stop: CancellationToken,
}

/// Takes connections and serves those that know the secret, until the door's token is cancelled.
pub(crate) async fn accept<F: Future<Output = ()> + Send + 'static>(
    door: Door,
    listener: TcpListener,
    serve: impl Fn(TcpStream) -> F + Clone + Send + 'static,
) {
    let strangers = Arc::new(Semaphore::new(STRANGERS));
    let Door { key, id, stop } = door;
    loop {
        // The semaphore is never closed.
        let Ok(permit) = strangers.clone().acquire_owned().await else { return };
        let mut stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: others may be given back meanwhile.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (key, serve) = (key.clone(), serve.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(async move {
            let introduced = async {
                tune(&stream).map_err(crate::wire::broken)?;
                examine(&mut stream, &key, &id).await
            };
            match tokio::time::timeout(HELLO_TIME, introduced).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return tracing::debug!(%error, "refused a connection"),
                Err(_) => return tracing::debug!("a connection did not introduce itself in time"),
            }
            drop(permit);
            serve(stream).await;
        }));
    }
}

/// Answers one peer until it leaves; then its queue pairs go.
pub(crate) async fn serve(node: Arc<Node>, stream: TcpStream) {
    let (mut reader, writer) = stream.into_split();
    let writer = tokio::sync::Mutex::new(writer);
    let mut releases = node.regions.releases();
    let tell = async {
        loop {
            let released = match releases.recv().await {
                Ok(generation) => Some(generation),
                Err(RecvError::Lagged(_)) => None,
                Err(RecvError::Closed) => return Ok(()),
            };
            send(&mut *writer.lock().await, &Answer::Released(released)).await?;
        }
    };
    let ended = tokio::select! {
        ended = answer(&node, &mut reader, &writer) => ended,
        ended = tell => ended,
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a peer left");
    }
}

async fn answer(
    node: &Arc<Node>,
    reader: &mut OwnedReadHalf,
    writer: &tokio::sync::Mutex<OwnedWriteHalf>,
) -> Result<()> {
    let mut held: Vec<Qp> = Vec::new();
    loop {
        match receive::<Request>(reader).await? {
            Request::Check(number, claims) => {
                let outcome = node.regions.check(&claims);
                send(&mut *writer.lock().await, &Answer::Checked(number, outcome)).await?;
            }
            Request::Connect(ends) => {
                if ends.len() + held.len() > LANES_LIMIT {
                    let what = "a reader asks for too many queue pairs";
                    return Err(Error::new(ErrorKind::Corrupt, "accept a peer", what));
                }
                let node = node.clone();
                let made = tokio::task::spawn_blocking(move || connect(&node, ends)).await;
                let made = made.map_err(|e| {
                    Error::new(ErrorKind::Internal, "accept a peer", "the task ended").caused_by(e)
                })?;
                let mut answers = Vec::new();
                for outcome in made {
                    answers.push(outcome.map(|(qp, end)| {
                        held.push(qp);
                        end
                    }));
                }
                send(&mut *writer.lock().await, &Answer::Connected(answers)).await?;
            }
        }
    }
}

/// A queue pair for each end. After a failure the others of the same pair of NICs are not tried: each try may take
/// seconds.
fn connect(node: &Node, ends: Vec<(u32, End)>) -> Vec<Result<(Qp, End)>> {
    let mut failed: Vec<((u32, [u8; 16]), Error)> = Vec::new();
    ends.into_iter()
        .map(|(nic, end)| {
            let pair = (nic, end.gid);
            if let Some((_, error)) = failed.iter().find(|(known, _)| *known == pair) {
                return Err(error.clone());
            }
            let made = connect_one(node, nic, &end).map_err(|e| e.flattened());
            if let Err(error) = &made {
                tracing::warn!(%error, "a queue pair for a reader cannot be made");
                failed.push((pair, error.clone()));
            }
            made
        })
        .collect()
}

fn connect_one(node: &Node, nic: u32, end: &End) -> Result<(Qp, End)> {
    let nic = node.nics.get(nic as usize).ok_or_else(|| {
        Error::new(ErrorKind::Corrupt, "accept a peer", format!("this process has no NIC {nic}"))
    })?;
    let qp = nic.queue_pair()?;
    let [a, b, c] = random::<3>()?;
    let ours = End {
        gid: nic.address.gid,
        lid: nic.address.lid,
        queue_pair: qp.number(),
        psn: u32::from_le_bytes([a, b, c, 0]),
        mtu: nic.mtu.min(end.mtu),
        reads: nic.reads_in.min(end.reads),
    };
    // A responder needs no more than RTR: nothing is ever sent from here.
    qp.to_rtr(&path(node, nic, end, ours.mtu, ours.reads))
        .map_err(|e| Error::from(e).with(Key::Hca, nic.name()))?;
    Ok((qp, ours))
}

/// The way from `nic` to the other end.
pub(crate) fn path(node: &Node, nic: &crate::nic::Nic, end: &End, mtu: u32, reads: u8) -> Path {
    Path {
        port: nic.port,
        gid_index: nic.gid_index,
        remote_gid: end.gid,
        remote_lid: end.lid,
        ethernet: nic.address.ethernet,
        remote_qp: end.queue_pair,
        remote_psn: end.psn,
        mtu,
        reads,
        traffic_class: node.config.traffic_class,
        service_level: node.config.service_level,
    }
}
