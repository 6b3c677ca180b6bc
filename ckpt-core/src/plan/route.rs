//! Who pulls what in a P2P update.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
};

use super::{Bucket, Segment};
use crate::{
    manifest::Manifest,
    types::{Rank, align_up},
};

/// A segment larger than a receiver's fair share divided by this is cut, so that loads end within 2% of each other.
const PIECES_OF_FAIR_SHARE: u64 = 50;
/// No pull is larger, so that one slow pull cannot hold up a bucket for long.
const MAX_PULL_BYTES: u64 = 256 << 20;
/// No cut is made below this: the pull's latency would cost more than balance gains.
const MIN_PULL_BYTES: u64 = 64 << 10;
/// Segments above it are cut so that all receivers pull a part; below, cuts are made only for balance.
const EFFICIENT_PULL_BYTES: u64 = 4 << 20;
/// Bounds the plan's size whatever a tensor's size is.
const MAX_PIECES: u64 = 4096;

/// Where a rank is in the network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The rank.
    pub rank: Rank,
    /// The HCAs that it uses as its metas name them, `mlx5_0`, `mlx5_0,mlx5_1` or nothing.
    pub hca: String,
    /// Its host's address.
    pub host: String,
}

/// The members that should pull in a P2P update, ascending.
///
/// Ranks with the same HCAs on the same host share their links, so one of them is enough: the lowest. No more of these
/// groups receive than there are groups of owners, since the others would only wait for the owners' links. A rank with
/// twice as many HCAs as another is named twice: it pulls twice as much.
pub fn choose_receivers(members: &[Location], owners: &[Location]) -> Vec<Rank> {
    let mut lowest: BTreeMap<(&str, &str), Rank> = BTreeMap::new();
    for member in members {
        let rank = lowest.entry((&member.hca, &member.host)).or_insert(member.rank);
        *rank = member.rank.min(*rank);
    }
    let owner_groups: BTreeSet<(&str, &str)> =
        owners.iter().map(|o| (o.hca.as_str(), o.host.as_str())).collect();
    let mut receivers: Vec<(Rank, usize)> =
        lowest.into_iter().map(|((hca, _), rank)| (rank, hca.split(',').count())).collect();
    receivers.sort_unstable();
    receivers.dedup_by_key(|(rank, _)| *rank);
    receivers.truncate(owner_groups.len().max(1));
    let fewest = receivers.iter().map(|(_, links)| *links).min().unwrap_or(1);
    receivers.into_iter().flat_map(|(rank, links)| std::iter::repeat_n(rank, links / fewest)).collect()
}

/// Gives every segment a receiver as its root, after cutting large ones at multiples of the alignment.
///
/// The next segment goes to the receiver with the fewest bytes so far, so loads are even at every point of the plan and
/// neighbouring segments are pulled by different receivers at the same time.
pub(super) fn route(buckets: &mut [Bucket], receivers: &[Rank], manifest: &Manifest) {
    let total: u64 = buckets.iter().flat_map(|b| &b.segments).map(|s| s.len_bytes).sum();
    let count = receivers.len() as u64;
    // By number and not by rank: a rank that is named twice has two places.
    let mut loads: BinaryHeap<Reverse<(u64, usize)>> =
        (0..receivers.len()).map(|number| Reverse((0, number))).collect();
    for bucket in buckets {
        let pieces = |s: &Segment| pieces(s.len_bytes, total, count);
        if bucket.segments.iter().any(|s| pieces(s) > 1) {
            bucket.segments = bucket.segments.iter().flat_map(|s| cut(s, pieces(s), manifest)).collect();
        }
        for segment in &mut bucket.segments {
            if let Some(mut least) = loads.peek_mut() {
                segment.root = receivers[least.0.1];
                least.0.0 += segment.len_bytes;
            }
        }
    }
}

