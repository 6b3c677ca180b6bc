//! RDMA devices as the kernel lists them in sysfs: ports, GIDs, link rates, and where they sit in the PCI tree.
//!
//! Everything here reads below a root that the caller gives, so that recorded trees of other machines are tests.

use std::{
    fmt, fs,
    net::Ipv6Addr,
    path::{Component, Path},
};

use serde::{Deserialize, Serialize};

use super::{HcaPort, LinkLayer, PortState};

/// How a GID is put on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GidKind {
    /// InfiniBand, or RoCE v1, which the kernel calls by the same name: not routable on Ethernet.
    InfiniBand,
    /// RoCE v2: UDP.
    RoceV2,
}

/// One entry of a port's GID table that is not empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Gid {
    /// Its index in the table.
    pub index: u32,
    /// The GID: an IPv6 address, or `::ffff:a.b.c.d`.
    pub address: Ipv6Addr,
    /// How it goes on the wire.
    pub kind: GidKind,
    /// The network interface that it belongs to, for RoCE.
    pub interface: Option<String>,
}

/// One port with what sysfs says about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortInfo {
    /// Its number, from 1.
    pub number: u32,
    /// The kernel's word: `ACTIVE`, `DOWN`, `INIT`.
    pub state: String,
    /// What it speaks.
    pub link_layer: LinkLayer,
    /// The kernel's words: `200 Gb/sec (4X HDR)`.
    pub rate: String,
    /// InfiniBand's local identifier; 0 on Ethernet.
    pub lid: u16,
    /// The table's entries that are not empty.
    pub gids: Vec<Gid>,
}

/// One RDMA device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hca {
    /// `mlx5_0`.
    pub name: String,
    /// Where it sits; `None` for software devices.
    pub pci: Option<PciPath>,
    /// Its ports by number.
    pub ports: Vec<PortInfo>,
}

/// The way from a host bridge to a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciPath {
    /// `pci0000:3a`, then every bridge, then the device's own address.
    pub steps: Vec<String>,
    /// The memory that is nearest.
    pub numa_node: Option<u32>,
}

/// How far two PCI devices are from each other, near before far. The words are those of `nvidia-smi topo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Distance {
    /// At most one switch between them.
    Pix,
    /// Several switches under one root port.
    Pxb,
    /// One host bridge.
    Phb,
    /// Several host bridges of one NUMA node.
    Node,
    /// Across NUMA nodes, or unknown ones.
    Sys,
}

impl fmt::Display for Distance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Distance::Pix => "PIX",
            Distance::Pxb => "PXB",
            Distance::Phb => "PHB",
            Distance::Node => "NODE",
            Distance::Sys => "SYS",
        })
    }
}

/// How far `a` and `b` are from each other.
pub fn classify(a: &PciPath, b: &PciPath) -> Distance {
    let common = a.steps.iter().zip(&b.steps).take_while(|(x, y)| x == y).count();
    // A device and itself have the whole path in common.
    let bridges = |path: &PciPath| path.steps.len().saturating_sub(common + 1);
    match common {
        0 if a.numa_node.is_some() && a.numa_node == b.numa_node => Distance::Node,
        0 => Distance::Sys,
        1 if a.steps.len() > 1 || b.steps.len() > 1 => Distance::Phb,
        // Below their last common bridge each may have its own downstream port of one switch.
        _ if bridges(a) <= 1 && bridges(b) <= 1 => Distance::Pix,
        _ => Distance::Pxb,
    }
}

impl PciPath {
    /// The device's own address, `0000:3b:00.0`.
    pub fn address(&self) -> &str {
        self.steps.last().map_or("", String::as_str)
    }

    /// The path of the device at `address` (`0000:3b:00.0`, in either case), if the tree has it.
    pub fn of_address(sysfs: &Path, address: &str) -> Option<Self> {
        let address = address.to_ascii_lowercase();
        // NVML writes an eight-digit domain.
        let short = match address.split_once(':') {
            Some((domain, rest)) if domain.len() > 4 => format!("{}:{rest}", &domain[domain.len() - 4..]),
            _ => address,
        };
        if short.contains('/') {
            return None;
        }
        Self::of_folder(&sysfs.join("bus/pci/devices").join(short))
    }

    /// The path of a device's folder or of a link to it.
    fn of_folder(folder: &Path) -> Option<Self> {
        let real = fs::canonicalize(folder).ok()?;
        let names = real.components().filter_map(|component| match component {
            Component::Normal(name) => name.to_str(),
            _ => None,
        });
        let steps: Vec<String> = names.skip_while(|name| !is_host_bridge(name)).map(str::to_owned).collect();
        // Some devices sit below a platform bus or a hypervisor's, with no host bridge in the path.
        if steps.is_empty() {
            return None;
        }
        let numa_node = word(&real.join("numa_node")).parse().ok();
        Some(Self { steps, numa_node })
    }
}

