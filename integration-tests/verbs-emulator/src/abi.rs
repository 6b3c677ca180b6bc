//! The structures of `libibverbs` as its callers see them on 64-bit machines. `docs/unsafe.md` says how the numbers of
//! such layouts are taken; the assertions below hold them.

use std::ffi::{c_char, c_int, c_uint, c_void};

/// `ibv_device`.
#[repr(C)]
pub(crate) struct Device {
    pub(crate) _ops: [*const c_void; 2],
    pub(crate) _kinds: [c_int; 2],
    pub(crate) name: [c_char; 64],
    pub(crate) _dev_name: [c_char; 64],
    pub(crate) _paths: [[c_char; 256]; 2],
}

pub(crate) type Unused = *const c_void;
pub(crate) type PollCq = unsafe extern "C" fn(*mut Cq, c_int, *mut Wc) -> c_int;
pub(crate) type ReqNotifyCq = unsafe extern "C" fn(*mut Cq, c_int) -> c_int;
pub(crate) type PostSend = unsafe extern "C" fn(*mut Qp, *mut SendWr, *mut *mut SendWr) -> c_int;

/// `ibv_context_ops`: what the header's inline functions call.
#[repr(C)]
pub(crate) struct ContextOps {
    pub(crate) _before_poll: [Unused; 11],
    pub(crate) poll_cq: Option<PollCq>,
    pub(crate) req_notify_cq: Option<ReqNotifyCq>,
    pub(crate) _before_send: [Unused; 12],
    pub(crate) post_send: Option<PostSend>,
    pub(crate) _after_send: [Unused; 6],
}

/// `ibv_context`.
#[repr(C)]
pub(crate) struct Context {
    pub(crate) device: *mut Device,
    pub(crate) ops: ContextOps,
    pub(crate) cmd_fd: c_int,
    pub(crate) async_fd: c_int,
    pub(crate) num_comp_vectors: c_int,
    pub(crate) _mutex: [u64; 5],
    pub(crate) _abi_compat: Unused,
}

/// `ibv_pd`.
#[repr(C)]
pub(crate) struct Pd {
    pub(crate) context: *mut Context,
    pub(crate) _handle: u32,
}

/// `ibv_mr`.
#[repr(C)]
pub(crate) struct Mr {
    pub(crate) context: *mut Context,
    pub(crate) pd: *mut Pd,
    pub(crate) addr: *mut c_void,
    pub(crate) length: usize,
    pub(crate) _handle: u32,
    pub(crate) lkey: u32,
    pub(crate) rkey: u32,
}

/// `ibv_comp_channel`.
#[repr(C)]
pub(crate) struct CompChannel {
    pub(crate) context: *mut Context,
    pub(crate) fd: c_int,
    pub(crate) _refcnt: c_int,
}

/// `ibv_cq`.
#[repr(C)]
pub(crate) struct Cq {
    pub(crate) context: *mut Context,
    pub(crate) channel: *mut CompChannel,
    pub(crate) cq_context: *mut c_void,
    pub(crate) _handle: u32,
    pub(crate) cqe: c_int,
    pub(crate) _locks: [u64; 12],
}

/// `ibv_qp`.
#[repr(C)]
pub(crate) struct Qp {
    pub(crate) context: *mut Context,
    pub(crate) qp_context: *mut c_void,
    pub(crate) pd: *mut Pd,
    pub(crate) send_cq: *mut Cq,
    pub(crate) recv_cq: *mut Cq,
    pub(crate) _srq: *mut c_void,
    pub(crate) _handle: u32,
    pub(crate) qp_num: u32,
    pub(crate) _state: c_uint,
    pub(crate) _qp_type: c_uint,
    pub(crate) _locks: [u64; 12],
}

/// `ibv_sge`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Sge {
    pub(crate) addr: u64,
    pub(crate) length: u32,
    pub(crate) lkey: u32,
}

/// `ibv_send_wr`, with the `rdma` member of its union.
#[repr(C)]
pub(crate) struct SendWr {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut SendWr,
    pub(crate) sg_list: *mut Sge,
    pub(crate) num_sge: c_int,
    pub(crate) opcode: c_uint,
    pub(crate) send_flags: c_uint,
    pub(crate) _imm_data: u32,
    pub(crate) remote_addr: u64,
    pub(crate) rkey: u32,
    pub(crate) _rest: [u32; 19],
}

