//! Writing safetensors files, laid out as the reference implementation does it.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use super::{
    memory::file_error,
    source::{CheckpointSource, Origin},
};
use crate::{
    error::{Error, ErrorKind, Key, Result},
    types::{DType, TensorMeta},
};

const WRITE: &str = "write safetensors";
const CHUNK_BYTES: u64 = 4 << 20;

/// Writes tensors to one file and returns its size. The file appears under its name when it is complete.
///
/// Tensors are ordered as the reference implementation orders them (larger element types first, then by name), so
/// that equal tensors give an equal file whatever their order here.
pub fn write_safetensors<'a>(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = (&'a TensorMeta, &'a [u8])>,
) -> Result<u64> {
    let tensors: Vec<(&TensorMeta, &[u8])> = tensors.into_iter().collect();
    if let Some((meta, bytes)) = tensors.iter().find(|(meta, bytes)| meta.len_bytes() != bytes.len() as u64) {
        return Err(Error::new(
            ErrorKind::ConfigInvalid,
            WRITE,
            format!("dtype and shape say {} bytes, {} were given", meta.len_bytes(), bytes.len()),
        )
        .with(Key::Tensor, &meta.name));
    }
    let metas: Vec<&TensorMeta> = tensors.iter().map(|(meta, _)| *meta).collect();
    write_with(path.as_ref(), &metas, |index, out| out.write_all(tensors[index].1).map_err(WriteFailure::Io))
}

/// Writes any source as a folder: files of at most about `max_file_bytes` (a larger tensor has a file of its own) and
/// `model.safetensors.index.json`. Returns the files.
pub fn save_checkpoint(
    source: &CheckpointSource,
    folder: impl AsRef<Path>,
    max_file_bytes: u64,
) -> Result<Vec<PathBuf>> {
    let folder = folder.as_ref();
    fs::create_dir_all(folder).map_err(|e| file_error(WRITE, folder, e))?;
    let mut shards: Vec<Vec<usize>> = vec![Vec::new()];
    let mut bytes = 0_u64;
    for (index, tensor) in source.tensors().iter().enumerate() {
        let len = tensor.meta.len_bytes();
        if bytes > 0 && bytes.saturating_add(len) > max_file_bytes {
            shards.push(Vec::new());
            bytes = 0;
        }
        bytes += len;
        if let Some(shard) = shards.last_mut() {
            shard.push(index);
        }
    }
    let mut weight_map = BTreeMap::new();
    let mut paths = Vec::with_capacity(shards.len());
    let mut chunk = vec![0; CHUNK_BYTES as usize];
    for (number, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
        let path = folder.join(&name);
        let metas: Vec<&TensorMeta> = shard.iter().map(|i| &source.tensors()[*i].meta).collect();
        write_with(&path, &metas, |index, out| {
            let tensor = &source.tensors()[shard[index]];
            let file = match tensor.origin {
                Origin::File { file, .. } => {
                    Some(source.files[file].reopen(false).map_err(WriteFailure::Source)?)
                }
                _ => None,
            };
            let len = tensor.meta.len_bytes();
            for at in (0..len).step_by(CHUNK_BYTES as usize) {
                let part = &mut chunk[..(len - at).min(CHUNK_BYTES) as usize];
                source.read_at(tensor, file.as_ref(), at, part).map_err(WriteFailure::Source)?;
                out.write_all(part).map_err(WriteFailure::Io)?;
            }
            Ok(())
        })?;
        weight_map.extend(metas.iter().map(|meta| (meta.name.clone(), name.clone())));
        paths.push(path);
    }
    let index = folder.join("model.safetensors.index.json");
    let text =
        serde_json::json!({ "metadata": { "total_size": source.len_bytes() }, "weight_map": weight_map });
    fs::write(&index, text.to_string()).map_err(|e| file_error(WRITE, &index, e))?;
    Ok(paths)
}

/// Whose fault a failed write is.
enum WriteFailure {
    Io(std::io::Error),
    Source(Error),
}

