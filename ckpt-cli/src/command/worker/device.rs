//! Where the reference engine keeps its weights: the seam between the engine and kinds of devices.

use std::{collections::HashMap, sync::Arc};

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    transport::Probe,
    worker::{Apply, NativeWorker, TensorView},
};

/// Which device an engine wants.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Rank of the parameter server beside it.
    pub(crate) rank: u32,
    /// Which of the visible devices.
    pub(crate) local_rank: u32,
    /// A name from the command line, for kinds of devices that have none of their own.
    pub(crate) uuid: Option<String>,
}

/// A kind of device that an engine can run on.
pub(crate) trait WorkerDevice: Send + Sync {
    /// `host`, `cuda`, `ascend`.
    fn kind(&self) -> &'static str;
    /// Looks without changing anything.
    fn probe(&self) -> Probe;
    /// Opens one device: the worker, which carries its name, and the memory that it fills.
    fn open(&self, place: &Place) -> Result<(NativeWorker, Box<dyn WeightMemory>)>;
}

/// The parameters of one device. It takes memory for each name when it first comes.
pub(crate) trait WeightMemory: Apply + Send {
    /// Hands the bytes of the parameter `name` to `take`, piece by piece.
    fn read(&mut self, name: &str, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>;
}

/// The device of the kind `kind`; `auto` takes the first that works here.
pub(crate) fn choose<'a>(all: &'a [Box<dyn WorkerDevice>], kind: &str) -> Result<&'a dyn WorkerDevice> {
    let known: Vec<&str> = all.iter().map(|device| device.kind()).collect();
    let mut devices = all.iter().map(|device| &**device);
    let found = match kind {
        "auto" => devices.find(|device| matches!(device.probe(), Probe::Available(_))),
        _ => devices.find(|device| device.kind() == kind),
    };
    found.ok_or_else(|| {
        let message = format!("this build has no worker for the device `{kind}`, only {}", known.join(", "));
        Error::new(ErrorKind::ConfigInvalid, "start the worker", message)
    })
}

/// Host memory.
pub(crate) struct HostWorker;

impl WorkerDevice for HostWorker {
    fn kind(&self) -> &'static str {
        "host"
    }

    fn probe(&self) -> Probe {
        Probe::Available("host memory".to_owned())
    }

    fn open(&self, place: &Place) -> Result<(NativeWorker, Box<dyn WeightMemory>)> {
        let uuid = place.uuid.clone().unwrap_or_else(|| {
            let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
            format!("HOST-{host}-{}", place.rank)
        });
        Ok((NativeWorker::new(uuid), Box::<HostMemory>::default()))
    }
}

#[derive(Default)]
struct HostMemory {
    by_name: HashMap<Arc<str>, Vec<u8>>,
}

impl Apply for HostMemory {
    fn bucket(&mut self, _bucket: u32, tensors: &[TensorView<'_>]) -> Result<()> {
        for tensor in tensors {
            let bytes = tensor.bytes()?;
            match self.by_name.get_mut(&tensor.meta().name) {
                Some(held) => {
                    // Keeps the memory of the last update.
                    held.clear();
                    held.extend_from_slice(bytes);
                }
                None => {
                    self.by_name.insert(tensor.meta().name.clone(), bytes.to_vec());
                }
            }
        }
        Ok(())
    }
}

impl WeightMemory for HostMemory {
    fn read(&mut self, name: &str, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        match self.by_name.get(name) {
            Some(bytes) => take(bytes),
            None => Err(Error::new(ErrorKind::Internal, "read a parameter", "there is none of this name")
                .with(Key::Tensor, name)),
        }
    }
}
