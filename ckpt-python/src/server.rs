//! A rank: its place in the job and its parameter server.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use ckpt_core::{
    Rank, Result, Version,
    checkpoint::{CheckpointSource, InPlace, LoadOptions, NamedTensor, Pool, load},
    control::{Job, JobOptions, Token},
    deadlines::Deadlines,
    device::{BufferSlice, DeviceInfo, MemoryKind, runtime_dir},
    metas::Metas,
    plan::PlanLimits,
    server::{OpenOptions, Opened, ParameterServer, Reading, UpdateReport, UpdateRequest, open},
    sink::{Layout, NativeSinkConfig, WeightSink, WorkerProtocol},
    update::EngineCall,
};
use pyo3::{prelude::*, types::PyBytes};
use tokio::sync::{Mutex, MutexGuard};

use crate::{
    error::{invalid, to_python},
    memory::{Described, Lent, Memory, describe, named_tensor},
    request::PythonEngine,
    runtime::wait,
    stream::Stream,
};

/// How long a rank that leaves waits for the others to leave too.
const LEAVE: Duration = Duration::from_secs(5);

/// One rank that has joined its job. `ckpt_engine.ParameterServer` is made of it.
#[pyclass(frozen, module = "ckpt_engine._native")]
pub(crate) struct Server {
    state: Shared,
    rank: Rank,
    world_size: u32,
    local_rank: u32,
    transport: &'static str,
    reader: &'static str,
    device: &'static str,
    info: DeviceInfo,
    token: Token,
}

/// `None` once the rank has left.
pub(crate) type Shared = Arc<Mutex<Option<State>>>;

pub(crate) struct State {
    job: Job,
    pub(crate) server: ParameterServer,
    runtime_dir: PathBuf,
    /// The pool that outlives checkpoints.
    shared_pool: Arc<Pool>,
    deadlines: Deadlines,
    gathers: u64,
    /// Sets of metas ever gathered or loaded; the next update installs this version.
    metas_seen: u64,
    /// The devices of all ranks.
    uuids: Vec<String>,
    /// What native workers are told, by the metas that it was made from.
    layouts: HashMap<String, (Arc<Metas>, Arc<Layout>)>,
}

/// What [`Server::update`] and [`Server::stream`] are asked.
pub(crate) struct Asked {
    pub(crate) name: String,
    pub(crate) version: Option<u64>,
    pub(crate) ranks: Vec<Rank>,
    pub(crate) timeout: Duration,
}

pub(crate) fn state<'a>(guard: &'a mut MutexGuard<'_, Option<State>>) -> Result<&'a mut State> {
    guard.as_mut().ok_or_else(|| invalid("use the parameter server", "it was closed"))
}

/// Seconds from Python; a limit that is no number is an error, not a panic.
fn seconds(value: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(value)
        .ok()
        .filter(|limit| *limit <= Duration::from_secs(30 * 86_400))
        .ok_or_else(|| invalid("read a time limit", format!("{value} s is not a time of at most 30 days")))
}

impl State {
    /// Every rank's part, by rank.
    async fn gather(&mut self, what: &str, part: Bytes, timeout: Duration) -> Result<Vec<Bytes>> {
        self.gathers += 1;
        let name = format!("python {} {what}", self.gathers);
        self.job.session.gather(&name, part, Instant::now() + timeout).await
    }

    /// Which device each rank has. All ranks call it.
    async fn learn_devices(&mut self, timeout: Duration) -> Result<()> {
        let own = self.server.device().info().uuid.clone();
        let parts = self.gather("devices", own.into(), timeout).await?;
        self.uuids = parts.iter().map(|part| String::from_utf8_lossy(part).into_owned()).collect();
        Ok(())
    }

