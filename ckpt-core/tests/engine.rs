//! The engines against a stand-in server, over TCP and UNIX sockets.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use ckpt_core::{
    ErrorKind, Key, Result, Version,
    engine::{Engine, EngineConfig, EngineRequest, HttpTemplate, PauseMode, create},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UnixListener},
};

/// What the stand-in does with an update request.
#[derive(Clone, Copy)]
enum Behaviour {
    Accept,
    Refuse(u16, &'static str),
    Hang,
    Huge,
}

#[derive(Clone)]
struct Stand {
    behaviour: Behaviour,
    unhealthy_for: Arc<AtomicUsize>,
    seen: Arc<Mutex<Vec<Value>>>,
}

impl Stand {
    fn new(behaviour: Behaviour) -> Self {
        Self { behaviour, unhealthy_for: Arc::default(), seen: Arc::default() }
    }

    fn router(&self) -> Router {
        Router::new()
            .route("/health", get(health))
            .route("/ping", get(health))
            .route("/collective_rpc", post(update))
            .route("/update_weights_from_ipc", post(update))
            .route("/custom/update", post(update))
            .route("/init_weight_transfer_engine", post(update))
            .route("/start_weight_update", post(update))
            .route("/update_weights", post(update))
            .route("/finish_weight_update", post(update))
            .with_state(self.clone())
    }
}

async fn health(State(stand): State<Stand>) -> StatusCode {
    let left = stand.unhealthy_for.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
    if left.is_ok() { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
}

async fn update(State(stand): State<Stand>, Json(body): Json<Value>) -> Response {
    stand.seen.lock().unwrap().push(body);
    match stand.behaviour {
        Behaviour::Accept => Json(json!({ "results": [null] })).into_response(),
        Behaviour::Refuse(status, body) => (StatusCode::from_u16(status).unwrap(), body).into_response(),
        Behaviour::Hang => std::future::pending().await,
        Behaviour::Huge => (StatusCode::INTERNAL_SERVER_ERROR, "x".repeat(1 << 20)).into_response(),
    }
}

async fn on_tcp(router: Router) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    format!("http://{address}")
}

async fn on_unix(router: Router) -> (TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("engine.sock");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    (folder, format!("unix:{}", path.display()))
}

fn engine(kind: &str, endpoint: &str) -> Arc<dyn Engine> {
    create(EngineConfig { kind: kind.into(), endpoint: endpoint.into(), uds: None, ca: None, template: None })
        .unwrap()
}

fn request() -> EngineRequest {
    EngineRequest {
        endpoints: BTreeMap::from([("GPU-1".into(), "ipc:///run/a".into())]),
        version: Version(7),
    }
}

fn within(time: Duration) -> Instant {
    Instant::now() + time
}

const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(300);

async fn update_against(behaviour: Behaviour, kind: &str) -> (Result<()>, Vec<Value>) {
    let stand = Stand::new(behaviour);
    let endpoint = on_tcp(stand.router()).await;
    let result = engine(kind, &endpoint).update(&request(), within(LONG)).await;
    let seen = stand.seen.lock().unwrap().clone();
    (result, seen)
}

#[tokio::test]
async fn vllm_gets_its_collective_rpc() {
    let (result, seen) = update_against(Behaviour::Accept, "vllm").await;
    result.unwrap();
    assert_eq!(seen[0]["method"], "update_weights_from_ipc");
    assert_eq!(seen[0]["args"], json!([{ "GPU-1": "ipc:///run/a" }]));
    let timeout = seen[0]["timeout"].as_f64().unwrap();
    assert!(timeout > 0.0 && timeout <= LONG.as_secs_f64(), "{timeout}");
}

#[tokio::test]
async fn vllms_own_api_is_driven_from_init_to_finish_and_no_further_than_an_error() {
    let (result, seen) = update_against(Behaviour::Accept, "vllm-native").await;
    result.unwrap();
    let expected = [
        json!({ "init_info": {} }),
        json!({}),
        json!({ "update_info": { "endpoints": { "GPU-1": "ipc:///run/a" } } }),
        json!({ "weight_version": "7" }),
    ];
    assert_eq!(seen, expected);
    let (result, seen) = update_against(Behaviour::Refuse(500, "no backend"), "vllm-native").await;
    assert!(result.unwrap_err().to_string().contains("no backend"));
    assert_eq!(seen.len(), 1);
    let error = engine("vllm-native", &on_tcp(Router::new()).await).update(&request(), within(LONG)).await;
    assert!(error.unwrap_err().message().contains("--weight-transfer-config"));
}

#[tokio::test]
async fn sglang_gets_its_own_route_and_a_denial_in_a_200_counts() {
    let (result, seen) = update_against(Behaviour::Accept, "sglang").await;
    result.unwrap();
    let expected = json!({
        "zmq_handles": { "GPU-1": "ipc:///run/a" }, "flush_cache": true, "weight_version": "7"
    });
    assert_eq!(seen, [expected]);
    for status in [200, 400] {
        let behaviour = Behaviour::Refuse(status, r#"{"success":false,"message":"no such tensor"}"#);
        let error = update_against(behaviour, "sglang").await.0.unwrap_err();
        assert!(error.message().contains("no such tensor"), "{error}");
    }
}

#[tokio::test]
async fn unix_sockets_serve_as_well() {
    let stand = Stand::new(Behaviour::Accept);
    let (folder, endpoint) = on_unix(stand.router()).await;
    let vllm = engine("vllm", &endpoint);
    vllm.ready(within(LONG)).await.unwrap();
    vllm.update(&request(), within(LONG)).await.unwrap();
    // The same through `--uds`, where the endpoint only gives the path.
    let config = EngineConfig {
        kind: "http".into(),
        endpoint: "http://ignored:1/custom/update".into(),
        uds: Some(folder.path().join("engine.sock")),
        ca: None,
        template: Some(HttpTemplate::parse(r#"{"where": "{{endpoint_list}}"}"#).unwrap()),
    };
    create(config).unwrap().update(&request(), within(LONG)).await.unwrap();
    assert_eq!(stand.seen.lock().unwrap()[1], json!({ "where": ["ipc:///run/a"] }));
}

#[tokio::test]
async fn a_refusal_carries_status_and_body() {
    let (result, _) = update_against(Behaviour::Refuse(500, "KeyError: 'lm_head.weight'"), "vllm").await;
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Backend);
    assert!(error.message().contains("500 Internal Server Error"), "{error}");
    assert!(error.message().contains("KeyError: 'lm_head.weight'"), "{error}");
    assert!(error.get(Key::Endpoint).unwrap().starts_with("http://127.0.0.1:"));
}

#[tokio::test]
async fn a_missing_route_explains_how_to_start_vllm() {
    let endpoint = on_tcp(Router::new()).await;
    let error = engine("vllm", &endpoint).update(&request(), within(LONG)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    assert!(error.message().contains("VLLM_SERVER_DEV_MODE=1"), "{error}");
    assert!(error.message().contains("--worker-extension-cls"), "{error}");
}

#[tokio::test]
async fn a_huge_answer_is_cut() {
    let error = update_against(Behaviour::Huge, "vllm").await.0.unwrap_err();
    assert!(error.message().len() < 5000, "{} bytes", error.message().len());
    assert!(error.message().ends_with("(truncated)"));
}

#[tokio::test]
async fn a_hang_ends_at_the_deadline() {
    let endpoint = on_tcp(Stand::new(Behaviour::Hang).router()).await;
    let started = Instant::now();
    let error = engine("vllm", &endpoint).update(&request(), within(SHORT)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(started.elapsed() >= SHORT);
    assert!(started.elapsed() < LONG, "the deadline was not kept");
}

#[tokio::test]
async fn an_engine_that_dies_in_the_middle_is_a_lost_peer() {
    // Both before and inside the answer.
    for answer in ["", "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf"] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream.write_all(answer.as_bytes()).await;
        });
        let error = engine("vllm", &endpoint).update(&request(), within(LONG)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
    }
}

#[tokio::test]
async fn readiness_waits_for_a_server_that_starts_late_and_is_busy_at_first() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("late.sock");
    let endpoint = format!("unix:{}", path.display());
    let waiting = tokio::spawn(async move { engine("vllm", &endpoint).ready(within(LONG)).await });
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    let stand = Stand::new(Behaviour::Accept);
    stand.unhealthy_for.store(3, Ordering::SeqCst);
    let listener = UnixListener::bind(&path).unwrap();
    let router = stand.router();
    tokio::spawn(async move { axum::serve(listener, router).await });
    waiting.await.unwrap().unwrap();
    assert_eq!(stand.unhealthy_for.load(Ordering::SeqCst), 0, "it took an answer that says no");
}

#[tokio::test]
async fn readiness_ends_with_the_last_cause() {
    // A port that was free a moment ago and that nobody listens on.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let error = engine("vllm", &endpoint).ready(within(SHORT)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.message().to_lowercase().contains("connection refused"), "{error}");
    assert_eq!(error.to_string().lines().count(), 1);

    let error = engine("sglang", &on_tcp(Router::new()).await).ready(within(LONG)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid, "a server without the route is no engine: {error}");
}

#[tokio::test]
async fn none_has_nobody_to_tell_and_unknown_engines_are_named() {
    let none = engine("none", "");
    none.ready(within(SHORT)).await.unwrap();
    none.update(&request(), within(SHORT)).await.unwrap();
    let config =
        EngineConfig { kind: "trt".into(), endpoint: String::new(), uds: None, ca: None, template: None };
    let error = create(config).err().unwrap();
    assert!(
        error.message().contains("`trt`")
            && error.message().contains("vllm, vllm-native, sglang, http, none"),
        "{error}"
    );
}

/// Answers pausing and resuming, and writes down what it was asked.
async fn pausing(status: StatusCode) -> (String, Arc<Mutex<Vec<String>>>) {
    let asked = Arc::<Mutex<Vec<String>>>::default();
    let seen = asked.clone();
    let router = Router::new().fallback(move |uri: axum::http::Uri, body: String| async move {
        let body = if body == "{}" { String::new() } else { body };
        seen.lock().unwrap().push(format!("{uri}{body}"));
        (status, "said so")
    });
    (on_tcp(router).await, asked)
}

#[tokio::test]
async fn engines_are_paused_and_resumed_in_their_own_words() {
    let of_vllm = ["/pause?mode=wait", "/reset_prefix_cache?reset_running_requests=true", "/resume"];
    let of_sglang = [r#"/pause_generation{"mode":"retract"}"#, "/continue_generation"];
    for (kind, expected) in [("vllm", &of_vllm[..]), ("sglang", &of_sglang)] {
        let (endpoint, asked) = pausing(StatusCode::OK).await;
        let engine = engine(kind, &endpoint);
        assert!(engine.pause(PauseMode::Wait, within(LONG)).await.unwrap());
        engine.resume(within(LONG)).await.unwrap();
        assert_eq!(*asked.lock().unwrap(), expected, "{kind}");
        // An engine that has no such call serves on; one that refuses is an error before anything was touched.
        let (endpoint, _) = pausing(StatusCode::NOT_FOUND).await;
        assert!(!self::engine(kind, &endpoint).pause(PauseMode::Keep, within(LONG)).await.unwrap());
        let (endpoint, _) = pausing(StatusCode::INTERNAL_SERVER_ERROR).await;
        let error = self::engine(kind, &endpoint).pause(PauseMode::Keep, within(LONG)).await.unwrap_err();
        assert!(error.message().contains("500") && error.message().contains("said so"), "{error}");
    }
    let (endpoint, asked) = pausing(StatusCode::OK).await;
    let config = |template: HttpTemplate| EngineConfig {
        kind: "http".into(),
        endpoint: format!("{endpoint}/custom/update"),
        uds: None,
        ca: None,
        template: Some(template),
    };
    let plain = create(config(HttpTemplate::default())).unwrap();
    assert!(!plain.pause(PauseMode::Keep, within(LONG)).await.unwrap());
    let template = HttpTemplate::default().paused_at("/stop?how={mode}", "/go");
    let engine = create(config(template)).unwrap();
    assert!(engine.pause(PauseMode::Abort, within(LONG)).await.unwrap());
    engine.resume(within(LONG)).await.unwrap();
    assert_eq!(*asked.lock().unwrap(), ["/stop?how=abort", "/go"]);
}
