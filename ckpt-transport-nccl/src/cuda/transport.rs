//! Opening the transport, and how the members of a group agree on what each of them uses.

use std::{sync::Arc, time::Instant};

use async_trait::async_trait;
use bytes::Bytes;
use ckpt_core::{
    Epoch, Error, ErrorKind, Key, Result,
    transport::{
        Capability, Collective, Communicator, GroupSpec, OneSided, Probe, Transport, TransportConfig,
        TransportProvider,
    },
};

use super::{
    layout::{Layout, Rails},
    meeting::{Meeting, Word, out_of_order},
    rails,
};
use crate::{CudaIpcProvider, CudaIpcTransport, NcclProvider, device::DriverCell, ipc::Queue};

const OPERATION: &str = "join a group";

/// Opens `cuda` transports.
#[derive(Debug)]
pub struct CudaTransportProvider {
    ipc: CudaIpcProvider,
    nccl: NcclProvider,
}

impl CudaTransportProvider {
    /// A provider on the driver that the CUDA devices use.
    pub fn new(driver: DriverCell) -> Self {
        Self::of(CudaIpcProvider::new(driver.clone()), NcclProvider::new(driver))
    }

    pub(crate) fn of(ipc: CudaIpcProvider, nccl: NcclProvider) -> Self {
        Self { ipc, nccl }
    }
}

impl TransportProvider for CudaTransportProvider {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn probe(&self) -> Probe {
        match (self.ipc.probe(), self.nccl.probe()) {
            (Probe::Available(ipc), Probe::Available(nccl)) => {
                Probe::Available(format!("{ipc}; between hosts: {nccl}"))
            }
            (Probe::Available(ipc), Probe::Unavailable(why)) => {
                Probe::Available(format!("{ipc}; not between hosts: {why}"))
            }
            (Probe::Unavailable(why), _) => Probe::Unavailable(why),
        }
    }

    /// Must be called in a tokio runtime.
    fn open(&self, config: &TransportConfig) -> Result<Arc<dyn Transport>> {
        let ipc = self.ipc.open_ipc(config)?;
        Ok(Arc::new(CudaTransport { ipc, nccl: self.nccl.open(config) }))
    }
}

/// CUDA IPC inside hosts, NCCL between them.
#[derive(Debug)]
pub struct CudaTransport {
    ipc: CudaIpcTransport,
    nccl: Result<Arc<dyn Transport>>,
}

impl Transport for CudaTransport {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn capability(&self) -> Capability {
        Capability { across_hosts: self.nccl.is_ok(), ..self.ipc.capability() }
    }

    fn collective(&self) -> Option<&dyn Collective> {
        Some(self)
    }

    fn one_sided(&self) -> Option<&dyn OneSided> {
        None
    }
}

impl CudaTransport {
    fn nccl(&self) -> Result<&dyn Collective> {
        self.nccl.as_ref().map_err(Clone::clone)?.collective().ok_or_else(|| {
            Error::new(ErrorKind::Internal, OPERATION, "a transport between GPUs has no broadcasts")
        })
    }

    /// Every member takes the same way through here: it depends on nothing but what all have told each other.
    async fn form(&self, meeting: &mut Meeting, group: Place, deadline: Instant) -> Result<Communicator> {
        let no_nccl = self.nccl.as_ref().err().map(Error::flattened);
        let (mut hosts, mut without) = (Vec::new(), None);
        for (member, word) in (0..).zip(meeting.all(Word::Here { host: self.ipc.host(), no_nccl }).await?) {
            let Word::Here { host, no_nccl } = word else { return Err(out_of_order()) };
            hosts.push(host);
            without = without.or(no_nccl.map(|why: Error| why.with(Key::Rank, member)));
        }
        let layout = Layout::of(&hosts, group.rank);
        let copies = match &layout {
            Layout::OneHost => {
                self.copies(meeting, &(0..group.world_size).collect::<Vec<_>>(), group, deadline).await?
            }
            // Nothing but NCCL will do between hosts, so there is no need to try the rest.
            Layout::Rails(rails) if without.is_none() => {
                self.copies(meeting, &rails.node, group, deadline).await?
            }
            Layout::Rails(_) => {
                Err(Error::new(ErrorKind::Unsupported, OPERATION, "the group is on several hosts"))
            }
            Layout::Apart(why) => Err(Error::new(ErrorKind::Unsupported, OPERATION, why.clone())),
        };
        let why = match (copies, layout) {
            (Ok(node), Layout::Rails(rails)) => {
                return self.rails(meeting, node, rails, group.epoch, deadline).await;
            }
            (Ok(node), _) => {
                tracing::debug!(members = group.world_size, "the group copies over CUDA IPC");
                return Ok(node.communicator());
            }
            (Err(why), _) => why,
        };
        tracing::info!(error = %why, "no CUDA IPC between these members: the group uses NCCL");
        let both = |error: Error| {
            let message = format!("{}; and CUDA IPC does not work here: {}", error.message(), why.message());
            let named =
                error.context().fold(Error::new(error.kind(), OPERATION, message), |e, (k, v)| e.with(k, v));
            named.recovery_is(error.recovery()).caused_by(error)
        };
        if let Some(error) = without {
            return Err(both(error));
        }
        let nccl = self.nccl()?;
        let all: Vec<u32> = (0..group.world_size).collect();
        let token = meeting.token(&all, nccl.create_token()).await?;
        let Place { rank, world_size, epoch } = group;
        let communicator =
            nccl.join(GroupSpec { token, rank, world_size, epoch }, deadline).await.map_err(both)?;
        meeting.done(None).await?;
        Ok(communicator)
    }

