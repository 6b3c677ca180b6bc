//! Device memory in memory files, host memory, and keys.

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::Arc,
};

use rustix::{
    fs::{MemfdFlags, Mode, OFlags},
    mm::{MapFlags, ProtFlags},
};

use crate::{
    Answer, INVALID_DEVICE, IPC_ERROR, OUT_OF_MEMORY, PARAM_INVALID, call, current, give, must_be_current,
    refuse, state::hbm_bytes, state::state,
};

pub(crate) type Key = [u8; 65];

/// A mapping of a memory file; undone when the last user lets go.
pub(crate) struct Mapping {
    pub(crate) base: usize,
    len: usize,
}

impl Mapping {
    fn of(file: impl AsFd, len: usize) -> Option<Arc<Self>> {
        // SAFETY: a new mapping at a place of the kernel's choice.
        let base = unsafe {
            let rights = ProtFlags::READ | ProtFlags::WRITE;
            rustix::mm::mmap(std::ptr::null_mut(), len, rights, MapFlags::SHARED, file, 0)
        };
        base.ok().map(|base| Arc::new(Self { base: base as usize, len }))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped once, and nobody has it any more.
        let _ = unsafe { rustix::mm::munmap(self.base as *mut _, self.len) };
    }
}

pub(crate) struct Block {
    pub(crate) device: i32,
    pub(crate) len: usize,
    pub(crate) imported: bool,
    pub(crate) mapping: Arc<Mapping>,
    file: Arc<OwnedFd>,
}

