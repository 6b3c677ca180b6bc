//! Keeps a device's thread near the device: on the cores of its NUMA node.

use std::path::Path;

/// Pins the calling thread to the cores of `device`'s NUMA node that it may use; answers them. Does nothing where the
/// node is not known, as for soft-RoCE, or has none of the thread's cores.
pub(crate) fn pin_near(sysfs: &Path, device: &str) -> Option<Vec<usize>> {
    let word = |path: &Path| Some(std::fs::read_to_string(path).ok()?.trim().to_owned());
    let node = word(&sysfs.join("class/infiniband").join(device).join("device/numa_node"))?;
    // -1 where the firmware says nothing.
    let node: u32 = node.parse().ok()?;
    let list = word(&sysfs.join(format!("devices/system/node/node{node}/cpulist")))?;
    // SAFETY: a set of bits, for which zero is a value.
    let mut allowed: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: the set and its size belong together; 0 is the calling thread.
    if unsafe { libc::sched_getaffinity(0, size, &mut allowed) } != 0 {
        return None;
    }
    let cores: Vec<usize> = cores(&list)
        .into_iter()
        // SAFETY: the number is below the set's size.
        .filter(|core| *core < libc::CPU_SETSIZE as usize && unsafe { libc::CPU_ISSET(*core, &allowed) })
        .collect();
    if cores.is_empty() {
        return None;
    }
    // SAFETY: as above.
    let mut near: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for core in &cores {
        // SAFETY: as above.
        unsafe { libc::CPU_SET(*core, &mut near) };
    }
    // SAFETY: as above.
    (unsafe { libc::sched_setaffinity(0, size, &near) } == 0).then_some(cores)
}

/// The numbers of a list like `0-3,8,10-11`; what is no number is left out.
fn cores(list: &str) -> Vec<usize> {
    let range = |item: &str| {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    };
    list.split(',')
        .filter_map(range)
        .flat_map(|range: std::ops::RangeInclusive<usize>| range.take(4096))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cores_are_those_of_the_kernel() {
        assert_eq!(cores("0-3,8,10-11"), [0, 1, 2, 3, 8, 10, 11]);
        assert_eq!(cores("5"), [5]);
        assert_eq!(cores(""), [0; 0]);
        assert_eq!(cores("a,2-x,7"), [7]);
    }

    #[test]
    fn a_thread_goes_to_the_node_of_its_device_if_that_is_known() {
        let sysfs = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = sysfs.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let pinned = |device: &'static str| {
            let sysfs = sysfs.path().to_owned();
            // On a thread of its own: the test's stays where it is.
            std::thread::spawn(move || pin_near(&sysfs, device)).join().unwrap()
        };
        assert_eq!(pinned("rxe0"), None);
        write("class/infiniband/none/device/numa_node", "-1\n");
        assert_eq!(pinned("none"), None);
        write("class/infiniband/far/device/numa_node", "7\n");
        write("devices/system/node/node7/cpulist", "100000\n");
        assert_eq!(pinned("far"), None);
        write("class/infiniband/mlx5_0/device/numa_node", "0\n");
        write("devices/system/node/node0/cpulist", "0-1023\n");
        let cores = pinned("mlx5_0").unwrap();
        assert!(!cores.is_empty() && cores.len() <= 1024);
    }
}
