//! Queue pairs and their states.

use std::{collections::VecDeque, ffi::c_int, sync::PoisonError};

use crate::{
    Answer, Errno, World, abi,
    abi::mask,
    discard, expose, object, outcome,
    world::{GOES_ON, Path, Qp, State, world},
};

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_qp(pd: *mut abi::Pd, attr: *mut abi::QpInitAttr) -> *mut abi::Qp {
    stall(pd as usize);
    object(|world| {
        let (device, context) = world.domain(pd as usize)?;
        world.permit(device, "create_qp")?;
        // SAFETY: the caller's structure.
        let wanted = unsafe { &mut *attr };
        let cap = wanted.cap;
        let most = world.devices[device].settings.max_send_wr;
        let of_context =
            |cq: *mut abi::Cq| world.cqs.get(&(cq as usize)).is_some_and(|cq| cq.context == context);
        let fits = wanted.qp_type == abi::QPT_RC
            && wanted.srq.is_null()
            && of_context(wanted.send_cq)
            && of_context(wanted.recv_cq)
            && (1..=most).contains(&cap.max_send_wr)
            && (1..=16).contains(&cap.max_send_sge)
            && cap.max_inline_data == 0;
        if !fits {
            return world.refuse(Some(device), libc::EINVAL, "ibv_create_qp: type, queues or capabilities");
        }
        let owner = &mut world.devices[device];
        owner.next_number += 1;
        let number = owner.next_number;
        let raw = expose(abi::Qp {
            context: context as *mut _,
            qp_context: wanted.qp_context,
            pd,
            send_cq: wanted.send_cq,
            recv_cq: wanted.recv_cq,
            _srq: wanted.srq,
            _handle: 0,
            qp_num: number,
            _state: 0,
            _qp_type: wanted.qp_type,
            _locks: [0; 12],
        });
        let pair = Qp {
            device,
            pd: pd as usize,
            send_cq: wanted.send_cq as usize,
            recv_cq: wanted.recv_cq as usize,
            number,
            state: State::Reset,
            max_send_wr: cap.max_send_wr,
            max_send_sge: cap.max_send_sge,
            signal_all: wanted.sq_sig_all != 0,
            access: 0,
            path: Path::default(),
            queue: VecDeque::new(),
            posted: 0,
            retired: 0,
        };
        world.qps.insert(raw as usize, pair);
        Ok(raw)
    })
}

