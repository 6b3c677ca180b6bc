//! Devices, contexts and asynchronous events.

use std::{
    collections::VecDeque,
    ffi::{c_char, c_int},
    io::{Read as _, Write as _},
    os::fd::AsRawFd as _,
    ptr::{null, null_mut},
    sync::Arc,
};

use crate::{
    abi, completion, discard, expose, object, outcome, request,
    world::{Context, world},
};

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_device_list(count: *mut c_int) -> *mut *mut abi::Device {
    let mut world = world();
    let mut list: Vec<*mut abi::Device> =
        world.devices.iter().map(|device| device.address as *mut _).collect();
    if !count.is_null() {
        // SAFETY: the caller's pointer.
        unsafe { count.write(list.len() as c_int) };
    }
    list.push(null_mut());
    let len = list.len();
    let list = Box::into_raw(list.into_boxed_slice()).cast();
    world.lists.insert(list as usize, len);
    list
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_free_device_list(list: *mut *mut abi::Device) {
    let mut world = world();
    match world.lists.remove(&(list as usize)) {
        // SAFETY: made above with this length, and not freed yet.
        Some(len) => drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(list, len)) }),
        None => world.misuse(None, "a device list that was freed or never made"),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_device_name(device: *mut abi::Device) -> *const c_char {
    if !world().devices.iter().any(|known| known.address == device as usize) {
        return null();
    }
    // SAFETY: devices stay for ever, and their names do not change.
    unsafe { (&raw const (*device).name).cast() }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_open_device(device: *mut abi::Device) -> *mut abi::Context {
    object(|world| {
        let Some(index) = world.devices.iter().position(|known| known.address == device as usize) else {
            return world.refuse(None, libc::ENODEV, "ibv_open_device of no device");
        };
        world.permit(index, "open_device")?;
        let (reader, writer) = std::io::pipe().map_err(|_| libc::EMFILE)?;
        let raw = expose(abi::Context {
            device,
            ops: abi::ContextOps {
                _before_poll: [null(); 11],
                poll_cq: Some(completion::poll_cq),
                req_notify_cq: Some(completion::req_notify_cq),
                _before_send: [null(); 12],
                post_send: Some(request::post_send),
                _after_send: [null(); 6],
            },
            cmd_fd: -1,
            async_fd: reader.as_raw_fd(),
            num_comp_vectors: 1,
            _mutex: [0; 5],
            _abi_compat: null(),
        });
        let reader = Arc::new(reader);
        world
            .contexts
            .insert(raw as usize, Context { device: index, events: VecDeque::new(), reader, writer });
        Ok(raw)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_close_device(context: *mut abi::Context) -> c_int {
    let address = context as usize;
    outcome(|world| {
        let device = world.device_of(address)?;
        let used = world.pds.values().any(|pd| pd.context == address)
            || world.cqs.values().any(|cq| cq.context == address)
            || world.channels.values().any(|channel| channel.context == address);
        if used {
            return world.refuse(Some(device), libc::EBUSY, "ibv_close_device with objects of it");
        }
        world.contexts.remove(&address);
        // SAFETY: it was in the table until now.
        unsafe { discard::<abi::Context>(address) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_device(context: *mut abi::Context, attr: *mut abi::DeviceAttr) -> c_int {
    outcome(|world| {
        let device = world.device_of(context as usize)?;
        world.permit(device, "query_device")?;
        let settings = &world.devices[device].settings;
        // SAFETY: the caller's pointer, to the whole structure of the header.
        unsafe {
            attr.write_bytes(0, 1);
            (*attr).max_qp_wr = settings.max_send_wr as c_int;
            (*attr).max_cqe = settings.max_cqe as c_int;
            (*attr).max_qp_rd_atom = 16;
            (*attr).max_qp_init_rd_atom = 16;
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_port(context: *mut abi::Context, port: u8, attr: *mut abi::PortAttr) -> c_int {
    outcome(|world| {
        let index = world.device_of(context as usize)?;
        world.permit(index, "query_port")?;
        let device = &world.devices[index];
        if port != 1 {
            return world.refuse(Some(index), libc::EINVAL, format!("there is no port {port}"));
        }
        let attributes = abi::PortAttr {
            state: if device.up { abi::PORT_ACTIVE } else { abi::PORT_DOWN },
            max_mtu: abi::MTU_4096,
            active_mtu: abi::MTU_4096,
            gid_tbl_len: 16,
            pkey_tbl_len: 1,
            lid: device.lid,
            link_layer: if device.ethernet { 2 } else { 1 },
            ..Default::default()
        };
        // SAFETY: the caller's pointer.
        unsafe { attr.write(attributes) };
        Ok(())
    })
}

/// Blocks as long as there is none, as the real one does.
#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_async_event(context: *mut abi::Context, event: *mut abi::AsyncEvent) -> c_int {
    let address = context as usize;
    let reader = world().contexts.get(&address).map(|context| context.reader.clone());
    let Some(reader) = reader else {
        world().misuse(None, "ibv_get_async_event of a context that is not open");
        return -1;
    };
    // Without the lock: whoever sends the event needs it.
    if (&*reader).read_exact(&mut [0]).is_err() {
        return -1;
    }
    let taken = world().contexts.get_mut(&address).and_then(|context| context.events.pop_front());
    let Some(event_type) = taken else { return -1 };
    // SAFETY: the caller's pointer. All events here are the port's or the device's.
    unsafe { event.write(abi::AsyncEvent { element: 1, event_type }) };
    0
}

/// Events of ports and devices hold nothing up, so it only looks at what it is given.
#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_ack_async_event(event: *mut abi::AsyncEvent) {
    // SAFETY: the caller's pointer.
    let kind = unsafe { (*event).event_type };
    if kind > abi::LAST_EVENT {
        world().misuse(None, format!("ibv_ack_async_event of no event: {kind}"));
    }
}

/// Tells all contexts of a device.
pub(crate) fn announce(world: &mut crate::World, device: usize, event: u32) {
    match event {
        abi::EVENT_PORT_ERR | abi::EVENT_DEVICE_FATAL => world.devices[device].up = false,
        abi::EVENT_PORT_ACTIVE => world.devices[device].up = true,
        _ => {}
    }
    for context in world.contexts.values_mut().filter(|context| context.device == device) {
        context.events.push_back(event);
        // It holds thousands; a reader that leaves so many is another error.
        let _ = context.writer.write(&[1]);
    }
}
