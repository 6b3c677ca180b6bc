//! Which members copy to each other, and which need NCCL.

/// How a group moves its bytes. All members find the same from the same list of hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// All are on one host.
    OneHost,
    /// Copies inside each host, NCCL between the members with the same number on their hosts.
    Rails(Rails),
    /// NCCL for everything; why.
    Apart(String),
}

/// One member's place in a group on several hosts with equally many members each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rails {
    /// By member: its host and its number there.
    places: Vec<(u32, u32)>,
    /// This member.
    pub(super) rank: u32,
    /// The members on this member's host, by their numbers there.
    pub(super) node: Vec<u32>,
    /// The members with this one's number, by host.
    pub(super) rail: Vec<u32>,
}

impl Rails {
    /// The host of `member`, and its number there. `None` for one that is not in the group.
    pub(super) fn place(&self, member: u32) -> Option<(u32, u32)> {
        self.places.get(member as usize).copied()
    }

    /// This member's host.
    pub(super) fn host(&self) -> u32 {
        self.places[self.rank as usize].0
    }

    /// This member's number on its host.
    pub(super) fn index(&self) -> u32 {
        self.places[self.rank as usize].1
    }

    pub(super) fn world_size(&self) -> u32 {
        self.places.len() as u32
    }
}

impl Layout {
    /// For member `rank` of a group whose members are on these `hosts`.
    pub(super) fn of(hosts: &[u64], rank: u32) -> Self {
        // Hosts are numbered by their first members.
        let mut nodes: Vec<(u64, Vec<u32>)> = Vec::new();
        let mut places = Vec::with_capacity(hosts.len());
        for (member, host) in (0..).zip(hosts) {
            let number = nodes.iter().position(|(of, _)| of == host).unwrap_or_else(|| {
                nodes.push((*host, Vec::new()));
                nodes.len() - 1
            });
            let node = &mut nodes[number].1;
            places.push((number as u32, node.len() as u32));
            node.push(member);
        }
        let counts: Vec<usize> = nodes.iter().map(|(_, node)| node.len()).collect();
        let (fewest, most) = (counts.iter().min().copied(), counts.iter().max().copied());
        let Some(&(host, index)) = places.get(rank as usize) else {
            return Self::Apart("this member is not in the group".to_owned());
        };
        match (nodes.len(), fewest, most) {
            (1, ..) => Self::OneHost,
            (_, _, Some(1)) => Self::Apart("each member is on a host of its own".to_owned()),
            (_, fewest, most) if fewest != most => {
                Self::Apart(format!("the hosts have different numbers of members: {counts:?}"))
            }
            _ => {
                let rail = nodes.iter().map(|(_, node)| node[index as usize]).collect();
                let node = nodes.swap_remove(host as usize).1;
                Self::Rails(Rails { places, rank, node, rail })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rails(hosts: &[u64], rank: u32) -> Rails {
        match Layout::of(hosts, rank) {
            Layout::Rails(rails) => rails,
            other => panic!("{hosts:?}: {other:?}"),
        }
    }

    #[test]
    fn equal_hosts_have_rails_in_whatever_order_their_members_come() {
        let found = rails(&[7, 7, 9, 9], 2);
        assert_eq!((found.host(), found.index(), found.world_size()), (1, 0, 4));
        assert_eq!((&found.node[..], &found.rail[..]), (&[2, 3][..], &[0, 2][..]));
        let found = rails(&[9, 7, 7, 9, 9, 7], 5);
        assert_eq!((found.host(), found.index()), (1, 2));
        assert_eq!((&found.node[..], &found.rail[..]), (&[1, 2, 5][..], &[4, 5][..]));
        assert_eq!((found.place(3), found.place(6)), (Some((0, 1)), None));
    }

    #[test]
    fn every_member_is_on_one_rail_and_one_host_at_the_place_that_all_others_see() {
        for hosts in [vec![1, 1, 2, 2], vec![1, 2, 3, 3, 2, 1], vec![5, 5, 5, 6, 6, 6]] {
            for rank in 0..hosts.len() as u32 {
                let own = rails(&hosts, rank);
                for other in 0..hosts.len() as u32 {
                    let seen = rails(&hosts, other);
                    let (host, index) = own.place(other).unwrap();
                    assert_eq!((seen.host(), seen.index()), (host, index));
                    assert_eq!(own.node.get(index as usize) == Some(&other), host == own.host());
                    assert_eq!(own.rail.get(host as usize) == Some(&other), index == own.index());
                }
            }
        }
    }

    #[test]
    fn other_groups_have_none_and_say_why() {
        assert_eq!(Layout::of(&[4], 0), Layout::OneHost);
        assert_eq!(Layout::of(&[4, 4, 4], 2), Layout::OneHost);
        for (hosts, words) in [
            (&[1, 2][..], "a host of its own"),
            (&[1, 1, 2][..], "[2, 1]"),
            (&[1, 2, 2, 3, 3][..], "[1, 2, 2]"),
        ] {
            let Layout::Apart(why) = Layout::of(hosts, 0) else { panic!("{hosts:?}") };
            assert!(why.contains(words), "{why}");
        }
        assert!(matches!(Layout::of(&[1, 1], 2), Layout::Apart(_)));
    }
}
