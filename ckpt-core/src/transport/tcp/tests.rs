use std::{net::Ipv4Addr, time::Duration};

use futures_util::{
    FutureExt,
    future::{join, join_all, select},
};
use tokio::{io::AsyncWriteExt, net::TcpStream};

use super::*;
use crate::{
    device::{
        DeviceBackend, DeviceConfig,
        host::{HostBuffer, HostDevice},
    },
    error::Key,
    transport::{CollectiveOp, ReadOp},
    types::Epoch,
};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

struct Rank {
    transport: Arc<dyn Transport>,
    device: Arc<dyn DeviceBackend>,
}

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn rank(&self, rank: u32, secret: &str) -> Rank {
        self.rank_with(rank, secret, false)
    }

    fn rank_with(&self, rank: u32, secret: &str, tls: bool) -> Rank {
        let runtime_dir = self.folder.path().join("run");
        let config = DeviceConfig { rank, local_rank: rank, runtime_dir: runtime_dir.clone() };
        let device: Arc<dyn DeviceBackend> = Arc::new(HostDevice::open(&config).unwrap());
        let transport = TcpProvider
            .open(&TransportConfig {
                bind: Ipv4Addr::LOCALHOST.into(),
                runtime_dir,
                tls,
                secret: secret.into(),
                connections: 2,
                device: device.clone(),
            })
            .unwrap();
        Rank { transport, device }
    }
}

impl Rank {
    async fn token(&self) -> Bytes {
        self.transport.collective().unwrap().create_token().await.unwrap()
    }

    async fn join(
        &self,
        token: &Bytes,
        rank: u32,
        world_size: u32,
        deadline: Instant,
    ) -> Result<Communicator> {
        self.join_epoch(token, rank, world_size, 1, deadline).await
    }

    async fn join_epoch(
        &self,
        token: &Bytes,
        rank: u32,
        world_size: u32,
        epoch: u64,
        deadline: Instant,
    ) -> Result<Communicator> {
        let spec = GroupSpec { token: token.clone(), rank, world_size, epoch: Epoch(epoch) };
        self.transport.collective().unwrap().join(spec, deadline).await
    }

    async fn group(ranks: &[Self]) -> Vec<Communicator> {
        let token = ranks[0].token().await;
        let joins = ranks.iter().zip(0..).map(|(r, n)| r.join(&token, n, ranks.len() as u32, soon()));
        join_all(joins).await.into_iter().map(|joined| joined.unwrap()).collect()
    }
}

async fn receive(communicator: &mut Communicator, rank: &Rank, root: u32) -> Result<()> {
    let stream = rank.device.stream("test")?;
    let op = CollectiveOp { root, buffer: HostBuffer::allocate(4 << 20)?.slice() };
    communicator.queue.enqueue(vec![op], &stream).await?.done(soon()).await
}

#[test]
fn a_member_whose_runtime_ends_is_named_to_those_who_wait_for_another() {
    let runtime =
        || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (here, there) = (runtime(), runtime());
    let place = Place::new();
    let ranks: Vec<Rank> = here.block_on(async { (0..2).map(|rank| place.rank(rank, "s")).collect() });
    let last = there.block_on(async { place.rank(2, "s") });
    let token = here.block_on(ranks[0].token());
    let two = there.spawn({
        let token = token.clone();
        async move {
            let mut two = last.join(&token, 2, 3, soon()).await?;
            receive(&mut two, &last, 0).await
        }
    });
    let (zero, one) = here.block_on(async {
        join(ranks[0].join(&token, 0, 3, soon()), ranks[1].join(&token, 1, 3, soon())).await
    });
    let (mut zero, mut one) = (zero.unwrap(), one.unwrap());
    let ends = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        there.shutdown_background();
    });
    let (at_zero, at_one) = here
        .block_on(async { join(receive(&mut zero, &ranks[0], 2), receive(&mut one, &ranks[1], 0)).await });
    for error in [at_zero.unwrap_err(), at_one.unwrap_err()] {
        assert_eq!((error.kind(), error.get(Key::Rank)), (ErrorKind::PeerLost, Some("2")), "{error}");
    }
    ends.join().unwrap();
    drop(two);
}

