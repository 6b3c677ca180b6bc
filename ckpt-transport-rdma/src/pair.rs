//! Which NIC of the reader talks to which NIC of the owner.

use std::cmp::Reverse;

use crate::nic::NicAddress;

/// Pairs such that every NIC that can be used is: of each side's NICs, those that seem to share a subnet first (the
/// rails of a cluster), then by number.
pub(crate) fn pairs(local: &[NicAddress], remote: &[NicAddress]) -> Vec<(usize, usize)> {
    let mut pairs: Vec<(usize, usize)> = Vec::new();
    let uses = |pairs: &[(usize, usize)], side: fn(&(usize, usize)) -> usize, index| {
        pairs.iter().filter(|pair| side(pair) == index).count()
    };
    for (l, mine) in local.iter().enumerate() {
        let best = (0..remote.len()).filter(|r| reachable(mine, &remote[*r])).min_by_key(|r| {
            let turn = (r + remote.len() - l % remote.len()) % remote.len();
            (Reverse(close(mine, &remote[*r])), uses(&pairs, |pair| pair.1, *r), turn)
        });
        pairs.extend(best.map(|r| (l, r)));
    }
    for (r, theirs) in remote.iter().enumerate() {
        if uses(&pairs, |pair| pair.1, r) > 0 {
            continue;
        }
        let best = (0..local.len())
            .filter(|l| reachable(&local[*l], theirs))
            .min_by_key(|l| (Reverse(close(&local[*l], theirs)), uses(&pairs, |pair| pair.0, *l), *l));
        pairs.extend(best.map(|l| (l, r)));
    }
    pairs
}

/// The same kind of network; on InfiniBand the same subnet, as nothing here routes between subnets.
fn reachable(a: &NicAddress, b: &NicAddress) -> bool {
    a.ethernet == b.ethernet && (a.ethernet || a.gid[..8] == b.gid[..8])
}

/// Whether two addresses seem to be in one subnet: masks are not known, so /24 and /64 stand for them.
fn close(a: &NicAddress, b: &NicAddress) -> bool {
    let v4 = |nic: &NicAddress| nic.gid.starts_with(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]);
    let prefix = if v4(a) && v4(b) { 15 } else { 8 };
    a.gid[..prefix] == b.gid[..prefix]
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    fn nics(addresses: &[&str]) -> Vec<NicAddress> {
        let nic = |address: &&str| NicAddress {
            hca: (*address).to_owned(),
            ethernet: !address.starts_with("fe80"),
            gid: address.parse::<Ipv6Addr>().unwrap().octets(),
            lid: 0,
        };
        addresses.iter().map(nic).collect()
    }

    #[test]
    fn rails_stay_together_and_every_nic_is_used() {
        type Case<'a> = (&'a [&'a str], &'a [&'a str], &'a [(usize, usize)]);
        let table: [Case; 6] = [
            (
                &["::ffff:10.9.0.1", "::ffff:10.9.1.1"],
                &["::ffff:10.9.0.2", "::ffff:10.9.1.2"],
                &[(0, 0), (1, 1)],
            ),
            (
                &["::ffff:10.9.0.1", "::ffff:10.9.1.1"],
                &["::ffff:10.9.1.2", "::ffff:10.9.0.2"],
                &[(0, 1), (1, 0)],
            ),
            (
                &["::ffff:10.9.0.1", "::ffff:10.9.0.3"],
                &["::ffff:10.9.0.2", "::ffff:10.9.0.4"],
                &[(0, 0), (1, 1)],
            ),
            (&["::ffff:10.9.0.1"], &["::ffff:10.9.0.2", "::ffff:10.8.0.4"], &[(0, 0), (0, 1)]),
            (&["fe80::1"], &["::ffff:10.9.0.2"], &[]),
            (&["::ffff:10.9.0.1"], &[], &[]),
        ];
        for (local, remote, expected) in table {
            assert_eq!(pairs(&nics(local), &nics(remote)), expected, "{local:?} {remote:?}");
        }
    }
}
