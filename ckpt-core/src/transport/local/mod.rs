//! The `local` transport: the ranks are tasks of one process and copy straight from each other's memory.

mod exchange;
mod one_sided;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use async_trait::async_trait;
use bytes::Bytes;

use self::exchange::{Group, LocalAbort, LocalQueue};
use super::{
    Capability, Collective, Communicator, GroupSpec, OneSided, Probe, Transport, TransportConfig,
    TransportProvider,
    group::{check_spec, missing, random},
    regions::Regions,
};
use crate::{
    device::DeviceBackend,
    error::{Error, ErrorKind, Key, Result},
};

/// Tokens that were made and not yet used; more are forgotten, oldest first.
const TOKENS: usize = 1024;

/// Opens `local` transports. Transports of one provider (or of its clones) reach each other, others do not.
#[derive(Clone, Debug, Default)]
pub struct LocalProvider {
    hub: Arc<Hub>,
}

impl TransportProvider for LocalProvider {
    fn name(&self) -> &'static str {
        "local"
    }

    fn probe(&self) -> Probe {
        Probe::Available("ranks that are tasks of one process".to_owned())
    }

    fn open(&self, config: &TransportConfig) -> Result<Arc<dyn Transport>> {
        Ok(Arc::new(LocalTransport { hub: self.hub.clone(), device: config.device.clone() }))
    }
}

/// Where the ranks of one process meet.
struct Hub {
    id: u64,
    meeting: Mutex<Meeting>,
    regions: Arc<Regions>,
}

#[derive(Default)]
struct Meeting {
    tokens: VecDeque<Bytes>,
    pending: HashMap<(Bytes, u64), Pending>,
}

struct Pending {
    world_size: u32,
    joined: BTreeSet<u32>,
    group: Arc<Group>,
}

impl Default for Hub {
    fn default() -> Self {
        // Only tells hubs of one process apart; a counter would need a global.
        let id = getrandom::u64().unwrap_or(0);
        Self { id, meeting: Mutex::default(), regions: Arc::default() }
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, Meeting> {
        // Nothing that can panic runs under this lock.
        self.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, spec: &GroupSpec) -> Result<Arc<Group>> {
        let refuse = |message: String| {
            Err(Error::new(ErrorKind::ConfigInvalid, "join a group", message).with(Key::Rank, spec.rank))
        };
        let mut meeting = self.lock();
        let Some(place) = meeting.tokens.iter().position(|token| *token == spec.token) else {
            return refuse("the token is not of a group that can be joined in this process".to_owned());
        };
        let key = (spec.token.clone(), spec.epoch.0);
        let pending = meeting.pending.entry(key.clone()).or_insert_with(|| Pending {
            world_size: spec.world_size,
            joined: BTreeSet::new(),
            group: Arc::new(Group::new(spec.world_size)),
        });
        if pending.world_size != spec.world_size {
            return refuse(format!(
                "this member expects {} members, others {}",
                spec.world_size, pending.world_size
            ));
        }
        if !pending.joined.insert(spec.rank) {
            return refuse("another member has joined with the same number".to_owned());
        }
        let group = pending.group.clone();
        if pending.joined.len() == spec.world_size as usize {
            meeting.pending.remove(&key);
            meeting.tokens.remove(place);
            group.formed.cancel();
        }
        Ok(group)
    }

    /// Takes back a join that did not become a group; says who was missing.
    fn leave(&self, spec: &GroupSpec) -> String {
        let mut meeting = self.lock();
        let key = (spec.token.clone(), spec.epoch.0);
        let Some(pending) = meeting.pending.get_mut(&key) else { return String::new() };
        let absent = missing(spec.world_size, |rank| pending.joined.contains(&rank));
        pending.joined.remove(&spec.rank);
        if pending.joined.is_empty() {
            meeting.pending.remove(&key);
        }
        absent
    }
}

#[derive(Debug)]
struct LocalTransport {
    hub: Arc<Hub>,
    device: Arc<dyn DeviceBackend>,
}

impl Transport for LocalTransport {
    fn name(&self) -> &'static str {
        "local"
    }

    fn capability(&self) -> Capability {
        Capability {
            collective: true,
            one_sided: true,
            one_sided_write: true,
            across_processes: false,
            across_hosts: false,
            encrypts: false,
            devices: &["host"],
        }
    }

    fn collective(&self) -> Option<&dyn Collective> {
        Some(self)
    }

    fn one_sided(&self) -> Option<&dyn OneSided> {
        Some(self)
    }
}

/// Undoes a join whose future was dropped, or that ended without a group.
struct Joining<'a> {
    hub: &'a Hub,
    spec: &'a GroupSpec,
    formed: bool,
}

impl Drop for Joining<'_> {
    fn drop(&mut self) {
        if !self.formed {
            self.hub.leave(self.spec);
        }
    }
}

#[async_trait]
impl Collective for LocalTransport {
    async fn create_token(&self) -> Result<Bytes> {
        let token = Bytes::copy_from_slice(&random::<16>()?);
        let mut meeting = self.hub.lock();
        if meeting.tokens.len() == TOKENS {
            meeting.tokens.pop_front();
        }
        meeting.tokens.push_back(token.clone());
        Ok(token)
    }

    async fn join(&self, spec: GroupSpec, deadline: Instant) -> Result<Communicator> {
        check_spec(&spec)?;
        let group = self.hub.enter(&spec)?;
        let mut joining = Joining { hub: &self.hub, spec: &spec, formed: false };
        let in_time = tokio::time::timeout_at(deadline.into(), group.formed.cancelled()).await.is_ok();
        joining.formed = in_time || group.formed.is_cancelled();
        if !joining.formed {
            joining.formed = true;
            let absent = self.hub.leave(&spec);
            return Err(Error::new(
                ErrorKind::Timeout,
                "join a group",
                format!("members {absent} did not join by the deadline"),
            )
            .with(Key::Rank, spec.rank));
        }
        Ok(Communicator {
            queue: Box::new(LocalQueue::new(group.clone(), spec.rank)),
            abort: Arc::new(LocalAbort(group)),
        })
    }
}
