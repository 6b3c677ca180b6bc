//! The parameter server: one per inference worker, holds a share of checkpoints and moves it on request.

mod metas;
mod open;
mod read;
mod recovery;
mod report;
mod timelines;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use bytes::Bytes;
use tracing::Instrument as _;

use self::{
    metas::Known,
    recovery::{Aftermath, Kept},
    timelines::Timelines,
};
pub use self::{
    open::{OpenOptions, Opened, Reading, address_towards, open},
    recovery::{OnFailure, Policy},
    report::{Stages, UpdateReport},
};
use crate::{
    checkpoint::RegisteredCheckpoint,
    control::{Joining, Session, ToHub, Weights},
    deadlines::Deadlines,
    device::{DeviceBackend, Ring},
    error::{Error, ErrorKind, Key, Recovery, Result},
    metas::{EncodedLayout, LayoutCache},
    plan::{Location, PlanLimits},
    sink::WeightSink,
    transport::{Registration, Transport},
    types::{Rank, Version},
    update::{
        EngineCall, Outcome,
        driver::{Attempt, Ended, Group, drive, no_broadcasts},
        kept::KeptRing,
        trace::Trace,
    },
};

/// Communicators that are kept, each for its own set of members.
const GROUPS_KEPT: usize = 4;

/// What a parameter server is made of.
pub struct ServerConfig {
    /// The session with the hub.
    pub session: Session,
    /// The rank's device.
    pub device: Arc<dyn DeviceBackend>,
    /// How bytes reach the other ranks.
    pub transport: Arc<dyn Transport>,
    /// The time limits.
    pub deadlines: Deadlines,
    /// The memory limits.
    pub limits: PlanLimits,
}

/// One call of [`ParameterServer::update`].
pub struct UpdateRequest {
    /// The registered checkpoint; every member names the same.
    pub checkpoint: String,
    /// The version being installed; every member names the same.
    pub version: Version,
    /// Empty: a broadcast to all ranks of the job, which hold the checkpoint themselves. Else the members of a P2P update:
    /// some of them pull from the owners' memory and broadcast to the others; ranks that are not named go on undisturbed.
    /// With metas of another job ([`ParameterServer::load_metas`]) every update is P2P, and empty means all ranks.
    pub ranks: Vec<Rank>,
    /// The link to this rank's worker; `None` for a rank without one.
    pub sink: Option<Box<dyn WeightSink>>,
    /// Set on the one rank of an engine that sends its request.
    pub engine: Option<EngineCall>,
}

/// One registered checkpoint.
struct Held {
    /// Dropped before the memory: nobody starts to read what is about to go.
    registrations: Vec<Arc<dyn Registration>>,
    /// The share in the form in which it travels; made once.
    layout: Option<EncodedLayout>,
    checkpoint: Arc<RegisteredCheckpoint>,
}

/// Where the bytes of an update come from: what is known of all ranks, and this rank's own share.
#[derive(Clone)]
struct Source {
    known: Known,
    /// Readers may go on as long as these live.
    _registrations: Vec<Arc<dyn Registration>>,
    checkpoint: Option<Arc<RegisteredCheckpoint>>,
}

