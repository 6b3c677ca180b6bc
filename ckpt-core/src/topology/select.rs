//! From the ports that were found to the ports of one rank.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::HcaFilter;
use crate::error::{Error, ErrorKind, Key, Result};

/// NCCL looks at no more ports than this.
pub const MAX_HCA_PORTS: usize = 32;

const OPERATION: &str = "choose an RDMA device";

/// The state of a port, as sysfs names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PortState {
    /// It can be used.
    Active,
    /// It cannot.
    Other,
}

/// What a port speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LinkLayer {
    /// InfiniBand.
    InfiniBand,
    /// RoCE.
    Ethernet,
    /// Anything else; such a port is no candidate.
    Other,
}

/// One port of one RDMA device, in the order in which verbs lists devices, then by port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HcaPort {
    /// Device name, `mlx5_0`.
    pub device: String,
    /// Port number, from 1.
    pub port: u32,
    /// Its state.
    pub state: PortState,
    /// What it speaks.
    pub link_layer: LinkLayer,
}

impl HcaPort {
    fn is_candidate(&self) -> bool {
        self.state == PortState::Active && self.link_layer != LinkLayer::Other
    }
}

impl fmt::Display for HcaPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.device, self.port)
    }
}

/// The elements of `PS_P2P_STORE_RDMA_DEVICES`: a comma list whose order is kept.
pub fn parse_device_list(value: &str) -> Vec<String> {
    value.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// The ports that the user's settings take out of `seen`: `PS_P2P_STORE_RDMA_DEVICES` first, then `NCCL_IB_HCA`.
pub fn choose_ports(seen: &[HcaPort], env: &dyn Fn(&str) -> Option<String>) -> Result<Vec<HcaPort>> {
    let candidates: Vec<&HcaPort> = seen.iter().filter(|p| p.is_candidate()).take(MAX_HCA_PORTS).collect();
    let listed = env("PS_P2P_STORE_RDMA_DEVICES").map(|v| parse_device_list(&v)).unwrap_or_default();
    if !listed.is_empty() {
        let mut chosen = Vec::new();
        for name in &listed {
            let of_device: Vec<HcaPort> =
                candidates.iter().filter(|p| p.device == *name).map(|p| (*p).clone()).collect();
            if of_device.is_empty() {
                return Err(nothing(
                    format!("PS_P2P_STORE_RDMA_DEVICES names `{name}`, which has no active port here"),
                    seen,
                )
                .with(Key::Hca, name));
            }
            chosen.extend(of_device);
        }
        return Ok(chosen);
    }
    let value = env("NCCL_IB_HCA").unwrap_or_default();
    let filter: HcaFilter = value.parse().map_err(|e: super::ParseHcaFilterError| {
        Error::new(ErrorKind::ConfigInvalid, OPERATION, e.to_string())
    })?;
    let chosen: Vec<HcaPort> =
        candidates.iter().filter(|p| filter.takes(&p.device, p.port)).map(|p| (*p).clone()).collect();
    if chosen.is_empty() {
        let why = if candidates.is_empty() {
            "no RDMA device with an active port".to_owned()
        } else {
            format!("NCCL_IB_HCA=`{value}` takes none of the active ports")
        };
        return Err(nothing(why, seen));
    }
    Ok(chosen)
}

fn nothing(why: String, seen: &[HcaPort]) -> Error {
    let list: Vec<String> = seen
        .iter()
        .map(|p| if p.is_candidate() { p.to_string() } else { format!("{p} (not usable)") })
        .collect();
    let list = if list.is_empty() { "none".to_owned() } else { list.join(", ") };
    Error::new(
        ErrorKind::ConfigInvalid,
        OPERATION,
        format!("{why}; ports seen: {list}; set NCCL_IB_HCA or PS_P2P_STORE_RDMA_DEVICES to one of them"),
    )
}

/// How a rank numbers itself among the accelerators of its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accelerators {
    /// This rank's number on its host.
    pub local_rank: u32,
    /// Accelerators that this process sees, or a number that the user gave.
    pub visible: u32,
    /// Ranks on this host, where each process sees one accelerator only (Ray, Kubernetes).
    pub local_world_size: Option<u32>,
}

impl Accelerators {
    /// Where each process sees one accelerator, the host's accelerators are counted by its ranks.
    fn numbering(self) -> (u64, u64) {
        let count = match self.local_world_size {
            Some(ranks) if self.visible == 1 => ranks,
            _ => self.visible,
        };
        let count = u64::from(count);
        (if count == 0 { 0 } else { u64::from(self.local_rank) % count }, count)
    }
}

