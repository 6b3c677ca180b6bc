//! The HTTP side of the reference engine.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    extract::{Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use ckpt_core::{
    Error, ErrorKind, Key, Result,
    checkpoint::{DigestAlgorithm, write_safetensors},
    types::TensorMeta,
    worker::{Canceller, NativeWorker},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{info, warn};

use super::{
    apply::{Applier, Faults},
    device::WeightMemory,
    store::Store,
};

const METHOD: &str = "update_weights_from_ipc";

/// One engine: the devices behind one HTTP server.
pub(super) struct Engine {
    devices: Vec<Device>,
    dump: Option<PathBuf>,
    timeout: Duration,
    faults: Faults,
    /// One update at a time.
    turn: Arc<Semaphore>,
    begun: AtomicU64,
    done: AtomicU64,
    failed: AtomicU64,
    /// It was told not to generate.
    paused: AtomicBool,
    /// Updates that were begun while it was paused.
    begun_paused: AtomicU64,
}

/// One device and its worker.
pub(super) struct Device {
    uuid: String,
    worker: Arc<Mutex<NativeWorker>>,
    canceller: Canceller,
    store: Arc<Mutex<Store>>,
}

impl Device {
    pub(super) fn new(worker: NativeWorker, memory: Box<dyn WeightMemory>) -> Self {
        Self {
            uuid: worker.uuid().to_owned(),
            canceller: worker.canceller(),
            worker: Arc::new(Mutex::new(worker)),
            store: Arc::new(Mutex::new(Store::new(memory))),
        }
    }