fn is_host_bridge(name: &str) -> bool {
    name.strip_prefix("pci")
        .is_some_and(|rest| rest.contains(':') && rest.chars().all(|c| c == ':' || c.is_ascii_hexdigit()))
}

impl PortInfo {
    /// The GID to use: `wanted` if it is in the table; else on Ethernet RoCE v2 before v1 and in each an IPv4 address
    /// before a global IPv6 one before a link-local one; else the first. The lowest index wins among equals.
    pub fn best_gid(&self, wanted: Option<u32>) -> Option<&Gid> {
        if let Some(index) = wanted {
            return self.gids.iter().find(|gid| gid.index == index);
        }
        if self.link_layer != LinkLayer::Ethernet {
            return self.gids.first();
        }
        self.gids.iter().min_by_key(|gid| {
            let place = match gid.address {
                address if address.to_ipv4_mapped().is_some() => 0,
                address if address.is_unicast_link_local() => 2,
                _ => 1,
            };
            (gid.kind != GidKind::RoceV2, place, gid.index)
        })
    }

    /// Gigabits a second, if the kernel's words begin with a number.
    pub fn gigabits(&self) -> Option<f64> {
        self.rate.split_whitespace().next()?.parse().ok()
    }

    /// What the rules of choice need.
    pub fn as_candidate(&self, device: &str) -> HcaPort {
        let state = if self.state == "ACTIVE" { PortState::Active } else { PortState::Other };
        HcaPort { device: device.to_owned(), port: self.number, state, link_layer: self.link_layer }
    }
}

/// The RDMA devices below `sysfs` (`/sys`), in the order in which verbs lists them.
pub fn read_hcas(sysfs: &Path) -> Vec<Hca> {
    let class = sysfs.join("class/infiniband");
    let order = verbs_order(sysfs);
    let mut found: Vec<Hca> = names(&class).into_iter().map(|name| read_hca(&class, name)).collect();
    // Stable: devices without a verbs file keep the order of their names behind the others.
    found.sort_by_key(|hca| order.iter().position(|name| *name == hca.name).unwrap_or(usize::MAX));
    found
}

/// The PCI devices below `sysfs` that compute: display controllers of NVIDIA, and processing accelerators of anybody.
pub fn read_accelerators(sysfs: &Path) -> Vec<PciPath> {
    let folder = sysfs.join("bus/pci/devices");
    let computes = |address: &String| {
        let device = folder.join(address);
        let class = word(&device.join("class"));
        class.starts_with("0x12") || class.starts_with("0x03") && word(&device.join("vendor")) == "0x10de"
    };
    names(&folder).iter().filter(|a| computes(a)).filter_map(|a| PciPath::of_address(sysfs, a)).collect()
}

/// Verbs lists devices as they came up, which is the order of their `uverbsN` files.
fn verbs_order(sysfs: &Path) -> Vec<String> {
    let class = sysfs.join("class/infiniband_verbs");
    let mut files: Vec<(u32, String)> = names(&class)
        .into_iter()
        .filter_map(|file| {
            let number = file.strip_prefix("uverbs")?.parse().ok()?;
            Some((number, word(&class.join(&file).join("ibdev"))))
        })
        .collect();
    files.sort();
    files.into_iter().map(|(_, name)| name).collect()
}

fn read_hca(class: &Path, name: String) -> Hca {
    let folder = class.join(&name);
    let mut ports: Vec<PortInfo> = names(&folder.join("ports"))
        .into_iter()
        .filter_map(|port| Some(read_port(&folder.join("ports").join(&port), port.parse().ok()?)))
        .collect();
    ports.sort_by_key(|port| port.number);
    Hca { pci: PciPath::of_folder(&folder.join("device")), name, ports }
}

fn read_port(folder: &Path, number: u32) -> PortInfo {
    // The file says "4: ACTIVE".
    let state = word(&folder.join("state"));
    let state = state.rsplit(": ").next().unwrap_or_default().to_owned();
    let link_layer = match word(&folder.join("link_layer")).as_str() {
        "InfiniBand" => LinkLayer::InfiniBand,
        "Ethernet" => LinkLayer::Ethernet,
        _ => LinkLayer::Other,
    };
    let lid = word(&folder.join("lid"));
    let lid = u16::from_str_radix(lid.trim_start_matches("0x"), 16).unwrap_or(0);
    let mut gids: Vec<Gid> = names(&folder.join("gids"))
        .into_iter()
        .filter_map(|index| read_gid(folder, index.parse().ok()?))
        .collect();
    gids.sort_by_key(|gid| gid.index);
    PortInfo { number, state, link_layer, rate: word(&folder.join("rate")), lid, gids }
}

