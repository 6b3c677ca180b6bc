//! The pulls of a P2P update: batches of reads that share links fairly.

use std::collections::{BTreeMap, VecDeque};

use super::{
    cluster::Slot,
    links::{LinkKind, Network},
};

/// Buckets that a receiver pulls at once: the update driver's number.
const BUCKETS_AT_ONCE: usize = 2;
/// A receiver without bytes under way waits for something else.
const NEVER: f64 = f64::INFINITY;

/// A batch of reads from one owner to one receiver.
#[derive(Clone, Copy, Debug)]
struct Flow {
    receiver: usize,
    bucket: u32,
    left: f64,
    links: [usize; 2],
    /// It has only just been asked for.
    starts: f64,
}

/// A part of a bucket that is to be pulled.
#[derive(Clone, Debug)]
struct Waiting {
    bucket: u32,
    /// When it may begin.
    from: f64,
    /// Bytes by owner.
    owners: Vec<(usize, u64)>,
}

/// The buckets of one receiver.
#[derive(Clone, Debug, Default)]
struct Receiver {
    queue: VecDeque<Waiting>,
    /// Under way: bucket, flows that are left, when it began.
    open: Vec<(u32, usize, f64)>,
}

/// A receiver has pulled its part of a bucket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pulled {
    pub(super) receiver: u32,
    pub(super) bucket: u32,
    pub(super) start: f64,
    pub(super) end: f64,
}

/// All pulls, over links that they share max-min fairly, as connections and queue pairs do.
pub(super) struct Pulls {
    now: f64,
    latency: f64,
    rates: Vec<f64>,
    links: BTreeMap<(LinkKind, u32, u32), usize>,
    carried: Vec<u64>,
    flows: Vec<Flow>,
    receivers: BTreeMap<u32, usize>,
    state: Vec<Receiver>,
}

impl Pulls {
    pub(super) fn new(latency: f64) -> Self {
        Self {
            now: 0.0,
            latency,
            rates: Vec::new(),
            links: BTreeMap::new(),
            carried: Vec::new(),
            flows: Vec::new(),
            receivers: BTreeMap::new(),
            state: Vec::new(),
        }
    }

    fn link(&mut self, network: &Network<'_>, kind: LinkKind, slot: Slot) -> usize {
        let index = match kind {
            LinkKind::NicIn | LinkKind::NicOut => slot.nic.unwrap_or(0),
            LinkKind::H2d | LinkKind::DeviceIn => slot.local,
        };
        let group = network.group(slot);
        let rate = match kind {
            LinkKind::NicIn | LinkKind::NicOut => group.nic_rate(),
            LinkKind::H2d | LinkKind::DeviceIn => group.link(),
        };
        let next = self.rates.len();
        let link = *self.links.entry((kind, slot.node, index)).or_insert(next);
        if link == next {
            self.rates.push(rate);
            self.carried.push(0);
        }
        link
    }

    /// The receiver may pull these bytes of `bucket` from then on.
    pub(super) fn offer(&mut self, receiver: u32, bucket: u32, from: f64, owners: Vec<(usize, u64)>) {
        let next = self.state.len();
        let place = *self.receivers.entry(receiver).or_insert(next);
        if place == next {
            self.state.push(Receiver::default());
        }
        self.state[place].queue.push_back(Waiting { bucket, from, owners });
    }

    /// Goes on until the next part of a bucket is through; `None` if nothing is left.
    pub(super) fn next(&mut self, network: &Network<'_>) -> Option<Pulled> {
        loop {
            let wake = self.begin(network);
            // Flows that have begun share the links; the others begin soon.
            let active: Vec<usize> =
                (0..self.flows.len()).filter(|f| self.flows[*f].starts <= self.now).collect();
            let rates = fair_rates(&self.flows, &active, &self.rates);
            let ends = active.iter().zip(&rates).map(|(f, rate)| self.now + self.flows[*f].left / rate);
            let end = ends.fold(NEVER, f64::min);
            let starts = self.flows.iter().map(|f| f.starts).filter(|at| *at > self.now);
            let next = starts.fold(end.min(wake), f64::min);
            if next == NEVER {
                return None;
            }
            let step = (next - self.now).max(0.0);
            for (flow, rate) in active.iter().zip(&rates) {
                self.flows[*flow].left -= step * rate;
            }
            self.now = next.max(self.now);
            // Less than a byte is an error of rounding.
            if let Some(done) = active.into_iter().find(|f| self.flows[*f].left < 1.0) {
                let flow = self.flows.swap_remove(done);
                if let Some(pulled) = self.through(flow) {
                    return Some(pulled);
                }
            }
        }
    }

