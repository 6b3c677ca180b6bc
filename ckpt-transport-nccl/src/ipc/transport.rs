//! Finding and opening the transport, and forming groups.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{DeviceBackend, RawStream},
    transport::{
        Capability, Collective, CollectiveOp, Communicator, CommunicatorQueue, GroupSpec, OneSided, Probe,
        Transport, TransportConfig, TransportProvider,
        tcp::{Messenger, Talk},
    },
};
use twox_hash::XxHash3_64;

use super::{
    group::{self, Queue},
    message::ProcessId,
};
use crate::{
    device::{Context, Driver, DriverCell},
    warm_up::Rows,
};

/// Opens `cuda-ipc` transports.
#[derive(Debug)]
pub struct CudaIpcProvider {
    driver: DriverCell,
    process: ProcessId,
    host: u64,
}

/// For tests: processes with different values count as processes of different hosts.
const PRETEND_HOST: &str = "CKPT_PRETEND_HOST";

impl CudaIpcProvider {
    /// A provider on the driver that the CUDA devices use. Two of one process cannot be in one group.
    ///
    /// Ranks with different values of `CKPT_PRETEND_HOST`, which is there for tests, count as ranks of different hosts.
    pub fn new(driver: DriverCell) -> Self {
        // The hasher's keys are random; they only have to differ between the processes of one job.
        let word = || std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), std::process::id());
        let mut process = [0; 16];
        process[..8].copy_from_slice(&word().to_le_bytes());
        process[8..].copy_from_slice(&word().to_le_bytes());
        let mut host = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        host.extend(std::env::var_os(PRETEND_HOST).unwrap_or_default().into_encoded_bytes());
        Self { driver, process, host: XxHash3_64::oneshot(&host) }
    }

    #[cfg(test)]
    pub(crate) fn on_host(self, host: u64) -> Self {
        Self { host, ..self }
    }

    /// Must be called in a tokio runtime.
    pub(crate) fn open_ipc(&self, config: &TransportConfig) -> Result<CudaIpcTransport> {
        if config.device.kind() != "cuda" {
            let message = format!(
                "CUDA IPC moves CUDA memory only; this rank's device is `{}`: use --device cuda",
                config.device.kind()
            );
            return Err(Error::new(ErrorKind::ConfigInvalid, "open the transport cuda-ipc", message));
        }
        Ok(CudaIpcTransport {
            driver: self.driver.driver()?,
            device: config.device.clone(),
            messenger: Messenger::open(config)?,
            process: self.process,
            host: self.host,
        })
    }
}

impl TransportProvider for CudaIpcProvider {
    fn name(&self) -> &'static str {
        "cuda-ipc"
    }

    fn probe(&self) -> Probe {
        let look = || -> Result<String> {
            let driver = self.driver.driver()?;
            match driver.device_count()? {
                0 => Err(Error::new(ErrorKind::Unavailable, "look for GPUs", "no CUDA device is visible")),
                count => Ok(format!("CUDA {} driver, {count} device(s) visible", driver.version_text())),
            }
        };
        match look() {
            Ok(found) => Probe::Available(found),
            Err(error) => Probe::Unavailable(error.to_string()),
        }
    }

    /// Must be called in a tokio runtime.
    fn open(&self, config: &TransportConfig) -> Result<Arc<dyn Transport>> {
        Ok(Arc::new(self.open_ipc(config)?))
    }
}

/// Copies between the GPUs of one host.
#[derive(Debug)]
pub struct CudaIpcTransport {
    driver: Arc<Driver>,
    device: Arc<dyn DeviceBackend>,
    messenger: Messenger,
    process: ProcessId,
    host: u64,
}

