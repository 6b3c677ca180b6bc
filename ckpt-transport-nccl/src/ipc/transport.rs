//! Finding and opening the transport, and forming groups.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use ckpt_core::{
    Error, ErrorKind, Result,
    device::{DeviceBackend, RawStream},
    transport::{
        Capability, Collective, CollectiveOp, Communicator, GroupSpec, OneSided, Probe, Transport,
        TransportConfig, TransportProvider, tcp::Messenger,
    },
};

use super::{group, message::ProcessId};
use crate::{
    device::{Context, Driver, DriverCell},
    warm_up::Rows,
};

/// Opens `cuda-ipc` transports.
#[derive(Debug)]
pub struct CudaIpcProvider {
    driver: DriverCell,
    process: ProcessId,
}

impl CudaIpcProvider {
    /// A provider on the driver that the CUDA devices use. Two of one process cannot be in one group.
    pub fn new(driver: DriverCell) -> Self {
        // The hasher's keys are random; they only have to differ between the processes of one job.
        let word = || std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), std::process::id());
        let mut process = [0; 16];
        process[..8].copy_from_slice(&word().to_le_bytes());
        process[8..].copy_from_slice(&word().to_le_bytes());
        Self { driver, process }
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
        if config.device.kind() != "cuda" {
            let message = format!(
                "CUDA IPC moves CUDA memory only; this rank's device is `{}`: use --device cuda",
                config.device.kind()
            );
            return Err(Error::new(ErrorKind::ConfigInvalid, "open the transport cuda-ipc", message));
        }
        Ok(Arc::new(CudaIpcTransport {
            driver: self.driver.driver()?,
            device: config.device.clone(),
            messenger: Messenger::open(config)?,
            process: self.process,
        }))
    }
}

/// Copies between the GPUs of one host.
#[derive(Debug)]
pub struct CudaIpcTransport {
    driver: Arc<Driver>,
    device: Arc<dyn DeviceBackend>,
    messenger: Messenger,
    process: ProcessId,
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
        let stream = self.device.stream("cuda-ipc warm-up")?;
        let RawStream::Cuda(raw) = stream.raw() else {
            let message = "the device's streams are not CUDA's";
            return Err(Error::new(ErrorKind::Internal, "join a group", message));
        };
        let context = Context::of_stream(self.driver.clone(), raw)?;
        let (talk, heard) = self.messenger.join(&spec, deadline).await?;
        let ends = group::Member {
            talk: talk.clone(),
            device: self.device.clone(),
            context: context.clone(),
            process: self.process,
        };
        let mut communicator = group::start(ends, heard)?;
        if spec.world_size == 1 {
            return Ok(communicator);
        }
        // Every member maps memory of every other: whether that works here shows only now.
        let warm_up = async {
            let rows = Rows::fill(&context, (spec.rank, spec.world_size), &stream)?;
            let written = communicator.queue.enqueue(rows.ops()?, &stream).await?;
            // The cause that ended a group says more than the deadline that it made pass.
            let ended = written.done(deadline).await;
            talk.poisoned().map_or(ended, Err)?;
            rows.check("use --transport nccl")?;
            // Broadcasts of nothing: they are over when every member has come this far, so that either all go on or none.
            let nothing =
                rows.ops()?.into_iter().map(|op| Ok(CollectiveOp { buffer: op.buffer.slice(0..0)?, ..op }));
            let met = communicator.queue.enqueue(nothing.collect::<Result<_>>()?, &stream).await?;
            let ended = met.done(deadline).await;
            talk.poisoned().map_or(ended, Err)
        };
        let unfinished = FailUnlessDone(Some(talk.clone()));
        match warm_up.await {
            Ok(()) => {
                unfinished.done();
                Ok(communicator)
            }
            Err(error) => Err(talk.fail(error)),
        }
    }
}

/// Whoever stops waiting in the middle of a join leaves nobody waiting.
struct FailUnlessDone(Option<ckpt_core::transport::tcp::Talk>);

impl FailUnlessDone {
    fn done(mut self) {
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
pub(super) const LONG: Duration = Duration::from_secs(24 * 3600);
