//! Which of Mooncake's own transports is used, and over which NICs.
//!
//! The rule is Mooncake's; naming the transport ourselves makes sure that what `doctor` says is what happens.

use std::{fmt, fs, path::Path};

use ckpt_core::{
    Result,
    topology::{self, Accelerators, PciPath, read_hcas},
};

const SYSFS: &str = "/sys";
/// Amazon's PCI vendor: its NICs speak EFA.
const AMAZON: &str = "0x1d0f";

/// One of Mooncake's transports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Rdma,
    Efa,
    Ascend,
}

impl Protocol {
    /// Mooncake's name of it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Rdma => "rdma",
            Protocol::Efa => "efa",
            Protocol::Ascend => "ascend",
        }
    }

    /// Whether memory must be registered before bytes are read into it.
    pub(crate) const fn registers_destinations(self) -> bool {
        !matches!(self, Protocol::Tcp)
    }
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) protocol: Protocol,
    pub(crate) why: &'static str,
    /// This rank's NICs; empty where nothing tells ranks apart: Mooncake takes those near the memory.
    pub(crate) nics: Vec<String>,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.protocol.name(), self.why)?;
        if !self.nics.is_empty() {
            write!(f, " over {}", self.nics.join(", "))?;
        }
        Ok(())
    }
}

impl Choice {
    /// The NIC priority matrix: the same NICs for memory anywhere.
    pub(crate) fn matrix(&self) -> Option<String> {
        if self.nics.is_empty() {
            return None;
        }
        let names: Vec<String> = self.nics.iter().map(|name| format!("\"{name}\"")).collect();
        Some(format!("{{\"cpu:0\": [[{}], []]}}", names.join(", ")))
    }
}

/// What the choice depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settings {
    /// `MC_FORCE_TCP`.
    pub(crate) force_tcp: bool,
    /// `MC_FORCE_HCA`.
    pub(crate) force_hca: bool,
    /// `PS_P2P_STORE_RDMA_DEVICES` and `NCCL_IB_HCA`.
    pub(crate) nic_variables: Vec<(String, String)>,
    /// `LOCAL_RANK` and `LOCAL_WORLD_SIZE`.
    pub(crate) local_rank: Option<(u32, u32)>,
}

impl Settings {
    pub(crate) fn from_env(env: &dyn Fn(&str) -> Option<String>) -> Self {
        let number = |name: &str| env(name)?.trim().parse().ok();
        let variable = |name: &str| env(name).filter(|v| !v.is_empty()).map(|v| (name.to_owned(), v));
        Self {
            // Mooncake only asks whether they are set.
            force_tcp: env("MC_FORCE_TCP").is_some(),
            force_hca: env("MC_FORCE_HCA").is_some(),
            nic_variables: ["PS_P2P_STORE_RDMA_DEVICES", "NCCL_IB_HCA"]
                .into_iter()
                .filter_map(variable)
                .collect(),
            local_rank: number("LOCAL_RANK").zip(number("LOCAL_WORLD_SIZE")),
        }
    }
}

/// Chooses for this machine and the rank whose accelerator is at `pci_address`. `ascend_build`: the library insists on its
/// accelerator's transport.
pub(crate) fn choose(settings: &Settings, ascend_build: bool, pci_address: Option<&str>) -> Result<Choice> {
    choose_in(settings, ascend_build, pci_address, Path::new(SYSFS))
}

