//! One read or write, for transports that treat both alike.

use std::{sync::Arc, time::Instant};

use super::{ReadOp, RemoteRegion, WriteOp};
use crate::{
    device::BufferSlice,
    error::{Error, ErrorKind, Result},
};

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    /// From the peer.
    Read,
    /// To the peer.
    Write,
}

impl Way {
    /// What errors call it.
    pub const fn operation(self) -> &'static str {
        match self {
            Way::Read => "read remote memory",
            Way::Write => "write remote memory",
        }
    }

    /// A timeout if `deadline` has passed. A batch asks before it begins: bytes that are quick enough would arrive before
    /// its waiting task looks at the clock.
    pub fn check_deadline(self, deadline: Instant) -> Result<()> {
        if Instant::now() < deadline {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Timeout, self.operation(), "its deadline had passed before it began"))
    }
}

/// Bytes between a peer's region and this process's memory.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// Whose memory.
    pub region: Arc<RemoteRegion>,
    /// Bytes from the region's start.
    pub offset: u64,
    /// Where they go, or come from.
    pub memory: BufferSlice,
}

impl From<ReadOp> for Transfer {
    fn from(op: ReadOp) -> Self {
        Self { region: op.region, offset: op.offset, memory: op.into }
    }
}

impl From<WriteOp> for Transfer {
    fn from(op: WriteOp) -> Self {
        Self { region: op.region, offset: op.offset, memory: op.from }
    }
}

impl Transfer {
    /// An error unless it lies in its region.
    pub fn check(&self, way: Way) -> Result<()> {
        let (len, region) = (self.memory.len_bytes(), self.region.len_bytes);
        let inside = self.offset.checked_add(len).is_some_and(|end| end <= region);
        if inside && self.region.address.checked_add(region).is_some() {
            return Ok(());
        }
        let what = format!("{len} bytes at {} are outside the region's {region}", self.offset);
        Err(Error::new(ErrorKind::ConfigInvalid, way.operation(), what))
    }

    /// The same, for transports that move host memory only.
    pub fn check_on_host(&self, way: Way) -> Result<()> {
        self.memory.host_ptr()?;
        self.check(way)
    }
}
