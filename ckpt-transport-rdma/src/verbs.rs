//! Verbs objects that own what they stand for and keep their parents alive.

use std::{
    ffi::{CStr, c_int, c_void},
    io,
    os::fd::{AsRawFd, OwnedFd},
    ptr::{NonNull, null_mut},
    sync::Arc,
};

use ckpt_core::{Error, Key, Result, device::Buffer};

use crate::{error::VerbsError, library::Api, sys};

fn errno(function: &'static str) -> VerbsError {
    VerbsError::Call { function, errno: io::Error::last_os_error().raw_os_error().unwrap_or(0) }
}

/// Some functions answer the error number, some -1 with `errno` set.
fn check(function: &'static str, answer: c_int) -> Result<(), VerbsError> {
    match answer {
        0 => Ok(()),
        errno if errno > 0 => Err(VerbsError::Call { function, errno }),
        _ => Err(errno(function)),
    }
}

/// An opened device.
#[derive(Debug)]
pub(crate) struct Context {
    api: Arc<Api>,
    raw: NonNull<sys::Context>,
    pub(crate) name: String,
}

// SAFETY: libibverbs is thread safe (its manual page says so for every call used here), and the pointers of all
// objects in this file are only passed to it.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Opens the device called `name`.
    pub(crate) fn open(api: &Arc<Api>, name: &str) -> Result<Arc<Self>> {
        let symbols = &api.symbols;
        let mut count = 0;
        // SAFETY: the list and its length belong together; it is freed below, after the device was opened, which keeps
        // a reference of its own.
        let list = unsafe { (symbols.get_device_list)(&mut count) };
        if list.is_null() {
            return Err(Error::from(errno("ibv_get_device_list")).with(Key::Hca, name));
        }
        let mut opened = Err(VerbsError::Call { function: "ibv_open_device", errno: libc::ENODEV });
        for index in 0..usize::try_from(count).unwrap_or(0) {
            // SAFETY: `index` is inside the list.
            let device = unsafe { *list.add(index) };
            // SAFETY: the name is a C string inside the device, which the list keeps.
            let found = unsafe { CStr::from_ptr((symbols.get_device_name)(device)) };
            if found.to_str() == Ok(name) {
                // SAFETY: the device is from the list.
                let raw = unsafe { (symbols.open_device)(device) };
                opened = NonNull::new(raw).ok_or_else(|| errno("ibv_open_device"));
            }
        }
        // SAFETY: the list is not used afterwards.
        unsafe { (symbols.free_device_list)(list) };
        let raw = opened.map_err(|e| Error::from(e).with(Key::Hca, name))?;
        Ok(Arc::new(Self { api: api.clone(), raw, name: name.to_owned() }))
    }

    pub(crate) fn query_port(&self, port: u8) -> Result<sys::PortAttr> {
        let mut attr = sys::PortAttr::default();
        // SAFETY: the context is open; the function fills at most the structure of the header, which `attr` is.
        let answer = unsafe { (self.api.symbols.query_port)(self.raw.as_ptr(), port, &mut attr) };
        check("ibv_query_port", answer).map_err(|e| Error::from(e).with(Key::Hca, &self.name))?;
        Ok(attr)
    }

    pub(crate) fn query_device(&self) -> Result<sys::DeviceAttr> {
        // SAFETY: all fields are integers, for which zero is a value.
        let mut attr: sys::DeviceAttr = unsafe { std::mem::zeroed() };
        // SAFETY: as in `query_port`.
        let answer = unsafe { (self.api.symbols.query_device)(self.raw.as_ptr(), &mut attr) };
        check("ibv_query_device", answer).map_err(|e| Error::from(e).with(Key::Hca, &self.name))?;
        Ok(attr)
    }

    /// The descriptor on which asynchronous events come.
    pub(crate) fn async_fd(&self) -> c_int {
        // SAFETY: the context is open, and the field does not change.
        unsafe { (*self.raw.as_ptr()).async_fd }
    }

    /// Takes one asynchronous event; to be called when `async_fd` can be read.
    pub(crate) fn async_event(&self) -> Option<u32> {
        let mut event = sys::AsyncEvent { element: 0, event_type: 0 };
        // SAFETY: the context is open, `event` is the header's structure, and each event is acknowledged once.
        unsafe {
            if (self.api.symbols.get_async_event)(self.raw.as_ptr(), &mut event) != 0 {
                return None;
            }
            (self.api.symbols.ack_async_event)(&mut event);
        }
        Some(event.event_type)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: whatever was made of this context holds it, so this is the last use.
        unsafe { (self.api.symbols.close_device)(self.raw.as_ptr()) };
    }
}

