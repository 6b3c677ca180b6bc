//! The digest by which ranks see that they made the same plan.

use twox_hash::XxHash3_64;

use super::UpdatePlan;

impl UpdatePlan {
    /// XXH3-64 over everything but [`UpdatePlan::digest`], as little-endian integers in the order of declaration; lists
    /// begin with their length, an absent `waits_for` is -1.
    pub fn compute_digest(&self) -> u64 {
        let segments: usize = self.buckets.iter().map(|b| b.segments.len()).sum();
        let mut words =
            Words(Vec::with_capacity(64 + 4 * self.members.len() + 28 * self.buckets.len() + 48 * segments));
        words.u64(self.members.len() as u64);
        self.members.iter().for_each(|rank| words.u32(*rank));
        words.u64(self.ring_bytes);
        words.u64(self.bucket_bytes);
        words.u32(self.window);
        words.u64(self.buckets.len() as u64);
        for bucket in &self.buckets {
            words.u64(bucket.ring_offset);
            words.u64(bucket.len_bytes);
            words.u64(bucket.waits_for.map_or(u64::MAX, u64::from));
            words.u64(bucket.segments.len() as u64);
            for segment in &bucket.segments {
                words.u32(segment.owner);
                words.u32(segment.root);
                words.u32(segment.arena);
                words.u64(segment.arena_offset);
                words.u64(segment.len_bytes);
                words.u64(segment.ring_offset);
                words.u32(segment.tensors.start);
                words.u32(segment.tensors.end);
            }
        }
        XxHash3_64::oneshot(&words.0)
    }
}

struct Words(Vec<u8>);

impl Words {
    fn u32(&mut self, word: u32) {
        self.0.extend_from_slice(&word.to_le_bytes());
    }

    fn u64(&mut self, word: u64) {
        self.0.extend_from_slice(&word.to_le_bytes());
    }
}
