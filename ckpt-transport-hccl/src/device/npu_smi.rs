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

use ckpt_core::device::poll::Pause;

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
                if let Some(index) = index_of(npu, pid, &text) {
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

/// What `npu-smi info -t proc-mem -i <npu>` printed, searched for a process: npu x chips of an NPU + chip. Each chip's
/// processes stand before its `Chip ID`.
fn index_of(npu: u32, pid: u32, text: &str) -> Option<u32> {
    let after_pid = &text[end_of_number(text, &pid.to_string())?..];
    let chips = number_after(text, "Chip Count")?;
    Some(npu * chips + number_after(after_pid, "Chip ID")?)
}

/// Where the first `number` ends that is not a part of a longer one and is said to be a process id.
fn end_of_number(text: &str, number: &str) -> Option<usize> {
    let digit = |c: Option<char>| c.is_some_and(|c| c.is_ascii_digit());
    text.match_indices(number).map(|(start, _)| (start, start + number.len())).find_map(|(start, end)| {
        let alone = !digit(text[..start].chars().next_back()) && !digit(text[end..].chars().next());
        let line = text[..start].rsplit('\n').next().unwrap_or_default().to_ascii_lowercase();
        let label = line.trim_end_matches(|c: char| c.is_whitespace() || c == ':');
        let is_pid = label.ends_with("process id") || label.ends_with("process id in container");
        (alone && is_pid).then_some(end)
    })
}

fn number_after(text: &str, label: &str) -> Option<u32> {
    let rest = &text[text.find(label)? + label.len()..];
    let rest = rest.trim_start_matches(|c: char| !c.is_ascii_digit());
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One chip an NPU, as on Atlas 800 A2.
    const ONE_CHIP: &str = "\
\tNPU ID                         : 3
\tChip Count                     : 1

\tProcess id:41273                Process name:python3             Process memory(MB):24578
\tProcess id:812                  Process name:ckpt                Process memory(MB):812999
\tChip ID                        : 0
";

    /// Two chips an NPU, as on A3.
    const TWO_CHIPS: &str = "\
\tNPU ID                         : 5
\tChip Count                     : 2

\tProcess id                     : 777
\tProcess name                   : python3
\tProcess memory(MB)             : 1777
\tChip ID                        : 0

\tProcess id                     : 1778
\tProcess name                   : python3
\tProcess memory(MB)             : 777
\tChip ID                        : 1
";

    #[test]
    fn the_index_counts_chips() {
        assert_eq!(index_of(3, 41273, ONE_CHIP), Some(3));
        assert_eq!(index_of(3, 812, ONE_CHIP), Some(3));
        assert_eq!(index_of(5, 777, TWO_CHIPS), Some(10));
        assert_eq!(index_of(5, 1778, TWO_CHIPS), Some(11));
    }

    #[test]
    fn a_process_that_is_not_there_is_not_found_in_other_numbers() {
        // 41 and 12 begin other ids, 24578 and 812999 are memory, 1 is a count.
        for pid in [41, 12, 24578, 812_999, 1, 1777] {
            assert_eq!(index_of(3, pid, ONE_CHIP), None, "{pid}");
        }
        assert_eq!(index_of(5, 1777, TWO_CHIPS), None);
        assert_eq!(index_of(0, 5, ""), None);
        assert_eq!(index_of(0, 5, "Process id: 5"), None);
    }

    #[test]
    fn the_address_is_one() {
        assert!(own_address().parse::<std::net::IpAddr>().is_ok());
        assert!(uuid(6).starts_with("NPU-"));
    }
}
