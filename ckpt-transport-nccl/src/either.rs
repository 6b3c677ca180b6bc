//! The transport `cuda`: each group copies over CUDA IPC where that works between all of its members, and uses NCCL
//! elsewhere.
//!
//! Whether one GPU can reach another shows only when it is tried, and all members must come to the same answer. So the
//! choice is made where all of them are present anyway: when a group forms.

use std::{sync::Arc, time::Instant};

use async_trait::async_trait;
use bytes::{BufMut, Bytes, BytesMut};
use ckpt_core::{
    Error, ErrorKind, Result,
    transport::{
        Capability, Collective, Communicator, GroupSpec, OneSided, Probe, Transport, TransportConfig,
        TransportProvider,
    },
};

use crate::{CudaIpcProvider, NcclProvider, device::DriverCell};

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
        let ipc = self.ipc.open(config)?;
        Ok(Arc::new(CudaTransport { ipc, nccl: self.nccl.open(config) }))
    }
}

/// CUDA IPC, with NCCL behind it.
#[derive(Debug)]
pub struct CudaTransport {
    ipc: Arc<dyn Transport>,
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
    fn ipc(&self) -> Result<&dyn Collective> {
        self.ipc.collective().ok_or_else(no_facet)
    }

    fn nccl(&self) -> Result<&dyn Collective> {
        self.nccl.as_ref().map_err(Clone::clone)?.collective().ok_or_else(no_facet)
    }
}

fn no_facet() -> Error {
    Error::new(ErrorKind::Internal, "join a group", "a transport between GPUs has no broadcasts")
}

#[async_trait]
impl Collective for CudaTransport {
    async fn create_token(&self) -> Result<Bytes> {
        let ipc = self.ipc()?.create_token().await?;
        let nccl = match self.nccl() {
            Ok(nccl) => nccl.create_token().await?,
            Err(_) => Bytes::new(),
        };
        Ok(encode_token(&ipc, &nccl))
    }

    async fn join(&self, group: GroupSpec, deadline: Instant) -> Result<Communicator> {
        let (ipc, nccl) = decode_token(&group.token)?;
        let why = match self.ipc()?.join(GroupSpec { token: ipc, ..group.clone() }, deadline).await {
            Ok(communicator) => {
                tracing::debug!(members = group.world_size, "the group copies over CUDA IPC");
                return Ok(communicator);
            }
            Err(error) if goes_on(&error) => error,
            Err(error) => return Err(error),
        };
        tracing::info!(error = %why, "no CUDA IPC between these members: the group uses NCCL");
        let both = |error: Error| {
            let message = format!("{}; and CUDA IPC does not work here: {}", error.message(), why.message());
            Error::new(error.kind(), "join a group", message).recovery_is(error.recovery()).caused_by(error)
        };
        if nccl.is_empty() {
            let message = "the group's first member has no NCCL";
            return Err(both(Error::new(ErrorKind::Unavailable, "join a group", message)));
        }
        self.nccl().map_err(both)?.join(GroupSpec { token: nccl, ..group }, deadline).await.map_err(both)
    }
}

/// Whether NCCL may do better. A member that is missing, or gave up, is missing there too.
fn goes_on(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Unavailable | ErrorKind::Unsupported | ErrorKind::Corrupt | ErrorKind::Backend
    )
}

const TOKEN_MAGIC: &[u8; 4] = b"cuda";

/// Magic, the length of the first token, both tokens; the second is empty where there is no NCCL.
fn encode_token(ipc: &[u8], nccl: &[u8]) -> Bytes {
    let mut token = BytesMut::with_capacity(6 + ipc.len() + nccl.len());
    token.put_slice(TOKEN_MAGIC);
    token.put_u16_le(ipc.len() as u16);
    token.put_slice(ipc);
    token.put_slice(nccl);
    token.freeze()
}

fn decode_token(token: &Bytes) -> Result<(Bytes, Bytes)> {
    let parse = || {
        let rest = token.strip_prefix(TOKEN_MAGIC)?;
        let (len, rest) = rest.split_first_chunk::<2>()?;
        let (ipc, nccl) = rest.split_at_checked(usize::from(u16::from_le_bytes(*len)))?;
        Some((token.slice_ref(ipc), token.slice_ref(nccl)))
    };
    parse().ok_or_else(|| {
        let message = "the token is not one of the transport `cuda`; give all ranks the same --transport";
        Error::new(ErrorKind::ConfigInvalid, "join a group", message)
    })
}

#[cfg(test)]
mod tests {
    use ckpt_core::{Epoch, device::BufferSlice, transport::CollectiveOp};

    use super::*;
    use crate::{NcclConfig, device::tests::soon, fake};

    #[test]
    fn a_token_holds_both() {
        let token = encode_token(b"first", b"second");
        assert_eq!(&token[..], b"cuda\x05\0firstsecond");
        let (ipc, nccl) = decode_token(&token).unwrap();
        assert_eq!((&ipc[..], &nccl[..]), (&b"first"[..], &b"second"[..]));
        for bad in [&b"nccl"[..], b"cuda", b"cuda\x06\0first"] {
            assert_eq!(decode_token(&Bytes::from_static(bad)).unwrap_err().kind(), ErrorKind::ConfigInvalid);
        }
    }

    /// Joins two members and moves a byte; whether member 1's memory cannot be mapped.
    async fn group(broken: bool) -> Vec<Communicator> {
        let mut joins = Vec::new();
        let mut devices = Vec::new();
        let mut token = None;
        for rank in 0..2 {
            let driver = if broken && rank == 1 { fake::driver_without_ipc() } else { fake::driver() };
            let cell = DriverCell::of(driver);
            let device = Arc::new(crate::device::CudaProvider::new(cell.clone()).open_cuda(rank).unwrap());
            let provider =
                CudaTransportProvider::of(CudaIpcProvider::new(cell), fake::provider(NcclConfig::default()));
            let transport = provider
                .open(&TransportConfig {
                    bind: std::net::Ipv4Addr::LOCALHOST.into(),
                    runtime_dir: std::env::temp_dir(),
                    tls: false,
                    secret: b"secret".to_vec(),
                    connections: 1,
                    device: device.clone(),
                })
                .unwrap();
            let facet = transport.clone();
            if token.is_none() {
                token = Some(facet.collective().unwrap().create_token().await.unwrap());
            }
            let token = token.clone().unwrap();
            devices.push(device);
            joins.push(tokio::spawn(async move {
                let spec = GroupSpec { token, rank, world_size: 2, epoch: Epoch(1) };
                transport.collective().unwrap().join(spec, soon()).await.unwrap()
            }));
        }
        let mut communicators = Vec::new();
        for join in joins {
            communicators.push(join.await.unwrap());
        }
        let mut events = Vec::new();
        for (device, communicator) in devices.iter().zip(&mut communicators) {
            use ckpt_core::device::DeviceBackend as _;
            let memory = device.allocate(64).unwrap();
            let stream = device.stream("test").unwrap();
            let op = CollectiveOp { root: 0, buffer: BufferSlice::new(memory, 0..64).unwrap() };
            events.push(communicator.queue.enqueue(vec![op], &stream).await.unwrap());
        }
        for event in events {
            event.done(soon()).await.unwrap();
        }
        communicators
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_group_copies_where_all_can_and_uses_nccl_where_one_cannot() {
        for (broken, path) in [(false, "Queue"), (true, "NcclQueue")] {
            for communicator in group(broken).await {
                let shown = format!("{:?}", communicator.queue);
                assert!(shown.starts_with(path), "{broken}: {shown}");
            }
        }
    }
}
