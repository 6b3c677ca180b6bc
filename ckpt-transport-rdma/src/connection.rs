//! A reader's connection to one owner: its lanes, and the TCP connection beside them.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
};

use ckpt_core::{Error, ErrorKind, Key, Result};
use smallvec::SmallVec;
use tokio::{
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::oneshot,
    task::AbortHandle,
};
use tokio_util::sync::CancellationToken;

use crate::{
    lane::Lane,
    memory::Claim,
    nic::Nic,
    node::{Node, Peer},
    owner::{path, tune},
    pair::pairs,
    verbs::Qp,
    wire::{Answer, Descriptor, End, Request, broken, introduce, random, receive, send},
};

type Waiting = Arc<Mutex<Option<HashMap<u32, oneshot::Sender<Result<()>>>>>>;

pub(crate) struct Connection {
    pub(crate) peer: Peer,
    pub(crate) lanes: Vec<Arc<Lane>>,
    /// Those of `lanes`.
    pub(crate) nics: Vec<Arc<Nic>>,
    pub(crate) lost: Lost,
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    waiting: Waiting,
    known: Arc<Known>,
    number: AtomicU32,
    turn: AtomicUsize,
    listening: AbortHandle,
}

/// Whether the owner's side of the TCP connection has ended. Each batch asks, so that it does not take a token's lock.
#[derive(Clone, Default)]
pub(crate) struct Lost(Arc<(AtomicBool, CancellationToken)>);

impl Lost {
    pub(crate) fn tell(&self) {
        self.0.0.store(true, Ordering::Release);
        self.0.1.cancel();
    }

    pub(crate) fn is_told(&self) -> bool {
        self.0.0.load(Ordering::Acquire)
    }

    pub(crate) async fn told(&self) {
        self.0.1.cancelled().await;
    }
}

/// A queue pair that is being connected.
struct Draft {
    pair: (usize, usize),
    qp: Qp,
    ours: End,
}

impl Connection {
    /// Dials, makes queue pairs on every pair of NICs that fits, and connects them. The caller bounds the time.
    pub(crate) async fn open(node: &Arc<Node>, peer: Peer, descriptor: &Descriptor) -> Result<Arc<Self>> {
        let (address, id) = peer;
        let mut stream = TcpStream::connect(address).await.map_err(|e| {
            Error::new(ErrorKind::PeerLost, "connect to a peer", "the peer does not answer").caused_by(e)
        })?;
        tune(&stream).map_err(broken)?;
        introduce(&mut stream, &node.key(&descriptor.secret), &id).await?;
        let drafts = draft(node, peer, descriptor).await?;
        let ends = drafts.iter().map(|draft| (draft.pair.1 as u32, draft.ours.clone())).collect();
        send(&mut stream, &Request::Connect(ends)).await?;
        let answers = loop {
            match receive(&mut stream).await? {
                Answer::Connected(answers) => break answers,
                // Nothing is known of its regions yet.
                Answer::Released(_) => {}
                Answer::Checked(..) => {
                    let what = "it answered something else";
                    return Err(Error::new(ErrorKind::Corrupt, "connect to a peer", what));
                }
            }
        };
        if answers.len() != drafts.len() {
            return Err(Error::new(ErrorKind::Corrupt, "connect to a peer", "it answered too little"));
        }
        let lanes = finish(node, drafts, answers).await?;
        let (reader, writer) = stream.into_split();
        let (waiting, lost): (Waiting, _) = (Arc::new(Mutex::new(Some(HashMap::new()))), Lost::default());
        let known = Arc::new(Known::default());
        let listening =
            tokio::spawn(listen(reader, waiting.clone(), known.clone(), lost.clone())).abort_handle();
        let mut nics: Vec<Arc<Nic>> = Vec::new();
        for lane in &lanes {
            if !nics.iter().any(|nic| Arc::ptr_eq(nic, &lane.nic)) {
                nics.push(lane.nic.clone());
            }
        }
        let connection = Self {
            peer,
            lanes,
            nics,
            lost,
            writer: tokio::sync::Mutex::new(writer),
            waiting,
            known,
            number: AtomicU32::new(0),
            turn: AtomicUsize::new(0),
            listening,
        };
        tracing::debug!(%address, lanes = connection.lanes.len(), "connected to an owner");
        Ok(Arc::new(connection))
    }

    /// Whether new reads may use it: all lanes are good. One that lost a lane is replaced.
    pub(crate) fn is_usable(&self) -> bool {
        !self.lost.is_told() && self.lanes.iter().all(|lane| lane.is_open())
    }

