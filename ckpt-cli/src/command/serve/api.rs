//! The HTTP API: protocol and status codes are those of checkpoint-engine's own parameter server.

use std::{path::PathBuf, sync::Arc};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Path, Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use ckpt_core::{
    Error, ErrorKind, Result,
    checkpoint::{CheckpointSource, DigestAlgorithm, LoadOptions, Pool, RegisteredCheckpoint, load},
    control::{Job, Session, Token, Weights},
    metas::Metas,
};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::{
    actor::{Order, Queued},
    body::{self, FilesBody, UpdateBody},
    metrics,
    paths::AllowedPaths,
    view::View,
};

/// A list of file names is never longer.
const BODY_BYTES: usize = 16 << 20;
/// A trillion-parameter model's metas are 25 MB.
const METAS_BODY_BYTES: usize = 256 << 20;

/// What every handler sees.
pub(super) struct App {
    pub(super) job: Arc<Job>,
    pub(super) orders: mpsc::Sender<Queued>,
    pub(super) view: Arc<View>,
    pub(super) allowed: AllowedPaths,
    /// Asked for by a listener that other hosts reach.
    pub(super) token: Option<Token>,
    /// One update at a time.
    pub(super) turn: Arc<Semaphore>,
    /// One registration at a time: a load takes all cores.
    pub(super) loading: tokio::sync::Mutex<()>,
    /// Reused by one checkpoint after the other; one that is registered beside another gets a pool of its own.
    pub(super) pool: Arc<Pool>,
    /// In turn with it while the last version is kept.
    pub(super) other_pool: Arc<Pool>,
    /// What registrations make.
    pub(super) digests: Option<DigestAlgorithm>,
    pub(super) device: Arc<dyn ckpt_core::device::DeviceBackend>,
    /// Constant parts of the status.
    pub(super) about: Value,
}

pub(super) fn router(app: Arc<App>) -> Router {
    let metas = get(metas).post(load_metas).layer(DefaultBodyLimit::max(METAS_BODY_BYTES));
    Router::new()
        .route("/v1/checkpoints/{name}/files", post(register))
        .route("/v1/checkpoints/{name}", delete(unregister))
        .route("/v1/checkpoints/{name}/gather-metas", post(gather_metas))
        .route("/v1/checkpoints/{name}/update", post(update))
        .route("/v1/healthz", get(async || StatusCode::OK))
        .route("/v1/status", get(status))
        .route("/metrics", get(metrics))
        .layer(DefaultBodyLimit::max(BODY_BYTES))
        .route("/v1/metas", metas)
        .layer(middleware::from_fn_with_state(app.clone(), authorize))
        .with_state(app)
}

/// Lets a request in that has the job's token, where one is asked for. Health shows nothing and is for probes.
async fn authorize(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let Some(token) = &app.token else { return next.run(request).await };
    let presented = request.headers().get(header::AUTHORIZATION).and_then(|value| bearer(value.as_bytes()));
    if request.uri().path() == "/v1/healthz" || presented.is_some_and(|given| token.matches(given)) {
        return next.run(request).await;
    }
    let text = "this server is reached over a network: send the job's token as `authorization: Bearer TOKEN`";
    let mut response = (StatusCode::UNAUTHORIZED, Json(text)).into_response();
    response.headers_mut().insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
    response
}

fn bearer(header: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = header.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

fn misfit(why: &str) -> Response {
    (StatusCode::UNPROCESSABLE_ENTITY, Json(why)).into_response()
}

/// 200 with an empty body, or 500 with a JSON string.
fn answer(result: Result<()>) -> Response {
    match result {
        Ok(()) => StatusCode::OK.into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, Json(error.to_string())).into_response(),
    }
}

impl App {
    /// Has the actor do it. What was begun is done, also when the client hangs up.
    async fn order(&self, order: Order) -> Result<()> {
        let (reply, result) = oneshot::channel();
        let ended = || Error::new(ErrorKind::Aborted, "serve a request", "this server is ending");
        self.orders.send((order, reply)).await.map_err(|_| ended())?;
        result.await.unwrap_or_else(|_| Err(ended()))
    }