impl Transport for CudaIpcTransport {
    fn name(&self) -> &'static str {
        "cuda-ipc"
    }

    fn capability(&self) -> Capability {
        Capability {
            collective: true,
            one_sided: false,
            one_sided_write: false,
            across_processes: true,
            across_hosts: false,
            encrypts: false,
            devices: &["cuda"],
        }
    }

    fn collective(&self) -> Option<&dyn Collective> {
        Some(self)
    }

    fn one_sided(&self) -> Option<&dyn OneSided> {
        None
    }
}

#[async_trait]
impl Collective for CudaIpcTransport {
    async fn create_token(&self) -> Result<Bytes> {
        self.messenger.create_token()
    }

    async fn join(&self, spec: GroupSpec, deadline: Instant) -> Result<Communicator> {
        Ok(self.join_as(&spec, &[], deadline).await?.communicator())
    }
}

impl CudaIpcTransport {
    /// How members of a group talk before they have one.
    pub(crate) fn messenger(&self) -> &Messenger {
        &self.messenger
    }

    /// Which members are on one host.
    pub(crate) fn host(&self) -> u64 {
        self.host
    }

    /// Joins. Errors call member n `names[n]`, or n where there are no names.
    pub(crate) async fn join_as(&self, spec: &GroupSpec, names: &[u32], deadline: Instant) -> Result<Queue> {
        let stream = self.device.stream("cuda-ipc warm-up")?;
        let RawStream::Cuda(raw) = stream.raw() else {
            let message = "the device's streams are not CUDA's";
            return Err(Error::new(ErrorKind::Internal, "join a group", message));
        };
        let context = Context::of_stream(self.driver.clone(), raw)?;
        let (talk, heard) = self.messenger.join(spec, names, deadline).await?;
        let ends = group::Member {
            talk: talk.clone(),
            device: self.device.clone(),
            context: context.clone(),
            process: self.process,
            host: self.host,
        };
        let mut queue = group::start(ends, heard)?;
        if spec.world_size == 1 {
            return Ok(queue);
        }
        // Every member maps memory of every other: whether that works here shows only now.
        let warm_up = async {
            let rows = Rows::fill(&context, (spec.rank, spec.world_size), &stream)?;
            let written = queue.enqueue(rows.ops()?, &stream).await?;
            // The cause that ended a group says more than the deadline that it made pass.
            let ended = written.done(deadline).await;
            talk.poisoned().map_or(ended, Err)?;
            rows.check("use --transport nccl").map_err(|e| {
                e.renamed(Key::Peer, |peer| {
                    peer.parse().map_or(peer.to_owned(), |n| talk.name(n).to_string())
                })
            })?;
            // Broadcasts of nothing: they are over when every member has come this far, so that either all go on or none.
            let nothing =
                rows.ops()?.into_iter().map(|op| Ok(CollectiveOp { buffer: op.buffer.slice(0..0)?, ..op }));
            let met = queue.enqueue(nothing.collect::<Result<_>>()?, &stream).await?;
            let ended = met.done(deadline).await;
            talk.poisoned().map_or(ended, Err)
        };
        let unfinished = FailUnlessDone::new(talk.clone());
        match warm_up.await {
            Ok(()) => {
                unfinished.done();
                Ok(queue)
            }
            Err(error) => Err(talk.fail(error)),
        }
    }
}

/// Whoever stops waiting in the middle of a join leaves nobody waiting.
pub(crate) struct FailUnlessDone(Option<Talk>);

impl FailUnlessDone {
    pub(crate) fn new(talk: Talk) -> Self {
        Self(Some(talk))
    }

    pub(crate) fn done(mut self) {
        self.0 = None;
    }
}

impl Drop for FailUnlessDone {
    fn drop(&mut self) {
        if let Some(talk) = self.0.take() {
            talk.fail(Error::new(
                ErrorKind::Aborted,
                "join a group",
                "a member stopped waiting for the group",
            ));
        }
    }
}

/// The group's own work has no deadline: the caller's deadlines end it by an abort.
pub(crate) const LONG: Duration = Duration::from_secs(24 * 3600);
