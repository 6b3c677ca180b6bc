use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::device::{BufferSlice, Event};
use proptest::prelude::*;

use super::*;
use crate::fake;

#[repr(align(4096))]
struct Aligned(#[expect(dead_code, reason = "only its alignment matters")] [u8; 4096]);

/// Page-aligned host memory. It is never freed, so that no other test gets an address whose fate a test asks about.
#[derive(Debug)]
pub(crate) struct HostPages {
    address: u64,
    len: u64,
}

impl HostPages {
    pub(crate) fn new(len: u64) -> Arc<Self> {
        let pages: Vec<Aligned> = (0..len.div_ceil(4096).max(1)).map(|_| Aligned([0; 4096])).collect();
        Arc::new(Self { address: pages.leak().as_ptr() as u64, len })
    }
}

// SAFETY: leaked memory stays.
unsafe impl Buffer for HostPages {
    fn address(&self) -> u64 {
        self.address
    }

    fn len_bytes(&self) -> u64 {
        self.len
    }

    fn memory(&self) -> MemoryKind {
        MemoryKind::Host
    }
}

/// Pinned memory that holds `bytes`.
pub(crate) fn pinned(device: &CudaDevice, bytes: &[u8]) -> Arc<dyn Buffer> {
    let memory: Arc<dyn Buffer> = HostPages::new(bytes.len() as u64);
    let slice = BufferSlice::whole(memory.clone());
    // SAFETY: the memory was just made.
    unsafe { slice.as_mut_slice() }.unwrap().copy_from_slice(bytes);
    device.pin(memory).unwrap()
}

pub(crate) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// The bytes of device memory.
pub(crate) async fn fetch(device: &CudaDevice, from: BufferSlice) -> Vec<u8> {
    let stream = device.cuda_stream("fetch").unwrap();
    let into = BufferSlice::whole(pinned(device, &vec![0; from.len_bytes() as usize]));
    stream.copy(from, into.clone()).unwrap();
    stream.record().unwrap().done(soon()).await.unwrap();
    // SAFETY: the copy is done.
    unsafe { into.as_slice() }.unwrap().to_vec()
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = soon();
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn part(memory: &Arc<dyn Buffer>, range: std::ops::Range<u64>) -> BufferSlice {
    BufferSlice::new(memory.clone(), range).unwrap()
}

#[test]
fn a_device_says_what_it_is() {
    let device = fake::device(3);
    assert_eq!(device.info().uuid, "GPU-03030303-0303-0303-0303-030303030303");
    assert_eq!(device.info().pci_address.as_deref(), Some("0000:3b:00.0"));
    assert_eq!(device.info().name, "Fake GPU");
    assert_eq!((device.kind(), device.free_memory_bytes().unwrap()), ("cuda", 1 << 30));
    device.flush_remote_writes().unwrap();
    let provider = CudaProvider::new(DriverCell::of(fake::driver()));
    assert!(
        provider.probe().to_string().starts_with("available: CUDA 12.8 driver, 8 device(s)"),
        "{}",
        provider.probe()
    );
}

#[test]
fn a_machine_without_a_driver_gets_a_reason() {
    // On a GPU machine the probe succeeds, and the fake's tests say the rest.
    if let Probe::Unavailable(why) = CudaProvider::default().probe() {
        assert!(why.contains("libcuda.so.1") || why.contains("device"), "{why}");
        assert!(!why.contains('\n'), "{why}");
    }
}

#[test]
fn each_local_rank_has_its_device_and_one_visible_device_serves_all() {
    assert_eq!(choose_device(1, 8, None).unwrap(), 1);
    assert_eq!(choose_device(5, 1, Some("5")).unwrap(), 0);
    let error = choose_device(2, 2, Some("0,1")).unwrap_err();
    assert!(
        error.to_string().contains("local rank 2") && error.to_string().contains("CUDA_VISIBLE_DEVICES=0,1"),
        "{error}"
    );
    assert_eq!(choose_device(1, 1, None).unwrap_err().kind(), ErrorKind::ConfigInvalid);
    assert_eq!(choose_device(0, 0, Some("")).unwrap_err().kind(), ErrorKind::Unavailable);
}

#[test]
fn pci_addresses_are_written_as_in_sysfs() {
    assert_eq!(normalize_pci("00000000:3B:00.0").as_deref(), Some("0000:3b:00.0"));
    assert_eq!(normalize_pci("10000:AF:00.1").as_deref(), Some("10000:af:00.1"));
    assert_eq!(normalize_pci("nonsense"), None);
}

#[tokio::test]
async fn bytes_go_in_across_and_out_in_order() {
    let device = fake::device(0);
    let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
    let host = pinned(&device, &bytes);
    let (near, far) = (device.allocate(1 << 20).unwrap(), device.allocate(1 << 20).unwrap());
    let (load, move_on) = (device.stream("h2d").unwrap(), device.stream("d2d").unwrap());
    load.copy(part(&host, 0..100_000), part(&near, 512..100_512)).unwrap();
    let loaded = load.record().unwrap();
    move_on.wait(&loaded).unwrap();
    move_on.copy(part(&near, 512..100_512), part(&far, 0..100_000)).unwrap();
    let moved = move_on.record().unwrap();
    assert!(!moved.is_complete().unwrap(), "the fake is late on purpose");
    moved.done(soon()).await.unwrap();
    assert!(loaded.is_complete().unwrap() && moved.is_complete().unwrap());
    assert_eq!(fetch(&device, part(&far, 0..100_000)).await, bytes);
    assert_eq!(fake::stack_depth(), 0, "the caller's own context is back");
}

#[tokio::test]
async fn dropped_memory_lives_until_its_work_is_done_and_no_longer() {
    let device = fake::device(0);
    let stream = device.stream("h2d").unwrap();
    let host = pinned(&device, &[9; 5000]);
    let target = device.allocate(5000).unwrap();
    let (host_at, target_at) = (host.address(), target.address());
    stream.copy(part(&host, 0..5000), part(&target, 0..5000)).unwrap();
    let done = stream.record().unwrap();
    drop((host, target));
    assert!(fake::is_allocated(target_at) && fake::is_registered(host_at));
    done.done(soon()).await.unwrap();
    assert!(
        !fake::is_allocated(target_at) && !fake::is_registered(host_at),
        "freed before the waiter is told"
    );
}

#[tokio::test]
async fn memory_is_let_go_though_nobody_waits_and_the_stream_is_gone() {
    let device = fake::device(0);
    let stream = device.stream("h2d").unwrap();
    let (from, to) = (device.allocate(64).unwrap(), device.allocate(64).unwrap());
    let at = from.address();
    // No event at all: the stream records one when it goes.
    stream.copy(part(&from, 0..64), part(&to, 0..64)).unwrap();
    stream.keep_alive(vec![part(&from, 0..1)]).unwrap();
    drop((stream, from, device));
    until("the last event lets go", || !fake::is_allocated(at)).await;
}

#[tokio::test]
async fn a_wait_ends_at_its_deadline_and_can_be_repeated() {
    let device = fake::device(0);
    let (blocked, gate) = (device.stream("blocked").unwrap(), device.stream("gate").unwrap());
    let memory = device.allocate(1 << 20).unwrap();
    for _ in 0..200 {
        gate.copy(part(&memory, 0..64), part(&memory, 64..128)).unwrap();
    }
    blocked.wait(&gate.record().unwrap()).unwrap();
    let event = blocked.record().unwrap();
    let error = event.done(Instant::now() + Duration::from_millis(2)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    // A dropped wait loses nothing either.
    assert!(tokio::time::timeout(Duration::from_millis(1), event.done(soon())).await.is_err());
    event.done(soon()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_waiters_on_many_streams_all_wake() {
    let device = Arc::new(fake::device(0));
    let memory = device.allocate(1 << 20).unwrap();
    let mut waiting = tokio::task::JoinSet::new();
    for lane in 0..6u64 {
        let stream = device.stream("lane").unwrap();
        for i in 0..20 {
            let at = lane * 4096 + i * 128;
            stream.copy(part(&memory, at..at + 64), part(&memory, at + 64..at + 128)).unwrap();
            let event = stream.record().unwrap();
            for event in [event.clone(), event] {
                waiting.spawn(async move { event.done(soon()).await });
            }
        }
    }
    while let Some(result) = waiting.join_next().await {
        result.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_broken_context_fails_events_instead_of_hanging_them() {
    let device = fake::device(0);
    let stream = device.stream("h2d").unwrap();
    let memory = device.allocate(4096).unwrap();
    // Device memory that nobody allocated.
    #[derive(Debug)]
    struct Nowhere;
    // SAFETY: none; that is what is tried, on a fake that checks.
    unsafe impl Buffer for Nowhere {
        fn address(&self) -> u64 {
            0xdead_0000
        }
        fn len_bytes(&self) -> u64 {
            4096
        }
        fn memory(&self) -> MemoryKind {
            MemoryKind::Device
        }
    }
    let nowhere: Arc<dyn Buffer> = Arc::new(Nowhere);
    stream.copy(part(&nowhere, 0..64), part(&memory, 0..64)).unwrap();
    // Whichever call comes after the failure reports it.
    let error = match stream.record() {
        Ok(event) => event.done(soon()).await.unwrap_err(),
        Err(error) => error,
    };
    assert_eq!(error.kind(), ErrorKind::Backend);
    assert!(error.to_string().contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{error}");
}

#[test]
fn what_a_stream_cannot_do_is_refused_before_it_is_enqueued() {
    let device = fake::device(0);
    let stream = device.stream("h2d").unwrap();
    let memory = device.allocate(4096).unwrap();
    let pageable: Arc<dyn Buffer> = HostPages::new(64);
    let error = stream.copy(part(&pageable, 0..64), part(&memory, 0..64)).unwrap_err();
    assert!(error.to_string().contains("pin it first"), "{error}");
    let error = stream.copy(part(&memory, 0..64), part(&memory, 64..65)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal);
    #[derive(Debug)]
    struct Foreign;
    #[async_trait::async_trait]
    impl ckpt_core::device::EventState for Foreign {
        fn is_complete(&self) -> Result<bool> {
            Ok(true)
        }
        async fn done(&self, _: Instant) -> Result<()> {
            Ok(())
        }
        fn as_any(&self) -> &dyn std::any::Any {
            self
        }
    }
    assert_eq!(stream.wait(&Event::new(Foreign)).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn pinning_rounds_to_pages_pins_nothing_twice_and_takes_empty_memory() {
    let device = fake::device(0);
    let memory: Arc<dyn Buffer> = HostPages::new(5000);
    let pinned = device.pin(memory.clone()).unwrap();
    assert_eq!((pinned.memory(), pinned.len_bytes()), (MemoryKind::HostPinned, 5000));
    assert!(fake::is_registered(pinned.address() + 8191));
    assert!(Arc::ptr_eq(&device.pin(pinned.clone()).unwrap(), &pinned));
    let error = device.pin(memory).unwrap_err();
    assert!(error.to_string().contains("pinned"), "{error}");
    assert_eq!(device.pin(HostPages::new(0)).unwrap().memory(), MemoryKind::HostPinned);
    let device_memory = device.allocate(1).unwrap();
    assert!(device.pin(device_memory).is_err());
}

#[test]
fn a_ring_is_exported_and_freed_with_its_last_slice() {
    let device = fake::device(0);
    let ring = device.allocate_ring(3 << 20).unwrap();
    let RingExport::Cuda { handle, offset_bytes: 0 } = ring.export() else {
        panic!("not exported as CUDA memory")
    };
    assert_eq!((handle.len(), ring.buffer().len_bytes()), (64, 4 << 20));
    let mapped = device.open_ring(&ring.export(), 3 << 20).unwrap();
    assert_eq!(mapped.address(), ring.buffer().address());
    let short = RingExport::Cuda { handle: vec![0; 63], offset_bytes: 0 };
    assert_eq!(device.open_ring(&short, 1).unwrap_err().kind(), ErrorKind::Corrupt);
    let slice = BufferSlice::whole(ring.buffer());
    drop(ring);
    assert!(fake::is_allocated(slice.address()));
    let at = slice.address();
    drop(slice);
    assert!(!fake::is_allocated(at));
    let error = device.allocate_ring(4 << 30).unwrap_err();
    assert_eq!(
        (error.kind(), error.get(Key::Device)),
        (ErrorKind::ResourceExhausted, Some(device.info().uuid.as_str()))
    );
}

#[test]
fn a_ring_becomes_a_dma_buf_where_the_driver_can() {
    let ring = |device: CudaDevice, len_bytes| device.cuda_ring(len_bytes).unwrap().buffer();
    let exported = ring(fake::device_with_dma_buf(0), 3 << 20).dma_buf().unwrap();
    let file = std::fs::File::from(exported.unwrap());
    assert_eq!(file.metadata().unwrap().len(), 4 << 20, "the whole block");
    assert!(ring(fake::device(0), 1).dma_buf().is_none(), "a driver before 11.7");
    let error = ring(fake::device_with_dma_buf(801), 1).dma_buf().unwrap().unwrap_err();
    assert_eq!((error.kind(), error.operation()), (ErrorKind::Unsupported, "export a dma-buf"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn a_batch_of_copies_does_what_single_copies_do(lengths in prop::collection::vec(1usize..2000, 0..20)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let device = fake::device(0);
            let bytes: Vec<u8> = (0..lengths.iter().sum::<usize>()).map(|i| (i * 31 % 251) as u8).collect();
            let host = pinned(&device, &bytes);
            let (near, far) = (device.allocate(1 << 20).unwrap(), device.allocate(1 << 20).unwrap());
            let stream = device.cuda_stream("batch").unwrap();
            let all = bytes.len() as u64;
            stream.copy(part(&host, 0..all), part(&near, 0..all)).unwrap();
            let (mut batch, mut at) = (CopyBatch::default(), 0);
            for len in &lengths {
                let range = at..at + *len as u64;
                batch.push(&part(&near, range.clone()), &part(&far, range.clone())).unwrap();
                at = range.end;
            }
            assert_eq!((batch.len(), batch.is_empty()), (lengths.len(), lengths.is_empty()));
            stream.copy_batch(batch).unwrap();
            stream.record().unwrap().done(soon()).await.unwrap();
            assert_eq!(fetch(&device, part(&far, 0..all)).await, bytes);
        });
    }
}
