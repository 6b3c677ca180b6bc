//! Posting requests, and what becomes of them.

use std::ffi::c_int;

use crate::{
    Answer, World, abi, outcome,
    world::{Device, Entry, Fate, Qp, Request, State},
};

pub(crate) unsafe extern "C" fn post_send(
    qp: *mut abi::Qp,
    mut request: *mut abi::SendWr,
    bad: *mut *mut abi::SendWr,
) -> c_int {
    let address = qp as usize;
    outcome(|world| {
        while !request.is_null() {
            // SAFETY: the caller's list of requests.
            let wanted = unsafe { &*request };
            // SAFETY: as above; a request with one element points at it.
            let posted = unsafe { post(world, address, wanted) };
            if let Err(errno) = posted {
                // SAFETY: the caller's pointer.
                unsafe { bad.write(request) };
                return Err(errno);
            }
            request = wanted.next;
        }
        Ok(())
    })
}

/// # Safety
/// The list of elements must be the caller's, of the length that the request says.
unsafe fn post(world: &mut World, address: usize, wanted: &abi::SendWr) -> Answer {
    let pair = world.pair(address)?;
    let (device, state, outstanding) = (pair.device, pair.state, pair.posted - pair.retired);
    let (slots, elements) = (u64::from(pair.max_send_wr), pair.max_send_sge);
    world.permit(device, "post_send")?;
    if !matches!(state, State::Rts | State::Err) {
        return world.refuse(Some(device), libc::EINVAL, format!("ibv_post_send in the state {state:?}"));
    }
    let known = matches!(wanted.opcode, abi::RDMA_READ | abi::RDMA_WRITE);
    if !known || wanted.num_sge != 1 || elements < 1 || wanted.send_flags & !abi::SIGNALED != 0 {
        return world.refuse(Some(device), libc::EINVAL, "ibv_post_send of what the emulator does not know");
    }
    if outstanding >= slots {
        return world.refuse(
            Some(device),
            libc::ENOMEM,
            format!("more than {slots} requests in one send queue"),
        );
    }
    // SAFETY: there is one element.
    let local = unsafe { *wanted.sg_list };
    let pair = world.pair(address)?;
    let request = Request {
        id: wanted.wr_id,
        place: pair.posted,
        read: wanted.opcode == abi::RDMA_READ,
        signalled: pair.signal_all || wanted.send_flags & abi::SIGNALED != 0,
        local,
        remote_address: wanted.remote_addr,
        remote_key: wanted.rkey,
        fate: Fate::Regular,
    };
    pair.posted += 1;
    let owner = &mut world.devices[device];
    let fate = owner.fates.remove(&owner.requests).unwrap_or(Fate::Regular);
    owner.requests += 1;
    owner.signalled += u64::from(request.signalled);
    owner.most = owner.most.max(outstanding + 1);
    let hold = owner.settings.hold;
    world.pair(address)?.queue.push_back(Request { fate, ..request });
    if state == State::Err {
        world.flush(address);
    } else if !hold {
        world.run(address, usize::MAX);
    }
    Ok(())
}

impl World {
    /// Runs at most `count` requests of a queue pair, in their order.
    pub(crate) fn run(&mut self, address: usize, count: usize) {
        for _ in 0..count {
            let Some(pair) = self.qps.get_mut(&address).filter(|pair| pair.state == State::Rts) else {
                return;
            };
            let Some(request) = pair.queue.front().filter(|request| request.fate != Fate::Lost).copied()
            else {
                return;
            };
            pair.queue.pop_front();
            let status = match request.fate {
                Fate::Fails(status) => status,
                Fate::Regular | Fate::Lost => self.transfer(address, &request).err().unwrap_or(0),
            };
            self.retire(address, &request, status);
            if status != 0 {
                if let Some(pair) = self.qps.get_mut(&address) {
                    pair.state = State::Err;
                }
                return self.flush(address);
            }
        }
    }

