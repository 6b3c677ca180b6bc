//! Where a checkpoint's tensors are.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File},
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;

use super::{
    generate,
    header::read_header,
    memory::{LentBytes, file_error},
    split::split,
};
use crate::{
    device::BufferSlice,
    error::{Error, ErrorKind, Key, Result},
    types::{DType, TensorMeta},
};

const OPEN: &str = "open checkpoint";
const INDEX: &str = "model.safetensors.index.json";
/// Far above any real index (Kimi-K2's has 15 MB).
const MAX_INDEX_BYTES: u64 = 512 << 20;

/// A tensor in this process's host memory.
#[derive(Clone, Debug)]
pub struct NamedTensor {
    meta: TensorMeta,
    data: BufferSlice,
}

impl NamedTensor {
    /// A tensor whose bytes are shared, not copied. They must be as many as dtype and shape say.
    pub fn from_bytes(meta: TensorMeta, bytes: impl Into<Bytes>) -> Result<Self> {
        Self::from_buffer(meta, BufferSlice::whole(Arc::new(LentBytes(bytes.into()))))
    }

    /// A tensor whose bytes are copied.
    pub fn from_slice(meta: TensorMeta, bytes: &[u8]) -> Result<Self> {
        Self::from_bytes(meta, Bytes::copy_from_slice(bytes))
    }

    /// A tensor in memory that the caller owns, and does not write until it is loaded. Device memory is refused.
    pub fn from_buffer(meta: TensorMeta, data: BufferSlice) -> Result<Self> {
        let operation = "take a named tensor";
        if data.len_bytes() != meta.len_bytes() {
            return Err(Error::new(
                ErrorKind::ConfigInvalid,
                operation,
                format!("dtype and shape say {} bytes, {} were given", meta.len_bytes(), data.len_bytes()),
            )
            .with(Key::Tensor, &meta.name));
        }
        data.host_ptr().map_err(|e| e.with(Key::Tensor, &meta.name))?;
        Ok(Self { meta, data })
    }
}

/// Where one tensor's bytes are.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    File { file: usize, offset: u64 },
    Memory(BufferSlice),
    Generated { seed: u64 },
}

/// One tensor of a source.
#[derive(Clone, Debug)]
pub struct SourceTensor {
    /// Name, dtype, shape.
    pub meta: TensorMeta,
    pub(super) origin: Origin,
}

/// What tells a file from another one that took its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileIdentity {
    pub device: u64,
    pub inode: u64,
    pub len_bytes: u64,
    /// `None` on tmpfs: there another rank that pins the file in place changes it.
    modified: Option<(i64, i64)>,
}

/// From `linux/magic.h`.
const TMPFS_MAGIC: u64 = 0x0102_1994;

impl FileIdentity {
    fn of(file: &File) -> std::io::Result<Self> {
        let m = file.metadata()?;
        let tmpfs = rustix::fs::fstatfs(file)?.f_type as u64 == TMPFS_MAGIC;
        let modified = (!tmpfs).then(|| (m.mtime(), m.mtime_nsec()));
        Ok(Self { device: m.dev(), inode: m.ino(), len_bytes: m.len(), modified })
    }
}

#[derive(Clone, Debug)]
pub(super) struct SourceFile {
    pub path: PathBuf,
    pub identity: FileIdentity,
}

impl SourceFile {
    /// Opens the file again, for reading (and for writing, if it is to be mapped in place), if it is still the same.
    pub fn reopen(&self, writable: bool) -> Result<File> {
        let operation = "read checkpoint";
        let fail = |e| file_error(operation, &self.path, e);
        let file = File::options().read(true).write(writable).open(&self.path).map_err(fail)?;
        if FileIdentity::of(&file).map_err(fail)? != self.identity {
            return Err(Error::new(
                ErrorKind::Corrupt,
                operation,
                "the file changed after it was opened; let its writer finish and open the checkpoint again",
            )
            .with(Key::Path, self.path.display()));
        }
        Ok(file)
    }
}

