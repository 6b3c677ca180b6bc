//! One HTTP client for all engines: every call ends by its deadline, and every error names the engine and its words.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode, Url};
use serde_json::Value;

use super::EngineAddress;
use crate::{
    error::{Error, ErrorKind, Key, Result},
    liveness,
    tls::{self, http_client},
};

/// More of an answer than this is not read.
const BODY_LIMIT: usize = 64 * 1024;
/// More of an answer than this is not put into a message.
const MESSAGE_LIMIT: usize = 4 * 1024;
/// One readiness request; an engine that is busy loading may accept and not answer.
const PROBE: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// An engine's answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    body: Vec<u8>,
}

impl Reply {
    /// The body as text for a message.
    fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.body);
        let text = text.trim();
        if text.len() <= MESSAGE_LIMIT {
            return text.to_owned();
        }
        let end = (0..=MESSAGE_LIMIT).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        format!("{} ... (truncated)", &text[..end])
    }

    /// The body as JSON, if it is.
    pub(crate) fn json(&self) -> Option<Value> {
        serde_json::from_slice(&self.body).ok()
    }
}

/// Talks to one engine.
#[derive(Clone, Debug)]
pub(crate) struct EngineClient {
    engine: &'static str,
    address: EngineAddress,
    http: reqwest::Client,
}