/// A protection domain.
#[derive(Debug)]
pub(crate) struct Pd {
    context: Arc<Context>,
    raw: NonNull<sys::Pd>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Pd {}
// SAFETY: as for `Context`.
unsafe impl Sync for Pd {}

impl Pd {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Arc<Self>> {
        // SAFETY: the context is open.
        let raw = unsafe { (context.api.symbols.alloc_pd)(context.raw.as_ptr()) };
        let raw = NonNull::new(raw).ok_or_else(|| errno("ibv_alloc_pd"))?;
        Ok(Arc::new(Self { context: context.clone(), raw }))
    }
}

impl Drop for Pd {
    fn drop(&mut self) {
        // SAFETY: regions and queue pairs of it hold it, so this is the last use.
        unsafe { (self.context.api.symbols.dealloc_pd)(self.raw.as_ptr()) };
    }
}

/// Registered memory. It does not keep the memory itself alive: the kernel keeps its pages while it is registered, so a
/// device never writes into pages that have another owner.
#[derive(Debug)]
pub(crate) struct Mr {
    pd: Arc<Pd>,
    raw: NonNull<sys::Mr>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Mr {}
// SAFETY: as for `Context`.
unsafe impl Sync for Mr {}

impl Mr {
    /// Registers `buffer`, which is host memory or can be exported as a dma-buf. May take a second for each few GiB: pages are pinned.
    pub(crate) fn register(pd: &Arc<Pd>, buffer: &dyn Buffer, access: c_int) -> Result<Self> {
        if let Some(exported) = buffer.dma_buf() {
            return Self::register_dma_buf(pd, buffer, &exported?, access);
        }
        let (address, len) = (buffer.address() as *mut c_void, buffer.len_bytes() as usize);
        let context = &pd.context;
        // SAFETY: the range is mapped while `buffer` lives, which is for the call; what the device may do to it later
        // is bounded by `access` and by the work requests, which own their memory.
        let raw = unsafe { (context.api.symbols.reg_mr)(pd.raw.as_ptr(), address, len, access) };
        let raw = NonNull::new(raw).ok_or_else(|| {
            let error = errno("ibv_reg_mr");
            let limit = matches!(error, VerbsError::Call { errno: libc::ENOMEM, .. });
            let error = Error::from(error).with(Key::Hca, &context.name);
            if limit {
                let fix = "locked memory is limited: raise it with `ulimit -l unlimited` or docker's --ulimit memlock=-1";
                Error::new(error.kind(), "register memory", format!("{len} bytes cannot be pinned; {fix}"))
                    .with(Key::Hca, &context.name)
                    .caused_by(error)
            } else {
                error
            }
        })?;
        Ok(Self { pd: pd.clone(), raw })
    }

    fn register_dma_buf(pd: &Arc<Pd>, buffer: &dyn Buffer, fd: &OwnedFd, access: c_int) -> Result<Self> {
        let context = &pd.context;
        let refused = |cause: VerbsError| {
            let cause = Error::from(cause).with(Key::Hca, &context.name);
            let what = "this RDMA device or its driver cannot register device memory (dma-buf); read into host memory";
            Error::new(cause.kind(), "register memory", what).with(Key::Hca, &context.name).caused_by(cause)
        };
        let function = "ibv_reg_dmabuf_mr";
        let Some(register) = context.api.symbols.reg_dmabuf_mr else {
            return Err(refused(VerbsError::Call { function, errno: libc::EOPNOTSUPP }));
        };
        let (address, len) = (buffer.address(), buffer.len_bytes() as usize);
        // SAFETY: the descriptor is open for the call, and the kernel keeps what it stands for while it is registered.
        // Requests name its bytes by the device's own addresses.
        let raw = unsafe { register(pd.raw.as_ptr(), 0, len, address, fd.as_raw_fd(), access) };
        let raw = NonNull::new(raw).ok_or_else(|| refused(errno(function)))?;
        Ok(Self { pd: pd.clone(), raw })
    }

