//! Completion channels and queues.

use std::{
    collections::VecDeque,
    ffi::{c_int, c_uint, c_void},
    io::{Read as _, Write as _},
    os::fd::AsRawFd as _,
    sync::Arc,
};

use crate::{
    World, abi, discard, expose, object, outcome,
    world::{Channel, Cq, Entry, world},
};

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_comp_channel(context: *mut abi::Context) -> *mut abi::CompChannel {
    object(|world| {
        let device = world.device_of(context as usize)?;
        world.permit(device, "create_comp_channel")?;
        let (reader, writer) = std::io::pipe().map_err(|_| libc::EMFILE)?;
        let raw = expose(abi::CompChannel { context, fd: reader.as_raw_fd(), _refcnt: 0 });
        let channel =
            Channel { context: context as usize, events: VecDeque::new(), reader: Arc::new(reader), writer };
        world.channels.insert(raw as usize, channel);
        Ok(raw)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_comp_channel(channel: *mut abi::CompChannel) -> c_int {
    let address = channel as usize;
    outcome(|world| {
        let Some(context) = world.channels.get(&address).map(|channel| channel.context) else {
            return world.refuse(None, libc::EINVAL, "a completion channel that is not there");
        };
        if world.cqs.values().any(|cq| cq.channel == address) {
            let device = world.device_of(context)?;
            return world.refuse(Some(device), libc::EBUSY, "ibv_destroy_comp_channel with queues of it");
        }
        world.channels.remove(&address);
        // SAFETY: it was in the table until now.
        unsafe { discard::<abi::CompChannel>(address) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_cq(
    context: *mut abi::Context,
    entries: c_int,
    user: *mut c_void,
    channel: *mut abi::CompChannel,
    vector: c_int,
) -> *mut abi::Cq {
    object(|world| {
        let device = world.device_of(context as usize)?;
        world.permit(device, "create_cq")?;
        let most = world.devices[device].settings.max_cqe;
        let fits = u32::try_from(entries).is_ok_and(|entries| (1..=most).contains(&entries));
        let known = channel.is_null()
            || world.channels.get(&(channel as usize)).is_some_and(|known| known.context == context as usize);
        if !fits || vector != 0 || !known {
            return world.refuse(Some(device), libc::EINVAL, "ibv_create_cq: size, vector or channel");
        }
        let raw =
            expose(abi::Cq { context, channel, cq_context: user, _handle: 0, cqe: entries, _locks: [0; 12] });
        let queue = Cq {
            device,
            context: context as usize,
            channel: channel as usize,
            user: user as usize,
            capacity: entries as usize,
            entries: VecDeque::new(),
            armed: false,
            taken: 0,
        };
        world.cqs.insert(raw as usize, queue);
        Ok(raw)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_cq(cq: *mut abi::Cq) -> c_int {
    let address = cq as usize;
    outcome(|world| {
        let Some(queue) = world.cqs.get(&address) else {
            return world.refuse(None, libc::EINVAL, "a completion queue that is not there");
        };
        let (device, channel, taken) = (queue.device, queue.channel, queue.taken);
        if world.qps.values().any(|qp| qp.send_cq == address || qp.recv_cq == address) {
            return world.refuse(Some(device), libc::EBUSY, "ibv_destroy_cq with queue pairs of it");
        }
        if taken > 0 {
            // The real one waits for them.
            return world.refuse(
                Some(device),
                libc::EBUSY,
                "ibv_destroy_cq before all events were acknowledged",
            );
        }
        if let Some(channel) = world.channels.get_mut(&channel) {
            let before = channel.events.len();
            channel.events.retain(|queue| *queue != address);
            for _ in channel.events.len()..before {
                // Each event has one byte.
                let _ = (&*channel.reader).read(&mut [0]);
            }
        }
        world.cqs.remove(&address);
        // SAFETY: it was in the table until now.
        unsafe { discard::<abi::Cq>(address) };
        Ok(())
    })
}

/// Blocks as long as there is none, as the real one does.
#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_cq_event(
    channel: *mut abi::CompChannel,
    cq: *mut *mut abi::Cq,
    user: *mut *mut c_void,
) -> c_int {
    let address = channel as usize;
    let reader = world().channels.get(&address).map(|channel| channel.reader.clone());
    let Some(reader) = reader else {
        world().misuse(None, "ibv_get_cq_event of a channel that is not there");
        return -1;
    };
    // Without the lock: whoever completes something needs it.
    if (&*reader).read_exact(&mut [0]).is_err() {
        return -1;
    }
    let mut world = world();
    let event = world.channels.get_mut(&address).and_then(|channel| channel.events.pop_front());
    let Some((address, queue)) = event.and_then(|event| Some((event, world.cqs.get_mut(&event)?))) else {
        return -1;
    };
    queue.taken += 1;
    // SAFETY: the caller's pointers.
    unsafe {
        cq.write(address as *mut _);
        user.write(queue.user as *mut _);
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_ack_cq_events(cq: *mut abi::Cq, count: c_uint) {
    let mut world = world();
    match world.cqs.get_mut(&(cq as usize)) {
        Some(queue) if queue.taken >= count => queue.taken -= count,
        Some(queue) => {
            let device = queue.device;
            world.misuse(Some(device), "more events acknowledged than taken");
        }
        None => world.misuse(None, "events acknowledged of a queue that is not there"),
    }
}

pub(crate) unsafe extern "C" fn req_notify_cq(cq: *mut abi::Cq, _solicited_only: c_int) -> c_int {
    outcome(|world| match world.cqs.get_mut(&(cq as usize)) {
        Some(queue) => {
            queue.armed = true;
            Ok(())
        }
        None => world.refuse(None, libc::EINVAL, "a notification of a queue that is not there"),
    })
}

pub(crate) unsafe extern "C" fn poll_cq(cq: *mut abi::Cq, count: c_int, into: *mut abi::Wc) -> c_int {
    let world = &mut *world();
    let Some(queue) = world.cqs.get_mut(&(cq as usize)) else {
        world.misuse(None, "polling a queue that is not there");
        return -1;
    };
    if world.devices[queue.device].settings.mute {
        return 0;
    }
    let count = usize::try_from(count).unwrap_or(0).min(queue.entries.len());
    for (at, entry) in queue.entries.drain(..count).enumerate() {
        // SAFETY: the caller's array has at least so many places.
        unsafe { into.add(at).write(entry.wc) };
        if let Some(qp) = world.qps.get_mut(&entry.qp) {
            qp.retired = qp.retired.max(entry.place + 1);
        }
    }
    count as c_int
}

impl World {
    /// Puts a completion on a queue, and tells who has asked for that.
    pub(crate) fn complete(&mut self, cq: usize, entry: Entry) {
        let Some(queue) = self.cqs.get_mut(&cq) else { return };
        if queue.entries.len() >= queue.capacity {
            let (device, what) =
                (queue.device, format!("a completion queue of {} entries overflows", queue.capacity));
            return self.misuse(Some(device), what);
        }
        queue.entries.push_back(entry);
        self.tell(cq);
    }

    /// Makes an event if there are completions and somebody has asked for one.
    pub(crate) fn tell(&mut self, cq: usize) {
        let Some(queue) = self.cqs.get_mut(&cq) else { return };
        let silent = queue.entries.is_empty() || self.devices[queue.device].settings.mute;
        if !silent
            && std::mem::take(&mut queue.armed)
            && let Some(channel) = self.channels.get_mut(&queue.channel)
        {
            channel.events.push_back(cq);
            // One byte for each event; a pipe holds thousands.
            let _ = channel.writer.write(&[1]);
        }
    }
}
