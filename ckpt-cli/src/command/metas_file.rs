//! Metas as files and from a running instance's HTTP API.

use std::{path::Path, time::Duration};

use ckpt_core::{Error, ErrorKind, Key, control::Token, metas::Metas};

use super::http_get::{self, TrustArgs};

const OPERATION: &str = "load metas";
/// The path of a running instance's metas, where the URL names none.
const METAS_PATH: &str = "/v1/metas";
const FETCH_TIME: Duration = Duration::from_secs(30);

/// Reads metas from a file, `http://host:port[/path]`, the same with `https://`, or `unix:SOCKET`. An instance that asks for `token` is shown it.
pub(crate) async fn load(source: &str, token: &Token, trust: &TrustArgs) -> anyhow::Result<Metas> {
    let json = if source.contains("://") || source.starts_with("unix:") {
        fetch(source, token, trust).await.map_err(|e| e.with(Key::Endpoint, source))?
    } else {
        tokio::fs::read(source).await.map_err(|e| {
            Error::new(
                ErrorKind::ConfigInvalid,
                OPERATION,
                "the file cannot be read; write it with --save-metas-file",
            )
            .with(Key::Path, source)
            .caused_by(e)
        })?
    };
    let metas = tokio::task::spawn_blocking(move || Metas::from_json(&json)).await?;
    Ok(metas.map_err(|e| e.with(Key::Path, source))?)
}

async fn fetch(source: &str, token: &Token, trust: &TrustArgs) -> Result<Vec<u8>, Error> {
    const HINT: &str = "the instance does not answer; is `ckpt serve` running there?";
    let unreachable = |e| http_get::unreachable(source, OPERATION, HINT, e);
    let (builder, mut url) = http_get::client(source, trust, OPERATION)?;
    if url.path() == "/" {
        url.set_path(METAS_PATH);
    }
    let client = builder.timeout(FETCH_TIME).build().map_err(unreachable)?;
    let mut response = client.get(url.clone()).send().await.map_err(unreachable)?;
    if response.status() == reqwest::StatusCode::UNAUTHORIZED {
        let token = String::from_utf8_lossy(token.reveal()).into_owned();
        response = client.get(url).bearer_auth(token).send().await.map_err(unreachable)?;
    }
    let status = response.status();
    let body = response.bytes().await.map_err(unreachable)?;
    if !status.is_success() {
        let text: String = String::from_utf8_lossy(&body).chars().take(500).collect();
        let message = format!("the instance answered {status}: {text}");
        return Err(Error::new(ErrorKind::Backend, OPERATION, message));
    }
    Ok(body.into())
}

/// Writes metas so that a reader sees the old file or the new one, never a part.
pub(crate) async fn save(path: &Path, metas: &Metas) -> anyhow::Result<()> {
    let json = metas.to_json()?;
    let target = path.to_owned();
    let written = tokio::task::spawn_blocking(move || {
        let folder = match target.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        std::io::Write::write_all(&mut file, json.as_bytes())?;
        file.persist(&target).map_err(|e| e.error).map(drop)
    });
    Ok(written.await?.map_err(|e| {
        Error::new(
            ErrorKind::ConfigInvalid,
            "save metas",
            "the file cannot be written; choose another with --save-metas-file",
        )
        .with(Key::Path, path.display())
        .caused_by(e)
    })?)
}