    fn through(&mut self, flow: Flow) -> Option<Pulled> {
        let open = &mut self.state[flow.receiver].open;
        let place = open.iter().position(|(bucket, ..)| *bucket == flow.bucket)?;
        open[place].1 -= 1;
        if open[place].1 > 0 {
            return None;
        }
        let (bucket, _, start) = open.remove(place);
        let receiver = self.receivers.iter().find(|(_, at)| **at == flow.receiver)?;
        Some(Pulled { receiver: *receiver.0, bucket, start, end: self.now })
    }

    /// Starts what may start now; when the next may.
    fn begin(&mut self, network: &Network<'_>) -> f64 {
        let mut wake = NEVER;
        let receivers: Vec<(u32, usize)> = self.receivers.iter().map(|(rank, at)| (*rank, *at)).collect();
        for (rank, at) in receivers {
            while self.state[at].open.len() < BUCKETS_AT_ONCE {
                let Some(first) = self.state[at].queue.front() else { break };
                if first.from > self.now {
                    wake = wake.min(first.from);
                    break;
                }
                let Some(Waiting { bucket, owners, .. }) = self.state[at].queue.pop_front() else { break };
                self.state[at].open.push((bucket, owners.len(), self.now));
                let into = network.members[rank as usize];
                for (owner, bytes) in owners {
                    let from = network.owners[owner];
                    let links = if from.node == into.node {
                        let link = self.link(network, LinkKind::DeviceIn, into);
                        [link, link]
                    } else {
                        let out = self.link(network, LinkKind::NicOut, from);
                        [out, self.link(network, LinkKind::NicIn, into)]
                    };
                    self.carried[links[0]] += bytes;
                    if links[0] != links[1] {
                        self.carried[links[1]] += bytes;
                    }
                    let starts = self.now + self.latency;
                    self.flows.push(Flow { receiver: at, bucket, left: bytes as f64, links, starts });
                }
            }
        }
        wake
    }

    /// Bytes by link.
    pub(super) fn carried(&self) -> BTreeMap<(LinkKind, u32, u32), u64> {
        self.links.iter().map(|(key, link)| (*key, self.carried[*link])).collect()
    }
}

/// Max-min fair: all flows get faster together, until a link is full; its flows stay as they are.
fn fair_rates(flows: &[Flow], active: &[usize], links: &[f64]) -> Vec<f64> {
    let mut rates = vec![0.0; active.len()];
    let mut open: Vec<usize> = (0..active.len()).collect();
    let mut left = links.to_vec();
    let mut users = vec![0.0_f64; links.len()];
    let each = |f: usize| {
        let [a, b] = flows[active[f]].links;
        // A local pull has one link.
        [Some(a), (a != b).then_some(b)].into_iter().flatten()
    };
    while !open.is_empty() {
        users.iter_mut().for_each(|n| *n = 0.0);
        open.iter().flat_map(|f| each(*f)).for_each(|link| users[link] += 1.0);
        let used = || users.iter().enumerate().filter(|(_, n)| **n > 0.0);
        let share = used().map(|(link, n)| left[link] / n).fold(NEVER, f64::min);
        open.iter().for_each(|f| rates[*f] += share);
        used().for_each(|(link, n)| left[link] -= share * n);
        let before = open.len();
        open.retain(|f| each(*f).all(|link| left[link] > links[link] * 1e-9));
        // The fullest link always closes; rounding must not keep this loop alive.
        if open.len() == before {
            break;
        }
    }
    rates
}
