//! The owner of the parameter server: does one order after the other, so that requests never wait for each other's locks
//! and health is answered at any time.

use std::{collections::HashMap, path::PathBuf, sync::Arc, time::Instant};

use ckpt_core::{
    Error, ErrorKind, Result, Version,
    checkpoint::{DigestAlgorithm, RegisteredCheckpoint},
    deadlines::Deadlines,
    engine::{EngineConfig, HttpTemplate, create},
    metas::Metas,
    server::{ParameterServer, UpdateRequest},
    sink::{
        CheckpointEngineSink, Layout, NativeSink, NativeSinkConfig, WeightSink, WireVersion,
        release_in_background,
    },
    update::EngineCall,
};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::{
    body::UpdateBody,
    view::{CurrentMetas, Doing, Held, View},
};
use crate::{
    command::{http_get::TrustArgs, update::WorkerProtocol},
    policy::after_failure,
    trace_folder::TraceFolder,
};

/// What checkpoint-engine posts to the URL of an update, for URLs whose engine is not known.
const COLLECTIVE_RPC: &str =
    r#"{"method": "update_weights_from_ipc", "args": ["{{endpoints}}"], "timeout": "{{timeout_s}}"}"#;

/// One request that changes something.
pub(super) enum Order {
    Register {
        name: String,
        checkpoint: Box<RegisteredCheckpoint>,
    },
    Unregister {
        name: String,
    },
    Gather {
        name: String,
    },
    LoadMetas {
        metas: Box<Metas>,
    },
    /// The job was joined again: rank 0 is another process.
    Rejoined,
    Update {
        name: String,
        body: UpdateBody,
        /// Held until the update is over: a second one is refused meanwhile.
        turn: OwnedSemaphorePermit,
    },
}

/// An order and who waits for its end.
pub(super) type Queued = (Order, oneshot::Sender<Result<()>>);

/// Owns the parameter server.
pub(super) struct Actor {
    pub(super) server: ParameterServer,
    pub(super) rank: u32,
    pub(super) world_size: u32,
    pub(super) runtime_dir: PathBuf,
    pub(super) protocol: WorkerProtocol,
    /// Native workers are told the digests.
    /// How engines at https:// are verified.
    pub(super) trust: TrustArgs,
    pub(super) check_workers: bool,
    pub(super) deadlines: Deadlines,
    pub(super) view: Arc<View>,
    /// Where the timelines of updates go.
    pub(super) traces: Option<TraceFolder>,
    /// What native workers are told, by the metas that it was made from.
    pub(super) layouts: HashMap<String, (Arc<Metas>, Arc<Layout>)>,
}

impl Actor {
    /// Works until all senders are gone.
    pub(super) async fn run(mut self, mut orders: mpsc::Receiver<Queued>) {
        while let Some((order, reply)) = orders.recv().await {
            let result = self.perform(order).await;
            if let Err(error) = &result {
                tracing::warn!(rank = self.rank, %error, "a request failed");
            }
            // A client that hung up does not want to know.
            let _ = reply.send(result);
        }
    }

    async fn perform(&mut self, order: Order) -> Result<()> {
        match order {
            Order::Register { name, checkpoint } => {
                let held = Held::from(&*checkpoint);
                self.server.register(&name, *checkpoint)?;
                tracing::info!(rank = self.rank, checkpoint = name, "registered");
                self.view.lock().checkpoints.insert(name, Some(held));
                Ok(())
            }
            Order::Unregister { name } => {
                self.layouts.remove(&name);
                if self.server.unregister(&name) {
                    tracing::info!(rank = self.rank, checkpoint = name, "unregistered");
                    self.view.lock().checkpoints.remove(&name);
                } else {
                    tracing::warn!(rank = self.rank, checkpoint = name, "not registered here: nothing to do");
                }
                let mut state = self.view.lock();
                state.metas.take_if(|metas| metas.checkpoint.as_ref() == Some(&name));
                Ok(())
            }
            Order::Gather { name } => {
                self.view.lock().doing = Doing::GatheringMetas { checkpoint: name.clone() };
                let gathered = self.server.gather_metas(&name).await;
                self.view.lock().doing = Doing::Idle;
                gathered?;
                self.new_metas(Some(name));
                Ok(())
            }
            Order::LoadMetas { metas } => {
                self.server.load_metas(*metas)?;
                self.new_metas(None);
                Ok(())
            }
            Order::Rejoined => {
                self.server.rejoined();
                let mut state = self.view.lock();
                // What was gathered names a process that is gone.
                state.metas.take_if(|metas| metas.checkpoint.is_some());
                Ok(())
            }
            Order::Update { name, body, turn } => {
                let result = self.update(name, body).await;
                drop(turn);
                result
            }
        }
    }

