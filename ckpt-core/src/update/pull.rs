//! The pulling half of a P2P update: who receives, where the owners' memory is, and the reads of one bucket.

use std::{
    collections::{BTreeMap, HashMap, btree_map::Entry},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::{try_join, try_join_all};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::trace::{Stage, Trace};
use crate::{
    checkpoint::DigestAlgorithm,
    control::Member,
    device::{Buffer, BufferSlice, DeviceBackend, Event, MemoryKind, Ring, Stream, host::HostBuffer},
    error::{Error, ErrorKind, Key, Recovery, Result},
    manifest::{Arena, Tensor},
    metas::{Metas, RankMetas},
    plan::{Bucket, Location, Segment, UpdatePlan, choose_receivers},
    transport::{ReadOp, RemoteRegion, Transport},
    types::{Rank, align_up},
};

const OPERATION: &str = "pull weights";
/// Version of what stands under a transport's name in the metas; the first byte.
const FORMAT: u8 = 1;
/// A read ends by itself at its deadline and then says more than a wait that gives up.
const GRACE: Duration = Duration::from_secs(1);
/// Reads that a receiver has under way: enough to keep many owners' links busy at once. One that pulls more than others
/// has more of them, since owners' links serve all reads alike.
const READS_AT_ONCE: u64 = 32;
/// All receivers' reads under way fill this part of the ring. With more, late buckets would hold up early ones; with
/// less, owners that a bucket has little of would wait.
const PART_UNDER_WAY: u64 = 2;
/// No read is made smaller than this: its round trip would cost more than balance gains.
const MIN_READ_BYTES: u64 = 256 << 10;

/// What a P2P update needs besides plan and ring.
#[derive(Clone, Debug)]
pub(crate) struct Pull {
    pub(crate) metas: Arc<Metas>,
    /// The owners' numbers belong to another job.
    pub(crate) foreign: bool,
    pub(crate) reader: Arc<dyn Transport>,
    pub(crate) device: Arc<dyn DeviceBackend>,
    /// What was pulled is compared with the digests that its owner made.
    pub(crate) check: bool,
    /// Of this job's ranks, as far as they told each other.
    pub(crate) locations: BTreeMap<Rank, Location>,
}

impl Pull {
    /// The members that pull: the same on every member.
    pub(super) fn receivers(&self, members: &[Member]) -> Vec<Rank> {
        let place = |member: &Member| match self.locations.get(&member.rank) {
            Some(location) => location.clone(),
            None => Location { rank: member.rank, hca: String::new(), host: member.host.clone() },
        };
        let members: Vec<Location> = members.iter().map(place).collect();
        let owner = |(rank, metas): (&Rank, &RankMetas)| Location {
            rank: *rank,
            hca: metas.placement.rdma_device.clone(),
            host: host_of(metas),
        };
        let owners: Vec<Location> = self.metas.ranks.iter().map(owner).collect();
        choose_receivers(&members, &owners)
    }

    /// Finds the memory that `rank` pulls from. `None` if it pulls nothing.
    pub(super) fn puller(
        &self,
        plan: &UpdatePlan,
        rank: Rank,
        ring: &dyn Ring,
        trace: &Trace,
    ) -> Result<Option<Puller>> {
        let mut regions: BTreeMap<Rank, Vec<Arc<RemoteRegion>>> = BTreeMap::new();
        let mine = plan.buckets.iter().flat_map(|b| &b.segments).filter(|s| s.root == rank);
        for segment in mine {
            if regions.contains_key(&segment.owner) || self.is_own(rank, segment) {
                continue;
            }
            let metas = self.metas.ranks.get(&segment.owner).ok_or_else(|| {
                Error::new(ErrorKind::Internal, OPERATION, "the plan names an owner that the metas lack")
            })?;
            let of_owner = regions_of(metas, self.reader.name())
                .map_err(|e| e.with(Key::Rank, rank).with(Key::Peer, segment.owner))?;
            regions.insert(segment.owner, of_owner.into_iter().map(Arc::new).collect());
        }
        if regions.is_empty() {
            return Ok(None);
        }
        let memory = ring.buffer();
        let direct = memory.memory() != MemoryKind::Device
            || self.reader.capability().devices.contains(&self.device.kind());
        let staging = if direct { None } else { Some(staging(&*self.device, memory.len_bytes())?) };
        let mut loads: BTreeMap<Rank, u128> = BTreeMap::new();
        for segment in plan.buckets.iter().flat_map(|b| &b.segments) {
            *loads.entry(segment.root).or_default() += u128::from(segment.len_bytes);
        }
        let reads = READS_AT_ONCE * loads.len() as u64;
        let (own, all) = (loads.get(&rank).copied().unwrap_or(0), loads.values().sum::<u128>().max(1));
        let reads_at_once = ((own * u128::from(reads) + all / 2) / all).max(1) as usize;
        Ok(Some(Puller {
            read_bytes: (plan.ring_bytes / PART_UNDER_WAY / reads).max(MIN_READ_BYTES),
            places: Arc::new(Semaphore::new(reads_at_once)),
            rank,
            pull: self.clone(),
            regions: Mutex::new(regions),
            given_up: Mutex::default(),
            has_replicas: plan.tensor_count()
                < self.metas.ranks.values().map(|m| m.share.tensors().count() as u64).sum(),
            holders: OnceLock::new(),
            memory,
            staging,
            trace: trace.clone(),
        }))
    }

    /// Whether `rank` holds the segment itself: then it is copied, not pulled.
    pub(super) fn is_own(&self, rank: Rank, segment: &Segment) -> bool {
        !self.foreign && segment.owner == rank
    }
}

fn host_of(metas: &RankMetas) -> String {
    if let Some(extension) = &metas.placement.extension {
        return extension.host.clone();
    }
    // checkpoint-engine's own instances: `10.0.0.1:15428`.
    let address = metas.placement.p2p_store_addr.as_deref().unwrap_or_default();
    address.rsplit_once(':').map_or(address, |(host, _)| host).to_owned()
}

/// Pinned memory of the ring's size, so that every segment has the same place in both.
fn staging(device: &dyn DeviceBackend, len_bytes: u64) -> Result<Arc<dyn Buffer>> {
    match device.own_host_memory(len_bytes)? {
        Some(memory) => Ok(memory),
        None => device.pin(HostBuffer::allocate(len_bytes)?),
    }
}

/// What a transport needs to reach a rank's arenas, in their order: stands in the metas under the transport's name.
pub(crate) fn encode_regions<'a>(regions: impl Iterator<Item = &'a RemoteRegion>) -> Result<Bytes> {
    let regions: Vec<&RemoteRegion> = regions.collect();
    postcard::to_extend(&regions, vec![FORMAT]).map(Bytes::from).map_err(|e| {
        Error::new(ErrorKind::Internal, "describe memory", "the regions cannot be encoded").caused_by(e)
    })
}

