//! The emulator itself: what it must refuse, and a process that HCCL holds on to. In a process of its own, since a fault
//! strikes whoever calls next.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    ffi::CString,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use ckpt_core::{
    Epoch, Error, ErrorKind, Key, Recovery, Result,
    device::DeviceBackend,
    transport::{Collective as _, Communicator, GroupSpec},
};
use ckpt_transport_hccl::{
    HcclConfig, HcclProvider, HcclTransport,
    device::{AclCell, AscendProvider},
};
use integration_tests::ascend::Emulator;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// The emulated libraries, called as a C program would.
struct Raw {
    acl: Library,
    hccl: Library,
}

macro_rules! call {
    ($library:expr, $name:literal($($argument:expr => $kind:ty),* $(,)?)) => {{
        // SAFETY: these are the header's types, and the arguments are what the emulator asks for, or what it must refuse.
        unsafe {
            let function = $library.get::<unsafe extern "C" fn($($kind),*) -> i32>($name).unwrap();
            function($($argument),*)
        }
    }};
}

const WRONG_DEVICE: i32 = 107_003;
const NO_DEVICE: i32 = 107_002;
const WRONG: i32 = 107_000;
const NOT_OVER: i32 = 507_004;
const HOST_TO_DEVICE: i32 = 1;
const DEVICE_TO_DEVICE: i32 = 3;

static GATE: AtomicBool = AtomicBool::new(false);

impl Raw {
    fn open(emulator: &Emulator) -> Self {
        // SAFETY: the emulator's initialisers do nothing.
        let open = |name| unsafe { Library::open(Some(emulator.path().join(name)), RTLD_NOW | RTLD_GLOBAL) };
        let raw = Self { acl: open("libascendcl.so").unwrap(), hccl: open("libhccl.so").unwrap() };
        let code = call!(raw.acl, "aclInit"(std::ptr::null() => *const i8));
        assert!([0, 100_002].contains(&code));
        assert_eq!(call!(raw.acl, "aclInit"(std::ptr::null() => *const i8)), 100_002, "once a process");
        raw
    }

    fn device(&self, number: i32) -> i32 {
        call!(self.acl, "aclrtSetDevice"(number => i32))
    }

    /// A handle or address that a function makes.
    fn made(&self, make: impl FnOnce(*mut u64) -> i32) -> u64 {
        let mut made = 0;
        assert_eq!(make(&mut made), 0);
        made
    }

    fn stream(&self) -> u64 {
        self.made(|to| call!(self.acl, "aclrtCreateStream"(to => *mut u64)))
    }

    fn event(&self) -> u64 {
        self.made(|to| call!(self.acl, "aclrtCreateEventExWithFlag"(to => *mut u64, 1 => u32)))
    }

    fn memory(&self, bytes: usize) -> u64 {
        self.made(|to| call!(self.acl, "aclrtMalloc"(to => *mut u64, bytes => usize, 0 => i32)))
    }

    fn host(&self, bytes: usize) -> u64 {
        self.made(|to| call!(self.acl, "aclrtMallocHost"(to => *mut u64, bytes => usize)))
    }

    fn copy(&self, to: u64, from: u64, bytes: usize, kind: i32, stream: u64) -> i32 {
        call!(self.acl, "aclrtMemcpyAsync"(
            to => u64, bytes => usize, from => u64, bytes => usize, kind => i32, stream => u64
        ))
    }

    /// Records, and looks until the event is over or failed.
    fn finish(&self, stream: u64) -> i32 {
        let event = self.event();
        assert_eq!(call!(self.acl, "aclrtRecordEvent"(event => u64, stream => u64)), 0);
        loop {
            let mut status = 0;
            let code = call!(self.acl, "aclrtQueryEventStatus"(event => u64, &mut status => *mut i32));
            if code != 0 || status == 1 {
                return code;
            }
            std::thread::yield_now();
        }
    }

    /// Nothing behind this runs on `stream` before the gate is open.
    fn block(&self, stream: u64) {
        unsafe extern "C" fn wait(_: *mut std::ffi::c_void) -> i32 {
            while !GATE.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            0
        }
        let code = call!(self.acl, "ascend_emulator_submit"(
            stream => u64,
            wait => unsafe extern "C" fn(*mut std::ffi::c_void) -> i32,
            std::ptr::null_mut() => *mut std::ffi::c_void
        ));
        assert_eq!(code, 0);
    }

    fn set_fault(&self, text: &str) {
        let text = CString::new(text).unwrap();
        // SAFETY: a zero-terminated string.
        unsafe {
            self.acl.get::<unsafe extern "C" fn(*const std::ffi::c_char)>("ascend_emulator_fault").unwrap()(
                text.as_ptr(),
            );
        }
    }
}

