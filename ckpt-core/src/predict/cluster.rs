//! What a cluster file says.

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

const GB: f64 = 1e9;

/// A cluster: nodes, devices, links and NICs. Rates are in GB/s, 10^9 bytes per second, one way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// For people.
    pub name: String,
    /// Where the figures come from.
    #[serde(default)]
    pub about: String,
    /// How a bucket gets from its owners to all members.
    #[serde(default)]
    pub exchange: Exchange,
    /// Groups of equal nodes. Ranks are numbered node by node.
    pub nodes: Vec<NodeGroup>,
    /// Times that do not depend on bytes.
    #[serde(default)]
    pub latency: Latency,
    /// What the workers of this cluster cost, if they are not like those that were measured.
    #[serde(default)]
    pub worker: Option<WorkerCosts>,
}

/// How a bucket gets from its owners to all members.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exchange {
    /// Each byte enters a node once, over all its NICs, and goes on from device to device: `nccl`.
    #[default]
    Tree,
    /// By copy engines, without kernels that wait beside the workers: `cuda` on one node.
    Copy,
    /// Copies inside nodes; each byte enters a node once, over the NIC of the device with its root's number: `cuda` on
    /// several nodes with equally many ranks each, else as [`Exchange::Tree`].
    Rails,
    /// The owner sends to each member over its own NIC: `tcp` and `local`.
    Star,
}

/// Equal nodes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeGroup {
    /// Nodes.
    pub count: u32,
    /// Devices, and so ranks, of one node.
    pub devices: u32,
    /// For people.
    #[serde(default)]
    pub device: String,
    /// Memory of a device.
    pub memory_gib: f64,
    /// What of it is free for the ring. Without it: all.
    #[serde(default)]
    pub free_gib: Option<f64>,
    /// Host memory to one device.
    pub h2d_gb_per_s: f64,
    /// Host memory to all devices of the node together, if that is less.
    #[serde(default)]
    pub h2d_node_gb_per_s: Option<f64>,
    /// One device to others of the node.
    pub link_gb_per_s: f64,
    /// The same, all devices of the node together, if that is less.
    #[serde(default)]
    pub link_node_gb_per_s: Option<f64>,
    /// A worker's copy inside its device.
    pub copy_gb_per_s: f64,
    /// NICs of one node. Devices share them evenly.
    #[serde(default)]
    pub nics: u32,
    /// For people.
    #[serde(default)]
    pub nic: String,
    /// One NIC, one way.
    #[serde(default)]
    pub nic_gb_per_s: f64,
}

/// Times that do not depend on bytes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Latency {
    /// A control message, one way.
    pub message_us: f64,
    /// An exchange besides its bytes.
    pub exchange_us: f64,
    /// A read of another rank's memory besides its bytes.
    pub read_us: f64,
    /// Plan and ring.
    pub prepare_ms: f64,
    /// Forming the communicator, before the first update.
    pub communicator_ms: f64,
}

impl Default for Latency {
    /// Two H200 of one host, as measured; messages over a quick network.
    fn default() -> Self {
        Self { message_us: 50.0, exchange_us: 40.0, read_us: 100.0, prepare_ms: 1.5, communicator_ms: 600.0 }
    }
}

/// What a worker spends besides copying bytes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerCosts {
    /// Mapping the ring; hidden as far as the ring takes bytes meanwhile.
    pub open_ms: f64,
    /// Each bucket.
    pub per_bucket_us: f64,
    /// Each tensor.
    pub per_tensor_us: f64,
    /// Each bucket, while kernels of a collective wait on the same device (measured: time slices).
    pub beside_collective_us: f64,
    /// Dropping the ring, the post hook and the engine's answer.
    pub end_ms: f64,
}

impl WorkerCosts {
    /// `ckpt worker` and the native worker library.
    pub const NATIVE: Self = Self {
        open_ms: 1.0,
        per_bucket_us: 60.0,
        per_tensor_us: 1.2,
        beside_collective_us: 700.0,
        end_ms: 1.0,
    };
    /// checkpoint-engine's own worker, unmodified.
    pub const CHECKPOINT_ENGINE: Self = Self {
        open_ms: 65.0,
        per_bucket_us: 150.0,
        per_tensor_us: 18.5,
        beside_collective_us: 700.0,
        end_ms: 115.0,
    };
}

/// One device of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Index of its group of nodes.
    pub group: usize,
    /// Number of its node in the cluster.
    pub node: u32,
    /// Its number in the node.
    pub local: u32,
    /// The NIC of the node that it uses.
    pub nic: Option<u32>,
}

/// More would be a slip of the finger.
const MAX_DEVICES: u32 = 1 << 20;

