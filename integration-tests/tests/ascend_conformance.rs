//! The suites of the seams on the emulated NPUs, and what the seams do not have.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use ckpt_core::{
    Epoch, Error, ErrorKind, Result,
    device::{
        BufferSlice, DeviceBackend, MemoryKind, RingExport, Stream as _, host::HostBuffer, while_current,
    },
    testkit::conformance::{self, Factory},
    transport::{Collective as _, GroupSpec, Probe, Transport, TransportConfig, TransportProvider as _},
};
use ckpt_transport_hccl::{
    HcclConfig, HcclGroup, HcclProvider, HcclTransport,
    device::{AclCell, AscendDevice, AscendProvider},
};
use integration_tests::ascend::Emulator;

static EMULATOR: LazyLock<Emulator> = LazyLock::new(Emulator::new);

/// Ranks are tasks of this process, each with an NPU of its own.
struct Npus {
    devices: AscendProvider,
    hccl: HcclProvider,
}

impl Npus {
    fn new() -> Self {
        let folder = EMULATOR.path().to_str().unwrap().to_owned();
        let env = |name: &str| (name == "CKPT_ASCEND_LIBRARY_DIR").then(|| folder.clone());
        let (config, acl) = (HcclConfig::from_env(&env), AclCell::default());
        Self {
            devices: AscendProvider::new(config.clone(), acl.clone()),
            hccl: HcclProvider::new(config, acl),
        }
    }
}

impl Factory for Npus {
    fn device(&self, rank: u32) -> Result<Arc<dyn DeviceBackend>> {
        Ok(Arc::new(self.devices.open_ascend(rank)?))
    }

    fn transport(&self, _rank: u32, device: &Arc<dyn DeviceBackend>) -> Result<Arc<dyn Transport>> {
        self.hccl.open(&TransportConfig {
            bind: std::net::Ipv4Addr::LOCALHOST.into(),
            runtime_dir: std::env::temp_dir(),
            tls: false,
            secret: Vec::new(),
            connections: 1,
            device: device.clone(),
        })
    }

    fn max_members(&self) -> u32 {
        3
    }

