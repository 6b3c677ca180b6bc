//! Where a PCI device sits, and keeping threads near it.

use std::{fs, path::Path};

use ckpt_core::{Error, ErrorKind, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The NUMA node of the device at `pci_address`, where the kernel knows one.
pub(crate) fn node_of(sysfs: &Path, pci_address: &str) -> Option<u32> {
    let text = fs::read_to_string(sysfs.join("bus/pci/devices").join(pci_address).join("numa_node")).ok()?;
    // -1 = no affinity.
    text.trim().parse::<i64>().ok().and_then(|node| u32::try_from(node).ok())
}

/// Lets the calling thread run only on the CPUs of NUMA node `node`, so that it and the memory which it touches first
/// are near the device. Threads that it starts later inherit this. False: the process may use no CPU of that node, or
/// the node is unknown; nothing was changed.
pub fn bind_current_thread(node: u32) -> Result<bool> {
    let list = format!("/sys/devices/system/node/node{node}/cpulist");
    let Ok(text) = fs::read_to_string(list) else { return Ok(false) };
    let failed = |error: rustix::io::Errno| {
        Error::new(ErrorKind::Backend, "bind a thread to a NUMA node", "the kernel refused").caused_by(error)
    };
    let allowed = sched_getaffinity(None).map_err(failed)?;
    let mut wanted = CpuSet::new();
    for cpu in parse_cpu_list(&text).into_iter().filter(|cpu| *cpu < CpuSet::MAX_CPU && allowed.is_set(*cpu))
    {
        wanted.set(cpu);
    }
    if wanted.count() == 0 {
        return Ok(false);
    }
    sched_setaffinity(None, &wanted).map_err(failed)?;
    Ok(true)
}

/// `0-3,8,10-11`; what cannot be read is left out.
fn parse_cpu_list(text: &str) -> Vec<usize> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.trim().parse::<usize>(), last.trim().parse::<usize>()) {
            cpus.extend(first..=last.min(first.saturating_add(CpuSet::MAX_CPU)));
        }
    }
    cpus
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_read_and_nonsense_is_left_out() {
        assert_eq!(parse_cpu_list("0-3,8,10-11\n"), [0, 1, 2, 3, 8, 10, 11]);
        assert_eq!(parse_cpu_list(""), [0usize; 0]);
        assert_eq!(parse_cpu_list("x,2,-,5-4"), [2]);
    }

    #[test]
    fn the_node_comes_from_sysfs_and_minus_one_is_none() {
        let root = tempfile::tempdir().unwrap();
        let device = root.path().join("bus/pci/devices/0000:3b:00.0");
        fs::create_dir_all(&device).unwrap();
        assert_eq!(node_of(root.path(), "0000:3b:00.0"), None);
        fs::write(device.join("numa_node"), "1\n").unwrap();
        assert_eq!(node_of(root.path(), "0000:3b:00.0"), Some(1));
        fs::write(device.join("numa_node"), "-1\n").unwrap();
        assert_eq!(node_of(root.path(), "0000:3b:00.0"), None);
    }

    #[test]
    fn a_bound_thread_still_runs() {
        std::thread::spawn(|| {
            bind_current_thread(0).unwrap();
            assert!(!bind_current_thread(100_000).unwrap());
        })
        .join()
        .unwrap();
    }
}