    /// The link to this rank's worker.
    fn sink(&mut self, name: &str, protocol: WorkerProtocol) -> Result<Box<dyn WeightSink>> {
        let metas = self.server.metas_of(name).cloned().ok_or_else(|| {
            invalid(
                "update weights",
                format!("there are no metas of `{name}`: call gather_metas or load_metas first"),
            )
        })?;
        let mut config = NativeSinkConfig::default();
        if protocol == WorkerProtocol::Native {
            let known = self.layouts.get(name).filter(|(of, _)| Arc::ptr_eq(of, &metas));
            let layout = match known {
                Some((_, layout)) => layout.clone(),
                None => {
                    let layout = Arc::new(layout(&metas)?);
                    self.layouts.insert(name.to_owned(), (metas, layout.clone()));
                    layout
                }
            };
            config.layout = Some(layout);
        }
        let uuid = self.server.device().info().uuid.clone();
        protocol.bind(&self.runtime_dir, &uuid, config)
    }

    /// One update of this rank.
    pub(crate) async fn update(
        &mut self,
        asked: Asked,
        sink: Box<dyn WeightSink>,
        engine: Option<EngineCall>,
    ) -> Result<UpdateReport> {
        let Asked { name, version, ranks, timeout } = asked;
        let ready = self.deadlines.ready.min(timeout);
        self.server.set_deadlines(Deadlines { total: timeout, ready, ..self.deadlines });
        let version = Version(version.unwrap_or(self.metas_seen));
        let request = UpdateRequest { checkpoint: name, version, ranks, sink: Some(sink), engine };
        let report = self.server.update(request).await;
        self.server.set_deadlines(self.deadlines);
        report
    }
}

/// Every tensor once: replicas have one name.
fn layout(metas: &Metas) -> Result<Layout> {
    let mut names = HashSet::new();
    let manifest = metas.manifest();
    let once = manifest.tensors().filter(|(_, tensor)| names.insert(tensor.meta.name.clone()));
    Layout::new(once.map(|(_, tensor)| tensor.meta.clone()).collect::<Vec<_>>())
}

/// Where and how to open; the fields of the constructor's dict.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Settings {
    /// What stands for environment variables; the process's own come after them.
    variables: HashMap<String, String>,
    /// Which of the visible accelerators; else as the variables say.
    local_rank: Option<u32>,
    device: String,
    transport: String,
    reader: String,
    reader_token: Option<Vec<u8>>,
    token: Option<Vec<u8>>,
    bind: Option<String>,
    connections: usize,
    bucket_mib: Option<u64>,
    join_timeout: f64,
    bucket_timeout: f64,
}

impl Settings {
    fn options(self) -> Result<OpenOptions> {
        let env = |name: &str| self.variables.get(name).cloned().or_else(|| std::env::var(name).ok());
        let join = seconds(self.join_timeout)?;
        let deadlines = Deadlines { join, bucket: seconds(self.bucket_timeout)?, ..Deadlines::default() };
        let mut job = JobOptions::detect(&env, None, runtime_dir()?, deadlines)?;
        if let Some(token) = &self.token {
            job.token = Some(Token::new(token.clone())?);
        }
        if let Some(local_rank) = self.local_rank {
            job.cluster.local_rank = local_rank;
        }
        let mut limits = PlanLimits::from_env(&env)?;
        if let Some(mib) = self.bucket_mib {
            limits.target_bucket_bytes = mib.clamp(1, 1 << 20) << 20;
        }
        let secret = self.reader_token.map(Token::new).transpose()?;
        let parse = |text: String| {
            text.parse::<IpAddr>().map_err(|_| invalid("read an address", format!("`{text}` is not one")))
        };
        Ok(OpenOptions {
            job,
            device: self.device,
            transport: self.transport,
            reader: self.reader,
            reading: Reading { needed: secret.is_some(), secret },
            bind: self.bind.map(parse).transpose()?,
            connections: self.connections.clamp(1, 64),
            limits,
        })
    }
}

