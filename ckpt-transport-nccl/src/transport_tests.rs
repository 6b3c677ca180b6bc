//! The transport on the fake libraries: several members in one process.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::{
    Epoch, Error, ErrorKind, Recovery,
    device::{Buffer, BufferSlice, DeviceBackend, Stream},
    testkit::conformance,
    transport::{CollectiveOp, Communicator, GroupSpec, Probe, Transport, TransportProvider},
};

use crate::{
    NcclConfig,
    device::{
        CudaDevice,
        tests::{fetch, pinned, soon},
    },
    fake,
};

struct Member {
    device: Arc<CudaDevice>,
    transport: Arc<dyn Transport>,
    stream: Arc<dyn Stream>,
}

fn member(local_rank: u32) -> Member {
    let device = Arc::new(fake::device(local_rank));
    let settings = NcclConfig { abort_deadline: Duration::from_secs(5), ..NcclConfig::default() };
    let transport = fake::provider(settings).open(&fake::config(device.clone())).unwrap();
    let stream = device.stream("net").unwrap();
    Member { device, transport, stream }
}

impl Member {
    async fn token(&self) -> bytes::Bytes {
        self.transport.collective().unwrap().create_token().await.unwrap()
    }

    async fn join(
        &self,
        token: &bytes::Bytes,
        rank: u32,
        world_size: u32,
        deadline: Instant,
    ) -> ckpt_core::Result<Communicator> {
        let group = GroupSpec { token: token.clone(), rank, world_size, epoch: Epoch(1) };
        self.transport.collective().unwrap().join(group, deadline).await
    }

    async fn upload(&self, bytes: &[u8]) -> Arc<dyn Buffer> {
        let memory = self.device.allocate(bytes.len() as u64).unwrap();
        let slice = BufferSlice::new(memory.clone(), 0..bytes.len() as u64).unwrap();
        let stream = self.device.stream("h2d").unwrap();
        stream.copy(BufferSlice::whole(pinned(&self.device, bytes)), slice).unwrap();
        stream.record().unwrap().done(soon()).await.unwrap();
        memory
    }
}

fn op(root: u32, memory: &Arc<dyn Buffer>, range: std::ops::Range<u64>) -> CollectiveOp {
    CollectiveOp { root, buffer: BufferSlice::new(memory.clone(), range).unwrap() }
}

/// Members and communicators of a group of `n`.
async fn group(n: u32) -> (bytes::Bytes, Vec<(Member, Communicator)>) {
    let members: Vec<Member> = (0..n).map(member).collect();
    let token = members[0].token().await;
    let joins = members.iter().enumerate().map(|(rank, m)| m.join(&token, rank as u32, n, soon()));
    let communicators = futures(joins.collect()).await;
    let all = members.into_iter().zip(communicators.into_iter().map(Result::unwrap)).collect();
    (token, all)
}

