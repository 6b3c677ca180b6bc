use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::FutureExt;

use super::*;
use crate::device::{Event, HostJob, OnAbort};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn device() -> (HostDevice, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let config = DeviceConfig { rank: 5, local_rank: 0, runtime_dir: folder.path().join("run") };
    (HostDevice::open(&config).unwrap(), folder)
}

fn submit(stream: &Arc<dyn Stream>, run: impl Future<Output = Result<()>> + Send + 'static) {
    stream
        .host()
        .unwrap()
        .submit(HostJob { label: "test", on_abort: OnAbort::Fails, run: run.boxed() })
        .unwrap();
}

fn failed() -> Error {
    Error::new(ErrorKind::Backend, "test", "the job failed")
}

#[tokio::test]
async fn it_is_described_and_asks_the_machine_for_memory() {
    let (device, _folder) = device();
    assert!(device.info().uuid.starts_with("HOST-") && device.info().uuid.ends_with("-5"));
    let bytes = device.free_memory_bytes().unwrap();
    assert!(bytes > 1 << 20, "{bytes}");
    assert_eq!(device.with_free_memory(77).free_memory_bytes().unwrap(), 77);
    assert!(matches!(HostProvider.probe(), Probe::Available(_)));
}

#[test]
fn opening_it_outside_a_runtime_is_an_error() {
    let config = DeviceConfig { rank: 0, local_rank: 0, runtime_dir: std::env::temp_dir() };
    assert_eq!(HostDevice::open(&config).unwrap_err().kind(), ErrorKind::Internal);
}

#[tokio::test]
async fn pins_are_counted() {
    let (device, _folder) = device();
    let memory = HostBuffer::allocate(10).unwrap();
    device.pin(memory.clone()).unwrap();
    device.pin(memory).unwrap();
    assert_eq!(device.pin_count(), 2);
}

#[tokio::test]
async fn a_failed_job_fails_its_stream_and_those_that_wait_for_it() {
    let (device, _folder) = device();
    let (a, b) = (device.stream("a").unwrap(), device.stream("b").unwrap());
    let before = a.record().unwrap();
    submit(&a, async { Err(failed()) });
    let after = a.record().unwrap();
    b.wait(&after).unwrap();
    let ran = Arc::new(AtomicBool::new(false));
    let flag = ran.clone();
    submit(&b, async move {
        flag.store(true, Ordering::Relaxed);
        Ok(())
    });
    let other = b.record().unwrap();
    before.done(soon()).await.unwrap();
    for event in [&after, &other, &after] {
        assert!(event.done(soon()).await.unwrap_err().to_string().contains("the job failed"));
        assert!(event.is_complete().is_err());
    }
    assert!(!ran.load(Ordering::Relaxed), "work behind a failure ran");
}

#[tokio::test]
async fn a_panic_in_a_job_is_an_error() {
    let (device, _folder) = device();
    let stream = device.stream("a").unwrap();
    submit(&stream, async { panic!("boom {}", 1) });
    let error = stream.record().unwrap().done(soon()).await.unwrap_err();
    assert!(error.to_string().contains("boom 1"), "{error}");
}

#[tokio::test]
async fn a_wait_ends_by_its_deadline_and_can_be_repeated() {
    let (device, _folder) = device();
    let stream = device.stream("slow").unwrap();
    let (release, gate) = tokio::sync::oneshot::channel::<()>();
    submit(&stream, async move {
        gate.await.map_err(|_| failed())?;
        Ok(())
    });
    let event = stream.record().unwrap();
    let error = event.done(Instant::now() + Duration::from_millis(10)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.to_string().contains("slow"));
    release.send(()).unwrap();
    event.done(soon()).await.unwrap();
}

#[test]
fn a_runtime_that_ends_fails_what_is_queued() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (event, _folder) = runtime.block_on(async {
        let (device, folder) = device();
        let stream = device.stream("a").unwrap();
        submit(&stream, std::future::pending());
        (stream.record().unwrap(), folder)
    });
    drop(runtime);
    assert_eq!(event.is_complete().unwrap_err().kind(), ErrorKind::Aborted);
}