impl Cluster {
    /// Refuses what cannot be a cluster.
    pub fn validate(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::new(ErrorKind::ConfigInvalid, "read the cluster", message));
        if self.nodes.is_empty() {
            return wrong("it has no [[nodes]]".to_owned());
        }
        let (mut devices, mut nodes) = (0_u64, 0_u64);
        for (index, group) in self.nodes.iter().enumerate() {
            let place = format!("nodes[{index}]");
            if group.count == 0 || group.devices == 0 {
                return wrong(format!("{place}: `count` and `devices` must be at least 1"));
            }
            devices += u64::from(group.count) * u64::from(group.devices);
            nodes += u64::from(group.count);
            let positive = [
                ("memory_gib", Some(group.memory_gib)),
                ("free_gib", group.free_gib),
                ("h2d_gb_per_s", Some(group.h2d_gb_per_s)),
                ("h2d_node_gb_per_s", group.h2d_node_gb_per_s),
                ("link_gb_per_s", Some(group.link_gb_per_s)),
                ("link_node_gb_per_s", group.link_node_gb_per_s),
                ("copy_gb_per_s", Some(group.copy_gb_per_s)),
                ("nic_gb_per_s", (group.nics > 0).then_some(group.nic_gb_per_s)),
            ];
            for (name, value) in positive {
                if value.is_some_and(|value| !(value.is_finite() && value > 0.0)) {
                    return wrong(format!("{place}: `{name}` must be a number above 0"));
                }
            }
        }
        if devices > u64::from(MAX_DEVICES) {
            return wrong(format!("it has {devices} devices; at most {MAX_DEVICES} are possible"));
        }
        if nodes > 1 && self.nodes.iter().any(|group| group.nics == 0) {
            return wrong("several nodes need `nics` and `nic_gb_per_s`".to_owned());
        }
        let times = [
            self.latency.message_us,
            self.latency.exchange_us,
            self.latency.read_us,
            self.latency.prepare_ms,
            self.latency.communicator_ms,
        ];
        let worker = self.worker.map_or([0.0; 5], |w| {
            [w.open_ms, w.per_bucket_us, w.per_tensor_us, w.beside_collective_us, w.end_ms]
        });
        if times.into_iter().chain(worker).any(|time| !(time.is_finite() && time >= 0.0)) {
            return wrong("times under [latency] and [worker] must be numbers from 0 on".to_owned());
        }
        Ok(())
    }

    /// Devices of all nodes.
    pub fn devices(&self) -> u32 {
        self.nodes.iter().map(|group| group.count.saturating_mul(group.devices)).sum()
    }

    /// Nodes of all groups.
    pub fn node_count(&self) -> u32 {
        self.nodes.iter().map(|group| group.count).sum()
    }

    /// The device with this number.
    pub fn slot(&self, number: u32) -> Option<Slot> {
        let (mut first_device, mut first_node) = (0, 0);
        for (index, group) in self.nodes.iter().enumerate() {
            let devices = group.count * group.devices;
            if number < first_device + devices {
                let (node, local) =
                    ((number - first_device) / group.devices, (number - first_device) % group.devices);
                let nic = (group.nics > 0).then(|| group.nic_of(local));
                return Some(Slot { group: index, node: first_node + node, local, nic });
            }
            first_device += devices;
            first_node += group.count;
        }
        None
    }

    /// Free memory of the fullest device, in bytes.
    pub fn free_bytes(&self) -> u64 {
        let free = |group: &NodeGroup| group.free_gib.unwrap_or(group.memory_gib) * (1_u64 << 30) as f64;
        self.nodes.iter().map(free).fold(f64::INFINITY, f64::min) as u64
    }
}

impl NodeGroup {
    /// Which NIC a device uses.
    pub(super) fn nic_of(&self, local: u32) -> u32 {
        (u64::from(local) * u64::from(self.nics) / u64::from(self.devices)) as u32
    }

    /// Bytes per second from the host into one device, while `busy` devices of the node load.
    pub(super) fn h2d(&self, busy: u32) -> f64 {
        let of_node = self.h2d_node_gb_per_s.map_or(f64::INFINITY, |rate| rate / f64::from(busy.max(1)));
        self.h2d_gb_per_s.min(of_node) * GB
    }

    /// Bytes per second from the host into all devices of the node.
    pub(super) fn h2d_node(&self) -> f64 {
        self.h2d_node_gb_per_s.unwrap_or(f64::INFINITY) * GB
    }

    /// Bytes per second into one device from others.
    pub(super) fn link(&self) -> f64 {
        self.link_gb_per_s * GB
    }

    /// Bytes per second among all devices of the node.
    pub(super) fn link_node(&self) -> f64 {
        self.link_node_gb_per_s.unwrap_or(f64::INFINITY) * GB
    }

    /// Bytes per second of a worker's copy.
    pub(super) fn copy(&self) -> f64 {
        self.copy_gb_per_s * GB
    }

    /// Bytes per second of one NIC.
    pub(super) fn nic_rate(&self) -> f64 {
        self.nic_gb_per_s * GB
    }
}