    pub(crate) fn local_key(&self) -> u32 {
        // SAFETY: the region is registered until this is dropped, and its keys do not change.
        unsafe { self.raw.as_ref() }.lkey
    }

    pub(crate) fn remote_key(&self) -> u32 {
        // SAFETY: as above.
        unsafe { self.raw.as_ref() }.rkey
    }
}

impl Drop for Mr {
    fn drop(&mut self) {
        // SAFETY: work requests that name its keys own it, so none of ours is in flight; a peer's fails.
        let answer = unsafe { (self.pd.context.api.symbols.dereg_mr)(self.raw.as_ptr()) };
        if let Err(error) = check("ibv_dereg_mr", answer) {
            tracing::warn!(%error, hca = self.pd.context.name, "memory stays registered");
        }
    }
}

/// A completion queue with its channel. One thread polls it.
#[derive(Debug)]
pub(crate) struct Cq {
    context: Arc<Context>,
    channel: NonNull<sys::CompChannel>,
    raw: NonNull<sys::Cq>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Cq {}
// SAFETY: as for `Context`.
unsafe impl Sync for Cq {}

impl Cq {
    pub(crate) fn new(context: &Arc<Context>, entries: c_int) -> Result<Arc<Self>> {
        let symbols = &context.api.symbols;
        // SAFETY: the context is open.
        let channel = unsafe { (symbols.create_comp_channel)(context.raw.as_ptr()) };
        let channel = NonNull::new(channel).ok_or_else(|| errno("ibv_create_comp_channel"))?;
        // SAFETY: context and channel live; the completion vector 0 always exists.
        let raw =
            unsafe { (symbols.create_cq)(context.raw.as_ptr(), entries, null_mut(), channel.as_ptr(), 0) };
        let Some(raw) = NonNull::new(raw) else {
            let error = errno("ibv_create_cq");
            // SAFETY: nothing uses the channel.
            unsafe { (symbols.destroy_comp_channel)(channel.as_ptr()) };
            return Err(error.into());
        };
        Ok(Arc::new(Self { context: context.clone(), channel, raw }))
    }

    /// Takes completions into `into`.
    pub(crate) fn poll(&self, into: &mut [sys::Wc]) -> Result<usize, VerbsError> {
        // SAFETY: the context is open, and its table of operations was filled when it was opened.
        let poll = unsafe { self.context.raw.as_ref() }.ops.poll_cq;
        let Some(poll) = poll else {
            return Err(VerbsError::Call { function: "ibv_poll_cq", errno: libc::ENOSYS });
        };
        // SAFETY: the queue lives, and at most `into.len()` entries are written.
        let found = unsafe { poll(self.raw.as_ptr(), into.len() as c_int, into.as_mut_ptr()) };
        usize::try_from(found).map_err(|_| errno("ibv_poll_cq"))
    }

    /// Asks for an event on the channel at the next completion.
    pub(crate) fn arm(&self) -> Result<(), VerbsError> {
        // SAFETY: as in `poll`.
        let notify = unsafe { self.context.raw.as_ref() }.ops.req_notify_cq;
        let Some(notify) = notify else {
            return Err(VerbsError::Call { function: "ibv_req_notify_cq", errno: libc::ENOSYS });
        };
        // SAFETY: the queue lives.
        check("ibv_req_notify_cq", unsafe { notify(self.raw.as_ptr(), 0) })
    }

    /// Readable when an event is there.
    pub(crate) fn channel_fd(&self) -> c_int {
        // SAFETY: the channel lives, and its descriptor does not change.
        unsafe { self.channel.as_ref() }.fd
    }