/// A rank's regions as `transport` reads them, one for each arena.
pub(crate) fn regions_of(metas: &RankMetas, transport: &str) -> Result<Vec<RemoteRegion>> {
    let corrupt = |what: &str| {
        Error::new(ErrorKind::Corrupt, OPERATION, format!("the owner's metas are damaged: {what}"))
    };
    let placement = &metas.placement;
    let descriptors = placement.extension.as_ref().map(|e| &e.descriptors);
    let regions = match descriptors.and_then(|d| d.get(transport)).map(|bytes| bytes.split_first()) {
        Some(Some((&FORMAT, rest))) => match postcard::take_from_bytes::<Vec<RemoteRegion>>(rest) {
            Ok((regions, [])) => regions,
            Ok(_) => return Err(corrupt("they have a tail")),
            Err(e) => return Err(corrupt("they cannot be parsed").caused_by(e)),
        },
        Some(Some((format, _))) => {
            return Err(Error::new(
                ErrorKind::Unsupported,
                OPERATION,
                format!(
                    "the owner describes its memory in format {format}, this version reads {FORMAT}; run the same version"
                ),
            ));
        }
        Some(None) => return Err(corrupt("a description is empty")),
        None => match (&placement.p2p_store_addr, transport) {
            // An instance of checkpoint-engine itself: addresses are all there is.
            (Some(address), "mooncake") => (metas.share.arenas.iter().zip(&placement.arena_addresses))
                .map(|(arena, start)| RemoteRegion {
                    peer: address.clone(),
                    address: *start,
                    len_bytes: arena.len_bytes,
                    generation: 0,
                    descriptor: Bytes::new(),
                })
                .collect(),
            _ => return Err(not_served(transport, descriptors.into_iter().flat_map(|d| d.keys()))),
        },
    };
    let arenas = metas.share.arenas.iter().zip(&placement.arena_addresses);
    let fits = regions.len() == metas.share.arenas.len()
        && regions
            .iter()
            .zip(arenas)
            .all(|(region, (arena, start))| region.address == *start && region.len_bytes >= arena.len_bytes);
    if fits { Ok(regions) } else { Err(corrupt("regions and arenas differ")) }
}