    /// Whether the owner has said that `claims` hold, and not that it has released one since. That makes sure whose memory
    /// the keys are of; whether it still lives is the device's to say, since keys are never given out twice.
    pub(crate) fn knows(&self, claims: &[Claim]) -> bool {
        let known = self.known.lock();
        claims.iter().all(|claim| known.get(&key_of(claim)).is_some_and(|end| claim.end <= *end))
    }

    /// Rises when the owner has released a region: what was known before may be over.
    pub(crate) fn releases(&self) -> u64 {
        self.known.releases.load(Ordering::Acquire)
    }

    /// Makes sure that `claims` hold.
    pub(crate) async fn make_sure(&self, claims: &[Claim]) -> Result<()> {
        if self.knows(claims) {
            return Ok(());
        }
        self.check(claims).await?;
        let mut known = self.known.lock();
        for claim in claims {
            let end = known.entry(key_of(claim)).or_default();
            *end = (*end).max(claim.end);
        }
        Ok(())
    }

    /// Asks the owner whether `claims` hold.
    pub(crate) async fn check(&self, claims: &[Claim]) -> Result<()> {
        let lost = || {
            Error::new(ErrorKind::PeerLost, "talk to a peer", "the owner has ended or closed its transport")
        };
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            // `None` once nobody listens any more.
            waiting.as_mut().ok_or_else(lost)?.insert(number, sender);
        }
        let request = Request::Check(number, claims.to_vec());
        let mut writer = self.writer.lock().await;
        // A frame that is cut short by a cancelled caller ends the connection, as the next would not be understood.
        let whole = Whole { connection: self, done: false };
        let sent = send(&mut *writer, &request).await;
        whole.done();
        drop(writer);
        sent?;
        receiver.await.unwrap_or_else(|_| Err(lost()))
    }

    /// The lanes that still work, beginning with another one each time.
    pub(crate) fn open_lanes(&self) -> SmallVec<[&Arc<Lane>; 4]> {
        let mut lanes: SmallVec<[&Arc<Lane>; 4]> = self.lanes.iter().filter(|lane| lane.is_open()).collect();
        if !lanes.is_empty() {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed) % lanes.len();
            lanes.rotate_left(turn);
        }
        lanes
    }

    /// Which lane to take that still works, another one each time.
    pub(crate) fn next_lane(&self) -> Option<usize> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.lanes.len().max(1);
        let (before, after) = (0..turn, turn..self.lanes.len());
        after.chain(before).find(|lane| self.lanes[*lane].is_open())
    }

    /// Polls once.
    pub(crate) fn look(&self) {
        self.nics.iter().for_each(|nic| nic.look(&self.lanes));
    }

    /// Polls for whoever waits and goes on polling.
    pub(crate) fn help(&self) {
        self.nics.iter().for_each(|nic| nic.help(&self.lanes));
    }

    /// The devices' threads must look after what flies here while the answer lives.
    pub(crate) fn rely(self: &Arc<Self>) -> Reliance {
        self.nics.iter().for_each(|nic| nic.rely());
        Reliance(self.clone())
    }

    /// Ends all lanes; reads in flight fail.
    pub(crate) fn kill(&self) {
        self.lanes.iter().for_each(|lane| lane.close());
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.listening.abort();
        self.kill();
    }
}

/// Of a batch whose waiter does not poll, or not long enough.
pub(crate) struct Reliance(Arc<Connection>);

impl Drop for Reliance {
    fn drop(&mut self) {
        self.0.nics.iter().for_each(|nic| nic.let_go());
    }
}

struct Whole<'a> {
    connection: &'a Connection,
    done: bool,
}

impl Whole<'_> {
    fn done(mut self) {
        self.done = true;
    }
}

impl Drop for Whole<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.connection.lost.tell();
        }
    }
}

/// What the owner has said of its regions: how far each reaches, by generation, address, and whether it may be written.
#[derive(Default)]
struct Known {
    ends: Mutex<BTreeMap<(u64, u64, bool), u64>>,
    releases: AtomicU64,
}

fn key_of(claim: &Claim) -> (u64, u64, bool) {
    (claim.generation, claim.address, claim.write)
}