    /// The session is another one now.
    pub(super) async fn rejoined(&self) {
        if let Err(error) = self.order(Order::Rejoined).await {
            tracing::debug!(%error, "the server ends");
        }
    }

    /// Loads and registers.
    async fn register(&self, name: String, files: Vec<String>) -> Result<()> {
        let taken = format!("`{name}` is registered already; DELETE /v1/checkpoints/{name} first");
        let taken = || Error::new(ErrorKind::ConfigInvalid, "register a checkpoint", taken.clone());
        let _one_at_a_time = self.loading.lock().await;
        // Known before anything is read: a checkpoint may be a hundred gigabytes.
        {
            let mut state = self.view.lock();
            if state.checkpoints.contains_key(&name) {
                return Err(taken());
            }
            state.checkpoints.insert(name.clone(), None);
        }
        let mut reserved = Reserved { view: &self.view, name: &name, kept: false };
        let files = files.iter().map(|file| self.allowed.check(file.as_ref())).collect::<Result<Vec<_>>>()?;
        let pools = [&self.pool, &self.other_pool];
        // One that is registered beside two others gets a pool of its own.
        let pool = pools.into_iter().find(|pool| pool.user().is_none()).cloned();
        let pool = pool.unwrap_or_else(|| Pool::new(self.device.clone()));
        let options = LoadOptions { digests: self.digests, ..LoadOptions::new(name.clone()) };
        let loaded = tokio::task::spawn_blocking(move || load_files(&files, &pool, &options)).await;
        let checkpoint = loaded.map_err(|error| {
            Error::new(ErrorKind::Internal, "register a checkpoint", "the loading thread died")
                .caused_by(error)
        })??;
        self.order(Order::Register { name: name.clone(), checkpoint: Box::new(checkpoint) }).await?;
        reserved.kept = true;
        Ok(())
    }
}

/// The name of a registration under way; given free if it fails.
struct Reserved<'a> {
    view: &'a View,
    name: &'a str,
    kept: bool,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.view.lock().checkpoints.remove(self.name);
        }
    }
}

fn load_files(files: &[PathBuf], pool: &Arc<Pool>, options: &LoadOptions) -> Result<RegisteredCheckpoint> {
    let source = CheckpointSource::open_files(files)?;
    let all = 0..source.tensors().len();
    load(&source, all, pool, options)
}

async fn register(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let (name, FilesBody { files }) =
        match body::name(name).and_then(|n| Ok((n, body::json(&headers, &body)?))) {
            Ok(read) => read,
            Err(why) => return misfit(&why),
        };
    detached(async move { app.register(name, files).await }).await
}

async fn unregister(State(app): State<Arc<App>>, Path(name): Path<String>) -> Response {
    detached(async move { app.order(Order::Unregister { name }).await }).await
}

async fn gather_metas(State(app): State<Arc<App>>, Path(name): Path<String>) -> Response {
    match body::name(name) {
        Ok(name) => detached(async move { app.order(Order::Gather { name }).await }).await,
        Err(why) => misfit(&why),
    }
}

async fn update(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let body = match UpdateBody::read(&headers, &body, app.job.cluster.world_size) {
        Ok(body) => body,
        Err(why) => return misfit(&why),
    };
    if !body.ranks.is_empty() && !body.ranks.contains(&app.job.cluster.rank) {
        // The caller posts to every rank; this one goes on undisturbed.
        return StatusCode::OK.into_response();
    }
    let Ok(turn) = app.turn.clone().try_acquire_owned() else {
        let text = "an update is under way; try again when it is over (GET /v1/status)";
        return (StatusCode::CONFLICT, Json(text)).into_response();
    };
    detached(async move { app.order(Order::Update { name, body, turn }).await }).await
}