/// Holds a share of checkpoints in host memory and updates running engines from it.
///
/// # Whose memory is read, and for how long
/// [`Self::gather_metas`] registers the checkpoint's arenas with the reading transport and tells the others where they
/// are. From then on readers (in this job or in another) need no call here. [`Self::unregister`] ends the registrations
/// first: a read that is under way keeps its bytes mapped, which keeps the pool from giving them to another checkpoint,
/// and fails with an error that says so; it never takes bytes of another version.
pub struct ParameterServer {
    rank: Rank,
    world_size: u32,
    session: Session,
    device: Arc<dyn DeviceBackend>,
    transport: Arc<dyn Transport>,
    reader: Arc<dyn Transport>,
    location: Location,
    deadlines: Deadlines,
    limits: PlanLimits,
    checkpoints: HashMap<String, Held>,
    /// What was gathered, by checkpoint.
    gathered: HashMap<String, Known>,
    /// What was loaded: for every checkpoint that was not gathered since.
    loaded: Option<Known>,
    /// Which of the above came last.
    latest: Option<Known>,
    layouts: LayoutCache,
    /// Where the ranks of this job are, as they said it themselves.
    locations: BTreeMap<Rank, Location>,
    /// Communicators for the next updates, the last used first.
    groups: Vec<Group>,
    keep_ring: bool,
    kept_ring: Option<Arc<KeptRing>>,
    /// Rings that a worker may still have mapped after a failure.
    quarantine: Vec<Arc<dyn Ring>>,
    policy: Policy,
    /// Ranks that took part in the last gather: those that left are not waited for.
    present: Vec<Rank>,
    weights: Weights,
    /// The highest that this server has seen.
    last_version: Version,
    kept: Option<Kept>,
    may_be_mixed: bool,
    timelines: Timelines,
}

impl ParameterServer {
    /// A server without checkpoints. P2P updates read through the one-sided facet of `config.transport`.
    pub fn new(config: ServerConfig) -> Self {
        let rank = config.session.rank();
        let server = Self {
            rank,
            world_size: config.session.world_size(),
            session: config.session,
            device: config.device,
            reader: config.transport.clone(),
            transport: config.transport,
            location: Location { rank, hca: String::new(), host: crate::control::host_name() },
            deadlines: config.deadlines,
            limits: config.limits,
            checkpoints: HashMap::new(),
            gathered: HashMap::new(),
            loaded: None,
            latest: None,
            layouts: LayoutCache::default(),
            locations: BTreeMap::new(),
            groups: Vec::new(),
            keep_ring: false,
            kept_ring: None,
            quarantine: Vec::new(),
            policy: Policy::default(),
            present: Vec::new(),
            weights: Weights::default(),
            last_version: Version::default(),
            kept: None,
            may_be_mixed: false,
            timelines: Timelines::default(),
        };
        // A hub that knows more of the worker than this process, which may be a restarted one, says so.
        server.report_weights();
        server
    }

    /// Reads other ranks' memory, and lets them read ours, through `reader` instead: where the transport that broadcasts
    /// has no one-sided facet, or where the owners belong to a job with another secret.
    #[must_use]
    pub fn with_reader(mut self, reader: Arc<dyn Transport>) -> Self {
        self.reader = reader;
        self
    }