/// Runs all at once, in order.
async fn futures<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut futures: Vec<_> = futures.into_iter().map(Box::pin).collect();
    let mut results: Vec<Option<F::Output>> = futures.iter().map(|_| None).collect();
    std::future::poll_fn(|context| {
        for (future, result) in futures.iter_mut().zip(&mut results) {
            if result.is_none()
                && let std::task::Poll::Ready(value) = future.as_mut().poll(context)
            {
                *result = Some(value);
            }
        }
        if results.iter().all(Option::is_some) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    results.into_iter().map(Option::unwrap).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn several_owners_send_in_one_group_and_groups_follow_each_other_unawaited() {
    const SIZES: [u64; 7] = [0, 1, 255, 256, 4097, 70_001, 3];
    let (_, mut members) = group(3).await;
    let mut runs = tokio::task::JoinSet::new();
    for (rank, (member, mut communicator)) in members.drain(..).enumerate() {
        runs.spawn(async move {
            let mut events = Vec::new();
            let mut memories = Vec::new();
            for round in 0..4u8 {
                let total: u64 = SIZES.iter().sum();
                let memory = member.upload(&vec![50 * (rank as u8 + 1) + round; total as usize]).await;
                let mut at = 0;
                let ops = SIZES.iter().enumerate().map(|(i, len)| {
                    at += len;
                    op(i as u32 % 3, &memory, at - len..at)
                });
                events.push(communicator.queue.enqueue(ops.collect(), &member.stream).await.unwrap());
                memories.push(memory);
            }
            for (round, (event, memory)) in events.iter().zip(&memories).enumerate() {
                event.done(soon()).await.unwrap();
                assert!(communicator.abort.poisoned().is_none());
                let mut at = 0;
                for (i, len) in SIZES.iter().enumerate() {
                    let seen =
                        fetch(&member.device, BufferSlice::new(memory.clone(), at..at + len).unwrap()).await;
                    let expected = (50 * (i % 3 + 1) + round) as u8;
                    assert!(seen.iter().all(|b| *b == expected), "round {round}, op {i} on rank {rank}");
                    at += len;
                }
            }
        });
    }
    while let Some(result) = runs.join_next().await {
        result.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_recorded_only_after_the_launch_and_keeps_the_memory() {
    let (token, mut members) = group(1).await;
    let (member, communicator) = &mut members[0];
    let memory = member.upload(&[5; 64]).await;
    let at = memory.address();
    let event = communicator.queue.enqueue(vec![op(0, &memory, 0..64)], &member.stream).await.unwrap();
    drop(memory);
    assert!(fake::is_allocated(at), "the group still uses it");
    event.done(soon()).await.unwrap();
    assert!(!fake::is_allocated(at));
    assert_eq!(fake::live_communicators(&token[8..]), 1);
    members.clear();
    let deadline = soon();
    while fake::live_communicators(&token[8..]) > 0 {
        assert!(Instant::now() < deadline, "a dropped communicator is destroyed");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_frees_a_rank_whose_peer_never_came_and_the_first_cause_stays() {
    let (token, mut members) = group(2).await;
    let (member, mut communicator) = members.remove(0);
    let memory = member.upload(&[1; 4096]).await;
    let event = communicator.queue.enqueue(vec![op(1, &memory, 0..4096)], &member.stream).await.unwrap();
    let error = event.done(Instant::now() + Duration::from_millis(20)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(communicator.abort.poisoned().is_none());
    communicator.abort.abort(Error::new(ErrorKind::PeerLost, "broadcast", "rank 1 died"));
    communicator.abort.abort(Error::new(ErrorKind::Timeout, "broadcast", "too late"));
    assert_eq!(communicator.abort.poisoned().unwrap().message(), "rank 1 died");
    // The kernel ends as if all were well: only the poison tells.
    event.done(soon()).await.unwrap();
    let error = communicator.queue.enqueue(vec![op(0, &memory, 0..1)], &member.stream).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Aborted);
    assert!(error.to_string().contains("rank 1 died"), "{error}");
    // A new group in the same process.
    let token2 = member.token().await;
    let mut again = member.join(&token2, 0, 1, soon()).await.unwrap();
    let event = again.queue.enqueue(vec![op(0, &memory, 0..16)], &member.stream).await.unwrap();
    event.done(soon()).await.unwrap();
    assert!(again.abort.poisoned().is_none());
    assert_eq!(fake::live_communicators(&token[8..]), 1, "the other member's, which nobody aborted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_is_never_complete_ends_at_the_deadline() {
    let member = member(0);
    let token = member.token().await;
    let began = Instant::now();
    let error = member.join(&token, 0, 2, began + Duration::from_millis(100)).await.unwrap_err();
    assert_eq!((error.kind(), error.recovery()), (ErrorKind::Timeout, Recovery::Rebuild));
    assert!(began.elapsed() < Duration::from_secs(5));
    // The next group waits for that abort.
    let token2 = member.token().await;
    member.join(&token2, 0, 1, soon()).await.unwrap();
    assert_eq!(fake::live_communicators(&token[8..]), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_that_nobody_waits_for_leaves_nothing_behind() {
    let member = member(0);
    let token = member.token().await;
    let join = member.join(&token, 0, 2, soon());
    assert!(tokio::time::timeout(Duration::from_millis(30), join).await.is_err());
    let deadline = soon();
    while fake::live_communicators(&token[8..]) > 0 {
        assert!(Instant::now() < deadline, "the half-made communicator is aborted");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_asynchronous_error_of_the_library_poisons_the_group() {
    let (token, mut members) = group(1).await;
    let (member, communicator) = &mut members[0];
    let memory = member.upload(&[1; 64]).await;
    fake::fail_next_launch(&token[8..], 0);
    let error = communicator.queue.enqueue(vec![op(0, &memory, 0..64)], &member.stream).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PeerLost);
    assert!(error.to_string().contains("ncclRemoteError"), "{error}");
    assert_eq!(communicator.abort.poisoned().unwrap().kind(), ErrorKind::PeerLost);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nccl_cannot_move_is_refused() {
    let (_, mut members) = group(1).await;
    let (member, communicator) = &mut members[0];
    let host = pinned(&member.device, &[0; 64]);
    let error = communicator.queue.enqueue(vec![op(0, &host, 0..64)], &member.stream).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let memory = member.upload(&[1; 64]).await;
    let error = communicator.queue.enqueue(vec![op(1, &memory, 0..64)], &member.stream).await.unwrap_err();
    assert!(error.to_string().contains("root 1"), "{error}");
    assert!(communicator.abort.poisoned().is_none(), "a refused call harms nobody");
    let event = communicator.queue.enqueue(Vec::new(), &member.stream).await.unwrap();
    event.done(soon()).await.unwrap();
}

/// The suite of the seams on the fake.
struct Fakes;

impl conformance::Factory for Fakes {
    fn device(&self, rank: u32) -> ckpt_core::Result<Arc<dyn DeviceBackend>> {
        Ok(Arc::new(fake::device(rank)))
    }

    fn transport(
        &self,
        _rank: u32,
        device: &Arc<dyn DeviceBackend>,
    ) -> ckpt_core::Result<Arc<dyn Transport>> {
        fake::provider(NcclConfig::default()).open(&fake::config(device.clone()))
    }

    fn max_members(&self) -> u32 {
        3
    }

    fn detects_mismatch(&self) -> bool {
        false
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_device_conforms() {
    let report = conformance::device(&Fakes).await.unwrap();
    assert_eq!((report.passed.len(), report.skipped.len()), (8, 3), "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_transport_conforms() {
    let report = conformance::collective(&Fakes).await.unwrap();
    assert_eq!((report.passed.len(), report.skipped.len()), (25, 2), "{report:?}");
    let report = conformance::one_sided(&Fakes).await.unwrap();
    assert_eq!((report.passed.len(), report.skipped.len()), (0, 1), "{report:?}");
}

#[test]
fn a_machine_without_nccl_or_driver_gets_a_reason() {
    let provider = fake::provider_without_nccl();
    let Probe::Unavailable(why) = provider.probe() else { panic!("found a library that is not there") };
    assert!(why.contains("/nowhere/libnccl.so.2") && why.contains("CKPT_NCCL_LIBRARY"), "{why}");
}