/// `ibv_wc`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Wc {
    pub(crate) wr_id: u64,
    pub(crate) status: c_uint,
    pub(crate) opcode: c_uint,
    pub(crate) vendor_err: u32,
    pub(crate) byte_len: u32,
    pub(crate) _imm_data: u32,
    pub(crate) qp_num: u32,
    pub(crate) _src_qp: u32,
    pub(crate) _wc_flags: c_uint,
    pub(crate) _last: [u32; 2],
}

/// `ibv_qp_cap`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
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

/// `ibv_ah_attr` with its `ibv_global_route`.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub(crate) struct AhAttr {
    pub(crate) dgid: [u8; 16],
    pub(crate) _flow_label: u32,
    pub(crate) sgid_index: u8,
    pub(crate) _hops_and_class: [u8; 3],
    pub(crate) dlid: u16,
    pub(crate) _sl_path_rate: [u8; 3],
    pub(crate) is_global: u8,
    pub(crate) port_num: u8,
}

/// `ibv_qp_attr`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct QpAttr {
    pub(crate) qp_state: c_uint,
    pub(crate) _cur_qp_state: c_uint,
    pub(crate) path_mtu: c_uint,
    pub(crate) _path_mig_state: c_uint,
    pub(crate) _qkey: u32,
    pub(crate) rq_psn: u32,
    pub(crate) sq_psn: u32,
    pub(crate) dest_qp_num: u32,
    pub(crate) qp_access_flags: c_uint,
    pub(crate) _cap: QpCap,
    pub(crate) ah_attr: AhAttr,
    pub(crate) _alt_ah_attr: AhAttr,
    pub(crate) pkey_index: u16,
    pub(crate) _alt_pkey_index: u16,
    pub(crate) _sqd: [u8; 2],
    pub(crate) max_rd_atomic: u8,
    pub(crate) max_dest_rd_atomic: u8,
    pub(crate) min_rnr_timer: u8,
    pub(crate) port_num: u8,
    pub(crate) timeout: u8,
    pub(crate) retry_cnt: u8,
    pub(crate) rnr_retry: u8,
    pub(crate) _alt: [u8; 2],
    pub(crate) _rate_limit: u32,
}

/// `ibv_port_attr`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct PortAttr {
    pub(crate) state: c_uint,
    pub(crate) max_mtu: c_uint,
    pub(crate) active_mtu: c_uint,
    pub(crate) gid_tbl_len: c_int,
    pub(crate) _words: [u32; 4],
    pub(crate) pkey_tbl_len: u16,
    pub(crate) lid: u16,
    pub(crate) _sm_lid: u16,
    pub(crate) _bytes: [u8; 8],
    pub(crate) link_layer: u8,
    pub(crate) _flags: u8,
    pub(crate) _port_cap_flags2: u16,
}

/// `ibv_device_attr`.
#[repr(C)]
pub(crate) struct DeviceAttr {
    pub(crate) _first: [u64; 14],
    pub(crate) max_qp_wr: c_int,
    pub(crate) _flags_and_sge: [u32; 3],
    pub(crate) _max_cq: c_int,
    pub(crate) max_cqe: c_int,
    pub(crate) _max_mr_pd: [c_int; 2],
    pub(crate) max_qp_rd_atom: c_int,
    pub(crate) _max_ee_res: [c_int; 2],
    pub(crate) max_qp_init_rd_atom: c_int,
    pub(crate) _rest: [u64; 9],
}

/// `ibv_async_event`.
#[repr(C)]
pub(crate) struct AsyncEvent {
    pub(crate) element: u64,
    pub(crate) event_type: c_uint,
}

