//! What `ckpt update` and `ckpt join` have in common: the engines beside the ranks, and one update of them.

use std::{collections::HashSet, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use bytes::Bytes;
use ckpt_core::{
    Error, ErrorKind, Result, Version,
    checkpoint::DigestAlgorithm,
    engine::{ENGINES, EngineConfig, HttpTemplate, create},
    manifest::Manifest,
    server::{UpdateReport, UpdateRequest},
    sink::{CheckpointEngineSink, Layout, NativeSink, NativeSinkConfig, WeightSink, WireVersion},
    types::TensorMeta,
    update::EngineCall,
};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::http_get::TrustArgs;
use crate::{
    Context,
    job::{JobArgs, Rank, Reading},
    output::format_bytes,
    policy::{PolicyArgs, after_failure},
    progress::Bar,
    recorder::{Recorder, through_signals},
};

/// A time to wait, which may be nothing: at most a month.
fn pause(text: &str) -> std::result::Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=2_678_400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("write seconds, at most 2678400".to_owned()),
    }
}

/// Options of every command that updates engines
#[derive(Args)]
pub(crate) struct InstanceArgs {
    /// Where the engine listens; `{rank}` stands for the rank
    #[arg(long, default_value = "http://localhost:19730", value_name = "URL")]
    endpoint: String,
    /// Reach the engine through this UNIX socket instead of the endpoint's host; `{rank}` stands for the rank
    #[arg(long, value_name = "PATH")]
    uds: Option<String>,
    /// Ranks of one engine; the first rank of each such group sends the engine's request
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    inference_parallel_size: u32,
    /// Name under which the checkpoint is registered
    #[arg(long, default_value = "my-checkpoint-iter-0", value_name = "NAME")]
    pub(crate) checkpoint_name: String,
    /// What is told that an update begins
    #[arg(long, default_value = "vllm", value_parser = clap::builder::PossibleValuesParser::new(ENGINES))]
    engine: String,
    /// JSON body for `--engine http`
    #[arg(long, value_name = "JSON")]
    http_template: Option<String>,
    /// What the workers speak: checkpoint-engine 0.4 and newer, older ones, or ours
    #[arg(long, value_enum, default_value_t = WorkerProtocol::Ce04)]
    worker_protocol: WorkerProtocol,
    /// Number of the version that is installed
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) weight_version: u64,
    /// Do the same update this many times, with rising versions
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..), value_name = "N")]
    pub(crate) repeat: u64,
    /// Afterwards go on serving this rank's memory to others for so long
    #[arg(long, value_parser = pause, value_name = "SECONDS")]
    pub(crate) sleep_time: Option<Duration>,
    /// For `--engine http`: path that pauses the engine, in which `{mode}` is filled in
    #[arg(long, value_name = "PATH", requires = "http_resume_path")]
    http_pause_path: Option<String>,
    /// For `--engine http`: path that resumes it
    #[arg(long, value_name = "PATH", requires = "http_pause_path")]
    http_resume_path: Option<String>,
    /// Write every stage of every bucket to FILE, also when the update fails, for chrome://tracing or Perfetto. Where there
    /// are several ranks each writes its own: `{rank}` stands for its number, which else comes before the extension
    #[arg(long, value_name = "FILE")]
    trace: Option<String>,
    #[command(flatten)]
    pub(crate) trust: TrustArgs,
    #[command(flatten)]
    pub(crate) policy: PolicyArgs,
    #[command(flatten)]
    pub(crate) job: JobArgs,
}

/// The language of the worker link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WorkerProtocol {
    /// checkpoint-engine 0.4.0 and newer
    #[value(name = "ce-0.4")]
    Ce04,
    /// checkpoint-engine before 0.4.0
    #[value(name = "ce-0.3")]
    Ce03,
    /// ours: docs/worker-protocol.md
    #[value(name = "native")]
    Native,
}

/// What one update did, as its lowest member saw it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Done {
    /// Of the slowest member.
    pub(crate) update_s: f64,
    pub(crate) bucket_bytes: u64,
    pub(crate) ring_bytes: u64,
    pub(crate) tensor_bytes: u64,
    pub(crate) tensors: u64,
    pub(crate) buckets: u64,
    /// Seconds of each part.
    pub(crate) stages: serde_json::Value,
}

impl Done {
    fn new(report: &UpdateReport) -> anyhow::Result<Self> {
        Ok(Self {
            update_s: report.stages.total_s,
            bucket_bytes: report.bucket_bytes,
            ring_bytes: report.ring_bytes,
            tensor_bytes: report.tensor_bytes,
            tensors: report.tensors,
            buckets: report.buckets,
            stages: serde_json::to_value(report.stages)?,
        })
    }

