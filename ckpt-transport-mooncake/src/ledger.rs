//! Generations over one-sided reads.
//!
//! Mooncake knows addresses only: a read of memory that was released and registered again succeeds with other bytes.
//! So every engine serves one table with a record per live registration, and a reader that was given a record's address
//! reads it after the bytes. Generations never repeat in one engine, so a record that still holds the expected one says
//! that the registration was alive all the time. The owner clears the record before it gives up the memory.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use ckpt_core::{
    Error, ErrorKind, Key, Result,
    device::{Buffer, host::HostBuffer},
    transport::{RemoteRegion, Way},
};

/// Four little-endian words: engine, generation, address, length.
pub(crate) const RECORD_BYTES: u64 = 32;
const RECORDS: u64 = 16384;
/// First byte of a region's descriptor, by what peers may do; then the record's address and the engine's number.
const READABLE: u8 = 1;
const WRITABLE: u8 = 2;
const DESCRIPTOR_BYTES: usize = 17;

/// The table of one engine.
pub(crate) struct Ledger {
    memory: Arc<HostBuffer>,
    /// Tells a restarted owner from the one that described the region.
    engine: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    generation: u64,
    used: u64,
    free: Vec<u64>,
}

impl Ledger {
    pub(crate) fn new() -> Result<Self> {
        // Keyed by the system's randomness.
        let mut hasher = RandomState::new().build_hasher();
        hasher.write_u32(std::process::id());
        let memory = HostBuffer::allocate(RECORDS * RECORD_BYTES)?;
        Ok(Self { memory, engine: hasher.finish(), state: Mutex::default() })
    }

    /// What Mooncake must serve.
    pub(crate) fn memory(&self) -> &HostBuffer {
        &self.memory
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a record for memory that is registered from now on.
    pub(crate) fn enter(
        &self,
        peer: &str,
        address: u64,
        len_bytes: u64,
        writable: bool,
    ) -> Result<(u64, RemoteRegion)> {
        let (slot, generation) = {
            let mut state = self.lock();
            let slot = match state.free.pop() {
                Some(slot) => slot,
                None if state.used < RECORDS => {
                    state.used += 1;
                    state.used - 1
                }
                None => {
                    let what = format!("{RECORDS} regions are registered already; register larger arenas");
                    return Err(Error::new(ErrorKind::ResourceExhausted, "register memory", what));
                }
            };
            state.generation += 1;
            (slot, state.generation)
        };
        self.word(slot, 0).store(self.engine, Ordering::Relaxed);
        self.word(slot, 2).store(address, Ordering::Relaxed);
        self.word(slot, 3).store(len_bytes, Ordering::Relaxed);
        self.word(slot, 1).store(generation, Ordering::Release);
        let mut descriptor = vec![if writable { WRITABLE } else { READABLE }];
        descriptor.extend((self.memory.address() + slot * RECORD_BYTES).to_le_bytes());
        descriptor.extend(self.engine.to_le_bytes());
        let region = RemoteRegion {
            peer: peer.to_owned(),
            address,
            len_bytes,
            generation,
            descriptor: descriptor.into(),
        };
        Ok((slot, region))
    }

    /// Readers of the slot's region fail from now on.
    pub(crate) fn clear(&self, slot: u64) {
        self.word(slot, 1).store(0, Ordering::SeqCst);
        self.lock().free.push(slot);
    }

    fn word(&self, slot: u64, word: u64) -> &AtomicU64 {
        debug_assert!(slot < RECORDS && word < 4);
        let address = self.memory.address() + slot * RECORD_BYTES + word * 8;
        // SAFETY: the word lies in `memory`, which is page aligned, zeroed, and lives as long as `self`; this process
        // touches it only through atomics (Mooncake sends it to peers, who check what they get).
        unsafe { AtomicU64::from_ptr(address as *mut u64) }
    }
}

/// Where a region's record is and what it must say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Check {
    pub(crate) record: u64,
    engine: u64,
    generation: u64,
    address: u64,
    len_bytes: u64,
    way: Way,
}

