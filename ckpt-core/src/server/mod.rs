//! The parameter server: one per inference worker, holds a share of checkpoints and moves it on request.

mod report;

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;

pub use report::{Stages, UpdateReport};

use crate::{
    checkpoint::RegisteredCheckpoint,
    control::{Joining, Session, ToHub},
    deadlines::Deadlines,
    device::{DeviceBackend, Ring},
    error::{Error, ErrorKind, Key, Recovery, Result},
    manifest::{Manifest, Share},
    plan::PlanLimits,
    sink::WeightSink,
    transport::Transport,
    types::{Rank, Version},
    update::{
        EngineCall, Outcome,
        driver::{Attempt, Ended, Group, drive},
        trace::Trace,
    },
};

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
    /// The members, ascending; empty for all ranks of the job.
    pub ranks: Vec<Rank>,
    /// The link to this rank's worker; `None` for a rank without one.
    pub sink: Option<Box<dyn WeightSink>>,
    /// Set on the one rank of an engine that sends its request.
    pub engine: Option<EngineCall>,
}

/// Holds a share of checkpoints in host memory and updates running engines from it.
pub struct ParameterServer {
    rank: Rank,
    world_size: u32,
    session: Session,
    device: Arc<dyn DeviceBackend>,
    transport: Arc<dyn Transport>,
    deadlines: Deadlines,
    limits: PlanLimits,
    checkpoints: HashMap<String, Arc<RegisteredCheckpoint>>,
    manifests: HashMap<String, Arc<Manifest>>,
    group: Option<Group>,
    /// Rings that a worker may still have mapped after a failure.
    quarantine: Vec<Arc<dyn Ring>>,
    gathers: u64,
}

impl ParameterServer {
    /// A server without checkpoints.
    pub fn new(config: ServerConfig) -> Self {
        Self {
            rank: config.session.rank(),
            world_size: config.session.world_size(),
            session: config.session,
            device: config.device,
            transport: config.transport,
            deadlines: config.deadlines,
            limits: config.limits,
            checkpoints: HashMap::new(),
            manifests: HashMap::new(),
            group: None,
            quarantine: Vec::new(),
            gathers: 0,
        }
    }

    /// The rank's device.
    pub fn device(&self) -> &Arc<dyn DeviceBackend> {
        &self.device
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
        self.checkpoints.insert(name.to_owned(), Arc::new(checkpoint));
        Ok(())
    }

    /// Lets go of `name`; `false` if there was none.
    pub fn unregister(&mut self, name: &str) -> bool {
        self.manifests.remove(name);
        self.checkpoints.remove(name).is_some()
    }

    /// What this rank holds under `name`.
    pub fn checkpoint(&self, name: &str) -> Option<&Arc<RegisteredCheckpoint>> {
        self.checkpoints.get(name)
    }

    /// Collective: every rank learns what every rank holds of `name`.
    pub async fn gather_metas(&mut self, name: &str) -> Result<Arc<Manifest>> {
        let share = match self.checkpoints.get(name) {
            Some(checkpoint) => (*checkpoint.share).clone(),
            None => Share::default(),
        };
        self.gathers += 1;
        let gather = format!("metas {} of {name}", self.gathers);
        let part = encode(&share)?;
        let deadline = std::time::Instant::now() + self.deadlines.join;
        let parts = self.session.gather(&gather, Bytes::from(part), deadline).await?;
        let mut manifest = Manifest::default();
        for (rank, part) in parts.iter().enumerate() {
            let share = decode(part).map_err(|e| e.with(Key::Rank, rank))?;
            if share.tensors().next().is_some() {
                manifest.shares.insert(rank as Rank, Arc::new(share));
            }
        }
        let manifest = Arc::new(manifest);
        self.manifests.insert(name.to_owned(), manifest.clone());
        Ok(manifest)
    }

    /// Waits until every rank has come here.
    pub async fn barrier(&mut self, name: &str) -> Result<()> {
        self.gathers += 1;
        let gather = format!("barrier {} {name}", self.gathers);
        let deadline = std::time::Instant::now() + self.deadlines.join;
        self.session.gather(&gather, Bytes::new(), deadline).await.map(drop)
    }

    /// Collective over `request.ranks`: moves the checkpoint into every member's worker, or into none.
    pub async fn update(&mut self, mut request: UpdateRequest) -> Result<UpdateReport> {
        let operation = "update weights";
        let manifest = self.manifests.get(&request.checkpoint).cloned().ok_or_else(|| {
            Error::new(
                ErrorKind::ConfigInvalid,
                operation,
                format!("no metas of `{}`: gather or load them first", request.checkpoint),
            )
            .with(Key::Rank, self.rank)
        })?;
        let arenas = self.checkpoints.get(&request.checkpoint).map(|c| c.arenas.clone()).unwrap_or_default();
        if request.ranks.is_empty() {
            request.ranks = (0..self.world_size).collect();
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
        let trace = Trace::default();
        let updates = self.session.updates();
        // A communicator that broke since the last update is no use to anyone.
        self.group = self
            .group
            .take()
            .filter(|g| g.members == request.ranks && g.communicator.abort.poisoned().is_none());
        let leader = request.ranks.first() == Some(&self.rank);
        let token = match (leader && request.ranks.len() > 1, &self.group, self.transport.collective()) {
            (true, None, Some(collective)) => Some(collective.create_token().await?),
            _ => None,
        };
        self.session.send(&ToHub::Join(Joining {
            checkpoint: request.checkpoint.clone(),
            version: request.version,
            ranks: request.ranks.clone(),
            device_uuid: self.device.info().uuid.clone(),
            endpoint: request.sink.as_ref().map(|s| s.endpoint().to_owned()),
            free_bytes: self.device.free_memory_bytes()?,
            communicator: self.group.as_ref().map(|g| g.epoch),
            token,
        }))?;
        let attempt = Attempt {
            rank: self.rank,
            version: request.version,
            device: self.device.clone(),
            transport: self.transport.clone(),
            deadlines: self.deadlines,
            limits: self.limits.clone(),
            manifest: manifest.clone(),
            arenas,
            sink: request.sink,
            engine: request.engine,
            group: self.group.take(),
            trace: trace.clone(),
        };
        let Ended { outcome, epoch, plan, group, quarantined } =
            drive(attempt, self.session.clone(), updates).await;
        self.group = group;
        self.quarantine.extend(quarantined);
        match outcome {
            Outcome::Committed { failure: None } => {
                Ok(UpdateReport::new(request.version, epoch, plan.as_deref(), &manifest, &trace))
            }
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
        }
    }
}

fn encode(share: &Share) -> Result<Vec<u8>> {
    postcard::to_allocvec(share)
        .map_err(|e| Error::new(ErrorKind::Internal, "encode metas", "they cannot be written").caused_by(e))
}

fn decode(part: &[u8]) -> Result<Share> {
    postcard::from_bytes(part)
        .map_err(|e| Error::new(ErrorKind::Corrupt, "read metas", "they cannot be read").caused_by(e))
}