pub(crate) struct HostBlock {
    pub(crate) len: usize,
    device: i32,
    #[expect(dead_code, reason = "the memory")]
    bytes: Vec<u64>,
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtGetMemInfo(attribute: i32, free: *mut usize, total: *mut usize) -> i32 {
    call("aclrtGetMemInfo", || {
        let device = current()?;
        if attribute != 1 {
            return refuse(PARAM_INVALID, format!("the emulator has HBM (1) only, not {attribute}"));
        }
        let left = hbm_bytes().saturating_sub(state().used(device));
        // SAFETY: the caller's pointers.
        unsafe { give(free, left as usize).and(give(total, hbm_bytes() as usize)) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtMalloc(address: *mut u64, len: usize, policy: i32) -> i32 {
    call("aclrtMalloc", || {
        let device = current()?;
        if len == 0 || !(0..=7).contains(&policy) {
            return refuse(PARAM_INVALID, format!("{len} bytes with policy {policy}"));
        }
        let mut state = state();
        if state.used(device) + len as u64 > hbm_bytes() {
            return refuse(OUT_OF_MEMORY, format!("device {device} has no {len} bytes"));
        }
        let made = rustix::fs::memfd_create("ascend-emulator", MemfdFlags::CLOEXEC)
            .and_then(|file| rustix::fs::ftruncate(&file, len as u64).map(|()| file));
        let block = made.ok().and_then(|file| {
            let mapping = Mapping::of(&file, len)?;
            Some(Block { device, len, imported: false, mapping, file: Arc::new(file) })
        });
        let Some(block) = block else { return refuse(OUT_OF_MEMORY, "the host has no memory") };
        let place = state.new_address(len);
        // SAFETY: the caller's pointer.
        unsafe { give(address, place) }?;
        state.blocks.insert(place, block);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn aclrtFree(address: u64) -> i32 {
    call("aclrtFree", || {
        let mut state = state();
        let Some(block) = state.blocks.get(&address).filter(|block| !block.imported) else {
            return refuse(PARAM_INVALID, format!("{address:#x} is no block of aclrtMalloc"));
        };
        must_be_current(block.device, "memory")?;
        if state.exports.values().any(|exported| *exported == address) {
            return refuse(PARAM_INVALID, "the block's IPC key is open; close it first");
        }
        state.blocks.remove(&address);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtMallocHost(address: *mut u64, len: usize) -> i32 {
    call("aclrtMallocHost", || {
        let device = current()?;
        if len == 0 {
            return refuse(PARAM_INVALID, "no bytes");
        }
        let mut bytes: Vec<u64> = Vec::new();
        if bytes.try_reserve_exact(len.div_ceil(8)).is_err() {
            return refuse(OUT_OF_MEMORY, format!("the host has no {len} bytes"));
        }
        // Not zero: who relies on that is found out.
        bytes.resize(len.div_ceil(8), 0xA5A5_A5A5_A5A5_A5A5);
        let place = bytes.as_ptr() as u64;
        // SAFETY: the caller's pointer.
        unsafe { give(address, place) }?;
        state().host.insert(place, HostBlock { len, device, bytes });
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn aclrtFreeHost(address: u64) -> i32 {
    call("aclrtFreeHost", || {
        let mut state = state();
        let Some(block) = state.host.get(&address) else {
            return refuse(PARAM_INVALID, format!("{address:#x} is no block of aclrtMallocHost"));
        };
        must_be_current(block.device, "host memory")?;
        state.host.remove(&address);
        Ok(())
    })
}

/// `pid:file:bytes` in 65 bytes. The file is opened through /proc, so nothing is left behind by a crash.
fn encode(file: &OwnedFd, len: usize, salt: u64) -> Key {
    let text = format!("ascend-emulator:{}:{}:{len}:{salt:x}", std::process::id(), file.as_raw_fd());
    let mut key = [0; 65];
    key[..text.len()].copy_from_slice(text.as_bytes());
    key
}

fn decode(key: &Key) -> Option<(u32, u32, usize)> {
    let text = std::str::from_utf8(key).ok()?.trim_end_matches('\0');
    let mut parts = text.strip_prefix("ascend-emulator:")?.split(':');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtIpcMemGetExportKey(
    address: u64,
    len: usize,
    key: *mut Key,
    key_len: usize,
    flags: u64,
) -> i32 {
    call("aclrtIpcMemGetExportKey", || {
        let mut state = state();
        let Some(block) = state.blocks.get(&address).filter(|block| !block.imported) else {
            return refuse(PARAM_INVALID, "not the base of a block of aclrtMalloc");
        };
        must_be_current(block.device, "memory")?;
        if key_len != size_of::<Key>() || len == 0 || len > block.len {
            return refuse(PARAM_INVALID, format!("{len} bytes of {}, a key of {key_len}", block.len));
        }
        if flags != 1 {
            return refuse(PARAM_INVALID, "the emulator knows keys without lists of processes only (flag 1)");
        }
        let made = encode(&block.file, block.len, address);
        // SAFETY: the caller's pointer, to `key_len` bytes.
        unsafe { give(key, made) }?;
        state.exports.insert(made, address);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtIpcMemImportByKey(address: *mut u64, key: *const Key, flags: u64) -> i32 {
    call("aclrtIpcMemImportByKey", || {
        let device = current()?;
        if key.is_null() || flags > 1 {
            return refuse(PARAM_INVALID, format!("no key, or flags {flags}"));
        }
        // SAFETY: the caller's pointer, to 65 bytes.
        let key = unsafe { key.read() };
        let Some((pid, file, len)) = decode(&key) else { return refuse(PARAM_INVALID, "no key of ours") };
        if pid == std::process::id() {
            return refuse(PARAM_INVALID, "a process cannot import its own memory");
        }
        let mut state = state();
        if state.imports.contains_key(&key) {
            return refuse(PARAM_INVALID, "the key is open here already");
        }
        let opened =
            rustix::fs::open(format!("/proc/{pid}/fd/{file}"), OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let block = opened.ok().and_then(|file| {
            let mapping = Mapping::of(&file, len)?;
            Some(Block { device, len, imported: true, mapping, file: Arc::new(file) })
        });
        let Some(block) = block else { return refuse(IPC_ERROR, "the exporter or its memory is gone") };
        let place = state.new_address(len);
        // SAFETY: the caller's pointer.
        unsafe { give(address, place) }?;
        state.blocks.insert(place, block);
        state.imports.insert(key, place);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtIpcMemClose(key: *const Key) -> i32 {
    call("aclrtIpcMemClose", || {
        if key.is_null() {
            return refuse(PARAM_INVALID, "no key");
        }
        // SAFETY: the caller's pointer, to 65 bytes.
        let key = unsafe { key.read() };
        let mut state = state();
        if state.exports.remove(&key).is_some() {
            return Ok(());
        }
        let Some(place) = state.imports.remove(&key) else {
            return refuse(PARAM_INVALID, "the key is not open");
        };
        state.blocks.remove(&place);
        Ok(())
    })
}

/// The host's address of a device range, which stays mapped while the second value lives.
pub(crate) fn device_range(device: i32, address: u64, len: u64) -> Answer<(usize, Arc<Mapping>)> {
    let state = state();
    match state.block(address, len) {
        None => {
            refuse(PARAM_INVALID, format!("{len} bytes at {address:#x} are not in allocated device memory"))
        }
        Some((block, _)) if block.device != device => {
            refuse(INVALID_DEVICE, format!("{address:#x} is on device {}, not {device}", block.device))
        }
        Some((block, offset)) => Ok((block.mapping.base + offset as usize, block.mapping.clone())),
    }
}

/// Checks a range of host memory.
pub(crate) fn host_range(address: u64, len: u64) -> Answer<usize> {
    let state = state();
    let inside = state.host.range(..=address).next_back().is_some_and(|(base, block)| {
        (address - base).checked_add(len).is_some_and(|end| end <= block.len as u64)
    });
    if inside {
        return Ok(address as usize);
    }
    refuse(PARAM_INVALID, format!("{len} bytes at {address:#x} are not in memory of aclrtMallocHost"))
}