fn not_served<'a>(transport: &str, others: impl Iterator<Item = &'a String>) -> Error {
    let others: Vec<&str> = others.map(String::as_str).collect();
    let what = if others.is_empty() {
        "its memory cannot be read by anybody; its log says why".to_owned()
    } else {
        format!("it serves {}; choose one of these with --transport", others.join(", "))
    };
    Error::new(
        ErrorKind::Unsupported,
        OPERATION,
        format!("the owner does not serve its memory over transport `{transport}`: {what}"),
    )
}

/// Where else a tensor is.
#[derive(Clone, Copy, Debug)]
struct Holder {
    rank: Rank,
    arena: u32,
    offset: u64,
    digest: Option<(DigestAlgorithm, u64)>,
}

/// A range of a tensor that is to be read from some holder of it.
#[derive(Clone, Debug)]
struct Piece {
    name: Arc<str>,
    digest: Option<(DigestAlgorithm, u64)>,
    /// Bytes from the tensor's start.
    from: u64,
    into: BufferSlice,
}

/// One receiver's reads.
#[derive(Debug)]
pub(super) struct Puller {
    rank: Rank,
    pull: Pull,
    /// Of the owners in the plan, and of others once they are needed.
    regions: Mutex<BTreeMap<Rank, Vec<Arc<RemoteRegion>>>>,
    /// Owners that have failed in this update, and why.
    given_up: Mutex<BTreeMap<Rank, Error>>,
    /// Some tensors have more than one holder.
    has_replicas: bool,
    /// Every holder of every tensor; made when an owner fails.
    holders: OnceLock<HashMap<Arc<str>, Vec<Holder>>>,
    memory: Arc<dyn Buffer>,
    /// Where the bytes go first, if the transport cannot read into the device's memory.
    staging: Option<Arc<dyn Buffer>>,
    /// No read is larger.
    read_bytes: u64,
    /// Those of the reads that may be under way.
    places: Arc<Semaphore>,
    trace: Trace,
}

/// Parts of one owner's memory that are read at once, and the place among those under way that they wait for.
struct Slice {
    parts: Vec<Part>,
    place: oneshot::Receiver<OwnedSemaphorePermit>,
}

/// Bytes of one segment.
struct Part {
    arena: u32,
    offset: u64,
    into: BufferSlice,
}

impl Puller {
    /// Whether this rank pulls the segment.
    pub(super) fn pulls(&self, segment: &Segment) -> bool {
        segment.root == self.rank && !self.pull.is_own(self.rank, segment)
    }

