//! Which RDMA device a rank uses: pure rules over what was found, so that they can be tested without hardware.

mod choose;
mod nccl_ib_hca;
mod npu_smi;
pub mod numa;
mod record;
mod select;
mod sysfs;

pub use choose::{Choice, choose, devices_of_rank, distance, refusal};
pub use nccl_ib_hca::{HcaFilter, HcaToken, ParseHcaFilterError};
pub use npu_smi::npu_chip_index;
pub use record::{record, unpack};
pub use select::{
    Accelerators, HcaPort, LinkLayer, MAX_HCA_PORTS, PortState, choose_ports, parse_device_list,
    ports_of_rank,
};
pub use sysfs::{Distance, Gid, GidKind, Hca, PciPath, PortInfo, classify, read_accelerators, read_hcas};
