//! The emulator of libibverbs, ready to be opened. See `verbs-emulator/README.md`.

use std::{
    ffi::{CString, c_char},
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    sync::{
        LazyLock,
        atomic::{AtomicU16, Ordering},
    },
    time::{Duration, Instant},
};

use libloading::Library;

use crate::{LONG, built::find};

/// `IBV_EVENT_DEVICE_FATAL`.
pub const DEVICE_FATAL: u32 = 8;
/// `IBV_EVENT_PORT_ACTIVE`.
pub const PORT_ACTIVE: u32 = 9;
/// `IBV_EVENT_PORT_ERR`.
pub const PORT_ERR: u32 = 10;

type Text = *const c_char;

/// The library's own functions. It is loaded once, so that these and `ibv_*` share their state.
struct Functions {
    add: unsafe extern "C" fn(Text, *const [u8; 16], u8, u16, bool) -> i32,
    set: unsafe extern "C" fn(Text, Text, u32) -> i32,
    release: unsafe extern "C" fn(Text, u32, usize) -> i32,
    doom: unsafe extern "C" fn(Text, u64, u32) -> i32,
    refuse: unsafe extern "C" fn(Text, Text, i32, u32) -> i32,
    event: unsafe extern "C" fn(Text, u32) -> i32,
    count: unsafe extern "C" fn(Text, Text) -> u64,
    held: unsafe extern "C" fn(Text, *mut [u32; 2], usize) -> usize,
    _library: Library,
}

static FUNCTIONS: LazyLock<Functions> = LazyLock::new(|| {
    // SAFETY: the emulator's initialisers do nothing.
    let library = unsafe { Library::new(library()) }.unwrap_or_else(|error| broken(&error));
    macro_rules! table {
        ($($field:ident),*) => {
            Functions {
                $($field: {
                    // SAFETY: the emulator's function of this name has the field's type, and the library stays open.
                    *unsafe { library.get(concat!("verbs_emulator_", stringify!($field)).as_bytes()) }
                        .unwrap_or_else(|error| broken(&error))
                },)*
                _library: library,
            }
        };
    }
    table!(add, set, release, doom, refuse, event, count, held)
});

fn broken(error: &libloading::Error) -> ! {
    panic!("the emulator of verbs: {error}")
}

/// The emulator's `libibverbs`, for `RdmaConfig::verbs`.
pub fn library() -> PathBuf {
    find("libverbs_emulator.so")
}

/// What the ports of a host are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// RoCE v2, with an IPv4 address on each port.
    Ethernet,
    /// All ports in one subnet.
    InfiniBand,
}

/// A host with devices of its own: what `/sys` would tell of it, and the devices.
#[derive(Debug)]
pub struct Host {
    sysfs: tempfile::TempDir,
    /// Its devices, in the order in which verbs lists them.
    pub hcas: Vec<Hca>,
}

impl Host {
    /// A host with so many devices. Those with the same place on two hosts seem to be in one subnet.
    pub fn new(link: Link, devices: u8) -> Self {
        static HOSTS: AtomicU16 = AtomicU16::new(1);
        let sysfs = tempfile::tempdir().unwrap_or_else(|error| panic!("no temporary folder: {error}"));
        let host = HOSTS.fetch_add(1, Ordering::Relaxed);
        let hcas = (0..devices).map(|rail| Hca::add(sysfs.path(), link, host, rail)).collect();
        Self { sysfs, hcas }
    }

    /// For `RdmaConfig::sysfs`.
    pub fn sysfs(&self) -> &Path {
        self.sysfs.path()
    }

    /// Panics unless all that was made on the devices has ended, or soon ends, and nothing was misused.
    pub fn assert_clean(&self) {
        for hca in &self.hcas {
            for what in ["qps", "mrs", "cqs", "channels", "pds", "contexts"] {
                hca.wait_for(what, |left| left == 0);
            }
            // The emulator has printed what it was.
            assert_eq!(hca.count("misuse"), 0, "{} was misused", hca.name);
        }
    }
}

/// One emulated device.
#[derive(Debug)]
pub struct Hca {
    /// Its name.
    pub name: String,
    c_name: CString,
}

impl Hca {
    /// Adds a device, and says so in `sysfs`.
    fn add(sysfs: &Path, link: Link, host: u16, rail: u8) -> Self {
        const GID_INDEX: u8 = 3;
        let [high, low] = host.to_be_bytes();
        let name = format!("emulated{host}_{rail}");
        let address = match link {
            Link::Ethernet => Ipv4Addr::new(10, high, rail, low).to_ipv6_mapped(),
            Link::InfiniBand => Ipv6Addr::new(0xfe80, 0, 0, 0, 2, 0, host, u16::from(rail) + 1),
        };
        let local = Ipv6Addr::new(0xfe80, 0, 0, 0, 1, 0, host, u16::from(rail) + 1);
        // A table whose first entry is not the one to take, where that can be.
        let (words, kinds, gids) = match link {
            Link::Ethernet => (
                ("Ethernet", "0x0"),
                ["IB/RoCE v1", "RoCE v2"],
                vec![(0, local), (u16::from(GID_INDEX), address)],
            ),
            Link::InfiniBand => {
                (("InfiniBand", "0x1"), ["", "IB/RoCE v1"], vec![(u16::from(GID_INDEX), address)])
            }
        };
        let port = format!("class/infiniband/{name}/ports/1");
        let mut files = vec![
            (format!("{port}/state"), "4: ACTIVE".to_owned()),
            (format!("{port}/link_layer"), words.0.to_owned()),
            (format!("{port}/rate"), "100 Gb/sec (4X EDR)".to_owned()),
            (format!("{port}/lid"), words.1.to_owned()),
            (format!("class/infiniband_verbs/uverbs{rail}/ibdev"), name.clone()),
        ];
        for (index, gid) in gids {
            let segments = gid.segments().map(|segment| format!("{segment:04x}")).join(":");
            let kind = kinds[usize::from(index > 0)];
            files.push((format!("{port}/gids/{index}"), segments));
            files.push((format!("{port}/gid_attrs/types/{index}"), kind.to_owned()));
        }
        for (file, text) in files {
            write(&sysfs.join(file), &text);
        }
        let c_name = c_string(&name);
        let lid = if link == Link::InfiniBand { host * 8 + u16::from(rail) + 1 } else { 0 };
        let (gid, ethernet) = (address.octets(), link == Link::Ethernet);
        // SAFETY: a string and an array that live during the call.
        let added = unsafe { (FUNCTIONS.add)(c_name.as_ptr(), &gid, GID_INDEX, lid, ethernet) };
        assert_eq!(added, 0, "{name} cannot be added");
        Self { name, c_name }
    }

