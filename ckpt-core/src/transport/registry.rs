//! What this build can use: a value to which each crate adds itself.

use std::{fmt, net::IpAddr, path::PathBuf, sync::Arc};

use super::Transport;
use crate::{
    device::{DeviceBackend, DeviceProvider},
    error::{Error, ErrorKind, Result},
};

/// The answer to "could this be used here?".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// Yes; what was found (library, version, devices).
    Available(String),
    /// No; what was looked for and how to get it.
    Unavailable(String),
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Probe::Available(what) => write!(f, "available: {what}"),
            Probe::Unavailable(why) => write!(f, "unavailable: {why}"),
        }
    }
}

/// What a transport provider needs to open one.
#[derive(Clone, Debug)]
pub struct TransportConfig {
    /// The address that peers reach this process at, and that listeners bind.
    pub bind: IpAddr,
    /// Where sockets go; exists with mode 0700.
    pub runtime_dir: PathBuf,
    /// The job's shared secret; listeners ask for it.
    pub secret: Vec<u8>,
    /// Connections per peer, for transports that stripe.
    pub connections: usize,
    /// The rank's device.
    pub device: Arc<dyn DeviceBackend>,
}

/// A transport that can be looked for and opened.
pub trait TransportProvider: Send + Sync {
    /// The transport's name.
    fn name(&self) -> &'static str;
    /// Looks without changing anything.
    fn probe(&self) -> Probe;
    /// Opens it.
    fn open(&self, config: &TransportConfig) -> Result<Arc<dyn Transport>>;
}

/// The transports and devices of this build, in the order in which `auto` tries them.
#[derive(Default)]
pub struct Registry {
    transports: Vec<Box<dyn TransportProvider>>,
    devices: Vec<Box<dyn DeviceProvider>>,
}

impl Registry {
    /// Adds a transport behind those already there.
    pub fn add_transport(&mut self, provider: impl TransportProvider + 'static) {
        self.transports.push(Box::new(provider));
    }

    /// Adds a device behind those already there.
    pub fn add_device(&mut self, provider: impl DeviceProvider + 'static) {
        self.devices.push(Box::new(provider));
    }

    /// All transports, in order.
    pub fn transports(&self) -> impl Iterator<Item = &dyn TransportProvider> {
        self.transports.iter().map(|p| &**p)
    }

    /// All devices, in order.
    pub fn devices(&self) -> impl Iterator<Item = &dyn DeviceProvider> {
        self.devices.iter().map(|p| &**p)
    }

    /// The transport called `name`, whatever its probe says.
    pub fn transport(&self, name: &str) -> Result<&dyn TransportProvider> {
        self.transports()
            .find(|p| p.name() == name)
            .ok_or_else(|| unknown("transport", name, self.transports().map(|p| p.name()).collect()))
    }

    /// The device called `kind`, whatever its probe says.
    pub fn device(&self, kind: &str) -> Result<&dyn DeviceProvider> {
        self.devices()
            .find(|p| p.kind() == kind)
            .ok_or_else(|| unknown("device", kind, self.devices().map(|p| p.kind()).collect()))
    }
}

fn unknown(what: &'static str, name: &str, known: Vec<&str>) -> Error {
    Error::new(
        ErrorKind::ConfigInvalid,
        "choose a backend",
        format!(
            "this build has no {what} `{name}`; it has {} (another may need its cargo feature)",
            known.join(", ")
        ),
    )
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("transports", &self.transports().map(|p| p.name()).collect::<Vec<_>>())
            .field("devices", &self.devices().map(|p| p.kind()).collect::<Vec<_>>())
            .finish()
    }
}
