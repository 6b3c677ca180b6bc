//! What this build can use: a value to which each crate adds itself.

use std::{fmt, net::IpAddr, path::PathBuf, sync::Arc};

use super::Transport;
use crate::{
    device::{DeviceBackend, DeviceConfig, DeviceProvider},
    error::{Error, ErrorKind, Result},
};

/// Asks for the first backend that works.
pub const AUTO: &str = "auto";
const OPERATION: &str = "choose a backend";

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
    /// Whether connections between ranks are encrypted, where the transport can ([`crate::tls`]).
    pub tls: bool,
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
    /// Whether what it opens may have the collective facet. One that has not is for reading beside another.
    fn broadcasts(&self) -> bool {
        true
    }
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

    /// Opens the device called `kind`, or with `auto` the first whose probe and opening succeed. Why others were passed
    /// over is logged, and is the error if none is left.
    pub fn open_device(&self, kind: &str, config: &DeviceConfig) -> Result<Arc<dyn DeviceBackend>> {
        if kind != AUTO {
            return self.device(kind)?.open(config);
        }
        first_that_works("device", self.devices(), |p| p.kind(), |p| p.probe(), |p| p.open(config))
    }

    /// Opens the transport called `name`, or with `auto` the first that works here and can do what is required.
    pub fn open_transport(
        &self,
        name: &str,
        config: &TransportConfig,
        required: Requirement,
    ) -> Result<Arc<dyn Transport>> {
        let open = |provider: &dyn TransportProvider| {
            let transport = provider.open(config)?;
            required.check(&*transport, config.device.kind())?;
            Ok(transport)
        };
        if name != AUTO {
            return open(self.transport(name)?);
        }
        first_that_works("transport", self.transports(), |p| p.name(), |p| p.probe(), |p| open(p))
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

/// What an update needs of a transport.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requirement {
    /// Broadcasts, on the device's streams.
    pub collective: bool,
    /// Reads of remote memory. The host's memory does: bytes can go to the device from there.
    pub one_sided: bool,
    /// Ranks are processes.
    pub across_processes: bool,
    /// Ranks are on several hosts.
    pub across_hosts: bool,
}

impl Requirement {
    fn check(self, transport: &dyn Transport, device: &str) -> Result<()> {
        let can = transport.capability();
        let missing = if self.collective && !can.collective {
            "has no broadcasts".to_owned()
        } else if self.one_sided && !can.one_sided {
            "cannot read remote memory".to_owned()
        } else if self.across_processes && !can.across_processes {
            "does not reach other processes".to_owned()
        } else if self.across_hosts && !can.across_hosts {
            "does not reach other hosts".to_owned()
        } else if self.collective && !can.devices.contains(&device) {
            format!("works on {}, not on device {device}", can.devices.join(", "))
        } else {
            return Ok(());
        };
        let message = format!("transport `{}` {missing}; choose another", transport.name());
        Err(Error::new(ErrorKind::Unsupported, OPERATION, message))
    }
}

fn first_that_works<'a, P: ?Sized + 'a, T>(
    what: &'static str,
    providers: impl Iterator<Item = &'a P>,
    name: impl Fn(&P) -> &'static str,
    probe: impl Fn(&P) -> Probe,
    open: impl Fn(&P) -> Result<T>,
) -> Result<T> {
    let mut refused = Vec::new();
    for provider in providers {
        let why = match probe(provider) {
            Probe::Unavailable(why) => why,
            Probe::Available(_) => match open(provider) {
                Ok(opened) => {
                    tracing::debug!(what, chosen = name(provider), ?refused, "chose a backend");
                    return Ok(opened);
                }
                Err(error) => error.to_string(),
            },
        };
        refused.push(format!("{}: {why}", name(provider)));
    }
    let message = format!("no {what} works here: {}", refused.join("; "));
    Err(Error::new(ErrorKind::Unavailable, OPERATION, message))
}

fn unknown(what: &'static str, name: &str, known: Vec<&str>) -> Error {
    Error::new(
        ErrorKind::ConfigInvalid,
        OPERATION,
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