#[tokio::test]
async fn the_adversary_runs_nothing_before_somebody_waits_for_it() {
    let (device, _folder) = device();
    let device = device.adversarial(1);
    let count = Arc::new(AtomicU32::new(0));
    let add = |stream: &Arc<dyn Stream>, n| {
        let count = count.clone();
        submit(stream, async move {
            count.fetch_add(n, Ordering::SeqCst);
            Ok(())
        });
        stream.record().unwrap()
    };
    let (a, b) = (device.stream("a").unwrap(), device.stream("b").unwrap());
    let a1 = add(&a, 1);
    let a2 = add(&a, 10);
    b.wait(&a1).unwrap();
    let b1 = add(&b, 100);
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
    assert_eq!(count.load(Ordering::SeqCst), 0);
    assert!(!b1.is_complete().unwrap());
    b1.done(soon()).await.unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 101, "exactly what b1 depends on");
    // A poller is served in the end.
    let served = async {
        while !a2.is_complete().unwrap() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), served).await.unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 111);
}

#[tokio::test]
async fn the_adversary_runs_the_rest_when_nobody_can_wait_any_more() {
    let (device, _folder) = device();
    let device = device.adversarial(2);
    let (a, b) = (device.stream("a").unwrap(), device.stream("b").unwrap());
    let (sender, receiver) = tokio::sync::oneshot::channel();
    // Each waits for the other's past: neither may keep the other's work from running.
    let a1 = a.record().unwrap();
    b.wait(&a1).unwrap();
    let b1 = b.record().unwrap();
    a.wait(&b1).unwrap();
    submit(&a, async move {
        let _ = sender.send(());
        Ok(())
    });
    drop((a, b, a1, b1));
    tokio::time::timeout(Duration::from_secs(20), receiver).await.unwrap().unwrap();
}

#[tokio::test]
async fn the_adversarys_aborted_work_succeeds_over_garbage() {
    let (device, _folder) = device();
    let device = device.adversarial(3);
    let memory = HostBuffer::from_bytes(&[7; 64]).unwrap();
    let stream = device.stream("a").unwrap();
    let aborted = async { Err(Error::new(ErrorKind::PeerLost, "test", "a peer died")) };
    let job =
        HostJob { label: "test", on_abort: OnAbort::MaySucceed(vec![memory.slice()]), run: aborted.boxed() };
    stream.host().unwrap().submit(job).unwrap();
    let event: Event = stream.record().unwrap();
    event.done(soon()).await.unwrap();
    let slice = memory.slice();
    // SAFETY: the event is done, nothing else uses the memory.
    assert_ne!(unsafe { slice.as_slice().unwrap() }, [7; 64]);
    // Other errors stay errors.
    submit(&stream, async { Err(failed()) });
    assert!(stream.record().unwrap().done(soon()).await.is_err());
}

#[tokio::test]
async fn copies_of_any_size_arrive_in_order() {
    let ((kind, _folder), (unkind, _other_folder)) = (device(), device());
    for device in [kind, unkind.adversarial(4)] {
        let stream = device.stream("copy").unwrap();
        for len in [0_usize, 1, 255, 65_536, 65_537, 3 << 20] {
            let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            let src = HostBuffer::from_bytes(&bytes).unwrap();
            let (middle, dst) =
                (HostBuffer::allocate(len as u64).unwrap(), HostBuffer::allocate(len as u64).unwrap());
            stream.copy(src.slice(), middle.slice()).unwrap();
            stream.copy(middle.slice(), dst.slice()).unwrap();
            drop((src, middle));
            stream.record().unwrap().done(soon()).await.unwrap();
            let slice = dst.slice();
            // SAFETY: the copies are done.
            assert!(unsafe { slice.as_slice().unwrap() } == bytes.as_slice());
        }
        let small = HostBuffer::allocate(1).unwrap();
        let large = HostBuffer::allocate(2).unwrap();
        assert!(stream.copy(small.slice(), large.slice()).is_err());
    }
}

#[tokio::test]
async fn a_missing_wait_shows_on_the_adversary() {
    let (device, _folder) = device();
    let device = device.adversarial(5);
    for waits in [true, false] {
        let (load, net) = (device.stream("load").unwrap(), device.stream("net").unwrap());
        let ring = device.allocate_ring(100).unwrap();
        let place = crate::device::BufferSlice::whole(ring.buffer());
        let received = HostBuffer::allocate(100).unwrap();
        load.copy(HostBuffer::from_bytes(&[1; 100]).unwrap().slice(), place.clone()).unwrap();
        let loaded = load.record().unwrap();
        if waits {
            net.wait(&loaded).unwrap();
        }
        net.copy(place, received.slice()).unwrap();
        net.record().unwrap().done(soon()).await.unwrap();
        let slice = received.slice();
        // SAFETY: the copy is done.
        let bytes = unsafe { slice.as_slice().unwrap() };
        assert_eq!(bytes, [if waits { 1 } else { POISON }; 100]);
    }
}
