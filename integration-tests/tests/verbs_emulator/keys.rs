//! Keys that devices give out again, and memory of devices.

use std::{
    collections::HashSet,
    fs::File,
    os::{fd::OwnedFd, unix::fs::FileExt as _},
    sync::Arc,
};

use ckpt_core::{
    ErrorKind, Key, Result,
    device::{Buffer, BufferSlice, MemoryKind, host::HostBuffer},
    transport::{ReadOp, WriteOp},
};
use integration_tests::verbs::{Host, Link};

use crate::support::{Hosts, PIECE, assert_arrived, blank, bytes, config, host_device, open_on, soon};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_gives_out_no_key_twice() {
    let host = Host::new(Link::Ethernet, 1);
    let owner = open_on(config(&host), host_device(&host, 0).unwrap()).unwrap();
    host.hcas[0].set("reuse_keys", 1);
    let memory = HostBuffer::allocate(4096).unwrap();
    // All of one transport's descriptions of one size differ in their keys alone.
    let mut descriptors = HashSet::new();
    for _ in 0..60 {
        let registration = owner.one_sided().unwrap().register(memory.clone()).await.unwrap();
        assert!(descriptors.insert(registration.region().descriptor.clone()), "a key was given out again");
    }
    // A device that has only old ones.
    let outcome = loop {
        match owner.one_sided().unwrap().register(memory.clone()).await {
            Ok(registration) => {
                assert!(
                    descriptors.insert(registration.region().descriptor.clone()),
                    "a key was given out again"
                );
            }
            Err(error) => break error,
        }
    };
    println!("{outcome} after {}", descriptors.len());
    assert_eq!(outcome.kind(), ErrorKind::ResourceExhausted);
    drop((owner, memory));
    tokio::task::spawn_blocking(move || host.assert_clean()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_comes_late_does_not_meet_newer_memory() {
    let hosts = Hosts::new(1, PIECE as usize, |_| ()).await;
    hosts.read(soon()).await.unwrap();
    hosts.owner_host.hcas[0].set("reuse_keys", 1);
    let hca = &hosts.reader_host.hcas[0];
    hca.hold(true);
    let into = blank(PIECE);
    let event = hosts.start(0, &into, soon());
    hca.wait_for("held", |held| held == 1);
    let Hosts { owner_host, reader_host, owner, reader, memory, registration } = hosts;
    drop(registration);
    // The same memory: only the key can tell.
    let registration = owner.one_sided().unwrap().register(memory.clone()).await.unwrap();
    reader_host.hcas[0].hold(false);
    let error = event.done(soon()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Aborted, "{error}");
    let hosts = Hosts { owner_host, reader_host, owner, reader, memory, registration };
    hosts.read(soon()).await.unwrap();
    hosts.finish().await;
}

/// Where the addresses of emulated device memory begin: none of the CPU's.
const DEVICE_ADDRESS: u64 = 0x00A5_0000_0000_0000;

/// Memory that only its file reaches.
#[derive(Debug)]
struct DeviceMemory {
    file: File,
    len: u64,
}

impl DeviceMemory {
    fn new(content: &[u8]) -> Arc<Self> {
        let file = rustix::fs::memfd_create("device", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(file);
        file.write_all_at(content, 0).unwrap();
        Arc::new(Self { file, len: content.len() as u64 })
    }

    fn content(&self) -> Vec<u8> {
        let mut content = vec![0; self.len as usize];
        self.file.read_exact_at(&mut content, 0).unwrap();
        content
    }
}

// SAFETY: no byte is touched by its address: it says that it is on a device.
unsafe impl Buffer for DeviceMemory {
    fn address(&self) -> u64 {
        DEVICE_ADDRESS
    }

    fn len_bytes(&self) -> u64 {
        self.len
    }

    fn memory(&self) -> MemoryKind {
        MemoryKind::Device
    }

    fn dma_buf(&self) -> Option<Result<OwnedFd>> {
        Some(Ok(self.file.try_clone().unwrap().into()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn device_memory_is_read_and_written_by_its_dma_buf() {
    // Not a whole number of pages.
    let len = 3 * PIECE + 1000;
    let device = DeviceMemory::new(&bytes(len as usize));
    let hosts = [Host::new(Link::Ethernet, 2), Host::new(Link::Ethernet, 2)];
    let hosts = Hosts::on(hosts, device.clone(), |_| ()).await;
    hosts.read(soon()).await.unwrap();
    let part = blank(PIECE + 10);
    hosts.start(PIECE - 5, &part, soon()).done(soon()).await.unwrap();
    assert_arrived(&part, PIECE - 5);
    let region = Arc::new(hosts.region());
    let from = BufferSlice::whole(HostBuffer::from_bytes(&vec![7; PIECE as usize + 1]).unwrap());
    let op = WriteOp { region: region.clone(), offset: 999, from };
    let event = hosts.reader.one_sided().unwrap().post_write(vec![op], soon()).unwrap();
    event.done(soon()).await.unwrap();
    let mut expected = bytes(len as usize);
    expected[999..1000 + PIECE as usize].fill(7);
    assert!(device.content() == expected, "other bytes are in the device's memory");
    // A reader's own memory must be the host's.
    let into = BufferSlice::whole(DeviceMemory::new(&[0; 100]));
    let op = ReadOp { region, offset: 0, into };
    assert!(hosts.reader.one_sided().unwrap().post_read(vec![op], soon()).is_err());
    drop(event);
    hosts.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn device_memory_is_refused_by_a_device_that_cannot_register_it() {
    let host = Host::new(Link::Ethernet, 2);
    let owner = open_on(config(&host), host_device(&host, 0).unwrap()).unwrap();
    // With the second, so that the first's registration must go.
    host.hcas[1].set("dma_buf", 0);
    let memory = DeviceMemory::new(&bytes(5000));
    let error = owner.one_sided().unwrap().register(memory.clone()).await.unwrap_err();
    println!("{error}");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(error.get(Key::Hca), Some(host.hcas[1].name.as_str()));
    assert_eq!(host.hcas[0].count("mrs"), 0);
    host.hcas[1].set("dma_buf", 1);
    drop(owner.one_sided().unwrap().register(memory).await.unwrap());
    drop(owner);
    tokio::task::spawn_blocking(move || host.assert_clean()).await.unwrap();
}