/// Writes header and tensors; `write` is called with the index of each tensor in file order and writes its bytes.
fn write_with(
    path: &Path,
    metas: &[&TensorMeta],
    mut write: impl FnMut(usize, &mut BufWriter<File>) -> Result<(), WriteFailure>,
) -> Result<u64> {
    let mut order: Vec<(Dtype, usize)> = Vec::with_capacity(metas.len());
    let mut names = HashSet::new();
    for (index, meta) in metas.iter().enumerate() {
        if !names.insert(&meta.name) {
            return Err(Error::new(ErrorKind::ConfigInvalid, WRITE, "the name was given twice")
                .with(Key::Path, path.display())
                .with(Key::Tensor, &meta.name));
        }
        order.push((format_dtype(meta.dtype), index));
    }
    order.sort_by(|(a, i), (b, j)| b.cmp(a).then_with(|| metas[*i].name.cmp(&metas[*j].name)));
    let header = header(path, metas, &order)?;

    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let file_name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(
        ".{file_name}.{}.{}",
        std::process::id(),
        COUNTER.fetch_add(1, Ordering::Relaxed)
    ));
    let io = |e| file_error(WRITE, path, e);
    let result = (|| {
        let file = File::create_new(&temporary).map_err(io)?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        out.write_all(&header).map_err(io)?;
        let mut len_bytes = header.len() as u64;
        for (_, index) in order {
            write(index, &mut out).map_err(|failure| match failure {
                WriteFailure::Io(e) => io(e),
                WriteFailure::Source(e) => e,
            })?;
            len_bytes += metas[index].len_bytes();
        }
        out.into_inner().map_err(|e| io(e.into_error()))?;
        fs::rename(&temporary, path).map_err(io)?;
        Ok(len_bytes)
    })();
    if result.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// Length and JSON, padded with blanks so that the data starts at a multiple of 8.
fn header(path: &Path, metas: &[&TensorMeta], order: &[(Dtype, usize)]) -> Result<Vec<u8>> {
    let fail = |message: String| {
        Error::new(ErrorKind::ConfigInvalid, WRITE, message).with(Key::Path, path.display())
    };
    let mut offset = 0_usize;
    let mut tensors = Vec::with_capacity(order.len());
    for (dtype, index) in order {
        let meta = metas[*index];
        let end = offset.saturating_add(meta.len_bytes() as usize);
        let shape = meta.shape.iter().map(|d| *d as usize).collect();
        tensors
            .push((meta.name.to_string(), TensorInfo { dtype: *dtype, shape, data_offsets: (offset, end) }));
        offset = end;
    }
    let metadata =
        Metadata::new(None, tensors).map_err(|e| fail(format!("the tensors do not fit the format: {e}")))?;
    let mut json =
        serde_json::to_vec(&metadata).map_err(|e| fail(format!("the header cannot be written: {e}")))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}

/// The crate's dtype; its order is the order of the file.
fn format_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::BOOL => Dtype::BOOL,
        DType::F4 => Dtype::F4,
        DType::F6_E2M3 => Dtype::F6_E2M3,
        DType::F6_E3M2 => Dtype::F6_E3M2,
        DType::U8 => Dtype::U8,
        DType::I8 => Dtype::I8,
        DType::F8_E5M2 => Dtype::F8_E5M2,
        DType::F8_E4M3 => Dtype::F8_E4M3,
        DType::F8_E8M0 => Dtype::F8_E8M0,
        DType::F8_E4M3FNUZ => Dtype::F8_E4M3FNUZ,
        DType::F8_E5M2FNUZ => Dtype::F8_E5M2FNUZ,
        DType::I16 => Dtype::I16,
        DType::U16 => Dtype::U16,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I32 => Dtype::I32,
        DType::U32 => Dtype::U32,
        DType::F32 => Dtype::F32,
        DType::C64 => Dtype::C64,
        DType::F64 => Dtype::F64,
        DType::I64 => Dtype::I64,
        DType::U64 => Dtype::U64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crate_and_we_order_and_name_types_alike() {
        for pair in DType::ALL.windows(2) {
            assert!(format_dtype(pair[0]) < format_dtype(pair[1]), "{pair:?}");
        }
        for dtype in DType::ALL {
            assert_eq!(format_dtype(*dtype).to_string(), dtype.safetensors_name());
            assert_eq!(format_dtype(*dtype).bitsize() as u32, dtype.bits());
        }
    }
}
