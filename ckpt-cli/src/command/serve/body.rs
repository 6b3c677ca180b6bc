//! What requests carry, checked: a body that does not fit is answered with 422 before anything is done.

use std::time::Duration;

use axum::http::{HeaderMap, header::CONTENT_TYPE};
use serde::{Deserialize, de::DeserializeOwned};

/// Longest name of a checkpoint, in bytes.
const NAME_BYTES: usize = 512;
const DEFAULT_TIMEOUT_S: f64 = 300.0;
const LONGEST_TIMEOUT_S: f64 = 86_400.0;

/// Why a request does not fit.
pub(super) type Misfit = String;

/// Body of `POST /v1/checkpoints/{name}/files`.
#[derive(Debug, Deserialize)]
pub(super) struct FilesBody {
    pub(super) files: Vec<String>,
}

/// Body of `POST /v1/checkpoints/{name}/update`, as it comes.
#[derive(Debug, Deserialize)]
struct RawUpdate {
    ranks: Option<Vec<u32>>,
    update_url: Option<String>,
    inference_group_ranks: Option<Vec<u32>>,
    timeout: Option<f64>,
    uds: Option<String>,
    /// Ours: the version's number; checkpoint-engine has none.
    weight_version: Option<u64>,
}

/// A checked update request.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct UpdateBody {
    /// Ascending, each once; empty for a broadcast to all.
    pub(super) ranks: Vec<u32>,
    pub(super) update_url: Option<String>,
    /// Ascending, each once; empty for all members.
    pub(super) group: Vec<u32>,
    pub(super) timeout: Duration,
    pub(super) uds: Option<String>,
    pub(super) weight_version: Option<u64>,
}

/// Reads a JSON body. Only JSON is taken, so that no web page can post a form to a server on loopback.
pub(super) fn json<T: DeserializeOwned>(headers: &HeaderMap, body: &[u8]) -> Result<T, Misfit> {
    is_json(headers)?;
    serde_json::from_slice(body).map_err(|error| format!("the body does not fit: {error}"))
}

/// Checks the content type.
pub(super) fn is_json(headers: &HeaderMap) -> Result<(), Misfit> {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    match kind.strip_prefix("application/") {
        Some(kind) if kind == "json" || kind.ends_with("+json") => Ok(()),
        _ => Err("the body must be JSON, with the header `content-type: application/json`".to_owned()),
    }
}

/// A checkpoint's name from the path.
pub(super) fn name(text: String) -> Result<String, Misfit> {
    if text.is_empty() || text.len() > NAME_BYTES || text.chars().any(char::is_control) {
        return Err(format!("a checkpoint's name has 1 to {NAME_BYTES} bytes and no control characters"));
    }
    Ok(text)
}

impl UpdateBody {
    /// From a request to a server of a world of `world_size` ranks.
    pub(super) fn read(headers: &HeaderMap, body: &[u8], world_size: u32) -> Result<Self, Misfit> {
        let raw: RawUpdate = json(headers, body)?;
        let members = |name: &str, ranks: Option<Vec<u32>>| {
            let mut ranks = ranks.unwrap_or_default();
            ranks.sort_unstable();
            ranks.dedup();
            match ranks.last() {
                Some(last) if *last >= world_size => {
                    Err(format!("{name} names rank {last}; this job has ranks 0 to {}", world_size - 1))
                }
                _ => Ok(ranks),
            }
        };
        let ranks = members("ranks", raw.ranks)?;
        let group = members("inference_group_ranks", raw.inference_group_ranks)?;
        if !ranks.is_empty()
            && let Some(outside) = group.iter().find(|rank| !ranks.contains(rank))
        {
            return Err(format!("inference_group_ranks names rank {outside}, which ranks does not"));
        }
        let seconds = raw.timeout.unwrap_or(DEFAULT_TIMEOUT_S);
        if !(seconds > 0.0 && seconds <= LONGEST_TIMEOUT_S) {
            return Err(format!("timeout must be above 0 and at most {LONGEST_TIMEOUT_S} seconds"));
        }
        Ok(Self {
            ranks,
            update_url: raw.update_url,
            group,
            timeout: Duration::from_secs_f64(seconds),
            uds: raw.uds,
            weight_version: raw.weight_version,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(kind: &'static str) -> HeaderMap {
        [(CONTENT_TYPE, axum::http::HeaderValue::from_static(kind))].into_iter().collect()
    }

    fn update(body: &str) -> Result<UpdateBody, Misfit> {
        UpdateBody::read(&headers("application/json"), body.as_bytes(), 4)
    }

    #[test]
    fn every_key_has_the_default_of_checkpoint_engine() {
        let expected = UpdateBody {
            ranks: Vec::new(),
            update_url: None,
            group: Vec::new(),
            timeout: Duration::from_secs(300),
            uds: None,
            weight_version: None,
        };
        assert_eq!(update("{}").unwrap(), expected);
        let nulls = r#"{"ranks": null, "update_url": null, "inference_group_ranks": [], "timeout": 300.0,
                        "uds": null, "more": 1}"#;
        assert_eq!(update(nulls).unwrap(), expected);
        let full = update(r#"{"ranks": [3, 1, 3], "inference_group_ranks": [3], "timeout": 7}"#).unwrap();
        assert_eq!((full.ranks, full.group, full.timeout), (vec![1, 3], vec![3], Duration::from_secs(7)));
    }

    #[test]
    fn what_does_not_fit_is_told_with_its_name() {
        for (body, word) in [
            ("", "does not fit"),
            ("[]x", "does not fit"),
            (r#"{"ranks": "0-3"}"#, "does not fit"),
            (r#"{"ranks": [-1]}"#, "does not fit"),
            (r#"{"ranks": [4]}"#, "ranks"),
            (r#"{"inference_group_ranks": [9]}"#, "inference_group_ranks"),
            (r#"{"ranks": [1], "inference_group_ranks": [0]}"#, "inference_group_ranks"),
            (r#"{"timeout": 0}"#, "timeout"),
            (r#"{"timeout": -3}"#, "timeout"),
            (r#"{"timeout": 1e300}"#, "timeout"),
        ] {
            let misfit = update(body).unwrap_err();
            assert!(misfit.contains(word), "{body}: {misfit}");
        }
    }

    #[test]
    fn only_json_is_taken() {
        for good in ["application/json", "Application/JSON; charset=utf-8", "application/problem+json"] {
            is_json(&headers(good)).unwrap();
        }
        for bad in ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"] {
            is_json(&headers(bad)).unwrap_err();
        }
        assert!(json::<FilesBody>(&headers("application/json"), b"{\"files\": [1]}").is_err());
    }

    #[test]
    fn names_are_short_text() {
        name("my-checkpoint-iter-0".into()).unwrap();
        for bad in [String::new(), "a\nb".into(), "x".repeat(513)] {
            name(bad).unwrap_err();
        }
    }
}