fn read_gid(port: &Path, index: u32) -> Option<Gid> {
    let address: Ipv6Addr = word(&port.join(format!("gids/{index}"))).parse().ok()?;
    // Empty entries are zero; an InfiniBand port that has no address yet has only its subnet's prefix.
    if address.is_unspecified() || address.octets()[8..] == [0; 8] {
        return None;
    }
    let kind = match word(&port.join(format!("gid_attrs/types/{index}"))).as_str() {
        "RoCE v2" => GidKind::RoceV2,
        _ => GidKind::InfiniBand,
    };
    let interface =
        Some(word(&port.join(format!("gid_attrs/ndevs/{index}")))).filter(|name| !name.is_empty());
    Some(Gid { index, address, kind, interface })
}

/// A file's content, trimmed; empty if it cannot be read, which some of these files answer for "nothing there".
fn word(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_default().trim().to_owned()
}

pub(super) fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(steps: &str, numa_node: Option<u32>) -> PciPath {
        PciPath { steps: steps.split(' ').map(str::to_owned).collect(), numa_node }
    }

    #[test]
    fn distances_are_those_of_the_pci_tree() {
        let gpu = path("pci0000:3a 3a:00.0 3b:00.0 3c:00.0 3d:00.0", Some(0));
        for (other, expected) in [
            (path("pci0000:3a 3a:00.0 3b:00.0 3c:01.0 3e:00.0", Some(0)), Distance::Pix),
            (path("pci0000:3a 3a:00.0 3b:00.0 3c:00.0 3d:00.1", Some(0)), Distance::Pix),
            (path("pci0000:3a 3a:00.0 3b:00.0 3c:01.0 3e:00.0 3f:00.0 40:00.0", Some(0)), Distance::Pxb),
            (path("pci0000:3a 3a:02.0 50:00.0", Some(0)), Distance::Phb),
            (path("pci0000:5d 5d:00.0 5e:00.0", Some(0)), Distance::Node),
            (path("pci0000:ae ae:00.0 af:00.0", Some(1)), Distance::Sys),
            (path("pci0000:5d 5d:00.0 5e:00.0", None), Distance::Sys),
        ] {
            assert_eq!(classify(&gpu, &other), expected, "{other:?}");
            assert_eq!(classify(&other, &gpu), expected, "{other:?}");
        }
        assert_eq!(classify(&gpu, &gpu), Distance::Pix);
        assert!(Distance::Pix < Distance::Pxb && Distance::Node < Distance::Sys);
    }

    #[test]
    fn the_gid_is_chosen_by_the_table() {
        let gid = |index, address: &str, kind| Gid {
            index,
            address: address.parse().unwrap(),
            kind,
            interface: None,
        };
        let (v1, v2) = (GidKind::InfiniBand, GidKind::RoceV2);
        let mut port = PortInfo {
            number: 1,
            state: "ACTIVE".into(),
            link_layer: LinkLayer::Ethernet,
            rate: "100 Gb/sec (4X EDR)".into(),
            lid: 0,
            gids: vec![
                gid(0, "fe80::1", v1),
                gid(1, "fe80::1", v2),
                gid(2, "::ffff:10.0.0.1", v1),
                gid(3, "::ffff:10.0.0.1", v2),
                gid(4, "2001:db8::1", v2),
                gid(5, "::ffff:10.0.0.2", v2),
            ],
        };
        assert_eq!(port.best_gid(None).unwrap().index, 3);
        assert_eq!(port.best_gid(Some(4)).unwrap().index, 4);
        assert!(port.best_gid(Some(9)).is_none());
        port.gids.retain(|gid| gid.address.to_ipv4_mapped().is_none());
        assert_eq!(port.best_gid(None).unwrap().index, 4);
        port.gids.pop();
        assert_eq!(port.best_gid(None).unwrap().index, 1);
        assert_eq!(port.gigabits(), Some(100.0));
    }

    #[test]
    fn an_absent_tree_has_no_devices() {
        let empty = tempfile::tempdir().unwrap();
        assert!(read_hcas(empty.path()).is_empty() && read_accelerators(empty.path()).is_empty());
        assert!(PciPath::of_address(empty.path(), "0000:3b:00.0").is_none());
    }
}
