//! The checkpoint that is planned: only names, dtypes and shapes.

use std::{path::PathBuf, sync::Arc};

use ckpt_core::{
    checkpoint::CheckpointSource, control::Token, manifest::Manifest, predict::spread, types::TensorMeta,
};

use super::wrong;
use crate::command::{http_get::TrustArgs, metas_file, shape::Shape};

/// A checkpoint's tensors, and who holds them if that is known.
pub(super) enum Source {
    /// To be split between as many ranks as there are.
    Tensors { name: String, tensors: Vec<TensorMeta> },
    /// Split already.
    Held { name: String, manifest: Arc<Manifest> },
}

pub(super) async fn load(
    path: Option<PathBuf>,
    metas: Option<&str>,
    trust: &TrustArgs,
    shape: Option<Shape>,
) -> anyhow::Result<Source> {
    if let Some(path) = path {
        let name = path.display().to_string();
        let opened = tokio::task::spawn_blocking(move || CheckpointSource::open(path)).await??;
        let tensors = opened.tensors().iter().map(|tensor| tensor.meta.clone()).collect();
        return Ok(Source::Tensors { name, tensors });
    }
    if let Some(from) = metas {
        let token = match std::env::var("CKPT_TOKEN") {
            Ok(text) => Token::new(text.into_bytes())?,
            Err(_) => Token::random()?,
        };
        let manifest = Arc::new(metas_file::load(from, &token, trust).await?.manifest());
        return Ok(Source::Held { name: from.to_owned(), manifest });
    }
    let shape = shape.ok_or_else(|| wrong("say what to plan: --checkpoint-path, --metas or --shape"))?;
    Ok(Source::Tensors { name: shape.to_string(), tensors: shape.tensors() })
}

impl Source {
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Tensors { name, .. } | Self::Held { name, .. } => name,
        }
    }

    /// The checkpoint in the memory of `owners` ranks.
    pub(super) fn manifest(&self, owners: u32) -> anyhow::Result<Arc<Manifest>> {
        match self {
            Self::Tensors { tensors, .. } => Ok(Arc::new(spread(tensors.iter().cloned(), owners)?)),
            Self::Held { manifest, .. } => {
                let ranks = manifest.shares.keys().next_back().map_or(0, |last| last + 1);
                if ranks > owners {
                    let message =
                        format!("the metas are those of {ranks} ranks, the cluster has room for {owners}");
                    return Err(wrong(message).into());
                }
                Ok(manifest.clone())
            }
        }
    }
}
