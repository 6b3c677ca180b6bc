//! The name under which checkpoint-engine's workers look their endpoint up: `NPU-<ip>-<index>`.
//!
//! The worker asks `npu-smi` on which chip its own process is, so the parameter server beside it does the same and gets the
//! same index. Where `npu-smi` is missing or does not know the process (another process namespace) the device's physical id
//! stands for it, which is the same number.

use std::{
    io::Read,
    net::{Ipv4Addr, SocketAddr, ToSocketAddrs, UdpSocket},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use ckpt_core::{device::poll::Pause, topology::npu_chip_index};

/// NPUs that are asked for: as many as the workers do.
const NPUS: u32 = 8;
/// A healthy `npu-smi` takes less than a second.
const LIMIT: Duration = Duration::from_secs(10);

/// The name of the device with `physical_id`.
pub(super) fn uuid(physical_id: u32) -> String {
    let index = own_index().unwrap_or(physical_id);
    format!("NPU-{}-{index}", own_address())
}

/// The address from which this host reaches others. Connecting a UDP socket sends nothing.
fn own_address() -> String {
    let towards_others = || -> std::io::Result<SocketAddr> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect((Ipv4Addr::new(8, 8, 8, 8), 80))?;
        socket.local_addr()
    };
    let of_name = || {
        let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
        (name, 0).to_socket_addrs().ok()?.find(SocketAddr::is_ipv4)
    };
    let address = towards_others().ok().or_else(of_name);
    address.map_or_else(|| Ipv4Addr::LOCALHOST.to_string(), |address| address.ip().to_string())
}

/// The chip that this process uses, as `npu-smi` sees it.
fn own_index() -> Option<u32> {
    let pid = std::process::id();
    for npu in 0..NPUS {
        match processes_of(npu) {
            Ok(text) => {
                if let Some(index) = npu_chip_index(npu, pid, &text) {
                    return Some(index);
                }
            }
            Err(error) => {
                tracing::debug!(npu, %error, "npu-smi does not answer; the physical id names the device");
                return None;
            }
        }
    }
    None
}

fn processes_of(npu: u32) -> std::io::Result<String> {
    let mut child = Command::new("npu-smi")
        .args(["info", "-t", "proc-mem", "-i", &npu.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let (deadline, mut pause) = (Instant::now() + LIMIT, Pause::default());
    // A page of text: it fits the pipe, so waiting before reading holds nothing up.
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if Instant::now() >= deadline => {
                child.kill()?;
                child.wait()?;
                return Err(std::io::ErrorKind::TimedOut.into());
            }
            None => pause.take(),
        }
    };
    let mut text = String::new();
    child.stdout.take().ok_or(std::io::ErrorKind::BrokenPipe)?.read_to_string(&mut text)?;
    if status.success() { Ok(text) } else { Err(std::io::Error::other(status.to_string())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_one() {
        assert!(own_address().parse::<std::net::IpAddr>().is_ok());
        assert!(uuid(6).starts_with("NPU-"));
    }
}