    /// Takes one event; to be called when `channel_fd` can be read.
    pub(crate) fn take_event(&self) {
        let (mut cq, mut user) = (null_mut(), null_mut());
        // SAFETY: the channel lives; each event is acknowledged once, on the queue that it names, which is this one.
        unsafe {
            if (self.context.api.symbols.get_cq_event)(self.channel.as_ptr(), &mut cq, &mut user) == 0 {
                (self.context.api.symbols.ack_cq_events)(cq, 1);
            }
        }
    }
}

impl Drop for Cq {
    fn drop(&mut self) {
        let symbols = &self.context.api.symbols;
        // SAFETY: queue pairs hold their completion queue, so none is left, and all events were acknowledged.
        unsafe {
            (symbols.destroy_cq)(self.raw.as_ptr());
            (symbols.destroy_comp_channel)(self.channel.as_ptr());
        }
    }
}

/// How a queue pair reaches its peer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Path {
    pub(crate) port: u8,
    pub(crate) gid_index: u8,
    pub(crate) remote_gid: [u8; 16],
    pub(crate) remote_lid: u16,
    pub(crate) ethernet: bool,
    pub(crate) remote_qp: u32,
    pub(crate) remote_psn: u32,
    pub(crate) mtu: u32,
    pub(crate) reads: u8,
    pub(crate) traffic_class: u8,
    pub(crate) service_level: u8,
}

/// A reliable-connected queue pair.
#[derive(Debug)]
pub(crate) struct Qp {
    pd: Arc<Pd>,
    _cq: Arc<Cq>,
    raw: NonNull<sys::Qp>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Qp {}
// SAFETY: as for `Context`.
unsafe impl Sync for Qp {}

impl Qp {
    pub(crate) fn new(pd: &Arc<Pd>, cq: &Arc<Cq>, depth: u32) -> Result<Self> {
        let cap = sys::QpCap {
            max_send_wr: depth,
            max_recv_wr: 1,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: 0,
        };
        let mut attr = sys::QpInitAttr {
            qp_context: null_mut(),
            send_cq: cq.raw.as_ptr(),
            recv_cq: cq.raw.as_ptr(),
            srq: null_mut(),
            cap,
            qp_type: sys::QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: domain and queue live and are held by the result.
        let raw = unsafe { (pd.context.api.symbols.create_qp)(pd.raw.as_ptr(), &mut attr) };
        let raw = NonNull::new(raw)
            .ok_or_else(|| Error::from(errno("ibv_create_qp")).with(Key::Hca, &pd.context.name))?;
        Ok(Self { pd: pd.clone(), _cq: cq.clone(), raw })
    }

    pub(crate) fn number(&self) -> u32 {
        // SAFETY: the queue pair lives, and its number does not change.
        unsafe { self.raw.as_ref() }.qp_num
    }

    fn modify(&self, mut attr: sys::QpAttr, mask: c_int, step: &'static str) -> Result<(), VerbsError> {
        // SAFETY: the queue pair lives; `attr` is the header's structure, and the fields that `mask` names are set.
        check(step, unsafe { (self.pd.context.api.symbols.modify_qp)(self.raw.as_ptr(), &mut attr, mask) })
    }

    /// Lets the peer read and write what is registered for that.
    pub(crate) fn to_init(&self, port: u8) -> Result<(), VerbsError> {
        let attr = sys::QpAttr {
            qp_state: sys::QPS_INIT,
            port_num: port,
            qp_access_flags: (sys::ACCESS_REMOTE_READ | sys::ACCESS_REMOTE_WRITE) as u32,
            ..Default::default()
        };
        use sys::mask::{ACCESS_FLAGS, PKEY_INDEX, PORT, STATE};
        self.modify(attr, STATE | PKEY_INDEX | PORT | ACCESS_FLAGS, "ibv_modify_qp to INIT")
    }

    /// Makes it answer the peer. Blocks while the kernel resolves the peer's address (seconds if it is not there).
    pub(crate) fn to_rtr(&self, path: &Path) -> Result<(), VerbsError> {
        let grh = sys::GlobalRoute {
            dgid: path.remote_gid,
            flow_label: 0,
            sgid_index: path.gid_index,
            hop_limit: 64,
            traffic_class: path.traffic_class,
        };
        let ah_attr = sys::AhAttr {
            grh,
            dlid: path.remote_lid,
            sl: path.service_level,
            // On InfiniBand the local identifier is enough inside one subnet, and there is no other case here.
            is_global: u8::from(path.ethernet),
            port_num: path.port,
            ..Default::default()
        };
        let attr = sys::QpAttr {
            qp_state: sys::QPS_RTR,
            path_mtu: path.mtu,
            dest_qp_num: path.remote_qp,
            rq_psn: path.remote_psn,
            max_dest_rd_atomic: path.reads,
            min_rnr_timer: 12,
            ah_attr,
            ..Default::default()
        };
        use sys::mask::{AV, DEST_QPN, MAX_DEST_RD_ATOMIC, MIN_RNR_TIMER, PATH_MTU, RQ_PSN, STATE};
        let mask = STATE | AV | PATH_MTU | DEST_QPN | RQ_PSN | MAX_DEST_RD_ATOMIC | MIN_RNR_TIMER;
        self.modify(attr, mask, "ibv_modify_qp to RTR")
    }

    /// Makes it send.
    pub(crate) fn to_rts(&self, psn: u32, reads: u8, timeout: u8, retries: u8) -> Result<(), VerbsError> {
        let attr = sys::QpAttr {
            qp_state: sys::QPS_RTS,
            sq_psn: psn,
            max_rd_atomic: reads,
            timeout,
            retry_cnt: retries,
            rnr_retry: retries,
            ..Default::default()
        };
        use sys::mask::{MAX_RD_ATOMIC, RETRY_CNT, RNR_RETRY, SQ_PSN, STATE, TIMEOUT};
        let mask = STATE | SQ_PSN | MAX_RD_ATOMIC | TIMEOUT | RETRY_CNT | RNR_RETRY;
        self.modify(attr, mask, "ibv_modify_qp to RTS")
    }

    /// Ends it: what is in flight completes with an error.
    pub(crate) fn to_error(&self) -> Result<(), VerbsError> {
        let attr = sys::QpAttr { qp_state: sys::QPS_ERR, ..Default::default() };
        self.modify(attr, sys::mask::STATE, "ibv_modify_qp to ERR")
    }

    /// Posts one read or write (`opcode`).
    ///
    /// # Safety
    /// `local` must stay mapped and registered, and nothing else may use it, until the request has completed or the
    /// queue pair was destroyed.
    pub(crate) unsafe fn post(
        &self,
        opcode: u32,
        id: u64,
        mut local: sys::Sge,
        remote: (u64, u32),
        signalled: bool,
    ) -> Result<(), VerbsError> {
        // SAFETY: the context is open, and its table was filled when it was opened.
        let post = unsafe { self.pd.context.raw.as_ref() }.ops.post_send;
        let Some(post) = post else {
            return Err(VerbsError::Call { function: "ibv_post_send", errno: libc::ENOSYS });
        };
        let mut request = sys::SendWr {
            wr_id: id,
            next: null_mut(),
            sg_list: &mut local,
            num_sge: 1,
            opcode,
            send_flags: if signalled { sys::SEND_SIGNALED } else { 0 },
            imm_data: 0,
            remote_addr: remote.0,
            rkey: remote.1,
            rest: [0; 19],
        };
        let mut bad = null_mut();
        // SAFETY: request and element are copied by the call; the caller keeps the memory.
        check("ibv_post_send", unsafe { post(self.raw.as_ptr(), &mut request, &mut bad) })
    }
}

impl Drop for Qp {
    fn drop(&mut self) {
        // SAFETY: this is the last use; when it returns the device no longer touches memory of its work requests.
        let answer = unsafe { (self.pd.context.api.symbols.destroy_qp)(self.raw.as_ptr()) };
        if let Err(error) = check("ibv_destroy_qp", answer) {
            tracing::warn!(%error, hca = self.pd.context.name, "a queue pair stays");
        }
    }
}
