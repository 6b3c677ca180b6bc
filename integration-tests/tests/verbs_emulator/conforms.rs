//! The one-sided suite over emulated devices.

use std::sync::Arc;

use ckpt_core::{
    Result,
    device::DeviceBackend,
    testkit::conformance::{self, Factory},
    transport::Transport,
};
use integration_tests::verbs::{Host, Link};

use crate::support::{config, host_device, open_on};

/// Rank 0 is on the first host, the others are on the last.
struct Emulated {
    hosts: Vec<Host>,
}

impl Emulated {
    fn host(&self, rank: u32) -> &Host {
        if rank == 0 { self.hosts.first() } else { self.hosts.last() }.unwrap()
    }
}

impl Factory for Emulated {
    fn device(&self, rank: u32) -> Result<Arc<dyn DeviceBackend>> {
        host_device(self.host(rank), rank)
    }

    fn transport(&self, rank: u32, device: &Arc<dyn DeviceBackend>) -> Result<Arc<dyn Transport>> {
        open_on(config(self.host(rank)), device.clone())
    }

    fn max_members(&self) -> u32 {
        3
    }

    fn detects_mismatch(&self) -> bool {
        true
    }
}

async fn conforms(hosts: Vec<Host>) {
    let emulated = Emulated { hosts };
    let report = conformance::one_sided(&emulated).await.unwrap();
    assert_eq!((report.passed.len(), report.skipped.len()), (19, 0), "{report:?}");
    tokio::task::spawn_blocking(move || emulated.hosts.iter().for_each(Host::assert_clean)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_device_for_all_conforms() {
    conforms(vec![Host::new(Link::Ethernet, 1)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_devices_a_side_conform() {
    conforms(vec![Host::new(Link::Ethernet, 2), Host::new(Link::Ethernet, 2)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_ports_of_an_infiniband_subnet_conform() {
    conforms(vec![Host::new(Link::InfiniBand, 1), Host::new(Link::InfiniBand, 2)]).await;
}