    /// Tries to form a group that copies, of this host's `members`; on every member the same answer, also if it failed
    /// on another host.
    async fn copies(
        &self,
        meeting: &mut Meeting,
        members: &[u32],
        group: Place,
        deadline: Instant,
    ) -> Result<Result<Queue>> {
        let token = meeting.token(members, async { self.ipc.create_token().await }).await?;
        let spec = part(token, members, group.rank, group.epoch)?;
        let (queue, reason) = match self.ipc.join_as(&spec, members, deadline).await {
            Ok(queue) => (Some(queue), None),
            Err(error) if goes_on(&error) => (None, Some(error)),
            Err(error) => return Err(error),
        };
        match (meeting.done(reason).await?, queue) {
            (None, Some(queue)) => Ok(Ok(queue)),
            (Some(why), _) => Ok(Err(why)),
            (None, None) => Err(out_of_order()),
        }
    }

    /// Joins the rail of this member.
    async fn rails(
        &self,
        meeting: &mut Meeting,
        node: Queue,
        rails: Rails,
        epoch: Epoch,
        deadline: Instant,
    ) -> Result<Communicator> {
        let nccl = self.nccl()?;
        let token = meeting.token(&rails.rail, nccl.create_token()).await?;
        let spec = part(token, &rails.rail, rails.rank, epoch)?;
        let named = |host: &str| {
            let member = host.parse::<usize>().ok().and_then(|host| rails.rail.get(host));
            member.map_or_else(|| host.to_owned(), u32::to_string)
        };
        let joined = nccl.join(spec, deadline).await;
        let rail = joined.map_err(|e| e.renamed(Key::Rank, named).renamed(Key::Peer, named))?;
        meeting.done(None).await?;
        let (hosts, each) = (rails.rail.len(), rails.node.len());
        tracing::debug!(hosts, each, "the group copies over CUDA IPC inside hosts, along rails over NCCL");
        Ok(rails::communicator(rails, node, rail))
    }
}

/// This member's place in the group.
#[derive(Clone, Copy)]
struct Place {
    rank: u32,
    world_size: u32,
    epoch: Epoch,
}

/// Member `rank` in a part of its group.
fn part(token: Bytes, members: &[u32], rank: u32, epoch: Epoch) -> Result<GroupSpec> {
    let place = members.iter().position(|member| *member == rank);
    let place =
        place.ok_or_else(|| Error::new(ErrorKind::Internal, OPERATION, "a part without this member"))?;
    Ok(GroupSpec { token, rank: place as u32, world_size: members.len() as u32, epoch })
}

#[async_trait]
impl Collective for CudaTransport {
    async fn create_token(&self) -> Result<Bytes> {
        Ok([TOKEN_MAGIC, &self.ipc.create_token().await?[..]].concat().into())
    }

    async fn join(&self, group: GroupSpec, deadline: Instant) -> Result<Communicator> {
        let spec = GroupSpec { token: decode_token(&group.token)?, ..group };
        let place = Place { rank: spec.rank, world_size: spec.world_size, epoch: spec.epoch };
        let mut meeting = Meeting::join(self.ipc.messenger(), &spec, deadline).await?;
        let talk = meeting.talk();
        let formed = tokio::select! {
            biased;
            formed = self.form(&mut meeting, place, deadline) => formed,
            // What this member waits for in the middle of a step is dropped, which ends it for its part's members.
            cause = talk.failed() => Err(cause),
        };
        match formed {
            Ok(communicator) => {
                meeting.end();
                Ok(communicator)
            }
            Err(error) => Err(talk.fail(error)),
        }
    }
}

/// Whether NCCL may do better. A member that is missing, or gave up, is missing there too.
fn goes_on(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Unavailable | ErrorKind::Unsupported | ErrorKind::Corrupt | ErrorKind::Backend
    )
}

const TOKEN_MAGIC: &[u8] = b"cuda";

/// The token of the members' meeting.
fn decode_token(token: &Bytes) -> Result<Bytes> {
    token.strip_prefix(TOKEN_MAGIC).map(|rest| token.slice_ref(rest)).ok_or_else(|| {
        let message = "the token is not one of the transport `cuda`; give all ranks the same --transport";
        Error::new(ErrorKind::ConfigInvalid, "join a group", message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_known_by_its_first_bytes() {
        assert_eq!(&decode_token(&Bytes::from_static(b"cudathe meeting")).unwrap()[..], b"the meeting");
        for bad in [&b"nccl"[..], b"cud", b""] {
            assert_eq!(decode_token(&Bytes::from_static(bad)).unwrap_err().kind(), ErrorKind::ConfigInvalid);
        }
    }
}
