//! The reference engine on a CUDA device.

use std::sync::Arc;

use ckpt_core::{
    Error, ErrorKind, Result,
    device::{DeviceBackend as _, DeviceProvider as _},
    transport::Probe,
    types::TensorMeta,
    worker::{Apply, NativeWorker, TensorView},
};
use ckpt_transport_nccl::device::{
    CudaProvider,
    worker::{CudaMapper, DeviceParameters},
};

use crate::command::worker::device::{Place, WeightMemory, WorkerDevice};

/// CUDA devices, named by their own UUIDs.
#[derive(Default)]
pub(crate) struct CudaWorker {
    provider: CudaProvider,
}

impl WorkerDevice for CudaWorker {
    fn kind(&self) -> &'static str {
        "cuda"
    }

    fn probe(&self) -> Probe {
        self.provider.probe()
    }

    fn open(&self, place: &Place) -> Result<(NativeWorker, Box<dyn WeightMemory>)> {
        if place.uuid.is_some() {
            let message = "a CUDA device has a UUID of its own; leave --uuid out and choose the device with \
                           --local-rank or CUDA_VISIBLE_DEVICES";
            return Err(Error::new(ErrorKind::ConfigInvalid, "start the worker", message));
        }
        let device = Arc::new(self.provider.open_cuda(place.local_rank)?);
        let worker =
            NativeWorker::new(device.info().uuid.clone()).with_mapper(CudaMapper::new(device.clone()));
        Ok((worker, Box::new(CudaMemory(DeviceParameters::allocating(device)?))))
    }
}

struct CudaMemory(DeviceParameters);

impl Apply for CudaMemory {
    fn layout(&mut self, tensors: &Arc<[TensorMeta]>) -> Result<()> {
        self.0.layout(tensors)
    }

    fn bucket(&mut self, bucket: u32, tensors: &[TensorView<'_>]) -> Result<()> {
        self.0.bucket(bucket, tensors)
    }

    fn post_hook(&mut self) -> Result<()> {
        self.0.post_hook()
    }

    fn failed(&mut self, cause: &Error) {
        self.0.failed(cause);
    }
}

impl WeightMemory for CudaMemory {
    fn read(&mut self, name: &str, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.0.read(name, take)
    }
}