/// Into how many pieces a segment is cut.
fn pieces(len_bytes: u64, total: u64, receivers: u64) -> u64 {
    if receivers < 2 {
        return 1;
    }
    let largest = (total / receivers / PIECES_OF_FAIR_SHARE).clamp(MIN_PULL_BYTES, MAX_PULL_BYTES);
    let useful = len_bytes.div_ceil(receivers).max(EFFICIENT_PULL_BYTES);
    len_bytes.div_ceil(useful.min(largest)).clamp(1, MAX_PIECES)
}

fn cut<'a>(segment: &'a Segment, pieces: u64, manifest: &'a Manifest) -> impl Iterator<Item = Segment> + 'a {
    // All but the last end on the alignment, so that each starts on it in the ring.
    let piece_bytes = align_up(segment.len_bytes.div_ceil(pieces)).max(1);
    let pieces = segment.len_bytes.div_ceil(piece_bytes).max(1);
    let tensors = manifest
        .shares
        .get(&segment.owner)
        .and_then(|share| share.arenas.get(segment.arena as usize))
        .and_then(|arena| arena.tensors.get(segment.tensors.start as usize..segment.tensors.end as usize))
        .unwrap_or_default();
    let mut first = segment.tensors.start;
    (0..pieces).map(move |piece| {
        let start = piece * piece_bytes;
        let len_bytes = piece_bytes.min(segment.len_bytes - start);
        let arena_end = segment.arena_offset + start + len_bytes;
        let end = if piece + 1 == pieces {
            segment.tensors.end
        } else {
            segment.tensors.start + tensors.partition_point(|t| t.offset < arena_end) as u32
        };
        let starts_here = first..end;
        first = end;
        Segment {
            arena_offset: segment.arena_offset + start,
            ring_offset: segment.ring_offset + start,
            len_bytes,
            tensors: starts_here,
            ..segment.clone()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(rank: Rank, hca: &str, host: &str) -> Location {
        Location { rank, hca: hca.into(), host: host.into() }
    }

    #[test]
    fn one_receiver_for_each_link() {
        let members = [
            at(7, "mlx5_0", "b"),
            at(4, "mlx5_1", "a"),
            at(5, "mlx5_0", "a"),
            at(3, "mlx5_0", "a"),
            at(6, "", "b"),
        ];
        let owners = [at(0, "x", "c"), at(1, "y", "c"), at(2, "y", "c")];
        assert_eq!(choose_receivers(&members, &owners), [3, 4]);
        assert_eq!(choose_receivers(&members, &[]), [3]);
        assert_eq!(choose_receivers(&members, &members), [3, 4, 6, 7]);
        assert_eq!(choose_receivers(&[], &owners), [] as [Rank; 0]);
    }

    #[test]
    fn who_has_more_links_is_named_more_often() {
        let members = [at(1, "mlx5_0", "a"), at(2, "mlx5_1,mlx5_2,mlx5_3", "a"), at(3, "mlx5_0,mlx5_1", "b")];
        assert_eq!(choose_receivers(&members, &members), [1, 2, 2, 2, 3, 3]);
        assert_eq!(choose_receivers(&members[1..], &members), [2, 3], "a half of a link is none");
        assert_eq!(choose_receivers(&members[2..], &members), [3]);
    }

    #[test]
    fn pieces_are_bounded() {
        const GIB: u64 = 1 << 30;
        assert_eq!(pieces(0, GIB, 4), 1);
        assert_eq!(pieces(GIB, 2 * GIB, 1), 1, "nobody to share with");
        assert_eq!(pieces(2 * GIB, 1024 * GIB, 16), 16);
        assert_eq!(pieces(10 << 20, 1024 * GIB, 16), 3);
        let largest = 64 * GIB / 4 / 50;
        assert_eq!(pieces(GIB, 64 * GIB, 4), GIB.div_ceil(largest.min(MAX_PULL_BYTES)));
        assert_eq!(pieces(1 << 60, 1 << 60, 16), MAX_PIECES);
    }
}