#[tokio::test]
async fn the_first_cause_reaches_every_member() {
    let place = Place::new();
    let ranks: Vec<Rank> = (0..3).map(|rank| place.rank(rank, "s")).collect();
    let mut group = Rank::group(&ranks).await;
    let cause = Error::new(ErrorKind::Backend, "worker", "out of memory").with(Key::Worker, "HOST-a-1");
    group[1].abort.abort(cause);
    for (communicator, rank) in group.iter_mut().zip(&ranks) {
        let error = receive(communicator, rank, 1).await.unwrap_err();
        assert_eq!(error.to_string(), "worker: out of memory [worker=HOST-a-1]");
    }
}

#[tokio::test]
async fn a_member_that_leaves_in_peace_poisons_nobody_until_it_is_needed() {
    let place = Place::new();
    let ranks: Vec<Rank> = (0..2).map(|rank| place.rank(rank, "s")).collect();
    let mut group = Rank::group(&ranks).await;
    let one = group.pop().unwrap();
    let mut zero = group.pop().unwrap();
    drop(one);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(zero.abort.poisoned().is_none());
    let error = receive(&mut zero, &ranks[0], 1).await.unwrap_err();
    assert_eq!((error.kind(), error.get(Key::Rank)), (ErrorKind::PeerLost, Some("1")), "{error}");
}

#[tokio::test]
async fn missing_members_are_named_and_nothing_is_left_behind() {
    let place = Place::new();
    let ranks: Vec<Rank> = (0..2).map(|rank| place.rank(rank, "s")).collect();
    let token = ranks[0].token().await;
    let deadline = Instant::now() + Duration::from_millis(300);
    let (zero, one) = join(ranks[0].join(&token, 0, 4, deadline), ranks[1].join(&token, 1, 4, soon())).await;
    let error = zero.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.message().contains("members 2, 3 did not join"), "{error}");
    // The root told the other, which had more time.
    assert!(one.unwrap_err().message().contains("members 2, 3 did not join"));
    let late = ranks[1].join(&token, 1, 4, soon()).await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::PeerLost);
    assert!(late.message().contains("given up"), "{late}");
}

#[tokio::test]
async fn members_that_do_not_fit_are_told_and_do_no_harm() {
    let place = Place::new();
    let ranks: Vec<Rank> = (0..2).map(|rank| place.rank(rank, "s")).collect();
    let (twin, stranger) = (place.rank(1, "s"), place.rank(1, "another secret"));
    let token = ranks[0].token().await;
    let root = ranks[0].join(&token, 0, 3, soon());
    let others = async {
        let error = ranks[1].join(&token, 1, 4, soon()).await.unwrap_err();
        assert!(error.message().contains("group of 3"), "{error}");
        let error = ranks[1].join_epoch(&token, 1, 3, 2, soon()).await.unwrap_err();
        assert!(error.message().contains("epoch 1"), "{error}");
        let error = stranger.join(&token, 1, 3, soon()).await.unwrap_err();
        assert!(error.message().contains("secrets differ"), "{error}");
        // Both come as number 1: one of them is refused, whichever is second.
        let (one, second) =
            (ranks[1].join(&token, 1, 3, soon()).boxed(), twin.join(&token, 1, 3, soon()).boxed());
        let (refused, first) = select(one, second).await.factor_first();
        let error = refused.unwrap_err();
        assert!(error.message().contains("another member has joined as number 1"), "{error}");
        let third = place.rank(2, "s");
        let (first, two) = join(first, third.join(&token, 2, 3, soon())).await;
        first.unwrap();
        two.unwrap();
    };
    let (root, ()) = join(root, others).await;
    root.unwrap();
}

