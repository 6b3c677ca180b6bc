//! What the planner is asked, and the limits that users set.

use super::PlanError;
use crate::{
    manifest::Manifest,
    types::{Rank, TENSOR_ALIGNMENT},
};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Everything that a plan depends on. Equal inputs give equal plans on every rank.
#[derive(Clone, Debug)]
pub struct PlanInput<'a> {
    /// Who holds which bytes. In a join: the sender's world.
    pub manifest: &'a Manifest,
    /// The ranks that receive, ascending.
    pub members: &'a [Rank],
    /// Free device memory, the smallest over the members.
    pub free_bytes: u64,
    /// What users may set.
    pub limits: PlanLimits,
    /// How bytes reach the members.
    pub method: Method,
}

/// How bytes reach the members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Method {
    /// Owners are members and broadcast their own bytes.
    Broadcast,
    /// Receivers pull from the owners' memory and broadcast to the members.
    P2p {
        /// Members that pull; see [`super::choose_receivers`]. One that is named twice pulls twice as much: it has two
        /// links where others have one.
        receivers: Vec<Rank>,
    },
}

/// Limits of a plan. All ranks must use the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanLimits {
    /// The part of the free device memory that the ring may take, in thousandths.
    pub mem_permille: u32,
    /// No bucket is larger, except one that is a single tensor.
    pub max_bucket_bytes: u64,
    /// The size at which a bucket is closed. Smaller when memory is short or the checkpoint is small.
    pub target_bucket_bytes: u64,
    /// The ring holds the largest tensor and this much more, so that several buckets are in flight.
    pub ring_slack_bytes: u64,
    /// Owners that send at once. `None`: 8, or the number of receivers of a P2P update if that is larger.
    pub window: Option<u32>,
}

impl Default for PlanLimits {
    fn default() -> Self {
        Self {
            mem_permille: 900,
            max_bucket_bytes: 8 * GIB,
            target_bucket_bytes: 128 * MIB,
            ring_slack_bytes: 512 * MIB,
            window: None,
        }
    }
}

impl PlanLimits {
    /// The defaults, changed by `PS_MAX_BUCKET_SIZE_GB` (GiB) and `PS_MEM_FRACTION` as `lookup` finds them.
    pub fn from_env(lookup: &dyn Fn(&str) -> Option<String>) -> Result<Self, PlanError> {
        let mut limits = Self::default();
        if let Some(gib) =
            number(lookup, "PS_MAX_BUCKET_SIZE_GB", "a number of GiB above 0, such as 8 or 0.5")?
        {
            // The cast saturates; whatever is above 2^64 bytes is no limit at all.
            limits.max_bucket_bytes = ((gib * GIB as f64) as u64).max(TENSOR_ALIGNMENT);
        }
        let expected = "a part of the free memory, at least 0.001 and at most 1, such as 0.9";
        if let Some(fraction) = number(lookup, "PS_MEM_FRACTION", expected)? {
            limits.mem_permille = (fraction * 1000.0).round() as u32;
            if !(1..=1000).contains(&limits.mem_permille) {
                return Err(invalid("PS_MEM_FRACTION", fraction, expected));
            }
        }
        Ok(limits)
    }

    /// Refuses limits with which no plan can be made.
    pub(super) fn validate(&self) -> Result<(), PlanError> {
        if !(1..=1000).contains(&self.mem_permille) {
            return Err(invalid("mem_permille", self.mem_permille, "at least 1 and at most 1000"));
        }
        for (name, value) in
            [("max_bucket_bytes", self.max_bucket_bytes), ("target_bucket_bytes", self.target_bucket_bytes)]
        {
            if value < TENSOR_ALIGNMENT {
                return Err(invalid(name, value, "at least 256 bytes"));
            }
        }
        if self.window == Some(0) {
            return Err(invalid("window", 0, "at least 1"));
        }
        Ok(())
    }
}

fn invalid(name: &'static str, value: impl ToString, expected: &'static str) -> PlanError {
    PlanError::InvalidLimit { name, value: value.to_string(), expected }
}

fn number(
    lookup: &dyn Fn(&str) -> Option<String>,
    name: &'static str,
    expected: &'static str,
) -> Result<Option<f64>, PlanError> {
    let Some(text) = lookup(name) else { return Ok(None) };
    if text.trim().is_empty() {
        return Ok(None);
    }
    match text.trim().parse::<f64>() {
        Ok(value) if value.is_finite() && value > 0.0 => Ok(Some(value)),
        _ => Err(invalid(name, format!("{text:?}"), expected)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<PlanLimits, PlanError> {
        PlanLimits::from_env(&|name| pairs.iter().find(|(k, _)| *k == name).map(|(_, v)| (*v).to_string()))
    }

    #[test]
    fn the_environment_sets_bucket_size_and_fraction() {
        assert_eq!(parse(&[]).unwrap(), PlanLimits::default());
        assert_eq!(parse(&[("PS_MEM_FRACTION", " ")]).unwrap(), PlanLimits::default());
        let limits = parse(&[("PS_MAX_BUCKET_SIZE_GB", "0.5"), ("PS_MEM_FRACTION", " 0.75 ")]).unwrap();
        assert_eq!((limits.max_bucket_bytes, limits.mem_permille), (GIB / 2, 750));
        assert_eq!(parse(&[("PS_MAX_BUCKET_SIZE_GB", "1e300")]).unwrap().max_bucket_bytes, u64::MAX);
    }

    #[test]
    fn a_bad_value_is_named() {
        for (name, value) in [
            ("PS_MEM_FRACTION", "0"),
            ("PS_MEM_FRACTION", "1.1"),
            ("PS_MEM_FRACTION", "0.0001"),
            ("PS_MEM_FRACTION", "nan"),
            ("PS_MAX_BUCKET_SIZE_GB", "-1"),
            ("PS_MAX_BUCKET_SIZE_GB", "8GB"),
            ("PS_MAX_BUCKET_SIZE_GB", "inf"),
        ] {
            let error = parse(&[(name, value)]).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(value) && !error.contains('\n'), "{error}");
        }
    }
}