#[pymethods]
impl Server {
    #[new]
    fn new(py: Python<'_>, settings: &Bound<'_, PyAny>) -> PyResult<Self> {
        let settings: Settings = settings.extract()?;
        wait(py, async move {
            let options = settings.options()?;
            let (cluster, runtime_dir) = (options.job.cluster.clone(), options.job.runtime_dir.clone());
            let deadlines = options.job.deadlines;
            let Opened { job, server, transport } = open(options, &ckpt_cli::registry()).await?;
            let device = server.device().clone();
            let token = job.session.secret()?;
            let reader = server.reader().name();
            let state = State {
                job,
                server,
                runtime_dir,
                shared_pool: Pool::new(device.clone()),
                deadlines,
                gathers: 0,
                metas_seen: 0,
                uuids: Vec::new(),
                layouts: HashMap::new(),
            };
            Ok(Self {
                state: Arc::new(Mutex::new(Some(state))),
                rank: cluster.rank,
                world_size: cluster.world_size,
                local_rank: cluster.local_rank,
                transport,
                reader,
                device: device.kind(),
                info: device.info().clone(),
                token,
            })
        })
    }

    #[getter]
    fn rank(&self) -> u32 {
        self.rank
    }

    #[getter]
    fn world_size(&self) -> u32 {
        self.world_size
    }

    #[getter]
    fn local_rank(&self) -> u32 {
        self.local_rank
    }