    /// Pulls this rank's segments of `bucket`. Returns when the bytes are here; with an event to wait for if `h2d` has
    /// still to take them into the ring. The ring's bytes must be free.
    ///
    /// Owners take turns, so that whatever is under way has a part of each; `turn` is dropped when the last read has a
    /// place among those under way, and the next bucket may begin.
    ///
    /// An owner that cannot be read, or whose bytes are not those that it registered, is given up: what else holds the
    /// same tensors is read instead.
    pub(super) async fn pull(
        &self,
        bucket: &Bucket,
        number: u32,
        h2d: &dyn Stream,
        limit: Duration,
        turn: OwnedSemaphorePermit,
    ) -> Result<Option<Event>> {
        let deadline = Instant::now() + limit;
        let into = self.staging.as_ref().unwrap_or(&self.memory);
        let mut owners: BTreeMap<Rank, Vec<(&Segment, BufferSlice)>> = BTreeMap::new();
        let mut copies = Vec::new();
        for segment in bucket.segments.iter().filter(|s| self.pulls(s) && s.len_bytes > 0) {
            let range = segment.ring_offset..segment.ring_offset + segment.len_bytes;
            let into = BufferSlice::new(into.clone(), range.clone())?;
            if self.staging.is_some() {
                copies.push((into.clone(), BufferSlice::new(self.memory.clone(), range)?));
            }
            owners.entry(segment.owner).or_default().push((segment, into));
        }
        tracing::debug!(rank = self.rank, owners = ?owners.keys(), "pulling a bucket");
        // By owner, so that a failure names it.
        let mut each = Vec::with_capacity(owners.len());
        let mut waiting = Vec::new();
        for (owner, parts) in owners {
            let slices = self.slices(owner, &parts, &mut waiting)?;
            each.push(self.bring(owner, parts, slices, number, deadline));
        }
        waiting.sort_by_key(|(middle, owner, _)| (*middle, *owner));
        let give_places = async {
            for (_, _, slice) in waiting {
                let place = self.places.clone().acquire_owned().await.map_err(|e| {
                    Error::new(ErrorKind::Internal, OPERATION, "the places are gone").caused_by(e)
                })?;
                // An owner that was given up meanwhile reads no more of them.
                let _ = slice.send(place);
            }
            drop(turn);
            Ok::<(), Error>(())
        };
        try_join(give_places, try_join_all(each)).await?;
        if self.memory.memory() == MemoryKind::Device && self.staging.is_none() {
            self.pull.device.flush_remote_writes()?;
        }
        if copies.is_empty() {
            return Ok(None);
        }
        copies.into_iter().try_for_each(|(from, to)| h2d.copy(from, to))?;
        h2d.record().map(Some)
    }

    /// Cuts what comes from one owner into reads of about equal size. `waiting` gets who waits for a place, with where in
    /// the bucket's bytes of this owner the read is.
    fn slices(
        &self,
        owner: Rank,
        parts: &[(&Segment, BufferSlice)],
        waiting: &mut Vec<(u64, Rank, oneshot::Sender<OwnedSemaphorePermit>)>,
    ) -> Result<Vec<Slice>> {
        let all: u64 = parts.iter().map(|(segment, _)| segment.len_bytes).sum();
        let count = all.div_ceil(self.read_bytes).max(1);
        let each = align_up(all.div_ceil(count));
        let mut slices: Vec<Slice> = Vec::new();
        let mut left = 0;
        for (segment, into) in parts {
            let mut start = 0;
            while start < segment.len_bytes {
                if left == 0 {
                    let (tell, place) = oneshot::channel();
                    waiting.push((((2 * slices.len() as u64 + 1) << 32) / (2 * count), owner, tell));
                    slices.push(Slice { parts: Vec::new(), place });
                    left = each;
                }
                let len = left.min(segment.len_bytes - start);
                let part = Part {
                    arena: segment.arena,
                    offset: segment.arena_offset + start,
                    into: into.slice(start..start + len)?,
                };
                if let Some(slice) = slices.last_mut() {
                    slice.parts.push(part);
                }
                start += len;
                left -= len;
            }
        }
        Ok(slices)
    }

