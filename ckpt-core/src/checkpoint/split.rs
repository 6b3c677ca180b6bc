//! Which rank holds which tensors: contiguous ranges of nearly equal bytes.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};

/// Cuts a list of tensor sizes into `world_size` contiguous ranges, one a rank, in order.
///
/// The largest range and the smallest differ by at most the largest tensor. The result depends only on the arguments,
/// so every rank computes the same one. Contiguous ranges make each rank's reads sequential.
pub fn split(len_bytes: impl IntoIterator<Item = u64>, world_size: u32) -> Result<Vec<Range<usize>>> {
    if world_size == 0 {
        return Err(Error::new(ErrorKind::ConfigInvalid, "split checkpoint", "the world has no ranks"));
    }
    // Sums of the first i sizes. u128: a hostile header may name sizes whose sum does not fit in u64.
    let mut sums = vec![0_u128];
    let mut largest = 0_u128;
    for len in len_bytes {
        largest = largest.max(u128::from(len));
        sums.push(sums[sums.len() - 1] + u128::from(len));
    }
    let ranks = world_size as usize;
    let total = sums[sums.len() - 1];
    // With every range at least `least` and at most `least + largest` bytes, the ends that the j-th range can have
    // form one interval (no tensor is longer than a window). The largest `least` for which the shortest ranges
    // still fit always has a solution: were `least` one more, the shortest ranges would run out of tensors, and each
    // of them is at most `least + largest` long.
    let (mut low, mut high) = (0_u128, total / ranks as u128);
    while low < high {
        let middle = (low + high).div_ceil(2);
        if shortest_fit(&sums, ranks, middle) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    Ok(cut(&sums, ranks, low, largest))
}

/// Whether `ranks` ranges of at least `least` bytes fit.
fn shortest_fit(sums: &[u128], ranks: usize, least: u128) -> bool {
    let mut end = 0;
    for _ in 0..ranks {
        end = first_at_least(sums, sums[end] + least);
        if end == sums.len() {
            return false;
        }
    }
    true
}

fn first_at_least(sums: &[u128], value: u128) -> usize {
    sums.partition_point(|s| *s < value)
}

fn last_at_most(sums: &[u128], value: u128) -> usize {
    // sums[0] is 0, so there is always one.
    sums.partition_point(|s| *s <= value) - 1
}

/// Goes back from the end, choosing the end of each range nearest to its ideal place among those that can be reached.
fn cut(sums: &[u128], ranks: usize, least: u128, largest: u128) -> Vec<Range<usize>> {
    let most = least + largest;
    let mut reachable = vec![(0, 0)];
    for j in 0..ranks {
        let (first, last) = reachable[j];
        reachable.push((first_at_least(sums, sums[first] + least), last_at_most(sums, sums[last] + most)));
    }
    let total = sums[sums.len() - 1];
    let mut end = sums.len() - 1;
    let mut ranges = vec![0..0; ranks];
    for j in (0..ranks).rev() {
        let first = reachable[j].0.max(first_at_least(sums, sums[end].saturating_sub(most)));
        let last =
            reachable[j].1.min(last_at_most(sums, sums[end].saturating_sub(least))).min(end).max(first);
        let ideal = total * j as u128 / ranks as u128;
        let after = first_at_least(sums, ideal).clamp(first, last);
        let before = after.saturating_sub(1).max(first);
        let start = if ideal.abs_diff(sums[before]) <= ideal.abs_diff(sums[after]) { before } else { after };
        ranges[j] = start..end;
        end = start;
    }
    ranges
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(sizes: &[u64], world_size: u32) -> Vec<u128> {
        let ranges = split(sizes.iter().copied(), world_size).unwrap();
        assert_eq!(ranges.len(), world_size as usize);
        let mut next = 0;
        for range in &ranges {
            assert_eq!(range.start, next, "ranges tile the list in order");
            assert!(range.end >= range.start);
            next = range.end;
        }
        assert_eq!(next, sizes.len(), "every tensor has one holder");
        let sums: Vec<u128> =
            ranges.iter().map(|r| sizes[r.clone()].iter().map(|s| u128::from(*s)).sum()).collect();
        let spread = sums.iter().max().unwrap() - sums.iter().min().unwrap();
        let largest = sizes.iter().copied().max().unwrap_or(0);
        assert!(spread <= u128::from(largest), "{sums:?} spread {spread} over largest {largest}");
        sums
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn spread_is_at_most_one_tensor(
            sizes in proptest::collection::vec(prop_oneof![0_u64..4, 0_u64..1000, 0_u64..u64::MAX], 0..80),
            world_size in 1_u32..20,
        ) {
            check(&sizes, world_size);
        }

        #[test]
        fn equal_tensors_differ_by_one(count in 0_usize..200, world_size in 1_u32..20) {
            check(&vec![7; count], world_size);
        }
    }

    #[test]
    fn corner_cases() {
        assert_eq!(split([], 3).unwrap(), vec![0..0; 3]);
        assert_eq!(check(&[5, 5, 5, 5], 2), [10, 10]);
        assert_eq!(check(&[0, 0, 0], 2), [0, 0]);
        assert_eq!(check(&[100, 1, 1, 1], 4).iter().sum::<u128>(), 103);
        check(&[1, 1, 1, 100], 4);
        check(&[3], 8);
        assert_eq!(split([1], 0).unwrap_err().kind(), ErrorKind::ConfigInvalid);
    }

    #[test]
    fn a_real_shape_is_nearly_even() {
        let sizes: Vec<u64> = crate::checkpoint::generate::qwen3_8b_shapes().map(|t| t.len_bytes()).collect();
        let sums = check(&sizes, 8);
        let spread = sums.iter().max().unwrap() - sums.iter().min().unwrap();
        assert!(spread <= 151_936 * 4096 * 2, "{sums:?}");
    }
}