    /// The name under which the parameter server gives it an endpoint.
    pub(super) fn uuid(&self) -> &str {
        &self.uuid
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        // A panic while it was locked left whole tensors.
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine {
    pub(super) fn new(
        devices: Vec<Device>,
        dump: Option<PathBuf>,
        timeout: Duration,
        faults: Faults,
    ) -> Self {
        Self {
            devices,
            dump,
            timeout,
            faults,
            turn: Arc::new(Semaphore::new(1)),
            begun: AtomicU64::new(0),
            done: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            paused: AtomicBool::new(false),
            begun_paused: AtomicU64::new(0),
        }
    }

    /// Updates that ended well, and those that did not.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed))
    }

    /// Lets the update under way end by itself until `deadline`, then ends it. No other can begin.
    pub(super) async fn end(&self, deadline: Instant) {
        let free = tokio::time::timeout_at(deadline.into(), self.turn.acquire()).await;
        if free.is_err() {
            warn!("the update under way is cancelled");
        }
        self.turn.close();
        for device in &self.devices {
            device.canceller.cancel();
        }
    }

    /// One update of all devices, each from its own parameter server.
    async fn update(&self, endpoints: &BTreeMap<String, String>, deadline: Instant) -> Result<()> {
        let faults = self.faults.in_update(self.begun.fetch_add(1, Ordering::Relaxed));
        self.begun_paused.fetch_add(self.paused.load(Ordering::Relaxed).into(), Ordering::Relaxed);
        let mut running = tokio::task::JoinSet::new();
        for device in &self.devices {
            let endpoint = endpoints.get(&device.uuid).cloned().ok_or_else(|| {
                let named: Vec<_> = endpoints.keys().map(String::as_str).collect();
                let message =
                    format!("the request names no endpoint for this device, only {}", named.join(", "));
                Error::new(ErrorKind::ConfigInvalid, "take new weights", message)
                    .with(Key::Worker, &device.uuid)
            })?;
            let mut applier = Applier { store: device.store.clone(), faults };
            let (worker, dump, uuid) = (device.worker.clone(), self.dump.clone(), device.uuid.clone());
            running.spawn_blocking(move || {
                // The turn makes this lock free; after a panic the worker still remakes what it kept.
                let mut worker = worker.lock().unwrap_or_else(PoisonError::into_inner);
                let summary = worker.update(&endpoint, &mut applier, deadline)?;
                info!(
                    %uuid,
                    buckets = summary.buckets,
                    tensors = summary.tensors,
                    bytes = summary.tensor_bytes,
                    seconds = summary.elapsed.as_secs_f64(),
                    "new weights are in use"
                );
                match dump {
                    Some(folder) => dump_to(&folder, &uuid, &applier.store),
                    None => Ok(()),
                }
            });
        }
        // All must end before the next turn; the first failure is the one to tell.
        let mut first = Ok(());
        while let Some(ended) = running.join_next().await {
            let result = ended.unwrap_or_else(|error| {
                Err(Error::new(ErrorKind::Internal, "take new weights", "the device's thread died")
                    .caused_by(error))
            });
            if first.is_ok() {
                first = result;
            }
        }
        first
    }
}

fn dump_to(folder: &std::path::Path, uuid: &str, store: &Mutex<Store>) -> Result<()> {
    let name: String =
        uuid.chars().map(|c| if c.is_ascii_alphanumeric() || "-._".contains(c) { c } else { '_' }).collect();
    let mut store = store.lock().unwrap_or_else(PoisonError::into_inner);
    let metas: Vec<TensorMeta> = store.tensors().cloned().collect();
    let bytes = metas.iter().map(|meta| {
        let mut bytes = Vec::with_capacity(meta.len_bytes() as usize);
        store.read(&meta.name, &mut |piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(bytes)
    });
    let bytes = bytes.collect::<Result<Vec<_>>>()?;
    let tensors = metas.iter().zip(bytes.iter().map(Vec::as_slice));
    write_safetensors(folder.join(format!("{name}.safetensors")), tensors).map(|_| ())
}

pub(super) fn router(engine: Arc<Engine>) -> Router {
    Router::new()
        .route("/health", get(async || StatusCode::OK))
        .route("/collective_rpc", post(collective_rpc))
        .route("/pause", post(pause))
        .route("/resume", post(resume))
        .route("/is_paused", get(is_paused))
        .route("/v1/state", get(state))
        .route("/v1/tensors", get(tensors))
        .with_state(engine)
}

/// As vLLM does. Nothing is generated here, so nothing has to stop.
async fn pause(State(engine): State<Arc<Engine>>) -> Response {
    engine.paused.store(true, Ordering::Relaxed);
    Json(json!({ "status": "paused" })).into_response()
}

async fn resume(State(engine): State<Arc<Engine>>) -> Response {
    engine.paused.store(false, Ordering::Relaxed);
    Json(json!({ "status": "resumed" })).into_response()
}

async fn is_paused(State(engine): State<Arc<Engine>>) -> Response {
    Json(json!({ "is_paused": engine.paused.load(Ordering::Relaxed) })).into_response()
}

#[derive(Deserialize)]
struct Rpc {
    method: String,
    #[serde(default)]
    args: Vec<Value>,
    timeout: Option<f64>,
}

async fn collective_rpc(State(engine): State<Arc<Engine>>, Json(rpc): Json<Rpc>) -> Response {
    if rpc.method != METHOD {
        let text = format!("this engine knows the method {METHOD}, not {}", rpc.method);
        return (StatusCode::BAD_REQUEST, text).into_response();
    }
    let endpoints = rpc.args.first().cloned().map(serde_json::from_value::<BTreeMap<String, String>>);
    let Some(Ok(endpoints)) = endpoints else {
        let text = "the first argument must be an object of endpoints by device";
        return (StatusCode::BAD_REQUEST, text).into_response();
    };
    let timeout = match rpc.timeout.map(Duration::try_from_secs_f64) {
        Some(Ok(timeout)) => timeout.min(engine.timeout),
        Some(Err(_)) => {
            return (StatusCode::BAD_REQUEST, "the timeout is no number of seconds").into_response();
        }
        None => engine.timeout,
    };
    let turn = match engine.turn.clone().try_acquire_owned() {
        Ok(turn) => turn,
        Err(_) => return (StatusCode::CONFLICT, "an update is under way or the engine ends").into_response(),
    };
    // On its own task: a client that hangs up must not leave a device half way with the next turn begun.
    let update = tokio::spawn(one_turn(engine, turn, endpoints, Instant::now() + timeout));
    match update.await {
        Ok(Ok(results)) => Json(json!({ "results": vec![Value::Null; results] })).into_response(),
        Ok(Err(error)) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("a bug in the engine: {error}")).into_response()
        }
    }
}

async fn one_turn(
    engine: Arc<Engine>,
    turn: OwnedSemaphorePermit,
    endpoints: BTreeMap<String, String>,
    deadline: Instant,
) -> Result<usize> {
    let result = engine.update(&endpoints, deadline).await;
    let counter = if result.is_ok() { &engine.done } else { &engine.failed };
    counter.fetch_add(1, Ordering::Relaxed);
    if let Err(error) = &result {
        warn!(%error, "the update failed; old and new weights may be mixed");
    }
    drop(turn);
    result.map(|()| engine.devices.len())
}