pub(crate) const LOCAL_WRITE: u32 = 1;
pub(crate) const REMOTE_WRITE: u32 = 1 << 1;
pub(crate) const REMOTE_READ: u32 = 1 << 2;
pub(crate) const QPT_RC: u32 = 2;
pub(crate) const RDMA_WRITE: u32 = 0;
pub(crate) const RDMA_READ: u32 = 4;
pub(crate) const SIGNALED: u32 = 1 << 1;
pub(crate) const PORT_DOWN: u32 = 1;
pub(crate) const PORT_ACTIVE: u32 = 4;
pub(crate) const MTU_4096: u32 = 5;
pub(crate) const EVENT_DEVICE_FATAL: u32 = 8;
pub(crate) const EVENT_PORT_ACTIVE: u32 = 9;
pub(crate) const EVENT_PORT_ERR: u32 = 10;
pub(crate) const LAST_EVENT: u32 = 18;
pub(crate) const LOC_PROT_ERR: u32 = 4;
pub(crate) const WR_FLUSH_ERR: u32 = 5;
pub(crate) const REM_ACCESS_ERR: u32 = 10;
pub(crate) const RETRY_EXC_ERR: u32 = 12;

/// `ibv_qp_attr_mask`.
pub(crate) mod mask {
    pub(crate) const STATE: i32 = 1;
    pub(crate) const CUR_STATE: i32 = 1 << 1;
    pub(crate) const ACCESS_FLAGS: i32 = 1 << 3;
    pub(crate) const PKEY_INDEX: i32 = 1 << 4;
    pub(crate) const PORT: i32 = 1 << 5;
    pub(crate) const AV: i32 = 1 << 7;
    pub(crate) const PATH_MTU: i32 = 1 << 8;
    pub(crate) const TIMEOUT: i32 = 1 << 9;
    pub(crate) const RETRY_CNT: i32 = 1 << 10;
    pub(crate) const RNR_RETRY: i32 = 1 << 11;
    pub(crate) const RQ_PSN: i32 = 1 << 12;
    pub(crate) const MAX_RD_ATOMIC: i32 = 1 << 13;
    pub(crate) const MIN_RNR_TIMER: i32 = 1 << 15;
    pub(crate) const SQ_PSN: i32 = 1 << 16;
    pub(crate) const MAX_DEST_RD_ATOMIC: i32 = 1 << 17;
    pub(crate) const DEST_QPN: i32 = 1 << 20;
}

macro_rules! layout {
    ($type:ty: $size:literal $(, $field:ident = $offset:literal)*) => {
        const _: () = {
            assert!(size_of::<$type>() == $size);
            $(assert!(std::mem::offset_of!($type, $field) == $offset);)*
        };
    };
}

// Taken from rdma-core 44 on x86_64. No field that a caller reads depends on more than the width of a pointer; the locks
// behind them are larger elsewhere, and nobody touches them.
layout!(Device: 664, name = 24);
layout!(ContextOps: 256, poll_cq = 88, req_notify_cq = 96, post_send = 200);
layout!(Context: 328, ops = 8, cmd_fd = 264, async_fd = 268, num_comp_vectors = 272, _abi_compat = 320);
layout!(Pd: 16);
layout!(Mr: 48, addr = 16, length = 24, lkey = 36, rkey = 40);
layout!(CompChannel: 16, fd = 8);
layout!(Cq: 128, channel = 8, cq_context = 16, cqe = 28);
layout!(Qp: 160, send_cq = 24, recv_cq = 32, qp_num = 52);
layout!(Sge: 16, length = 8, lkey = 12);
layout!(SendWr: 128, opcode = 28, send_flags = 32, remote_addr = 40, rkey = 48);
layout!(Wc: 48, status = 8, opcode = 12, vendor_err = 16, byte_len = 20, qp_num = 28);
layout!(QpInitAttr: 64, cap = 32, qp_type = 52, sq_sig_all = 56);
layout!(AhAttr: 32, sgid_index = 20, dlid = 24, is_global = 29, port_num = 30);
layout!(QpAttr: 144, dest_qp_num = 28, qp_access_flags = 32, ah_attr = 56, pkey_index = 120, max_rd_atomic = 126);
layout!(QpAttr: 144, max_dest_rd_atomic = 127, min_rnr_timer = 128, port_num = 129, timeout = 130, rnr_retry = 132);
layout!(PortAttr: 52, active_mtu = 8, gid_tbl_len = 12, pkey_tbl_len = 32, lid = 34, link_layer = 46);
layout!(DeviceAttr: 232, max_qp_wr = 112, max_cqe = 132, max_qp_rd_atom = 144, max_qp_init_rd_atom = 156);
layout!(AsyncEvent: 16, event_type = 8);
