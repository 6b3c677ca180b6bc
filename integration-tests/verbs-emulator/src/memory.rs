//! Protection domains and registered memory.

use std::{
    ffi::{c_int, c_void},
    os::fd::BorrowedFd,
    ptr::null_mut,
};

use rustix::mm::{MapFlags, ProtFlags};

use crate::{
    Answer, World, abi, discard, expose, object, outcome,
    world::{Mr, Pd},
};

/// Where a region's bytes are.
pub(crate) enum Memory {
    /// At this address, which is the caller's.
    Host(usize),
    /// In a file that stands for a device's memory.
    Mapped { base: usize, len: usize, inside: usize },
}

impl Memory {
    pub(crate) fn address(&self) -> usize {
        match self {
            Memory::Host(address) => *address,
            Memory::Mapped { base, inside, .. } => base + inside,
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Memory::Mapped { base, len, .. } = *self {
            // SAFETY: mapped by `map`, and nobody has it any more.
            let _ = unsafe { rustix::mm::munmap(base as *mut _, len) };
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_alloc_pd(context: *mut abi::Context) -> *mut abi::Pd {
    object(|world| {
        let device = world.device_of(context as usize)?;
        world.permit(device, "alloc_pd")?;
        let raw = expose(abi::Pd { context, _handle: 0 });
        world.pds.insert(raw as usize, Pd { context: context as usize });
        Ok(raw)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_dealloc_pd(pd: *mut abi::Pd) -> c_int {
    let address = pd as usize;
    outcome(|world| {
        let (device, _) = world.domain(address)?;
        let used =
            world.mrs.values().any(|mr| mr.pd == address) || world.qps.values().any(|qp| qp.pd == address);
        if used {
            return world.refuse(Some(device), libc::EBUSY, "ibv_dealloc_pd with objects of it");
        }
        world.pds.remove(&address);
        // SAFETY: it was in the table until now.
        unsafe { discard::<abi::Pd>(address) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_reg_mr(
    pd: *mut abi::Pd,
    address: *mut c_void,
    len: usize,
    access: c_int,
) -> *mut abi::Mr {
    object(|world| {
        let (device, _) = world.domain(pd as usize)?;
        world.permit(device, "reg_mr")?;
        if address.is_null() {
            return world.refuse(Some(device), libc::EFAULT, "ibv_reg_mr of a null pointer");
        }
        world.add_region(pd, address as u64, len, access, Memory::Host(address as usize))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_reg_dmabuf_mr(
    pd: *mut abi::Pd,
    offset: u64,
    len: usize,
    iova: u64,
    fd: c_int,
    access: c_int,
) -> *mut abi::Mr {
    object(|world| {
        let (device, _) = world.domain(pd as usize)?;
        world.permit(device, "reg_dmabuf_mr")?;
        if !world.devices[device].settings.dma_buf {
            return Err(libc::EOPNOTSUPP);
        }
        let page = rustix::param::page_size() as u64;
        if offset % page != iova % page {
            return world.refuse(
                Some(device),
                libc::EINVAL,
                "a dma-buf whose address is at another place of a page",
            );
        }
        if fd < 0 {
            return world.refuse(Some(device), libc::EBADF, "a dma-buf that is no descriptor");
        }
        // SAFETY: the caller's descriptor, which is open for the call.
        let memory = map(unsafe { BorrowedFd::borrow_raw(fd) }, offset, len)?;
        world.add_region(pd, iova, len, access, memory)
    })
}

/// Maps bytes of a file that stands for a dma-buf.
fn map(file: BorrowedFd<'_>, offset: u64, len: usize) -> Answer<Memory> {
    let size = rustix::fs::fstat(file).map_err(rustix::io::Errno::raw_os_error)?.st_size;
    // `/dev/zero` and other files without bytes are no memory of a device.
    if offset.checked_add(len as u64).is_none_or(|end| end > size as u64) {
        return Err(libc::EINVAL);
    }
    let inside = (offset % rustix::param::page_size() as u64) as usize;
    let (len, rights) = (len + inside, ProtFlags::READ | ProtFlags::WRITE);
    // SAFETY: a new mapping at a place of the kernel's choice.
    let base =
        unsafe { rustix::mm::mmap(null_mut(), len, rights, MapFlags::SHARED, file, offset - inside as u64) };
    let base = base.map_err(rustix::io::Errno::raw_os_error)? as usize;
    Ok(Memory::Mapped { base, len, inside })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_dereg_mr(mr: *mut abi::Mr) -> c_int {
    let address = mr as usize;
    outcome(|world| {
        let Some(region) = world.mrs.get(&address) else {
            return world.refuse(None, libc::EINVAL, "ibv_dereg_mr of what is not registered");
        };
        let (device, key) = (region.device, region.key);
        world.permit(device, "dereg_mr")?;
        let flying = |qp: &crate::world::Qp| qp.queue.iter().any(|request| request.local.lkey == key);
        if world.qps.values().any(|qp| qp.device == device && flying(qp)) {
            world.misuse(Some(device), "ibv_dereg_mr of memory that own requests in flight use");
        }
        world.mrs.remove(&address);
        world.devices[device].old_keys.push(key);
        // SAFETY: it was in the table until now.
        unsafe { discard::<abi::Mr>(address) };
        Ok(())
    })
}

impl World {
    /// Device and context of a domain.
    pub(crate) fn domain(&mut self, pd: usize) -> Answer<(usize, usize)> {
        match self.pds.get(&pd).map(|pd| pd.context) {
            Some(context) => Ok((self.device_of(context)?, context)),
            None => self.refuse(None, libc::EINVAL, "a protection domain that is not there"),
        }
    }

    fn add_region(
        &mut self,
        pd: *mut abi::Pd,
        start: u64,
        len: usize,
        access: c_int,
        memory: Memory,
    ) -> Answer<*mut abi::Mr> {
        let (device, context) = self.domain(pd as usize)?;
        let access = access as u32;
        if len == 0 || start.checked_add(len as u64).is_none() {
            return self.refuse(
                Some(device),
                libc::EINVAL,
                "registering a range of no bytes, or one that wraps",
            );
        }
        if access & abi::REMOTE_WRITE != 0 && access & abi::LOCAL_WRITE == 0 {
            return self.refuse(Some(device), libc::EINVAL, "remote writing without local writing");
        }
        let owner = &mut self.devices[device];
        let old = if owner.settings.reuse_keys { owner.old_keys.pop() } else { None };
        let key = old.unwrap_or_else(|| {
            owner.next_key += 1;
            owner.next_key
        });
        let raw = expose(abi::Mr {
            context: context as *mut _,
            pd,
            addr: start as *mut c_void,
            length: len,
            _handle: 0,
            lkey: key,
            rkey: key,
        });
        let region = Mr { device, pd: pd as usize, key, start, len: len as u64, access, memory };
        self.mrs.insert(raw as usize, region);
        Ok(raw)
    }

    /// The live region of `key` on `device`.
    pub(crate) fn region(&self, device: usize, key: u32) -> Option<&Mr> {
        self.mrs.values().find(|mr| mr.device == device && mr.key == key)
    }
}

impl Mr {
    /// Where a range is in this process, if it lies inside and all of `access` is allowed from `pd`.
    pub(crate) fn resolve(&self, pd: usize, address: u64, len: u64, access: u32) -> Option<usize> {
        let inside = address.checked_sub(self.start)?;
        let fits = inside.checked_add(len)? <= self.len;
        (self.pd == pd && fits && self.access & access == access)
            .then(|| self.memory.address() + inside as usize)
    }
}
