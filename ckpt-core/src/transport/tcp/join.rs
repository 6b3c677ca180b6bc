//! How a group forms: members meet at the root, connect to each other, and start together.

use std::{net::SocketAddr, sync::Arc, time::Duration, time::Instant};

use futures_util::future::{join_all, try_join, try_join_all};
use tokio_util::sync::CancellationToken;

use super::{
    link::Link,
    mesh::{Mesh, Peer},
    node::{Inbox, Incoming, Node},
    socket::{read_exact, write_all},
    wire::{Hello, Purpose, Table, Token, introduce, receive, send},
};
use crate::{
    error::{Error, ErrorKind, Key, Result},
    transport::{GroupSpec, group::missing},
};

/// How long a refusal may take to be written.
const REFUSAL_TIME: Duration = Duration::from_secs(1);
const READY: u8 = 1;

/// Forms the group, or undoes everything by the deadline: sockets belong to this future until it is done. Errors call
/// member n `names[n]`, or n where there are no names.
pub(super) async fn join(
    node: &Arc<Node>,
    spec: &GroupSpec,
    names: &[u32],
    deadline: Instant,
) -> Result<Arc<Mesh>> {
    let name = |rank: u32| names.get(rank as usize).copied().unwrap_or(rank);
    let named = |error: Error| {
        error
            .renamed(Key::Rank, |rank| rank.parse().map_or_else(|_| rank.to_owned(), |n| name(n).to_string()))
    };
    let mut peers = meet(node, spec, deadline).await.map_err(named)?;
    peers.iter_mut().for_each(|peer| peer.name = name(peer.rank));
    Ok(Mesh::start(spec.rank, spec.world_size, peers))
}

async fn meet(node: &Arc<Node>, spec: &GroupSpec, deadline: Instant) -> Result<Vec<Peer>> {
    let token = Token::decode(&spec.token)?;
    let inbox = node.inbox(&token, spec.rank == 0)?;
    let world_size = spec.world_size as usize;
    let mut forming = Forming {
        node,
        spec,
        dialler: Dialler { node, spec, key: node.key(&token.secret), token },
        inbox,
        met: (0..world_size).map(|_| None).collect(),
        links: Vec::new(),
        stage: "waiting for the root",
    };
    let formed = tokio::time::timeout_at(deadline.into(), forming.form()).await;
    let outcome = formed.unwrap_or_else(|_| Err(forming.timed_out()));
    let outcome = outcome.and_then(|()| forming.peers());
    match outcome {
        Ok(peers) => Ok(peers),
        Err(error) => {
            forming.give_up(&error).await;
            Err(error)
        }
    }
}

/// The connections between this member and another, as they come.
#[derive(Default)]
struct Links {
    control: Option<Link>,
    lanes: Vec<Option<Link>>,
}

/// What it takes to connect to a member.
struct Dialler<'a> {
    node: &'a Node,
    spec: &'a GroupSpec,
    token: Token,
    key: Vec<u8>,
}

impl Dialler<'_> {
    async fn dial(&self, address: SocketAddr, purpose: Purpose) -> Result<Link> {
        let stream = self.node.dial(address).await?;
        let hello = Hello {
            id: self.token.group,
            rank: self.spec.rank,
            world_size: self.spec.world_size,
            epoch: self.spec.epoch.0,
            purpose,
        };
        introduce(&stream, &self.key, &hello).await.map_err(|e| e.with(Key::Peer, address))?;
        Ok(stream)
    }
}

struct Forming<'a> {
    node: &'a Arc<Node>,
    spec: &'a GroupSpec,
    dialler: Dialler<'a>,
    inbox: Inbox,
    /// Root only: who has come, and where it listens.
    met: Vec<Option<(SocketAddr, Arc<Link>)>>,
    /// By member.
    links: Vec<Links>,
    stage: &'static str,
}