fn choose_in(
    settings: &Settings,
    ascend_build: bool,
    pci_address: Option<&str>,
    sysfs: &Path,
) -> Result<Choice> {
    let choice = |protocol, why| Choice { protocol, why, nics: Vec::new() };
    if settings.force_tcp {
        return Ok(choice(Protocol::Tcp, "MC_FORCE_TCP is set"));
    }
    if ascend_build {
        return Ok(choice(
            Protocol::Ascend,
            "the library is an Ascend build; MC_FORCE_TCP=1 makes it use tcp",
        ));
    }
    let hcas = read_hcas(sysfs);
    let usable = hcas.iter().any(|hca| !hca.ports.is_empty());
    if !usable && !settings.force_hca {
        return Ok(choice(Protocol::Tcp, "no RDMA device"));
    }
    let vendor = |name: &str| read(&sysfs.join("class/infiniband").join(name).join("device/vendor"));
    if hcas.iter().any(|hca| vendor(&hca.name) == AMAZON) {
        return Ok(choice(Protocol::Efa, "an EFA device"));
    }
    let mut chosen = choice(Protocol::Rdma, "an RDMA device");
    let accelerator = pci_address.and_then(|address| PciPath::of_address(sysfs, address));
    let numbering = settings.local_rank.map(|(local_rank, ranks)| Accelerators {
        local_rank,
        visible: ranks,
        local_world_size: Some(ranks),
    });
    if usable && (!settings.nic_variables.is_empty() || accelerator.is_some() || numbering.is_some()) {
        let env = |name: &str| {
            settings.nic_variables.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone())
        };
        // The same choice as that of the transport `rdma`.
        for port in topology::choose(&hcas, accelerator.as_ref(), numbering, &env)?.ports {
            if !chosen.nics.contains(&port.device) {
                chosen.nics.push(port.device);
            }
        }
    }
    Ok(chosen)
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(devices: &[(&str, &str)]) -> tempfile::TempDir {
        let sysfs = tempfile::tempdir().unwrap();
        for (name, vendor) in devices {
            let folder = sysfs.path().join("class/infiniband").join(name);
            let port = folder.join("ports/1");
            fs::create_dir_all(&port).unwrap();
            fs::create_dir_all(folder.join("device")).unwrap();
            fs::write(folder.join("device/vendor"), format!("{vendor}\n")).unwrap();
            fs::write(port.join("state"), "4: ACTIVE\n").unwrap();
            fs::write(port.join("link_layer"), "Ethernet\n").unwrap();
        }
        sysfs
    }

    #[test]
    fn the_protocol_follows_variables_build_and_devices() {
        let (none, mellanox, amazon) = (
            machine(&[]),
            machine(&[("mlx5_0", "0x15b3"), ("mlx5_1", "0x15b3")]),
            machine(&[("efa_0", AMAZON)]),
        );
        let chosen = |variables: &[(&str, &str)], ascend, sysfs: &tempfile::TempDir| {
            let env = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
            choose_in(&Settings::from_env(&env), ascend, None, sysfs.path())
        };
        assert_eq!(chosen(&[], false, &none).unwrap().protocol, Protocol::Tcp);
        assert_eq!(chosen(&[("MC_FORCE_HCA", "1")], false, &none).unwrap().protocol, Protocol::Rdma);
        assert_eq!(chosen(&[], true, &none).unwrap().protocol, Protocol::Ascend);
        let npu = chosen(&[("NCCL_IB_HCA", "=mlx5_1")], true, &mellanox).unwrap();
        assert_eq!((npu.protocol, npu.matrix()), (Protocol::Ascend, None), "no NIC is named to it");
        assert_eq!(chosen(&[("MC_FORCE_TCP", "")], true, &mellanox).unwrap().protocol, Protocol::Tcp);
        assert_eq!(chosen(&[], false, &amazon).unwrap().protocol, Protocol::Efa);
        let all = chosen(&[], false, &mellanox).unwrap();
        assert_eq!((all.protocol, all.matrix()), (Protocol::Rdma, None));
        let one = chosen(&[("NCCL_IB_HCA", "=mlx5_1")], false, &mellanox).unwrap();
        assert_eq!(one.matrix().unwrap(), r#"{"cpu:0": [["mlx5_1"], []]}"#);
        assert_eq!(one.to_string(), "rdma (an RDMA device) over mlx5_1");
        let shared = chosen(&[("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")], false, &mellanox).unwrap();
        assert_eq!(shared.nics, ["mlx5_1"], "ranks of a host share its NICs out");
        let error = chosen(&[("PS_P2P_STORE_RDMA_DEVICES", "mlx5_9")], false, &mellanox).unwrap_err();
        assert!(error.message().contains("mlx5_9"), "{error}");
    }
}