#[tokio::test]
async fn garbage_on_the_port_does_no_harm() {
    let place = Place::new();
    let ranks: Vec<Rank> = (0..2).map(|rank| place.rank(rank, "s")).collect();
    let token = Token::decode(&ranks[0].token().await).unwrap();
    let mut open = Vec::new();
    for bytes in
        [&b""[..], b"GET / HTTP/1.1\r\n\r\n", b"ckpttcp\x01\xff\xff\xff\xff", b"ckpttcp\x01\x03\0\0\0abc"]
    {
        let mut stream = TcpStream::connect(token.root).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        open.push(stream);
    }
    let mut group = Rank::group(&ranks).await;
    let (mut one, mut zero) = (group.pop().unwrap(), group.pop().unwrap());
    let (a, b) = join(receive(&mut zero, &ranks[0], 0), receive(&mut one, &ranks[1], 0)).await;
    a.unwrap();
    b.unwrap();
}

#[tokio::test]
async fn an_address_that_nobody_can_reach_is_refused() {
    let place = Place::new();
    let device = place.rank(0, "s").device;
    let config = TransportConfig {
        bind: Ipv4Addr::UNSPECIFIED.into(),
        runtime_dir: place.folder.path().to_owned(),
        tls: false,
        secret: Vec::new(),
        connections: 1,
        device,
    };
    assert_eq!(TcpProvider.open(&config).unwrap_err().kind(), ErrorKind::ConfigInvalid);
}

#[tokio::test]
async fn a_reader_needs_the_secret_and_a_restarted_owner_is_noticed() {
    let place = Place::new();
    let (owner, stranger, reader) = (place.rank(0, "s"), place.rank(1, "t"), place.rank(1, "s"));
    let memory = HostBuffer::from_bytes(&[5; 100]).unwrap();
    let registration = owner.transport.one_sided().unwrap().register(memory).await.unwrap();
    let into = HostBuffer::allocate(100).unwrap();
    let read = |rank: &Rank| {
        let op = ReadOp { region: Arc::new(registration.region().clone()), offset: 0, into: into.slice() };
        rank.transport.one_sided().unwrap().post_read(vec![op], soon()).unwrap()
    };
    let error = read(&stranger).done(soon()).await.unwrap_err();
    assert!(error.message().contains("secrets differ"), "{error}");
    read(&reader).done(soon()).await.unwrap();
    // Another process on the same port would have another id.
    let mut region = registration.region().clone();
    let mut descriptor = region.descriptor.to_vec();
    descriptor[0] ^= 1;
    region.descriptor = descriptor.into();
    let op = ReadOp { region: Arc::new(region), offset: 0, into: into.slice() };
    let event = stranger.transport.one_sided().unwrap().post_read(vec![op], soon()).unwrap();
    let error = event.done(soon()).await.unwrap_err();
    assert!(error.message().contains("restarted"), "{error}");
    assert!(error.get(Key::Peer).is_some());
}

#[cfg(feature = "tls")]
#[tokio::test]
async fn sides_that_differ_in_tls_are_told_and_do_no_harm() {
    let (secret, other) = ("a secret that is long enough for TLS", "another one, as long, of another job");
    let place = Place::new();
    for (sealed, stranger, expected) in [
        (true, place.rank_with(1, secret, false), "the peer wants TLS"),
        (false, place.rank_with(1, secret, true), "the peer does not speak TLS"),
        (true, place.rank_with(1, other, true), "secrets differ"),
    ] {
        let ranks = [place.rank_with(0, secret, sealed), place.rank_with(1, secret, sealed)];
        assert_eq!(ranks[0].transport.capability().encrypts, sealed);
        let token = ranks[0].token().await;
        let root = ranks[0].join(&token, 0, 2, soon());
        let others = async {
            let error = stranger.join(&token, 1, 2, soon()).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConfigInvalid, "{error}");
            assert!(error.message().contains(expected), "{error}");
            ranks[1].join(&token, 1, 2, soon()).await.unwrap()
        };
        let (root, one) = join(root, others).await;
        let (mut root, mut one) = (root.unwrap(), one);
        let (a, b) = join(receive(&mut root, &ranks[0], 0), receive(&mut one, &ranks[1], 0)).await;
        a.unwrap();
        b.unwrap();
    }
}
