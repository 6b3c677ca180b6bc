//! The transport on the fake driver: several members in one process, which the fake lets map their own memory.

use std::{sync::Arc, time::Duration};

use ckpt_core::{
    Epoch, ErrorKind, Result,
    device::{Buffer, BufferSlice, DeviceBackend, Stream},
    testkit::conformance,
    transport::{CollectiveOp, Communicator, GroupSpec, Transport, TransportProvider},
};

use super::{
    CudaIpcProvider,
    lend::Lender,
    message::{Lent, Message, Place},
};
use crate::{
    device::{
        Context, CudaDevice, DriverCell,
        tests::{fetch, pinned, soon},
    },
    fake,
};

/// Each device and transport as in a process of its own.
struct Processes;

impl conformance::Factory for Processes {
    fn device(&self, rank: u32) -> Result<Arc<dyn DeviceBackend>> {
        Ok(Arc::new(fake::device(rank)))
    }

    fn transport(&self, _rank: u32, device: &Arc<dyn DeviceBackend>) -> Result<Arc<dyn Transport>> {
        CudaIpcProvider::new(DriverCell::of(fake::driver())).open(&fake::config(device.clone()))
    }

    fn max_members(&self) -> u32 {
        3
    }

    fn detects_mismatch(&self) -> bool {
        true
    }