#[derive(Serialize)]
struct DeviceState {
    uuid: String,
    tensors: usize,
    len_bytes: u64,
    updates: u64,
    /// The last update ended in the middle.
    mixed: bool,
    /// An update is under way, or one that failed has not been left yet.
    updating: bool,
    /// The engine was told not to generate.
    paused: bool,
    /// Updates that were begun while it was.
    begun_paused: u64,
    /// xxh3-64 over all tensors by name: see [`digest_of_all`].
    digest: String,
}

#[derive(Serialize)]
struct TensorState<'a> {
    #[serde(flatten)]
    meta: MetaState<'a>,
    /// Of the bytes.
    digest: String,
}

#[derive(Serialize)]
struct MetaState<'a> {
    name: &'a str,
    dtype: &'static str,
    shape: &'a [u64],
}

impl<'a> From<&'a TensorMeta> for MetaState<'a> {
    fn from(meta: &'a TensorMeta) -> Self {
        Self { name: &meta.name, dtype: meta.dtype.safetensors_name(), shape: &meta.shape }
    }
}

async fn state(State(engine): State<Arc<Engine>>) -> Response {
    on_blocking_thread(move || {
        let each = engine.devices.iter().map(|device| {
            let mut store = device.store();
            let digests = digests(&mut store, DigestAlgorithm::default())?;
            Ok(DeviceState {
                uuid: device.uuid.clone(),
                tensors: store.tensors().len(),
                len_bytes: store.len_bytes(),
                updates: store.updates(),
                mixed: store.mixed(),
                updating: engine.turn.available_permits() == 0,
                paused: engine.paused.load(Ordering::Relaxed),
                begun_paused: engine.begun_paused.load(Ordering::Relaxed),
                digest: digest_of_all(&digests),
            })
        });
        answer(each.collect::<Result<Vec<_>>>())
    })
    .await
}

#[derive(Deserialize)]
struct Which {
    uuid: Option<String>,
    /// The digest; xxh3-64 without it.
    algorithm: Option<String>,
}

async fn tensors(State(engine): State<Arc<Engine>>, Query(which): Query<Which>) -> Response {
    on_blocking_thread(move || {
        let mut devices = engine.devices.iter();
        let chosen = match &which.uuid {
            Some(uuid) => devices.find(|device| device.uuid == *uuid),
            None => devices.next(),
        };
        let Some(device) = chosen else { return (StatusCode::NOT_FOUND, "no such device").into_response() };
        let algorithm = match which.algorithm.as_deref() {
            None => DigestAlgorithm::default(),
            Some(name) => match DigestAlgorithm::from_name(name) {
                Some(algorithm) => algorithm,
                None => return (StatusCode::BAD_REQUEST, "no such digest").into_response(),
            },
        };
        let digests = digests(&mut device.store(), algorithm);
        answer(digests.map(|each| {
            let each = each.iter();
            each.map(|(meta, digest)| TensorState { meta: meta.into(), digest: digest.clone() })
                .map(|state| serde_json::to_value(state).unwrap_or(Value::Null))
                .collect::<Vec<_>>()
        }))
    })
    .await
}

fn answer(result: Result<impl Serialize>) -> Response {
    match result {
        Ok(value) => Json(value).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Hashing gigabytes takes a while.
async fn on_blocking_thread(work: impl FnOnce() -> Response + Send + 'static) -> Response {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        (StatusCode::INTERNAL_SERVER_ERROR, format!("a bug in the engine: {error}")).into_response()
    })
}

/// The digest of each tensor, by name, read back from the device.
fn digests(store: &mut Store, algorithm: DigestAlgorithm) -> Result<Vec<(TensorMeta, String)>> {
    let metas: Vec<TensorMeta> = store.tensors().cloned().collect();
    let each = metas.into_iter().map(|meta| {
        let mut digest = algorithm.start();
        store.read(&meta.name, &mut |piece| {
            digest.update(piece);
            Ok(())
        })?;
        Ok((meta, format!("{:016x}", digest.finish())))
    });
    each.collect()
}

/// One line a tensor, `name dtype shape digest`, by name; the digest of those lines.
fn digest_of_all(digests: &[(TensorMeta, String)]) -> String {
    let mut lines = String::new();
    for (meta, digest) in digests {
        lines += &format!("{} {} {:?} {digest}\n", meta.name, meta.dtype.safetensors_name(), meta.shape);
    }
    format!("{:016x}", DigestAlgorithm::Xxh3_64.digest(lines.as_bytes()))
}