fn the_runtime_refuses_misuse(raw: &Raw) {
    // A thread without a device, and one with another.
    std::thread::scope(|scope| {
        let fresh = scope.spawn(|| {
            let mut stream = 0;
            call!(raw.acl, "aclrtCreateStream"(&mut stream => *mut u64))
        });
        assert_eq!(fresh.join().unwrap(), NO_DEVICE);
    });
    assert_eq!(raw.device(99), 107_001);
    assert_eq!(raw.device(1), 0);
    let (stream, event, memory, host) = (raw.stream(), raw.event(), raw.memory(4096), raw.host(4096));
    raw.device(2);
    assert_eq!(raw.copy(memory, host, 64, HOST_TO_DEVICE, stream), WRONG_DEVICE);
    assert_eq!(call!(raw.acl, "aclrtRecordEvent"(event => u64, stream => u64)), WRONG_DEVICE);
    assert_eq!(call!(raw.acl, "aclrtFree"(memory => u64)), WRONG_DEVICE);
    raw.device(1);

    // Memory that is no one's, too short, of the wrong kind, or the stack's.
    let local = [0_u8; 64];
    assert_eq!(raw.copy(memory, host, 4097, HOST_TO_DEVICE, stream), WRONG);
    assert_eq!(raw.copy(memory, local.as_ptr() as u64, 64, HOST_TO_DEVICE, stream), WRONG);
    assert_eq!(raw.copy(memory, host, 64, 4, stream), WRONG, "the kind must be said");
    assert_eq!(raw.copy(memory, host, 64, 3, stream), WRONG);
    assert_eq!(raw.copy(memory + (1 << 40), host, 64, HOST_TO_DEVICE, stream), WRONG);

    // Exported memory.
    let other = raw.stream();
    let unused = raw.event();
    assert_eq!(call!(raw.acl, "aclrtStreamWaitEvent"(other => u64, unused => u64)), WRONG, "never recorded");
    assert_eq!(raw.copy(memory, host, 64, HOST_TO_DEVICE, stream), 0);
    assert_eq!(raw.finish(stream), 0);
    let mut key = [0_u8; 65];
    let export = |key: &mut [u8; 65], len: usize| {
        call!(raw.acl, "aclrtIpcMemGetExportKey"(
            memory => u64, 4096 => usize, key.as_mut_ptr() => *mut u8, len => usize, 1 => u64
        ))
    };
    assert_eq!(export(&mut key, 64), WRONG);
    assert_eq!(export(&mut key, 65), 0);
    assert_eq!(call!(raw.acl, "aclrtFree"(memory => u64)), WRONG, "its key is open");
    assert_eq!(call!(raw.acl, "aclrtIpcMemClose"(key.as_ptr() => *const u8)), 0);
    assert_eq!(call!(raw.acl, "aclrtIpcMemClose"(key.as_ptr() => *const u8)), WRONG, "closed once");

    // A stream with work, and an event that a stream waits for.
    let (blocked, second) = (raw.stream(), raw.memory(4096));
    raw.block(blocked);
    let gate = raw.event();
    assert_eq!(call!(raw.acl, "aclrtRecordEvent"(gate => u64, blocked => u64)), 0);
    assert_eq!(call!(raw.acl, "aclrtStreamWaitEvent"(other => u64, gate => u64)), 0);
    assert_eq!(call!(raw.acl, "aclrtDestroyEvent"(gate => u64)), NOT_OVER);
    assert_eq!(raw.copy(second, memory, 64, DEVICE_TO_DEVICE, blocked), 0);
    assert_eq!(call!(raw.acl, "aclrtDestroyStream"(blocked => u64)), NOT_OVER);

    // Memory that is freed under a copy fails the stream, and its events tell.
    assert_eq!(call!(raw.acl, "aclrtFree"(second => u64)), 0);
    GATE.store(true, Ordering::Release);
    assert_ne!(raw.finish(blocked), 0);
    assert_eq!(raw.finish(other), 0);
    assert_eq!(call!(raw.acl, "aclrtDestroyEvent"(gate => u64)), 0);
    assert_eq!(call!(raw.acl, "aclrtFree"(second => u64)), WRONG, "freed once");
}

