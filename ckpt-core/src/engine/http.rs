//! Any engine with an HTTP route: a URL and a JSON template.

use std::time::Instant;

use async_trait::async_trait;
use reqwest::Url;
use serde_json::{Value, json};

use super::{Engine, EngineAddress, EngineRequest, PauseMode, client::EngineClient};
use crate::error::{Error, ErrorKind, Result};

const OPERATION: &str = "update the engine";
const PLACEHOLDERS: &[&str] = &["endpoints", "endpoint_list", "uuids", "version", "timeout_s"];
const TEMPLATE_LIMIT: usize = 1 << 20;

/// What an HTTP engine is sent: JSON in which `{{name}}` stands for a value.
///
/// `{{endpoints}}` is an object of endpoints by device UUID, `{{endpoint_list}}` and `{{uuids}}` are its values and
/// keys in the same order, `{{version}}` and `{{timeout_s}}` are numbers. A string that is just one placeholder becomes
/// the value itself; inside a longer string only the two numbers may stand.
#[derive(Clone, Debug, PartialEq)]
pub struct HttpTemplate {
    body: Value,
    ready_path: Option<String>,
    /// Paths that pause and resume, if the engine has them.
    pause_paths: Option<(String, String)>,
}

impl Default for HttpTemplate {
    fn default() -> Self {
        let body = json!({ "endpoints": "{{endpoints}}", "version": "{{version}}" });
        Self { body, ready_path: None, pause_paths: None }
    }
}

impl HttpTemplate {
    /// From JSON text; an unknown placeholder is an error, not text that the engine would wonder about.
    pub fn parse(text: &str) -> Result<Self> {
        if text.len() > TEMPLATE_LIMIT {
            return Err(invalid(format!("{} bytes are too many", text.len())));
        }
        let body: Value =
            serde_json::from_str(text).map_err(|error| invalid(format!("it is not JSON: {error}")))?;
        let sample =
            EngineRequest { endpoints: [("U".into(), "E".into())].into(), version: crate::Version(1) };
        fill(&body, &Values::of(&sample, 1.0))?;
        Ok(Self { body, ready_path: None, pause_paths: None })
    }

    /// Asks `path` of the same server until it answers with a success. Without it any answer counts as ready.
    pub fn ready_at(mut self, path: impl Into<String>) -> Self {
        self.ready_path = Some(path.into());
        self
    }

    /// Posts to `pause` of the same server before an update and to `resume` after it. Both may have a query, in which
    /// `{mode}` stands for the mode's name.
    pub fn paused_at(mut self, pause: impl Into<String>, resume: impl Into<String>) -> Self {
        self.pause_paths = Some((pause.into(), resume.into()));
        self
    }
}

/// An engine that is told by one POST.
#[derive(Clone, Debug)]
pub struct HttpEngine {
    client: EngineClient,
    template: HttpTemplate,
}

impl HttpEngine {
    /// `address` with its path is where the request goes.
    pub fn new(address: EngineAddress, template: HttpTemplate) -> Result<Self> {
        Ok(Self { client: EngineClient::new("the engine", address)?, template })
    }

    /// Another route of the same server.
    fn at(&self, path: &str) -> Url {
        let mut url = self.client.address().url().clone();
        url.set_query(None);
        url.set_path(path);
        url
    }
}

#[async_trait]
impl Engine for HttpEngine {
    fn name(&self) -> &'static str {
        "http"
    }

    async fn ready(&self, deadline: Instant) -> Result<()> {
        match &self.template.ready_path {
            Some(path) => self.client.wait_ready(self.at(path), deadline, |status| status.is_success()).await,
            None => {
                let mut url = self.client.address().url().clone();
                url.set_query(None);
                self.client.wait_ready(url, deadline, |status| !status.is_server_error()).await
            }
        }
    }

    async fn update(&self, request: &EngineRequest, deadline: Instant) -> Result<()> {
        let timeout_s = deadline.saturating_duration_since(Instant::now()).as_secs_f64();
        let body = fill(&self.template.body, &Values::of(request, timeout_s))?;
        let url = self.client.address().url().clone();
        // Any route but the one that is known to be for this may wait for the update's end.
        let health = self.template.ready_path.as_ref().map(|path| self.at(path));
        let reply = self.client.post(OPERATION, url, &body, health, deadline).await?;
        if reply.status.is_success() { Ok(()) } else { Err(self.client.refused(OPERATION, &reply)) }
    }

    async fn pause(&self, mode: PauseMode, deadline: Instant) -> Result<bool> {
        let Some((pause, _)) = &self.template.pause_paths else { return Ok(false) };
        self.knock("pause the engine", &pause.replace("{mode}", mode.name()), deadline).await?;
        Ok(true)
    }

    async fn resume(&self, deadline: Instant) -> Result<()> {
        let Some((_, resume)) = &self.template.pause_paths else { return Ok(()) };
        self.knock("resume the engine", resume, deadline).await
    }
}

