//! The pulling half of a P2P update: who receives, where the owners' memory is, and the reads of one bucket.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;

use crate::{
    control::Member,
    device::{Buffer, BufferSlice, DeviceBackend, Event, MemoryKind, Ring, Stream, host::HostBuffer},
    error::{Error, ErrorKind, Key, Recovery, Result},
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
    pub(super) fn puller(&self, plan: &UpdatePlan, rank: Rank, ring: &dyn Ring) -> Result<Option<Puller>> {
        let mut regions = BTreeMap::new();
        let mine = plan.buckets.iter().flat_map(|b| &b.segments).filter(|s| s.root == rank);
        for segment in mine {
            if regions.contains_key(&(segment.owner, segment.arena)) || self.is_own(rank, segment) {
                continue;
            }
            let metas = self.metas.ranks.get(&segment.owner).ok_or_else(|| {
                Error::new(ErrorKind::Internal, OPERATION, "the plan names an owner that the metas lack")
            })?;
            let of_owner = regions_of(metas, self.reader.name())
                .map_err(|e| e.with(Key::Rank, rank).with(Key::Peer, segment.owner))?;
            for (arena, region) in (0..).zip(of_owner) {
                regions.insert((segment.owner, arena), Arc::new(region));
            }
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
        let read_bytes = (plan.ring_bytes / PART_UNDER_WAY / reads).max(MIN_READ_BYTES);
        Ok(Some(Puller { rank, pull: self.clone(), regions, memory, staging, read_bytes, reads_at_once }))
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

/// One receiver's reads.
#[derive(Debug)]
pub(super) struct Puller {
    rank: Rank,
    pull: Pull,
    regions: BTreeMap<(Rank, u32), Arc<RemoteRegion>>,
    memory: Arc<dyn Buffer>,
    /// Where the bytes go first, if the transport cannot read into the device's memory.
    staging: Option<Arc<dyn Buffer>>,
    /// No read is larger.
    read_bytes: u64,
    /// So many may be under way.
    pub(super) reads_at_once: usize,
}

/// A batch of bytes of one owner, so that a failure names it.
#[derive(Debug)]
pub(super) struct Read {
    owner: Rank,
    ops: Vec<ReadOp>,
}

impl Puller {
    /// Whether this rank pulls the segment.
    pub(super) fn pulls(&self, segment: &Segment) -> bool {
        segment.root == self.rank && !self.pull.is_own(self.rank, segment)
    }

    fn segments<'a>(&'a self, bucket: &'a Bucket) -> impl Iterator<Item = &'a Segment> {
        bucket.segments.iter().filter(|s| self.pulls(s) && s.len_bytes > 0)
    }

    /// The reads of this rank's segments of `bucket`, in the order in which they should be posted: owners take turns, so
    /// that whatever is under way has a part of each. The ring's bytes must be free.
    pub(super) fn reads(&self, bucket: &Bucket) -> Result<Vec<Read>> {
        let into = self.staging.as_ref().unwrap_or(&self.memory);
        let mut owners: BTreeMap<Rank, Vec<&Segment>> = BTreeMap::new();
        for segment in self.segments(bucket) {
            owners.entry(segment.owner).or_default().push(segment);
        }
        tracing::debug!(rank = self.rank, owners = ?owners.keys(), "pulling a bucket");
        let mut reads: Vec<(u64, Read)> = Vec::new();
        for (owner, segments) in owners {
            let count = segments.iter().map(|s| s.len_bytes).sum::<u64>().div_ceil(self.read_bytes);
            let each = align_up(segments.iter().map(|s| s.len_bytes).sum::<u64>().div_ceil(count));
            let mut left = 0;
            for segment in segments {
                let region = self.regions.get(&(owner, segment.arena)).ok_or_else(|| {
                    Error::new(ErrorKind::Internal, OPERATION, "a segment's memory was not looked up")
                })?;
                let mut start = 0;
                while start < segment.len_bytes {
                    if left == 0 {
                        let number = reads.iter().filter(|(_, read)| read.owner == owner).count() as u64;
                        let middle = ((2 * number + 1) << 32) / (2 * count);
                        reads.push((middle, Read { owner, ops: Vec::new() }));
                        left = each;
                    }
                    let len_bytes = left.min(segment.len_bytes - start);
                    let place = segment.ring_offset + start;
                    let op = ReadOp {
                        region: region.clone(),
                        offset: segment.arena_offset + start,
                        into: BufferSlice::new(into.clone(), place..place + len_bytes)?,
                    };
                    if let Some((_, read)) = reads.last_mut() {
                        read.ops.push(op);
                    }
                    start += len_bytes;
                    left -= len_bytes;
                }
            }
        }
        reads.sort_by_key(|(middle, read)| (*middle, read.owner));
        Ok(reads.into_iter().map(|(_, read)| read).collect())
    }

    /// Posts `read` and waits for its bytes.
    pub(super) async fn read(&self, Read { owner, ops }: Read, limit: Duration) -> Result<()> {
        let Some(one_sided) = self.pull.reader.one_sided() else {
            return Err(Error::new(ErrorKind::Internal, OPERATION, "the transport lost its one-sided facet"));
        };
        let deadline = Instant::now() + limit;
        let read = async { one_sided.post_read(ops, deadline)?.done(deadline + GRACE).await };
        read.await.map_err(|e| self.blame(owner, e))
    }

    /// After all reads of `bucket`: makes their bytes visible in the ring, or has `h2d` take them there and answers what
    /// to wait for.
    pub(super) fn settle(&self, bucket: &Bucket, h2d: &dyn Stream) -> Result<Option<Event>> {
        let Some(staging) = &self.staging else {
            if self.memory.memory() == MemoryKind::Device {
                self.pull.device.flush_remote_writes()?;
            }
            return Ok(None);
        };
        for segment in self.segments(bucket) {
            let range = segment.ring_offset..segment.ring_offset + segment.len_bytes;
            let from = BufferSlice::new(staging.clone(), range.clone())?;
            h2d.copy(from, BufferSlice::new(self.memory.clone(), range)?)?;
        }
        h2d.record().map(Some)
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
