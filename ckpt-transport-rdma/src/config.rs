//! Where to look for verbs and UCX, and how queue pairs are set up.

use std::path::{Path, PathBuf};

use ckpt_core::{
    topology::{Accelerators, Choice, Hca, PciPath, choose, read_hcas},
    transport::library::python_package_folders,
};

/// Settings of the RDMA transports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RdmaConfig {
    /// `CKPT_VERBS_LIBRARY`: `libibverbs.so.1`, or the folder that it lies in.
    pub verbs: Option<PathBuf>,
    /// `CKPT_UCX_LIBRARY`: `libucp.so.0`, or the folder that it lies in.
    pub ucx: Option<PathBuf>,
    /// Folders of the Python wheels that ship UCX.
    pub ucx_wheels: Vec<PathBuf>,
    /// The sysfs root, `/sys`.
    pub sysfs: PathBuf,
    /// `PS_P2P_STORE_RDMA_DEVICES`: device names, in order.
    pub devices: Option<String>,
    /// `NCCL_IB_HCA`.
    pub filter: Option<String>,
    /// `LOCAL_RANK` and `LOCAL_WORLD_SIZE`, for the choice of a device where PCI distances are not known.
    pub local_rank: Option<(u32, u32)>,
    /// `NCCL_IB_GID_INDEX`: overrides the choice by the GID table.
    pub gid_index: Option<u32>,
    /// `NCCL_IB_TC`: the traffic class of RoCE packets.
    pub traffic_class: u8,
    /// `NCCL_IB_SL`: InfiniBand's service level.
    pub service_level: u8,
    /// `NCCL_IB_TIMEOUT`: a lost packet is sent again after 4.096 us x 2^timeout; 1 to 31.
    pub timeout: u8,
    /// `NCCL_IB_RETRY_CNT`: times; 7 means for ever on some devices, so more than 6 is taken as 6.
    pub retry_count: u8,
    /// `CKPT_RDMA_QPS`: queue pairs for each pair of NICs; 1 to 16.
    pub queue_pairs: u32,
    /// `CKPT_RDMA_DEPTH`: work requests in flight for each queue pair; 2 to 1024.
    pub depth: u32,
}

impl Default for RdmaConfig {
    fn default() -> Self {
        Self {
            verbs: None,
            ucx: None,
            ucx_wheels: Vec::new(),
            sysfs: PathBuf::from("/sys"),
            devices: None,
            filter: None,
            local_rank: None,
            gid_index: None,
            traffic_class: 0,
            service_level: 0,
            // 0.54 s, and with all retries about 4 s until a silent peer is given up.
            timeout: 17,
            retry_count: 6,
            queue_pairs: 2,
            depth: 64,
        }
    }
}

impl RdmaConfig {
    /// From environment variables. A number that is none is ignored with a warning.
    pub fn from_env(env: &dyn Fn(&str) -> Option<String>) -> Self {
        let path = |name: &str| env(name).filter(|path| !path.is_empty()).map(PathBuf::from);
        let number = |name: &str| -> Option<u32> {
            let value = env(name).filter(|value| !value.trim().is_empty())?;
            let parsed = value.trim().parse().ok();
            if parsed.is_none() {
                tracing::warn!(name, value, "not a number, so it is ignored");
            }
            parsed
        };
        let byte = |name: &str, otherwise: u8| number(name).map_or(otherwise, |n| n.min(255) as u8);
        let default = Self::default();
        Self {
            verbs: path("CKPT_VERBS_LIBRARY"),
            ucx: path("CKPT_UCX_LIBRARY"),
            ucx_wheels: python_package_folders("libucx/lib", env),
            sysfs: default.sysfs,
            devices: env("PS_P2P_STORE_RDMA_DEVICES"),
            filter: env("NCCL_IB_HCA"),
            local_rank: number("LOCAL_RANK").zip(number("LOCAL_WORLD_SIZE")),
            gid_index: number("NCCL_IB_GID_INDEX"),
            traffic_class: byte("NCCL_IB_TC", default.traffic_class),
            service_level: byte("NCCL_IB_SL", default.service_level).min(15),
            timeout: byte("NCCL_IB_TIMEOUT", default.timeout).clamp(1, 31),
            retry_count: byte("NCCL_IB_RETRY_CNT", default.retry_count).min(6),
            queue_pairs: number("CKPT_RDMA_QPS").unwrap_or(default.queue_pairs).clamp(1, 16),
            depth: number("CKPT_RDMA_DEPTH").unwrap_or(default.depth).clamp(2, 1024),
        }
    }

    /// The devices of this machine, and the choice for the rank whose accelerator is at `pci_address`.
    pub(crate) fn choose(&self, pci_address: Option<&str>) -> (Vec<Hca>, ckpt_core::Result<Choice>) {
        let root: &Path = &self.sysfs;
        let hcas = read_hcas(root);
        let accelerator = pci_address.and_then(|address| PciPath::of_address(root, address));
        let numbering = self.local_rank.map(|(local_rank, ranks)| Accelerators {
            local_rank,
            visible: ranks,
            local_world_size: Some(ranks),
        });
        let env = |name: &str| match name {
            "PS_P2P_STORE_RDMA_DEVICES" => self.devices.clone(),
            "NCCL_IB_HCA" => self.filter.clone(),
            _ => None,
        };
        let choice = choose(&hcas, accelerator.as_ref(), numbering, &env);
        (hcas, choice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_those_that_users_of_nccl_have() {
        let env = |name: &str| {
            let value = match name {
                "NCCL_IB_TIMEOUT" => "22",
                "NCCL_IB_RETRY_CNT" => "7",
                "NCCL_IB_GID_INDEX" => "3",
                "NCCL_IB_TC" => "106",
                "CKPT_RDMA_QPS" => "none",
                "LOCAL_RANK" => "2",
                "LOCAL_WORLD_SIZE" => "8",
                _ => return None,
            };
            Some(value.to_owned())
        };
        let config = RdmaConfig::from_env(&env);
        assert_eq!((config.timeout, config.retry_count, config.traffic_class), (22, 6, 106));
        assert_eq!((config.gid_index, config.local_rank), (Some(3), Some((2, 8))));
        assert_eq!(config.queue_pairs, RdmaConfig::default().queue_pairs);
    }
}
