//! The RDMA part of `ckpt doctor`: ports, what each accelerator would use, and why other ports are not used.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use ckpt_core::topology::{self, Accelerators, Hca, PciPath, choose};
use serde::Serialize;

use crate::output::{Output, Table};

#[derive(Serialize)]
pub(super) struct RdmaReport {
    ports: Vec<Port>,
    choices: Vec<Chosen>,
}

#[derive(Serialize)]
struct Port {
    device: String,
    port: u32,
    state: String,
    link_layer: String,
    rate: String,
    /// The GID that would be used.
    gid: Option<String>,
    gid_index: Option<u32>,
    interface: Option<String>,
    gids: usize,
    pci_address: Option<String>,
    numa_node: Option<u32>,
}

/// What one accelerator, or a rank without one, would use.
#[derive(Serialize)]
struct Chosen {
    accelerator: Option<String>,
    ports: Vec<String>,
    rule: String,
    refused: Vec<Refused>,
}

#[derive(Serialize)]
struct Refused {
    port: String,
    why: String,
}

/// Reads the devices below `sysfs`; `env` gives the user's settings.
pub(super) fn look(sysfs: &Path, env: &dyn Fn(&str) -> Option<String>) -> RdmaReport {
    let hcas = topology::read_hcas(sysfs);
    let number = |name: &str| env(name).and_then(|value| value.trim().parse::<u32>().ok());
    let wanted = number("NCCL_IB_GID_INDEX");
    let ports = hcas.iter().flat_map(|hca| ports(hca, wanted)).collect();
    let numbering = number("LOCAL_RANK").zip(number("LOCAL_WORLD_SIZE")).map(|(local_rank, ranks)| {
        Accelerators { local_rank, visible: ranks, local_world_size: Some(ranks) }
    });
    let mut accelerators: Vec<Option<PciPath>> =
        topology::read_accelerators(sysfs).into_iter().map(Some).collect();
    if accelerators.is_empty() {
        accelerators.push(None);
    }
    // Without any device there is nothing to choose from, and no need to say so for each accelerator.
    if hcas.is_empty() {
        accelerators.clear();
    }
    let choices = accelerators.iter().map(|path| chosen(&hcas, path.as_ref(), numbering, env)).collect();
    RdmaReport { ports, choices }
}

fn ports(hca: &Hca, wanted: Option<u32>) -> Vec<Port> {
    let port = |info: &topology::PortInfo| {
        let gid = info.best_gid(wanted);
        Port {
            device: hca.name.clone(),
            port: info.number,
            state: info.state.clone(),
            link_layer: format!("{:?}", info.link_layer),
            rate: info.rate.clone(),
            gid: gid.map(|gid| gid.address.to_string()),
            gid_index: gid.map(|gid| gid.index),
            interface: gid.and_then(|gid| gid.interface.clone()),
            gids: info.gids.len(),
            pci_address: hca.pci.as_ref().map(|pci| pci.address().to_owned()),
            numa_node: hca.pci.as_ref().and_then(|pci| pci.numa_node),
        }
    };
    hca.ports.iter().map(port).collect()
}

fn chosen(
    hcas: &[Hca],
    accelerator: Option<&PciPath>,
    numbering: Option<Accelerators>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Chosen {
    let name = accelerator.map(|path| path.address().to_owned());
    match choose(hcas, accelerator, numbering, env) {
        Ok(choice) => Chosen {
            accelerator: name,
            ports: choice.ports.iter().map(ToString::to_string).collect(),
            rule: choice.rule,
            refused: choice
                .refused
                .into_iter()
                .map(|(port, why)| Refused { port: port.to_string(), why })
                .collect(),
        },
        Err(error) => Chosen {
            accelerator: name,
            ports: Vec::new(),
            rule: error.message().to_owned(),
            refused: Vec::new(),
        },
    }
}

pub(super) fn print(report: &RdmaReport, output: &Output) {
    if report.ports.is_empty() {
        return;
    }
    let mut table = Table::new(&["rdma port", "state", "link", "rate", "GID", "interface", "PCI", "NUMA"]);
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    for port in &report.ports {
        let gid = port.gid.as_ref().zip(port.gid_index);
        table.row([
            format!("{}:{}", port.device, port.port),
            port.state.clone(),
            port.link_layer.clone(),
            port.rate.clone(),
            or_dash(gid.map(|(gid, index)| format!("{gid} ({index} of {})", port.gids))),
            or_dash(port.interface.clone()),
            or_dash(port.pci_address.clone()),
            or_dash(port.numa_node.map(|node| node.to_string())),
        ]);
    }
    output.line("");
    output.table(&table);
    let mut table = Table::new(&["accelerator", "rdma ports", "why", "not used"]);
    for choice in &report.choices {
        let refused: Vec<String> =
            choice.refused.iter().map(|refused| format!("{}: {}", refused.port, refused.why)).collect();
        table.row([
            choice.accelerator.as_deref().unwrap_or("none"),
            &choice.ports.join(", "),
            &choice.rule,
            &refused.join("; "),
        ]);
    }
    output.line("");
    output.table(&table);
}

/// Saves the part of the tree that the choice looks at; answers the file.
pub(super) fn record(sysfs: &Path, folder: &Path) -> anyhow::Result<PathBuf> {
    let accelerators: Vec<String> =
        topology::read_accelerators(sysfs).iter().map(|path| path.address().to_owned()).collect();
    let text = topology::record(sysfs, &accelerators)
        .with_context(|| format!("cannot read the RDMA devices below {}", sysfs.display()))?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let file = folder.join("rdma-tree.txt");
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_recorded_machine_is_reported_with_reasons() {
        let sysfs = tempfile::tempdir().unwrap();
        let tree = include_str!("../../../../ckpt-core/src/topology/fixtures/two_sockets.txt");
        topology::unpack(tree, sysfs.path()).unwrap();
        let report = look(sysfs.path(), &|_| None);
        assert_eq!(report.ports.len(), 3);
        assert_eq!(report.ports[1].gid.as_deref(), Some("::ffff:10.9.0.1"));
        let [near, far] = &report.choices[..] else { panic!("two accelerators") };
        assert_eq!((near.ports.join(","), far.ports.join(",")), ("mlx5_2:1".into(), "mlx5_10:1".into()));
        assert_eq!(near.refused[0].why, "its state is DOWN");
        let folder = tempfile::tempdir().unwrap();
        let file = record(sysfs.path(), &folder.path().join("new")).unwrap();
        let again = tempfile::tempdir().unwrap();
        topology::unpack(&fs::read_to_string(file).unwrap(), again.path()).unwrap();
        assert_eq!(look(again.path(), &|_| None).choices.len(), 2);
    }

    #[test]
    fn a_machine_without_devices_has_no_table() {
        let sysfs = tempfile::tempdir().unwrap();
        let report = look(sysfs.path(), &|_| None);
        assert!(report.ports.is_empty() && report.choices.is_empty());
    }
}
