//! A rank's part of a gather, and all ranks' metas in one piece.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{EncodedLayout, LayoutDigest, Metas, Placement, RankMetas};
use crate::{
    error::{Error, ErrorKind, Key, Result},
    manifest::Share,
    types::Rank,
};

/// Version of the format; the first byte.
const FORMAT: u8 = 1;

/// What one rank tells the others: its placement, and its layout by digest, with the layout itself for those who may
/// not have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Where its share is.
    pub placement: Placement,
    /// Which layout the share has.
    pub layout: LayoutDigest,
    /// The layout, encoded; `None` where the receivers have it.
    pub layout_bytes: Option<Bytes>,
}

impl Part {
    /// A part that carries its layout.
    pub fn with_layout(placement: Placement, layout: &EncodedLayout) -> Self {
        Self { placement, layout: layout.digest(), layout_bytes: Some(layout.bytes().clone()) }
    }

    /// A part for receivers that have the layout: some hundred bytes.
    pub fn without_layout(placement: Placement, layout: &EncodedLayout) -> Self {
        Self { placement, layout: layout.digest(), layout_bytes: None }
    }

    /// For the wire.
    pub fn encode(&self) -> Result<Bytes> {
        encode(self)
    }

    /// From the wire.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        decode(bytes)
    }
}

/// Layouts that this process knows, so that they are sent and parsed once.
#[derive(Debug, Default)]
pub struct LayoutCache {
    known: BTreeMap<LayoutDigest, Arc<Share>>,
}

impl LayoutCache {
    /// Whether a layout is known.
    pub fn contains(&self, digest: LayoutDigest) -> bool {
        self.known.contains_key(&digest)
    }

    /// Metas of a part, and the layout remembered. [`ErrorKind::Unavailable`]: the layout is neither known nor in
    /// the part; ask for the part with its layout.
    pub fn resolve(&mut self, part: Part) -> Result<RankMetas> {
        let share = match (self.known.get(&part.layout), part.layout_bytes) {
            (Some(share), _) => share.clone(),
            (None, Some(bytes)) => {
                let layout = EncodedLayout::from_bytes(bytes);
                if layout.digest() != part.layout {
                    return Err(Error::new(
                        ErrorKind::Corrupt,
                        "read metas",
                        "the layout does not have its digest",
                    ));
                }
                let share = Arc::new(layout.decode()?);
                self.known.insert(part.layout, share.clone());
                share
            }
            (None, None) => {
                return Err(Error::new(
                    ErrorKind::Unavailable,
                    "read metas",
                    format!("layout {} is not known here; gather again with layouts", part.layout),
                ));
            }
        };
        RankMetas::new(share, part.placement)
    }

    /// Forgets every layout that `metas` does not use.
    pub fn retain(&mut self, metas: &Metas) {
        self.known.retain(|_, share| metas.ranks.values().any(|m| Arc::ptr_eq(&m.share, share)));
    }
}

impl Metas {
    /// Everything in one compact piece.
    pub fn encode(&self) -> Result<Bytes> {
        let mut parts: Vec<(Rank, Part)> = Vec::with_capacity(self.ranks.len());
        let mut sent = std::collections::BTreeSet::new();
        for (rank, metas) in &self.ranks {
            let layout = EncodedLayout::new(&metas.share).map_err(|e| e.with(Key::Rank, rank))?;
            // Replicas have equal layouts: once is enough.
            let placement = metas.placement.clone();
            let part = if sent.insert(layout.digest()) {
                Part::with_layout(placement, &layout)
            } else {
                Part::without_layout(placement, &layout)
            };
            parts.push((*rank, part));
        }
        encode(&parts)
    }

    /// From [`Metas::encode`].
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let parts: Vec<(Rank, Part)> = decode(bytes)?;
        let mut cache = LayoutCache::default();
        let mut metas = Self::default();
        for (rank, part) in parts {
            let of_rank = cache.resolve(part).map_err(|e| e.with(Key::Rank, rank))?;
            if metas.ranks.insert(rank, of_rank).is_some() {
                return Err(Error::new(ErrorKind::Corrupt, "read metas", "the rank is there twice")
                    .with(Key::Rank, rank));
            }
        }
        Ok(metas)
    }
}

fn encode<T: Serialize>(value: &T) -> Result<Bytes> {
    postcard::to_extend(value, vec![FORMAT])
        .map(Bytes::from)
        .map_err(|e| Error::new(ErrorKind::Internal, "encode metas", "they cannot be encoded").caused_by(e))
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    let corrupt = |message: &str| Error::new(ErrorKind::Corrupt, "read metas", message);
    let Some((&format, rest)) = bytes.split_first() else { return Err(corrupt("they are empty")) };
    if format != FORMAT {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "read metas",
            format!("their format is {format}, this version reads {FORMAT}; run the same version everywhere"),
        ));
    }
    match postcard::take_from_bytes(rest) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err(corrupt("they have a tail")),
        Err(e) => Err(corrupt("they cannot be parsed").caused_by(e)),
    }
}
