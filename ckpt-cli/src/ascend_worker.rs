//! The reference engine on an Ascend NPU.

use std::sync::Arc;

use ckpt_core::{
    Error, ErrorKind, Result,
    device::{DeviceBackend as _, DeviceProvider as _},
    transport::Probe,
    worker::{Apply, NativeWorker, TensorView},
};
use ckpt_transport_hccl::{
    HcclConfig,
    device::{
        AclCell, AscendProvider,
        worker::{AscendMapper, DeviceParameters},
    },
};

use crate::command::worker::device::{Place, WeightMemory, WorkerDevice};

/// Ascend NPUs, named as checkpoint-engine's workers name them.
pub(crate) struct AscendWorker {
    provider: AscendProvider,
}

impl AscendWorker {
    pub(crate) fn new(env: &dyn Fn(&str) -> Option<String>) -> Self {
        Self { provider: AscendProvider::new(HcclConfig::from_env(env), AclCell::default()) }
    }
}

impl WorkerDevice for AscendWorker {
    fn kind(&self) -> &'static str {
        "ascend"
    }

    fn probe(&self) -> Probe {
        self.provider.probe()
    }

    fn open(&self, place: &Place) -> Result<(NativeWorker, Box<dyn WeightMemory>)> {
        if place.uuid.is_some() {
            let message = "an NPU has a UUID of its own; leave --uuid out and choose the device with --local-rank or \
                           ASCEND_RT_VISIBLE_DEVICES";
            return Err(Error::new(ErrorKind::ConfigInvalid, "start the worker", message));
        }
        let device = Arc::new(self.provider.open_ascend(place.local_rank)?);
        let worker =
            NativeWorker::new(device.info().uuid.clone()).with_mapper(AscendMapper::new(device.clone()));
        Ok((worker, Box::new(AscendMemory(DeviceParameters::allocating(device)?))))
    }
}

struct AscendMemory(DeviceParameters);

impl Apply for AscendMemory {
    fn bucket(&mut self, bucket: u32, tensors: &[TensorView<'_>]) -> Result<()> {
        self.0.bucket(bucket, tensors)
    }
}

impl WeightMemory for AscendMemory {
    fn read(&mut self, name: &str, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.0.read(name, take)
    }
}
