//! What the tests over the real Mooncake share: processes in which its library can be opened.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_core::{
    Result,
    device::{
        Buffer, BufferSlice, DeviceBackend, DeviceConfig,
        host::{HostBuffer, HostDevice},
    },
    transport::{OneSided, ReadOp, RemoteRegion, Transport, TransportConfig, TransportProvider},
};
use ckpt_transport_mooncake::{MooncakeConfig, MooncakeProvider};

/// Names the part that a process of these tests plays.
const PART: &str = "MOONCAKE_PART";

/// An Ascend build wants these; over TCP it never calls them.
const ABSENT: [&str; 3] = ["libascendcl.so", "libllm_datadist.so", "libmetadef.so"];

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// A folder with empty libraries in the place of CANN's.
pub fn stubs() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("empty.c");
    std::fs::write(&source, "").unwrap();
    for name in ABSENT {
        let status = Command::new("cc")
            .args(["-shared", &format!("-Wl,-soname,{name}"), "-o"])
            .args([&folder.path().join(name), &source])
            .status()
            .expect("these tests need a C compiler for three empty libraries");
        assert!(status.success());
    }
    folder
}

/// Runs the test `part` of this file in a process of its own, in which Mooncake can be opened.
pub fn command(part: &str, stubs: &Path) -> Command {
    let library = std::env::var_os("CKPT_TEST_MOONCAKE_LIBRARY")
        .expect("CKPT_TEST_MOONCAKE_LIBRARY must name the libtransfer_engine.so of the npu wheel");
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", part, "--ignored", "--nocapture", "--test-threads=1"])
        .env(PART, part)
        .env("CKPT_MOONCAKE_LIBRARY", library)
        .env("LD_LIBRARY_PATH", stubs)
        .env("MC_FORCE_TCP", "1")
        .env("MC_LOG_LEVEL", "ERROR")
        .stdin(Stdio::piped());
    command
}

/// Runs a part to its end.
pub fn run(part: &str) {
    let stubs = stubs();
    let status = command(part, stubs.path()).stdin(Stdio::null()).status().unwrap();
    assert!(status.success(), "`{part}` failed: {status}");
}

/// Whether this process plays `part`; run by hand with all ignored tests it does not.
pub fn plays(part: &str) -> bool {
    std::env::var(PART).is_ok_and(|played| played == part)
}

/// A process that is killed with its test.
pub struct Peer {
    pub child: Child,
    said: BufReader<ChildStdout>,
}

impl Peer {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        Self { child, said }
    }

    /// Another process of this file, from within a part.
    pub fn part(part: &str) -> Self {
        let stubs = std::env::var("LD_LIBRARY_PATH").unwrap();
        let library = std::env::var_os("CKPT_MOONCAKE_LIBRARY").unwrap();
        Self::start(command(part, Path::new(&stubs)).env("CKPT_TEST_MOONCAKE_LIBRARY", library))
    }

    /// Mooncake's Python API.
    pub fn python<S: AsRef<OsStr>>(arguments: &[S]) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/mooncake_peer.py");
        let python = std::env::var_os("CKPT_TEST_PYTHON").unwrap_or("python3".into());
        Self::start(Command::new(python).arg(script).args(arguments).env_remove("LD_LIBRARY_PATH"))
    }

    /// The rest of the next line that starts with `word`.
    pub fn says(&mut self, word: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.said.read_line(&mut line).unwrap() > 0, "the peer ended and did not say {word}");
            // libtest prints the test's name in front.
            if let Some(at) = line.find(word) {
                return line[at + word.len()..].trim().to_owned();
            }
        }
    }

    pub fn tell(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Fails if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Opens devices and transports over the real library.
pub struct Real {
    pub folder: tempfile::TempDir,
}

impl Real {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub fn open_device(&self, rank: u32) -> Result<Arc<dyn DeviceBackend>> {
        let runtime_dir = self.folder.path().join("run");
        Ok(Arc::new(HostDevice::open(&DeviceConfig { rank, local_rank: rank, runtime_dir })?))
    }

    pub fn open(&self, device: Arc<dyn DeviceBackend>) -> Result<Arc<dyn Transport>> {
        let provider = MooncakeProvider::new(MooncakeConfig::from_env(&|name| std::env::var(name).ok()));
        let runtime_dir: PathBuf = self.folder.path().join("run");
        provider.open(&TransportConfig {
            bind: std::net::Ipv4Addr::LOCALHOST.into(),
            runtime_dir,
            tls: false,
            secret: Vec::new(),
            connections: 1,
            device,
        })
    }
}

/// One engine of this process.
pub struct Node {
    pub transport: Arc<dyn Transport>,
    _real: Real,
}

impl Node {
    pub fn new() -> Self {
        let real = Real::new();
        let transport = real.open(real.open_device(0).unwrap()).unwrap();
        Self { transport, _real: real }
    }

    pub fn one_sided(&self) -> &dyn OneSided {
        self.transport.one_sided().unwrap()
    }

    pub async fn read(
        &self,
        region: &Arc<RemoteRegion>,
        into: &BufferSlice,
        deadline: Instant,
    ) -> Result<()> {
        let op = ReadOp { region: region.clone(), offset: 0, into: into.clone() };
        self.one_sided().post_read(vec![op], deadline)?.done(soon()).await
    }
}

/// The pattern of `mooncake_peer.py`.
pub fn pattern(index: u64, len_bytes: u64) -> Vec<u8> {
    let words = (0..len_bytes / 8).map(|i| (i + (index << 40)).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    words.flat_map(u64::to_le_bytes).collect()
}

pub fn target(len_bytes: u64) -> (Arc<HostBuffer>, BufferSlice) {
    let buffer = HostBuffer::allocate(len_bytes).unwrap();
    assert_eq!(buffer.len_bytes(), len_bytes);
    (buffer.clone(), buffer.slice())
}

/// Whether `slice` holds `bytes`; whatever writes it has ended.
pub fn holds(slice: &BufferSlice, bytes: &[u8]) -> bool {
    // SAFETY: nothing writes the slice any more.
    unsafe { slice.as_slice() }.unwrap() == bytes
}