impl HttpEngine {
    /// An empty POST that must be answered with a success.
    async fn knock(&self, operation: &'static str, path: &str, deadline: Instant) -> Result<()> {
        let mut url = self.client.address().url().clone();
        let (path, query) = path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
        url.set_path(path);
        url.set_query(query);
        let reply = self.client.post(operation, url, &json!({}), None, deadline).await?;
        if reply.status.is_success() { Ok(()) } else { Err(self.client.refused(operation, &reply)) }
    }
}

struct Values {
    endpoints: Value,
    endpoint_list: Value,
    uuids: Value,
    version: Value,
    timeout_s: Value,
}

impl Values {
    fn of(request: &EngineRequest, timeout_s: f64) -> Self {
        Self {
            endpoints: json!(request.endpoints),
            endpoint_list: request.endpoints.values().cloned().collect(),
            uuids: request.endpoints.keys().cloned().collect(),
            version: json!(request.version.0),
            timeout_s: json!(timeout_s),
        }
    }

    fn named(&self, name: &str) -> Result<&Value> {
        Ok(match name {
            "endpoints" => &self.endpoints,
            "endpoint_list" => &self.endpoint_list,
            "uuids" => &self.uuids,
            "version" => &self.version,
            "timeout_s" => &self.timeout_s,
            _ => {
                let known: Vec<String> = PLACEHOLDERS.iter().map(|name| format!("{{{{{name}}}}}")).collect();
                return Err(invalid(format!(
                    "{{{{{name}}}}} is no placeholder; there are {}",
                    known.join(", ")
                )));
            }
        })
    }
}

fn fill(template: &Value, values: &Values) -> Result<Value> {
    Ok(match template {
        Value::String(text) => fill_text(text, values)?,
        Value::Array(items) => {
            Value::Array(items.iter().map(|item| fill(item, values)).collect::<Result<_>>()?)
        }
        Value::Object(fields) => {
            let fields = fields.iter().map(|(key, value)| Ok((key.clone(), fill(value, values)?)));
            Value::Object(fields.collect::<Result<_>>()?)
        }
        other => other.clone(),
    })
}

fn fill_text(text: &str, values: &Values) -> Result<Value> {
    let mut filled = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("{{") {
        let Some((name, behind)) = after.split_once("}}") else {
            return Err(invalid(format!("a placeholder in `{text}` is not closed")));
        };
        let value = values.named(name.trim())?;
        if before.is_empty() && behind.is_empty() && filled.is_empty() {
            return Ok(value.clone());
        }
        if !value.is_number() {
            return Err(invalid(format!("{{{{{name}}}}} cannot stand inside a longer text: `{text}`")));
        }
        filled = format!("{filled}{before}{value}");
        rest = behind;
    }
    Ok(Value::String(filled + rest))
}

fn invalid(why: String) -> Error {
    Error::new(ErrorKind::ConfigInvalid, "read the engine's request template", why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(template: &str) -> Value {
        let endpoints = [("GPU-b".into(), "ipc:///b".into()), ("GPU-a".into(), "ipc:///a".into())].into();
        let request = EngineRequest { endpoints, version: crate::Version(7) };
        fill(&HttpTemplate::parse(template).unwrap().body, &Values::of(&request, 2.5)).unwrap()
    }

    #[test]
    fn placeholders_become_values() {
        let template = r#"{"a": "{{endpoints}}", "b": ["{{ endpoint_list }}", "{{uuids}}"], "v": "{{version}}",
                           "tag": "step-{{version}}-{{timeout_s}}", "keep": [1, null, "x"]}"#;
        assert_eq!(
            filled(template),
            json!({
                "a": {"GPU-a": "ipc:///a", "GPU-b": "ipc:///b"},
                "b": [["ipc:///a", "ipc:///b"], ["GPU-a", "GPU-b"]],
                "v": 7,
                "tag": "step-7-2.5",
                "keep": [1, null, "x"],
            })
        );
    }

    #[test]
    fn mistakes_in_a_template_are_found_when_it_is_read() {
        for (template, complaint) in [
            ("{", "not JSON"),
            (r#""{{endpoint}}""#, "{{endpoint}} is no placeholder"),
            (r#"["{{version"]"#, "not closed"),
            (r#"{"a": "x {{endpoints}}"}"#, "cannot stand inside"),
        ] {
            let error = HttpTemplate::parse(template).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
            assert!(error.message().contains(complaint), "{error}");
        }
    }
}
