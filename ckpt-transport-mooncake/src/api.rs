//! The part of Mooncake's C interface that this crate uses, as a seam: the library, or a fake in tests.

use std::{
    io,
    net::{TcpStream, ToSocketAddrs},
    time::Duration,
};

/// A `transfer_engine_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Handle(pub(crate) usize);

/// `transfer_request`, in its own layout.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) opcode: i32,
    /// A local address.
    pub(crate) source: u64,
    pub(crate) target: i32,
    /// An address in the peer.
    pub(crate) target_offset: u64,
    pub(crate) length: u64,
}

// The C struct has a pointer where `source` is.
const _: () = assert!(size_of::<Request>() == 40 && size_of::<usize>() == 8);

/// `OPCODE_READ`.
pub(crate) const READ: i32 = 0;
/// `OPCODE_WRITE`.
pub(crate) const WRITE: i32 = 1;
/// `INVALID_BATCH`.
pub(crate) const INVALID_BATCH: u64 = u64::MAX;

/// `transfer_status.status`.
pub(crate) mod status {
    pub(crate) const WAITING: i32 = 0;
    pub(crate) const PENDING: i32 = 1;
    pub(crate) const COMPLETED: i32 = 4;
    /// Mooncake's own limit has passed; the transfer still runs.
    pub(crate) const TIMEOUT: i32 = 5;

    pub(crate) const fn name(status: i32) -> &'static str {
        match status {
            WAITING => "waiting",
            PENDING => "pending",
            2 => "invalid",
            3 => "canceled",
            COMPLETED => "completed",
            TIMEOUT => "timeout",
            6 => "failed",
            _ => "unknown",
        }
    }
}

/// Mooncake's functions. All may be called from any thread.
///
/// # Safety
/// `engine` must come from [`Api::create`] and not have been destroyed, `batch` from [`Api::allocate`] of that engine
/// and not have been freed. [`Engine`](crate::engine::Engine) and [`Batch`](crate::engine::Batch) keep that for everybody else.
pub(crate) trait Api: Send + Sync {
    /// A new engine that is reached at `host`, with no transport unless the environment or the build forces one.
    fn create(&self, host: &str) -> Option<Handle>;
    /// Installs `protocol`, or finds it installed; `nics` is a priority matrix in JSON.
    unsafe fn install(&self, engine: Handle, protocol: &str, nics: Option<&str>) -> bool;
    /// `host:port`, by which peers open it.
    unsafe fn address(&self, engine: Handle) -> String;
    /// The range must stay mapped until it is unregistered.
    unsafe fn register(&self, engine: Handle, address: u64, len_bytes: u64, remote: bool) -> i32;
    unsafe fn unregister(&self, engine: Handle, address: u64) -> i32;
    /// The peer's segment; `refresh` asks the peer for its description again. May block while it connects.
    unsafe fn open(&self, engine: Handle, peer: &str, refresh: bool) -> i32;
    unsafe fn allocate(&self, engine: Handle, tasks: usize) -> u64;
    /// The local ranges must stay mapped, and belong to the batch, until every task has ended.
    unsafe fn submit(&self, engine: Handle, batch: u64, requests: &mut [Request]) -> i32;
    /// The task's status, or the code of the call.
    unsafe fn status(&self, engine: Handle, batch: u64, task: usize) -> Result<i32, i32>;
    unsafe fn free(&self, engine: Handle, batch: u64) -> i32;
    /// No other call may run or follow. Takes half a second.
    unsafe fn destroy(&self, engine: Handle);
    /// Whether somebody listens at `peer`. Mooncake itself does not say why a transfer failed.
    fn reach(&self, peer: &str, limit: Duration) -> io::Result<()> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in peer.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, limit) {
                Ok(_) => return Ok(()),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}
