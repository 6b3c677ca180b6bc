//! The part of `infiniband/verbs.h` that this crate uses, laid out as rdma-core's ABI of 64-bit machines.
//!
//! Structures that the library allocates are mirrored up to the last field that is read here and never made by this
//! crate. Structures that this crate makes are mirrored whole, and the assertions below fail the build if a size or
//! place is not that of the C header. `docs/unsafe.md` says how the numbers are taken.

use std::ffi::{c_char, c_int, c_uint, c_void};

/// Opaque, owned by the library.
#[repr(C)]
pub(crate) struct Device {
    _private: [u8; 0],
}

type Unused = *const c_void;

/// `ibv_context_ops`: the entries behind inline functions of the header.
#[repr(C)]
pub(crate) struct ContextOps {
    _before_poll: [Unused; 11],
    pub(crate) poll_cq: Option<unsafe extern "C" fn(*mut Cq, c_int, *mut Wc) -> c_int>,
    pub(crate) req_notify_cq: Option<unsafe extern "C" fn(*mut Cq, c_int) -> c_int>,
    _before_send: [Unused; 12],
    pub(crate) post_send: Option<unsafe extern "C" fn(*mut Qp, *mut SendWr, *mut *mut SendWr) -> c_int>,
    _after_send: [Unused; 6],
}

/// `ibv_context`, up to the descriptor of asynchronous events.
#[repr(C)]
pub(crate) struct Context {
    _device: *mut Device,
    pub(crate) ops: ContextOps,
    _cmd_fd: c_int,
    pub(crate) async_fd: c_int,
}

/// Opaque here: only its address is passed on.
#[repr(C)]
pub(crate) struct Pd {
    _private: [u8; 0],
}

/// `ibv_cq`: only its address is passed on.
#[repr(C)]
pub(crate) struct Cq {
    _private: [u8; 0],
}

/// `ibv_comp_channel`.
#[repr(C)]
pub(crate) struct CompChannel {
    _context: *mut Context,
    pub(crate) fd: c_int,
}

/// `ibv_mr`.
#[repr(C)]
pub(crate) struct Mr {
    _context: *mut Context,
    _pd: *mut Pd,
    _addr: *mut c_void,
    _length: usize,
    _handle: u32,
    pub(crate) lkey: u32,
    pub(crate) rkey: u32,
}

/// `ibv_qp`, up to its number.
#[repr(C)]
pub(crate) struct Qp {
    _context: *mut Context,
    _qp_context: *mut c_void,
    _pd: *mut Pd,
    _send_cq: *mut Cq,
    _recv_cq: *mut Cq,
    _srq: *mut c_void,
    _handle: u32,
    pub(crate) qp_num: u32,
}

/// `ibv_sge`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sge {
    pub(crate) addr: u64,
    pub(crate) length: u32,
    pub(crate) lkey: u32,
}

/// `ibv_send_wr` with its union's `rdma` member.
#[repr(C)]
pub(crate) struct SendWr {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut SendWr,
    pub(crate) sg_list: *mut Sge,
    pub(crate) num_sge: c_int,
    pub(crate) opcode: c_uint,
    pub(crate) send_flags: c_uint,
    pub(crate) imm_data: u32,
    pub(crate) remote_addr: u64,
    pub(crate) rkey: u32,
    /// The rest of the unions, of which RDMA READ and WRITE use nothing.
    pub(crate) rest: [u32; 19],
}

/// `ibv_wc`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wc {
    pub(crate) wr_id: u64,
    pub(crate) status: c_uint,
    _opcode: c_uint,
    pub(crate) vendor_err: u32,
    _byte_len: u32,
    _imm_data: u32,
    pub(crate) qp_num: u32,
    _src_qp: u32,
    _wc_flags: c_uint,
    _pkey_index: u16,
    _slid: u16,
    _sl: u8,
    _dlid_path_bits: u8,
}

/// `ibv_qp_cap`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct QpCap {
    pub(crate) max_send_wr: u32,
    pub(crate) max_recv_wr: u32,
    pub(crate) max_send_sge: u32,
    pub(crate) max_recv_sge: u32,
    pub(crate) max_inline_data: u32,
}

/// `ibv_qp_init_attr`.
#[repr(C)]
pub(crate) struct QpInitAttr {
    pub(crate) qp_context: *mut c_void,
    pub(crate) send_cq: *mut Cq,
    pub(crate) recv_cq: *mut Cq,
    pub(crate) srq: *mut c_void,
    pub(crate) cap: QpCap,
    pub(crate) qp_type: c_uint,
    pub(crate) sq_sig_all: c_int,
}

/// `ibv_global_route`. A GID is sixteen bytes whose union aligns them to eight.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct GlobalRoute {
    pub(crate) dgid: [u8; 16],
    pub(crate) flow_label: u32,
    pub(crate) sgid_index: u8,
    pub(crate) hop_limit: u8,
    pub(crate) traffic_class: u8,
}

