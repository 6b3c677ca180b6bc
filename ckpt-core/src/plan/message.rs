//! What the worker is told about a bucket.

use super::UpdatePlan;
use crate::{
    error::{Error, ErrorKind, Key, Result},
    manifest::{Arena, Manifest},
    sink::{BucketMessage, TensorInRing},
};

/// The message for bucket number `bucket` of `plan`, which was made from `manifest`.
pub fn bucket_message(plan: &UpdatePlan, bucket: u32, manifest: &Manifest) -> Result<BucketMessage> {
    let mismatch = || {
        Error::new(ErrorKind::Internal, "describe a bucket", "the plan was not made from this manifest")
            .with(Key::Bucket, bucket)
    };
    let segments = &plan.buckets.get(bucket as usize).ok_or_else(mismatch)?.segments;
    let mut tensors = Vec::with_capacity(segments.iter().map(|s| s.tensors.len()).sum());
    for segment in segments {
        let arena: &Arena = manifest
            .shares
            .get(&segment.owner)
            .and_then(|share| share.arenas.get(segment.arena as usize))
            .ok_or_else(mismatch)?;
        let listed = arena
            .tensors
            .get(segment.tensors.start as usize..segment.tensors.end as usize)
            .ok_or_else(mismatch)?;
        for tensor in listed {
            let offset = tensor
                .offset
                .checked_sub(segment.arena_offset)
                .and_then(|o| o.checked_add(segment.ring_offset))
                .ok_or_else(mismatch)?;
            tensors.push(TensorInRing { meta: tensor.meta.clone(), offset });
        }
    }
    Ok(BucketMessage { bucket, tensors })
}