impl EngineClient {
    pub(crate) fn new(engine: &'static str, address: EngineAddress) -> Result<Self> {
        // A proxy from the environment must not stand between a rank and the engine beside it. Requests are rare and
        // long, so a connection that went stale in a pool would cost more than a new one.
        let mut builder = http_client(address.url(), address.ca())?
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .pool_max_idle_per_host(0)
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(15));
        if let Some(socket) = address.socket() {
            builder = builder.unix_socket(socket.as_path());
        }
        let http = builder.build().map_err(|error| {
            Error::new(ErrorKind::Internal, "set up the HTTP client", "the client cannot be built")
                .caused_by(error)
        })?;
        Ok(Self { engine, address, http })
    }

    pub(crate) fn address(&self) -> &EngineAddress {
        &self.address
    }

    /// An error about this engine.
    pub(crate) fn error(
        &self,
        kind: ErrorKind,
        operation: &'static str,
        message: impl Into<String>,
    ) -> Error {
        Error::new(kind, operation, message).with(Key::Endpoint, &self.address)
    }

    /// The error for an answer that is not a success: the engine's status and body.
    pub(crate) fn refused(&self, operation: &'static str, reply: &Reply) -> Error {
        let text = reply.text();
        let said = if text.is_empty() { "with an empty body".to_owned() } else { format!("saying: {text}") };
        self.error(ErrorKind::Backend, operation, format!("{} answered {} {said}", self.engine, reply.status))
    }

    /// Polls `url` until `accept` takes the answer. Nobody listening yet is normal; a server without the route is not.
    pub(crate) async fn wait_ready(
        &self,
        url: Url,
        deadline: Instant,
        accept: impl Fn(StatusCode) -> bool,
    ) -> Result<()> {
        const OPERATION: &str = "wait for the engine";
        let started = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            let attempt = deadline.min(Instant::now() + PROBE);
            let last = match self.request(OPERATION, Method::GET, url.clone(), None, attempt).await {
                Ok(reply) if accept(reply.status) => return Ok(()),
                Ok(reply) if is_wrong_server(reply.status) => {
                    let message = format!(
                        "GET {} answered {}: this is no {} server, or it has moved",
                        url.path(),
                        reply.status,
                        self.engine
                    );
                    return Err(self.error(ErrorKind::ConfigInvalid, OPERATION, message));
                }
                Ok(reply) => self.refused(OPERATION, &reply).message().to_owned(),
                // Waiting brings no other certificate.
                Err(error) if error.kind() == ErrorKind::ConfigInvalid => return Err(error),
                Err(error) => {
                    if error.kind() == ErrorKind::Timeout
                        && let Some(error) = self.stopped(OPERATION).await
                    {
                        return Err(error);
                    }
                    error.message().to_owned()
                }
            };
            if Instant::now() + pause >= deadline {
                let message = format!(
                    "{} was not ready after {:.1} s (last: {last}); start it, or check its address",
                    self.engine,
                    started.elapsed().as_secs_f64()
                );
                return Err(self.error(ErrorKind::Timeout, OPERATION, message));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Posts JSON and returns whatever the engine answers. Meanwhile `health`, if there is one, must answer something
    /// within [`PROBE`]: a server that was stopped keeps its connections and says nothing.
    pub(crate) async fn post(
        &self,
        operation: &'static str,
        url: Url,
        body: &Value,
        health: Option<Url>,
        deadline: Instant,
    ) -> Result<Reply> {
        let silent = async {
            let Some(health) = health else { return std::future::pending().await };
            loop {
                tokio::time::sleep(LONGEST_PAUSE).await;
                let attempt = Instant::now() + PROBE;
                let probe = self.request(operation, Method::GET, health.clone(), None, attempt).await;
                // Anything else shows in the request's own answer.
                if probe.is_err_and(|error| error.kind() == ErrorKind::Timeout) {
                    break;
                }
            }
        };
        tokio::select! {
            biased;
            reply = self.request(operation, Method::POST, url, Some(body), deadline) => reply,
            () = silent => {
                let text = format!(
                    "{} has gone silent: its health check had no answer for {} s while the update request is open; \
                     look at the server's process and log",
                    self.engine,
                    PROBE.as_secs()
                );
                Err(self.error(ErrorKind::PeerLost, operation, text))
            }
        }
    }

    /// The error for a server on this host that was silent for [`PROBE`] because its process is stopped.
    async fn stopped(&self, operation: &'static str) -> Option<Error> {
        let pid = tokio::time::timeout(LONGEST_PAUSE, liveness::listener_of(self.address.socket()?))
            .await
            .ok()??;
        let text = liveness::told(pid, self.engine);
        liveness::is_stopped(pid).then(|| self.error(ErrorKind::PeerLost, operation, text))
    }

    async fn request(
        &self,
        operation: &'static str,
        method: Method,
        url: Url,
        body: Option<&Value>,
        deadline: Instant,
    ) -> Result<Reply> {
        let started = Instant::now();
        let exchange = async {
            let mut request = self.http.request(method, url);
            if let Some(body) = body {
                request = request.json(body);
            }
            let mut response = request.send().await?;
            let mut reply = Reply { status: response.status(), body: Vec::new() };
            while let Some(chunk) = response.chunk().await? {
                let room = BODY_LIMIT - reply.body.len();
                reply.body.extend_from_slice(&chunk[..chunk.len().min(room)]);
                if reply.body.len() == BODY_LIMIT {
                    break;
                }
            }
            Ok::<_, reqwest::Error>(reply)
        };
        match tokio::time::timeout_at(deadline.into(), exchange).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(error)) => Err(self.broken(operation, &error)),
            Err(_) => {
                let seconds = started.elapsed().as_secs_f64();
                let message = format!("{} did not answer within {seconds:.1} s", self.engine);
                Err(self.error(ErrorKind::Timeout, operation, message))
            }
        }
    }

    fn broken(&self, operation: &'static str, error: &reqwest::Error) -> Error {
        let deepest =
            std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source()).last();
        let cause = deepest.map(ToString::to_string).unwrap_or_default();
        if let Some(why) = tls::explain(error) {
            let message = format!("cannot connect to {}: {why} ({cause})", self.engine);
            return self.error(ErrorKind::ConfigInvalid, operation, message);
        }
        let message = if error.is_connect() {
            format!("cannot connect to {}: {cause}", self.engine)
        } else {
            format!("{} closed the connection before its answer was complete: {cause}", self.engine)
        };
        self.error(ErrorKind::PeerLost, operation, message)
    }
}

/// Answers that waiting will not change.
fn is_wrong_server(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::NOT_FOUND
            | StatusCode::METHOD_NOT_ALLOWED
            | StatusCode::UNAUTHORIZED
            | StatusCode::FORBIDDEN
            | StatusCode::GONE
    )
}