/// `ibv_ah_attr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AhAttr {
    pub(crate) grh: GlobalRoute,
    pub(crate) dlid: u16,
    pub(crate) sl: u8,
    pub(crate) src_path_bits: u8,
    pub(crate) static_rate: u8,
    pub(crate) is_global: u8,
    pub(crate) port_num: u8,
}

/// `ibv_qp_attr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct QpAttr {
    pub(crate) qp_state: c_uint,
    pub(crate) cur_qp_state: c_uint,
    pub(crate) path_mtu: c_uint,
    pub(crate) path_mig_state: c_uint,
    pub(crate) qkey: u32,
    pub(crate) rq_psn: u32,
    pub(crate) sq_psn: u32,
    pub(crate) dest_qp_num: u32,
    pub(crate) qp_access_flags: c_uint,
    pub(crate) cap: QpCap,
    pub(crate) ah_attr: AhAttr,
    pub(crate) alt_ah_attr: AhAttr,
    pub(crate) pkey_index: u16,
    pub(crate) alt_pkey_index: u16,
    pub(crate) en_sqd_async_notify: u8,
    pub(crate) sq_draining: u8,
    pub(crate) max_rd_atomic: u8,
    pub(crate) max_dest_rd_atomic: u8,
    pub(crate) min_rnr_timer: u8,
    pub(crate) port_num: u8,
    pub(crate) timeout: u8,
    pub(crate) retry_cnt: u8,
    pub(crate) rnr_retry: u8,
    pub(crate) alt_port_num: u8,
    pub(crate) alt_timeout: u8,
    pub(crate) rate_limit: u32,
}

/// `ibv_port_attr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PortAttr {
    pub(crate) state: c_uint,
    pub(crate) max_mtu: c_uint,
    pub(crate) active_mtu: c_uint,
    _gid_tbl_len: c_int,
    _words: [u32; 4],
    _pkey_tbl_len: u16,
    pub(crate) lid: u16,
    _sm_lid: u16,
    /// From `lmc` to `flags`.
    _bytes: [u8; 10],
    _port_cap_flags2: u16,
}

/// `ibv_device_attr`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceAttr {
    _fw_ver: [u64; 8],
    _guids_and_sizes: [u64; 4],
    _ids: [u32; 3],
    _max_qp: c_int,
    pub(crate) max_qp_wr: c_int,
    _flags_and_sge: [u32; 3],
    _max_cq: c_int,
    pub(crate) max_cqe: c_int,
    _max_mr_pd: [c_int; 2],
    pub(crate) max_qp_rd_atom: c_int,
    _max_ee_res: [c_int; 2],
    pub(crate) max_qp_init_rd_atom: c_int,
    /// To the end; nothing of it is read.
    _rest: [u64; 9],
}

/// `ibv_async_event`. The union's pointers are wider than its port number.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AsyncEvent {
    pub(crate) element: u64,
    pub(crate) event_type: c_uint,
}

pub(crate) const ACCESS_LOCAL_WRITE: c_int = 1;
pub(crate) const ACCESS_REMOTE_WRITE: c_int = 1 << 1;
pub(crate) const ACCESS_REMOTE_READ: c_int = 1 << 2;
pub(crate) const QPT_RC: c_uint = 2;
pub(crate) const QPS_INIT: c_uint = 1;
pub(crate) const QPS_RTR: c_uint = 2;
pub(crate) const QPS_RTS: c_uint = 3;
pub(crate) const QPS_ERR: c_uint = 6;
pub(crate) const WR_RDMA_WRITE: c_uint = 0;
pub(crate) const WR_RDMA_READ: c_uint = 4;
pub(crate) const SEND_SIGNALED: c_uint = 2;
pub(crate) const PORT_ACTIVE: c_uint = 4;
pub(crate) const EVENT_DEVICE_FATAL: c_uint = 8;
pub(crate) const EVENT_PORT_ACTIVE: c_uint = 9;
pub(crate) const EVENT_PORT_ERR: c_uint = 10;

/// `ibv_qp_attr_mask`.
pub(crate) mod mask {
    use std::ffi::c_int;

    pub(crate) const STATE: c_int = 1;
    pub(crate) const ACCESS_FLAGS: c_int = 1 << 3;
    pub(crate) const PKEY_INDEX: c_int = 1 << 4;
    pub(crate) const PORT: c_int = 1 << 5;
    pub(crate) const AV: c_int = 1 << 7;
    pub(crate) const PATH_MTU: c_int = 1 << 8;
    pub(crate) const TIMEOUT: c_int = 1 << 9;
    pub(crate) const RETRY_CNT: c_int = 1 << 10;
    pub(crate) const RNR_RETRY: c_int = 1 << 11;
    pub(crate) const RQ_PSN: c_int = 1 << 12;
    pub(crate) const MAX_RD_ATOMIC: c_int = 1 << 13;
    pub(crate) const MIN_RNR_TIMER: c_int = 1 << 15;
    pub(crate) const SQ_PSN: c_int = 1 << 16;
    pub(crate) const MAX_DEST_RD_ATOMIC: c_int = 1 << 17;
    pub(crate) const DEST_QPN: c_int = 1 << 20;
}