    /// The segments of one owner, from it or from somebody else.
    async fn bring(
        &self,
        owner: Rank,
        parts: Vec<(&Segment, BufferSlice)>,
        slices: Vec<Slice>,
        bucket: u32,
        deadline: Instant,
    ) -> Result<()> {
        let known = lock(&self.given_up).get(&owner).cloned();
        let cause = match known {
            Some(cause) => {
                drop(slices);
                cause
            }
            None => {
                let replaceable = parts.iter().all(|(segment, _)| self.is_replaceable(segment));
                let left = deadline.saturating_duration_since(Instant::now());
                // What is to be read from somebody else needs time, too.
                let until = if replaceable { Instant::now() + left / 2 } else { deadline };
                match self.read_owner(owner, &parts, slices, bucket, until).await {
                    Ok(()) => return Ok(()),
                    Err(cause) if !replaceable => return Err(cause),
                    Err(cause) => {
                        tracing::warn!(rank = self.rank, owner, error = %cause, "reading from other holders instead");
                        lock(&self.given_up).insert(owner, cause.clone());
                        cause
                    }
                }
            }
        };
        let mut pieces = Vec::new();
        for (segment, into) in &parts {
            self.pieces(segment, into, &mut pieces)?;
        }
        self.read_others(pieces, deadline, cause).await?;
        self.check(owner, &parts, bucket).await
    }

    async fn read_owner(
        &self,
        owner: Rank,
        parts: &[(&Segment, BufferSlice)],
        slices: Vec<Slice>,
        bucket: u32,
        deadline: Instant,
    ) -> Result<()> {
        let read = |Slice { parts, place }: Slice| async move {
            let place = place.await;
            let op = |Part { arena, offset, into }: Part| {
                Ok(ReadOp { region: self.region(owner, arena)?, offset, into })
            };
            let ops = parts.into_iter().map(op).collect::<Result<Vec<_>>>()?;
            let outcome = self.read(owner, ops, deadline).await;
            drop(place);
            outcome
        };
        try_join_all(slices.into_iter().map(read)).await?;
        self.check(owner, parts, bucket).await
    }

    async fn read(&self, owner: Rank, ops: Vec<ReadOp>, deadline: Instant) -> Result<()> {
        let Some(one_sided) = self.pull.reader.one_sided() else {
            return Err(Error::new(ErrorKind::Internal, OPERATION, "the transport lost its one-sided facet"));
        };
        let event = one_sided.post_read(ops, deadline).map_err(|e| self.blame(owner, e))?;
        event.done(deadline + GRACE).await.map_err(|e| self.blame(owner, e))
    }

    fn region(&self, owner: Rank, arena: u32) -> Result<Arc<RemoteRegion>> {
        let mut regions = lock(&self.regions);
        if let Entry::Vacant(vacant) = regions.entry(owner) {
            let metas = self.pull.metas.ranks.get(&owner).ok_or_else(not_looked_up)?;
            let found = regions_of(metas, self.pull.reader.name()).map_err(|e| e.with(Key::Rank, owner))?;
            vacant.insert(found.into_iter().map(Arc::new).collect());
        }
        regions.get(&owner).and_then(|r| r.get(arena as usize)).cloned().ok_or_else(not_looked_up)
    }

    // ---- other holders ----

    fn arena(&self, segment: &Segment) -> Option<&Arena> {
        self.pull.metas.ranks.get(&segment.owner)?.share.arenas.get(segment.arena as usize)
    }

    /// The tensors of which some bytes are in the segment.
    fn tensors(&self, segment: &Segment) -> &[Tensor] {
        let tensors = self.arena(segment).map_or(&[][..], |arena| &arena.tensors);
        let (start, end) = (segment.arena_offset, segment.arena_offset + segment.len_bytes);
        let first = tensors.partition_point(|t| t.offset + t.meta.len_bytes() <= start);
        let last = tensors.partition_point(|t| t.offset < end);
        tensors.get(first..last).unwrap_or_default()
    }