    fn transfer_s(&self) -> f64 {
        self.stages.get("transfer_s").and_then(serde_json::Value::as_f64).unwrap_or(0.0)
    }
}

/// What a command says of its updates, whatever brought the bytes.
#[derive(Serialize)]
pub(crate) struct Totals {
    /// Of the slowest rank, for each update.
    update_s: Vec<f64>,
    bucket_bytes: u64,
    ring_bytes: u64,
    pub(crate) tensor_bytes: u64,
    pub(crate) tensors: u64,
    buckets: u64,
    gib_per_s: f64,
    /// Of the last update, on its lowest rank.
    stages: serde_json::Value,
    #[serde(skip)]
    transfer_s: f64,
}

impl Totals {
    /// `None` without updates.
    pub(crate) fn new<'a>(done: impl Iterator<Item = &'a Done> + Clone) -> Option<Self> {
        let last = done.clone().last()?.clone();
        let update_s: Vec<f64> = done.map(|d| d.update_s).collect();
        let best = update_s.iter().copied().fold(f64::INFINITY, f64::min);
        Some(Self {
            update_s,
            bucket_bytes: last.bucket_bytes,
            ring_bytes: last.ring_bytes,
            tensor_bytes: last.tensor_bytes,
            tensors: last.tensors,
            buckets: last.buckets,
            gib_per_s: last.tensor_bytes as f64 / best / (1_u64 << 30) as f64,
            transfer_s: last.transfer_s(),
            stages: last.stages,
        })
    }

    /// How the bytes moved, for people.
    pub(crate) fn rows(&self) -> [(&'static str, String); 3] {
        let (buckets, limit) = (self.buckets, format_bytes(self.bucket_bytes));
        [
            ("transfer", format!("{:.3} s in {buckets} buckets of up to {limit}", self.transfer_s)),
            ("ring", format_bytes(self.ring_bytes)),
            ("rate", format!("{:.2} GiB/s", self.gib_per_s)),
        ]
    }
}

/// Durations for people: `0.123 s, 0.119 s`.
pub(crate) fn seconds(all: &[f64]) -> String {
    all.iter().map(|s| format!("{s:.3} s")).collect::<Vec<_>>().join(", ")
}

/// Numbers the tensors of `manifest` for workers that speak the native protocol. Replicas count once.
pub(crate) fn layout(manifest: &Manifest) -> anyhow::Result<Arc<Layout>> {
    let mut seen = HashSet::new();
    let tensors: Vec<_> = manifest
        .tensors()
        .filter(|(_, tensor)| seen.insert(&*tensor.meta.name))
        .map(|(_, tensor)| tensor.meta.clone())
        .collect();
    Ok(Arc::new(Layout::new(tensors)?))
}

impl InstanceArgs {
    /// Joins the job, does `work` as its rank and leaves; the trace is written however that ends.
    pub(crate) async fn run(
        &self,
        reading: Reading,
        context: &Context,
        work: impl AsyncFnOnce(&mut Rank, &mut Recorder) -> anyhow::Result<()>,
    ) -> anyhow::Result<ExitCode> {
        let mut recorder = Recorder::new(self.trace.as_deref())?;
        let signals = recorder.signals()?;
        let joined = Rank::start_reading(&self.job, &context.registry, reading).await;
        let mut rank = match joined {
            Ok(rank) => rank,
            Err(error) => {
                recorder.write(Vec::new(), Some(&error)).await;
                return Err(error);
            }
        };
        rank.server = rank.server.with_policy(self.policy.policy());
        recorder.watch(&mut rank.server);
        let (session, abort) = (rank.job.session.clone(), rank.server.deadlines().abort);
        let result = match signals {
            Some(signals) => through_signals(signals, session, abort, work(&mut rank, &mut recorder)).await,
            None => work(&mut rank, &mut recorder).await,
        };
        recorder.write(rank.server.take_timelines(), result.as_ref().err()).await;
        rank.end(result.is_ok()).await;
        result.map(|()| ExitCode::SUCCESS)
    }

