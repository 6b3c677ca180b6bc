//! Whether two checkpoints hold the same bytes.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use super::source::{CheckpointSource, Origin, SourceTensor};
use crate::{
    error::Result,
    types::{TensorMeta, format_shape},
};

const CHUNK_BYTES: u64 = 4 << 20;

/// How a checkpoint differs from the expected one. Printed as one line that names the tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// The expected tensor is not there.
    Missing(Arc<str>),
    /// A tensor that nobody expected.
    Unexpected(Arc<str>),
    /// Another dtype or shape.
    Meta {
        /// What it should be.
        expected: TensorMeta,
        /// What it is.
        actual: TensorMeta,
    },
    /// Other bytes.
    Bytes {
        /// Which tensor.
        tensor: TensorMeta,
        /// The first byte that differs, from the tensor's start.
        at: u64,
        /// What it should be.
        expected: u8,
        /// What it is.
        actual: u8,
    },
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Difference::Missing(name) => write!(f, "tensor {name} is missing"),
            Difference::Unexpected(name) => write!(f, "tensor {name} was not expected"),
            Difference::Meta { expected, actual } => write!(
                f,
                "tensor {} should be {} {}, is {} {}",
                expected.name,
                expected.dtype,
                format_shape(&expected.shape),
                actual.dtype,
                format_shape(&actual.shape)
            ),
            Difference::Bytes { tensor, at, expected, actual } => write!(
                f,
                "tensor {} ({} {}) differs at byte {at} of {}: should be {expected:#04x}, is {actual:#04x}",
                tensor.name,
                tensor.dtype,
                format_shape(&tensor.shape),
                tensor.len_bytes()
            ),
        }
    }
}

/// What [`compare`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Tensors that are equal.
    pub equal_tensors: usize,
    /// Bytes in them.
    pub equal_bytes: u64,
    /// Tensors that differ, are missing or were not expected.
    pub different_tensors: usize,
    /// The first difference in the order of the expected checkpoint.
    pub first_difference: Option<Difference>,
}

impl Comparison {
    /// Whether the checkpoints are equal.
    pub fn is_equal(&self) -> bool {
        self.different_tensors == 0
    }

    fn note(&mut self, difference: Difference) {
        self.different_tensors += 1;
        self.first_difference.get_or_insert(difference);
    }
}

/// Compares every tensor by name, dtype, shape and bytes, whatever the order and the files. Uses all cores.
pub fn compare(expected: &CheckpointSource, actual: &CheckpointSource) -> Result<Comparison> {
    let by_name: HashMap<&str, &SourceTensor> = actual.tensors().iter().map(|t| (&*t.meta.name, t)).collect();
    let tensors = expected.tensors();
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    // Each thread compares the next tensor until none is left; the results are put in order afterwards.
    let work = || {
        let mut pair = (Reader::new(expected), Reader::new(actual));
        let mut found = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(tensor) = tensors.get(index) else { break };
            let difference = match by_name.get(&*tensor.meta.name) {
                None => Some(Difference::Missing(tensor.meta.name.clone())),
                Some(other) if tensor.meta != other.meta => {
                    Some(Difference::Meta { expected: tensor.meta.clone(), actual: other.meta.clone() })
                }
                Some(other) => compare_bytes(tensor, other, &mut pair)
                    .inspect_err(|_| failed.store(true, Ordering::Relaxed))?,
            };
            if let Some(difference) = difference {
                found.push((index, difference));
            }
        }
        Ok(found)
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(tensors.len().max(1));
    let results: Vec<Result<Vec<(usize, Difference)>>> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mine = work();
        let join = |t: std::thread::ScopedJoinHandle<'_, _>| {
            t.join().unwrap_or_else(|p| std::panic::resume_unwind(p))
        };
        std::iter::once(mine).chain(others.into_iter().map(join)).collect()
    });
    let mut found: Vec<(usize, Difference)> = results.into_iter().collect::<Result<Vec<_>>>()?.concat();
    found.sort_by_key(|(index, _)| *index);

    let mut comparison = Comparison { equal_tensors: tensors.len() - found.len(), ..Comparison::default() };
    comparison.equal_bytes = expected.len_bytes();
    for (index, difference) in found {
        comparison.equal_bytes -= tensors[index].meta.len_bytes();
        comparison.note(difference);
    }
    let expected_names: HashSet<&str> = tensors.iter().map(|t| &*t.meta.name).collect();
    for tensor in actual.tensors().iter().filter(|t| !expected_names.contains(&*t.meta.name)) {
        comparison.note(Difference::Unexpected(tensor.meta.name.clone()));
    }
    Ok(comparison)
}

fn compare_bytes(
    expected: &SourceTensor,
    actual: &SourceTensor,
    (left, right): &mut (Reader<'_>, Reader<'_>),
) -> Result<Option<Difference>> {
    let len = expected.meta.len_bytes();
    for at in (0..len).step_by(CHUNK_BYTES as usize) {
        let size = (len - at).min(CHUNK_BYTES) as usize;
        let (a, b) = (left.read(expected, at, size)?, right.read(actual, at, size)?);
        if a == b {
            continue;
        }
        if let Some(i) = a.iter().zip(b).position(|(a, b)| a != b) {
            let tensor = expected.meta.clone();
            return Ok(Some(Difference::Bytes { tensor, at: at + i as u64, expected: a[i], actual: b[i] }));
        }
    }
    Ok(None)
}

/// Reads tensors one after the other, with one open file and one buffer.
struct Reader<'a> {
    source: &'a CheckpointSource,
    file: Option<(usize, File)>,
    chunk: Vec<u8>,
}

impl<'a> Reader<'a> {
    fn new(source: &'a CheckpointSource) -> Self {
        Self { source, file: None, chunk: vec![0; CHUNK_BYTES as usize] }
    }

    fn read(&mut self, tensor: &SourceTensor, at: u64, len: usize) -> Result<&[u8]> {
        if let Origin::File { file, .. } = tensor.origin
            && self.file.as_ref().is_none_or(|(open, _)| *open != file)
        {
            self.file = Some((file, self.source.files[file].reopen(false)?));
        }
        let chunk = &mut self.chunk[..len];
        self.source.read_at(tensor, self.file.as_ref().map(|(_, f)| f), at, chunk)?;
        Ok(chunk)
    }
}
