//! Everything here that reads bytes of strangers, as functions that must neither panic nor hang nor take memory that
//! the input does not pay for; and a mutator for toolchains without a fuzzer.
//!
//! `fuzz/` holds the corpora and the same targets for cargo-fuzz; `tests/fuzz.rs` runs them on any toolchain.

use std::{cell::RefCell, io, path::Path, time::Duration};

use tokio::{io::AsyncWriteExt, net::UnixStream, runtime::Runtime};

use super::Random;
use crate::{
    checkpoint::header::read_header_of,
    control::{ToHub, ToRank, codec},
    engine::HttpTemplate,
    metas::{Metas, decode_layout},
    predict::Cluster,
    sink::{checkpoint_engine::read_reply, zmtp::Replier},
    topology::{HcaFilter, npu_chip_index},
    transport::tcp::wire as tcp,
    worker::wire,
};

/// Reads `data` as whatever it stands for; panics if a law of that reader is broken.
pub type Target = fn(data: &[u8]);

/// All targets by name, which is also that of their corpus.
pub const TARGETS: &[(&str, Target)] = &[
    ("safetensors_header", safetensors_header),
    ("metas_json", metas_json),
    ("metas_binary", metas_binary),
    ("control_frames", control_frames),
    ("worker_frames", worker_frames),
    ("worker_replies", worker_replies),
    ("ce_replies", ce_replies),
    ("zmtp", zmtp),
    ("tcp_frames", tcp_frames),
    ("hca_strings", hca_strings),
    ("npu_smi", npu_smi),
    ("engine_templates", engine_templates),
    ("cluster_files", cluster_files),
];

fn safetensors_header(data: &[u8]) {
    let read_at = |bytes: &mut [u8], offset: u64| {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let from = data.get(start..).and_then(|rest| rest.get(..bytes.len()));
        bytes.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    };
    let Ok(tensors) = read_header_of(read_at, Path::new("fuzzed"), data.len() as u64) else { return };
    let mut end = 0;
    for tensor in tensors {
        assert!(tensor.offset >= end, "tensors overlap");
        end = tensor.offset + tensor.meta.len_bytes();
    }
    assert!(end <= data.len() as u64, "a tensor leaves its file");
}

fn metas_json(data: &[u8]) {
    if let Ok(metas) = Metas::from_json(data)
        && let Ok(text) = metas.to_json()
    {
        // What is written can be read, and says the same.
        let again = Metas::from_json(text.as_bytes()).map(|metas| metas.to_json().ok());
        assert_eq!(again.ok().flatten(), Some(text), "metas changed on their way through JSON");
    }
}

fn metas_binary(data: &[u8]) {
    let _ = decode_layout(data);
    if let Ok(metas) = Metas::decode(data)
        && let Ok(bytes) = metas.encode()
    {
        assert_eq!(Metas::decode(&bytes).ok(), Some(metas), "metas changed on their way");
    }
}

/// The bytes as a connection brings them, then as one frame of each direction.
fn control_frames(data: &[u8]) {
    fn stream<T: codec::Message>(data: &[u8]) {
        let mut receiver = codec::Receiver::new(Box::new(io::Cursor::new(data.to_vec())));
        block_on(async { while receiver.next::<T>().await.is_ok() {} });
        if let Ok(message) = codec::decode::<T>(data) {
            let frame = codec::encode(&message, codec::FRAME_BYTES);
            assert!(
                frame.is_ok_and(|frame| codec::decode::<T>(&frame[4..]).is_ok()),
                "what was read cannot be sent"
            );
        }
    }
    stream::<ToHub>(data);
    stream::<ToRank>(data);
}

/// What a worker reads from its endpoint.
fn worker_frames(data: &[u8]) {
    frames(data, wire::MAX_TO_WORKER, |kind, body| {
        let Ok(message) = wire::Down::decode(kind, body) else { return false };
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        let again = wire::Down::decode(kind, &bytes[wire::HEADER_LEN..]);
        // Text is clipped when it is sent.
        assert!(again.is_ok(), "a message that was read cannot be sent");
        true
    });
}

/// What a parameter server reads from a native worker.
fn worker_replies(data: &[u8]) {
    frames(data, wire::MAX_FROM_WORKER, |kind, body| wire::Up::decode(kind, body).is_ok());
}

fn frames(mut data: &[u8], limit: u32, mut take: impl FnMut(u8, &[u8]) -> bool) {
    if let Some(preamble) = data.first_chunk() {
        let _ = wire::agree(preamble);
    }
    while let Some((header, rest)) = data.split_first_chunk() {
        let Ok((len, kind)) = wire::header(header, limit) else { return };
        let Some((body, tail)) = rest.split_at_checked(len) else { return };
        if !take(kind, body) {
            return;
        }
        data = tail;
    }
}

/// What one of checkpoint-engine's workers answers: text, never loaded.
fn ce_replies(data: &[u8]) {
    if let Err((_, text)) = read_reply(data) {
        assert!(text.len() < 20_000, "{} bytes of a worker's words in a message", text.len());
    }
}

/// A peer's whole side of a connection, from the greeting on.
fn zmtp(data: &[u8]) {
    block_on(async {
        let Ok((ours, mut theirs)) = UnixStream::pair() else { return };
        let speak = async {
            // Fails if our side has heard enough.
            let _ = theirs.write_all(data).await;
            let _ = theirs.shutdown().await;
            theirs
        };
        let listen = async {
            let mut peer = Replier::handshake(ours).await.ok()?;
            while peer.request(b"request").await.is_ok() && peer.reply().await.is_ok() {}
            Some(())
        };
        let both = async { tokio::join!(speak, listen) };
        assert!(tokio::time::timeout(Duration::from_secs(10), both).await.is_ok(), "the link hangs");
    });
}