    /// The server has new metas: the next update installs a new version.
    fn new_metas(&mut self, checkpoint: Option<String>) {
        let metas = match &checkpoint {
            Some(name) => self.server.metas_of(name),
            None => self.server.metas(),
        };
        // Equal on all ranks, also where one of them is a restarted process.
        let agreed = self.server.version_of(checkpoint.as_deref().unwrap_or_default());
        let mut state = self.view.lock();
        let version = agreed.unwrap_or(Version(state.metas_seen + 1));
        state.metas_seen = version.0.max(state.metas_seen);
        state.metas = metas.map(|metas| CurrentMetas { metas: metas.clone(), checkpoint, version });
    }

    async fn update(&mut self, name: String, body: UpdateBody) -> Result<()> {
        let metas = self.server.metas_of(&name).cloned().ok_or_else(|| no_metas(&name))?;
        let gathered = self.view.lock().metas.as_ref().map(|metas| metas.version);
        let version = body.weight_version.map(Version).or(gathered).unwrap_or(Version(1));
        let members = if body.ranks.is_empty() { (0..self.world_size).collect() } else { body.ranks.clone() };
        let engine = engine(&body, &self.trust, &members, self.rank)?;
        let sink = self.sink(&name, &metas, self.check_workers)?;
        self.view.lock().doing = Doing::Updating {
            checkpoint: name.clone(),
            version,
            ranks: members,
            worker_endpoint: sink.endpoint().to_owned(),
            since: Some(Instant::now()),
        };
        self.server.set_deadlines(Deadlines {
            total: body.timeout,
            ready: self.deadlines.ready.min(body.timeout),
            ..self.deadlines
        });
        let ranks = body.ranks.clone();
        let request = UpdateRequest { checkpoint: name.clone(), version, ranks, sink: Some(sink), engine };
        let result = match self.server.update(request).await {
            Err(failure) => Err(self.recover(failure, &name, &metas, &body).await),
            report => report,
        };
        if let Some(traces) = &mut self.traces {
            traces.write(self.server.take_timelines()).await;
        }
        {
            let (weights, kept) = (self.server.weights().clone(), self.server.kept_version());
            let mut state = self.view.lock();
            (state.weights, state.kept) = (weights, kept);
        }
        self.view.updated(&result);
        let report = result?;
        tracing::info!(
            rank = self.rank,
            version = report.version.0,
            seconds = report.stages.total_s,
            "updated"
        );
        Ok(())
    }

    /// What `--on-failure` asks for, and for workers of neighbours that died. The failure, and what came of that.
    async fn recover(&mut self, failure: Error, name: &str, metas: &Arc<Metas>, body: &UpdateBody) -> Error {
        if failure.kind() == ErrorKind::PeerLost {
            // A parameter server of this host may have died, and left its worker waiting for it.
            release_in_background(self.runtime_dir.clone(), None);
        }
        let members = if body.ranks.is_empty() { (0..self.world_size).collect() } else { body.ranks.clone() };
        let own = if body.group.is_empty() { vec![self.rank] } else { body.group.clone() };
        // The last version is of the same model, so the layout is the same; its bytes have other digests.
        let link = self.sink(name, metas, false);
        let link = link.and_then(|sink| Ok((Some(sink), engine(body, &self.trust, &members, self.rank)?)));
        after_failure(&mut self.server, failure, body.ranks.clone(), &own, |_| link).await
    }