impl Forming<'_> {
    async fn form(&mut self) -> Result<()> {
        if self.spec.world_size == 1 {
            return Ok(());
        }
        if self.spec.rank == 0 { self.form_as_root().await } else { self.form_as_member().await }
    }

    async fn form_as_root(&mut self) -> Result<()> {
        self.stage = "waiting for the other members";
        while self.met.iter().skip(1).any(Option::is_none) {
            let incoming = self.inbox.next().await?;
            self.meet(incoming).await;
        }
        let listens = |met: &Option<(SocketAddr, Arc<Link>)>| met.as_ref().map_or(self.node.listens, |m| m.0);
        let table = Table { lanes: self.node.lanes as u32, listens: self.met.iter().map(listens).collect() };
        self.prepare(&table)?;
        self.stage = "connecting the members";
        let met = self.met.clone();
        let ready = try_join_all(met.iter().enumerate().skip(1).map(|(rank, member)| {
            let table = &table;
            async move {
                let Some((address, stream)) = member else { return Ok(()) };
                let blame = |e: Error| e.with(Key::Rank, rank).with(Key::Peer, address);
                send::<Result<&Table, Error>>(stream, &Ok(table)).await.map_err(blame)?;
                let mut byte = [0];
                read_exact(stream, &mut byte).await.map_err(|e| blame(super::wire::broken(e)))
            }
        }));
        try_join(self.connect(&table), ready).await?;
        for (rank, member) in self.met.iter().enumerate().skip(1) {
            if let Some((_, stream)) = member {
                send::<Result<(), Error>>(stream, &Ok(())).await.map_err(|e| e.with(Key::Rank, rank))?;
            }
        }
        // Nobody is to be told of a failure any more.
        self.met.clear();
        Ok(())
    }

    /// Root: takes a member in, or tells it why not.
    async fn meet(&mut self, incoming: Incoming) {
        let Incoming { hello, stream } = incoming;
        let Purpose::Meet { listens } = hello.purpose else { return };
        let place = self.met.get_mut(hello.rank as usize);
        let refusal = match place {
            _ if hello.world_size != self.spec.world_size || hello.epoch != self.spec.epoch.0 => format!(
                "the root forms a group of {} for epoch {}, this member one of {} for epoch {}",
                self.spec.world_size, self.spec.epoch, hello.world_size, hello.epoch
            ),
            // A member that has died meanwhile may come again.
            Some(place) if hello.rank != 0 && place.as_ref().is_none_or(|(_, old)| !old.is_idle()) => {
                *place = Some((listens, Arc::new(stream)));
                return;
            }
            Some(_) => format!("another member has joined as number {}", hello.rank),
            None => format!("there is no member {}", hello.rank),
        };
        let error = Error::new(ErrorKind::ConfigInvalid, "join a group", refusal).with(Key::Rank, hello.rank);
        refuse(&stream, &error).await;
    }

    async fn form_as_member(&mut self) -> Result<()> {
        let listens = self.node.listens;
        let root = self
            .dialler
            .dial(self.dialler.token.root, Purpose::Meet { listens })
            .await
            .map_err(|e| e.with(Key::Rank, 0))?;
        let blame = |e: Error| e.with(Key::Rank, 0).with(Key::Peer, self.dialler.token.root);
        self.stage = "waiting for the root and the other members";
        let table: Table = receive::<Result<Table, Error>>(&root).await.map_err(blame)??;
        self.prepare(&table)?;
        self.stage = "connecting to the other members";
        let address = self.dialler.token.root;
        let verdict = async {
            let error = |e: Error| e.with(Key::Rank, 0).with(Key::Peer, address);
            receive::<Result<(), Error>>(&root).await.map_err(error)?
        };
        let mut verdict = std::pin::pin!(verdict);
        tokio::select! {
            connected = self.connect(&table) => connected?,
            // Before this member is ready only a failure can come.
            failed = &mut verdict => return failed,
        }
        self.stage = "waiting for the others to be connected";
        write_all(&root, &[READY], &[]).await.map_err(super::wire::broken)?;
        verdict.await
    }

    fn prepare(&mut self, table: &Table) -> Result<()> {
        if table.listens.len() != self.spec.world_size as usize || !(1..=64).contains(&table.lanes) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "join a group",
                "the root's table of members is wrong",
            ));
        }
        let empty = || Links { control: None, lanes: (0..table.lanes).map(|_| None).collect() };
        self.links = table.listens.iter().map(|_| empty()).collect();
        Ok(())
    }

    /// Dials all lower members and is dialled by all higher ones.
    async fn connect(&mut self, table: &Table) -> Result<()> {
        let rank = self.spec.rank as usize;
        let mut links = std::mem::take(&mut self.links);
        let (lower, higher) = links.split_at_mut(rank);
        let Self { dialler, inbox, spec, .. } = self;
        let dialler = &*dialler;
        let dials =
            try_join_all(lower.iter_mut().zip(&table.listens).enumerate().map(|(peer, (links, address))| {
                let blame = move |e: Error| e.with(Key::Rank, peer).with(Key::Peer, address);
                async move {
                    links.control = Some(dialler.dial(*address, Purpose::Control).await.map_err(blame)?);
                    for (lane, slot) in links.lanes.iter_mut().enumerate() {
                        let purpose = Purpose::Lane { lane: lane as u32 };
                        *slot = Some(dialler.dial(*address, purpose).await.map_err(blame)?);
                    }
                    Ok(())
                }
            }));
        let expected = (spec.world_size as usize - rank - 1) * (table.lanes as usize + 1);
        let outcome = try_join(dials, accept(inbox, spec, &mut higher[1..], expected)).await;
        self.links = links;
        outcome.map(drop)
    }

    fn peers(&mut self) -> Result<Vec<Peer>> {
        let incomplete = || Error::new(ErrorKind::Internal, "join a group", "a connection is missing");
        let mut peers = Vec::new();
        for (rank, links) in std::mem::take(&mut self.links).into_iter().enumerate() {
            if rank == self.spec.rank as usize {
                continue;
            }
            let control = links.control.ok_or_else(incomplete)?;
            let address = control.socket().peer_addr().map_err(super::wire::broken)?;
            let lanes = links.lanes.into_iter().collect::<Option<Vec<_>>>().ok_or_else(incomplete)?;
            let (control, gone) = (Arc::new(control), CancellationToken::new());
            let rank = rank as u32;
            peers.push(Peer { rank, name: rank, address, lanes, control, gone });
        }
        Ok(peers)
    }

    fn timed_out(&self) -> Error {
        let absent =
            missing(self.spec.world_size, |r| r == 0 || self.met.get(r as usize).is_none_or(Option::is_some));
        let message = if self.spec.rank == 0 && !absent.is_empty() {
            format!("members {absent} did not join by the deadline")
        } else {
            format!("the deadline passed while {}", self.stage)
        };
        Error::new(ErrorKind::Timeout, "join a group", message).with(Key::Rank, self.spec.rank)
    }

    /// Root: tells those who came that nothing comes of it.
    async fn give_up(&self, cause: &Error) {
        join_all(self.met.iter().flatten().map(|(_, stream)| refuse(stream, cause))).await;
    }
}