impl Check {
    /// `None` for a region of checkpoint-engine's own instances: an address is all there is.
    pub(crate) fn of(way: Way, region: &RemoteRegion) -> Result<Option<Self>> {
        if region.descriptor.is_empty() {
            return Ok(None);
        }
        let words: Option<[u64; 2]> = (|descriptor: &Bytes| {
            let [READABLE | WRITABLE, rest @ ..] = &descriptor[..] else { return None };
            if descriptor.len() != DESCRIPTOR_BYTES {
                return None;
            }
            let word = |at: usize| rest[at..at + 8].try_into().ok().map(u64::from_le_bytes);
            Some([word(0)?, word(8)?])
        })(&region.descriptor);
        let [record, engine] = words.ok_or_else(|| {
            let what =
                "the region was not described by the transport `mooncake`; get the owner's metas again";
            Error::new(ErrorKind::ConfigInvalid, way.operation(), what).with(Key::Peer, &region.peer)
        })?;
        if way == Way::Write && region.descriptor.first() == Some(&READABLE) {
            // Mooncake itself would write it: whatever is registered can be written.
            let what = format!("the owner lets region {} be read, and not written", region.generation);
            let error = Error::new(ErrorKind::ConfigInvalid, way.operation(), what);
            return Err(error.with(Key::Peer, &region.peer));
        }
        let RemoteRegion { generation, address, len_bytes, .. } = *region;
        Ok(Some(Self { record, engine, generation, address, len_bytes, way }))
    }

    /// Compares with the record that was read.
    pub(crate) fn verify(&self, record: &[u8]) -> Result<()> {
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&record[index * 8..index * 8 + 8]);
            u64::from_le_bytes(word)
        };
        if (word(0), word(1)) != (self.engine, self.generation) {
            return Err(Error::new(
                ErrorKind::Aborted,
                self.way.operation(),
                format!(
                    "the owner has released region {} since it was described, or has restarted; get its metas again",
                    self.generation
                ),
            ));
        }
        if word(2) != self.address || word(3) < self.len_bytes {
            return Err(Error::new(
                ErrorKind::ConfigInvalid,
                self.way.operation(),
                format!(
                    "the owner's region {} is {} bytes of other memory; get its metas again",
                    self.generation,
                    word(3)
                ),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(check: &Check) -> Vec<u8> {
        // SAFETY: in these tests the record is in this process, and nothing writes it meanwhile.
        unsafe { std::slice::from_raw_parts(check.record as *const u8, RECORD_BYTES as usize) }.to_vec()
    }

    #[test]
    fn a_record_holds_until_it_is_cleared_and_generations_never_repeat() {
        let ledger = Ledger::new().unwrap();
        let (slot, first) = ledger.enter("me:1", 4096, 100, false).unwrap();
        let check = Check::of(Way::Read, &first).unwrap().unwrap();
        check.verify(&record(&check)).unwrap();
        let forged = RemoteRegion { len_bytes: 101, ..first.clone() };
        let forged = Check::of(Way::Read, &forged).unwrap().unwrap();
        assert_eq!(forged.verify(&record(&forged)).unwrap_err().kind(), ErrorKind::ConfigInvalid);
        ledger.clear(slot);
        assert_eq!(check.verify(&record(&check)).unwrap_err().kind(), ErrorKind::Aborted);
        // The slot is used again, for the same memory: still another region.
        let (again, second) = ledger.enter("me:1", 4096, 100, false).unwrap();
        assert!(again == slot && second.generation > first.generation);
        assert_eq!(check.verify(&record(&check)).unwrap_err().kind(), ErrorKind::Aborted);
    }

    #[test]
    fn a_foreign_descriptor_is_refused_and_an_empty_one_is_a_peers() {
        let region = |descriptor: &'static [u8]| RemoteRegion {
            peer: "a:1".into(),
            address: 0,
            len_bytes: 1,
            generation: 0,
            descriptor: Bytes::from_static(descriptor),
        };
        assert_eq!(Check::of(Way::Read, &region(b"")).unwrap(), None);
        for wrong in [&b"\x01"[..], b"\x03aaaaaaaabbbbbbbb", b"\x01aaaaaaaabbbbbbbbb"] {
            let error = Check::of(Way::Read, &region(wrong)).unwrap_err();
            assert_eq!((error.kind(), error.get(Key::Peer)), (ErrorKind::ConfigInvalid, Some("a:1")));
        }
        assert!(Check::of(Way::Read, &region(b"\x01aaaaaaaabbbbbbbb")).unwrap().is_some());
        assert!(Check::of(Way::Write, &region(b"\x02aaaaaaaabbbbbbbb")).unwrap().is_some());
        let refused = Check::of(Way::Write, &region(b"\x01aaaaaaaabbbbbbbb")).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConfigInvalid);
    }

    #[test]
    fn a_full_ledger_says_so() {
        let ledger = Ledger::new().unwrap();
        for _ in 0..RECORDS {
            ledger.enter("me", 1, 1, true).unwrap();
        }
        assert_eq!(ledger.enter("me", 1, 1, true).unwrap_err().kind(), ErrorKind::ResourceExhausted);
        ledger.clear(7);
        assert_eq!(ledger.enter("me", 1, 1, true).unwrap().0, 7);
    }
}