    fn later_work_waits(&self) -> bool {
        false
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_transport_conforms() {
    let report = conformance::collective(&Processes).await.unwrap();
    assert_eq!((report.passed.len(), report.skipped.len()), (27, 0), "{report:?}");
    let report = conformance::one_sided(&Processes).await.unwrap();
    assert_eq!((report.passed.len(), report.skipped.len()), (0, 1), "{report:?}");
}

struct Member {
    device: Arc<CudaDevice>,
    stream: Arc<dyn Stream>,
    communicator: Communicator,
}

impl Member {
    fn memory(&self, bytes: &[u8]) -> Arc<dyn Buffer> {
        let memory = self.device.allocate(bytes.len() as u64).unwrap();
        let slice = BufferSlice::new(memory.clone(), 0..bytes.len() as u64).unwrap();
        self.stream.copy(BufferSlice::whole(pinned(&self.device, bytes)), slice).unwrap();
        memory
    }

    async fn broadcast(&mut self, root: u32, memory: &Arc<dyn Buffer>, len: u64) -> Result<()> {
        let op = CollectiveOp { root, buffer: BufferSlice::new(memory.clone(), 0..len)? };
        self.communicator.queue.enqueue(vec![op], &self.stream).await?.done(soon()).await
    }
}

/// A group of two; of one process, or as of two.
async fn pair(same_process: bool) -> [Member; 2] {
    let driver = fake::driver();
    let first = CudaIpcProvider::new(DriverCell::of(driver.clone()));
    let second = CudaIpcProvider::new(DriverCell::of(driver));
    let devices = [Arc::new(fake::device(0)), Arc::new(fake::device(1))];
    let transports = [
        first.open(&fake::config(devices[0].clone())).unwrap(),
        if same_process { &first } else { &second }.open(&fake::config(devices[1].clone())).unwrap(),
    ];
    let token = transports[0].collective().unwrap().create_token().await.unwrap();
    let join = |rank: u32| {
        let spec = GroupSpec { token: token.clone(), rank, world_size: 2, epoch: Epoch(1) };
        transports[rank as usize].collective().unwrap().join(spec, soon())
    };
    let (zero, one) = tokio::join!(join(0), join(1));
    let [a, b] = devices;
    let member = |device: Arc<CudaDevice>, communicator| Member {
        stream: device.stream("test").unwrap(),
        device,
        communicator,
    };
    [member(a, zero.unwrap()), member(b, one.unwrap())]
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = soon();
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_of_one_process_need_no_mapping() {
    let [mut a, mut b] = pair(true).await;
    let (from, to) = (a.memory(&[7; 5000]), b.memory(&[1; 5000]));
    let (sent, received) = tokio::join!(a.broadcast(0, &from, 5000), b.broadcast(0, &to, 5000));
    sent.and(received).unwrap();
    assert_eq!(fetch(&b.device, BufferSlice::new(to, 0..5000).unwrap()).await, [7; 5000]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lent_memory_is_freed_once_the_other_has_let_go() {
    let [mut a, mut b] = pair(false).await;
    let (from, to) = (a.memory(&[7; 100]), b.memory(&[1; 100]));
    let (sent, received) = tokio::join!(a.broadcast(0, &from, 100), b.broadcast(0, &to, 100));
    sent.and(received).unwrap();
    let (from_at, to_at) = (from.address(), to.address());
    drop((from, to));
    assert!(!fake::is_allocated(from_at), "nobody has the source mapped");
    until("the receiver's block is freed", || !fake::is_allocated(to_at)).await;
    // The group goes on, with memory that the other has never seen.
    let (from, to) = (a.memory(&[9; 100]), b.memory(&[1; 100]));
    let (sent, received) = tokio::join!(b.broadcast(1, &to, 100), a.broadcast(1, &from, 100));
    sent.and(received).unwrap();
    assert_eq!(fetch(&a.device, BufferSlice::new(from, 0..100).unwrap()).await, [1; 100]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_an_abort_memory_waits_for_the_other_too() {
    let [mut a, b] = pair(false).await;
    let memory = a.memory(&[1; 4096]);
    let at = memory.address();
    let op = CollectiveOp { root: 1, buffer: BufferSlice::new(memory, 0..4096).unwrap() };
    let event = a.communicator.queue.enqueue(vec![op], &a.stream).await.unwrap();
    let error = event.done(std::time::Instant::now() + Duration::from_millis(30)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    b.communicator.abort.abort(ckpt_core::Error::new(ErrorKind::PeerLost, "update", "the worker died"));
    let error = event.done(soon()).await.unwrap_err();
    assert_eq!(error.message(), "the worker died");
    until("the cause has come", || a.communicator.abort.poisoned().is_some()).await;
    until("the block is freed once both have ended", || !fake::is_allocated(at)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_leaves_in_peace_fails_only_what_needs_it() {
    let [mut a, mut b] = pair(false).await;
    let (from, to) = (a.memory(&[3; 64]), b.memory(&[1; 64]));
    let (sent, received) = tokio::join!(a.broadcast(0, &from, 64), b.broadcast(0, &to, 64));
    sent.and(received).unwrap();
    drop(b.communicator);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(a.communicator.abort.poisoned().is_none());
    let error = a.broadcast(0, &from, 64).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
}

#[test]
fn a_block_is_free_when_the_last_member_has_forgotten_it() {
    let device = fake::device(0);
    let raw = device.stream("test").unwrap();
    let ckpt_core::device::RawStream::Cuda(handle) = raw.raw() else { panic!("not CUDA") };
    let context = Context::of_stream(fake::driver(), handle).unwrap();
    let (mut lender, mut returns) = Lender::new(context.clone(), [0; 16], 0);
    let memory: Arc<dyn Buffer> = Arc::new(crate::device::DeviceMemory::allocate(&context, 1 << 20).unwrap());
    let at = memory.address();
    let slice = BufferSlice::new(memory.clone(), 256..1024).unwrap();
    let (news, place) = lender.place(1, 0, &slice).unwrap();
    assert_eq!((news.unwrap().block, place.offset, place.len_bytes), (place.block, 256, 768));
    assert!(lender.place(1, 0, &slice).unwrap().0.is_none(), "it knows the block");
    assert!(lender.place(2, 0, &slice).unwrap().0.is_some());
    drop((memory, slice));
    let block = returns.try_recv().unwrap();
    let (number, told) = lender.take_back(block).unwrap();
    assert_eq!(told.into_iter().collect::<Vec<_>>(), [1, 2]);
    assert!(lender.forgotten(1, Some(number)).is_empty() && fake::is_allocated(at));
    drop(lender.forgotten(2, None));
    assert!(!fake::is_allocated(at));
}

#[test]
fn the_messages_stay_as_they_are() {
    let lent = Lent { block: 1, host: 300, process: [2; 16], address: 3, len_bytes: 300, handle: vec![4; 2] };
    let place = Place { op: 5, block: 6, offset: 7, len_bytes: 8 };
    let golden: [(Message, Vec<u8>); 5] = [
        (Message::Lend(lent), [vec![0, 1, 0xAC, 2], vec![2; 16], vec![3, 0xAC, 2, 2, 4, 4]].concat()),
        (Message::Offer { group: 9, places: vec![place] }, vec![1, 9, 1, 5, 6, 7, 8]),
        (Message::Written { group: 9 }, vec![2, 9]),
        (Message::Forget { block: 1 }, vec![3, 1]),
        (Message::Forgotten { block: 1 }, vec![4, 1]),
    ];
    for (message, bytes) in golden {
        assert_eq!(postcard::to_allocvec(&message).unwrap(), bytes, "{message:?}");
    }
}