    fn holders(&self) -> &HashMap<Arc<str>, Vec<Holder>> {
        self.holders.get_or_init(|| {
            let mut holders: HashMap<Arc<str>, Vec<Holder>> = HashMap::new();
            for (rank, metas) in &self.pull.metas.ranks {
                let digests = metas.placement.extension.as_ref().and_then(|e| e.digests.as_ref());
                let mut digests =
                    digests.map(|d| d.values.iter().map(|v| (d.algorithm, *v))).into_iter().flatten();
                for (arena, tensor) in
                    (0..).zip(&metas.share.arenas).flat_map(|(i, a)| a.tensors.iter().map(move |t| (i, t)))
                {
                    let holder = Holder { rank: *rank, arena, offset: tensor.offset, digest: digests.next() };
                    holders.entry(tensor.meta.name.clone()).or_default().push(holder);
                }
            }
            holders
        })
    }

    /// Whether somebody else holds each of the segment's tensors.
    fn is_replaceable(&self, segment: &Segment) -> bool {
        let others = |tensor: &Tensor| {
            let name = &tensor.meta.name;
            self.holders().get(name).is_some_and(|h| h.len() > 1)
        };
        self.has_replicas && self.tensors(segment).iter().all(others)
    }

    /// What of which tensors makes up the segment.
    fn pieces(&self, segment: &Segment, into: &BufferSlice, pieces: &mut Vec<Piece>) -> Result<()> {
        let end = segment.arena_offset + segment.len_bytes;
        for tensor in self.tensors(segment) {
            let from = tensor.offset.max(segment.arena_offset);
            let until = (tensor.offset + tensor.meta.len_bytes()).min(end);
            if from >= until {
                continue;
            }
            let holders = self.holders().get(&tensor.meta.name).into_iter().flatten();
            let mut of_owner = holders.filter(|h| h.rank == segment.owner);
            let at = from - segment.arena_offset;
            pieces.push(Piece {
                name: tensor.meta.name.clone(),
                digest: of_owner.next().and_then(|h| h.digest),
                from: from - tensor.offset,
                into: into.slice(at..at + (until - from))?,
            });
        }
        Ok(())
    }

    /// Reads each piece from the first holder that gives it; `cause` is why the owner does not.
    async fn read_others(&self, mut pieces: Vec<Piece>, deadline: Instant, mut cause: Error) -> Result<()> {
        while !pieces.is_empty() {
            let mut batches: BTreeMap<Rank, (Vec<ReadOp>, Vec<Piece>)> = BTreeMap::new();
            for piece in pieces.drain(..) {
                let given_up = lock(&self.given_up);
                let fits = |h: &&Holder| {
                    let same = match (h.digest, piece.digest) {
                        (Some(a), Some(b)) if a.0 == b.0 => a.1 == b.1,
                        _ => true,
                    };
                    same && !given_up.contains_key(&h.rank)
                };
                let holder = self.holders().get(&piece.name).into_iter().flatten().find(fits).copied();
                drop(given_up);
                let Some(holder) = holder else { return Err(cause.with(Key::Tensor, &piece.name)) };
                let region = self.region(holder.rank, holder.arena)?;
                let op = ReadOp { region, offset: holder.offset + piece.from, into: piece.into.clone() };
                let (ops, of) = batches.entry(holder.rank).or_default();
                ops.push(op);
                of.push(piece);
            }
            for (rank, (ops, of)) in batches {
                if let Err(error) = self.read(rank, ops, deadline).await {
                    // Each holder is tried once, so this ends.
                    lock(&self.given_up).insert(rank, error.clone());
                    cause = error;
                    pieces.extend(of);
                }
            }
        }
        Ok(())
    }

    // ---- proof ----

