//! What a result was measured on: without it a figure says nothing.

use std::{fs, path::Path};

use ckpt_core::{
    topology::{Hca, read_hcas},
    transport::{Probe, Registry},
};
use serde::{Deserialize, Serialize};

/// Host, processor, devices, libraries, links and this program's version.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) version: String,
    /// Of this program's source, where it can be told.
    pub(crate) commit: Option<String>,
    /// An optimised build; figures of others mean little.
    pub(crate) optimised: bool,
    pub(crate) host: String,
    pub(crate) kernel: String,
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) memory_bytes: u64,
    /// Of the accelerators.
    pub(crate) driver: Option<String>,
    /// Devices and transports that are there, with what their probe said (library, version).
    pub(crate) libraries: Vec<Library>,
    /// RDMA ports: name, state, rate.
    pub(crate) hcas: Vec<Link>,
    /// Network interfaces that are up.
    pub(crate) interfaces: Vec<Link>,
}

/// A device or transport that is there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Library {
    pub(crate) name: String,
    pub(crate) detail: String,
}

/// A port and its rate.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Link {
    pub(crate) name: String,
    pub(crate) state: String,
    pub(crate) rate: String,
}

impl Machine {
    /// Looks at this machine. Blocks: probes open libraries.
    pub(crate) fn look(registry: &Registry) -> Self {
        let uname = rustix::system::uname();
        let found = |name: &str, probe: Probe| match probe {
            Probe::Available(detail) => Some(Library { name: name.to_owned(), detail }),
            Probe::Unavailable(_) => None,
        };
        let devices = registry.devices().filter_map(|d| found(d.kind(), d.probe()));
        let transports = registry.transports().filter_map(|t| found(t.name(), t.probe()));
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: commit(),
            optimised: !cfg!(debug_assertions),
            host: uname.nodename().to_string_lossy().into_owned(),
            kernel: uname.release().to_string_lossy().into_owned(),
            cpu: cpu(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: memory(&fs::read_to_string("/proc/meminfo").unwrap_or_default()),
            driver: driver(),
            libraries: devices.chain(transports).collect(),
            hcas: read_hcas(Path::new("/sys")).iter().flat_map(ports).collect(),
            interfaces: interfaces(Path::new("/sys/class/net")),
        }
    }

    /// One line for people.
    pub(crate) fn line(&self) -> String {
        let mut parts = vec![
            format!("ckpt {}{}", self.version, if self.optimised { "" } else { " (not optimised)" }),
            format!("{} ({} cores, {})", self.host, self.cores, self.cpu),
        ];
        parts
            .extend(self.commit.as_ref().map(|commit| format!("commit {}", &commit[..commit.len().min(10)])));
        parts.extend(self.driver.as_ref().map(|driver| format!("driver {driver}")));
        parts.extend(self.hcas.iter().map(|hca| format!("{} {}", hca.name, hca.rate)));
        parts.join("; ")
    }