fn tcp_frames(data: &[u8]) {
    let _ = tcp::decode::<tcp::Hello>(data);
    let _ = tcp::decode::<tcp::Table>(data);
    let _ = tcp::decode::<tcp::Notice>(data);
    let _ = tcp::Token::decode(data);
}

fn hca_strings(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(filter) = text.parse::<HcaFilter>() {
        let shown = filter.to_string();
        assert_eq!(shown.parse().ok(), Some(filter), "`{text}` is shown as `{shown}`");
    }
}

/// The first line is the process, as its caller knows it.
fn npu_smi(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let Some((pid, printed)) = text.split_once('\n') else { return };
    let Ok(pid) = pid.parse::<u32>() else { return };
    for npu in [0, 7] {
        if npu_chip_index(npu, pid, printed).is_some() {
            assert!(printed.contains(&pid.to_string()), "a process that is not listed has a chip");
        }
    }
}

fn engine_templates(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = HttpTemplate::parse(text);
    }
}

/// A cluster as JSON: the command line reads the same from TOML.
fn cluster_files(data: &[u8]) {
    let Ok(cluster) = serde_json::from_slice::<Cluster>(data) else { return };
    if cluster.validate().is_ok() {
        let devices = cluster.devices();
        assert!(devices > 0 && cluster.node_count() > 0, "a cluster of nothing");
        assert!(cluster.slot(0).is_some() && cluster.slot(devices - 1).is_some(), "a device without a place");
        assert_eq!(cluster.slot(devices), None);
        let _ = cluster.free_bytes();
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: RefCell<Option<Runtime>> = const { RefCell::new(None) };
    }
    RUNTIME.with_borrow_mut(|runtime| {
        let build = || tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.get_or_insert_with(|| build().expect("a test machine has a runtime to give")).block_on(future)
    })
}

/// Makes inputs out of a corpus: the same for the same seed.
#[derive(Clone, Debug)]
pub struct Mutator {
    corpus: Vec<Vec<u8>>,
    random: Random,
}

/// Longest input that is made.
const MAX_INPUT: usize = 4096;
/// Numbers at which readers of lengths stumble.
const EDGES: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    i64::MAX as u64,
    u64::MAX - 1,
    u64::MAX,
];
/// Words of the formats; numbers and quotes that JSON and its readers disagree about.
const WORDS: [&[u8]; 16] = [
    b"NaN",
    b"1e400",
    b"-0",
    b"-1",
    b"18446744073709551616",
    b"null",
    b"\"\"",
    b"[]",
    b"{}",
    b"\\ud800",
    b"\0",
    b"../",
    b"^=",
    b":",
    b",",
    b"{{version}}",
];

impl Mutator {
    /// Starts from `corpus`; an empty one is taken for one empty input.
    pub fn new(mut corpus: Vec<Vec<u8>>, seed: u64) -> Self {
        if corpus.is_empty() {
            corpus.push(Vec::new());
        }
        Self { corpus, random: Random::new(seed) }
    }

    /// The next input.
    pub fn make(&mut self) -> Vec<u8> {
        let mut input = self.pick().to_vec();
        for _ in 0..1 + self.random.below(4) {
            self.mutate(&mut input);
        }
        input.truncate(MAX_INPUT);
        input
    }

    fn pick(&mut self) -> &[u8] {
        let index = self.random.below(self.corpus.len() as u64) as usize;
        &self.corpus[index]
    }

    fn mutate(&mut self, input: &mut Vec<u8>) {
        let at = self.random.below(input.len() as u64 + 1) as usize;
        let len = self.random.below(16) as usize;
        match self.random.below(9) {
            0 => input.truncate(at),
            1 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte ^= 1 << self.random.below(8);
                }
            }
            2 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = self.random.draw() as u8;
                }
            }
            3 => drop(input.drain(at..(at + len).min(input.len()))),
            4 => {
                let again = input[at..(at + len * 16).min(input.len())].to_vec();
                input.splice(at..at, again);
            }
            5 => {
                let edge = EDGES[self.random.below(EDGES.len() as u64) as usize];
                let bytes = if self.random.one_in(2) { edge.to_le_bytes() } else { edge.to_be_bytes() };
                let width = 1 << self.random.below(4);
                let bytes = &bytes[..width.min(bytes.len())];
                let end = (at + bytes.len()).min(input.len());
                input.splice(at..end, bytes.iter().copied());
            }
            6 => {
                let word = WORDS[self.random.below(WORDS.len() as u64) as usize];
                let end = if self.random.one_in(2) { at } else { (at + word.len()).min(input.len()) };
                input.splice(at..end, word.iter().copied());
            }
            7 => {
                let other = self.pick().to_vec();
                let from = self.random.below(other.len() as u64 + 1) as usize;
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            _ => {
                // A length field that says what follows, after other changes.
                let rest = input.len().saturating_sub(at + 8) as u64;
                let bytes = if self.random.one_in(2) { rest.to_le_bytes() } else { rest.to_be_bytes() };
                let end = (at + 8).min(input.len());
                input.splice(at..end, bytes);
            }
        }
    }
}