/// The symbols of `libibverbs.so.1`, by the types of the header.
#[derive(Clone, Copy)]
pub(crate) struct Symbols {
    pub(crate) get_device_list: unsafe extern "C" fn(*mut c_int) -> *mut *mut Device,
    pub(crate) free_device_list: unsafe extern "C" fn(*mut *mut Device),
    pub(crate) get_device_name: unsafe extern "C" fn(*mut Device) -> *const c_char,
    pub(crate) open_device: unsafe extern "C" fn(*mut Device) -> *mut Context,
    pub(crate) close_device: unsafe extern "C" fn(*mut Context) -> c_int,
    pub(crate) query_device: unsafe extern "C" fn(*mut Context, *mut DeviceAttr) -> c_int,
    pub(crate) query_port: unsafe extern "C" fn(*mut Context, u8, *mut PortAttr) -> c_int,
    pub(crate) alloc_pd: unsafe extern "C" fn(*mut Context) -> *mut Pd,
    pub(crate) dealloc_pd: unsafe extern "C" fn(*mut Pd) -> c_int,
    pub(crate) reg_mr: unsafe extern "C" fn(*mut Pd, *mut c_void, usize, c_int) -> *mut Mr,
    pub(crate) dereg_mr: unsafe extern "C" fn(*mut Mr) -> c_int,
    pub(crate) create_comp_channel: unsafe extern "C" fn(*mut Context) -> *mut CompChannel,
    pub(crate) destroy_comp_channel: unsafe extern "C" fn(*mut CompChannel) -> c_int,
    pub(crate) create_cq:
        unsafe extern "C" fn(*mut Context, c_int, *mut c_void, *mut CompChannel, c_int) -> *mut Cq,
    pub(crate) destroy_cq: unsafe extern "C" fn(*mut Cq) -> c_int,
    pub(crate) get_cq_event: unsafe extern "C" fn(*mut CompChannel, *mut *mut Cq, *mut *mut c_void) -> c_int,
    pub(crate) ack_cq_events: unsafe extern "C" fn(*mut Cq, c_uint),
    pub(crate) create_qp: unsafe extern "C" fn(*mut Pd, *mut QpInitAttr) -> *mut Qp,
    pub(crate) modify_qp: unsafe extern "C" fn(*mut Qp, *mut QpAttr, c_int) -> c_int,
    pub(crate) destroy_qp: unsafe extern "C" fn(*mut Qp) -> c_int,
    pub(crate) get_async_event: unsafe extern "C" fn(*mut Context, *mut AsyncEvent) -> c_int,
    pub(crate) ack_async_event: unsafe extern "C" fn(*mut AsyncEvent),
    /// Of rdma-core 34 and newer.
    pub(crate) reg_dmabuf_mr: Option<unsafe extern "C" fn(*mut Pd, u64, usize, u64, c_int, c_int) -> *mut Mr>,
}

macro_rules! layout {
    ($type:ty: $size:literal $(, $field:ident = $offset:literal)*) => {
        const _: () = {
            assert!(size_of::<$type>() == $size);
            $(assert!(std::mem::offset_of!($type, $field) == $offset);)*
        };
    };
}

// Taken from rdma-core 44's verbs.h on x86_64; the same on every 64-bit Linux, as no field depends on more.
#[cfg(target_pointer_width = "64")]
mod checks {
    use super::*;

    layout!(SendWr: 128, opcode = 28, send_flags = 32, remote_addr = 40, rkey = 48);
    layout!(Sge: 16, length = 8, lkey = 12);
    layout!(Wc: 48, status = 8, vendor_err = 16, qp_num = 28);
    layout!(QpInitAttr: 64, cap = 32, qp_type = 52, sq_sig_all = 56);
    layout!(QpAttr: 144, ah_attr = 56, pkey_index = 120, max_rd_atomic = 126, timeout = 130, rate_limit = 136);
    layout!(AhAttr: 32, dlid = 24, port_num = 30);
    layout!(GlobalRoute: 24, flow_label = 16, traffic_class = 22);
    layout!(PortAttr: 52, active_mtu = 8, lid = 34);
    layout!(DeviceAttr: 232, max_qp_wr = 112, max_cqe = 132, max_qp_rd_atom = 144, max_qp_init_rd_atom = 156);
    layout!(ContextOps: 256, poll_cq = 88, req_notify_cq = 96, post_send = 200);
    layout!(AsyncEvent: 16, event_type = 8);
    const _: () = {
        assert!(std::mem::offset_of!(Mr, lkey) == 36 && std::mem::offset_of!(Mr, rkey) == 40);
        assert!(std::mem::offset_of!(Qp, qp_num) == 52);
        assert!(std::mem::offset_of!(CompChannel, fd) == 8);
        assert!(std::mem::offset_of!(Context, ops) == 8 && std::mem::offset_of!(Context, async_fd) == 268);
    };
}