/// A checkpoint that can be read: every tensor with the place of its bytes, in the order of the files.
///
/// Opening reads only headers.
#[derive(Clone, Debug, Default)]
pub struct CheckpointSource {
    pub(super) files: Vec<SourceFile>,
    tensors: Vec<SourceTensor>,
}

impl CheckpointSource {
    /// Opens one `.safetensors` file or a folder: with `model.safetensors.index.json` the files that it names, else all
    /// `*.safetensors` by name (hidden ones are left out). A file of 0 bytes holds no tensors.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let metadata = fs::metadata(path).map_err(|e| file_error(OPEN, path, e))?;
        if !metadata.is_dir() {
            return Self::open_files(&[path]);
        }
        let index = path.join(INDEX);
        if index.try_exists().map_err(|e| file_error(OPEN, &index, e))? {
            return Self::open_index(path, &index);
        }
        let mut files = Vec::new();
        let mut refused = None;
        for entry in fs::read_dir(path).map_err(|e| file_error(OPEN, path, e))? {
            let file = entry.map_err(|e| file_error(OPEN, path, e))?.path();
            let hidden = file.file_name().is_none_or(|n| n.as_encoded_bytes().starts_with(b"."));
            if !hidden && file.extension().is_some_and(|e| e == "safetensors") {
                files.push(file);
            } else if !hidden && conversion_hint(&file).is_some() {
                refused = refused.max(Some(file));
            }
        }
        if files.is_empty() {
            return Err(match refused {
                Some(file) => refuse(&file),
                None => Error::new(
                    ErrorKind::ConfigInvalid,
                    OPEN,
                    format!("the folder holds neither {INDEX} nor any .safetensors file"),
                )
                .with(Key::Path, path.display()),
            });
        }
        files.sort();
        Self::open_files(&files)
    }

    /// Opens exactly these safetensors files, in this order. A name that is in two of them is an error.
    pub fn open_files(paths: &[impl AsRef<Path>]) -> Result<Self> {
        let mut source = Self::default();
        let mut holders: HashMap<Arc<str>, usize> = HashMap::new();
        for path in paths {
            for tensor in source.add_file(path.as_ref())? {
                let file = source.files.len() - 1;
                if let Some(other) = holders.insert(tensor.meta.name.clone(), file) {
                    return Err(source.duplicate(&tensor.meta.name, other, file));
                }
                source.tensors.push(tensor);
            }
        }
        Ok(source)
    }

    /// Where a name is in several files the index decides; what it does not list must be in one file only.
    fn open_index(folder: &Path, index: &Path) -> Result<Self> {
        let corrupt =
            |message: String| Error::new(ErrorKind::Corrupt, OPEN, message).with(Key::Path, index.display());
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let len = fs::metadata(index).map_err(|e| file_error(OPEN, index, e))?.len();
        if len > MAX_INDEX_BYTES {
            return Err(corrupt(format!(
                "the index has {len} bytes, more than the limit of {MAX_INDEX_BYTES}"
            )));
        }
        let text = fs::read(index).map_err(|e| file_error(OPEN, index, e))?;
        let Index { weight_map } =
            serde_json::from_slice(&text).map_err(|e| corrupt(format!("the index is not valid: {e}")))?;

        let names: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
        let mut source = Self::default();
        let mut numbers = HashMap::new();
        let mut holders: HashMap<Arc<str>, usize> = HashMap::new();
        for name in names {
            let inside = Path::new(name).components().all(|c| matches!(c, Component::Normal(_)));
            if name.is_empty() || !inside {
                return Err(corrupt(format!(
                    "the index names {name:?}, which is not a file inside the folder"
                )));
            }
            let path = folder.join(name);
            if !path.exists() {
                return Err(Error::new(
                    ErrorKind::ConfigInvalid,
                    OPEN,
                    format!("{INDEX} names this file, but it does not exist; fetch it or correct the index"),
                )
                .with(Key::Path, path.display()));
            }
            let tensors = source.add_file(&path)?;
            let file = source.files.len() - 1;
            numbers.insert(name, file);
            for tensor in tensors {
                if let Some(listed) = weight_map.get(&*tensor.meta.name) {
                    if listed != name {
                        continue;
                    }
                } else if let Some(other) = holders.insert(tensor.meta.name.clone(), file) {
                    return Err(source.duplicate(&tensor.meta.name, other, file));
                }
                source.tensors.push(tensor);
            }
        }
        let found: BTreeSet<&str> = source.tensors.iter().map(|t| &*t.meta.name).collect();
        if let Some((tensor, file)) = weight_map.iter().find(|(tensor, _)| !found.contains(tensor.as_str())) {
            let path = source.files[numbers[file.as_str()]].path.display();
            return Err(Error::new(
                ErrorKind::Corrupt,
                OPEN,
                format!("{INDEX} names a tensor that the file does not hold; fetch the file again or correct the index"),
            )
            .with(Key::Tensor, tensor)
            .with(Key::Path, path));
        }
        Ok(source)
    }

    /// Tensors in memory, in this order. A name given twice is an error.
    pub fn from_tensors(tensors: impl IntoIterator<Item = NamedTensor>) -> Result<Self> {
        Self::default().with_tensors(tensors)
    }

    /// Adds tensors in memory. Where a file has the same name, the tensor wins.
    pub fn with_tensors(mut self, tensors: impl IntoIterator<Item = NamedTensor>) -> Result<Self> {
        let added: Vec<SourceTensor> = tensors
            .into_iter()
            .map(|t| SourceTensor { meta: t.meta, origin: Origin::Memory(t.data) })
            .collect();
        let mut names = BTreeSet::new();
        if let Some(twice) = added.iter().find(|t| !names.insert(t.meta.name.clone())) {
            return Err(Error::new(ErrorKind::ConfigInvalid, OPEN, "the name was given twice")
                .with(Key::Tensor, &twice.meta.name));
        }
        self.tensors.retain(|t| !names.contains(&t.meta.name));
        self.tensors.extend(added);
        Ok(self)
    }

    /// Tensors whose bytes are made up from `seed`, the same in every process: see [`generate::fill`].
    pub fn generated(tensors: impl IntoIterator<Item = TensorMeta>, seed: u64) -> Self {
        let tensors = tensors
            .into_iter()
            .map(|meta| SourceTensor { meta, origin: Origin::Generated { seed } })
            .collect();
        Self { files: Vec::new(), tensors }
    }

    /// Every tensor: files in order, each in the order of its bytes, then tensors in memory.
    pub fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    /// The files that the tensors are in.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|f| f.path.as_path())
    }

    /// Bytes of all tensors.
    pub fn len_bytes(&self) -> u64 {
        self.tensors.iter().fold(0, |sum, t| sum.saturating_add(t.meta.len_bytes()))
    }

    /// One contiguous range of [`Self::tensors`] a rank, balanced by bytes: see [`split`].
    pub fn split(&self, world_size: u32) -> Result<Vec<Range<usize>>> {
        split(self.tensors.iter().map(|t| t.meta.len_bytes()), world_size)
    }

    /// Reads one tensor, for checks and small uses; [`super::load`] is the fast way.
    pub fn read(&self, index: usize) -> Result<Vec<u8>> {
        let Some(tensor) = self.tensors.get(index) else {
            return Err(Error::new(
                ErrorKind::ConfigInvalid,
                "read checkpoint",
                format!("there is no tensor {index}"),
            ));
        };
        let mut bytes = vec![0; tensor.meta.len_bytes() as usize];
        let file = match tensor.origin {
            Origin::File { file, .. } => Some(self.files[file].reopen(false)?),
            _ => None,
        };
        self.read_at(tensor, file.as_ref(), 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads a part of one tensor; `file` is the opened file of a tensor that is in one.
    pub(super) fn read_at(
        &self,
        tensor: &SourceTensor,
        file: Option<&File>,
        at: u64,
        out: &mut [u8],
    ) -> Result<()> {
        match &tensor.origin {
            Origin::Generated { seed } => generate::fill(&tensor.meta, *seed, at, out),
            Origin::Memory(data) => {
                let part = data.slice(at..at + out.len() as u64)?;
                // SAFETY: the tensor's owner promised not to write it until it is loaded (`NamedTensor::from_buffer`).
                out.copy_from_slice(unsafe { part.as_slice() }?);
            }
            Origin::File { file: number, offset } => {
                let Some(file) = file else {
                    return Err(Error::new(
                        ErrorKind::Internal,
                        "read checkpoint",
                        "the tensor's file is not open",
                    ));
                };
                let path = &self.files[*number].path;
                file.read_exact_at(out, offset + at).map_err(|e| {
                    let error = match e.kind() {
                        std::io::ErrorKind::UnexpectedEof => shrank(path, offset + at),
                        _ => file_error("read checkpoint", path, e),
                    };
                    error.with(Key::Tensor, &tensor.meta.name)
                })?;
            }
        }
        Ok(())
    }

    fn add_file(&mut self, path: &Path) -> Result<Vec<SourceTensor>> {
        if conversion_hint(path).is_some() {
            return Err(refuse(path));
        }
        let fail = |e| file_error(OPEN, path, e);
        // A named pipe would block the open; look before.
        if !fs::metadata(path).map_err(fail)?.is_file() {
            return Err(Error::new(ErrorKind::ConfigInvalid, OPEN, "this is not a regular file")
                .with(Key::Path, path.display()));
        }
        let file = File::open(path).map_err(fail)?;
        let identity = FileIdentity::of(&file).map_err(fail)?;
        let number = self.files.len();
        let tensors = read_header(&file, path, identity.len_bytes)?
            .into_iter()
            .map(|t| SourceTensor { meta: t.meta, origin: Origin::File { file: number, offset: t.offset } })
            .collect();
        self.files.push(SourceFile { path: path.to_owned(), identity });
        Ok(tensors)
    }

    fn duplicate(&self, tensor: &str, first: usize, second: usize) -> Error {
        Error::new(
            ErrorKind::Corrupt,
            OPEN,
            format!(
                "the tensor is in two files, {} and {}; leave one of them out",
                self.files[first].path.display(),
                self.files[second].path.display()
            ),
        )
        .with(Key::Tensor, tensor)
    }
}

/// The error for a file that ended before the header's promise.
pub(super) fn shrank(path: &Path, at: u64) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        "read checkpoint",
        format!("the file shrank while it was read: no byte {at}; let its writer finish and open the checkpoint again"),
    )
    .with(Key::Path, path.display())
}

/// How to convert a format that is not read here, because reading it would run code or because it is deprecated.
fn conversion_hint(path: &Path) -> Option<&'static str> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    Some(match extension.as_str() {
        "npy" | "meta" => {
            "the deprecated .npy + .meta pair needs pickle; load it in Python with checkpoint-engine's own loader and \
             write it with safetensors.torch.save_file(tensors, \"model.safetensors\")"
        }
        "bin" | "pt" | "pth" | "ckpt" | "pkl" => {
            "pickled files are not read, because they can run code; convert in Python: \
             safetensors.torch.save_file(torch.load(file, weights_only=True), \"model.safetensors\")"
        }
        "gguf" => "GGUF is not read; take the model's original safetensors files",
        _ => return None,
    })
}

fn refuse(path: &Path) -> Error {
    Error::new(ErrorKind::Unsupported, OPEN, conversion_hint(path).unwrap_or_default())
        .with(Key::Path, path.display())
}

/// The dtype's size for alignment: the packed types are bytes.
pub(super) fn element_bytes(dtype: DType) -> u64 {
    u64::from(dtype.bits()).div_ceil(8)
}