    /// Collective over the job: `ranks` (all, if empty) update, the others wait for them.
    pub(crate) async fn update(
        &self,
        rank: &mut Rank,
        layout: &Arc<Layout>,
        ranks: &[u32],
        version: Version,
    ) -> anyhow::Result<Done> {
        let mut part = Bytes::new();
        if ranks.is_empty() || ranks.contains(&rank.rank()) {
            let bytes = layout.tensors().iter().map(TensorMeta::len_bytes).sum();
            let sink = Bar::watch(&format!("rank {}: update", rank.rank()), bytes, self.sink(layout, rank)?);
            let request = UpdateRequest {
                checkpoint: self.checkpoint_name.clone(),
                version,
                ranks: ranks.to_vec(),
                sink: Some(sink),
                engine: self.engine(rank, ranks)?,
            };
            let report = match rank.server.update(request).await {
                Ok(report) => report,
                Err(failure) => return Err(self.recover(failure, rank, layout, ranks).await.into()),
            };
            part = serde_json::to_vec(&Done::new(&report)?)?.into();
        }
        let mut all: Option<Done> = None;
        for part in rank.collect("updated", part).await?.iter().filter(|part| !part.is_empty()) {
            let one: Done = serde_json::from_slice(part)?;
            let slowest = all.as_ref().map_or(0.0, |all| all.update_s).max(one.update_s);
            all.get_or_insert(one).update_s = slowest;
        }
        let nobody = || Error::new(ErrorKind::Internal, "update weights", "no rank made the update");
        all.ok_or_else(|| nobody().into())
    }

    /// What `--on-failure` asks for. The failure, and what came of that.
    async fn recover(&self, failure: Error, rank: &mut Rank, layout: &Arc<Layout>, ranks: &[u32]) -> Error {
        let first = rank.rank() - rank.rank() % self.inference_parallel_size;
        let own: Vec<u32> = (first..first.saturating_add(self.inference_parallel_size)).collect();
        // The last version is of the same model, so the layout is the same; its bytes have other digests.
        let link = self.sink_with(layout, rank, false).and_then(|s| Ok((Some(s), self.engine(rank, ranks)?)));
        after_failure(&mut rank.server, failure, ranks.to_vec(), &own, |_| link).await
    }

    /// The link to this rank's worker.
    fn sink(&self, layout: &Arc<Layout>, rank: &Rank) -> Result<Box<dyn WeightSink>> {
        self.sink_with(layout, rank, self.policy.verify().checks_workers())
    }

    fn sink_with(&self, layout: &Arc<Layout>, rank: &Rank, check: bool) -> Result<Box<dyn WeightSink>> {
        let uuid = &rank.server.device().info().uuid;
        Ok(match self.worker_protocol {
            WorkerProtocol::Native => {
                let metas = rank.server.metas_of(&self.checkpoint_name).filter(|_| check);
                let digests = metas.map(|m| Arc::new(m.digests(DigestAlgorithm::Xxh3_64)));
                let config =
                    NativeSinkConfig { layout: Some(layout.clone()), digests, ..NativeSinkConfig::default() };
                Box::new(NativeSink::bind(&rank.runtime_dir, uuid, config)?)
            }
            WorkerProtocol::Ce04 => {
                Box::new(CheckpointEngineSink::bind(&rank.runtime_dir, uuid, WireVersion::Ce04)?)
            }
            WorkerProtocol::Ce03 => {
                Box::new(CheckpointEngineSink::bind(&rank.runtime_dir, uuid, WireVersion::Ce03)?)
            }
        })
    }

    /// What an HTTP engine is sent.
    fn template(&self) -> Result<Option<HttpTemplate>> {
        let template = self.http_template.as_deref().map(HttpTemplate::parse).transpose()?;
        let paths = self.http_pause_path.as_ref().zip(self.http_resume_path.as_ref());
        Ok(match paths {
            Some((pause, resume)) => Some(template.unwrap_or_default().paused_at(pause, resume)),
            None => template,
        })
    }

    /// The engine's request, on the first of each engine's ranks that update.
    fn engine(&self, rank: &Rank, ranks: &[u32]) -> Result<Option<EngineCall>> {
        let here = rank.rank();
        let first = here - here % self.inference_parallel_size;
        let last = rank.world_size().min(first.saturating_add(self.inference_parallel_size));
        let members: Vec<u32> = (first..last).filter(|r| ranks.is_empty() || ranks.contains(r)).collect();
        if members.first() != Some(&here) {
            return Ok(None);
        }
        let at = |text: &str| text.replace("{rank}", &here.to_string());
        let engine = create(EngineConfig {
            kind: self.engine.clone(),
            endpoint: at(&self.endpoint),
            uds: self.uds.as_deref().map(|path| PathBuf::from(at(path))),
            ca: self.trust.tls_ca.clone(),
            template: self.template()?,
        })?;
        Ok(Some(EngineCall { engine, ranks: members }))
    }
}