    /// Ends the requests of a queue pair in the error state.
    pub(crate) fn flush(&mut self, address: usize) {
        let Some(pair) = self.qps.get_mut(&address).filter(|pair| pair.state == State::Err) else { return };
        if self.devices[pair.device].settings.deaf {
            return;
        }
        for request in std::mem::take(&mut pair.queue) {
            self.retire(address, &request, abi::WR_FLUSH_ERR);
        }
    }

    /// A request that succeeded is told of if it was signalled, one that failed always.
    fn retire(&mut self, address: usize, request: &Request, status: u32) {
        let Some(pair) = self.qps.get(&address) else { return };
        if status == 0 && !request.signalled {
            return;
        }
        let wc = abi::Wc {
            wr_id: request.id,
            status,
            opcode: if request.read { 2 } else { 1 },
            vendor_err: if status == 0 { 0 } else { 0xE0 | status },
            byte_len: request.local.length,
            qp_num: pair.number,
            ..Default::default()
        };
        self.complete(pair.send_cq, Entry { qp: address, place: request.place, wc });
    }

    /// Moves the bytes of one request; `Err` with the status that the requester sees.
    fn transfer(&mut self, address: usize, request: &Request) -> Result<(), u32> {
        let lost = || abi::RETRY_EXC_ERR;
        let pair = self.qps.get(&address).ok_or_else(lost)?;
        let len = u64::from(request.local.length);
        let needed = if request.read { abi::LOCAL_WRITE } else { 0 };
        let here = self
            .region(pair.device, request.local.lkey)
            .and_then(|mr| mr.resolve(pair.pd, request.local.addr, len, needed))
            .ok_or(abi::LOC_PROT_ERR)?;
        let (at, peer) = self.other_end(pair).ok_or_else(lost)?;
        if let Some(what) = mismatch(pair, peer) {
            let device = pair.device;
            self.misuse(Some(device), what);
            return Err(abi::RETRY_EXC_ERR);
        }
        let needed = if request.read { abi::REMOTE_READ } else { abi::REMOTE_WRITE };
        let there = self
            .region(peer.device, request.remote_key)
            .filter(|_| peer.access & needed != 0)
            .and_then(|mr| mr.resolve(peer.pd, request.remote_address, len, needed));
        let Some(there) = there else {
            // The owner's side ends as well.
            if let Some(peer) = self.qps.get_mut(&at) {
                peer.state = State::Err;
            }
            return Err(abi::REM_ACCESS_ERR);
        };
        let (from, into) = if request.read { (there, here) } else { (here, there) };
        // SAFETY: both ranges lie in regions that are registered until the lock on the world is released, and whoever
        // registered them keeps them mapped so long.
        unsafe { std::ptr::copy(from as *const u8, into as *mut u8, len as usize) };
        Ok(())
    }

    /// The queue pair that answers `pair`, if packets get there and back.
    fn other_end(&self, pair: &Qp) -> Option<(usize, &Qp)> {
        let up = |device: usize| self.devices.get(device).is_some_and(|device: &Device| device.up);
        let there = pair.path.device.filter(|there| up(pair.device) && up(*there))?;
        let answers = |peer: &Qp| {
            peer.device == there
                && peer.number == pair.path.number
                && matches!(peer.state, State::Rtr | State::Rts)
                && peer.path.device == Some(pair.device)
                && peer.path.number == pair.number
        };
        self.qps.iter().find(|(_, peer)| answers(peer)).map(|(address, peer)| (*address, peer))
    }
}

/// What two ends were told of each other must fit.
fn mismatch(pair: &Qp, peer: &Qp) -> Option<String> {
    if pair.path.sq_psn != peer.path.rq_psn {
        return Some("a packet sequence number that the other end does not expect".to_owned());
    }
    if pair.path.mtu != peer.path.mtu {
        return Some("two MTUs on one path".to_owned());
    }
    (pair.path.reads_out > peer.path.reads_in)
        .then(|| "more reads in flight than the other end answers".to_owned())
}
