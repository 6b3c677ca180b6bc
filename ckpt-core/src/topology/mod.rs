//! Which RDMA device a rank uses: pure rules over what was found, so that they can be tested without hardware.

mod nccl_ib_hca;
mod select;

pub use nccl_ib_hca::{HcaFilter, HcaToken, ParseHcaFilterError};
pub use select::{
    Accelerators, HcaPort, LinkLayer, MAX_HCA_PORTS, PortState, choose_ports, parse_device_list,
    ports_of_rank,
};