    /// Puts a layer over the transport that broadcasts.
    #[must_use]
    pub fn with_layer<T: Transport + 'static>(
        mut self,
        layer: impl FnOnce(Arc<dyn Transport>) -> Arc<T>,
    ) -> Self {
        self.transport = layer(self.transport);
        self
    }

    /// Where this rank is in the network: ranks with equal `host` and `hca` (`mlx5_0`, `mlx5_0,mlx5_1` or nothing) share
    /// a link, and one of them pulls for all. Without this: the host's name and no HCA.
    #[must_use]
    pub fn with_location(mut self, host: impl Into<String>, hca: impl Into<String>) -> Self {
        self.location = Location { rank: self.rank, hca: hca.into(), host: host.into() };
        self
    }

    /// This rank's number in its job.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// Ranks of the job.
    pub fn world_size(&self) -> u32 {
        self.world_size
    }

    /// What P2P updates read through.
    pub fn reader(&self) -> &Arc<dyn Transport> {
        &self.reader
    }

    /// The rank's device.
    pub fn device(&self) -> &Arc<dyn DeviceBackend> {
        &self.device
    }

    /// The time limits.
    pub fn deadlines(&self) -> Deadlines {
        self.deadlines
    }

    /// Sets the time limits of the calls that follow. The hub keeps its own for joining and silence.
    pub fn set_deadlines(&mut self, deadlines: Deadlines) {
        self.deadlines = deadlines;
    }

    /// Whether the ring stays in device memory between updates, for engines that have budgeted for it; at first it does
    /// not. Native workers then keep their mapping too. `false` frees it at once.
    pub fn keep_ring(&mut self, keep: bool) {
        self.keep_ring = keep;
        self.kept_ring = self.kept_ring.take().filter(|_| keep);
    }

    /// Holds `checkpoint` under `name`; a name that is taken is an error.
    pub fn register(&mut self, name: &str, checkpoint: RegisteredCheckpoint) -> Result<()> {
        if self.checkpoints.contains_key(name) {
            return Err(Error::new(
                ErrorKind::ConfigInvalid,
                "register a checkpoint",
                format!("`{name}` is registered already; unregister it first"),
            ));
        }
        let held = Held { registrations: Vec::new(), layout: None, checkpoint: Arc::new(checkpoint) };
        self.checkpoints.insert(name.to_owned(), held);
        Ok(())
    }

    /// Lets go of `name`; `false` if there was none. Reads of its memory that are under way fail at their readers.
    pub fn unregister(&mut self, name: &str) -> bool {
        self.forget_metas(name);
        self.checkpoints.remove(name).is_some()
    }

    /// What this rank holds under `name`.
    pub fn checkpoint(&self, name: &str) -> Option<&Arc<RegisteredCheckpoint>> {
        self.checkpoints.get(name).map(|held| &held.checkpoint)
    }

    /// Names of what this rank holds, sorted.
    pub fn checkpoints(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.checkpoints.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Waits until every rank has come here.
    pub async fn barrier(&mut self, name: &str) -> Result<()> {
        self.gather(&format!("barrier {name}"), Bytes::new()).await.map(drop)
    }

    /// Keeps a communicator in place of the oldest. The one of all ranks stays: a rank that was not in the last few
    /// updates still has it, and would count on it.
    fn keep(&mut self, group: Group) {
        self.groups.insert(0, group);
        let all = self.all_ranks().len();
        if self.groups.len() > GROUPS_KEPT
            && let Some(oldest) = self.groups.iter().rposition(|g| g.members.len() < all)
        {
            self.groups.remove(oldest);
        }
    }

    /// Collective over `request.ranks`: moves the checkpoint into every member's worker, or into none.
    ///
    /// `request.ranks` also says how: see [`UpdateRequest::ranks`].
    pub async fn update(&mut self, request: UpdateRequest) -> Result<UpdateReport> {
        let source = Source::of(self, &request.checkpoint)?;
        let name = request.checkpoint.clone();
        let report = self.move_weights(request, source.clone(), &name).await?;
        self.keep_source(&name, report.version, source);
        Ok(report)
    }

    /// The members of an update that names none.
    fn all_ranks(&self) -> Vec<Rank> {
        if self.present.is_empty() { (0..self.world_size).collect() } else { self.present.clone() }
    }

    /// One update from `source`, which is recorded under the checkpoint's `name`.
    async fn move_weights(
        &mut self,
        request: UpdateRequest,
        source: Source,
        name: &str,
    ) -> Result<UpdateReport> {
        let span = tracing::info_span!(
            "update",
            rank = self.rank,
            checkpoint = request.checkpoint,
            version = request.version.0,
        );
        self.attempt_update(request, source, name).instrument(span).await
    }

    async fn attempt_update(
        &mut self,
        mut request: UpdateRequest,
        source: Source,
        name: &str,
    ) -> Result<UpdateReport> {
        let operation = "update weights";
        self.may_be_mixed = false;
        self.last_version = self.last_version.max(request.version);
        let Source { known, checkpoint, .. } = &source;
        let pull = self.pull(known, !request.ranks.is_empty())?;
        let p2p = pull.is_some();
        let arenas = checkpoint.as_ref().map(|c| c.arenas.clone()).unwrap_or_default();
        if request.ranks.is_empty() {
            request.ranks = self.all_ranks();
        }
        request.ranks.sort_unstable();
        request.ranks.dedup();
        if !request.ranks.contains(&self.rank) {
            return Err(Error::new(
                ErrorKind::ConfigInvalid,
                operation,
                "this rank is not among the ranks of the update",
            )
            .with(Key::Rank, self.rank));
        }
        if request.ranks.len() > 1 && self.transport.collective().is_none() {
            return Err(no_broadcasts(&*self.transport));
        }
        let trace = Trace::default();
        let updates = self.session.updates();
        // A communicator that broke since the last update, or that a member has lost, is no use to anyone.
        let returned = self.session.take_returned();
        self.groups.retain(|g| {
            g.communicator.abort.poisoned().is_none() && !g.members.iter().any(|r| returned.contains(r))
        });
        let kept = self.groups.iter().position(|g| g.members == request.ranks);
        let group = kept.map(|index| self.groups.remove(index));
        let leader = request.ranks.first() == Some(&self.rank);
        let token = match &group {
            None if leader => Some(new_token(&*self.transport, request.ranks.len()).await?),
            _ => None,
        };
        self.session.send(&ToHub::Join(Joining {
            checkpoint: request.checkpoint.clone(),
            version: request.version,
            ranks: request.ranks.clone(),
            device_uuid: self.device.info().uuid.clone(),
            endpoint: request.sink.as_ref().map(|s| s.endpoint().to_owned()),
            free_bytes: self.device.free_memory_bytes()?
                + self.kept_ring.as_ref().map_or(0, |kept| kept.len_bytes()),
            communicator: group.as_ref().map(|g| g.epoch),
            token,
        }))?;
        let attempt = Attempt {
            rank: self.rank,
            version: request.version,
            device: self.device.clone(),
            transport: self.transport.clone(),
            deadlines: self.deadlines,
            limits: self.limits.clone(),
            manifest: known.manifest.clone(),
            arenas,
            pull,
            sink: request.sink,
            engine: request.engine,
            pause: self.policy.pause,
            leave: self.policy.on_failure == OnFailure::Leave,
            group,
            keep_ring: self.keep_ring,
            kept_ring: self.kept_ring.take(),
            quarantine: std::mem::take(&mut self.quarantine),
            trace: trace.clone(),
        };
        let Ended { outcome, epoch, plan, group, kept_ring, quarantine, touched, may_be_mixed, finished } =
            drive(attempt, self.session.clone(), updates).await;
        if let Some(group) = group {
            // An update of all ranks and one of some alternate without building anything anew.
            self.keep(group);
        }
        self.kept_ring = kept_ring;
        self.quarantine = quarantine;
        self.may_be_mixed = may_be_mixed;
        self.record(&Aftermath {
            outcome: &outcome,
            epoch: epoch.unwrap_or_default(),
            checkpoint: name,
            version: request.version,
            members: &request.ranks,
            touched,
            finished,
        });
        let result = match outcome {
            Outcome::Committed { failure: None } => Ok(UpdateReport::new(
                request.version,
                epoch,
                self.rank,
                p2p,
                plan.as_deref(),
                &known.manifest,
                &trace,
            )),
            Outcome::Committed { failure: Some(cause) } => Err(cause),
            Outcome::Failed { cause } => Err(cause),
            Outcome::InDoubt { cause } => Err(Error::new(
                ErrorKind::PeerLost,
                operation,
                format!(
                    "version {} is in doubt: all buckets were loaded here and no decision was heard",
                    request.version
                ),
            )
            .recovery_is(Recovery::Fatal)
            .with(Key::Rank, self.rank)
            .caused_by(cause)),
        };
        self.timelines.add(name, request.version, epoch, &trace, result.as_ref().err());
        result
    }
}

/// What the hub tells all members so that they find the leader. One member alone needs nobody.
async fn new_token(transport: &dyn Transport, members: usize) -> Result<Bytes> {
    if members == 1 {
        return Ok(Bytes::new());
    }
    transport.collective().ok_or_else(|| no_broadcasts(transport))?.create_token().await
}
