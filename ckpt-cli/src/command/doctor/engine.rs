//! An inference engine: is it there, what is it, and can it be updated? Only questions are asked, nothing is changed.

use std::time::Duration;

use ckpt_core::tls;
use reqwest::{Client, StatusCode};
use serde_json::Value;

use super::{
    super::http_get::{self, TrustArgs},
    Finding,
};

const AREA: &str = "engine";
/// For one answer.
const LIMIT: Duration = Duration::from_secs(5);
/// More of an answer is not looked at.
const BODY_LIMIT: usize = 16 << 20;

struct Engine {
    client: Client,
    base: String,
}

impl Engine {
    /// Status and body, if the engine answers.
    async fn ask(&self, path: &str) -> Result<(StatusCode, String), String> {
        let request = self.client.get(format!("{}{path}", self.base)).send();
        let mut response = request.await.map_err(|error| match tls::explain(&error) {
            Some(why) => why.to_owned(),
            None => error.without_url().to_string(),
        })?;
        let status = response.status();
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| error.without_url().to_string())? {
            if body.len() + chunk.len() > BODY_LIMIT {
                break;
            }
            body.extend_from_slice(&chunk);
        }
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }

    async fn json(&self, path: &str) -> Option<Value> {
        let (status, body) = self.ask(path).await.ok()?;
        status.is_success().then(|| serde_json::from_str(&body).ok()).flatten()
    }
}

/// All that can be found out about the engine at `endpoint`.
pub(super) async fn look(endpoint: &str, trust: &TrustArgs) -> Vec<Finding> {
    const FIX: &str = "write http://HOST:PORT, https://HOST:PORT or unix:PATH";
    let failed = |error: String| vec![Finding::error(AREA, endpoint, error, FIX)];
    let (builder, url) = match http_get::client(endpoint, trust, "look at the engine") {
        Ok(made) => made,
        Err(error) => return failed(error.to_string()),
    };
    let engine = match builder.timeout(LIMIT).build() {
        Ok(client) => Engine { client, base: url.as_str().trim_end_matches('/').to_owned() },
        Err(error) => return failed(error.to_string()),
    };
    let mut findings = Vec::new();
    match engine.ask("/health").await {
        Ok((status, _)) if status.is_success() => findings.push(Finding::ok(AREA, endpoint, "answers")),
        Ok((status, _)) if status == StatusCode::NOT_FOUND => {
            let fix = "this is another kind of server; check the address";
            findings.push(Finding::error(AREA, endpoint, format!("GET /health: {status}"), fix));
            return findings;
        }
        Ok((status, _)) => {
            let fix = "it is there and not ready: wait, or look at its log";
            findings.push(Finding::warning(AREA, endpoint, format!("GET /health: {status}"), fix));
        }
        Err(error) => {
            let fix = "start the engine, or correct host and port";
            findings.push(Finding::error(AREA, endpoint, format!("cannot be reached: {error}"), fix));
            return findings;
        }
    }
    if engine.json("/v1/state").await.is_some_and(|state| state.get("version").is_some() || state.is_object())
    {
        findings.push(Finding::ok(AREA, "kind", "`ckpt worker`; use --worker-protocol native"));
        return findings;
    }
    let routes = engine.json("/openapi.json").await.unwrap_or_default();
    findings.extend(of_routes(&routes));
    let version = engine.json("/version").await;
    if let Some(version) = version.as_ref().and_then(|v| v.get("version")).and_then(Value::as_str) {
        findings.push(Finding::ok(AREA, "version", version));
    }
    if routes["paths"].get("/collective_rpc").is_some() {
        let config = engine.ask("/server_info").await.ok().filter(|(status, _)| status.is_success());
        findings.push(extension(config.map(|(_, text)| text).as_deref()));
    }
    findings
}