    /// The link to this rank's worker.
    fn sink(&mut self, name: &str, metas: &Arc<Metas>, check: bool) -> Result<Box<dyn WeightSink>> {
        let uuid = self.server.device().info().uuid.clone();
        let folder = &self.runtime_dir;
        Ok(match self.protocol {
            WorkerProtocol::Native => {
                let layout = match self.layouts.get(name) {
                    Some((of, layout)) if Arc::ptr_eq(of, metas) => layout.clone(),
                    _ => {
                        let layout = Arc::new(layout(metas)?);
                        self.layouts.insert(name.to_owned(), (metas.clone(), layout.clone()));
                        layout
                    }
                };
                let digests = check.then(|| Arc::new(metas.digests(DigestAlgorithm::Xxh3_64)));
                let config =
                    NativeSinkConfig { layout: Some(layout), digests, ..NativeSinkConfig::default() };
                Box::new(NativeSink::bind(folder, &uuid, config)?)
            }
            WorkerProtocol::Ce04 => Box::new(CheckpointEngineSink::bind(folder, &uuid, WireVersion::Ce04)?),
            WorkerProtocol::Ce03 => Box::new(CheckpointEngineSink::bind(folder, &uuid, WireVersion::Ce03)?),
        })
    }
}

/// Every tensor once: replicas have one name.
fn layout(metas: &Metas) -> Result<Layout> {
    let mut names = std::collections::HashSet::new();
    let manifest = metas.manifest();
    let once = manifest.tensors().filter(|(_, tensor)| names.insert(tensor.meta.name.clone()));
    Layout::new(once.map(|(_, tensor)| tensor.meta.clone()).collect::<Vec<_>>())
}

fn no_metas(name: &str) -> Error {
    Error::new(
        ErrorKind::ConfigInvalid,
        "update weights",
        format!("there are no metas of `{name}`: post gather-metas to every rank first, or POST /v1/metas"),
    )
}

/// The engine behind `update_url`. Its last part tells which engine it is; any other URL gets what checkpoint-engine
/// would post.
fn engine(body: &UpdateBody, trust: &TrustArgs, members: &[u32], rank: u32) -> Result<Option<EngineCall>> {
    let Some(url) = &body.update_url else { return Ok(None) };
    let (kind, endpoint, template) = if let Some(base) = url.strip_suffix("/collective_rpc") {
        ("vllm", base, None)
    } else if let Some(base) = url.strip_suffix("/update_weights_from_ipc") {
        ("sglang", base, None)
    } else {
        ("http", url.as_str(), Some(HttpTemplate::parse(COLLECTIVE_RPC)?))
    };
    let engine = create(EngineConfig {
        kind: kind.to_owned(),
        endpoint: endpoint.to_owned(),
        uds: body.uds.as_ref().map(PathBuf::from),
        ca: trust.tls_ca.clone(),
        template,
    })
    .map_err(|error| error.with(ckpt_core::Key::Rank, rank))?;
    let ranks = if body.group.is_empty() { members.to_vec() } else { body.group.clone() };
    Ok(Some(EngineCall { engine, ranks }))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn call(url: &str, group: &[u32]) -> Option<EngineCall> {
        let body = UpdateBody {
            ranks: Vec::new(),
            update_url: (!url.is_empty()).then(|| url.to_owned()),
            group: group.to_vec(),
            timeout: Duration::from_secs(1),
            uds: None,
            weight_version: None,
        };
        engine(&body, &TrustArgs::default(), &[0, 1, 2, 3], 0).unwrap()
    }

    #[test]
    fn the_url_tells_the_engine_and_the_group_its_ranks() {
        assert!(call("", &[]).is_none());
        let all = call("http://localhost:8000/collective_rpc", &[]).unwrap();
        assert_eq!((all.engine.name(), all.ranks), ("vllm", vec![0, 1, 2, 3]));
        let some = call("http://localhost:30000/update_weights_from_ipc", &[2, 3]).unwrap();
        assert_eq!((some.engine.name(), some.ranks), ("sglang", vec![2, 3]));
        assert_eq!(call("http://localhost:8000/reload", &[]).unwrap().engine.name(), "http");
    }
}