/// Waits as long as a test wants the device to.
fn stall(pd: usize) {
    let mut world = world();
    let Ok((device, _)) = world.domain(pd) else { return };
    world.devices[device].stalled += 1;
    while world.devices[device].settings.stall {
        world = GOES_ON.wait(world).unwrap_or_else(PoisonError::into_inner);
    }
    world.devices[device].stalled -= 1;
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_qp(qp: *mut abi::Qp) -> c_int {
    let address = qp as usize;
    outcome(|world| {
        let pair = world.pair(address)?;
        let (device, queues) = (pair.device, [pair.send_cq, pair.recv_cq]);
        world.permit(device, "destroy_qp")?;
        world.qps.remove(&address);
        // Its completions go with it.
        for queue in queues {
            if let Some(queue) = world.cqs.get_mut(&queue) {
                queue.entries.retain(|entry| entry.qp != address);
            }
        }
        // SAFETY: it was in the table until now.
        unsafe { discard::<abi::Qp>(address) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_modify_qp(qp: *mut abi::Qp, attr: *mut abi::QpAttr, given: c_int) -> c_int {
    let address = qp as usize;
    outcome(|world| {
        let pair = world.pair(address)?;
        let (device, state) = (pair.device, pair.state);
        // SAFETY: the caller's structure.
        let attr = unsafe { &*attr };
        let step = match attr.qp_state {
            _ if given & mask::STATE == 0 => "modify_qp",
            0 => "modify_qp to RESET",
            1 => "modify_qp to INIT",
            2 => "modify_qp to RTR",
            3 => "modify_qp to RTS",
            6 => "modify_qp to ERR",
            _ => "modify_qp",
        };
        world.permit(device, step)?;
        if let Err((errno, what)) =
            check_mask(state, step, given).and_then(|()| check_values(world, device, attr, given))
        {
            return world.refuse(Some(device), errno, format!("{step} in the state {state:?}: {what}"));
        }
        world.walk(address, attr, given)
    })
}

/// What a step needs, and what it may have besides.
fn check_mask(state: State, step: &str, given: c_int) -> Result<(), (Errno, String)> {
    let (needs, may) = match (state, step) {
        (_, "modify_qp to ERR" | "modify_qp to RESET") => (mask::STATE, mask::CUR_STATE),
        (State::Reset, "modify_qp to INIT") => {
            (mask::STATE | mask::PKEY_INDEX | mask::PORT | mask::ACCESS_FLAGS, 0)
        }
        (State::Init, "modify_qp to RTR") => {
            let path = mask::AV | mask::PATH_MTU | mask::DEST_QPN | mask::RQ_PSN;
            let needs = mask::STATE | path | mask::MAX_DEST_RD_ATOMIC | mask::MIN_RNR_TIMER;
            (needs, mask::PKEY_INDEX | mask::ACCESS_FLAGS)
        }
        (State::Rtr, "modify_qp to RTS") => {
            let retries = mask::TIMEOUT | mask::RETRY_CNT | mask::RNR_RETRY;
            let needs = mask::STATE | mask::SQ_PSN | mask::MAX_RD_ATOMIC | retries;
            (needs, mask::CUR_STATE | mask::ACCESS_FLAGS | mask::MIN_RNR_TIMER)
        }
        _ => return Err((libc::EINVAL, "no such step".to_owned())),
    };
    match (needs & !given, given & !(needs | may)) {
        (0, 0) => Ok(()),
        (lacks, extra) => Err((libc::EINVAL, format!("attributes {lacks:#x} lack, {extra:#x} are too many"))),
    }
}

fn check_values(
    world: &World,
    device: usize,
    attr: &abi::QpAttr,
    given: c_int,
) -> Result<(), (Errno, String)> {
    let own = &world.devices[device];
    let has = |attribute| given & attribute != 0;
    let wrong = |what: &str| Err((libc::EINVAL, what.to_owned()));
    if has(mask::PORT) && attr.port_num != 1 || has(mask::PKEY_INDEX) && attr.pkey_index != 0 {
        return wrong("port or P_Key");
    }
    if has(mask::AV) {
        let path = &attr.ah_attr;
        if path.port_num != 1 {
            return wrong("the path's port");
        }
        if own.ethernet && path.is_global == 0 {
            return wrong("RoCE needs a global route");
        }
        if path.is_global != 0 && path.sgid_index != own.gid_index {
            return wrong("an entry of the GID table that is empty");
        }
        if !(1..=abi::MTU_4096).contains(&attr.path_mtu) {
            return wrong("the path's MTU");
        }
    }
    if has(mask::MAX_RD_ATOMIC) && attr.max_rd_atomic > 16
        || has(mask::MAX_DEST_RD_ATOMIC) && attr.max_dest_rd_atomic > 16
    {
        return wrong("more reads than the device can have in flight");
    }
    let bits = [attr.rq_psn, attr.sq_psn, attr.dest_qp_num];
    let fits = bits.iter().all(|number| *number < 1 << 24) && attr.timeout < 32;
    if !fits || attr.retry_cnt > 7 || attr.rnr_retry > 7 || attr.min_rnr_timer > 31 {
        return wrong("a number that is too large");
    }
    Ok(())
}

impl World {
    pub(crate) fn pair(&mut self, address: usize) -> Answer<&mut Qp> {
        if !self.qps.contains_key(&address) {
            self.misuse(None, "a queue pair that is not there");
        }
        self.qps.get_mut(&address).ok_or(libc::EINVAL)
    }

    /// Takes a step that was checked.
    fn walk(&mut self, address: usize, attr: &abi::QpAttr, given: c_int) -> Answer {
        let there = if given & mask::AV != 0 { self.destination(&attr.ah_attr) } else { None };
        let pair = self.pair(address)?;
        if given & mask::ACCESS_FLAGS != 0 {
            pair.access = attr.qp_access_flags;
        }
        match attr.qp_state {
            1 => pair.state = State::Init,
            2 => {
                pair.path = Path {
                    device: there,
                    number: attr.dest_qp_num,
                    mtu: attr.path_mtu,
                    rq_psn: attr.rq_psn,
                    reads_in: attr.max_dest_rd_atomic,
                    ..Path::default()
                };
                pair.state = State::Rtr;
            }
            3 => {
                (pair.path.sq_psn, pair.path.reads_out) = (attr.sq_psn, attr.max_rd_atomic);
                pair.state = State::Rts;
            }
            6 => {
                pair.state = State::Err;
                self.flush(address);
            }
            _ => {
                pair.queue.clear();
                (pair.state, pair.retired) = (State::Reset, pair.posted);
            }
        }
        Ok(())
    }

    /// The device at the end of a path.
    fn destination(&self, path: &abi::AhAttr) -> Option<usize> {
        let is_there = |device: &crate::world::Device| match path.is_global {
            0 => !device.ethernet && device.lid == path.dlid,
            _ => device.gid == path.dgid,
        };
        self.devices.iter().position(is_there)
    }
}