async fn load_metas(State(app): State<Arc<App>>, headers: HeaderMap, body: Bytes) -> Response {
    if let Err(why) = body::is_json(&headers) {
        return misfit(&why);
    }
    let parsed = tokio::task::spawn_blocking(move || Metas::from_json(&body)).await;
    let metas = match parsed {
        Ok(Ok(metas)) => Box::new(metas),
        Ok(Err(error)) => return misfit(&error.to_string()),
        Err(_) => return answer(Err(bug())),
    };
    detached(async move { app.order(Order::LoadMetas { metas }).await }).await
}

async fn metas(State(app): State<Arc<App>>) -> Response {
    let current = app.view.lock().metas.as_ref().map(|current| current.metas.clone());
    let Some(metas) = current else { return Json(json!({})).into_response() };
    match tokio::task::spawn_blocking(move || metas.to_json()).await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Ok(Err(error)) => answer(Err(error)),
        Err(_) => answer(Err(bug())),
    }
}

async fn status(State(app): State<Arc<App>>) -> Response {
    let mut status = app.about.clone();
    let session = &app.job.session;
    let hub = match app.job.hub() {
        Some(hub) => hub.status().await.ok(),
        None => None,
    };
    let pool = app.pool.counters();
    let more = {
        let state = app.view.lock();
        json!({
            "doing": state.doing,
            "queued": app.orders.max_capacity() - app.orders.capacity(),
            "checkpoints": state.checkpoints,
            "pool": {
                "user": app.pool.user(),
                "held_bytes": pool.held_bytes,
                "allocations": pool.allocations,
                "pins": pool.pins,
                "maps": pool.maps,
            },
            "metas": state.metas.as_ref().map(|current| json!({
                "checkpoint": current.checkpoint,
                "version": current.version,
                "ranks": current.metas.ranks.keys().collect::<Vec<_>>(),
            })),
            "updates": state.updates,
            "installed": state.installed,
            "kept": state.kept,
            "weights": known_weights(&state.weights, session),
            "last_update": state.last_update,
            "session": {
                "lease_is_valid": session.lease_is_valid(),
                "lost": session.lost().map(|cause| cause.to_string()),
            },
            "hub": hub,
        })
    };
    if let (Value::Object(status), Value::Object(more)) = (&mut status, more) {
        status.extend(more);
    }
    Json(status).into_response()
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let hub = match app.job.hub() {
        Some(hub) => hub.status().await.ok(),
        None => None,
    };
    let gauges = metrics::Gauges {
        rank: app.job.cluster.rank,
        pool: app.pool.counters(),
        device_free_bytes: app.device.free_memory_bytes().ok(),
        lease_is_valid: app.job.session.lease_is_valid(),
        ranks_connected: hub.map(|hub| hub.ranks.iter().filter(|rank| rank.connected).count()),
    };
    let text = metrics::text(&app.view.lock(), &gauges);
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response()
}

/// What the worker has: the actor's own record, and what the hub has told since.
fn known_weights(own: &Weights, session: &Session) -> Weights {
    let mut known = own.clone();
    if let Some(told) = session.told_weights() {
        known.learn(&told);
    }
    known
}

fn bug() -> Error {
    Error::new(ErrorKind::Internal, "serve a request", "its task died; this is a bug, please report it")
}

/// Runs `work` to its end even if the client hangs up.
async fn detached(work: impl Future<Output = Result<()>> + Send + 'static) -> Response {
    answer(tokio::spawn(work).await.unwrap_or_else(|_| Err(bug())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bearer_token_is_found_in_any_spelling_of_the_scheme() {
        assert_eq!(bearer(b"Bearer abc"), Some(&b"abc"[..]));
        assert_eq!(bearer(b"bearer  abc "), Some(&b"abc"[..]));
        for bad in [&b"Basic abc"[..], b"Bearer", b"", b"Bearerabc"] {
            assert_eq!(bearer(bad), None);
        }
    }
}