    fn detects_mismatch(&self) -> bool {
        false
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_device_conforms() {
    let report = conformance::device(&Npus::new()).await.unwrap();
    assert_eq!((report.passed.len(), report.skipped.len()), (8, 3), "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_transport_conforms() {
    let report = conformance::collective(&Npus::new()).await.unwrap();
    assert_eq!((report.passed.len(), report.skipped.len()), (25, 2), "{report:?}");
    let report = conformance::one_sided(&Npus::new()).await.unwrap();
    assert_eq!((report.passed.len(), report.skipped.len()), (0, 1), "{report:?}");
}

#[tokio::test]
async fn host_memory_is_the_librarys_own_and_pinning_is_a_copy() {
    let device = Npus::new().devices.open_ascend(0).unwrap();
    assert!(device.info().uuid.starts_with("NPU-") && device.info().uuid.ends_with("-0"));
    let own = device.own_host_memory(1000).unwrap().unwrap();
    assert_eq!((own.len_bytes(), own.memory()), (1000, MemoryKind::HostPinned));
    let large = device.own_host_memory(5 << 20).unwrap().unwrap();
    assert_eq!((large.len_bytes(), large.address() % (2 << 20)), (5 << 20, 0));
    assert!(Arc::ptr_eq(&device.pin(own.clone()).unwrap(), &own));
    let plain = HostBuffer::from_bytes(&[7; 100]).unwrap();
    let pinned = BufferSlice::whole(device.pin(plain.clone()).unwrap());
    assert_ne!(pinned.address(), plain.slice().address());
    // SAFETY: nobody writes it.
    assert_eq!(unsafe { pinned.as_slice() }.unwrap(), [7; 100]);
    // What was not pinned is refused, as is what is on no device at all.
    let ring = device.allocate_ring(100).unwrap();
    let target = BufferSlice::new(ring.buffer(), 0..100).unwrap();
    let stream = device.ascend_stream("test").unwrap();
    assert_eq!(stream.copy(plain.slice(), target).unwrap_err().kind(), ErrorKind::Unsupported);
    let RingExport::Ascend { key, offset_bytes: 0 } = ring.export() else { panic!("{:?}", ring.export()) };
    assert_eq!(key.len(), 65);
    // Its own key is not for this process, and a key of nothing is for nobody.
    assert!(device.open_ring(&ring.export(), 100).unwrap_err().to_string().contains("its own memory"));
    let nothing = RingExport::Ascend { key: vec![1; 65], offset_bytes: 0 };
    assert!(device.open_ring(&nothing, 100).unwrap_err().to_string().contains("ACL_ERROR_RT_PARAM_INVALID"));
    let short = RingExport::Ascend { key: vec![1; 64], offset_bytes: 0 };
    assert_eq!(device.open_ring(&short, 100).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn a_device_is_current_for_libraries_that_ask() {
    let device = Npus::new().devices.open_ascend(6).unwrap();
    // SAFETY: the emulator's initialisers do nothing; the function has this type.
    let current = || unsafe {
        let library = libloading::Library::new(EMULATOR.path().join("libascendcl.so")).unwrap();
        let get = library.get::<unsafe extern "C" fn(*mut i32) -> i32>("aclrtGetDevice").unwrap();
        let mut device = -1;
        (get(&mut device), device)
    };
    let elsewhere = std::thread::scope(|scope| scope.spawn(current).join().unwrap());
    assert_eq!(elsewhere, (107_002, -1));
    let other = Npus::new().devices.open_ascend(2).unwrap();
    assert_eq!(while_current(&other, || Ok(current())).unwrap(), (0, 2));
    assert_eq!(while_current(&device, || Ok(current())).unwrap(), (0, 6));
}

#[tokio::test]
async fn memory_that_is_not_there_is_an_error_that_says_how_much_is() {
    let device = Npus::new().devices.open_ascend(7).unwrap();
    let free = device.free_memory_bytes().unwrap();
    let held = device.allocate(1 << 30).unwrap();
    assert_eq!(device.free_memory_bytes().unwrap(), free - (1 << 30));
    let error = device.allocate(free).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
    let text = error.to_string();
    assert!(text.contains(&format!("{} are free", free - (1 << 30))), "{text}");
    assert!(text.contains("ACL_ERROR_RT_MEMORY_ALLOCATION (207001)"), "{text}");
    drop(held);
    assert_eq!(device.free_memory_bytes().unwrap(), free);
}

struct Member {
    device: Arc<AscendDevice>,
    transport: HcclTransport,
}

impl Member {
    fn open(npus: &Npus, rank: u32) -> Self {
        let device = Arc::new(npus.devices.open_ascend(rank).unwrap());
        let seam: Arc<dyn DeviceBackend> = device.clone();
        Self { transport: npus.hccl.open_hccl(&seam).unwrap(), device }
    }

    fn upload(&self, bytes: &[u8]) -> BufferSlice {
        let memory = self.device.allocate(bytes.len() as u64).unwrap();
        let slice = BufferSlice::new(memory, 0..bytes.len() as u64).unwrap();
        let pinned = self.device.pin(HostBuffer::from_bytes(bytes).unwrap()).unwrap();
        let stream = self.device.ascend_stream("h2d").unwrap();
        stream.copy(BufferSlice::whole(pinned), slice.clone()).unwrap();
        stream.record_ascend().unwrap().wait(soon()).unwrap();
        slice
    }

    fn fetch(&self, memory: &BufferSlice) -> Vec<u8> {
        let own = self.device.own_host_memory(memory.len_bytes()).unwrap().unwrap();
        let into = BufferSlice::whole(own);
        let stream = self.device.ascend_stream("d2h").unwrap();
        stream.copy(memory.clone(), into.clone()).unwrap();
        stream.record_ascend().unwrap().wait(soon()).unwrap();
        // SAFETY: the copy into it is done.
        unsafe { into.as_slice() }.unwrap().to_vec()
    }
}

async fn group(members: &[Member]) -> Vec<HcclGroup> {
    let token = members[0].transport.create_token().await.unwrap();
    let world_size = members.len() as u32;
    let joins = members.iter().zip(0..).map(|(member, rank)| {
        let spec = GroupSpec { token: token.clone(), rank, world_size, epoch: Epoch(1) };
        member.transport.join_group(spec, soon())
    });
    all(joins.collect()).await.into_iter().map(Result::unwrap).collect()
}

/// Runs all at once.
async fn all<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut futures: Vec<_> = futures.into_iter().map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|context| {
        for (future, output) in &mut futures {
            if output.is_none()
                && let std::task::Poll::Ready(value) = future.as_mut().poll(context)
            {
                *output = Some(value);
            }
        }
        let done = futures.iter().all(|(_, output)| output.is_some());
        if done { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    futures.into_iter().map(|(_, output)| output.unwrap()).collect()
}

/// Gathers one part of each member, and compares.
async fn gather(member: &Member, group: &mut HcclGroup, own: u8, expected: &[u8]) {
    const PART: u64 = (1 << 20) + 3;
    let stream = member.device.stream("net").unwrap();
    let part = member.upload(&vec![own; PART as usize]);
    let result = member.upload(&vec![0; PART as usize * expected.len()]);
    let waited = group.barrier(&stream).await.unwrap();
    let done = group.all_gather(part.clone(), result.clone(), &stream).await.unwrap();
    done.done(soon()).await.unwrap();
    assert!(waited.is_complete().unwrap());
    for (root, bytes) in member.fetch(&result).chunks(PART as usize).enumerate() {
        assert!(bytes.iter().all(|byte| *byte == expected[root]), "the part of {root}");
    }
    let odd = group.all_gather(part.clone(), part, &stream).await.unwrap_err();
    assert_eq!(odd.kind(), ErrorKind::Internal, "{odd}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_gather_and_have_subgroups() {
    let npus = Npus::new();
    let members: Vec<Member> = (3..6).map(|device| Member::open(&npus, device)).collect();
    let mut groups = group(&members).await;
    let work = members.iter().zip(&mut groups).zip(0..).map(|((member, group), rank)| async move {
        gather(member, group, 10 + rank, &[10, 11, 12]).await;
        let one = [1, 2];
        assert_eq!(group.subgroup(vec![5], 1, soon()).await.unwrap_err().kind(), ErrorKind::Internal);
        if rank == 0 {
            return None;
        }
        // Ranks 2 and 1, in this order.
        let mut part = group.subgroup(vec![2, 1], 7, soon()).await.unwrap();
        gather(member, &mut part, one[rank as usize - 1], &[2, 1]).await;
        Some(part)
    });
    let parts = all(work.collect()).await;
    assert_eq!(parts.iter().filter(|part| part.is_some()).count(), 2);
    drop(parts);
    let work = members.iter().zip(&mut groups).zip(0..);
    all(work.map(|((m, g), rank)| gather(m, g, 20 + rank, &[20, 21, 22])).collect()).await;
}

#[test]
fn a_library_that_is_not_hccl_is_named_with_what_it_lacks() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = EMULATOR.path().join("libascendcl.so").canonicalize().unwrap();
    for name in ["libascendcl.so", "libhccl.so"] {
        std::os::unix::fs::symlink(&runtime, folder.path().join(name)).unwrap();
    }
    let config = HcclConfig { folder: Some(folder.path().to_owned()), ..HcclConfig::default() };
    let Probe::Unavailable(why) = HcclProvider::new(Ok(config), AclCell::default()).probe() else {
        panic!("the runtime was taken for HCCL")
    };
    assert!(why.contains("libhccl.so has no `HcclGetRootInfo`") && why.contains("libhcomm.so"), "{why}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transport_refuses_other_devices() {
    let host = ckpt_core::device::host::HostDevice::open(&ckpt_core::device::DeviceConfig {
        rank: 0,
        local_rank: 0,
        runtime_dir: tempfile::Builder::new()
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .tempdir()
            .unwrap()
            .path()
            .to_owned(),
    })
    .unwrap();
    let host: Arc<dyn DeviceBackend> = Arc::new(host);
    let error: Error = Npus::new().hccl.open_hccl(&host).unwrap_err();
    assert!(error.to_string().contains("--device ascend"), "{error}");
}