async fn refuse(stream: &Link, cause: &Error) {
    let refusal: Result<(), Error> = Err(cause.flattened());
    // A member that cannot be told sees the connection end.
    let _ = tokio::time::timeout(REFUSAL_TIME, send(stream, &refusal)).await;
}

/// Takes `expected` connections from higher members.
async fn accept(
    inbox: &mut Inbox,
    spec: &GroupSpec,
    higher: &mut [Links],
    mut expected: usize,
) -> Result<()> {
    while expected > 0 {
        let Incoming { hello, stream } = inbox.next().await?;
        let links = (hello.rank.checked_sub(spec.rank + 1)).and_then(|place| higher.get_mut(place as usize));
        let slot = match (links, &hello.purpose) {
            (Some(links), Purpose::Control) => Some(&mut links.control),
            (Some(links), Purpose::Lane { lane }) => links.lanes.get_mut(*lane as usize),
            _ => None,
        };
        let fits = hello.world_size == spec.world_size && hello.epoch == spec.epoch.0;
        match slot {
            Some(slot) if fits && slot.is_none() => {
                *slot = Some(stream);
                expected -= 1;
            }
            // It knows the secret and still does not fit: a member that came twice, or with another epoch.
            _ => {
                let error =
                    Error::new(ErrorKind::ConfigInvalid, "join a group", "the group is being formed already");
                refuse(&stream, &error.with(Key::Rank, hello.rank)).await;
            }
        }
    }
    Ok(())
}