fn hccl_refuses_misuse(raw: &Raw) {
    const PARA: i32 = 1;
    const NOT_SUPPORT: i32 = 5;
    raw.device(1);
    let mut root = vec![0_u8; 4108];
    assert_eq!(call!(raw.hccl, "HcclGetRootInfo"(root.as_mut_ptr() => *mut u8)), 0);
    let mut config = [0_u64; 39];
    let mut init = |size: u64, version: u64, root: &[u8]| {
        (config[0], config[1]) = (size, version << 32 | 0xf0f0_f0f0);
        let mut made = 0;
        let code = call!(raw.hccl, "HcclCommInitRootInfoConfig"(
            1 => u32, root.as_ptr() => *const u8, 0 => u32, config.as_ptr() => *const u64, &mut made => *mut u64
        ));
        (code, made)
    };
    assert_eq!(init(2240, 6, &root).0, PARA, "another struct's size");
    assert_eq!(init(312, 10, &root).0, PARA, "another struct's version");
    assert_eq!(init(312, 6, &[0; 4108]).0, PARA);
    let (code, communicator) = init(312, 6, &root);
    assert_eq!(code, 0);
    assert_ne!(init(312, 6, &root).0, 0, "a root info makes one group");
    let (stream, from, to) = (raw.stream(), raw.memory(4096), raw.memory(4096));
    let reduce = |data_type: i32| {
        call!(raw.hccl, "HcclAllReduce"(
            from => u64, to => u64, 16 => u64, data_type => i32, 0 => i32, communicator => u64, stream => u64
        ))
    };
    assert_eq!(reduce(7), NOT_SUPPORT, "UINT8");
    assert_eq!(reduce(4), 0, "FP32");
    let broadcast = |memory: u64, root: u32| {
        call!(raw.hccl, "HcclBroadcast"(
            memory => u64, 4096 => u64, 7 => i32, root => u32, communicator => u64, stream => u64
        ))
    };
    assert_eq!(broadcast(from, 1), PARA, "no such root");
    assert_eq!(broadcast(from + 1, 0), PARA, "beyond the memory");
    raw.device(2);
    assert_eq!(broadcast(from, 0), PARA, "another device's thread");
    raw.device(1);
    assert_eq!(broadcast(from, 0), 0);
    assert_eq!(raw.finish(stream), 0);
    assert_eq!(call!(raw.hccl, "HcclCommDestroy"(communicator => u64)), 0);
    assert_eq!(call!(raw.hccl, "HcclCommDestroy"(communicator => u64)), PARA, "once");
    assert_eq!(broadcast(from, 0), PARA, "after its end");
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

async fn join_alone(transport: &HcclTransport) -> Result<Communicator> {
    let token = transport.create_token().await?;
    transport.join(GroupSpec { token, rank: 0, world_size: 1, epoch: Epoch(1) }, soon()).await
}

/// Faults in the libraries, as the transport tells of them.
async fn hccl_that_fails(raw: &Raw, emulator: &Emulator) {
    let config = HcclConfig {
        folder: Some(emulator.path().to_owned()),
        abort_deadline: Duration::from_millis(300),
        ..HcclConfig::default()
    };
    let acl = AclCell::default();
    let device = AscendProvider::new(Ok(config.clone()), acl.clone()).open_ascend(4).unwrap();
    let device: Arc<dyn DeviceBackend> = Arc::new(device);
    let transport = HcclProvider::new(Ok(config), acl).open_hccl(&device).unwrap();

    for (fault, code, kind) in [
        ("HcclGetRootInfo=11", "HCCL_E_TCP_CONNECT (11)", ErrorKind::PeerLost),
        ("HcclCommInitRootInfoConfig=9", "HCCL_E_TIMEOUT (9)", ErrorKind::Timeout),
        ("HcclBarrier=15", "HCCL_E_RUNTIME (15)", ErrorKind::Backend),
        ("HcclAllGather=24", "HCCL_E_OOM (24)", ErrorKind::ResourceExhausted),
        ("async=21", "HCCL_E_REMOTE (21)", ErrorKind::PeerLost),
        ("HcclBroadcast=4711", "unknown HCCL result (4711)", ErrorKind::Backend),
    ] {
        raw.set_fault(fault);
        let error = join_alone(&transport).await.unwrap_err();
        assert_eq!((error.kind(), error.get(Key::Code)), (kind, Some(code)), "{error}");
        assert_eq!(error.recovery(), Recovery::Rebuild, "{error}");
    }
    // The library's own words stand in the error.
    raw.set_fault("HcclBroadcast=1");
    let error = join_alone(&transport).await.unwrap_err().to_string();
    assert!(error.contains("parameter error; emulator: HcclBroadcast: injected"), "{error}");

    // An end that does not return: the next group is not formed, and the user is told what to do.
    let communicator = join_alone(&transport).await.unwrap();
    raw.set_fault("HcclCommDestroy=hang");
    let began = Instant::now();
    communicator.abort.abort(Error::new(ErrorKind::PeerLost, "broadcast", "rank 1 died"));
    assert!(began.elapsed() < Duration::from_millis(200), "abort waited");
    let error = join_alone(&transport).await.unwrap_err();
    assert_eq!((error.kind(), error.recovery()), (ErrorKind::Backend, Recovery::Fatal));
    assert!(error.to_string().contains("restart this process"), "{error}");
    assert_eq!(communicator.abort.poisoned().unwrap().message(), "rank 1 died");
}

/// One after the other: faults are the process's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn misuse_is_refused_and_faults_are_told() {
    let emulator = Emulator::new();
    let raw = Raw::open(&emulator);
    the_runtime_refuses_misuse(&raw);
    hccl_refuses_misuse(&raw);
    hccl_that_fails(&raw, &emulator).await;
}