    /// What broadcasts.
    #[getter]
    fn transport(&self) -> &'static str {
        self.transport
    }

    /// What reads other ranks' memory.
    #[getter]
    fn reader(&self) -> &'static str {
        self.reader
    }

    /// `host`, `cuda` or `ascend`.
    #[getter]
    fn device_kind(&self) -> &'static str {
        self.device
    }

    /// The key under which this rank's worker finds its endpoint.
    #[getter]
    fn device_uuid(&self) -> &str {
        &self.info.uuid
    }

    /// The job's secret, for jobs that are to read this one's memory.
    fn token<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.token.reveal())
    }

    /// Loads files and tensors into host memory under `name`; a tensor wins over one of the same name in a file.
    #[allow(clippy::too_many_arguments, reason = "called by this package's own Python code only")]
    fn register(
        &self,
        py: Python<'_>,
        name: String,
        files: Vec<PathBuf>,
        tensors: Vec<Described>,
        shared_pool: bool,
        in_place: bool,
        delete_in_place_files: bool,
    ) -> PyResult<()> {
        let state_of = self.state.clone();
        wait(py, async move {
            let mut guard = state_of.lock_owned().await;
            let state =
                guard.as_mut().ok_or_else(|| invalid("register a checkpoint", "the server was closed"))?;
            if state.server.checkpoint(&name).is_some() {
                return Err(invalid(
                    "register a checkpoint",
                    format!("`{name}` is registered already; unregister it first"),
                ));
            }
            let pool = match shared_pool {
                true => state.shared_pool.clone(),
                false => Pool::new(state.server.device().clone()),
            };
            let mut options = LoadOptions::new(name.clone());
            // A pool keeps its memory for the next checkpoint; files in place would be kept instead.
            options.in_place =
                if in_place && !shared_pool { InPlace::SharedMemoryFiles } else { InPlace::Never };
            options.delete_in_place_files = delete_in_place_files;
            let loaded = tokio::task::spawn_blocking(move || {
                let tensors: Vec<NamedTensor> =
                    tensors.into_iter().map(named_tensor).collect::<Result<_>>()?;
                let source = match files.is_empty() {
                    true => CheckpointSource::from_tensors(tensors)?,
                    false => CheckpointSource::open_files(&files)?.with_tensors(tensors)?,
                };
                load(&source, 0..source.tensors().len(), &pool, &options)
            });
            let loaded = loaded.await.map_err(|broken| {
                ckpt_core::Error::new(
                    ckpt_core::ErrorKind::Internal,
                    "register a checkpoint",
                    broken.to_string(),
                )
            })??;
            state.server.register(&name, loaded)
        })
    }

    /// Lets go of `name`; `free_pool` also frees the shared pool. `False` if there was none.
    fn unregister(&self, py: Python<'_>, name: String, free_pool: bool) -> PyResult<bool> {
        let shared = self.state.clone();
        wait(py, async move {
            let mut guard = shared.lock().await;
            let state = state(&mut guard)?;
            state.layouts.remove(&name);
            let known = state.server.unregister(&name);
            if free_pool {
                state.shared_pool.free()?;
            }
            Ok(known)
        })
    }

    /// Names of what is registered here.
    fn checkpoints(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        let shared = self.state.clone();
        wait(py, async move {
            let mut guard = shared.lock().await;
            Ok(state(&mut guard)?.server.checkpoints().into_iter().map(str::to_owned).collect())
        })
    }

    /// The memory of `name` here: `[(Memory, [(name, dtype, shape, offset), ...]), ...]`.
    #[allow(clippy::type_complexity, reason = "a list of tuples is what Python iterates over")]
    fn arenas(
        &self,
        py: Python<'_>,
        name: String,
    ) -> PyResult<Vec<(Memory, Vec<(String, &'static str, Vec<u64>, u64)>)>> {
        let shared = self.state.clone();
        wait(py, async move {
            let mut guard = shared.lock().await;
            let Some(checkpoint) = state(&mut guard)?.server.checkpoint(&name).cloned() else {
                return Err(invalid("look at a checkpoint", format!("`{name}` is not registered here")));
            };
            let mut arenas = Vec::with_capacity(checkpoint.arenas.len());
            for (arena, buffer) in checkpoint.share.arenas.iter().zip(&checkpoint.arenas) {
                let mut tensors = Vec::with_capacity(arena.tensors.len());
                for tensor in &arena.tensors {
                    let (name, dtype, shape) = describe(&tensor.meta)?;
                    tensors.push((name, dtype, shape, tensor.offset));
                }
                arenas.push((Memory::new(BufferSlice::new(buffer.clone(), 0..arena.len_bytes)?), tensors));
            }
            Ok(arenas)
        })
    }

    /// Collective: every rank's bytes, by rank.
    fn gather(&self, py: Python<'_>, part: &[u8], timeout: f64) -> PyResult<Vec<Py<PyBytes>>> {
        let (shared, part) = (self.state.clone(), Bytes::copy_from_slice(part));
        let parts = wait(py, async move {
            let mut guard = shared.lock().await;
            state(&mut guard)?.gather("parts", part, seconds(timeout)?).await
        })?;
        Ok(parts.iter().map(|part| PyBytes::new(py, part).unbind()).collect())
    }

    /// Collective: waits for all ranks, and learns their devices.
    fn meet(&self, py: Python<'_>, timeout: f64) -> PyResult<Vec<String>> {
        let shared = self.state.clone();
        wait(py, async move {
            let mut guard = shared.lock().await;
            let state = state(&mut guard)?;
            state.learn_devices(seconds(timeout)?).await?;
            Ok(state.uuids.clone())
        })
    }

    /// Collective: every rank learns who holds what of `name`.
    fn gather_metas(&self, py: Python<'_>, name: String) -> PyResult<()> {
        let shared = self.state.clone();
        wait(py, async move {
            let mut guard = shared.lock().await;
            let state = state(&mut guard)?;
            state.server.gather_metas(&name).await?;
            state.metas_seen += 1;
            Ok(())
        })
    }

    /// The metas that were gathered or loaded last, as JSON.
    fn metas_json(&self, py: Python<'_>) -> PyResult<Option<String>> {
        let shared = self.state.clone();
        wait(py, async move {
            let mut guard = shared.lock().await;
            state(&mut guard)?.server.metas().map(|metas| metas.to_json()).transpose()
        })
    }

    /// Takes another job's metas.
    fn load_metas_json(&self, py: Python<'_>, json: String) -> PyResult<()> {
        let shared = self.state.clone();
        wait(py, async move {
            let mut guard = shared.lock().await;
            let state = state(&mut guard)?;
            state.server.load_metas(Metas::from_json(json.as_bytes())?)?;
            state.metas_seen += 1;
            Ok(())
        })
    }

    /// Collective over `ranks` (all, if empty): moves the checkpoint into the workers. `request` is called with all
    /// ranks' endpoints. Returns the report as JSON.
    #[allow(clippy::too_many_arguments, reason = "called by this package's own Python code only")]
    fn update(
        &self,
        py: Python<'_>,
        name: String,
        request: Option<Py<PyAny>>,
        ranks: Vec<u32>,
        version: Option<u64>,
        protocol: String,
        timeout: f64,
    ) -> PyResult<String> {
        let shared = self.state.clone();
        let (world_size, mut raised) = (self.world_size, None);
        let prepared = wait(py, async move {
            let mut guard = shared.lock_owned().await;
            let state = guard.as_mut().ok_or_else(|| invalid("update weights", "the server was closed"))?;
            let sink = state.sink(&name, protocol.parse()?)?;
            let (engine, sink) = match request {
                None => (None, sink),
                Some(call) => {
                    let (engine, sink) = PythonEngine::new(call, state.uuids.clone(), sink);
                    (Some(engine), sink)
                }
            };
            Ok((guard, sink, engine, Asked { name, version, ranks, timeout: seconds(timeout)? }))
        })?;
        let (mut guard, sink, engine, asked) = prepared;
        let engine = engine.map(|engine| {
            raised = Some(engine.raised());
            let ranks = if asked.ranks.is_empty() { (0..world_size).collect() } else { asked.ranks.clone() };
            EngineCall { engine: Arc::new(engine), ranks }
        });
        let updated = wait(py, async move {
            let state = guard.as_mut().ok_or_else(|| invalid("update weights", "the server was closed"))?;
            state.update(asked, sink, engine).await
        });
        let report = updated.inspect_err(|error| {
            let cause =
                raised.and_then(|raised| raised.lock().unwrap_or_else(PoisonError::into_inner).take());
            error.set_cause(py, cause);
        })?;
        serde_json::to_string(&report).map_err(|e| {
            let error =
                ckpt_core::Error::new(ckpt_core::ErrorKind::Internal, "report an update", e.to_string());
            to_python(py, &error)
        })
    }

    /// The same with this process as the worker: buckets of tensors in its own ring.
    fn stream(
        &self,
        py: Python<'_>,
        name: String,
        ranks: Vec<u32>,
        version: Option<u64>,
        timeout: f64,
    ) -> PyResult<Stream> {
        let shared = self.state.clone();
        let consumer = format!("rank {}", self.rank);
        wait(py, async move {
            let asked = Asked { name, version, ranks, timeout: seconds(timeout)? };
            Ok(Stream::start(shared.lock_owned().await, asked, &consumer))
        })
    }

    /// Reads `(remote address, local address, bytes)` pieces of `owner`'s memory; `into` owns the local ones.
    fn read(
        &self,
        py: Python<'_>,
        owner: u32,
        pieces: Vec<(u64, u64, u64)>,
        into: Py<PyAny>,
        timeout: f64,
    ) -> PyResult<()> {
        let shared = self.state.clone();
        let lend = |(remote, address, len_bytes): (u64, u64, u64)| {
            let owner = Some(into.clone_ref(py));
            let lent = Lent { address, len_bytes, memory: MemoryKind::Host, owner, afterwards: None };
            (remote, BufferSlice::whole(Arc::new(lent)))
        };
        let pieces: Vec<_> = pieces.into_iter().map(lend).collect();
        wait(py, async move {
            let deadline = Instant::now() + seconds(timeout)?;
            let read = state(&mut shared.lock().await)?.server.read(owner, pieces, deadline)?;
            read.done(deadline).await
        })
    }

    /// Leaves the job; on rank 0 this ends it for everybody, so it waits a moment for the others.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let shared = self.state.clone();
        wait(py, async move {
            let Some(State { job, server, .. }) = shared.lock().await.take() else { return Ok(()) };
            if let Err(error) = job.session.barrier("leave", Instant::now() + LEAVE).await {
                tracing::debug!(%error, "left without the others");
            }
            drop(server);
            job.leave().await;
            Ok(())
        })
    }
}