/// The ports of one rank by arithmetic: `devices` are shared out over the host's accelerators in order. Where the PCI
/// tree says which port is nearest, that wins over this rule.
pub fn ports_of_rank(ports: &[HcaPort], accelerators: Accelerators) -> Result<&[HcaPort]> {
    let (local_rank, accelerator_count) = accelerators.numbering();
    let port_count = ports.len() as u64;
    if port_count > 0 && accelerator_count >= port_count && accelerator_count.is_multiple_of(port_count) {
        let index = (local_rank / (accelerator_count / port_count)) as usize;
        return Ok(&ports[index..=index]);
    }
    if accelerator_count > 0 && port_count > accelerator_count && port_count.is_multiple_of(accelerator_count)
    {
        let each = (port_count / accelerator_count) as usize;
        let first = local_rank as usize * each;
        return Ok(&ports[first..first + each]);
    }
    let names: Vec<String> = ports.iter().map(ToString::to_string).collect();
    Err(Error::new(
        ErrorKind::ConfigInvalid,
        OPERATION,
        format!(
            "{port_count} RDMA ports ({}) cannot be shared out evenly over {accelerator_count} accelerators; \
             choose a number of ports that divides them with NCCL_IB_HCA or PS_P2P_STORE_RDMA_DEVICES",
            names.join(", ")
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(names: &[&str]) -> Vec<HcaPort> {
        names
            .iter()
            .map(|name| HcaPort {
                device: (*name).to_owned(),
                port: 1,
                state: PortState::Active,
                link_layer: LinkLayer::Ethernet,
            })
            .collect()
    }

    fn names(ports: &[HcaPort]) -> Vec<&str> {
        ports.iter().map(|p| p.device.as_str()).collect()
    }

    #[test]
    fn enumeration_order_is_kept_and_dead_ports_are_no_candidates() {
        let mut seen = ports(&["mlx5_0", "mlx5_10", "mlx5_2"]);
        seen[0].state = PortState::Other;
        let chosen = choose_ports(&seen, &|_| None).unwrap();
        assert_eq!(names(&chosen), ["mlx5_10", "mlx5_2"]);
    }

    #[test]
    fn the_own_list_wins_and_keeps_its_order() {
        let seen = ports(&["mlx5_0", "mlx5_1", "mlx5_2"]);
        let env = |name: &str| match name {
            "PS_P2P_STORE_RDMA_DEVICES" => Some("mlx5_2, mlx5_0".to_owned()),
            "NCCL_IB_HCA" => Some("=mlx5_1".to_owned()),
            _ => None,
        };
        assert_eq!(names(&choose_ports(&seen, &env).unwrap()), ["mlx5_2", "mlx5_0"]);
        let env = |name: &str| (name == "PS_P2P_STORE_RDMA_DEVICES").then(|| "mlx5_9".to_owned());
        let error = choose_ports(&seen, &env).unwrap_err();
        assert_eq!(error.get(Key::Hca), Some("mlx5_9"));
        assert!(error.to_string().contains("ports seen: mlx5_0:1, mlx5_1:1, mlx5_2:1"), "{error}");
    }

    #[test]
    fn a_filter_that_takes_nothing_is_an_error_that_lists_what_was_seen() {
        let seen = ports(&["mlx5_0"]);
        let env = |name: &str| (name == "NCCL_IB_HCA").then(|| "bnxt".to_owned());
        let error = choose_ports(&seen, &env).unwrap_err().to_string();
        assert!(error.contains("NCCL_IB_HCA=`bnxt` takes none") && error.contains("mlx5_0:1"), "{error}");
        assert!(choose_ports(&[], &|_| None).unwrap_err().to_string().contains("ports seen: none"));
    }

    #[test]
    fn devices_are_shared_out_over_accelerators() {
        let all = ports(&["a", "b", "c", "d"]);
        let of = |count: usize, local_rank, visible, local_world_size| {
            ports_of_rank(&all[..count], Accelerators { local_rank, visible, local_world_size })
                .map(|p| names(p).join(","))
                .map_err(|e| e.kind())
        };
        assert_eq!(of(2, 3, 8, None), Ok("a".into()));
        assert_eq!(of(2, 4, 8, None), Ok("b".into()));
        assert_eq!(of(4, 1, 2, None), Ok("c,d".into()));
        assert_eq!(of(4, 5, 4, None), Ok("b".into()));
        assert_eq!(of(3, 0, 8, None), Err(ErrorKind::ConfigInvalid));
        assert_eq!(of(3, 0, 2, None), Err(ErrorKind::ConfigInvalid));
        assert_eq!(of(4, 2, 1, Some(4)), Ok("c".into()));
        assert_eq!(of(4, 0, 1, None), Ok("a,b,c,d".into()));
        assert_eq!(of(0, 0, 8, None), Err(ErrorKind::ConfigInvalid));
        assert_eq!(of(1, 0, 0, None), Err(ErrorKind::ConfigInvalid));
    }
}