    /// Columns of every row of a CSV file.
    pub(crate) fn columns(&self) -> [(&'static str, String); 6] {
        let hcas: Vec<String> = self.hcas.iter().map(|hca| format!("{} {}", hca.name, hca.rate)).collect();
        [
            ("host", self.host.clone()),
            ("cpu", self.cpu.clone()),
            ("driver", self.driver.clone().unwrap_or_default()),
            ("hca", hcas.join(" ")),
            ("version", self.version.clone()),
            ("commit", self.commit.clone().unwrap_or_default()),
        ]
    }
}

/// What the build was told, else the state of the checkout that this program lies in.
fn commit() -> Option<String> {
    if let Some(commit) = option_env!("CKPT_COMMIT") {
        return Some(commit.to_owned());
    }
    let program = std::env::current_exe().ok()?;
    let checkout = program.ancestors().find(|folder| folder.join(".git").exists())?;
    head(&checkout.join(".git"))
}

/// The commit that a `.git` folder, or the file that a worktree has instead, is at.
fn head(git: &Path) -> Option<String> {
    let folder = match fs::read_to_string(git) {
        Ok(text) => text.strip_prefix("gitdir: ")?.trim().into(),
        Err(_) => git.to_owned(),
    };
    let head = fs::read_to_string(folder.join("HEAD")).ok()?;
    let Some(reference) = head.trim().strip_prefix("ref: ") else { return Some(head.trim().to_owned()) };
    let common = fs::read_to_string(folder.join("commondir")).map(|text| folder.join(text.trim()));
    [Some(folder), common.ok()].into_iter().flatten().find_map(|folder| {
        let loose = fs::read_to_string(folder.join(reference)).ok().map(|text| text.trim().to_owned());
        loose.or_else(|| {
            let packed = fs::read_to_string(folder.join("packed-refs")).ok()?;
            let line = packed.lines().find(|line| line.ends_with(&format!(" {reference}")))?;
            Some(line.split(' ').next()?.to_owned())
        })
    })
}

fn cpu(cpuinfo: &str) -> String {
    let value = |key: &str| {
        cpuinfo.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == key).then(|| value.trim().to_owned())
        })
    };
    value("model name").or_else(|| value("CPU part")).unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

fn memory(meminfo: &str) -> u64 {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

fn driver() -> Option<String> {
    let text = fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let version = text.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
    Some(version.to_owned())
}

fn ports(hca: &Hca) -> impl Iterator<Item = Link> + '_ {
    hca.ports.iter().map(|port| Link {
        name: format!("{}:{}", hca.name, port.number),
        state: port.state.clone(),
        rate: port.rate.clone(),
    })
}

fn interfaces(folder: &Path) -> Vec<Link> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut links: Vec<Link> = entries
        .flatten()
        .filter_map(|entry| {
            let read = |name: &str| fs::read_to_string(entry.path().join(name)).ok();
            let state = read("operstate")?.trim().to_owned();
            let speed =
                read("speed").and_then(|text| text.trim().parse::<i64>().ok()).filter(|mbit| *mbit > 0);
            let rate = speed.map_or_else(|| "unknown".to_owned(), |mbit| format!("{mbit} Mb/sec"));
            (state == "up").then(|| Link {
                name: entry.file_name().to_string_lossy().into_owned(),
                state,
                rate,
            })
        })
        .collect();
    links.sort_by(|a, b| a.name.cmp(&b.name));
    links
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_read() {
        assert_eq!(cpu("processor\t: 0\nmodel name\t: Fast 9000 @ 3GHz\n"), "Fast 9000 @ 3GHz");
        assert_eq!(memory("MemFree: 3 kB\nMemTotal:       16384 kB\n"), 16 << 20);
    }

    #[test]
    fn a_checkout_tells_its_commit() {
        let folder = tempfile::tempdir().unwrap();
        let git = folder.path().join(".git");
        fs::create_dir_all(git.join("refs/heads")).unwrap();
        fs::write(git.join("HEAD"), "ref: refs/heads/main\n").unwrap();
        assert_eq!(head(&git), None);
        fs::write(git.join("packed-refs"), "# pack\n1234 refs/heads/main\n").unwrap();
        assert_eq!(head(&git).as_deref(), Some("1234"));
        fs::write(git.join("refs/heads/main"), "abcd\n").unwrap();
        assert_eq!(head(&git).as_deref(), Some("abcd"));
        let worktree = git.join("worktrees/w");
        fs::create_dir_all(&worktree).unwrap();
        fs::write(worktree.join("HEAD"), "ref: refs/heads/main\n").unwrap();
        fs::write(worktree.join("commondir"), "../..\n").unwrap();
        let file = folder.path().join("file");
        fs::write(&file, format!("gitdir: {}\n", worktree.display())).unwrap();
        assert_eq!(head(&file).as_deref(), Some("abcd"));
    }
}