/// What the engine's list of routes says.
fn of_routes(routes: &Value) -> Option<Finding> {
    let has = |path: &str| routes["paths"].get(path).is_some();
    if !routes["paths"].is_object() {
        let fix = "its kind cannot be told; the first update will show whether it can be updated";
        return Some(Finding::warning(AREA, "kind", "it does not list its routes", fix));
    }
    if has("/collective_rpc") {
        return Some(Finding::ok(
            AREA,
            "kind",
            "vLLM in development mode: it can be updated (--engine vllm)",
        ));
    }
    if has("/update_weights_from_ipc") {
        return Some(Finding::ok(AREA, "kind", "SGLang that can be updated (--engine sglang)"));
    }
    if has("/v1/completions") || has("/v1/chat/completions") {
        let fix = "for vLLM set VLLM_SERVER_DEV_MODE=1 in its environment; SGLang needs 0.5.2 or newer";
        return Some(Finding::error(AREA, "kind", "an engine without a route for updates", fix));
    }
    let fix = "use --engine http with a --http-template if it can be updated";
    Some(Finding::warning(AREA, "kind", "none that is known", fix))
}

/// Whether vLLM's workers have the extension, as far as its configuration tells.
fn extension(config: Option<&str>) -> Finding {
    let fix = "start vLLM with --worker-extension-cls checkpoint_engine.worker.VllmColocateWorkerExtension";
    let key = "worker_extension_cls";
    let Some(config) = config else {
        return Finding::warning(AREA, "worker extension", "this vLLM does not show its configuration", fix);
    };
    let value = config.find(key).map(|at| &config[at + key.len()..]).map(|rest| {
        let rest = rest.trim_start_matches(['\\', '"', '\'', '=', ':', ' ']);
        rest.split(['\\', '"', '\'', ',', ' ', ')', '}']).next().unwrap_or_default()
    });
    match value {
        Some(class) if class.contains('.') => Finding::ok(AREA, "worker extension", class),
        Some(_) => Finding::error(AREA, "worker extension", "none is loaded", fix),
        None => Finding::warning(AREA, "worker extension", "its configuration does not say", fix),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::command::doctor::Verdict;

    #[test]
    fn routes_tell_the_kind_and_the_mode() {
        let with = |paths: &[&str]| {
            let paths: serde_json::Map<String, Value> =
                paths.iter().map(|path| ((*path).to_owned(), json!({}))).collect();
            of_routes(&json!({ "paths": paths })).unwrap()
        };
        assert_eq!(with(&["/collective_rpc", "/v1/completions"]).verdict, Verdict::Ok);
        assert_eq!(with(&["/update_weights_from_ipc", "/v1/completions"]).verdict, Verdict::Ok);
        let without = with(&["/v1/completions"]);
        assert_eq!(without.verdict, Verdict::Error);
        assert!(without.fix.unwrap().contains("VLLM_SERVER_DEV_MODE=1"));
        assert_eq!(with(&["/other"]).verdict, Verdict::Warning);
        assert_eq!(of_routes(&Value::Null).unwrap().verdict, Verdict::Warning);
    }

    #[test]
    fn the_configuration_tells_the_extension() {
        let loaded =
            "{\"vllm_config\":\"parallel_config=ParallelConfig(worker_extension_cls='a.b.Extension', x=1)\"}";
        let finding = extension(Some(loaded));
        assert_eq!((finding.verdict, finding.detail.as_str()), (Verdict::Ok, "a.b.Extension"));
        assert_eq!(extension(Some("worker_extension_cls=''")).verdict, Verdict::Error);
        assert_eq!(extension(Some("{\"worker_extension_cls\": \"a.B\"}")).detail, "a.B");
        assert_eq!(extension(Some("nothing")).verdict, Verdict::Warning);
        assert_eq!(extension(None).verdict, Verdict::Warning);
    }

    #[tokio::test]
    async fn nobody_there_is_an_error() {
        let free = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let findings = look(&format!("http://{address}"), &TrustArgs::default()).await;
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].verdict, Verdict::Error);
    }
}
