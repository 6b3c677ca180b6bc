//! The conformance suite on the host device, normal and adversarial, with the transports of this crate.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{net::Ipv4Addr, path::PathBuf, sync::Arc};

use ckpt_core::{
    Result,
    device::{DeviceBackend, DeviceConfig, host::HostDevice},
    testkit::conformance::{self, Factory, Report},
    transport::{Transport, TransportConfig, TransportProvider, local::LocalProvider, tcp::TcpProvider},
};

struct Host {
    provider: Box<dyn TransportProvider>,
    adversary: Option<u64>,
    connections: usize,
    tls: bool,
    runtime_dir: PathBuf,
    _folder: tempfile::TempDir,
}

impl Host {
    fn new(provider: impl TransportProvider + 'static, adversary: Option<u64>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let runtime_dir = folder.path().join("run");
        Self {
            provider: Box::new(provider),
            adversary,
            connections: 2,
            tls: false,
            runtime_dir,
            _folder: folder,
        }
    }
}

impl Factory for Host {
    fn device(&self, rank: u32) -> Result<Arc<dyn DeviceBackend>> {
        let config = DeviceConfig { rank, local_rank: rank, runtime_dir: self.runtime_dir.clone() };
        let device = HostDevice::open(&config)?;
        Ok(Arc::new(match self.adversary {
            Some(seed) => device.adversarial(seed + u64::from(rank)),
            None => device,
        }))
    }

    fn transport(&self, _rank: u32, device: &Arc<dyn DeviceBackend>) -> Result<Arc<dyn Transport>> {
        self.provider.open(&TransportConfig {
            bind: Ipv4Addr::LOCALHOST.into(),
            runtime_dir: self.runtime_dir.clone(),
            tls: self.tls,
            secret: b"the secret of the conformance suite".to_vec(),
            connections: self.connections,
            device: device.clone(),
        })
    }

    fn max_members(&self) -> u32 {
        4
    }

    fn detects_mismatch(&self) -> bool {
        true
    }
}

fn complete(report: Result<Report>, checks: usize, skipped: usize) {
    let report = report.unwrap();
    assert_eq!((report.passed.len(), report.skipped.len()), (checks, skipped), "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn host_device() {
    complete(conformance::device(&Host::new(LocalProvider::default(), None)).await, 11, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adversarial_host_device() {
    for seed in 0..4 {
        complete(conformance::device(&Host::new(LocalProvider::default(), Some(seed))).await, 11, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn local_collective() {
    complete(conformance::collective(&Host::new(LocalProvider::default(), None)).await, 37, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn local_collective_on_the_adversary() {
    complete(conformance::collective(&Host::new(LocalProvider::default(), Some(11))).await, 37, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_collective() {
    complete(conformance::collective(&Host::new(TcpProvider, None)).await, 37, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_collective_on_the_adversary() {
    complete(conformance::collective(&Host::new(TcpProvider, Some(12))).await, 37, 0);
}

#[tokio::test]
async fn tcp_collective_with_one_connection_on_one_thread() {
    let factory = Host { connections: 1, ..Host::new(TcpProvider, None) };
    complete(conformance::collective(&factory).await, 37, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn local_one_sided() {
    for adversary in [None, Some(13)] {
        complete(conformance::one_sided(&Host::new(LocalProvider::default(), adversary)).await, 17, 2);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_one_sided() {
    for adversary in [None, Some(14)] {
        complete(conformance::one_sided(&Host::new(TcpProvider, adversary)).await, 19, 0);
    }
}

#[cfg(feature = "tls")]
mod tls {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn tcp_collective_in_tls() {
        let factory = Host { tls: true, ..Host::new(TcpProvider, None) };
        complete(conformance::collective(&factory).await, 37, 0);
    }

    #[tokio::test]
    async fn tcp_collective_in_tls_with_one_connection_on_one_thread() {
        let factory = Host { tls: true, connections: 1, ..Host::new(TcpProvider, Some(15)) };
        complete(conformance::collective(&factory).await, 37, 0);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn tcp_one_sided_in_tls() {
        let factory = Host { tls: true, ..Host::new(TcpProvider, None) };
        complete(conformance::one_sided(&factory).await, 19, 0);
    }
}