    /// Compares the tensors that are whole in these segments with the digests that their owner made when it registered
    /// them. Those that are cut between receivers are whole nowhere before the broadcast.
    async fn check(&self, owner: Rank, parts: &[(&Segment, BufferSlice)], bucket: u32) -> Result<()> {
        let metas = self.pull.metas.ranks.get(&owner);
        let digests = metas.and_then(|m| Some((m, m.placement.extension.as_ref()?.digests.as_ref()?)));
        let Some((metas, digests)) = digests.filter(|_| self.pull.check) else { return Ok(()) };
        if parts.iter().any(|(_, into)| into.buffer().memory() == MemoryKind::Device) {
            return Ok(());
        }
        let checking = self.trace.begin(Stage::Check, Some(bucket));
        let mut jobs: Vec<(Arc<str>, u64, BufferSlice)> = Vec::new();
        for (segment, into) in parts {
            let before: usize =
                metas.share.arenas.iter().take(segment.arena as usize).map(|a| a.tensors.len()).sum();
            let end = segment.arena_offset + segment.len_bytes;
            let tensors = self.arena(segment).map_or(&[][..], |arena| &arena.tensors);
            for index in segment.tensors.clone() {
                let (Some(tensor), Some(digest)) =
                    (tensors.get(index as usize), digests.values.get(before + index as usize))
                else {
                    continue;
                };
                let len = tensor.meta.len_bytes();
                let Some(at) =
                    tensor.offset.checked_sub(segment.arena_offset).filter(|_| tensor.offset + len <= end)
                else {
                    continue;
                };
                jobs.push((tensor.meta.name.clone(), *digest, into.slice(at..at + len)?));
            }
        }
        let algorithm = digests.algorithm;
        let compared = tokio::task::spawn_blocking(move || -> Result<Option<Arc<str>>> {
            for (name, digest, slice) in jobs {
                // SAFETY: the read into these bytes has ended, and nothing else writes them until their bucket is freed.
                if algorithm.digest(unsafe { slice.as_slice() }?) != digest {
                    return Ok(Some(name));
                }
            }
            Ok(None)
        });
        let wrong = compared.await.map_err(|e| {
            Error::new(ErrorKind::Internal, OPERATION, "the comparison panicked").caused_by(e)
        })??;
        let Some(name) = wrong else {
            checking.end();
            return Ok(());
        };
        drop(checking);
        let whose = if self.pull.foreign { "the sender's rank" } else { "rank" };
        Err(Error::new(
            ErrorKind::Corrupt,
            OPERATION,
            format!(
                "a tensor that was pulled from {whose} {owner} does not have the {algorithm} digest of its registration; \
                 its memory was changed or the network is faulty: register the checkpoint again"
            ),
        )
        .with(Key::Tensor, name)
        .with(Key::Rank, self.rank)
        .with(Key::Host, host_of(metas)))
    }

    /// Names the owner. Not under [`Key::Peer`]: that is for members, whose own words the hub would wait for.
    fn blame(&self, owner: Rank, cause: Error) -> Error {
        let host = self.pull.metas.ranks.get(&owner).map(host_of).unwrap_or_default();
        let whose = if self.pull.foreign { "owner (the sender's rank " } else { "owner (rank " };
        let (kind, what) = match cause.kind() {
            ErrorKind::Aborted => (
                ErrorKind::Unavailable,
                "has re-registered or released this memory since its metas were made; gather or load metas again",
            ),
            ErrorKind::PeerLost => {
                (ErrorKind::PeerLost, "cannot be reached or has ended; see its log, then load new metas")
            }
            ErrorKind::Timeout => (
                ErrorKind::Timeout,
                "did not send its bytes in time; see its host, or allow more with --bucket-timeout",
            ),
            kind => (kind, "refused a read of its memory"),
        };
        let recovery = if kind == ErrorKind::Unavailable { Recovery::Retry } else { cause.recovery() };
        Error::new(kind, OPERATION, format!("the {whose}{owner}) {what}"))
            .recovery_is(recovery)
            .with(Key::Rank, self.rank)
            .with(Key::Host, host)
            .caused_by(cause)
    }
}

fn not_looked_up() -> Error {
    Error::new(ErrorKind::Internal, OPERATION, "the plan names memory that the metas lack")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Maps stay whole whatever happened to the last holder.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