    fn on(&self, act: impl FnOnce(Text) -> i32) {
        assert_eq!(act(self.c_name.as_ptr()), 0, "{} has no such thing", self.name);
    }

    /// Changes a setting: `hold`, `deaf`, `reuse_keys`, `dma_buf`, `mute`, `stall`, `max_send_wr`, `max_cqe`. The README says what they
    /// mean.
    pub fn set(&self, setting: &str, value: u32) {
        let setting = c_string(setting);
        // SAFETY: strings that live during the call.
        self.on(|name| unsafe { (FUNCTIONS.set)(name, setting.as_ptr(), value) });
    }

    /// Whether requests wait until they are released; those that wait go on when they need not any more.
    pub fn hold(&self, hold: bool) {
        self.set("hold", u32::from(hold));
    }

    /// Queue pairs with requests that wait, by their numbers, and how many wait.
    pub fn held(&self) -> Vec<(u32, u32)> {
        let mut found = vec![[0; 2]; 1024];
        // SAFETY: a string that lives during the call, and an array of this length.
        let count = unsafe { (FUNCTIONS.held)(self.c_name.as_ptr(), found.as_mut_ptr(), found.len()) };
        found.truncate(count);
        found.into_iter().map(|[number, requests]| (number, requests)).collect()
    }

    /// Lets at most `count` requests of a queue pair run. One that was destroyed meanwhile has none.
    pub fn release(&self, number: u32, count: usize) {
        // SAFETY: a string that lives during the call.
        let _ = unsafe { (FUNCTIONS.release)(self.c_name.as_ptr(), number, count) };
    }

    /// Has the `nth` request from now, from 0, end with this `ibv_wc_status`.
    pub fn fail(&self, nth: u64, status: u32) {
        assert_ne!(status, 0, "a success is no failure");
        // SAFETY: a string that lives during the call.
        self.on(|name| unsafe { (FUNCTIONS.doom)(name, nth, status) });
    }

    /// Has the `nth` request from now, from 0, never complete. It is flushed with its queue pair.
    pub fn lose(&self, nth: u64) {
        // SAFETY: a string that lives during the call.
        self.on(|name| unsafe { (FUNCTIONS.doom)(name, nth, 0) });
    }

    /// Takes back all failures and losses of requests that are still to come.
    pub fn clear(&self) {
        self.set("dooms", 0);
    }

    /// Has the `nth` call of `function` from now, from 0, fail: `reg_mr`, `post_send`, `modify_qp to RTR`.
    pub fn refuse(&self, function: &str, errno: i32, nth: u32) {
        let function = c_string(function);
        // SAFETY: strings that live during the call.
        self.on(|name| unsafe { (FUNCTIONS.refuse)(name, function.as_ptr(), errno, nth) });
    }

    /// Sends an asynchronous event, which also takes the port down or up.
    pub fn event(&self, event: u32) {
        // SAFETY: a string that lives during the call.
        self.on(|name| unsafe { (FUNCTIONS.event)(name, event) });
    }

    /// How much of `what` there is: `contexts`, `pds`, `mrs`, `channels`, `cqs`, `qps`, those of them that have
    /// `ended` in the error state; `held` requests; `stalled` calls; `requests` ever
    /// posted, those of them that were `signalled`, the `most` at once of one queue pair; `refusals` and `dooms` that
    /// are still to come; `misuse`.
    pub fn count(&self, what: &str) -> u64 {
        let text = c_string(what);
        // SAFETY: strings that live during the call.
        let count = unsafe { (FUNCTIONS.count)(self.c_name.as_ptr(), text.as_ptr()) };
        assert_ne!(count, u64::MAX, "the emulator does not count {what}");
        count
    }

    /// Waits until the count of `what` is as wanted.
    pub fn wait_for(&self, what: &str, wanted: impl Fn(u64) -> bool) {
        let until = Instant::now() + LONG;
        while !wanted(self.count(what)) {
            assert!(Instant::now() < until, "{} still has {} {what}", self.name, self.count(what));
            // Another thread of the transport brings it about, and tells nobody.
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn c_string(text: &str) -> CString {
    CString::new(text).unwrap_or_else(|_| panic!("{text:?} has a zero byte"))
}

fn write(file: &Path, text: &str) {
    let folder = file.parent().unwrap_or(file);
    let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(file, format!("{text}\n")));
    written.unwrap_or_else(|error| panic!("cannot write {}: {error}", file.display()));
}
