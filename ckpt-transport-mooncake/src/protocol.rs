//! Which of Mooncake's own transports is used, and over which NICs.
//!
//! The rule is Mooncake's; naming the transport ourselves makes sure that what `doctor` says is what happens.

use std::{fmt, fs, path::Path};

use ckpt_core::{
    Result,
    topology::{HcaPort, LinkLayer, PortState, choose_ports},
};

const CLASS: &str = "/sys/class/infiniband";
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
    /// NICs that the user asked for; empty: Mooncake takes those near the memory.
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
}

impl Settings {
    pub(crate) fn from_env(env: &dyn Fn(&str) -> Option<String>) -> Self {
        let variable = |name: &str| env(name).filter(|v| !v.is_empty()).map(|v| (name.to_owned(), v));
        Self {
            // Mooncake only asks whether they are set.
            force_tcp: env("MC_FORCE_TCP").is_some(),
            force_hca: env("MC_FORCE_HCA").is_some(),
            nic_variables: ["PS_P2P_STORE_RDMA_DEVICES", "NCCL_IB_HCA"]
                .into_iter()
                .filter_map(variable)
                .collect(),
        }
    }
}

/// Chooses for this machine. `ascend_build`: the library insists on its accelerator's transport.
pub(crate) fn choose(settings: &Settings, ascend_build: bool) -> Result<Choice> {
    choose_in(settings, ascend_build, Path::new(CLASS))
}

fn choose_in(settings: &Settings, ascend_build: bool, class: &Path) -> Result<Choice> {
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
    let ports = ports_in(class);
    if ports.is_empty() && !settings.force_hca {
        return Ok(choice(Protocol::Tcp, "no RDMA device"));
    }
    let amazon = |port: &HcaPort| read(&class.join(&port.device).join("device/vendor")) == AMAZON;
    if ports.iter().any(amazon) {
        return Ok(choice(Protocol::Efa, "an EFA device"));
    }
    let mut chosen = choice(Protocol::Rdma, "an RDMA device");
    if !settings.nic_variables.is_empty() {
        let env = |name: &str| {
            settings.nic_variables.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone())
        };
        for port in choose_ports(&ports, &env)? {
            if !chosen.nics.contains(&port.device) {
                chosen.nics.push(port.device);
            }
        }
    }
    Ok(chosen)
}

fn ports_in(class: &Path) -> Vec<HcaPort> {
    let mut found = Vec::new();
    for device in names(class) {
        let folder = class.join(&device).join("ports");
        for name in names(&folder) {
            let Ok(port) = name.parse() else { continue };
            // The file says "4: ACTIVE".
            let active = read(&folder.join(&name).join("state")).ends_with("ACTIVE");
            let link_layer = match read(&folder.join(&name).join("link_layer")).as_str() {
                "InfiniBand" => LinkLayer::InfiniBand,
                "Ethernet" => LinkLayer::Ethernet,
                _ => LinkLayer::Other,
            };
            let state = if active { PortState::Active } else { PortState::Other };
            found.push(HcaPort { device: device.clone(), port, state, link_layer });
        }
    }
    found
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(devices: &[(&str, &str)]) -> tempfile::TempDir {
        let class = tempfile::tempdir().unwrap();
        for (name, vendor) in devices {
            let port = class.path().join(name).join("ports/1");
            fs::create_dir_all(&port).unwrap();
            fs::create_dir_all(class.path().join(name).join("device")).unwrap();
            fs::write(class.path().join(name).join("device/vendor"), format!("{vendor}\n")).unwrap();
            fs::write(port.join("state"), "4: ACTIVE\n").unwrap();
            fs::write(port.join("link_layer"), "Ethernet\n").unwrap();
        }
        class
    }

    #[test]
    fn the_protocol_follows_variables_build_and_devices() {
        let (none, mellanox, amazon) = (
            machine(&[]),
            machine(&[("mlx5_0", "0x15b3"), ("mlx5_1", "0x15b3")]),
            machine(&[("efa_0", AMAZON)]),
        );
        let chosen = |variables: &[(&str, &str)], ascend, class: &tempfile::TempDir| {
            let env = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
            choose_in(&Settings::from_env(&env), ascend, class.path())
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
        let error = chosen(&[("PS_P2P_STORE_RDMA_DEVICES", "mlx5_9")], false, &mellanox).unwrap_err();
        assert!(error.message().contains("mlx5_9"), "{error}");
    }
}
