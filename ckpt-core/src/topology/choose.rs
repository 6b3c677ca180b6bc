//! The choice of a rank's ports, with the reasons for and against each.

use std::path::Path;

use super::{
    Accelerators, Distance, Hca, HcaFilter, HcaPort, LinkLayer, PciPath, choose_ports, classify,
    parse_device_list, ports_of_rank, read_hcas,
};
use crate::error::Result;

/// What was chosen and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The rank's ports, in order.
    pub ports: Vec<HcaPort>,
    /// The rule that decided: `nearest to 0000:1b:00.0 (PIX)`.
    pub rule: String,
    /// The other ports, and why they are not used.
    pub refused: Vec<(HcaPort, String)>,
}

/// How far each device is from the accelerator, where both have a place in the PCI tree.
pub fn distance(hca: &Hca, accelerator: Option<&PciPath>) -> Option<Distance> {
    Some(classify(hca.pci.as_ref()?, accelerator?))
}

/// Chooses the ports of one rank: the user's settings first, then the nearest by PCI distance where it is known for all
/// that are left, else by arithmetic; all of them if nothing says which rank this is.
pub fn choose(
    hcas: &[Hca],
    accelerator: Option<&PciPath>,
    numbering: Option<Accelerators>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Choice> {
    let seen: Vec<HcaPort> =
        hcas.iter().flat_map(|hca| hca.ports.iter().map(|port| port.as_candidate(&hca.name))).collect();
    let allowed = choose_ports(&seen, env)?;
    let of = |port: &HcaPort| hcas.iter().find(|hca| hca.name == port.device);
    let distances: Option<Vec<Distance>> =
        allowed.iter().map(|port| distance(of(port)?, accelerator)).collect();
    let (ports, rule) = match (distances, numbering) {
        (Some(distances), _) => {
            // `choose_ports` never answers an empty list.
            let nearest = distances.iter().min().copied().unwrap_or(Distance::Sys);
            let near = allowed.iter().zip(&distances).filter(|(_, d)| **d == nearest);
            let address = accelerator.map_or("", PciPath::address);
            (near.map(|(port, _)| port.clone()).collect(), format!("nearest to {address} ({nearest})"))
        }
        (None, Some(numbering)) => {
            let ports = ports_of_rank(&allowed, numbering)?.to_vec();
            (ports, format!("by the local rank {}", numbering.local_rank))
        }
        (None, None) => (allowed.clone(), "all that are usable: no PCI address and no LOCAL_RANK".to_owned()),
    };
    let refused = seen
        .iter()
        .filter(|port| !ports.contains(port))
        .map(|port| {
            let why = if allowed.contains(port) {
                match of(port).and_then(|hca| distance(hca, accelerator)) {
                    Some(far) => format!("farther ({far})"),
                    None => "another local rank's".to_owned(),
                }
            } else {
                refusal(port, hcas, env)
            };
            (port.clone(), why)
        })
        .collect();
    Ok(Choice { ports, rule, refused })
}

/// The devices of one rank as metas and [`crate::plan::Location`] name them: `mlx5_0`, `mlx5_0,mlx5_1`, or nothing where
/// there are none. Settings that take none of them are logged: only transports over RDMA must fail because of that.
pub fn devices_of_rank(
    sysfs: &Path,
    pci_address: Option<&str>,
    numbering: Option<Accelerators>,
    env: &dyn Fn(&str) -> Option<String>,
) -> String {
    let hcas = read_hcas(sysfs);
    if hcas.is_empty() {
        return String::new();
    }
    let accelerator = pci_address.and_then(|address| PciPath::of_address(sysfs, address));
    match choose(&hcas, accelerator.as_ref(), numbering, env) {
        Ok(choice) => {
            let mut devices: Vec<&str> = choice.ports.iter().map(|port| port.device.as_str()).collect();
            devices.dedup();
            devices.join(",")
        }
        Err(error) => {
            tracing::warn!(%error, "no RDMA device is taken for this rank's");
            String::new()
        }
    }
}

/// Why a port is no candidate, or is not among those that the user's settings take.
pub fn refusal(port: &HcaPort, hcas: &[Hca], env: &dyn Fn(&str) -> Option<String>) -> String {
    let info = hcas
        .iter()
        .find(|hca| hca.name == port.device)
        .and_then(|hca| hca.ports.iter().find(|info| info.number == port.port));
    match info {
        Some(info) if info.state != "ACTIVE" => return format!("its state is {}", info.state),
        Some(info) if info.link_layer == LinkLayer::Other => {
            return "its link layer is neither InfiniBand nor Ethernet".to_owned();
        }
        _ => {}
    }
    let listed = env("PS_P2P_STORE_RDMA_DEVICES").map(|list| parse_device_list(&list)).unwrap_or_default();
    if !listed.is_empty() {
        return format!("PS_P2P_STORE_RDMA_DEVICES={} does not name it", listed.join(","));
    }
    match env("NCCL_IB_HCA").map(|value| value.parse::<HcaFilter>()) {
        Some(Ok(filter)) if !filter.takes(&port.device, port.port) => {
            format!("NCCL_IB_HCA={filter} leaves it out")
        }
        _ => format!("more than {} ports", super::MAX_HCA_PORTS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{read_accelerators, read_hcas, unpack};

    fn tree(text: &str) -> (tempfile::TempDir, Vec<Hca>) {
        let folder = tempfile::tempdir().unwrap();
        unpack(text, folder.path()).unwrap();
        let hcas = read_hcas(folder.path());
        (folder, hcas)
    }

    fn devices(choice: &Choice) -> Vec<&str> {
        choice.ports.iter().map(|port| port.device.as_str()).collect()
    }

    #[test]
    fn the_nearest_nic_wins_over_arithmetic() {
        let (folder, hcas) = tree(include_str!("fixtures/two_sockets.txt"));
        let names: Vec<&str> = hcas.iter().map(|hca| hca.name.as_str()).collect();
        assert_eq!(names, ["mlx5_0", "mlx5_2", "mlx5_10"], "the order of verbs, not of the names");
        let accelerators = read_accelerators(folder.path());
        let addresses: Vec<&str> = accelerators.iter().map(PciPath::address).collect();
        assert_eq!(addresses, ["0000:1b:00.0", "0000:9d:00.0"]);
        let numbering = Some(Accelerators { local_rank: 0, visible: 2, local_world_size: None });
        let far = PciPath::of_address(folder.path(), "00000000:9D:00.0").unwrap();
        assert_eq!(far.numa_node, Some(1));
        let choice = choose(&hcas, Some(&far), numbering, &|_| None).unwrap();
        assert_eq!(devices(&choice), ["mlx5_10"]);
        assert_eq!(choice.rule, "nearest to 0000:9d:00.0 (PIX)");
        let why: Vec<String> = choice.refused.iter().map(|(port, why)| format!("{port} {why}")).collect();
        assert_eq!(why, ["mlx5_0:1 its state is DOWN", "mlx5_2:1 farther (SYS)"]);
        let near = PciPath::of_address(folder.path(), "0000:1b:00.0").unwrap();
        assert_eq!(devices(&choose(&hcas, Some(&near), numbering, &|_| None).unwrap()), ["mlx5_2"]);
        // What the user names is taken, however far it is.
        let env = |name: &str| (name == "NCCL_IB_HCA").then(|| "=mlx5_10".to_owned());
        let choice = choose(&hcas, Some(&near), numbering, &env).unwrap();
        assert_eq!(devices(&choice), ["mlx5_10"]);
        assert_eq!(choice.refused[1].1, "NCCL_IB_HCA==mlx5_10 leaves it out");
        // Without a place in the tree arithmetic decides.
        assert_eq!(devices(&choose(&hcas, None, numbering, &|_| None).unwrap()), ["mlx5_2"]);
    }

    #[test]
    fn a_rank_is_where_its_devices_are() {
        let (folder, _) = tree(include_str!("fixtures/two_sockets.txt"));
        let numbering = |local_rank| Some(Accelerators { local_rank, visible: 2, local_world_size: None });
        let of = |address, rank, env: &dyn Fn(&str) -> Option<String>| {
            devices_of_rank(folder.path(), address, numbering(rank), env)
        };
        assert_eq!(of(Some("0000:9d:00.0"), 0, &|_| None), "mlx5_10");
        assert_eq!((of(None, 0, &|_| None), of(None, 1, &|_| None)), ("mlx5_2".into(), "mlx5_10".into()));
        let both = |name: &str| (name == "PS_P2P_STORE_RDMA_DEVICES").then(|| "mlx5_10,mlx5_2".to_owned());
        assert_eq!(devices_of_rank(folder.path(), None, None, &both), "mlx5_10,mlx5_2");
        let wrong = |name: &str| (name == "NCCL_IB_HCA").then(|| "=mlx5_7".to_owned());
        assert_eq!(of(None, 0, &wrong), "");
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(devices_of_rank(empty.path(), None, None, &|_| None), "");
    }

    #[test]
    fn software_devices_have_no_distance() {
        let (_folder, hcas) = tree(include_str!("fixtures/soft_roce.txt"));
        assert!(hcas.iter().all(|hca| hca.pci.is_none()));
        assert_eq!(hcas[1].ports[0].best_gid(None).unwrap().address.to_string(), "::ffff:10.9.1.1");
        let choice = choose(&hcas, None, None, &|_| None).unwrap();
        assert_eq!(devices(&choice), ["rxe_a0", "rxe_a1"]);
        let numbering = Some(Accelerators { local_rank: 1, visible: 2, local_world_size: None });
        assert_eq!(devices(&choose(&hcas, None, numbering, &|_| None).unwrap()), ["rxe_a1"]);
    }
}