impl Known {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<(u64, u64, bool), u64>> {
        // Each change under this lock is one call.
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Without a generation all are meant.
    fn forget(&self, generation: Option<u64>) {
        self.lock().retain(|key, _| generation.is_some_and(|generation| key.0 != generation));
        self.releases.fetch_add(1, Ordering::Release);
    }
}

/// Hands answers to those who wait, until the connection ends.
async fn listen(mut reader: OwnedReadHalf, waiting: Waiting, known: Arc<Known>, lost: Lost) {
    loop {
        match receive::<Answer>(&mut reader).await {
            Ok(Answer::Checked(number, outcome)) => {
                let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
                let sender = waiting.as_mut().and_then(|waiting| waiting.remove(&number));
                // Nobody waits for the answer to a read that has timed out.
                sender.map(|sender| sender.send(outcome));
            }
            Ok(Answer::Released(generation)) => known.forget(generation),
            Ok(Answer::Connected(_)) => {}
            Err(error) => {
                tracing::debug!(%error, "an owner left");
                let unanswered = waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
                drop(unanswered);
                return lost.tell();
            }
        }
    }
}

/// Queue pairs on this side.
async fn draft(node: &Arc<Node>, peer: Peer, descriptor: &Descriptor) -> Result<Vec<Draft>> {
    let local: Vec<_> = node.nics.iter().map(|nic| nic.address.clone()).collect();
    let pairs = pairs(&local, &descriptor.nics);
    if pairs.is_empty() {
        let names = |nics: &[crate::nic::NicAddress]| {
            let kind = |nic: &crate::nic::NicAddress| if nic.ethernet { "RoCE" } else { "InfiniBand" };
            nics.iter().map(|nic| format!("{} ({})", nic.hca, kind(nic))).collect::<Vec<_>>().join(", ")
        };
        return Err(Error::new(
            ErrorKind::ConfigInvalid,
            "connect to a peer",
            format!(
                "no RDMA device here reaches one there: here {}; there {}; choose others with NCCL_IB_HCA",
                names(&local),
                names(&descriptor.nics)
            ),
        ));
    }
    let pairs = node.trusted(peer, pairs);
    let node = node.clone();
    blocking(move || {
        let mut drafts = Vec::new();
        for _ in 0..node.config.queue_pairs {
            for pair in &pairs {
                let nic = &node.nics[pair.0];
                let qp = nic.queue_pair()?;
                let [a, b, c] = random::<3>()?;
                let ours = End {
                    gid: nic.address.gid,
                    lid: nic.address.lid,
                    queue_pair: qp.number(),
                    psn: u32::from_le_bytes([a, b, c, 0]),
                    mtu: nic.mtu,
                    reads: nic.reads_out,
                };
                drafts.push(Draft { pair: *pair, qp, ours });
            }
        }
        Ok(drafts)
    })
    .await
}

/// Connects this side to the owner's queue pairs. Those that fail are left out if others work.
async fn finish(node: &Arc<Node>, drafts: Vec<Draft>, answers: Vec<Result<End>>) -> Result<Vec<Arc<Lane>>> {
    let node = node.clone();
    blocking(move || {
        let (mut lanes, mut failed) = (Vec::new(), Vec::<((usize, usize), Error)>::new());
        for (draft, answer) in drafts.into_iter().zip(answers) {
            let Draft { pair, qp, ours } = draft;
            if failed.iter().any(|(known, _)| *known == pair) {
                continue;
            }
            let nic = &node.nics[pair.0];
            let connected = answer.and_then(|theirs| {
                let reads = ours.reads.min(theirs.reads);
                let mtu = ours.mtu.min(theirs.mtu);
                let named = |e: crate::VerbsError| Error::from(e).with(Key::Hca, nic.name());
                qp.to_rtr(&path(&node, nic, &theirs, mtu, reads)).map_err(named)?;
                let (timeout, retries) = (node.config.timeout, node.config.retry_count);
                qp.to_rts(ours.psn, reads, timeout, retries).map_err(named)?;
                nic.room.take(nic.depth).ok_or_else(|| no_room(nic))
            });
            match connected {
                Ok(room) => lanes.push(Lane::new(qp, nic.clone(), lanes.len(), pair.1, room)),
                Err(error) => {
                    tracing::warn!(%error, hca = nic.name(), "a pair of RDMA devices cannot be connected");
                    failed.push((pair, error));
                }
            }
        }
        match failed.into_iter().next() {
            Some((_, error)) if lanes.is_empty() => {
                let what = "no queue pair can be connected: is there a route between the RDMA networks of both hosts?";
                let hca = error.get(Key::Hca).unwrap_or_default().to_owned();
                let kind = if error.kind() == ErrorKind::Backend { ErrorKind::PeerLost } else { error.kind() };
                Err(Error::new(kind, "connect to a peer", what).with(Key::Hca, hca).caused_by(error))
            }
            _ => Ok(lanes),
        }
    })
    .await
}

fn no_room(nic: &Nic) -> Error {
    let what = "too many queue pairs are open for the completion queue of this device; lower CKPT_RDMA_QPS";
    Error::new(ErrorKind::ResourceExhausted, "connect to a peer", what).with(Key::Hca, nic.name())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| {
        Err(Error::new(ErrorKind::Internal, "connect to a peer", "the task ended").caused_by(e))
    })
}
