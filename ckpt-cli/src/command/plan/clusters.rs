//! Cluster files, and those that come with the program.

use ckpt_core::{Error, ErrorKind, Key, predict::Cluster};
use serde::Serialize;

/// Name and text of every cluster file that is shipped.
const SHIPPED: [(&str, &str); 6] = [
    ("laptop", include_str!("../../../../clusters/laptop.toml")),
    ("2x-h200", include_str!("../../../../clusters/2x-h200.toml")),
    ("1x8-h800", include_str!("../../../../clusters/1x8-h800.toml")),
    ("2x8-h20", include_str!("../../../../clusters/2x8-h20.toml")),
    ("8x8-h100", include_str!("../../../../clusters/8x8-h100.toml")),
    ("32x8-h20", include_str!("../../../../clusters/32x8-h20.toml")),
];

/// A shipped cluster.
#[derive(Serialize)]
pub(super) struct Listed {
    pub(super) name: &'static str,
    pub(super) nodes: u32,
    pub(super) devices: u32,
    pub(super) about: String,
}

pub(super) fn list() -> anyhow::Result<Vec<Listed>> {
    let listed = |(name, text): (&'static str, &str)| {
        let cluster = parse(text, name)?;
        Ok(Listed { name, nodes: cluster.node_count(), devices: cluster.devices(), about: cluster.about })
    };
    SHIPPED.into_iter().map(listed).collect()
}

/// A shipped cluster by name, else a file.
pub(super) fn load(name: &str) -> anyhow::Result<Cluster> {
    if let Some((_, text)) = SHIPPED.iter().find(|(shipped, _)| *shipped == name) {
        return parse(text, name);
    }
    let text = std::fs::read_to_string(name).map_err(|error| {
        let known: Vec<&str> = SHIPPED.iter().map(|(name, _)| *name).collect();
        let message = format!("it is neither a file that can be read nor one of {}", known.join(", "));
        Error::new(ErrorKind::ConfigInvalid, "read the cluster", message)
            .with(Key::Path, name)
            .caused_by(error)
    })?;
    parse(&text, name)
}

fn parse(text: &str, name: &str) -> anyhow::Result<Cluster> {
    let cluster: Cluster = toml::from_str(text).map_err(|error| {
        // One line: where, and what is wrong there.
        let line = error.span().map_or(0, |span| text[..span.start.min(text.len())].lines().count().max(1));
        let message = format!("line {line}: {}", error.message().replace('\n', " "));
        Error::new(ErrorKind::ConfigInvalid, "read the cluster", message).with(Key::Path, name)
    })?;
    cluster.validate().map_err(|error| error.with(Key::Path, name))?;
    Ok(cluster)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shipped_cluster_is_one_and_every_file_is_shipped() {
        let listed = list().unwrap();
        assert_eq!(listed.len(), SHIPPED.len());
        assert!(listed.iter().all(|one| !one.about.is_empty() && one.devices > 0));
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../clusters");
        let files = std::fs::read_dir(folder).unwrap().count();
        assert_eq!(files, SHIPPED.len(), "a file in clusters/ is not in the list");
    }

    #[test]
    fn a_mistake_is_told_with_its_line() {
        let error = parse("name = \"x\"\nnodes = 3\n", "f.toml").unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
        let unknown = SHIPPED[0].1.replace("devices =", "gpus =");
        let error = parse(&unknown, "f.toml").unwrap_err().to_string();
        assert!(error.contains("gpus") && !error.contains('\n'), "{error}");
        let error = load("nowhere.toml").unwrap_err().to_string();
        assert!(error.contains("2x8-h20"), "{error}");
    }
}
