//! Groups on pretended hosts, on the fake driver and the fake NCCL.

use std::{sync::Arc, time::Duration};

use ckpt_core::{
    Epoch, Error, ErrorKind, Key, Result,
    device::{BufferSlice, DeviceBackend, Event, Stream},
    testkit::conformance,
    transport::{AbortHandle, CollectiveOp, Communicator, GroupSpec, Transport, TransportProvider},
};
use futures_util::future::join_all;

use super::{
    CudaTransportProvider,
    layout::{Layout, Rails},
    rails,
};
use crate::{
    CudaIpcProvider, NcclConfig, NcclProvider,
    device::{
        CudaDevice, CudaProvider, DriverCell,
        tests::{fetch, pinned, soon},
    },
    fake,
};

/// Members on these hosts.
struct Hosts(&'static [u64]);

impl conformance::Factory for Hosts {
    fn device(&self, rank: u32) -> Result<Arc<dyn DeviceBackend>> {
        Ok(Arc::new(fake::device(rank)))
    }

    fn transport(&self, rank: u32, device: &Arc<dyn DeviceBackend>) -> Result<Arc<dyn Transport>> {
        let ipc = CudaIpcProvider::new(DriverCell::of(fake::driver())).on_host(self.0[rank as usize]);
        CudaTransportProvider::of(ipc, fake::provider(NcclConfig::default()))
            .open(&fake::config(device.clone()))
    }

    fn max_members(&self) -> u32 {
        self.0.len() as u32
    }

    fn detects_mismatch(&self) -> bool {
        false
    }

    fn later_work_waits(&self) -> bool {
        false
    }
}

async fn conforms(hosts: &'static [u64], passed: usize) {
    let report = conformance::collective(&Hosts(hosts)).await.unwrap();
    assert_eq!((report.passed.len(), report.skipped.len()), (passed, hosts.len() - 1), "{report:?}");
}

/// Groups of one to four: one host, one host, NCCL, rails.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hosts_with_two_members_conform() {
    conforms(&[1, 1, 2, 2], 34).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hosts_with_three_members_conform() {
    conforms(&[1, 2, 1, 2, 2, 1], 52).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_hosts_with_two_members_conform() {
    conforms(&[1, 1, 2, 2, 3, 3], 52).await;
}

struct Member {
    device: Arc<CudaDevice>,
    stream: Arc<dyn Stream>,
    communicator: Communicator,
}

impl Member {
    fn new(device: Arc<CudaDevice>, communicator: Communicator) -> Self {
        Self { stream: device.stream("test").unwrap(), device, communicator }
    }

    async fn memory(&self, bytes: &[u8]) -> BufferSlice {
        let len = bytes.len() as u64;
        let memory = BufferSlice::new(self.device.allocate(len).unwrap(), 0..len).unwrap();
        let stream = self.device.stream("h2d").unwrap();
        stream.copy(BufferSlice::whole(pinned(&self.device, bytes)), memory.clone()).unwrap();
        stream.record().unwrap().done(soon()).await.unwrap();
        memory
    }

    async fn holds(&self, memory: &BufferSlice) -> Vec<u8> {
        fetch(&self.device, memory.clone()).await
    }

    async fn enqueue(&mut self, ops: Vec<CollectiveOp>) -> Result<Event> {
        self.communicator.queue.enqueue(ops, &self.stream).await
    }

    /// One broadcast of a whole buffer.
    async fn broadcast(&mut self, root: u32, memory: &BufferSlice) -> Result<Event> {
        self.enqueue(vec![CollectiveOp { root, buffer: memory.clone() }]).await
    }

    fn path(&self) -> String {
        let shown = format!("{:?}", self.communicator.queue);
        shown.split(' ').next().unwrap().to_owned()
    }
}

/// What one member finds on its host.
#[derive(Clone, Copy)]
struct Place {
    host: u64,
    maps: bool,
    nccl: bool,
}

const fn at(host: u64) -> Place {
    Place { host, maps: true, nccl: true }
}

async fn try_group(places: &[Place]) -> Vec<Result<Member>> {
    let mut transports = Vec::new();
    for (rank, place) in (0..).zip(places) {
        let cell = DriverCell::of(if place.maps { fake::driver() } else { fake::driver_without_ipc() });
        let device = Arc::new(CudaProvider::new(cell.clone()).open_cuda(rank).unwrap());
        let nccl =
            if place.nccl { fake::provider(NcclConfig::default()) } else { fake::provider_without_nccl() };
        let ipc = CudaIpcProvider::new(cell).on_host(place.host);
        transports.push((
            CudaTransportProvider::of(ipc, nccl).open(&fake::config(device.clone())).unwrap(),
            device,
        ));
    }
    let token = transports[0].0.collective().unwrap().create_token().await.unwrap();
    let joins = transports.into_iter().zip(0..).map(|((transport, device), rank)| {
        let spec = GroupSpec { token: token.clone(), rank, world_size: places.len() as u32, epoch: Epoch(1) };
        async move { Ok(Member::new(device, transport.collective().unwrap().join(spec, soon()).await?)) }
    });
    join_all(joins).await
}

async fn group(places: &[Place]) -> Vec<Member> {
    try_group(places).await.into_iter().map(Result::unwrap).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_members_take_the_same_path_and_it_is_the_best_that_works() {
    let cannot_map = |host| Place { maps: false, ..at(host) };
    let without = |host| Place { nccl: false, ..at(host) };
    let (here, there) = (at(1), at(2));
    for (places, path) in [
        (&[here][..], "Queue"),
        (&[here, here, here], "Queue"),
        (&[without(1), here], "Queue"),
        (&[here, cannot_map(1)], "NcclQueue"),
        (&[here, there], "NcclQueue"),
        (&[here, here, there], "NcclQueue"),
        (&[here, here, there, cannot_map(2)], "NcclQueue"),
        (&[here, here, there, there], "RailsQueue"),
        (&[here, there, there, here], "RailsQueue"),
    ] {
        let mut members = group(places).await;
        let root = members.len() as u32 - 1;
        let mut memories = Vec::new();
        for rank in 0..=root {
            memories.push(members[rank as usize].memory(&[rank as u8 + 1; 1000]).await);
        }
        let casts = members.iter_mut().zip(&memories).map(|(member, memory)| async move {
            member.broadcast(root, memory).await.unwrap().done(soon()).await.unwrap();
            assert!(member.communicator.abort.poisoned().is_none());
            (member.path(), member.holds(memory).await)
        });
        for (found, bytes) in join_all(casts).await {
            assert_eq!(found, path, "{} members", places.len());
            assert_eq!(bytes, vec![root as u8 + 1; 1000], "{path}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_nccl_on_one_member_no_group_forms_on_several_hosts() {
    for places in [&[at(1), at(2)][..], &[at(1), at(1), at(2), at(2)]] {
        let mut places = places.to_vec();
        places[1].nccl = false;
        for joined in try_group(&places).await {
            let error = joined.map(|member| member.path()).unwrap_err();
            assert_eq!((error.kind(), error.get(Key::Rank)), (ErrorKind::Unavailable, Some("1")), "{error}");
            assert!(error.to_string().contains("/nowhere/libnccl.so.2"), "{error}");
        }
    }
}

/// On each member the operations of all groups, put where a small or a large memory has room for them.
struct Casts {
    ops: Vec<Vec<CollectiveOp>>,
    memory: BufferSlice,
}

const PIECE: u64 = 5000;
const GROUPS: usize = 10;

fn roots(group: usize, members: usize) -> [u32; 3] {
    [0, 1, 3].map(|by| ((group + by) % members) as u32)
}

fn bytes_of(group: usize, root: u32) -> u8 {
    (group * 7) as u8 + root as u8 + 1
}

impl Casts {
    /// The bytes of group `n` come to `place(n)`; what this member sends has memory of its own.
    async fn new(member: &Member, rank: u32, members: usize, place: impl Fn(usize) -> u64) -> Self {
        let memory = member.memory(&vec![0xEE; GROUPS * 3 * PIECE as usize]).await;
        let mut ops = Vec::new();
        for n in 0..GROUPS {
            let mut group = Vec::new();
            for (i, root) in (0..).zip(roots(n, members)) {
                let start = place(n) + i * PIECE;
                let buffer = if root == rank {
                    member.memory(&vec![bytes_of(n, root); PIECE as usize]).await
                } else {
                    memory.slice(start..start + PIECE).unwrap()
                };
                group.push(CollectiveOp { root, buffer });
            }
            ops.push(group);
        }
        Self { ops, memory }
    }
}

/// One member has room for a single group and takes all into the same place, one after another and unawaited. It may get
/// the next bytes only when it has passed on those that are there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_range_takes_the_next_bytes_when_its_last_ones_have_gone_on() {
    for (hosts, members) in
        [(&[at(1), at(1), at(2), at(2)][..], 4), (&[at(1), at(2), at(2), at(1), at(1), at(2)], 6)]
    {
        let mut group = group(hosts).await;
        for narrow in 0..members {
            let runs = group.iter_mut().zip(0..).map(|(member, rank)| async move {
                let stride = if rank == narrow { 0 } else { 3 * PIECE };
                let casts = Casts::new(member, rank as u32, members, |n| n as u64 * stride).await;
                let mut events = Vec::new();
                for ops in casts.ops {
                    events.push(member.enqueue(ops).await.unwrap());
                }
                for event in events {
                    event.done(soon()).await.unwrap();
                }
                assert!(member.communicator.abort.poisoned().is_none());
                let held = member.holds(&casts.memory).await;
                let from = if rank == narrow { GROUPS - 1 } else { 0 };
                for n in from..GROUPS {
                    for (i, root) in
                        roots(n, members).into_iter().enumerate().filter(|(_, root)| *root != rank as u32)
                    {
                        let start = n * stride as usize + i * PIECE as usize;
                        let right =
                            held[start..start + PIECE as usize].iter().all(|b| *b == bytes_of(n, root));
                        assert!(right, "group {n} from {root} on {rank}, and {narrow} has little room");
                    }
                }
            });
            join_all(runs).await;
        }
    }
}

/// Until the fake's device memory holds `byte` at its start.
async fn arrived(memory: &BufferSlice, byte: u8) {
    let deadline = soon();
    // SAFETY: the fake's device memory is host memory, and `memory` keeps it.
    while unsafe { std::ptr::read_volatile(memory.address() as *const u8) } != byte {
        assert!(std::time::Instant::now() < deadline, "the bytes do not arrive");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_passes_bytes_on_is_done_when_they_have_arrived_and_takes_no_others_before() {
    let [mut a, mut b, mut c, mut d] =
        <[Member; 4]>::try_from(group(&[at(1), at(1), at(2), at(2)]).await).ok().unwrap();
    let (first, second) = (a.memory(&[11; 3000]).await, a.memory(&[22; 3000]).await);
    let (to_b, to_c) = (b.memory(&[1; 3000]).await, c.memory(&[1; 3000]).await);
    let (d_first, d_second) = (d.memory(&[1; 3000]).await, d.memory(&[1; 3000]).await);
    let passed_on = c.broadcast(0, &to_c).await.unwrap();
    for memory in [&first, &second] {
        a.broadcast(0, memory).await.unwrap();
    }
    b.broadcast(0, &to_b).await.unwrap();
    arrived(&to_c, 11).await;
    // The last member has not come: its bytes are still to be copied out of the third one's memory.
    assert!(!passed_on.is_complete().unwrap());
    let next = tokio::spawn(async move {
        let event = c.broadcast(0, &to_c).await;
        (c, to_c, event)
    });
    let mut next = Box::pin(next);
    assert!(
        tokio::time::timeout(Duration::from_millis(50), &mut next).await.is_err(),
        "the next bytes may come"
    );
    assert!(!passed_on.is_complete().unwrap());
    let events = [d.broadcast(0, &d_first).await.unwrap(), d.broadcast(0, &d_second).await.unwrap()];
    let (c, to_c, last) = next.await.unwrap();
    for event in events.iter().chain([&passed_on, &last.unwrap()]) {
        event.done(soon()).await.unwrap();
    }
    assert_eq!(d.holds(&d_first).await, [11; 3000]);
    assert_eq!(d.holds(&d_second).await, [22; 3000]);
    assert_eq!(c.holds(&to_c).await, [22; 3000]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_is_done_when_its_rail_has_its_bytes_too() {
    let mut members = group(&[at(1), at(1), at(2), at(2)]).await;
    let mut memories = Vec::new();
    for (rank, member) in members.iter().enumerate() {
        memories.push(member.memory(&vec![rank as u8 + 1; 3000]).await);
    }
    let sent = members[0].broadcast(0, &memories[0]).await.unwrap();
    members[1].broadcast(0, &memories[1]).await.unwrap().done(soon()).await.unwrap();
    let error = sent.done(std::time::Instant::now() + Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    let mut events = vec![sent];
    for rank in [2, 3] {
        events.push(members[rank].broadcast(0, &memories[rank]).await.unwrap());
    }
    for event in events {
        event.done(soon()).await.unwrap();
    }
    for (member, memory) in members.iter().zip(&memories) {
        assert!(member.communicator.abort.poisoned().is_none(), "a deadline that passed is no failure");
        assert_eq!(member.holds(memory).await, [1; 3000]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_ends_both_parts_and_its_cause_reaches_the_neighbours_word_for_word() {
    let mut members = group(&[at(1), at(1), at(2), at(2)]).await;
    // The first member does not come: nobody gets its bytes.
    let mut waits = Vec::new();
    for member in &mut members[1..] {
        let memory = member.memory(&[1; 4096]).await;
        waits.push((member.broadcast(0, &memory).await.unwrap(), memory));
    }
    let cause = Error::new(ErrorKind::PeerLost, "update", "worker 7 died").with(Key::Rank, 700);
    members[2].communicator.abort.abort(cause);
    members[2].communicator.abort.abort(Error::new(ErrorKind::Timeout, "update", "too late"));
    for (number, wait) in [(2, &waits[1]), (3, &waits[2])] {
        let error = wait.0.done(soon()).await.unwrap_err();
        let found = members[number].communicator.abort.poisoned().unwrap();
        for error in [&error, &found] {
            assert_eq!((error.message(), error.get(Key::Rank)), ("worker 7 died", Some("700")), "{error}");
        }
        let again = members[number].broadcast(0, &wait.1).await.unwrap_err();
        assert_eq!(again.kind(), ErrorKind::Aborted, "{again}");
        assert!(again.to_string().contains("worker 7 died"), "{again}");
    }
    // The other host hears of it from the hub.
    assert!(members[1].communicator.abort.poisoned().is_none() && !waits[0].0.is_complete().unwrap());
    members[1].communicator.abort.abort(Error::new(ErrorKind::Aborted, "update", "told by the hub"));
    let error = waits[0].0.done(soon()).await.unwrap_err();
    assert_eq!(error.message(), "told by the hub");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_left_is_called_by_its_number_in_the_group() {
    let mut members = group(&[at(1), at(1), at(2), at(2)]).await;
    drop(members.pop());
    let memory = members[2].memory(&[1; 64]).await;
    let error = match members[2].broadcast(3, &memory).await {
        Ok(event) => event.done(soon()).await.unwrap_err(),
        Err(error) => error,
    };
    assert_eq!((error.kind(), error.get(Key::Rank)), (ErrorKind::PeerLost, Some("3")), "{error}");
    let poisoned = members[2].communicator.abort.poisoned().unwrap();
    assert_eq!(poisoned.get(Key::Rank), Some("3"), "{poisoned}");
}

/// A kernel that is cut short ends as if it had brought its bytes. Only the library says that it has not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_of_a_rail_that_failed_are_not_passed_on_as_good() {
    let hosts = [1, 1, 2, 2];
    let mut ipc = Vec::new();
    let mut nccl = Vec::new();
    let mut devices = Vec::new();
    for (rank, host) in (0..).zip(hosts) {
        let cell = DriverCell::of(fake::driver());
        let device = Arc::new(CudaProvider::new(cell.clone()).open_cuda(rank).unwrap());
        ipc.push(CudaIpcProvider::new(cell).on_host(host).open_ipc(&fake::config(device.clone())).unwrap());
        let provider: NcclProvider = fake::provider(NcclConfig::default());
        nccl.push(provider.open(&fake::config(device.clone())).unwrap());
        devices.push(device);
    }
    let places: Vec<Rails> = (0..4)
        .map(|rank| match Layout::of(&hosts, rank) {
            Layout::Rails(rails) => rails,
            other => panic!("{other:?}"),
        })
        .collect();
    let mut tokens = Vec::new();
    for first in [0, 2] {
        use ckpt_core::transport::Collective as _;
        tokens.push(ipc[first].create_token().await.unwrap());
    }
    let mut rails_of = Vec::new();
    for first in [0, 1] {
        rails_of.push(nccl[first].collective().unwrap().create_token().await.unwrap());
    }
    let joins = places.iter().map(|place| {
        let (ipc, nccl) = (&ipc[place.rank as usize], &nccl[place.rank as usize]);
        let spec = |token: &bytes::Bytes, rank| GroupSpec {
            token: token.clone(),
            rank,
            world_size: 2,
            epoch: Epoch(1),
        };
        let of_node = spec(&tokens[place.host() as usize], place.index());
        let of_rail = spec(&rails_of[place.index() as usize], place.host());
        async move {
            let node = ipc.join_as(&of_node, &place.node, soon()).await.unwrap();
            (node, nccl.collective().unwrap().join(of_rail, soon()).await.unwrap())
        }
    });
    let mut ends: Vec<Arc<dyn AbortHandle>> = Vec::new();
    let mut members = Vec::new();
    for (((node, rail), place), device) in join_all(joins).await.into_iter().zip(places).zip(devices) {
        ends.push(rail.abort.clone());
        members.push(Member::new(device, rails::communicator(place, node, rail)));
    }
    // The root does not come; the third member is to pass its bytes on to the fourth.
    let mut waits = Vec::new();
    for member in &mut members[2..] {
        let memory = member.memory(&[1; 4096]).await;
        waits.push((member.broadcast(0, &memory).await.unwrap(), memory));
    }
    ends[2].abort(Error::new(ErrorKind::PeerLost, "broadcast", "ncclRemoteError").with(Key::Rank, 1));
    for (number, (event, _)) in (2..).zip(&waits) {
        let error = event.done(soon()).await.unwrap_err();
        let found = members[number].communicator.abort.poisoned().unwrap();
        for error in [error, found] {
            assert_eq!((error.message(), error.get(Key::Rank)), ("ncclRemoteError", Some("2")), "{error}");
        }
    }
    members[3].communicator.abort.poisoned().unwrap();
    assert!(ends[3].poisoned().is_some(), "the failure of one part ends the other");
}
