//! Keeping a rank's threads near its device. Memory that they touch first is then near it too: the kernel's default
//! policy takes the node of the CPU that touches.

use std::{fs, path::Path};

use rustix::thread::{CpuSet, Pid, sched_getaffinity, sched_setaffinity};

use crate::error::{Error, ErrorKind, Result};

/// Where Linux shows its devices.
pub const SYSFS: &str = "/sys";

/// The NUMA node of the device at `pci_address`, where the kernel knows one.
pub fn node_of(sysfs: &Path, pci_address: &str) -> Option<u32> {
    let text = fs::read_to_string(sysfs.join("bus/pci/devices").join(pci_address).join("numa_node")).ok()?;
    // -1 = no affinity.
    text.trim().parse::<i64>().ok().and_then(|node| u32::try_from(node).ok())
}

/// Lets all threads of this process run only on the CPUs of NUMA node `node`; threads that they start later inherit it.
/// Answers how many CPUs that leaves. `None`, and nothing is changed, where the machine has one node, the node is unknown
/// or the process may use no CPU of it.
pub fn bind_process(sysfs: &Path, node: u32) -> Result<Option<usize>> {
    let failed = |error: rustix::io::Errno| {
        Error::new(ErrorKind::Backend, "bind a rank to a NUMA node", "the kernel refused").caused_by(error)
    };
    let allowed = sched_getaffinity(None).map_err(failed)?;
    let Some(cpus) = cpus_near(sysfs, node, |cpu| cpu < CpuSet::MAX_CPU && allowed.is_set(cpu)) else {
        return Ok(None);
    };
    let mut wanted = CpuSet::new();
    cpus.iter().for_each(|cpu| wanted.set(*cpu));
    sched_setaffinity(None, &wanted).map_err(failed)?;
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    for thread in threads.filter_map(|entry| entry.file_name().to_str()?.parse().ok().and_then(Pid::from_raw))
    {
        // One that has ended meanwhile needs no CPUs.
        let _ = sched_setaffinity(Some(thread), &wanted);
    }
    Ok(Some(cpus.len()))
}

/// The CPUs of `node` among those allowed; `None` if binding to them would change nothing or leave nothing.
fn cpus_near(sysfs: &Path, node: u32, allowed: impl Fn(usize) -> bool) -> Option<Vec<usize>> {
    let nodes = sysfs.join("devices/system/node");
    let cpus_of = |name: &str| {
        let text = fs::read_to_string(nodes.join(name).join("cpulist")).unwrap_or_default();
        parse_cpu_list(&text).into_iter().filter(|cpu| allowed(*cpu)).collect::<Vec<_>>()
    };
    let near = cpus_of(&format!("node{node}"));
    let others = fs::read_dir(&nodes).into_iter().flatten().flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_str().unwrap_or_default();
        let number = name.strip_prefix("node").and_then(|number| number.parse::<u32>().ok());
        number.is_some_and(|number| number != node) && !cpus_of(name).is_empty()
    });
    (others && !near.is_empty()).then_some(near)
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

    fn machine(nodes: &[(u32, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (node, cpus) in nodes {
            let folder = root.path().join(format!("devices/system/node/node{node}"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("cpulist"), cpus).unwrap();
        }
        root
    }

    #[test]
    fn a_rank_gets_the_allowed_cpus_of_its_node() {
        let root = machine(&[(0, "0-3,8-11\n"), (1, "4-7,12-15\n")]);
        assert_eq!(cpus_near(root.path(), 1, |_| true).unwrap(), [4, 5, 6, 7, 12, 13, 14, 15]);
        assert_eq!(cpus_near(root.path(), 1, |cpu| cpu < 6).unwrap(), [4, 5]);
        for (what, found) in [
            ("a container without that node", cpus_near(root.path(), 1, |cpu| cpu < 4)),
            ("a container inside that node", cpus_near(root.path(), 0, |cpu| cpu < 4)),
            ("an unknown node", cpus_near(root.path(), 7, |_| true)),
        ] {
            assert_eq!(found, None, "{what}");
        }
        let one = machine(&[(0, "0-7\n")]);
        assert_eq!(cpus_near(one.path(), 0, |_| true), None);
        // Memory without CPUs, as accelerators have it, is no second node.
        let memory = machine(&[(0, "0-7\n"), (1, "\n")]);
        assert_eq!(cpus_near(memory.path(), 0, |_| true), None);
        assert_eq!(cpus_near(Path::new("/nowhere"), 0, |_| true), None);
    }

    #[test]
    fn what_cannot_be_bound_is_left_alone() {
        let cpus = || sched_getaffinity(None).unwrap().count();
        let before = cpus();
        assert_eq!(bind_process(Path::new("/nowhere"), 0).unwrap(), None);
        assert_eq!(cpus(), before);
    }
}
